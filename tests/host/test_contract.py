"""Swapping the host's KSampler nodes for the parallel ones changes nothing but speed."""

from __future__ import annotations

import gc
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.host import sampling
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from tiny import conditioning, latent, relative, sample, sigmas_of

import nodes as host_nodes

EXACT = Settings(preset="exact", window=5)
CLOSE = 1e-4


def swap(model: Any, latent_image: dict[str, Any], *, sampler: str = "euler", steps: int = 8, cfg: float = 4.0,
         scheduler: str = "normal", **kwargs: Any) -> tuple[dict, dict, Outcome]:  # fmt: skip
    """The latents of the host's node and of the parallel one, from the same inputs."""
    conds = conditioning(1), conditioning(2)
    theirs = host_nodes.common_ksampler(model, 3, steps, cfg, sampler, scheduler, *conds, dict(latent_image), **kwargs)[
        0
    ]
    outcome = Outcome()
    request = sampling.Request(model, 3, steps, cfg, sampler, scheduler, *conds, dict(latent_image), **kwargs)
    return sampling.run(request, EXACT, outcome), theirs, outcome


def same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    assert ours["samples"].shape == theirs["samples"].shape
    assert ours["samples"].dtype == theirs["samples"].dtype
    assert relative(ours["samples"], theirs["samples"]) < CLOSE


IMAGE_TO_IMAGE = [
    {"denoise": 0.6},
    {"denoise": 0.3, "sampler": "dpm_2"},
    {"denoise": 0.6, "sampler": "uni_pc"},
    {"cfg": 1.0},
    {"start_step": 2, "last_step": 6},
    {"start_step": 2, "last_step": 6, "force_full_denoise": True},
    {"last_step": 5, "disable_noise": True},
    {"start_step": 3, "disable_noise": True, "force_full_denoise": True, "last_step": 10000},
    {"scheduler": "karras", "sampler": "dpmpp_2m"},
    {"scheduler": "beta", "sampler": "heun"},
]


@pytest.mark.parametrize("asked", IMAGE_TO_IMAGE, ids=str)
@pytest.mark.parametrize("kind", ["flow_model", "eps_model"])
def test_settings(kind, asked, request):
    model = request.getfixturevalue(kind)
    ours, theirs, outcome = swap(model, {"samples": latent(model, seed=7)}, **asked)
    same(ours, theirs)
    assert outcome.report.fallback is None


@pytest.mark.parametrize(
    "asked", [{"denoise": 0.0}, {"start_step": 8}, {"start_step": 20}, {"start_step": 6, "last_step": 6}], ids=str
)
def test_nothing_to_do_returns_the_latent(flow_model, asked):
    ours, theirs, outcome = swap(flow_model, {"samples": latent(flow_model, seed=7)}, **asked)
    same(ours, theirs)
    assert outcome.report.sequential_nfe == 0
    assert outcome.summary() == "nothing to do"


@pytest.mark.parametrize(
    "asked", [{"denoise": 0.0}, {"start_step": 8}, {"start_step": 20}, {"start_step": 6, "last_step": 6}], ids=str
)
def test_nothing_to_do_leaves_the_hosts_random_numbers(flow_model, asked):
    """Nodes behind it may draw without a seed."""
    image, conds = {"samples": latent(flow_model, seed=7)}, (conditioning(1), conditioning(2))
    torch.manual_seed(11)
    host_nodes.common_ksampler(flow_model, 3, 8, 4.0, "euler", "normal", *conds, dict(image), **asked)
    theirs = torch.get_rng_state()
    torch.manual_seed(11)
    sampling.run(sampling.Request(flow_model, 3, 8, 4.0, "euler", "normal", *conds, image, **asked), EXACT, Outcome())
    assert torch.equal(torch.get_rng_state(), theirs)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "ddim"])
def test_noise_mask(flow_model, sampler):
    mask = (torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    ours, theirs, outcome = swap(
        flow_model, {"samples": latent(flow_model, seed=7), "noise_mask": mask}, sampler=sampler
    )
    same(ours, theirs)
    assert outcome.report.fallback is None


def test_batch_of_three_with_noise_indices_and_masks(flow_model):
    mask = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    batch = {"samples": latent(flow_model, 3, seed=7), "batch_index": [4, 0, 4], "noise_mask": mask}
    ours, theirs, _ = swap(flow_model, batch)
    same(ours, theirs)


def test_empty_latent_of_another_kind_is_fitted(flow_model):
    empty = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}
    ours, theirs, _ = swap(flow_model, empty)
    theirs.pop("downscale_ratio_spacial", None)  # which ComfyUI 0.8 does not know, and hands on
    same(ours, theirs)
    assert "downscale_ratio_spacial" not in ours


def test_window_larger_than_the_run_and_a_single_step(flow_model):
    ours, theirs, _ = swap(flow_model, {"samples": latent(flow_model)}, steps=1)
    same(ours, theirs)
    ours, theirs, outcome = swap(flow_model, {"samples": latent(flow_model)}, steps=3)
    same(ours, theirs)
    assert outcome.report.rounds <= 3


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_flipped_sigmas(eps_model, sampler):
    """Unsampling: legal, though nobody would call it denoising."""
    sigmas = sigmas_of(eps_model, "euler", 8).flip(0)
    sigmas[0] = 1e-3
    inner = comfy.samplers.sampler_object(sampler)
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(eps_model, seed=3)}
    reference = sample(eps_model, inner, sigmas.clone(), **asked)
    result = sample(eps_model, parallel(inner, EXACT, Outcome()), sigmas.clone(), **asked)
    assert torch.equal(result.isfinite(), reference.isfinite())
    keep = reference.isfinite()
    if keep.any():  # rounding grows along rising levels, the host's own too
        assert relative(result[keep], reference[keep]) < 10 * CLOSE


