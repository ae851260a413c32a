"""What measured rounds would cost on a device whose batch of b rows takes L(b) = w + c b."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..options import Options
from ..plan import Latency, Work
from .table import CAP_DB, mean

#: w / c: 0 is a device that one row fills, 8 one with room, or with weights that are copied in for every call.
RATIOS = (0.0, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Plan:
    """A way to draw the picture; ``rows`` belongs to the collocation solver."""

    solver: str
    window: int | str
    rows: int | None = None

    def __str__(self) -> str:
        window = "full window" if self.window == "full" else f"window {self.window}"
        return f"{self.solver}, {window}" + (f", {self.rows} rows" if self.rows else "")

    def options(self, data_rms: float) -> Options:
        return Options(self.solver, window=self.window, rows=self.rows, data_rms=data_rms)


@dataclass(frozen=True)
class Run:
    """A measured run: the rows of each round, and the PSNR against its sequential result of so many evaluations."""

    plan: Plan
    seed: int
    sequential_nfe: int
    rows_per_round: tuple[int, ...]
    psnr_db: float

    @property
    def nfe(self) -> int:
        return sum(self.rows_per_round)

    @property
    def work(self) -> Work:
        return Work(len(self.rows_per_round), self.nfe)


@dataclass(frozen=True)
class Choice:
    """The best plan for a ratio w / c, None where the plain sampler is; figures are means over the seeds."""

    ratio: float
    plan: Plan | None
    speedup: float
    rounds: float
    nfe: float
    psnr_mean: float
    psnr_worst: float


def speedup(runs: Sequence[Run], latency: Latency) -> float:
    """Predicted time of the sequential samplers over that of these runs, both summed over the seeds."""
    plain = sum(run.sequential_nfe * latency(1) for run in runs)
    return plain / sum(latency.total(run.work) for run in runs)


def best_plans(runs: Sequence[Run], ratios: Sequence[float] = RATIOS, floor_db: float = 42.0) -> list[Choice]:
    """For each w / c the plan of the greatest predicted speed-up among those of at least ``floor_db`` in the mean.

    Args:
        runs: each plan's runs, over the same seeds.
        ratios: w / c, at least 0.
        floor_db: plans whose mean PSNR is lower do not count; a PSNR above ``CAP_DB`` counts as that.
    """
    plans: dict[Plan, list[Run]] = {}
    for run in runs:
        plans.setdefault(run.plan, []).append(run)
    able = {plan: own for plan, own in plans.items() if mean(_psnr(own)) >= floor_db}
    return [_best(able, ratio) for ratio in ratios]


def _psnr(runs: Sequence[Run]) -> list[float]:
    return [min(run.psnr_db, CAP_DB) for run in runs]


def _best(plans: dict[Plan, list[Run]], ratio: float) -> Choice:
    latency = Latency(ratio, 1.0)
    rated = {plan: speedup(own, latency) for plan, own in plans.items()}
    best = max(rated, key=lambda plan: rated[plan], default=None)
    if best is None or rated[best] <= 1:
        return Choice(ratio, None, 1.0, float("nan"), float("nan"), CAP_DB, CAP_DB)
    own = plans[best]
    rounds, nfe, db = (len(r.rows_per_round) for r in own), (r.nfe for r in own), _psnr(own)
    return Choice(ratio, best, rated[best], mean(rounds), mean(nfe), mean(db), min(db))
