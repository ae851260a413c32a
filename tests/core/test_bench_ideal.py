"""The ideal denoiser of a set of pictures, against its definition, and the bench's problems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paratafusion_core import schedules, schemes
from paratafusion_core.bench import problems, unipc
from paratafusion_core.bench.problems import Setting
from paratafusion_core.demo import ideal
from paratafusion_core.demo.ideal import Ideal
from paratafusion_core.demo.prompt import SHAPES

IDEAL = Ideal.make(64)


def brute(x: Tensor, sigma: float, alpha: float, rows: Tensor) -> Tensor:
    """Posterior mean over the pictures ``rows``, one density at a time."""
    logs = [-float(((x.flatten() - alpha * m) ** 2).sum()) / (2 * sigma**2) for m in rows]
    weights = [math.exp(log - max(logs)) for log in logs]
    total = sum(weights)
    return sum((w / total * m for w, m in zip(weights, rows, strict=True)), torch.zeros_like(rows[0])).reshape(x.shape)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_against_brute_force(flow: bool, cfg: float) -> None:
    generator = torch.Generator().manual_seed(5)
    levels = torch.tensor([0.97, 0.5, 0.03] if flow else [9.0, 0.8, 0.05], dtype=torch.float64)
    alphas = (1 - levels).tolist() if flow else [1.0] * 3
    clean = IDEAL.images[torch.tensor([3, 9])].reshape(1, 2, *IDEAL.shape)
    noise = torch.randn(3, 2, *IDEAL.shape, generator=generator, dtype=torch.float64)
    x = torch.tensor(alphas, dtype=torch.float64).reshape(3, 1, 1, 1, 1) * clean + levels.reshape(3, 1, 1, 1, 1) * noise
    got = IDEAL.denoiser(2, cfg, flow)(x, levels)
    own = IDEAL.images[IDEAL.labels == 2]
    for w, level in enumerate(levels.tolist()):
        for b in range(2):
            chosen = brute(x[w, b], level, alphas[w], own)
            whole = brute(x[w, b], level, alphas[w], IDEAL.images)
            assert torch.allclose(got[w, b], whole + cfg * (chosen - whole), atol=1e-8)


class OnMps(Tensor):
    """A tensor that says it is on MPS, and as there has no float64."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    def double(self) -> Tensor:
        raise TypeError("MPS has no float64")

    def to(self, *given: object) -> Tensor:
        assert "cpu" in given or torch.float64 not in given
        return self.as_subclass(Tensor).to(*given)


def test_float64_is_left_to_the_cpu_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ideal, unipc, schemes):
        monkeypatch.setattr(module, "send", lambda numbers, like: numbers.to(like.dtype))
    x, sigma = torch.randn(2, 1, *IDEAL.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 0.5])
    there, denoise = x.as_subclass(OnMps), IDEAL.denoiser(1, 4.0)
    assert torch.equal(denoise(there, sigma.as_subclass(OnMps)), denoise(x, sigma))
    for make in (unipc.unipc, schemes.ddim):
        assert torch.equal(make(there[0], schedules.normal(6)).S, make(x[0], schedules.normal(6)).S)


def test_limits() -> None:
    """Pure noise says nothing, a clean picture everything."""
    denoise = IDEAL.denoiser(1)
    own = IDEAL.images[IDEAL.labels == 1]
    mean = denoise(torch.zeros(1, 1, *IDEAL.shape), torch.tensor([1e8]))
    assert torch.allclose(mean.flatten().double(), own.mean(0), atol=1e-6)
    at_noise = IDEAL.denoiser(1, flow=True)(torch.ones(1, 1, *IDEAL.shape), torch.ones(1))
    assert torch.allclose(at_noise, mean, atol=1e-6)
    for sigma in (0.0, 0.01):
        x = own[2].float().reshape(1, 1, *IDEAL.shape)
        assert torch.allclose(denoise(x, torch.tensor([sigma])), x, atol=1e-6)


def test_rows_do_not_influence_each_other() -> None:
    x = torch.randn(5, 3, *IDEAL.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1])
    denoise = IDEAL.denoiser(0, 4.0)
    whole = denoise(x, sigma)
    assert whole.dtype == x.dtype and whole.shape == x.shape
    for w in range(5):
        assert torch.allclose(denoise(x[w : w + 1, 1:2], sigma[w : w + 1]), whole[w : w + 1, 1:2], atol=1e-6)


def test_deterministic_by_seed_with_every_class() -> None:
    assert torch.equal(Ideal.make(64).images, IDEAL.images)
    assert not torch.equal(Ideal.make(64, seed=1).images, IDEAL.images)
    assert set(IDEAL.labels.tolist()) == set(range(IDEAL.classes)) == set(range(len(SHAPES)))
    assert abs(IDEAL.data_rms - float(IDEAL.images.pow(2).mean().sqrt())) < 1e-12
    assert IDEAL.images.abs().max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_names_its_class(shape: str) -> None:
    assert SHAPES[IDEAL.label_of(f"small red {shape}")] == shape
    assert 0 <= IDEAL.label_of("a cat") < IDEAL.classes


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        (lambda: Ideal.make(0), "count", "0"),
        (lambda: Ideal.make(3), "count", "3"),
        (lambda: IDEAL.denoiser(6), "label", "6"),
        (lambda: IDEAL.denoiser(-1), "label", "-1"),
        (lambda: IDEAL.denoiser(0, math.nan), "cfg", "nan"),
    ],
)
def test_bad_input(call: object, name: str, value: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="allowed") as caught:
        call()
    assert str(caught.value).startswith(f"{name} is {value}")


@pytest.mark.parametrize("model", problems.MODELS)
@pytest.mark.parametrize(("sampler", "schedule"), [("ddpm", "normal"), ("euler", "flow")])
def test_every_model_takes_every_setting(model: str, sampler: str, schedule: str) -> None:
    task = problems.make_task(Setting(model, sampler, schedule, 3, 2.0), seed=1)
    first = task.denoise(task.system.S[:1], task.system.sigmas[:1])
    assert first.shape == task.system.S[:1].shape and first.isfinite().all()
    assert 0.2 < task.data_rms < 2 and task.flow == (schedule == "flow")


def test_seeds_take_different_prompts() -> None:
    assert len({problems.prompt_of(seed) for seed in range(12)}) == 12