def test_the_callback_comes_once_a_round_and_ends_with_the_picture(flow_model):
    seen: list[tuple[int, int, torch.Tensor]] = []
    inner = comfy.samplers.sampler_object("dpmpp_2m")
    outcome = Outcome()
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    result = sample(flow_model, parallel(inner, Settings(window=4), outcome), sigmas_of(flow_model, "dpmpp_2m", 12),
                    callback=lambda i, x0, x, total: seen.append((i, total, x0)), **asked)  # fmt: skip
    steps = [i for i, _, _ in seen]
    assert len(seen) == outcome.report.rounds < 12
    assert steps == sorted(steps) and steps[-1] == 11 and {t for _, t, _ in seen} == {12}
    final = flow_model.model.process_latent_out(seen[-1][2])
    assert relative(final, result) < 1e-3


class OnlySome(comfy.samplers.KSAMPLER):
    """The host's own but for how much noise it starts with."""

    def max_denoise(self, model_wrap: Any, sigmas: torch.Tensor) -> bool:
        return False


def test_a_subclass_of_the_hosts_sampler_keeps_its_methods(eps_model):
    inner, outcome = OnlySome(comfy.samplers.sampler_object("euler").sampler_function, {}, {"random": True}), Outcome()
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(eps_model, seed=7)}
    sigmas = sigmas_of(eps_model, "euler", 10)
    once = parallel(inner, EXACT, outcome)
    reference = sample(eps_model, inner, sigmas.clone(), **asked)
    for sampler in (once, parallel(once, EXACT, outcome)):
        assert relative(sample(eps_model, sampler, sigmas.clone(), **asked), reference) < CLOSE
        assert outcome.report.fallback is None
    assert inner.sampler_function.__name__ == "sample_euler"  # it is left as it was


def test_an_interrupt_is_honoured_before_the_next_round(flow_model):
    rounds: list[int] = []

    def stop(i: int, x0: Any, x: Any, total: int) -> None:
        rounds.append(i)
        if len(rounds) == 2:
            comfy.model_management.interrupt_current_processing()

    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    outcome = Outcome()
    sampler = parallel(comfy.samplers.sampler_object("euler"), EXACT, outcome)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(flow_model, sampler, sigmas_of(flow_model, "euler", 12), callback=stop, **asked)
    assert len(rounds) == 2
    assert outcome.report is None
    again = sample(flow_model, sampler, sigmas_of(flow_model, "euler", 12), **asked)
    reference = sample(flow_model, comfy.samplers.sampler_object("euler"), sigmas_of(flow_model, "euler", 12), **asked)
    assert relative(again, reference) < CLOSE


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_runs_leave_no_tensors_behind(flow_model):
    held = []
    for run in range(8):
        swap(flow_model, {"samples": latent(flow_model)}, steps=6)
        if run >= 4:
            held.append(live_tensors())
    assert len(set(held)) == 1, held


def test_bad_input_is_one_sentence(flow_model):
    with pytest.raises(ValueError, match=r"latent_image has shape \[0, 16, 8, 8\]"):
        swap_ours(flow_model, torch.zeros(0, 16, 8, 8))
    with pytest.raises(ValueError, match="model is a str"):
        swap_ours("no model", torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match="sampler is a int"):
        parallel(3, EXACT, Outcome())


def swap_ours(model: Any, samples: torch.Tensor) -> None:
    conds = conditioning(1), conditioning(2)
    request = sampling.Request(model, 3, 4, 4.0, "euler", "normal", *conds, {"samples": samples})
    sampling.run(request, EXACT, Outcome())


def test_a_trajectory_of_another_shape_starts_cold_and_the_report_says_so(flow_model):
    conds = conditioning(1), conditioning(2)

    def run(samples: torch.Tensor, warm: Any = None) -> Outcome:
        outcome = Outcome(want_trajectory=True)
        request = sampling.Request(flow_model, 3, 6, 4.0, "euler", "normal", *conds, {"samples": samples})
        sampling.run(request, Settings(window=4), outcome, warm)
        return outcome

    first = run(latent(flow_model))
    assert first.trajectory.shape == (1, 16, 8, 8)
    other = run(latent(flow_model, 2), first.trajectory).report
    assert other.warm == "cold: the trajectory is of latent shape [1, 16, 8, 8], this run's is [2, 16, 8, 8]"
    assert other.rows_per_round == run(latent(flow_model, 2)).report.rows_per_round
    again = run(latent(flow_model), first.trajectory)
    assert again.report.rounds < first.report.rounds


def test_settings_of_the_model_are_left_as_they_were(flow_model):
    before = repr(flow_model.model_options)
    swap(flow_model, {"samples": latent(flow_model)})
    assert repr(flow_model.model_options) == before
