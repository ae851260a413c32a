"""The automatic plan: the solver, window and rows of least predicted time, from measured latencies.

A batched call of b rows takes L(b) = w + c b. A plan's time is rounds w + rows c, with the rounds and rows that its
kind of run takes; the plain sampler's is K L(1). Everything here is a pure function of numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import mul
from typing import Any, TypeVar

import numpy as np

from .errors import check_count, check_seconds

T = TypeVar("T", bound=tuple[Any, ...])

#: A parallel plan must be predicted to take less than this share of the plain sampler's time.
WORTH = 0.95
#: The same share for a run that has already gone back to one row at a time.
_RETURN = 0.85
#: Collocation under way leaves its window only for one that is predicted to take less than this share of its time: the
#: windows are near equals where a row costs as much as a call.
CHANGE = 0.92
#: Rounds that are off by this factor are late, or of another machine.
SURPRISE = 1.4
#: Latencies are believed up to so many times the largest batch that was measured, and up to more by collocation under
#: way, whose window can be left again after any round.
REACH, TRIED = 2, 3

_WINDOWS = (2, 4, 8, 16)
#: (K, tolerance) -> rounds and rows per step at windows 2, 4, 8, 16 and the whole run: demo network, 4 seeds, CFG 4;
#: Euler-6, -12, -20, DDIM-50 and DDIM-100 of the normal schedule. Six steps and fewer save no round.
_WORK: dict[tuple[int, float], tuple[tuple[float, float], ...]] = {
    (6, 1e-2): ((1.0, 1.83), (1.0, 3.0), (1.0, 3.5), (1.0, 3.5), (1.0, 3.5)),
    (6, 3e-3): ((1.0, 1.83), (1.0, 3.0), (1.0, 3.5), (1.0, 3.5), (1.0, 3.5)),
    (6, 1e-3): ((1.0, 1.83), (1.0, 3.0), (1.0, 3.5), (1.0, 3.5), (1.0, 3.5)),
    (12, 1e-2): ((0.77, 1.46), (0.625, 2.23), (0.58, 3.67), (0.58, 4.48), (0.58, 4.48)),
    (12, 3e-3): ((0.83, 1.58), (0.69, 2.42), (0.65, 4.15), (0.65, 4.96), (0.65, 4.96)),
    (12, 1e-3): ((0.85, 1.62), (0.75, 2.65), (0.69, 4.44), (0.69, 5.27), (0.69, 5.27)),
    (20, 1e-2): ((0.61, 1.18), (0.46, 1.68), (0.40, 2.59), (0.35, 4.30), (0.35, 4.74)),
    (20, 3e-3): ((0.725, 1.40), (0.54, 1.95), (0.45, 2.94), (0.40, 4.83), (0.40, 5.29)),
    (20, 1e-3): ((0.76, 1.48), (0.575, 2.08), (0.475, 3.17), (0.44, 5.28), (0.44, 5.76)),
    (50, 1e-2): ((0.52, 1.02), (0.296, 1.14), (0.216, 1.50), (0.18, 2.30), (0.15, 4.84)),
    (50, 3e-3): ((0.54, 1.08), (0.36, 1.38), (0.25, 1.79), (0.20, 2.62), (0.17, 5.54)),
    (50, 1e-3): ((0.64, 1.26), (0.436, 1.66), (0.284, 2.06), (0.22, 2.92), (0.184, 6.06)),
    (100, 1e-2): ((0.51, 1.01), (0.27, 1.04), (0.158, 1.16), (0.112, 1.52), (0.078, 4.89)),
    (100, 3e-3): ((0.51, 1.01), (0.288, 1.11), (0.188, 1.39), (0.13, 1.81), (0.088, 5.61)),
    (100, 1e-3): ((0.538, 1.06), (0.34, 1.30), (0.222, 1.67), (0.148, 2.08), (0.098, 6.17)),
}
#: The same at tolerance 0 (DDIM-50, 2 seeds).
_EXACT: tuple[tuple[float, float], ...] = ((1.0, 1.98), (1.0, 3.88), (1.0, 7.44), (1.0, 13.6), (1.0, 25.5))
#: (steps), (share of these that a warm start takes): 10.8 against 14.3 rounds from CFG 4 to 4.6 with 50; six save none.
_WARM = ((6, 20), (1.0, 0.75))
#: Collocation towards a target, from which window on: it takes a n + b rounds and 1.2 n + d rows, with n the rows that
#: it begins with (demo network, 20 to 100 steps, four problems of CFG 4, 36 to 48 dB, 3 to 6 seeds: off by at most 1.2
#: rounds and three rows; at CFG 7.5 about one round and 3 to 10 rows more).
_SLIDING = ((2, 0.6, 2.2, 2.8), (3, 0.55, 1.2, 5.7), (5, 0.33, 2.6, 13.0))
_SLIDING_ROWS = 1.2
#: Its windows that are candidates, as far as they fit.
_NODES = (1, 2, 4, 6)
#: Lower targets begin with the rows of this one: estimates are of no use with fewer.
_LEAST_DB = 36.0
#: Rows that a run towards a target begins with at least: with two, nothing shows where more are wanted.
_FEWEST = 5
#: Rows more that it begins with for each break of the system.
_A_BREAK = 2
#: (steps), (rows that a run begins with towards 42 dB).
_BEGUN = ((12, 20, 30, 50, 100), (12, 14, 18, 21, 23))
#: Rounds that collocation takes at wider windows where two rows are left for each.
_ROUNDS = 10


@dataclass(frozen=True)
class Machine:
    """What is known of the machine before a run.

    Attributes:
        latencies: seconds of a whole round of so many rows; empty where nothing was measured.
        engine: seconds of a round that are not the model's, at least 0.
        most: rows that fit into memory together, None for no limit.
        clock: seconds, rising.

    Raises:
        ValueError: a number is out of its bounds.
    """

    latencies: Mapping[int, float] = field(default_factory=dict)
    engine: float = 0.0
    most: int | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        if not isinstance(self.latencies, Mapping):
            kind = type(self.latencies).__name__
            raise ValueError(f"machine latencies is a {kind}; a mapping of rows to seconds is allowed")
        if not callable(self.clock):
            raise ValueError(f"machine clock is a {type(self.clock).__name__}; a function is allowed")
        for rows, seconds in self.latencies.items():
            check_count("machine latencies' rows", rows)
            check_seconds(f"machine latency of {rows} rows", seconds)
        check_seconds("machine engine", self.engine)
        if self.most is not None:
            check_count("machine most", self.most)


@dataclass(frozen=True)
class Latency:
    """Seconds of a round of b rows, w + c b, both at least 0; ``known`` is the largest b that was measured."""

    w: float
    c: float
    known: int = 1

    def __call__(self, rows: float) -> float:
        return self.w + self.c * rows

    def total(self, work: Work) -> float:
        """Seconds of so many rounds and rows."""
        return self.w * work.rounds + self.c * work.rows


@dataclass(frozen=True)
class Work:
    """Batched calls and rows evaluated, as expected."""

    rounds: float
    rows: float


@dataclass(frozen=True)
class Plan:
    """How to run, and the predicted seconds of it and of the plain sampler."""

    solver: str
    window: int
    rows: int | None
    seconds: float
    plain: float

    def __str__(self) -> str:
        if self.solver == "sequential":
            return "plain sampler"
        return f"{self.solver}, window {self.window}" + (f", {self.rows} rows" if self.rows else "")


@dataclass(frozen=True)
class Question:
    """What a plan is asked for.

    Attributes:
        total: K. tolerance: of the freeze rule, for the quasi-Newton solver.
        target: dB, where collocation may serve and was asked for, 0 where it is to spend ``rows``; None where it is no
            candidate.
        rows: evaluations that collocation may spend, or begins with towards a target; None for its own choice.
        warm: the run starts from an earlier one. breaks: of the system, how many.
    """

    total: int
    tolerance: float
    target: float | None = None
    rows: int | None = None
    warm: bool = False
    breaks: int = 0


def fit(measured: Mapping[int, float]) -> Latency | None:
    """w and c of {rows: seconds} with the least squares of the relative errors; None for fewer than two sizes.

    Neither is negative: a batch never takes less than a smaller one.
    """
    if len(measured) < 2:
        return None
    # w / s + c b / s = 1 for each s seconds of b rows; by hand, as a window is chosen anew before every round
    one = [1 / max(seconds, 1e-12) for seconds in measured.values()]
    rate = [rows * inverse for rows, inverse in zip(measured, one, strict=True)]
    aa, pp, ap = (sum(map(mul, x, y)) for x, y in ((one, one), (rate, rate), (one, rate)))
    a, p = sum(one), sum(rate)
    w, c = a * pp - p * ap, p * aa - a * ap  # times aa pp - ap ap, which is positive for two sizes
    if w < 0:
        w, c = 0.0, p / pp
    elif c < 0:
        w, c = a / aa, 0.0
    else:
        w, c = w / (aa * pp - ap * ap), c / (aa * pp - ap * ap)
    return Latency(w, c, max(measured))


def without_late(measured: Mapping[int, float], once: Iterable[int]) -> dict[int, float]:
    """``measured`` without the sizes called ``once`` that took clearly more than the others foretell."""
    found = dict(measured)
    for rows in sorted(once):
        rest = fit({size: seconds for size, seconds in found.items() if size != rows})
        if rest is not None and found[rows] > SURPRISE * rest(rows):
            del found[rows]
    return found


def typical(seconds: Sequence[float]) -> float:
    """The median, the lower one of an even number: calls are late for many reasons and early for none."""
    return sorted(seconds)[(len(seconds) - 1) // 2]


def windows(total: int, most: int | None) -> list[int]:
    """The quasi-Newton solver's windows that are candidates: 2, 4, 8, 16 and the whole run, as far as they fit."""
    found = [w for w in (*_WINDOWS, total) if 1 < w <= total]
    return sorted({w for w in found if most is None or w <= most})


