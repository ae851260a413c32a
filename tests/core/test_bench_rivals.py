"""The rivals: coupled noise, UniPC, skipped evaluations, and the table that they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, cli, schedules, schemes, solve
from paratafusion_core.bench import rivals, shortcuts
from paratafusion_core.bench.problems import Setting
from paratafusion_core.bench.rivals import Point
from paratafusion_core.bench.unipc import unipc
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.denoisers import Denoise
from paratafusion_core.noise import draw
from paratafusion_core.system import System

SHAPE = (2, 6, 6)
MIXTURE = Mixture.make(modes=24, classes=6, shape=SHAPE)


def start(seed: int, steps: int) -> tuple[Tensor, Tensor]:
    x, noise = draw(seed, 1, SHAPE, steps)
    return x.double() * schedules.SIGMA_MAX, noise.double()


def sequential(system: System, denoise: Denoise) -> Tensor:
    return solve(system, denoise, Options("sequential"), keep_trajectory=False).x


def nested(steps: int, count: int) -> list[int]:
    return [*shortcuts.evenly(steps, count), steps]


def test_evenly() -> None:
    assert shortcuts.evenly(50, 2) == [0, 49]
    assert shortcuts.evenly(5, 9) == list(range(5))
    assert shortcuts.evenly(5, 1) == [0]
    rows = shortcuts.evenly(50, 12)
    assert len(set(rows)) == 12 and (rows[0], rows[-1]) == (0, 49)


@pytest.mark.parametrize("count", [1, 3, 7, 20])
@pytest.mark.parametrize("scheme", [schemes.ddpm, schemes.dpmpp_2m_sde])
def test_coupled_noise_is_the_fine_chains_own(scheme: Callable[..., System], count: int) -> None:
    """With D constant, a coarse ancestral step is its fine steps together: the results are equal."""
    x0, noise = start(0, 20)
    fine, rows = schedules.normal(20), nested(20, count)
    target = torch.linspace(-1, 1, 72, dtype=torch.float64).reshape(1, 1, *SHAPE)

    def constant(x: Tensor, sigma: Tensor) -> Tensor:
        return target.expand(x.shape)

    # one row short of the end, where the picture is D alone and holds no noise
    levels, kept = fine[:-1], rows[:-1] if count > 1 else [0, 19]
    want = sequential(scheme(x0, levels, noise=noise[:19]), constant)
    coarse = shortcuts.coupled(noise[:19], levels, kept)
    got = sequential(scheme(x0, levels[kept], noise=coarse), constant)
    assert torch.allclose(got, want, atol=1e-12)
    assert not torch.allclose(sequential(scheme(x0, levels[kept], noise=noise[: len(kept) - 1]), constant), want) or (
        count == 20
    )


def test_coupled_noise_is_unit_normal() -> None:
    noise = torch.randn(30, 200, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coarse = shortcuts.coupled(noise, schedules.karras(30), nested(30, 6))
    assert coarse.shape == (6, 200, 200)
    assert torch.allclose(coarse[:-1].std(dim=(1, 2)), torch.ones(5, dtype=torch.float64), atol=0.02)
    assert not coarse[-1].any(), "the step to 0 adds none"
    assert torch.equal(shortcuts.coupled(noise, schedules.karras(30), range(31))[:-1], noise[:-1])


def test_coarse_ddpm_with_coupled_noise_approaches_the_fine_one() -> None:
    x0, noise = start(3, 200)
    fine, denoise = schedules.normal(200), MIXTURE.denoiser(3, 2.0)
    want = sequential(schemes.ddpm(x0, fine, noise=noise), denoise)

    def error(count: int, couple: bool) -> float:
        rows = nested(200, count)
        own = shortcuts.coupled(noise, fine, rows) if couple else noise[:count]
        return float((sequential(schemes.ddpm(x0, fine[rows], noise=own), denoise) - want).norm() / want.norm())

    errors = [error(count, True) for count in (10, 40, 160)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2], errors
    assert errors[1] < 0.5 * error(40, False), "with noise of its own it is another picture"


@pytest.mark.parametrize("flow", [False, True])
def test_unipc_converges_faster_than_first_order(flow: bool) -> None:
    """On a Gaussian, whose exact solution is the sampler's limit."""
    x, _ = draw(1, 1, (40,))
    variance = torch.linspace(0.05, 2.0, 40, dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1, 1)
        alpha = 1 - level if flow else torch.ones_like(level)
        return 0.3 + alpha * variance / (alpha**2 * variance + level**2) * (x - alpha * 0.3)

    def levels(steps: int) -> Tensor:
        if flow:
            return torch.linspace(0.97, 0.03, steps + 1, dtype=torch.float64)
        return torch.linspace(2.0, -2.0, steps + 1, dtype=torch.float64).exp()

    def exact(x0: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """A Gaussian stays one: its state keeps its place in units of its standard deviation."""
        a, b = (1 - first, 1 - last) if flow else (1.0, 1.0)
        return b * 0.3 + ((b**2 * variance + last**2) / (a**2 * variance + first**2)).sqrt() * (x0 - a * 0.3)

    def error(scheme: Callable[..., System], steps: int) -> float:
        sigmas = levels(steps)
        got = sequential(scheme(x.double(), sigmas, flow=flow), denoise)
        return float((got - exact(x.double(), sigmas[0], sigmas[-1])).norm())

    assert error(unipc, 32) < 0.1 * error(schemes.euler, 32)
    assert error(unipc, 32) / error(unipc, 64) > 3.0, "second order or better: half the step, a quarter of the error"


def test_unipc_is_the_one_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers, of the extra bench, is not installed")
    for name in ("normal", "karras"):
        levels, denoise = schedules.SCHEDULES[name](12), MIXTURE.denoiser(2, 4.0)
        x0, _ = start(2, 12)
        theirs = diffusers.UniPCMultistepScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample",
            solver_order=2, solver_type="bh2", final_sigmas_type="zero", disable_corrector=[],
        )  # fmt: skip
        theirs.set_timesteps(12)
        theirs.sigmas, theirs.timesteps = levels.clone(), torch.arange(12).flip(0)
        norm = (1 + levels**2).sqrt()
        y = x0 * levels[0] / schedules.SIGMA_MAX / norm[0]
        for k, t in enumerate(theirs.timesteps):
            y = theirs.step(denoise((y * norm[k])[None], levels[k : k + 1])[0], t, y).prev_sample
        got = sequential(unipc(x0 * levels[0] / schedules.SIGMA_MAX, levels), denoise)
        assert torch.allclose(got, y, atol=1e-10)


