"""Going on where a capped run of the same system stopped, without evaluating its final rows once more.

The earlier run's rows are taken over only if they still hold: a few of them, spread from the first to the last, are
evaluated again, together where the window has room, and each must give the D that was kept. So a changed prompt,
guidance or model is found out even where the system is the same, unless it changes D by less than a few tolerances.
Where the caller knows the problem to be another, it leaves the ``part`` out.
"""

from __future__ import annotations

import math
import struct
import time
import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .devices import send
from .engine import Front, Problem, Round, call_model
from .errors import NotFinite
from .options import Options
from .solvers import make
from .solvers.base import Memory
from .system import System
from .trajectory import Part, half

#: Rows evaluated again: two, or a quarter of a wider window, at most so many.
CHECKED = 8
#: Half precision's rounding of D (rms in units of the data's), with room to spare: 4e-4 on the demo network.
ROUNDING = 2e-3
#: D of a final row may change by so many tolerances: SLACK at most, and at noise sigma LATE (1 + sigma^2). Measured are
#: 0.96 at most below noise 1, 2.1 from 1 to 2, 7.8 from 2 to 4, 13.7 beyond (1700 rows of the demo network and the
#: mixture, five samplers, three solvers, fast and balanced, 2 to 6 seeds), most where the mixture decides for a mode.
SLACK, LATE = 15.0, 2.0
#: The noise, in units of the data's rms, at which one row tells most: late rows depend on their state alone, early ones
#: on nothing yet. With 5, 7 and 10 none of 128 collocation runs of another CFG was taken for the same (mixture, DDIM
#: and flow, all caps), with 3 42 were; with 7 none of 96 on the demo network, and none of 48 of the same was refused.
TELLING = 7.0
#: Noise above this adds nothing to what an exact row may differ by.
MOST_NOISE = 20.0
#: What rounding may change of a system, in units of its length. Another device moves noise levels by 1e-7, and so the
#: differences of neighbouring ones by 1e-5 and more where they lie dense.
SAME = 1e-4
#: Frequencies of the waves, radians a number; in tiles of so many numbers.
WAVES = (0.1, 0.7, 1.9, 2.9)
_TILE, _LARGEST = 1024, 1e38


def fingerprint(system: System) -> str:
    """Tells systems apart: noise levels, the start, the state before the last evaluation, and the breaks.

    Of each its length and projections on fixed waves, which :func:`same_system` compares with room for rounding: a host
    may compute a schedule on the CPU once and on the GPU the next time.

    Returns:
        float32 numbers, little-endian, in hexadecimal; behind a slash a checksum of the breaks, where there are any.
    """
    parts = (system.sigmas, system.C[-2], system.S[0], system.S[-2])
    numbers = torch.cat([_sketched(part) for part in parts]).clamp(-_LARGEST, _LARGEST).tolist()
    breaks = f"/{zlib.crc32(repr(system.breaks).encode()):08x}" if system.breaks else ""
    return struct.pack(f"<{len(numbers)}f", *numbers).hex() + breaks


def _sketched(values: Tensor) -> Tensor:
    """``[1 + len(WAVES)]`` the length of ``values`` and its projections on the waves."""
    flat = values.detach().cpu().double().flatten()
    tile = torch.nn.functional.pad(flat, (0, -len(flat) % _TILE)).reshape(-1, _TILE)
    waves = torch.tensor(WAVES, dtype=torch.float64)[:, None]
    down, along = (waves * torch.arange(n) for n in tile.shape)
    projected = ((torch.cos(3 * down) @ tile) * torch.cos(along)).sum(1)
    return torch.cat([flat.norm()[None], projected])


