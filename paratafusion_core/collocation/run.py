"""The loop of the collocation solver: evaluate a few rows, make them agree, look where it hurts, go on."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..devices import send
from ..engine import call_model
from ..errors import NotFinite
from ..job import Job
from ..options import Options
from ..report import Report
from ..rows import Scales
from ..system import System
from ..trajectory import Part, half
from .again import Begun, look_again, obstacle, part_of
from .budget import Budget, at_window, begun_wide, budget, next_rows, unsettled
from .doubts import Signs, doubt, watch
from .estimate import MARGIN, decibels, expected_error
from .grid import coordinate
from .impact import Impact, impact
from .nodes import SLOPE, Ground, Nodes, agree, missed, states, with_evaluated

#: Told after each round: frozen rows, first row, residuals, the picture.
Tell = Callable[[int, int, list[float], Tensor], Any]
#: What interpolation leaves out of the noise in D is weighed so many times at most: 8 for 2M SDE and its like on the
#: schedules of the host (34 dB and more with 24 of 30 and 30 of 50 rows, but for one picture of 150), 32 to 38 for 3M
#: SDE on ``normal`` (24 to 27 dB at an estimated 47), 4 at most on the others (37 dB and more).
_DIFFERENCES = 12.0


def refusal(system: System, options: Options | None = None) -> str | None:
    """Why collocation cannot serve ``system`` (with ``options``; without, whatever they are), or None.

    It interpolates D over falling noise levels: samplers with several evaluations a step repeat levels. D of an SDE
    sampler follows each step's own noise, which nothing foretells (a slope for each spatial frequency 2 to 5 % of it),
    so that more rows are needed, at window 1 (DDPM-50, demo network, 16 seeds: 36 rows one by one come to 49.1 dB in
    the mean, at window 2 to 37.9, 60 rows at window 4 to 40.2), and their number must be given: how near the picture
    comes can be told too roughly for a target, and there is no good number for all.
    """
    if system.evaluations < 3:
        return f"the run has {system.evaluations} evaluations, and at least 3 are needed"
    if (system.sigmas.diff() >= 0).any():
        return "its noise levels do not fall from evaluation to evaluation"
    if not system.noisy:
        return None
    why = "it adds noise of its own in every step"
    if _weighs_differences(system.C) > _DIFFERENCES:
        return f"{why}, and weighs differences of such pictures many times over"
    if options is not None and options.rows is not None and options.target is None and options.window in (1, "auto"):
        return None
    return f"{why}, which solver collocation serves for a number of rows, at window 1, without a target"


def _weighs_differences(C: Tensor) -> float:
    """How much larger the weights of D in a state are than their sum, at most."""
    sums = C[1:].sum(1).abs().clamp(min=1e-30)
    return float((C[1:].abs().sum(1) / sums).max())


@dataclass(frozen=True)
class Found:
    """What a run came to.

    Attributes:
        picture: ``[B, ...]``. D: ``[K, B, d]`` of all rows, float16 on the CPU, if the trajectory is to be kept.
        finished: not where ``max_rounds`` came first; then ``part`` is what it leaves to a second run.
    """

    picture: Tensor
    D: Tensor | None
    finished: bool
    part: Part | None


def collocate(
    job: Job,
    scales: Scales,
    report: Report,
    tell: Tell,
    window: Callable[[], int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """Run; ``report`` is filled round by round.

    After a warm start what is interpolated is how D has changed since. Of a capped run of this system the nodes are
    taken over.

    Args:
        scales: of the system.
        tell: called after each round. window: towards a target, the window of the next round; None for the options'.
        clock: seconds, rising.

    Raises:
        ValueError: ``denoise`` returned another shape. NotFinite: it returned NaN or infinity.
    """
    system, options = job.system, job.options
    levels = send(system.sigmas, system.S)

    def evaluate(rows: list[int], y: Tensor) -> Tensor:
        d = call_model(job.denoise, y, levels[rows], system.S.shape[1:])
        _check_finite(scales, rows, d)
        return d

    start = _start(job, scales, evaluate, report, clock)
    ground, nodes, signs, plan, before = start.ground, start.nodes, start.signs, start.plan, start.before
    report.window_reason = _in_words(plan, options, ground.total)
    lasting = (1 + scales.noise**2) ** -0.25
    rows, finished, own, widest = plan.front[:1], False, None, plan.width
    while True:
        started = clock()
        if start.checked is not None and report.rounds == 0:
            rows, y, d, elapsed = start.checked.rows, start.checked.y, start.checked.d, start.checked.seconds
            started -= elapsed
            if len(rows) > 1:  # they were evaluated one by one: no call of so many
                report.recalled.append(0)
        else:
            y = states(ground, nodes, rows)
            d = evaluate(rows, y)
            d = d if before is None else d - before[rows]
            elapsed = max(clock() - started, 0.0)  # checking D waited for the device
        off = missed(nodes, rows, d, ground.breaks)
        nodes = with_evaluated(ground, nodes, rows, y, d)
        seen = impact(ground, nodes, lasting, off)
        signs = watch(signs, seen, scales, rows, y[0, 0].numel())
        picture = states(ground, nodes, [ground.total])[0]
        passed = nodes.rows[-1] >= plan.front[-1]
        if passed:
            error = expected_error(ground, nodes, seen, scales.noise, widest)
            own = decibels(error, float(picture.max() - picture.min()))
            report.estimated_db = own if options.peak is None else decibels(error, options.peak)
        _account(report, nodes, seen, scales, len(rows), elapsed)
        spent = report.rounds + start.rounds, report.nfe + start.nfe
        again = unsettled(ground, plan, nodes, seen)
        finished = passed and _enough(report, spent, plan, options, bool(again))
        if window is not None and not finished:
            plan = at_window(plan, window(), nodes.rows[-1])
            widest = max(widest, plan.width)
        rows = [] if finished else next_rows(ground, plan, nodes, seen, *spent, again)
        finished = finished or not rows  # nothing left to gain: the front always has a next row
        frozen = ground.total if finished else _way(plan, nodes, spent[0])
        report.frozen_per_round.append(frozen)
        report.seconds_per_round.append(max(clock() - started, 0.0))
        tell(frozen, 0, [*report.residuals[-1][1]], picture)
        if finished or report.rounds >= (options.max_rounds or math.inf):
            break
    report.doubt = doubt(signs, nodes.rows, seen, scales, report, own, ground.noisy)
    picture = picture.reshape(system.S.shape[1:])
    if not job.keep_trajectory:
        return Found(picture, None, finished, None)
    D = _all_rows(nodes, before)
    if before is not None and not finished:  # a second run begins without that one, and interpolates D itself
        nodes = agree(_ground(system, scales, None), nodes.rows, nodes.y, nodes.d + before[nodes.rows], nodes.secants)
        D[nodes.rows] = half(nodes.D).cpu()
    return Found(picture, D, finished, None if finished else part_of(nodes, system, signs, spent))


@dataclass(frozen=True)
class _Start:
    """What a run begins with.

    Attributes:
        ground, plan: of the run. nodes: of an earlier capped run, None without, and what it had shown (``signs``) and
            cost (``rounds``, ``nfe``). checked: the rows of it that were evaluated again, which are the first round.
        before: ``[K, B, d]`` D of an earlier run, of whose change this one's nodes are; None where it begins cold.
    """

    ground: Ground
    plan: Budget
    nodes: Nodes | None = None
    signs: Signs = field(default_factory=Signs)
    rounds: int = 0
    nfe: int = 0
    checked: Begun | None = None
    before: Tensor | None = None


def _start(
    job: Job,
    scales: Scales,
    evaluate: Callable[[list[int], Tensor], Tensor],
    report: Report,
    clock: Callable[[], float],
) -> _Start:
    """Take over what an earlier run leaves: its nodes where it was capped, else its D."""
    system, options, old = job.system, job.options, job.earlier()
    begun = None if old is None else _begun(job, old, scales, evaluate, report, clock)
    if begun is not None and begun.nodes is not None:
        ground = _ground(system, scales, None)
        held = len(begun.nodes.rows)
        dense = begun.nodes.rows[-1] < held == begun.nfe + len(begun.rows)
        plan = budget(ground, options, dense)
        if begun.nfe > begun.rounds:  # more rows than rounds
            plan = begun_wide(plan, begun.nodes.rows[-1])
        return _Start(ground, plan, begun.nodes, begun.signs, begun.rounds, begun.nfe, begun)
    before = None if old is None else send(old, system.S)
    if before is not None and not system.noisy and job.warm is not None and job.warm.noisy:
        before, report.warm = None, f"{report.warm}; not used, as noise of its sampler's own is in it"
    ground = _ground(system, scales, before)
    return _Start(ground, budget(ground, options), before=before)


def _begun(
    job: Job,
    old: Tensor,
    scales: Scales,
    evaluate: Callable[[list[int], Tensor], Tensor],
    report: Report,
    clock: Callable[[], float],
) -> Begun | None:
    """What an earlier capped run had, checked; the report gets the reason if it is of no use."""
    part = None if job.warm is None else job.warm.part
    if part is None:
        return None
    why = obstacle(job.system, part)
    if why is not None:
        report.warm = f"{report.warm}; nothing of the sketch is taken over, as {why}"
        return None
    ground = _ground(job.system, scales, None)
    if ground.noisy and list(part.rows) != budget(ground, job.options).front[: len(part.rows)]:
        report.warm = f"{report.warm}; nothing of the sketch is taken over, as its rows lie otherwise"
        return None
    begun = look_again(ground, part, old, job.options.window in (1, "auto"), evaluate, scales, clock)
    report.warm = begun.in_words()
    if begun.nodes is None:
        report.probe_nfe = len(begun.rows)
        report.model_seconds += begun.seconds
    return begun


def _ground(system: System, scales: Scales, before: Tensor | None) -> Ground:
    S = system.S.detach().reshape(len(system.S), system.S.shape[1], -1)
    if before is not None:
        S = torch.addmm(S.flatten(1), send(system.C, S), before.flatten(1)).view_as(S)
    u = coordinate(scales.sigma, scales.alpha, scales.data_rms)
    return Ground(S, system.C, u, SLOPE * scales.gaussian, scales.alpha, scales.data_rms, system.noisy, system.breaks)


def _check_finite(scales: Scales, rows: list[int], d: Tensor) -> None:
    """Raises NotFinite, naming the first row of ``d`` ``[len(rows), B, d]`` that is not finite."""
    fine = d.isfinite().flatten(1).all(1).tolist()
    if not all(fine):
        row = rows[fine.index(False)]
        level = float(scales.sigma[row])
        raise NotFinite(f"denoise returned NaN or infinity at row {row} (sigma {level:g}); finite values are allowed")


def _enough(report: Report, spent: tuple[int, int], plan: Budget, options: Options, waiting: bool) -> bool:
    """After the first pass: whether the target or, without one, the plan's evaluations are reached.

    ``waiting``: nodes are still to be evaluated again.
    """
    rounds, nfe = spent
    if max(rounds, report.rounds) >= report.sequential_nfe:
        return True
    if options.target is None:
        return rounds >= plan.rounds or nfe >= plan.rows
    return not waiting and report.estimated_db is not None and report.estimated_db >= options.target + MARGIN


def _way(plan: Budget, nodes: Nodes, rounds: int) -> int:
    """How far the run is, in rows: to its last node, where rounds are planned at most their share of the way."""
    last = nodes.rows[-1]
    return last if plan.open else min(last, len(nodes.M) * rounds // max(plan.rounds, 1))


def _account(report: Report, nodes: Nodes, seen: Impact, scales: Scales, evaluated: int, seconds: float) -> None:
    """The round's numbers; a row between nodes shows the error expected inside its gap."""
    report.rounds += 1
    report.nfe += evaluated
    report.rows_per_round.append(evaluated)
    report.model_seconds += seconds
    report.window_per_round.append(evaluated)
    bend, moved = seen.bend.tolist(), seen.moved.tolist()
    values = moved[:1]
    for q, (a, b) in enumerate(itertools.pairwise(nodes.rows)):
        values += [bend[q]] * (b - a - 1) + [moved[q + 1]]
    units = (scales.allowed * scales.data_rms).tolist()
    report.residuals.append((0, [value / (unit or 1.0) for value, unit in zip(values, units, strict=False)]))


def _all_rows(nodes: Nodes, before: Tensor | None) -> Tensor:
    """``[K, B, d]`` D of every row in half precision, on the CPU; ``before`` is what the nodes are changes of.

    A row at a time: all of them in full precision may be more than the run itself has taken.
    """
    weights, flat = send(nodes.M, nodes.D), nodes.D.flatten(1)
    D = torch.empty(len(weights), *nodes.D.shape[1:], dtype=torch.float16, device="cpu")
    for row, weight in enumerate(weights):
        own = (weight @ flat).view_as(D[row])
        D[row] = half(own if before is None else own + before[row])
    return D


def _in_words(plan: Budget, options: Options, total: int) -> str:
    if options.target is None and plan.rows >= total:
        return f"collocation: all {total} rows, so that no evaluation is saved"
    goal = f"{plan.rows} evaluations" if options.target is None else f"a target of {options.target:g} dB"
    return f"collocation: {len(plan.front)} rows to start with, {goal}"