def candidates(question: Question, most: int | None) -> Iterable[tuple[str, int, int | None, Work]]:
    """(solver, window, rows, expected work) of every parallel plan."""
    for window in windows(question.total, most):
        yield "quasi-newton", window, None, quasi_newton_work(question, window)
    if question.target is not None:
        for window in collocation_windows(question, most):
            yield "collocation", window, question.rows, collocation_work(question, window)


def from_window(table: Sequence[T], window: int) -> T:
    """The last line of ``table`` whose first number, the window from which it holds, is at most ``window``."""
    return next(line for line in reversed(table) if window >= line[0])


def collocation_windows(question: Question, most: int | None) -> list[int]:
    """Collocation's windows that are candidates: 1, 2, 4 and 6, or as many rows as fit.

    With a number of rows and no target it is 1 alone where wider ones would have too few: 12 rows of DDIM-50 at window
    2 come to 32.7 dB (mean of 6 seeds, demo network), at window 1 to 52.5.
    """
    if not question.target and (question.rows or 0) < 2 * _ROUNDS:
        return [1]
    limit = question.total if most is None else min(question.total, most)
    return sorted({min(window, limit) for window in _NODES})


def choose(
    question: Question,
    latency: Latency,
    *,
    engine: float = 0.0,
    most: int | None = None,
    now: int | None = None,
    lost: Callable[[str, int], float] = lambda solver, window: 0.0,
) -> Plan:
    """The plan of least predicted time; the plain sampler unless another saves at least 5 %.

    Args:
        latency: of whole rounds. engine: their seconds that the plain sampler does not spend. most: rows that fit.
        now: the window of collocation under way towards a target, None for none: another of its windows must save 8 %
            of its time. lost: seconds that a solver with a window takes besides, as it makes no use of what there is.
    """
    plain = question.total * max(latency(1) - engine, 0.0)
    best = Plan("sequential", 1, None, plain + lost("sequential", 1), plain)
    limit, stay = WORTH * plain, None
    for solver, window, rows, work in candidates(question, most):
        seconds = latency.total(work) + lost(solver, window)
        reach = REACH if now is None or solver != "collocation" else TRIED
        if window > reach * latency.known or seconds >= limit:
            continue
        plan = Plan(solver, window, rows, seconds, plain)
        best = min(best, plan, key=lambda plan: plan.seconds)
        stay = plan if solver == "collocation" and window == now else stay
    if stay is not None and best.solver == "collocation" and best.seconds > CHANGE * stay.seconds:
        return stay
    return best


