"""The loop over rounds, for all solvers that evaluate a sliding window."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .certificate import doubt
from .devices import send
from .engine import Front, Problem, Round, advance, fill, fold, guess, opening, play
from .job import Job, Progress, Solution, Status, close
from .report import Report
from .resume import continuing, exact, in_words, look_again, obstacle, part_of, remembering, standing
from .rows import Scales
from .solvers import make
from .trajectory import Part, Trajectory, half
from .window import Asked, Pilot


def iterate(job: Job, windows: Asked | Pilot | None = None, clock: Callable[[], float] = time.perf_counter) -> Solution:
    """Run ``job`` with the solver that its options name; ``windows`` decides the window of each round."""
    begin = time.perf_counter()
    options, callback = job.options, job.callback
    problem, report = _problem(job), job.report()
    K, asked = problem.total, 1 if options.solver == "sequential" else options.window
    kept = problem.S.new_empty((K, *problem.S.shape[1:]), dtype=torch.float16) if job.keep_trajectory else None
    windows = windows or Asked(asked, K)
    steepest = (0.0, 0.0)
    problem, front, part, width = _first(job, problem, windows, report)
    while True:
        started = clock()
        looks = part if report.rounds == 0 else None
        done, same = (play(problem, front), False) if looks is None else look_again(problem, front, looks, width)
        if looks is not None:
            report.warm = in_words(looks, done, same)
        final = done.corrected[: done.frozen]
        fold(problem, front.first, final)
        frozen = front.first + done.frozen
        if kept is not None:
            kept[front.first : frozen] = half(final)
        _account(report, front, done, len(front.x) if looks is None else done.evaluated)
        steepest = max(steepest, done.steepest)
        finished = frozen == K or report.rounds == options.max_rounds
        picture = fill(problem, front, done, K, K + 1)[0] if finished or callback else None
        report.seconds_per_round.append(max(clock() - started, 0.0))
        if looks is None:
            windows.record(done.frozen, done.evaluated, report.seconds_per_round[-1])
        if callback is not None and picture is not None:
            shown = picture.reshape(problem.shape).clone()  # the callback's own
            callback(Progress(report.rounds, frozen, K, report.nfe, front.first, [*done.residual], shown))
        if finished and picture is not None:
            break
        if not same:
            width, report.window_reason = windows.next(frozen)
        front = advance(problem, front, done, min(frozen + width, K))
        if looks is not None and same:
            problem, front = remembering(problem, front, looks)
        elif looks is not None:
            problem = continuing(problem, options, same=False)

    status = Status.CONVERGED if frozen == K else Status.MAX_ROUNDS
    left = looks if same else None  # nothing was done but to look at an earlier run's rows
    trajectory = None if kept is None else _trajectory(job, problem, front, done, kept, steepest, windows, left)
    if job.warm is not None and part is None and max(report.window_per_round) == 1:
        report.warm = f"{report.warm}; only pictures on the way gain by it, as rows are evaluated one after the other"
    report.doubt = None if problem.exact else doubt(steepest)
    close(report, status, time.perf_counter() - begin)
    return Solution(picture.reshape(problem.shape), status, report, trajectory)


def _first(
    job: Job, problem: Problem, windows: Asked | Pilot, report: Report
) -> tuple[Problem, Front, Part | None, int]:
    """The problem, the first rows, what they are of a capped run, None where they are a window, and the window.

    The report gets the reason where a capped run cannot be taken over.
    """
    part = None if job.warm is None else job.warm.part
    if part is not None and (why := obstacle(job.system, job.options, part)) is not None:
        part, report.warm = None, f"{report.warm}; nothing of the sketch is taken over, as {why}"
    if part is not None and part.timing is not None:
        windows.resume(part.timing)
    width, report.window_reason = windows.next(0 if part is None else part.final)
    if part is None:
        return problem, opening(problem, min(width, problem.total)), None, width
    problem = continuing(problem, job.options)
    return problem, standing(problem, part), part, width


def _trajectory(
    job: Job,
    problem: Problem,
    front: Front,
    done: Round,
    kept: Tensor,
    steepest: tuple[float, float],
    windows: Asked | Pilot,
    part: Part | None,
) -> Trajectory:
    """Of a run that ended with the round ``done``; ``kept`` ``[K, B, d]`` holds its final rows.

    ``part`` is what it leaves to another run if that is known, else None.
    """
    system, options, frozen = job.system, job.options, front.first + done.frozen
    if frozen < problem.total:
        kept[frozen:] = half(guess(problem, front, done))
        part = part or replace(part_of(problem, system, options, front, done, kept, steepest), timing=windows.timing())
    D = kept.reshape(len(kept), *problem.shape).cpu()
    return Trajectory(D, system.sigmas.clone(), system.sampler, flow=options.flow, noisy=system.noisy, part=part)


def _problem(job: Job) -> Problem:
    system, options = job.system, job.options
    shape = system.S.shape[1:]
    # whatever its layout in memory: rows are changed in place, flat
    S = system.S.detach().reshape(len(system.S), shape[0], -1).clone(memory_format=torch.contiguous_format)
    scales = Scales.of(system, options.flow, options.data_rms)
    sigmas = send(system.sigmas, S)
    solver = make(options, system.evaluations, job.warm is not None)
    return Problem(
        S=S,
        C=system.C,
        weights=send(system.C, S),
        sigmas=sigmas,
        scales=scales,
        shape=shape,
        denoise=job.denoise,
        solver=solver,
        matrices=solver.matrices(system.C[:-1], scales),
        tolerance=options.tolerance,
        exact=exact(options),
        warm=job.earlier(),
    )


def _account(report: Report, front: Front, done: Round, window: int) -> None:
    report.rounds += 1
    report.nfe += done.evaluated
    report.rows_per_round.append(done.evaluated)
    report.frozen_per_round.append(front.first + done.frozen)
    report.window_per_round.append(window)
    report.residuals.append((front.first, done.residual))
    report.repairs += done.unsound
    report.model_seconds += done.model_seconds
