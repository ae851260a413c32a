"""The public entry: the loop over rounds, its report, and its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .certificate import doubt
from .collocation import collocate, refusal
from .denoisers import Denoise
from .devices import send
from .engine import Front, Problem, Round, advance, fill, fold, guess, opening, play
from .options import TARGETS, Options
from .plan import WORTH, Machine, Plan, Question, collocation_work
from .report import Report
from .resume import continuing, holds, in_words, look_again, part_of, remembering, standing, takes_over
from .rows import Scales
from .solvers import make
from .system import System
from .trajectory import Trajectory, half
from .window import Asked, Pilot, Replan, Shared, Timed


class Status(str, Enum):
    """How a run ended."""

    CONVERGED = "converged"
    MAX_ROUNDS = "max_rounds"


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each round.

    Attributes:
        round: 1, 2, ..
        frozen: rows final so far, of ``rows`` = K.
        nfe: rows evaluated so far.
        first: the round's first row; residual: each of its rows' distance in units of the freeze rule.
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


def solve(
    system: System,
    denoise: Denoise,
    options: Options = Options(),
    *,
    warm: Trajectory | None = None,
    callback: Callable[[Progress], Any] | None = None,
    keep_trajectory: bool = True,
    machine: Machine | None = None,
) -> Solution:
    """Solve ``system``: the sequential sampler's result in fewer, batched model calls.

    The rounds never exceed ``system.evaluations``: the first row of a window is exact, so it freezes. Exceptions of
    ``denoise`` and ``callback`` pass through; nothing is kept, and ``system`` is never changed. The engine's own sums
    are float32 matrix products: leave ``torch.backends.cuda.matmul.allow_tf32`` off, as it is by default.

    Args:
        system: the sampler's run.
        denoise: ``(x [n, B, ...], sigma [n]) -> [n, B, ...]`` with n at most the window, in the dtype and on the
            device of ``system.S``. Rows must not influence each other.
        options: see :class:`Options`.
        warm: an earlier run's trajectory of the same latent shape; other noise levels are interpolated. Of a run of
            this same system that was capped by ``max_rounds``, the final rows are not evaluated again but for a few.
        callback: called after each round.
        keep_trajectory: gather D of every row in half precision (K states of memory on the device until the end).
        machine: what is known of the machine, for solver ``auto``; without it the run measures all it needs.

    Raises:
        ValueError: ``warm`` has another latent shape, ``options.flow`` does not fit the sigmas, or ``denoise``
            returned another shape.
        NotFinite: a ValueError; ``denoise`` is not finite at an exact state.
    """
    for name, value, kind in (("system", system, System), ("options", options, Options)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}; a {kind.__name__} is allowed")
    if warm is not None and not isinstance(warm, Trajectory):
        raise ValueError(f"warm is a {type(warm).__name__}; a Trajectory, as of load_trajectory, is allowed")
    with torch.no_grad():
        if options.solver == "auto":
            return _auto(system, denoise, options, warm, callback, keep_trajectory, machine or Machine())
        work = _collocate if options.solver == "collocation" and options.tolerance > 0 else _solve
        return work(system, denoise, options, warm, callback, keep_trajectory)


def _collocate(
    system: System,
    denoise: Denoise,
    options: Options,
    warm: Trajectory | None,
    callback: Callable[[Progress], Any] | None,
    keep_trajectory: bool,
) -> Solution:
    begin = time.perf_counter()
    why = refusal(system)
    if why is not None:
        raise ValueError(f"solver is 'collocation'; quasi-newton is allowed for sampler {system.sampler}, as {why}")
    report = _report(system, options, warm)
    report.target_db = options.target
    K, shape = system.evaluations, system.S.shape[1:]

    def tell(frozen: int, first: int, residual: list[float], picture: Tensor) -> None:
        if callback is not None:
            shown = picture.reshape(shape).clone()
            callback(Progress(report.rounds, frozen, K, report.nfe, first, residual, shown))

    scales = Scales.of(system, options.flow, options.data_rms)
    picture, D, finished = collocate(system, denoise, options, scales, _earlier(system, options, warm), report, tell)
    trajectory = None
    if keep_trajectory:
        kept = half(D).reshape(K, *shape).cpu()
        trajectory = Trajectory(kept, system.sigmas.clone(), system.sampler, flow=options.flow)
    status = Status.CONVERGED if finished else Status.MAX_ROUNDS
    _close(report, status, time.perf_counter() - begin)
    return Solution(picture, status, report, trajectory)


def _solve(
    system: System,
    denoise: Denoise,
    options: Options,
    warm: Trajectory | None,
    callback: Callable[[Progress], Any] | None,
    keep_trajectory: bool,
    windows: Asked | Pilot | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Solution:
    begin = time.perf_counter()
    problem = _problem(system, denoise, options, warm)
    report = _report(system, options, warm)
    K, asked = problem.total, 1 if options.solver == "sequential" else options.window
    kept = problem.S.new_empty((K, *problem.S.shape[1:]), dtype=torch.float16) if keep_trajectory else None
    windows = windows or Asked(asked, K)
    steepest = (0.0, 0.0)
    width, report.window_reason = windows.next(0)
    part = warm.part if warm is not None and takes_over(problem, system, options, warm) else None
    problem = problem if part is None else continuing(problem, options)
    front = opening(problem, min(width, K)) if part is None else standing(problem, part)
    while True:
        started = clock()
        looks = part if report.rounds == 0 else None
        done = play(problem, front) if looks is None else look_again(problem, front, looks, width)
        if looks is not None:
            report.warm = in_words(problem, looks, done)
        final = done.corrected[: done.frozen]
        fold(problem, front.first, final)
        frozen = front.first + done.frozen
        if kept is not None:
            kept[front.first : frozen] = half(final)
        _account(report, front, done)
        steepest = max(steepest, done.steepest)
        finished = frozen == K or report.rounds == options.max_rounds
        picture = fill(problem, front, done, K, K + 1)[0] if finished or callback else None
        report.seconds_per_round.append(clock() - started)
        if looks is None:
            windows.record(done.frozen, done.evaluated, report.seconds_per_round[-1])
        if callback is not None and picture is not None:
            shown = picture.reshape(problem.shape).clone()  # the callback's own
            callback(Progress(report.rounds, frozen, K, report.nfe, front.first, done.residual, shown))
        if finished and picture is not None:
            break
        width, report.window_reason = windows.next(frozen)
        front = advance(problem, front, done, min(frozen + width, K))
        if looks is not None and holds(problem, done):
            front = remembering(problem, front, looks)
        elif looks is not None:
            problem = continuing(problem, options, same=False)

    status = Status.CONVERGED if frozen == K else Status.MAX_ROUNDS
    trajectory = None
    if kept is not None:
        if frozen < K:
            kept[frozen:] = half(guess(problem, front, done))
        left = part_of(problem, system, options, front, done, kept, steepest) if frozen < K else None
        D = kept.reshape(K, *problem.shape).cpu()
        trajectory = Trajectory(D, system.sigmas.clone(), system.sampler, flow=options.flow, part=left)
    report.doubt = None if problem.exact else doubt(steepest)
    _close(report, status, time.perf_counter() - begin)
    return Solution(picture.reshape(problem.shape), status, report, trajectory)


def _auto(
    system: System,
    denoise: Denoise,
    options: Options,
    warm: Trajectory | None,
    callback: Callable[[Progress], Any] | None,
    keep_trajectory: bool,
    machine: Machine,
) -> Solution:
    """Measure, choose, run; ``options.window`` is the most rows evaluated together."""
    K = system.evaluations
    if isinstance(options.window, int):
        machine = replace(machine, most=min(options.window, machine.most or options.window))
    asks = options.target_db is not None or options.preset in TARGETS
    why = None if not asks else "tolerance 0 is asked for" if options.tolerance == 0 else refusal(system)
    target = (options.target or 0.0) if asks and why is None else None
    question = Question(K, options.tolerance, target, options.rows, warm is not None)
    if target is not None and collocation_work(question, 1).rows >= WORTH * K:
        question, why = replace(question, target=None), f"it takes as many rows as the run has, {K}"
    shared = Shared(denoise, question, machine)
    plan = shared.opening()
    while plan.solver == "collocation":
        chosen = replace(options, solver="collocation", window=plan.window)
        try:
            done = _collocate(system, shared, chosen, warm, callback, keep_trajectory)
        except Replan as other:
            plan = other.plan
        else:
            _tell_plan(done.report, shared.plan or plan, why)
            done.report.probe_nfe = shared.lost
            return done
    timed = Timed(shared, machine.clock)
    pilot = Pilot(question, shared.machine, timed if system.S.device.type == "cpu" else None)
    windows = pilot if options.max_rounds is None else Asked("auto", K)
    chosen = replace(options, solver="quasi-newton", window="auto", rows=None, target_db=None)
    done = _solve(system, timed, chosen, warm, callback, keep_trajectory, windows, machine.clock)
    if max(done.report.window_per_round) == 1 < K:
        done.report.solver = "sequential"
    if pilot.plan is not None:
        _tell_plan(done.report, pilot.plan, why)
    else:
        done.report.plan = done.report.window_reason
    done.report.probe_nfe = shared.lost
    return done


def _tell_plan(report: Report, plan: Plan, why: str | None) -> None:
    """The automatic plan, its prediction and its outcome, in words."""
    report.predicted_seconds = plan.seconds
    words = f"{plan}: predicted {plan.seconds:.3g} s, the plain sampler {plan.plain:.3g} s"
    widest = max(report.window_per_round[len(report.window_per_round) // 2 :])
    if plan.solver != "collocation" and widest not in (plan.window, 1) and report.frozen_per_round:
        words += f"; later window {widest}"
    words += f"; took {sum(report.seconds_per_round):.3g} s"
    report.plan = words if why is None else f"{words}; no collocation, as {why}"


def _problem(system: System, denoise: Denoise, options: Options, warm: Trajectory | None) -> Problem:
    shape = system.S.shape[1:]
    S = system.S.detach().reshape(len(system.S), shape[0], -1).clone()
    old = _earlier(system, options, warm)
    scales = Scales.of(system, options.flow, options.data_rms)
    sigmas = send(system.sigmas, S)
    exact = options.tolerance == 0 or options.window == 1 or options.solver == "sequential"
    solver = make(options, warm is not None)
    return Problem(
        S=S,
        C=system.C,
        weights=send(system.C, S),
        sigmas=sigmas,
        scales=scales,
        shape=shape,
        denoise=denoise,
        solver=solver,
        matrices=solver.matrices(system.C[:-1], scales),
        tolerance=options.tolerance,
        exact=exact,
        warm=old,
    )


def _earlier(system: System, options: Options, warm: Trajectory | None) -> Tensor | None:
    """``[K, B, d]`` the earlier run's D at this run's noise levels."""
    if warm is None:
        return None
    shape = system.S.shape[1:]
    if warm.shape != tuple(shape):
        raise ValueError(f"warm has latent shape {list(warm.shape)}; {list(shape)}, this run's, is allowed")
    return warm.onto(system.sigmas, options.flow).D.reshape(system.evaluations, shape[0], -1)


def _report(system: System, options: Options, warm: Trajectory | None) -> Report:
    K = system.evaluations
    preset = options.preset if options.tol is None else "custom"
    report = Report(system.sampler, system.steps or K, options.solver, preset, options.tolerance, K)
    if warm is not None:
        same = torch.equal(warm.sigmas, system.sigmas) and warm.flow == options.flow
        report.warm = "same noise levels" if same else "interpolated in lambda onto other noise levels"
    return report


def _account(report: Report, front: Front, done: Round) -> None:
    report.rounds += 1
    report.nfe += done.evaluated
    report.rows_per_round.append(done.evaluated)
    report.frozen_per_round.append(front.first + done.frozen)
    report.window_per_round.append(len(front.x))
    report.residuals.append((front.first, done.residual))
    report.repairs += done.unsound
    report.model_seconds += done.model_seconds


def _close(report: Report, status: Status, seconds: float) -> None:
    report.status = status.value
    report.seconds = seconds
    report.engine_seconds = max(seconds - report.model_seconds, 0.0)
    single = [s for s, n in zip(report.seconds_per_round, report.rows_per_round, strict=True) if n == 1]
    if single and seconds > 0:
        report.predicted_speedup = report.sequential_nfe * min(single) / sum(report.seconds_per_round)
