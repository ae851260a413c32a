"""A run's progress for the live widget: at most ten messages a second of all runs, and always the last one.

Every message is complete in itself, so that one that is left out is not missed.
"""

from __future__ import annotations

import math
from typing import Any

from ...paratafusion_core import Progress, Report
from .notify import Place
from .pace import Pace, pace_of

EVENT, BEGUN = "paratafusion.progress", "paratafusion.begun"
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
        pace: how often; None for that of the place.
    """

    def __init__(self, place: Place | None, steps: int, pace: Pace | None = None) -> None:
        self._place = place if place is not None and place.shown is not None else None
        self._steps = steps
        self._pace = pace or (Pace() if self._place is None else pace_of(self._place.client, str(self._place.shown)))
        self._jumps: list[int] = []
        self._start = 0  # rows that this run took as final from an earlier one
        self._nfe = 0
        self._row_seconds: float | None = None
        self._began = self._looked = self._pace.clock()
        self._known: dict[str, Any] = {}

    @property
    def shown(self) -> bool:
        """Whether a widget shows this run."""
        return self._place is not None

    def starting(self) -> None:
        """Tell that the first round is under way: it may take long, and the widget shows the run before."""
        place = self._place
        if place is not None:
            self._pace.tell(lambda: place.send(BEGUN, self._whose(place)), self._pace.clock(), True)

    def begin(self, row_seconds: float | None) -> None:
        """The rounds of a parallel run begin; ``row_seconds`` is what a call for one row has taken before, if known."""
        self._began, self._row_seconds = self._pace.clock(), row_seconds

    def round(self, progress: Progress, tolerance: float) -> None:
        """Tell a finished round of a parallel run; ``tolerance`` is what its residuals are compared with."""
        now = self._pace.clock()
        if progress.round == 1:
            self._start, self._jumps = max(progress.frozen - progress.nfe, 0), []
        elif progress.nfe - self._nfe == 1:  # never the first round: it warms the model up
            self._row_seconds = min(now - self._looked, self._row_seconds or math.inf)
        self._nfe, self._looked = progress.nfe, now
        self._jumps.append(progress.frozen)
        self._tell(
            now,
            state="running",
            round=progress.round,
            rows=progress.rows,
            start=self._start,
            frozen=progress.frozen,
            nfe=progress.nfe,
            first=progress.first,
            levels=levels(progress.residual, tolerance),
            jumps=self._jumps,
            speedup=self._speedup(progress.frozen, now),
        )

    def _speedup(self, frozen: int, now: float) -> float | None:
        """So far: what one call for each row would have taken, over the time; None where that is not known."""
        if self._row_seconds is None or now <= self._began:
            return None
        return round((frozen - self._start) * self._row_seconds / (now - self._began), 3)

    def sequential(self, reason: str | None, callback: Any) -> Any:
        """Tell that the plain sampler runs, and why; returns ``callback`` with each step told as well."""
        steps = self._steps
        self._must(state="sequential", round=0, rows=steps, frozen=0, nfe=0, reason=reason)
        if callback is None or not self.shown:
            return callback

        def tell(step: dict[str, Any]) -> Any:
            done = int(step["i"]) + 1
            now = self._pace.clock()
            self._tell(now, state="sequential", round=done, rows=steps, frozen=done, nfe=done, reason=reason)
            return callback(step)

        return tell

    def end(self, report: Report | None) -> None:
        """Tell how the run ended; None if it was interrupted or failed."""
        if report is None:
            self._must(**{**self._known, "state": "stopped"})
            return
        plain = report.fallback is not None or report.solver == "sequential"
        final, now = report.status == "converged", self._pace.clock()
        speedup = report.predicted_speedup
        if speedup is None and final and not plain:  # no call for one row in this run
            speedup = self._speedup(report.sequential_nfe, now)
        self._must(
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
            speedup=speedup if speedup is not None and math.isfinite(speedup) else None,
        )

    def _whose(self, place: Place) -> dict[str, Any]:
        return {"node": place.shown, "workflow": place.workflow, "prompt": place.prompt, "steps": self._steps}

    def _must(self, **message: Any) -> None:
        self._tell(self._pace.clock(), True, **message)

    def _tell(self, now: float, must: bool = False, **message: Any) -> None:
        place = self._place
        if place is None:
            return
        self._known = message
        whole = {**self._whose(place), **message, "jumps": list(message.get("jumps", []))}
        self._pace.tell(lambda: place.send(EVENT, whole), now, must)
