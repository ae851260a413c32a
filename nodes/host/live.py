"""A run's progress for the live widget: at most ten messages a second, and always the last one.

Every message is complete in itself, so that one that is left out is not missed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from ...paratafusion_core import Progress, Report
from .notify import Place

EVENT = "paratafusion.progress"
#: Seconds between two messages.
PERIOD = 0.1
#: A residual of the tolerance is level 0, one of this many decades above it, or more, is level 1.
_DECADES = 3.0
#: Stands in for the tolerance 0 of the exact preset.
_SMALLEST = 1e-6


def levels(residual: list[float], tolerance: float) -> list[float]:
    """How far each row is from being final, from 0 (the tolerance) to 1, on a logarithmic scale."""
    unit = max(tolerance, _SMALLEST)
    return [_level(value / unit) for value in residual]


def _level(ratio: float) -> float:
    if not math.isfinite(ratio):
        return 1.0
    return round(min(max(math.log10(max(ratio, 1e-30)) / _DECADES, 0.0), 1.0), 2)


class Live:
    """What a run tells the widget on its node.

    Args:
        place: where it is seen; None, or a place without a widget, and nothing is told.
        steps: of the run, as the artist counts them.
        clock: seconds, rising.
    """

    def __init__(self, place: Place | None, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._place = place if place is not None and place.shown is not None else None
        self._steps = steps
        self._clock, self._last = clock, -math.inf
        self._jumps: list[int] = []
        self._start = 0  # rows that this run took as final from an earlier one
        self._known: dict[str, Any] = {}

    @property
    def shown(self) -> bool:
        """Whether a widget shows this run."""
        return self._place is not None

    def round(self, progress: Progress, tolerance: float) -> None:
        """Tell a finished round of a parallel run; ``tolerance`` is what its residuals are compared with."""
        if not self._jumps:
            self._start = max(progress.frozen - progress.nfe, 0)
        self._jumps.append(progress.frozen)
        self._tell(
            state="running",
            round=progress.round,
            rows=progress.rows,
            start=self._start,
            frozen=progress.frozen,
            nfe=progress.nfe,
            first=progress.first,
            levels=levels(progress.residual, tolerance),
            jumps=self._jumps,
        )

    def sequential(self, reason: str | None, callback: Any) -> Any:
        """Tell that the plain sampler runs, and why; returns ``callback`` with each step told as well."""
        steps = self._steps
        self._tell(True, state="sequential", round=0, rows=steps, frozen=0, nfe=0, reason=reason)
        if callback is None or not self.shown:
            return callback

        def tell(step: dict[str, Any]) -> Any:
            done = int(step["i"]) + 1
            self._tell(state="sequential", round=done, rows=steps, frozen=done, nfe=done, reason=reason)
            return callback(step)

        return tell

    def end(self, report: Report | None) -> None:
        """Tell how the run ended; None if it was interrupted or failed."""
        if report is None:
            self._tell(True, **{**self._known, "state": "stopped"})
            return
        plain = report.fallback is not None or report.solver == "sequential"
        speedups = [(report.measured_speedup, "measured"), (report.predicted_speedup, "predicted")]
        speedup, kind = next(((s, k) for s, k in speedups if s is not None and math.isfinite(s)), (None, None))
        final = report.status == "converged"
        self._tell(
            True,
            state="done" if final else "sketch",
            plain=plain,
            round=report.rounds,
            rows=report.sequential_nfe,
            start=self._start,
            frozen=report.sequential_nfe if final else (report.frozen_per_round or [0])[-1],
            nfe=report.nfe,
            jumps=[] if plain else report.frozen_per_round,
            reason=report.fallback,
            doubt=report.doubt,
            warm=report.warm,
            plan=report.plan,
            speedup=speedup,
            speedup_kind=kind,
        )

    def _tell(self, always: bool = False, **message: Any) -> None:
        if self._place is None:
            return
        self._known = message
        now = self._clock()
        if not always and now - self._last < PERIOD:
            return
        self._last = now
        place = self._place
        whose = {"node": place.shown, "workflow": place.workflow, "steps": self._steps}
        place.send(EVENT, {**whose, **message, "jumps": list(message.get("jumps", []))})