@pytest.mark.parametrize("guess", rivals.GUESSES.values())
def test_skipping_nothing_is_the_sampler(guess: shortcuts.Guess) -> None:
    x0, _ = start(0, 12)
    system, denoise = schemes.dpmpp_2m(x0, schedules.karras(12)), MIXTURE.denoiser(0, 4.0)
    want = sequential(system, denoise)
    for how in ({"rows": range(12)}, {"threshold": 0.0}):
        done = shortcuts.skipping(system, denoise, guess, **how)  # type: ignore[arg-type]
        assert done.nfe == 12 and torch.allclose(done.x, want, atol=1e-10)


@pytest.mark.parametrize(("name", "degree"), [("held", 0), ("linear", 1), ("quadratic", 2)])
def test_a_guess_is_exact_for_its_polynomial(name: str, degree: int) -> None:
    """D a polynomial in lambda, whatever the state."""
    x0, _ = start(0, 16)
    system = schemes.ddim(x0, schedules.uniform(17)[:-1])  # ends above 0, where each D counts

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        lam = -sigma.log().reshape(-1, 1, 1, 1, 1)
        return (0.5 - 0.3 * (degree > 0) * lam + 0.2 * (degree > 1) * lam**2).expand(x.shape)

    want = sequential(system, denoise)
    rows = [0, 1, 2, 5, 9, 15]
    assert torch.allclose(shortcuts.skipping(system, denoise, rivals.GUESSES[name], rows).x, want, atol=1e-9)
    if degree:
        lower = list(rivals.GUESSES.values())[degree - 1]
        assert not torch.allclose(shortcuts.skipping(system, denoise, lower, rows).x, want, atol=1e-3)


def test_a_threshold_spends_less_the_higher_it_is() -> None:
    x0, _ = start(0, 40)
    system, denoise = schemes.ddim(x0, schedules.normal(40)), MIXTURE.denoiser(0, 4.0)
    spent = [shortcuts.skipping(system, denoise, shortcuts.held, threshold=t).nfe for t in (0.0, 0.05, 0.3, 1e9)]
    assert spent[0] == 40 and spent == sorted(spent, reverse=True) and spent[-1] == 3


def test_figures_at_equal_evaluations_and_at_equal_fidelity() -> None:
    points = [Point(6, 30.0, 20.0), Point(10, 40.0, 30.0), Point(20, 45.0, 41.0)]
    assert rivals.at(points, 8) == (35.0, 25.0)
    assert rivals.at(points, 5) is None and rivals.at(points, 21) is None
    assert rivals.needed(points, 42.0) == "14.0"
    assert rivals.needed(points, 30.0) == "<= 6"
    assert rivals.needed(points, 50.0) == "> 20 (45 dB at 20)"


def test_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        rivals,
        "CASES",
        tuple(Setting("demo", s, n, 9, 4.0) for s, n in (("ddim", "normal"), ("ddpm", "normal"), ("euler", "flow"))),
    )
    monkeypatch.setattr(rivals, "LADDER", (3, 6, 12))
    monkeypatch.setattr(rivals, "THRESHOLDS", (0.1,))
    words = ["bench", "--suite", "rivals", "--model", "mixture", "--seeds", "1"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "rivals.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    for row in rows:
        if "threshold" not in row["rival"] and "collocation" not in row["rival"]:
            assert row["nfe"] == row["size"] in (3, 6), "no more than the sampler's own steps"
        assert row["nfe"] <= 9
    by = {(r["sampler"], r["rival"]) for r in rows}
    assert ("ddim", "unipc") in by and ("ddpm", "unipc") not in by and ("ddpm", "dpm-solver++ 2m") in by
    done = (tmp_path / "rivals.jsonl").read_bytes()
    assert cli.main([*words, "--out", str(tmp_path), "--resume", str(tmp_path / "rivals.jsonl")]) == 0
    assert (tmp_path / "rivals.jsonl").read_bytes() == done
