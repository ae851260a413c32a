"""Every core sampler as data: stepping the captured system by hand gives the host's own result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.host.capture import Captured, CaptureError, capture
from paratafusion_pack.nodes.host.uncond import distinct, fold_uncond
from tiny import conditioning, latent, relative, sample, sigmas_of
from torch import Tensor

REFUSED = {"dpm_adaptive", "ar_video"}
SAMPLERS = [name for name in comfy.samplers.KSampler.SAMPLERS if name not in REFUSED]


def stepping(inner: Any, seen: list[Captured]) -> Any:
    """A SAMPLER that captures ``inner`` and then steps the captured system, one evaluation after the other."""

    def step(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        c = capture(inner.sampler_function, inner.extra_options, model, x, sigmas, extra_args)
        seen.append(c)
        sigmas.copy_(c.schedule)
        uncond: list[Tensor] = []
        options = dict(extra_args["model_options"])
        if c.U is not None:
            fold = fold_uncond(c.C, c.U)

            def keep(args: dict) -> Tensor:
                uncond.append(args["uncond_denoised"].double())
                return args["denoised"]

            options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), keep]
            options["disable_cfg1_optimization"] = c.keep_uncond
        C = fold.C if c.U is not None else c.C
        outputs: list[Tensor] = []
        for k in range(c.evaluations + 1):
            x = c.S[k].double() + sum((C[k, i] * D for i, D in enumerate(outputs) if C[k, i]), torch.zeros(()))
            if k == c.evaluations:
                return x.float()
            sigma = c.sigmas[k].to(x.device, torch.float32).expand(x.shape[0])
            D = model(x.float(), sigma, **{**extra_args, "model_options": options}).double()
            if c.U is not None:
                D = fold.own[k] * D + sum(fold.others[k, j] * uncond[j] for j in fold.needed(k))
            outputs.append(D)
        raise AssertionError("unreachable")

    return comfy.samplers.KSAMPLER(step, {}, inner.inpaint_options)


def both(model: Any, name: str, steps: int, **kwargs: Any) -> tuple[Tensor, Tensor, Captured]:
    inner = comfy.samplers.sampler_object(name)
    sigmas = kwargs.pop("sigmas", None)
    if sigmas is None:
        sigmas = sigmas_of(model, name, steps)
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model), **kwargs}
    reference = sample(model, inner, sigmas.clone(), **asked)
    seen: list[Captured] = []
    return sample(model, stepping(inner, seen), sigmas.clone(), **asked), reference, seen[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_core_sampler(name, flow_model, record_property):
    result, reference, captured = both(flow_model, name, 10)
    assert torch.isfinite(reference).all()
    error = relative(result, reference)
    record_property("relative_error", error)
    assert error < 1e-4
    assert captured.C.triu().abs().max() == 0


@pytest.mark.parametrize("name", ["euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_only_the_cfg_pp_family_looks_at_the_unconditional_picture(name, flow_model):
    assert both(flow_model, name, 6)[2].U is not None
    assert both(flow_model, name.removesuffix("_cfg_pp"), 6)[2].U is None


def test_evaluations_a_step(flow_model):
    """Two-stage samplers are longer systems."""
    assert both(flow_model, "euler", 6)[2].evaluations == 6
    assert both(flow_model, "heun", 6)[2].evaluations == 11
    assert both(flow_model, "seeds_3", 6)[2].evaluations == 16


ENDS_ELSEWHERE = {"dpm_fast", "sa_solver_pece", "uni_pc", "uni_pc_bh2"}


@pytest.mark.parametrize("kind", ["flow_model", "eps_model", "ztsnr_model"])
def test_most_samplers_end_in_the_picture_that_they_show(kind, request):
    model = request.getfixturevalue(kind)
    for name in SAMPLERS:
        captured = both(model, name, 6)[2]
        assert captured.ends_elsewhere == (name in ENDS_ELSEWHERE), name
        assert captured.shows_another == captured.ends_elsewhere, name


def showing(picture: Callable[[Tensor, Tensor], Tensor | None]) -> Any:
    """Euler to a noise level of 0.005, which shows what ``picture`` makes of the last two denoised pictures."""

    def step(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, **_: Any) -> Tensor:
        levels, before = [*sigmas.tolist()[:-1], 0.005], torch.zeros_like(x)
        for k in range(len(levels) - 1):
            D = model(x, x.new_full((x.shape[0],), levels[k]), **extra_args)
            shown = picture(before, D)
            if callback is not None and shown is not None:
                callback({"x": x, "i": k, "denoised": shown})
            x, before = D + (x - D) * (levels[k + 1] / levels[k]), D
        return x

    return comfy.samplers.KSAMPLER(step)


def test_only_a_single_evaluations_picture_is_shown_in_place_of_the_last_state(flow_model):
    def captured(picture: Callable[[Tensor, Tensor], Tensor | None]) -> Captured:
        seen: list[Captured] = []
        asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
        sample(flow_model, stepping(showing(picture), seen), sigmas_of(flow_model, "euler", 5), **asked)
        return seen[0]

    assert captured(lambda before, D: D).ends_elsewhere and captured(lambda before, D: D).shown == 4
    assert captured(lambda before, D: before).ends_elsewhere and captured(lambda before, D: before).shown == 3
    assert not captured(lambda before, D: 2 * D - before).ends_elsewhere
    assert not captured(lambda before, D: None).ends_elsewhere


def test_a_capture_leaves_the_random_generators_alone(flow_model):
    torch.manual_seed(5)
    both(flow_model, "euler", 3)
    after = torch.rand(4)
    torch.manual_seed(5)
    sample(flow_model, comfy.samplers.sampler_object("euler"), sigmas_of(flow_model, "euler", 3),
           positive=conditioning(1), negative=conditioning(2), latent_image=latent(flow_model))  # fmt: skip
    assert torch.equal(after, torch.rand(4))


def wavering(within: Callable[[Tensor], float]) -> Any:
    """Euler, whose third noise level is off by what ``within`` makes of the state before it."""

    def step(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        levels = sigmas.tolist()
        for k in range(len(levels) - 1):
            if k == 2:
                levels[k] *= 1 + within(x)
            D = model(x, x.new_full((x.shape[0],), levels[k]), **extra_args)
            x = D + (x - D) * (sigmas[k + 1] / sigmas[k])
        return x

    return comfy.samplers.KSAMPLER(step)


def refused(model: Any, inner: Any) -> str | None:
    """Why the sampler cannot be written down, or None."""
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model)}
    try:
        sample(model, stepping(inner, []), sigmas_of(model, "euler", 5), **asked)
    except CaptureError as error:
        return str(error)
    return None


def test_rounding_of_the_runs_own_levels_is_no_dependence_on_the_picture(flow_model):
    """On some processors float32 is off by 0.15 % behind a zero terminal SNR's first level."""
    rounded = wavering(lambda x: 2e-3 if x.dtype == torch.float32 else 0.0)
    assert refused(flow_model, rounded) is None
    reason = refused(flow_model, wavering(lambda x: 1e-4 * float(x.abs().mean().clamp(max=1))))
    assert reason is not None and "depend on the picture" in reason


