"""A run of the host's sampler as the engine's problem: its equations, its model, the engine's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
from torch import Tensor

from ...paratafusion_core import Options, System
from ...paratafusion_core.collocation import refusal
from ...paratafusion_core.denoisers import Denoise
from .batched import BatchedModel
from .bounds import acting, bounds_of
from .capture import Captured, CaptureError
from .settings import Settings
from .uncond import FoldedModel, NumberedModel, by_level, distinct, fold_uncond


@dataclass(frozen=True)
class Problem:
    """What the engine solves.

    Attributes:
        captured: what was read off the sampler. system: its equations. batched: the host's model, denoise: what the
            engine calls, which is that model or goes through it. shown: ``denoise`` where the host shows another
            picture at the end than the result, else None.
        options: of the engine. refusal: why collocation cannot serve this run, None if it can.
    """

    captured: Captured
    system: System
    batched: BatchedModel
    denoise: Denoise
    shown: LastStep | None
    options: Options
    refusal: str | None

    @property
    def collocates(self) -> bool:
        """Whether it is collocation's in any case."""
        return self.options.solver == "collocation"

    @property
    def several(self) -> bool:
        """Whether several evaluations may share a call."""
        return self.options.window != 1 and self.captured.evaluations > 1


class LastStep:
    """A denoiser that remembers what the host shows at the end, D of the evaluation that ``captured`` has shown.

    Until that is evaluated it is D of the nearest row where noise is left over. Where none is, the engine's picture is
    nearer than any D but that of the row beside it. ``levels`` ``[K]`` tell rows apart.
    """

    def __init__(self, denoise: Denoise, batched: BatchedModel, levels: Tensor, captured: Captured) -> None:
        self._denoise, self._batched = denoise, batched
        self._row, self._rows_of = captured.shown, by_level(levels)
        self._off = len(levels) if captured.noise_left else 1
        self.picture: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        result = self._denoise(x, sigma)
        off = [abs(row - self._row) for row in self._rows_of(sigma)]
        nearest = min(range(len(off)), key=off.__getitem__)
        if off[nearest] <= self._off and self._batched.output is not None:
            self._off, self.picture = off[nearest], self._batched.output[nearest]
        return result


def problem_of(
    captured: Captured, name: str, settings: Settings, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any]
) -> Problem:
    """What a run that was ``captured`` comes to.

    Args:
        name: of the sampler. model, x, sigmas, extra_args: what it was called with.

    Raises:
        CaptureError: it cannot be stepped with one output a row, or is no system of the engine's.
        ValueError: a setting is out of range.
    """
    guider = model.inner_model
    patches = acting(guider, extra_args["model_options"])
    bounds = bounds_of(patches, guider.inner_model.model_sampling, sigmas)
    batched = BatchedModel(model, extra_args, x.shape[0], captured.keep_uncond, bounds)
    system, denoise = _system(captured, batched, name, len(sigmas) - 1)
    why: str | None
    if captured.U is not None:
        why = "the sampler reads the unconditional picture"
    else:  # an SDE sampler is served for a number of rows only
        why = refusal(system, None if settings.rows is None else _options(settings, model, captured, None))
    shown = LastStep(denoise, batched, system.sigmas, captured) if captured.shows_another else None
    options = _options(settings, model, captured, why)
    return Problem(captured, system, batched, shown or denoise, shown, options, why)


def _system(captured: Captured, batched: BatchedModel, name: str, steps: int) -> tuple[System, Denoise]:
    """The engine's view of the captured run; where one row is shown each has its own level.

    Raises:
        CaptureError: see :func:`problem_of`.
    """
    breaks = batched.breaks(captured.sigmas)
    levels = distinct(captured.sigmas)
    if captured.U is not None:
        fold = fold_uncond(captured.C, captured.U)
        folded = FoldedModel(batched, fold, captured.sigmas, levels)
        return _checked(captured.S, fold.C, levels, name, steps, breaks), folded
    if not captured.shows_another or len(captured.sigmas.unique()) == len(levels):
        return _checked(captured.S, captured.C, captured.sigmas, name, steps, breaks), batched
    numbered = NumberedModel(batched, captured.sigmas, levels)
    return _checked(captured.S, captured.C, levels, name, steps, breaks), numbered


def _checked(*given: Any) -> System:
    """The system; CaptureError where it is none, as with noise levels below 0."""
    try:
        return System(*given)
    except ValueError as error:
        raise CaptureError(str(error)) from None


def _options(settings: Settings, model: Any, captured: Captured, refusal: str | None) -> Options:
    """The engine's options; ValueError where a setting is out of range, CaptureError where the model is."""
    sampling = model.inner_model.inner_model.model_sampling
    flow = isinstance(sampling, comfy.model_sampling.CONST) and float(captured.sigmas.max()) <= 1.0
    rms = getattr(sampling, "data_rms", None) or getattr(sampling, "sigma_data", None) or 1.0
    scales = [
        _number(getattr(model.inner_model, name, None)) for name in ("cfg", "cfg1", "cfg2")
    ]  # of two prompts, too
    cfg = max((scale for scale in scales if scale is not None), default=None)
    try:
        return settings.options(flow, float(rms), refusal=refusal, cfg=cfg)
    except ValueError as error:
        settings.options(False, 1.0, refusal=refusal, cfg=cfg)
        raise CaptureError(str(error)) from None


def _number(scale: Any) -> float | None:
    """A guidance scale; None where a guider of another pack keeps something else, as one for each step."""
    try:
        return None if scale is None else float(scale)
    except (TypeError, ValueError, RuntimeError):
        return None
