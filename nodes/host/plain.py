"""The host's own sampler, as it is: where nothing can be won or batched, and the account of it."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import comfy.samplers
from torch import Tensor

from ...paratafusion_core import Report
from ...paratafusion_core.options import PRESETS
from .choice import Look
from .live import Live
from .notify import current_place, say_on_node
from .settings import Outcome, Settings

log = logging.getLogger(__name__)


def name_of(function: Any) -> str:
    """A sampler function's name as the artist knows it."""
    name = getattr(function, "__name__", None) or type(function).__name__
    return name.removeprefix("sample_").removesuffix("_function")


def counted(model: Any, steps: int, look: Look | None = None) -> tuple[Any, Callable[[], int]]:
    """``model`` of a run with its calls counted, and how many there were; ``look`` measures them.

    That is ``steps`` where none are seen: a sampler may go around the host's wrapper, or bring one of its own.
    """
    if not isinstance(model, comfy.samplers.KSamplerX0Inpaint):
        return model, lambda: steps
    model = copy.copy(model)
    model.__class__ = _counting(type(model))
    calls: list[None] = []
    model.paratafusion_calls, model.paratafusion_look = calls, look
    return model, lambda: len(calls) or steps


@lru_cache(maxsize=8)
def _counting(kind: type) -> type:
    """A class of models of this ``kind`` that count their calls; one for each run would wait for gc."""

    class Counted(kind):  # type: ignore[misc]
        def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.paratafusion_calls.append(None)
            evaluate, look = partial(super().__call__, x, sigma, *args, **kwargs), self.paratafusion_look
            return evaluate() if look is None else look(evaluate, x, sigma, kwargs)

    return Counted


def sequential_report(
    outcome: Outcome, name: str, steps: int, evaluations: int, settings: Settings, started: float
) -> Report:
    """The account of a run of the host's own sampler, for ``outcome``."""
    tolerance = PRESETS[settings.preset] if settings.tol is None else settings.tol
    report = Report(name, steps, "sequential", settings.preset, tolerance, evaluations)
    report.rounds = report.nfe = evaluations
    report.rows_per_round = [1] * evaluations
    report.seconds = report.model_seconds = time.perf_counter() - started
    outcome.report, outcome.trajectory = report, None
    return report


def fallback(
    outcome: Outcome, name: str, steps: int, evaluations: int, settings: Settings, reason: str, started: float
) -> None:
    """Say in the log and in the report that the plain sampler ran, and why."""
    log.warning("ParaTAFusion: %s ran sequentially: %s", name, reason)
    sequential_report(outcome, name, steps, evaluations, settings, started).fallback = reason


def close(live: Live, outcome: Outcome) -> None:
    """Tell the artist how the run ended: on the live widget, or in a line of text where no node has one."""
    live.end(outcome.report)
    if outcome.report is not None and not live.shown:
        say_on_node(outcome.summary())


class Unwrapped(comfy.samplers.Sampler):
    """A SAMPLER with a ``sample`` method of its own cannot be read off: it runs as it is."""

    def __init__(self, inner: Any, outcome: Outcome) -> None:
        self._inner, self._outcome = inner, outcome

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def sample(self, model_wrap: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        started, name, steps = time.perf_counter(), type(self._inner).__name__, max(len(sigmas) - 1, 0)
        reason = "it brings its own way of sampling instead of a sampler function"
        live = Live(current_place(), steps)
        live.sequential(reason, None)
        self._outcome.report = None
        try:
            result = self._inner.sample(model_wrap, sigmas, *args, **kwargs)
            fallback(self._outcome, name, steps, steps, Settings(), reason, started)
        finally:
            close(live, self._outcome)
        return result