def choose_window(
    question: Question,
    left: int,
    latency: Latency,
    *,
    now: int | None = None,
    engine: float = 0.0,
    most: int | None = None,
) -> Plan:
    """The quasi-Newton window for the ``left`` rows of a run that are not final yet; 1 is the engine one by one.

    Args:
        now: the window chosen before, None for the first choice. Another wider one than 1 must save 5 % of its time;
            from window 1 a wider one must save 15 %, as a choice between near equals would be made anew every round.
    """
    share = left / question.total
    plain = left * max(latency(1) - engine, 0.0)
    times = {1: left * latency(1)}
    for window in windows(question.total, most):
        if window <= REACH * latency.known:
            times[window] = share * latency.total(quasi_newton_work(question, window))
    limit = (_RETURN if now == 1 else WORTH) * plain
    able = {window: seconds for window, seconds in times.items() if window > 1 and seconds < limit}
    best = min(able, key=lambda window: able[window], default=1)
    if now in able and able[best] > WORTH * able[now]:
        best = now
    solver = "sequential" if best == 1 else "quasi-newton"
    return Plan(solver, best, None, times[best], plain)


@lru_cache(maxsize=256)
def quasi_newton_work(question: Question, window: int) -> Work:
    """Expected rounds and rows of a run at ``window``."""
    K = question.total
    level = question.tolerance
    if window >= K:
        rounds, rows = _between(K, level, len(_WINDOWS))
    else:
        at = min(max(math.log2(window) - 1, 0.0), len(_WINDOWS) - 1.0)
        low, part = int(at), at - int(at)
        (r0, n0), (r1, n1) = _between(K, level, low), _between(K, level, min(low + 1, len(_WINDOWS) - 1))
        rounds, rows = r0 + part * (r1 - r0), n0 + part * (n1 - n0)
    saved = float(np.interp(K, *_WARM)) if question.warm else 1.0
    return Work(max(rounds * K * saved, 1.0), max(rows * K * saved, 1.0))


