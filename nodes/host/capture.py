"""Any SAMPLER as data: ComfyUI's own sampler function is run with a stand-in for the model and read off.

A fixed-step sampler is affine in the model's outputs, ``x_k = S_k + sum_{i<k} C[k,i] D_i + U[k,i] u_i``, with D_i the
denoised picture and u_i the unconditional one (only the CFG++ family looks at it). Outputs of 0 on the real start give
S with the sampler's own noise; unit outputs on a tiny probe give C and U; random ones, which follow the state, show
whether it is affine at all, pixel by pixel and picture by picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from .batched import is_oom
from .standin import Answer, CaptureError, Recipe, SamplerFunction, _StandIn

#: Samplers known to be no fixed system; the checks below would find them too, more slowly.
_REFUSED = {
    "dpm_adaptive_function": "dpm_adaptive chooses its steps from the picture, so they are not known beforehand",
    "sample_dpm_adaptive": "dpm_adaptive chooses its steps from the picture, so they are not known beforehand",
    "sample_ar_video": "ar_video carries a key-value cache from step to step",
}
#: By how much noise levels may differ, relatively, between two answers of the stand-in, and from the run itself, whose
#: float32 cancels where sigma_down is the small difference of two large numbers: 0.15 % after a zero terminal SNR's
#: first level of 4518, on some processors.
_LEVELS_WITHIN, _LEVELS_ROUNDED = 1e-6, 1e-2
#: Sizes of the outputs by which linearity is tried: what clamps them leaves small ones as they are.
_SIZES = (1.0, 100.0)
#: Largest deviation from linearity, relative to the largest coefficient: of samplers in float64, of those that go
#: through float32 there, and of those that insist on it.
_AFFINE_WITHIN, _ROUNDED_WITHIN = {torch.float64: 1e-9, torch.float32: 1e-3}, 1e-5
#: Pictures of the probe, pixels of each side, and share of the state in the random outputs: a sampler that blurs D,
#: normalises noise by its deviation or takes the model's derivative is no other on a single pixel with outputs of its
#: own. Where a state would have more than ``_MANY`` numbers, as in long runs, sides have two pixels.
_PICTURES, _SIDE, _FOLLOWING, _MANY = 2, 4, 0.25, 20_000
#: Weights, and states of outputs of 0, that differ by less are equal but for rounding: ddpm's last state by up to 2e-5,
#: where uni_pc, the nearest of those that end in another picture than they show, differs by 3e-3.
_EQUAL_WITHIN = 1e-4
#: A schedule that ends at this noise level, or above it, leaves noise that can be seen.
_VISIBLE = 1e-2


@dataclass(frozen=True)
class Captured:
    """A sampler's run as data.

    Attributes:
        S: ``[K+1, B, ...]`` the states with every output at 0, on the device and in the dtype of the start.
        C: ``[K+1, K]`` float64 on the CPU, the weights of the denoised pictures.
        U: ``[K+1, K]`` the weights of the unconditional pictures, or None where the sampler does not look at them.
        sigmas: ``[K]`` float64 on the CPU, the noise level of each evaluation.
        schedule: ``[steps + 1]`` the sampler's sigmas after its run: uni_pc writes into them, and the host reads the
            last one again.
        keep_uncond: the sampler asks for the unconditional picture even at cfg 1.
        shown: the evaluation whose denoised picture the sampler shows last.
        ends_elsewhere: that picture is known, and is not the final state.
        drawn: puts torch's generators where the sampler would have left them.
        handed_on: what the sampler passes to the model's patches in each call, by name.
    """

    S: Tensor
    C: Tensor
    U: Tensor | None
    sigmas: Tensor
    schedule: Tensor
    keep_uncond: bool = False
    shown: int = 0
    ends_elsewhere: bool = False
    drawn: Callable[[], None] = lambda: None
    handed_on: tuple[str, ...] = ()

    @property
    def evaluations(self) -> int:
        """K."""
        return len(self.sigmas)

    @property
    def noise_left(self) -> bool:
        """Noise is left over, so that the denoised picture is what an artist can look at."""
        return float(self.schedule[-1]) >= _VISIBLE

    @property
    def shows_another(self) -> bool:
        """A denoised picture is to be shown in place of the final state."""
        return self.noise_left or self.ends_elsewhere


def _zeros(_: int, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.zeros_like(x)


def _unit(count: int) -> Answer:
    """Evaluation k answers D = 1 in channel k and u = 1 in channel ``count + k``, else 0."""

    def answer(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if k >= count:
            raise CaptureError("the number of its evaluations depends on the picture")
        D, u = torch.zeros_like(x), torch.zeros_like(x)
        D[:, k], u[:, count + k] = 1, 1
        return D, u

    return answer


def _random(size: float) -> Answer:
    """Outputs of this ``size``, in every pixel another, which follow the state."""

    def answer(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(k)
        D, u = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64).to(x) * size
        return D + _FOLLOWING * x, u - _FOLLOWING * x

    return answer


def _same(levels: list[float], others: list[float], within: float) -> bool:
    return torch.allclose(torch.tensor(levels).double(), torch.tensor(others).double(), rtol=within, atol=1e-6)


def _coefficients(
    recipe: Recipe, levels: list[float], sigmas: Tensor, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """``[K+1, 2K]`` weights of every D and u in every state, and those of the picture shown last (:func:`_shown`).

    Raises:
        CaptureError: the sampler is not affine in them, or its steps depend on them.
    """
    count = len(levels)
    dimensions = like.ndim - 2
    side = [_SIDE if 2 * count * _SIDE**dimensions <= _MANY else 2] * dimensions
    steps = sigmas.to("cpu", dtype)
    seen: list[list[float]] = []

    def response(shape: list[int], answer: Answer, keep: bool = False) -> tuple[_StandIn, Tensor]:
        start = torch.zeros(shape, dtype=dtype, device="cpu")
        model, result = recipe.drive(start, steps.clone(), answer, keep)
        if len(model.levels) != count:
            raise CaptureError("the number of its evaluations depends on the picture")
        seen.append(model.levels)
        if not (_same(model.levels, seen[0], _LEVELS_WITHIN) and _same(model.levels, levels, _LEVELS_ROUNDED)):
            raise CaptureError("the noise levels of its evaluations depend on the picture")
        return model, torch.stack([*model.states, result])

    channels = [1, 2 * count, *side]
    nothing, still = response(channels, _zeros)
    one, unit = response(channels, _unit(count))
    weights = (unit.double() - still.double()).flatten(3).mean(-1)[:, 0]
    if not weights.isfinite().all():
        raise CaptureError("its steps are no fixed combination of the model's outputs")
    scale = max(float(weights.abs().max()), 1.0)
    fields = [_PICTURES, 4, *side]
    still = response(fields, _zeros)[1]
    for size in _SIZES:
        model, states = response(fields, _random(size), keep=True)
        outputs = torch.stack([D for D, _ in model.outputs] + [u for _, u in model.outputs]).double()
        bent = states.double() - still.double() - (weights @ outputs.flatten(1)).view(states.shape)
        rounded = min((s.dtype for s in (*model.states, still)), key=lambda kind: torch.finfo(kind).bits)
        within = _AFFINE_WITHIN[dtype] if rounded == dtype else _ROUNDED_WITHIN
        most = max(float(outputs.abs().max()), size)
        if not float(bent.abs().max()) <= within * scale * 10 * most:
            raise CaptureError("its steps are no fixed combination of the model's outputs")
    return weights, _shown(nothing.shown, one.shown, count)


def _shown(still: Any, unit: Any, count: int) -> Tensor | None:
    """``[2K]`` weights of a picture ``[1, 2K, ...]`` from what is shown for outputs of 0 and of 1; None: none of D."""
    if not all(torch.is_tensor(picture) and picture.shape[:2] == (1, 2 * count) for picture in (still, unit)):
        return None
    weights = (unit - still).double().flatten(2).mean(-1)[0]
    return weights if weights[:count].any() else None


def _row_shown(picture: Tensor | None, levels: list[float], end: float) -> int:
    """The evaluation that a ``picture`` of these weights shows, else the first one nearest to ``end``."""
    rows = range(len(levels))
    if picture is None:
        return min(rows, key=lambda row: abs(levels[row] - end))
    return int(picture[: len(levels)].abs().argmax())


def _ends_elsewhere(picture: Tensor | None, row: int, last: Tensor, S: Tensor) -> bool:
    """Whether what is shown, a ``picture`` of these weights, is D of ``row`` and not the state of weights ``last``.

    uni_pc's is D but for rounding, which grows as the noise level falls: clearly nearer is enough.
    """
    if picture is None:
        return False
    apart, still = float((last - picture).abs().max()), float(S[-1].abs().max())
    if apart <= _EQUAL_WITHIN and still <= _EQUAL_WITHIN * max(float(S[-2].abs().max()), 1.0):
        return False
    off = picture.clone()
    off[row] -= 1
    return 2 * float(off.abs().max()) < max(apart, still)


def _probe(recipe: Recipe, levels: list[float], sigmas: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """:func:`_coefficients` in float64, or in float32 where the sampler insists on it (uni_pc)."""
    try:
        return _coefficients(recipe, levels, sigmas, like, torch.float64)
    except RuntimeError:  # mixed dtypes inside the sampler
        return _coefficients(recipe, levels, sigmas, like, torch.float32)


def check_name(function: SamplerFunction) -> None:
    """Raises CaptureError: ``function`` is known to be no system."""
    name = getattr(function, "__name__", "")
    if name in _REFUSED:
        raise CaptureError(_REFUSED[name])


def capture(
    function: SamplerFunction,
    settings: dict[str, Any],
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
) -> Captured:
    """Write down what ``function(model, x, sigmas, extra_args=..., **settings)`` would do.

    Args:
        function: a sampler in k-diffusion's form, as ``KSAMPLER.sampler_function``.
        settings: its own options, as ``KSAMPLER.extra_options``.
        model: the host's ``KSamplerX0Inpaint`` of this run; never called.
        x: the noisy start ``[B, ...]``.
        sigmas: ``[steps + 1]`` the schedule.
        extra_args: what the sampler passes to the model.

    Raises:
        CaptureError: the sampler cannot be written as a system.
        Exception: memory has run out.
    """
    check_name(function)
    recipe = Recipe(function, settings, model, extra_args, 8 * len(sigmas) + 64, x)
    try:
        return _capture(recipe, x, sigmas)
    except (CaptureError, comfy.model_management.InterruptProcessingException):
        raise
    except Exception as error:  # another pack's sampler may fail on the stand-in in any way at all
        if is_oom(error):
            raise
        raise CaptureError(f"it could not be read off ({type(error).__name__}: {error})") from error


def _capture(recipe: Recipe, x: Tensor, sigmas: Tensor) -> Captured:
    schedule = sigmas.clone()
    run, result = recipe.drive(x, schedule, _zeros)
    if not run.states:
        raise CaptureError("it does not evaluate the model")
    weights, picture = _probe(recipe, run.levels, sigmas, x)
    count = len(run.levels)
    C, U = weights[:, :count], weights[:, count:]
    later = torch.ones(count + 1, count, dtype=torch.bool).triu()
    if weights[torch.cat([later, later], 1)].any():
        raise CaptureError("a state depends on a later evaluation")
    S = torch.stack([*run.states, result])
    if not S.isfinite().all():
        raise CaptureError("its states are not finite when the model answers 0")
    levels = torch.tensor(run.levels, dtype=torch.float64)
    shown = _row_shown(picture, run.levels, float(sigmas[-2]))
    elsewhere = _ends_elsewhere(picture, shown, weights[-1], S)
    used = U if run.reads_uncond and U.any() else None
    return Captured(
        S, C, used, levels, schedule, run.keep_uncond, shown, elsewhere, run.drawn, tuple(sorted(run.handed_on))
    )
