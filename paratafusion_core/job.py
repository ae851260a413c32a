"""What a run is asked to do, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from .denoisers import Denoise
from .options import Options
from .plan import fit, typical
from .report import Report
from .system import System
from .trajectory import Trajectory


class Status(str, Enum):
    """How a run ended."""

    CONVERGED = "converged"
    MAX_ROUNDS = "max_rounds"


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each round.

    Attributes:
        round: 1, 2, ..
        frozen: rows final so far, of ``rows`` = K; with collocation, whose rows are refined to the end, how far it is.
        nfe: rows evaluated so far.
        first: the round's first row; residual: each of its rows' distance in units of the freeze rule, NaN where it is
            not known: in the first round after a capped run, for the final rows that were not looked at.
        picture: ``[B, ...]`` the final picture as far as it is known now.
    """

    round: int
    frozen: int
    rows: int
    nfe: int
    first: int
    residual: list[float]
    picture: Tensor


@dataclass(frozen=True)
class Solution:
    """The outcome: ``x`` ``[B, ...]``, how the run ended, its :class:`Report`, and its trajectory if it was kept."""

    x: Tensor
    status: Status
    report: Report
    trajectory: Trajectory | None


@dataclass(frozen=True)
class Job:
    """The arguments of :func:`paratafusion_core.solve`, checked."""

    system: System
    denoise: Denoise
    options: Options
    warm: Trajectory | None
    callback: Callable[[Progress], Any] | None
    keep_trajectory: bool

    def earlier(self) -> Tensor | None:
        """``[K, B, d]`` the earlier run's D at this run's noise levels.

        Raises:
            ValueError: it has another latent shape.
        """
        if self.warm is None:
            return None
        shape = self.system.S.shape[1:]
        if self.warm.shape != tuple(shape):
            raise ValueError(f"warm has latent shape {list(self.warm.shape)}; {list(shape)}, this run's, is allowed")
        levels = self.warm.onto(self.system.sigmas, self.options.flow)
        return levels.D.reshape(self.system.evaluations, shape[0], -1)

    def report(self) -> Report:
        """The report as it begins."""
        K, options, warm = self.system.evaluations, self.options, self.warm
        preset = options.preset if options.tol is None else "custom"
        steps = self.system.steps or K
        report = Report(self.system.sampler, steps, options.solver, preset, options.tolerance, K)
        if warm is not None:
            same = warm.has_levels(self.system.sigmas, options.flow)
            report.warm = "same noise levels" if same else "interpolated in lambda onto other noise levels"
        return report


def close(report: Report, status: Status, seconds: float) -> None:
    """The report as it ends, after so many seconds."""
    report.status = status.value
    report.seconds = seconds
    report.engine_seconds = max(seconds - report.model_seconds, 0.0)
    predict_speedup(report)


def predict_speedup(report: Report) -> None:
    """Fill ``predicted_speedup`` from the rounds that tell what they took.

    The first call of a run may be late by any factor: where no other evaluated a single row, what one takes follows
    from the larger ones.
    """
    calls, spent = report.calls(), report.spent
    single = [seconds for rows, seconds in calls if rows == 1]
    report.predicted_speedup = None
    if report.solver == "sequential" or report.status != Status.CONVERGED.value or not single or spent <= 0:
        return
    later: dict[int, list[float]] = {}
    for rows, seconds in calls[1:]:
        later.setdefault(rows, []).append(seconds)
    usual = {rows: typical(seconds) for rows, seconds in later.items()}
    latency = fit(usual)
    one = min(usual.values(), default=calls[0][1])  # no row takes longer than several
    if 1 not in usual:
        one = min([one, calls[0][1], *([] if latency is None else [latency(1)])])
    # rows that an earlier run had made final are none of this one's merits
    taken = max(report.frozen_per_round[0] - report.rows_per_round[0], 0) if report.warm is not None else 0
    if taken < report.sequential_nfe:
        report.predicted_speedup = (report.sequential_nfe - taken) * one / spent
