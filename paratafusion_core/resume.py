"""Going on where a capped run of the same system stopped, without evaluating its final rows once more.

The earlier run's rows are taken over only if they still hold: in one call a few of them, spread from the first to the
last, are evaluated again, and each must give the D that was kept. So a changed prompt, guidance or model is found out
even where the system is the same.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from typing import Any

import torch

from .devices import send
from .engine import Front, Problem, Round, call_model
from .errors import NotFinite
from .options import Options
from .system import System
from .trajectory import Part, Trajectory

#: Rows evaluated again: two, or a quarter of a wider window, at most so many.
CHECKED = 8
#: Half precision's rounding of D (rms in units of the data's), with room to spare: 4e-4 on the demo network.
ROUNDING = 2e-3
#: D of a final row may change by some tolerances: 1.4 at most on the demo network (ddim, ddpm, dpmpp_2m; 2 seeds), 10
#: on the mixture (ddim; 8 seeds, three solvers), whose D changes fast where it decides for a mode.
SLACK = 15.0


def fingerprint(system: System) -> str:
    """Tells systems apart: noise levels, the start, and the state before the last evaluation."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (system.sigmas, system.C[-2], system.S[0], system.S[-2]):
        digest.update(part.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def part_of(
    problem: Problem, system: System, options: Options, final: int, steepest: tuple[float, float] = (0.0, 0.0)
) -> Part:
    """What a run that stopped behind ``final`` rows leaves to a second one."""
    slope, sigma = (value if math.isfinite(value) else 0.0 for value in steepest)
    tolerance = 0.0 if problem.exact else options.tolerance
    return Part(final, tolerance, options.solver, fingerprint(system), slope, sigma)


def takes_over(problem: Problem, system: System, options: Options, warm: Trajectory | None) -> bool:
    """Whether ``warm`` is of a capped run of this system whose final rows are accurate enough for this one.

    An exact run has no use for rows in half precision. ParaTAA's tolerance is in units of its own.
    """
    part = None if warm is None else warm.part
    if part is None or problem.exact or part.tolerance > options.tolerance:
        return False
    same_rule = part.tolerance == 0 or (part.solver == "parataa") == (options.solver == "parataa")
    return same_rule and part.system == fingerprint(system)


def continuing(problem: Problem) -> Problem:
    """``problem`` with a solver that follows the earlier D.

    Behind the rows that the capped run had reached its D is a guess, which a solver that copies would keep.
    """
    solver: Any = problem.solver
    return replace(problem, solver=replace(solver, copies_warm=False))


def standing(problem: Problem, part: Part) -> Front:
    """The final rows of the earlier run as a window; its states are not filled in."""
    return Front(0, problem.S[: part.final], problem.solver.start())


def look_again(problem: Problem, front: Front, part: Part, width: int) -> Round:
    """The round that evaluates some rows of :func:`standing` again, the first and the last among them.

    All of them are frozen if these still hold; otherwise row 0 alone, whose state is exact. Its residual has a number
    for each evaluated row, at most the tolerance where the row holds, and NaN for the others.

    Raises:
        ValueError: ``denoise`` returned another shape. NotFinite: it is not finite at row 0.
    """
    assert problem.warm is not None
    final = len(front.x)
    D = send(problem.warm[:final], problem.S)
    count = min(CHECKED, max(width // 4, 2), width, final)
    rows = torch.linspace(0, final - 1, count).round().long()
    x = problem.S[rows] + torch.tensordot(send(problem.C[rows, :final], D), D, 1)
    begin = time.perf_counter()
    again = call_model(problem.denoise, x, problem.sigmas[rows], problem.shape)
    gap = (again - D[rows]).square().mean(-1).amax(1).sqrt().cpu().double() / problem.scales.data_rms
    seconds = time.perf_counter() - begin
    if not gap[0].isfinite():
        raise NotFinite("denoise returned NaN or infinity at row 0; finite values are allowed")
    allowed = torch.full_like(gap, SLACK * problem.tolerance + ROUNDING)
    allowed[0] = ROUNDING
    share = (gap / allowed).nan_to_num(nan=math.inf)
    residual = torch.full((final,), math.nan, dtype=torch.float64)
    residual[rows] = share * problem.tolerance
    holds = bool((share <= 1).all())
    frozen, sure = (final, D) if holds else (1, again[:1])
    steepest = (part.slope, part.slope_sigma) if holds else (0.0, 0.0)
    return Round(D, sure, None, front.state, frozen, frozen, 0, residual.tolist(), len(rows), seconds, steepest)


def in_words(part: Part, done: Round) -> str:
    """What came of it, for the report."""
    if done.frozen == part.final:
        return f"continued behind {part.final} final rows of the same run, {done.evaluated} of them checked"
    return f"same noise levels; its {part.final} final rows do not hold here and were evaluated again"
