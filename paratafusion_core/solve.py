"""The public entry: the loop over rounds, its report, and its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .denoisers import Denoise
from .devices import send
from .engine import Front, Problem, Round, advance, fill, fold, guess, opening, play
from .options import Options
from .report import Report
from .rows import Scales
from .solvers import make
from .system import System
from .trajectory import Trajectory
from .window import next_window


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
        warm: an earlier run's trajectory of the same latent shape; other noise levels are interpolated.
        callback: called after each round.
        keep_trajectory: gather D of every row in half precision (K states of memory on the device until the end).

    Raises:
        ValueError: ``warm`` has another latent shape, ``options.flow`` does not fit the sigmas, or ``denoise``
            returned another shape or is not finite at an exact state.
    """
    for name, value, kind in (("system", system, System), ("options", options, Options)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}; a {kind.__name__} is allowed")
    if warm is not None and not isinstance(warm, Trajectory):
        raise ValueError(f"warm is a {type(warm).__name__}; a Trajectory, as of load_trajectory, is allowed")
    with torch.no_grad():
        return _solve(system, denoise, options, warm, callback, keep_trajectory)


def _solve(
    system: System,
    denoise: Denoise,
    options: Options,
    warm: Trajectory | None,
    callback: Callable[[Progress], Any] | None,
    keep_trajectory: bool,
) -> Solution:
    begin = time.perf_counter()
    problem = _problem(system, denoise, options, warm)
    report = _report(system, options, warm)
    K, asked = problem.total, 1 if options.solver == "sequential" else options.window
    kept = problem.S.new_empty((K, *problem.S.shape[1:]), dtype=torch.float16) if keep_trajectory else None
    timed: list[tuple[int, int, float]] = []
    width, report.window_reason = next_window(asked, K, timed)
    front = opening(problem, min(width, K))
    while True:
        started = time.perf_counter()
        done = play(problem, front)
        final = done.corrected[: done.frozen]
        fold(problem, front.first, final)
        frozen = front.first + done.frozen
        if kept is not None:
            kept[front.first : frozen] = _half(final)
        _account(report, front, done)
        finished = frozen == K or report.rounds == options.max_rounds
        picture = fill(problem, front, done, K, K + 1)[0] if finished or callback else None
        report.seconds_per_round.append(time.perf_counter() - started)
        timed.append((width, done.frozen, report.seconds_per_round[-1]))
        if callback is not None and picture is not None:
            shown = picture.reshape(problem.shape).clone()  # the callback's own
            callback(Progress(report.rounds, frozen, K, report.nfe, front.first, done.residual, shown))
        if finished and picture is not None:
            break
        width, report.window_reason = next_window(asked, K, timed)
        front = advance(problem, front, done, min(frozen + width, K))

    status = Status.CONVERGED if frozen == K else Status.MAX_ROUNDS
    trajectory = None
    if kept is not None:
        if frozen < K:
            kept[frozen:] = _half(guess(problem, front, done))
        D = kept.reshape(K, *problem.shape).cpu()
        trajectory = Trajectory(D, system.sigmas.clone(), system.sampler, flow=options.flow)
    _close(report, status, time.perf_counter() - begin)
    return Solution(picture.reshape(problem.shape), status, report, trajectory)


def _problem(system: System, denoise: Denoise, options: Options, warm: Trajectory | None) -> Problem:
    shape = system.S.shape[1:]
    S = system.S.detach().reshape(len(system.S), shape[0], -1).clone()
    old = None
    if warm is not None:
        if warm.shape != tuple(shape):
            raise ValueError(f"warm has latent shape {list(warm.shape)}; {list(shape)}, this run's, is allowed")
        old = warm.onto(system.sigmas, options.flow).D.reshape(system.evaluations, shape[0], -1)
    scales = Scales.of(system, options.flow, options.data_rms)
    sigmas = send(system.sigmas, S)
    exact = options.tolerance == 0 or options.window == 1 or options.solver == "sequential"
    return Problem(S, system.C, sigmas, scales, shape, denoise, make(options), options.tolerance, exact, old)


def _half(D: Tensor) -> Tensor:
    """float16 without infinities."""
    return D.clamp(-65504, 65504).half()


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