def test_folding_reproduces_any_triangular_pair():
    generator = torch.Generator().manual_seed(0)
    C = torch.randn(7, 6, generator=generator, dtype=torch.float64).tril(-1)
    U = torch.randn(7, 6, generator=generator, dtype=torch.float64).tril(-1)
    D, u = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    fold = fold_uncond(C, U)
    assert torch.allclose(fold.C @ (fold.own * D + fold.others @ u), C @ D + U @ u)


def test_folding_refuses_an_evaluation_without_a_part_in_the_next_state():
    C = torch.eye(7, 6, dtype=torch.float64).tril(-1).roll(1, 0)
    with pytest.raises(CaptureError, match="cannot be folded"):
        fold_uncond(torch.zeros_like(C), C)


def test_repeated_levels_still_name_their_row():
    levels = distinct(torch.tensor([1.0, 0.5, 0.5, 0.5, 0.1], dtype=torch.float64))
    assert len(set(levels.float().tolist())) == 5
    assert torch.allclose(levels, torch.tensor([1.0, 0.5, 0.5, 0.5, 0.1], dtype=torch.float64), rtol=1e-6)


def test_repeated_levels_stay_inside_their_bounds_and_do_not_fall():
    """A flow's largest level is 1; collocation takes what falls, and ParaTAA takes a fall for noise that was added."""
    given = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.3, 0.3, 0.3, 0.0, 0.0, 1e-45, 1e-45])
    levels = distinct(given.double())
    assert len(set(levels.float().tolist())) == len(given)
    assert levels.max() == 1 and levels.min() == 0
    assert torch.allclose(levels.float(), given, rtol=1e-6)
    rises = levels.diff()
    assert all(rises[row] > 0 for row, change in enumerate(given.diff().tolist()) if change == 0)