def collocation_work(question: Question, window: int) -> Work:
    """Expected rounds and rows of collocation at ``window``."""
    K = question.total
    if not question.target and question.rows is not None:
        n = question.rows
        return Work(min(n, K), min(n, K)) if window == 1 else Work(collocation_rounds(n, window, K), n)
    n = min(target_rows(K, question.target or 0.0, question.rows) + _A_BREAK * question.breaks, K)
    if window == 1:
        return Work(n, n)
    _, a, b, d = from_window(_SLIDING, window)
    return Work(a * n + b, _SLIDING_ROWS * n + d)


def leaves_out(question: Question) -> bool:
    """Whether collocation is expected to leave so many evaluations out that it is worth it, at window 1."""
    return collocation_work(question, 1).rows < WORTH * question.total


def target_rows(total: int, target: float, asked: int | None = None) -> int:
    """Rows that collocation begins with towards ``target`` dB, of ``total``; ``asked`` for, at least ``_FEWEST``.

    Coarse schedules have fewer to leave out early, where most are wanted: towards 42 dB 14 of 20 rows, 18 of 30 and 21
    of 50.
    """
    rows = round(float(np.interp(total, *_BEGUN)) + (max(target, _LEAST_DB) - 42) / 2)
    if asked is not None:
        rows = max(asked, _FEWEST)
    return max(min(rows, total), min(2, total))


def collocation_rounds(rows: int, window: int, total: int) -> int:
    """Rounds of collocation at a window of at least 2, for ``rows`` evaluations of a run of ``total`` steps.

    Three rows a round, two at window 2, but ten rounds where there are two rows for each, as fewer leave gaps too wide:
    window 4 and 20 rows in 7 rounds come to 36.4 dB (DDIM-50, CFG 4) and 28.4 dB (CFG 7.5), in 10 rounds to 51.7 and
    39.2 dB (means of 4 seeds of the demo network); of 720 runs of the ideal denoiser 114 end below 20 dB in 7 rounds,
    12 in 10.
    """
    return max(2, min(max(-(-rows // min(window, 3)), min(_ROUNDS, rows // 2)), total))


def _between(K: int, tolerance: float, column: int) -> tuple[float, float]:
    """(rounds, rows) a step in a column of the table, linear in log K and log tolerance, held beyond its ends."""
    steps, levels = sorted({k for k, _ in _WORK}), sorted({t for _, t in _WORK})
    k = min(max(math.log(max(K, 1)), math.log(steps[0])), math.log(steps[-1]))
    t = min(max(math.log(max(tolerance, 1e-30)), math.log(levels[0])), math.log(levels[-1]))
    if tolerance < levels[0] / 3:
        return _EXACT[column]
    numbers = []
    for part in (0, 1):
        by_level = [
            float(np.interp(k, [math.log(s) for s in steps], [_WORK[s, level][column][part] for s in steps]))
            for level in levels
        ]
        numbers.append(float(np.interp(t, [math.log(level) for level in levels], by_level)))
    return numbers[0], numbers[1]