def same_system(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same system, to rounding; False where one is of another kind."""
    form = f"<{4 * (1 + len(WAVES))}f"
    (numbers, breaks), (others, theirs) = (text.partition("/")[::2] for text in (one, other))
    try:
        a, b = (torch.tensor(struct.unpack(form, bytes.fromhex(text))).reshape(4, -1) for text in (numbers, others))
    except (ValueError, struct.error):
        return False
    close = bool(a.isfinite().all()) and bool(((a - b).abs() <= SAME * a[:, :1]).all())
    return close and breaks == theirs


def part_of(
    problem: Problem,
    system: System,
    options: Options,
    front: Front,
    done: Round,
    D: Tensor,
    steepest: tuple[float, float],
) -> Part:
    """What a run that stops after the round ``done`` leaves to a second one.

    Args:
        front: the window of the round. D: ``[K, B, d]`` the trajectory, in half precision.
    """
    slope, sigma = (value if math.isfinite(value) else 0.0 for value in steepest)
    tolerance = 0.0 if problem.exact else options.tolerance
    final = front.first + done.frozen
    changes = _changes(problem, system, final, done, D)
    return Part(final, tolerance, options.solver, fingerprint(system), slope, sigma, changes=changes)


def _changes(problem: Problem, system: System, final: int, done: Round, D: Tensor) -> Tensor | None:
    """The solver's memory as changes, which half precision serves better than the states between which they lie.

    The second run will stand where the rounded D lead, so that is where the first changes lead to; a solver that moves
    x stands elsewhere, and the way from there to where it stands comes before them.
    """
    memory = problem.solver.leave(done.state, done.frozen, done.good)
    if memory is None:
        return None
    rows = slice(final, final + len(memory.x))
    kept = send(D, problem.S)
    start = system.S[rows].reshape(memory.x.shape)
    x = start + torch.tensordot(send(system.C[rows], start), kept, 1)
    if done.moved is None:
        first = [x - memory.x, kept[rows] - memory.D]
    else:
        moved = torch.cat([x[:1], done.moved[done.frozen + 1 : done.good]])  # the first row is exact
        first = [moved - x, torch.zeros_like(x), moved - memory.x, -memory.D]
    changes = torch.cat([torch.stack(first), memory.changes])
    return half(changes).reshape(len(changes), -1, *problem.shape).cpu()


def remembering(problem: Problem, front: Front, part: Part) -> tuple[Problem, Front]:
    """The window behind the final rows, with what the capped run's solver knew of it.

    A run in one go forgets what it found behind its window when that shrinks, and takes the last D there: so does the
    problem that goes with the window. A better guess may freeze more rows, for which an automatic window grows and
    evaluates more in the end.
    """
    moves = problem.solver.moves_x
    if part.changes is None or problem.warm is None or not _remembers(part.changes, part, moves):
        return problem, front
    known = len(part.changes[0])
    count = min(known, len(front.x))
    changes = send(part.changes[:, :count], front.x).reshape(-1, count, *front.x.shape[1:])
    x, D = front.x, send(problem.warm[front.first : front.first + count], front.x)
    if moves:
        x, D, changes = torch.cat([x[:count] + changes[0], x[count:]]), torch.zeros_like(D), changes[2:]
    state = problem.solver.take_up(Memory(x[:count] - changes[0], D - changes[1], changes[2:]))
    warm = problem.warm.clone()
    warm[front.first : front.first + known] = warm[front.first + known - 1].clone()
    return replace(problem, warm=warm), replace(front, x=x, state=problem.solver.slide(state, 0, count, len(x)))


def _remembers(changes: Tensor, part: Part, moves: bool) -> bool:
    """Whether the changes are those of a solver that moves x or not, as this run's does."""
    return len(changes) >= 4 and part.solver == "parataa" if moves else part.solver != "parataa"


def exact(options: Options) -> bool:
    """Whether a run freezes only what is equal to the bit."""
    return options.tolerance == 0 or options.window == 1 or options.solver == "sequential"


def obstacle(system: System, options: Options, part: Part) -> str | None:
    """Why a capped run's final rows cannot be taken over, or None.

    An exact run has no use for rows in half precision. ParaTAA's tolerance is in units of its own.
    """
    if not same_system(part.system, fingerprint(system)):
        return "it is of another run"
    if part.rows:
        return "it was interpolated"
    if exact(options):
        return "this run is exact"
    if part.tolerance > options.tolerance:
        return f"its tolerance {part.tolerance:g} is above this run's {options.tolerance:g}"
    if part.tolerance > 0 and (part.solver == "parataa") != (options.solver == "parataa"):
        return f"its tolerance is that of {part.solver}"
    return None


def continuing(problem: Problem, options: Options, same: bool = True) -> Problem:
    """``problem`` with the solver of a cold run, or of a warm one where the run turned out not to be the ``same``.

    Behind the rows that the capped run had reached its D is a guess, which a solver that copies would keep.
    """
    solver: Any = make(options, problem.total, warm=not same)
    return replace(problem, solver=replace(solver, copies_warm=False))


def standing(problem: Problem, part: Part) -> Front:
    """The final rows of the earlier run as a window; its states are not filled in."""
    return Front(0, problem.S[: part.final], problem.solver.start())


def look_again(problem: Problem, front: Front, part: Part, width: int) -> tuple[Round, bool]:
    """The round that evaluates some rows of :func:`standing` again and whether they hold.

    All of them are frozen if these still hold; otherwise row 0 alone, whose state is exact. Its residual has a number
    for each evaluated row, at most the tolerance where the row holds, and NaN for the others.

    Raises:
        ValueError: ``denoise`` returned another shape. NotFinite: it is not finite at row 0.
    """
    assert problem.warm is not None
    final, begin = len(front.x), time.perf_counter()
    D = send(problem.warm[:final], problem.S)
    rows = _rows_to_check(problem, part, width)
    again = _evaluated(problem, D, rows, width)
    gap = (again - D[rows]).square().mean(-1).amax(1).sqrt().cpu().double() / problem.scales.data_rms
    allowed = _allowed(problem, part, rows)
    share = (gap / allowed).nan_to_num(nan=math.inf)
    residual = torch.full((final,), math.nan, dtype=torch.float64)
    residual[rows] = share * problem.tolerance
    same, evaluated = bool((share <= 1).all()), len(rows)
    if not same and rows[0] > 0:
        again, evaluated = _evaluated(problem, D, rows.new_zeros(1), 1), evaluated + 1
    if not same and not again[0].isfinite().all():
        raise NotFinite("denoise returned NaN or infinity at row 0; finite values are allowed")
    seconds = time.perf_counter() - begin
    frozen, sure = (final, D) if same else (1, again[:1])
    steepest = (part.slope, part.slope_sigma) if same else (0.0, 0.0)
    done = Round(D, sure, None, front.state, frozen, frozen, 0, residual.tolist(), evaluated, seconds, steepest)
    return done, same


def _allowed(problem: Problem, part: Part, rows: Tensor) -> Tensor:
    """``[n]`` by how much D of each row may differ, rms in units of the data's."""
    if part.timing is not None and part.timing.widest == 1:  # they are exact but for the rounding of earlier rows
        found = rounding(problem.scales.noise[rows])
    else:
        found = (LATE * (1 + problem.scales.noise[rows] ** 2)).clamp(max=SLACK) * problem.tolerance + ROUNDING
    return torch.where(rows == 0, ROUNDING, found)


def rounding(noise: Tensor) -> Tensor:
    """By how much D of exact rows at ``noise`` may differ, rms in units of the data's.

    As much again for each unit of noise: networks in half precision round eps.
    """
    return ROUNDING * (1 + noise.clamp(max=MOST_NOISE))


def telling(noise: Tensor) -> int:
    """Which of the rows at ``noise`` shows best whether they are of another prompt, guidance or model."""
    return int((noise.clamp(min=1e-6) / TELLING).log().abs().argmin())


def _rows_to_check(problem: Problem, part: Part, width: int) -> Tensor:
    """Rows from the first to the last final one, no more than the window; the telling row where that is one row."""
    count = min(CHECKED, max(width // 4, 2), part.final)
    if part.timing is not None:  # the run in one go may never have had a window above 1
        count = min(count, max(part.timing.widest, width))
    if count > 1:
        return torch.linspace(0, part.final - 1, count).round().long()
    return torch.tensor([telling(problem.scales.noise[: part.final])])


def _evaluated(problem: Problem, D: Tensor, rows: Tensor, width: int) -> Tensor:
    """``[n, B, d]`` D of ``rows`` where the kept ``D [final, B, d]`` lead to, at most ``width`` rows a call."""
    x = problem.S[rows] + torch.tensordot(send(problem.C[rows, : len(D)], D), D, 1)
    calls = zip(x.split(width), problem.sigmas[rows].split(width), strict=True)
    return torch.cat([call_model(problem.denoise, some, sigma, problem.shape) for some, sigma in calls])


def in_words(part: Part, done: Round, same: bool) -> str:
    """What came of it, for the report."""
    if same:
        return f"continued behind {part.final} final rows of the same run, {done.evaluated} of them checked"
    return f"same noise levels; its {part.final} final rows do not hold here and were evaluated again"
