"""One round of the parallel solver: evaluate the window, correct it, freeze, fold, and fill the next window.

Everything here works on flat states ``[rows, B, d]``. What a round costs beside the model call is a fixed number of
tensor operations and one synchronisation, whatever the window; only the bit-exact mode (tolerance 0, or window 1) adds
up row by row, and looks once more which rows have changed. The quasi-Newton solver's small linear system grows with the
window's cube: nothing up to 100 rows, 0.6 s a round with 300 and 23 s with 1000 (one core).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .certificate import products, quotients
from .denoisers import Denoise, answer
from .devices import send
from .errors import NotFinite
from .rows import Scales, Window
from .solvers import Solver
from .solvers.base import Array, Flags, Measured

#: A row that moves by more than this many times its own size, or whose D is that much larger than data, has exploded.
EXPLODED = 20.0


@dataclass(frozen=True)
class Problem:
    """What stays the same during a run, except that ``S`` takes up each frozen row's D.

    Attributes:
        S: ``[K+1, B, d]`` working copy.
        C: ``[K+1, K]`` float64 on the CPU. weights: C in the dtype and on the device of S.
        sigmas: ``[K]`` as the model is shown them.
        scales: per-row constants.
        shape: ``[B, ...]`` of a state.
        denoise, solver: of the run. matrices: what the solver worked out of C.
        tolerance: of the freeze rule.
        exact: add up row by row, in the sequential order, and freeze only what is equal to the bit.
        warm: ``[K, B, d]`` D of an earlier run on the CPU, or None.
    """

    S: Tensor
    C: Tensor
    weights: Tensor
    sigmas: Tensor
    scales: Scales
    shape: torch.Size
    denoise: Denoise
    solver: Solver
    matrices: Any
    tolerance: float
    exact: bool
    warm: Tensor | None

    @property
    def total(self) -> int:
        """K."""
        return self.C.shape[1]


@dataclass(frozen=True)
class Front:
    """The window before a round.

    Attributes:
        first: p, its first row.
        x: ``[n, B, d]`` the states.
        state: the solver's.
        D: ``[n, B, d]`` with the rows that need no evaluation filled in, or None.
        stale: which rows need one; None for all.
        before: the last round's x and D, ``[n', B, d]``, whose first ``skip`` rows have left the window.
        known: leading rows that the last round evaluated.
    """

    first: int
    x: Tensor
    state: Any
    D: Tensor | None = None
    stale: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None
    skip: int = 0
    known: int = 0

    @property
    def stop(self) -> int:
        return self.first + len(self.x)


@dataclass(frozen=True)
class Round:
    """What a round found.

    Attributes:
        D: ``[n, B, d]`` as evaluated.
        corrected: ``[n, B, d]`` D after the solver's correction; of the good rows.
        moved: ``[n, B, d]`` states that the solver moved itself, or None: they follow from ``corrected``.
        state: the solver's.
        frozen: leading rows that are final now.
        good: leading rows that are sound and near enough to be corrected; the others are refilled.
        unsound: rows that were not finite or exploded.
        residual: of each row. evaluated: rows that were. model_seconds: their wall time.
        steepest: the largest slope measured in the window and the sigma of its row (see ``certificate.py``).
    """

    D: Tensor
    corrected: Tensor
    moved: Tensor | None
    state: Any
    frozen: int
    good: int
    unsound: int
    residual: list[float]
    evaluated: int
    model_seconds: float
    steepest: tuple[float, float] = (0.0, 0.0)


def play(problem: Problem, front: Front) -> Round:
    """Evaluate the window and correct it (steps 1 and 2 of a round).

    Raises:
        ValueError: ``denoise`` returned another shape.
        NotFinite: its first row, whose state is exact, is not finite.
    """
    n, first = len(front.x), front.first
    begin = time.perf_counter()
    D, evaluated = _evaluate(problem, front)
    seconds = time.perf_counter() - begin
    sizes = torch.linalg.vector_norm(D, dim=-1).amax(1)
    if n == 1:
        return _alone(problem, front, D, sizes, evaluated, begin, seconds)
    C = problem.C[first : front.stop, first : front.stop]
    window = Window(first, front.stop, C, problem.scales, front.x.shape[-1], problem.matrices)
    found = _measure(problem, front, window, D, sizes)
    if D.device.type != "cpu":
        seconds = time.perf_counter() - begin  # the copy waited for the device
    sound = _sound(found.sizes, window)
    if not sound[0]:
        raise _not_finite(problem, first)
    if not sound.all():  # such a row holds the D of the last row before it that is sound
        last = np.maximum.accumulate(np.where(sound, np.arange(n), 0))
        D = D[torch.from_numpy(last).to(D.device)]
        found = _measure(problem, front, window, D, sizes)

    measured = found.measured
    step = problem.solver.step(window, found.numbers, measured.state)
    sound = sound & (step.growth <= EXPLODED)
    good = _leading(sound & (step.growth <= problem.solver.trust))
    calm = step.residual <= problem.tolerance if found.still is None else found.still
    frozen = min(max(_leading(calm), 1), good)
    old = front.x if problem.solver.moves_x else D
    weights = send(torch.from_numpy(step.weights), D)
    new = torch.baddbmm(old.transpose(0, 1), weights, measured.basis).transpose(0, 1)
    corrected, moved = new, None
    if problem.solver.moves_x:
        corrected, moved = _following(D, new - front.x, window, 0 if problem.exact else frozen), new
    residual = step.residual.tolist()
    changes = step.products if found.changes is None else found.changes
    steepest = _steepest(window, changes, min(good, front.known))
    unsound = n - int(sound.sum())
    return Round(D, corrected, moved, step.state, frozen, good, unsound, residual, evaluated, seconds, steepest)


def _following(D: Tensor, moves: Tensor, window: Window, frozen: int) -> Tensor:
    """D ``[n, B, d]`` whose frozen rows follow their states with eps held, as the authors of ParaTAA freeze them."""
    eps = send(window.scales.eps[:frozen], D).reshape(-1, 1, 1)
    return torch.cat([D[:frozen] + eps * moves[:frozen], D[frozen:]])


class _Found(NamedTuple):
    """A round's device work, with its numbers in float64 on the CPU.

    Attributes:
        measured: the solver's record. numbers: its numbers.
        sizes: ``[n]`` norm of each row's D, the largest image's.
        still: ``[n]`` bool, in the exact mode: which rows do not change.
        changes: ``products`` of the changes where the solver does not know them.
    """

    measured: Measured
    numbers: Array
    sizes: Array
    still: Flags | None
    changes: Array | None


def _measure(problem: Problem, front: Front, window: Window, D: Tensor, sizes: Tensor) -> _Found:
    """The round's device work and its one copy to the CPU."""
    S = problem.S[window.first : window.stop]
    still: list[Tensor] = []

    def residual(out: Tensor) -> Tensor:
        if problem.exact:
            torch.sub(_add_in_order(S.clone(), window.C, D).transpose(0, 1), front.x.transpose(0, 1), out=out)
            still.append((out == 0).all(2).all(0))
            return out
        C = problem.weights[window.first : window.stop, window.first : window.stop]
        torch.sub(S.transpose(0, 1), front.x.transpose(0, 1), out=out)
        return out.baddbmm_(C.expand(len(out), *C.shape), D.transpose(0, 1))

    measured = problem.solver.measure(window, front.x, D, residual, front.state)
    parts = [measured.numbers, sizes, *(flags.to(D.dtype) for flags in still)]
    if front.before is not None and not problem.solver.knows_changes:
        parts.append(products(front.x, D, front.before, front.skip))
    packed = torch.cat([part.flatten() for part in parts]).cpu().double().numpy()
    pieces: list[Array] = []
    at = 0
    for part in parts:
        pieces.append(packed[at : at + part.numel()].reshape(part.shape))
        at += part.numel()
    numbers, norms, *rest = pieces
    same = rest.pop(0) > 0 if still else None
    return _Found(measured, numbers, norms, same, rest[0] if rest else None)


def _alone(
    problem: Problem, front: Front, D: Tensor, sizes: Tensor, evaluated: int, begin: float, seconds: float
) -> Round:
    """The round of a window of one row, whose state is exact: plain stepping."""
    finite = math.isfinite(float(sizes[0]))
    if D.device.type != "cpu":
        seconds = time.perf_counter() - begin  # it waited for the device
    if not finite:
        raise _not_finite(problem, front.first)
    return Round(D, D, None, problem.solver.start(), 1, 1, 0, [0.0], evaluated, seconds)


def _not_finite(problem: Problem, row: int) -> NotFinite:
    level = float(problem.scales.sigma[row])
    return NotFinite(f"denoise returned NaN or infinity at row {row} (sigma {level:g}); finite values are allowed")


def fold(problem: Problem, first: int, D: Tensor) -> None:
    """Freeze: add the final ``D [f, B, d]`` of rows ``first..`` to all later states, ``S_k += sum C[k,i] D_i``."""
    stop = first + len(D)
    if problem.exact:
        for i, row in enumerate(D, start=first):
            _add_row(problem.S[i + 1 :], problem.C[i + 1 :, i], row)
        return
    later, weights = problem.S[stop:], problem.weights[stop:, first:stop]
    if len(D) == 1:  # a product of matrices takes twice as long
        later.addcmul_(weights[:, :, None], D)
    else:
        later.view(len(later), -1).addmm_(weights, D.flatten(1))


def opening(problem: Problem, stop: int) -> Front:
    """The first window, rows ``0..stop-1``: stepped with the earlier run's D, or with D = 0."""
    x = problem.S[:stop].clone()
    if problem.warm is not None:
        x = _matmul(problem.weights[:stop, :stop], send(problem.warm[:stop], x), x)
    return Front(0, x, problem.solver.start())


def advance(problem: Problem, front: Front, done: Round, stop: int) -> Front:
    """The next window, up to row ``stop``; its first row is exact. Call after :func:`fold`."""
    first = front.first + done.frozen
    x = fill(problem, front, done, first, stop)
    kept = max(min(done.good, stop - front.first) - done.frozen, 0)
    state = problem.solver.slide(done.state, done.frozen, kept, stop - first)
    if done.moved is not None and kept > 1:
        x[1:kept] = done.moved[done.frozen + 1 : done.frozen + kept]
    before = None if problem.solver.knows_changes else (front.x, done.D)
    if not problem.exact or kept == 0:
        return Front(first, x, state, before=before, skip=done.frozen, known=kept)
    same = (x[:kept] == front.x[done.frozen : done.frozen + kept]).flatten(1).all(1)
    stale = torch.ones(len(x), dtype=torch.bool)
    stale[:kept] = ~same.cpu()
    D = torch.zeros_like(x)
    D[:kept] = done.D[done.frozen : done.frozen + kept]
    return Front(first, x, state, D, stale, before, done.frozen, kept)


def fill(problem: Problem, front: Front, done: Round, first: int, stop: int) -> Tensor:
    """States ``first..stop-1`` (K is the picture) from the folded S, the window's D, and a guess for rows beyond it.

    Rows not evaluated yet or not good are taken to have the D of the last good row l; after a warm start, to differ
    from the earlier run's as that row does, ``D_i_old + (D_l - D_l_old)``, or to be ``D_i_old`` itself where the
    solver copies.
    """
    live, beyond = front.first + done.frozen, front.first + done.good
    D, last = done.corrected[done.frozen : done.good], done.corrected[done.good - 1 : done.good]
    x, rows = problem.S[first:stop], problem.C[first:stop]
    ahead = min(stop - 1, problem.total)  # rows that any of these states depends on
    tail = rows[:, beyond:ahead]
    copies = problem.warm is not None and problem.solver.copies_warm
    held = None if copies or ahead <= beyond else tail.sum(1, keepdim=True)
    if problem.exact:
        x = _add_in_order(x.clone(), rows[:, live:beyond], D)
        x = x if held is None else _matmul(send(held, x), last, x)
    elif len(D):
        weights = problem.weights[first:stop, live:beyond]
        if held is not None:
            whole = rows[:, live:beyond].clone()
            whole[:, -1:] += held
            weights = send(whole, x)
        x = _matmul(weights, D, x)
    else:
        x = x.clone() if held is None else _matmul(send(held, x), last, x)
    if ahead <= beyond:
        return x
    if problem.warm is not None:
        old = send(problem.warm[beyond:ahead], x)
        base = torch.zeros_like(old[:1]) if copies else send(problem.warm[beyond - 1 : beyond], x)
        x = _matmul(send(tail, x), old - base, x)
    return x


def guess(problem: Problem, front: Front, done: Round) -> Tensor:
    """D of the rows that are not final: the window's corrected ones and, beyond them, :func:`fill`'s guess."""
    live, beyond = done.corrected[done.frozen : done.good], front.first + done.good
    held = done.corrected[done.good - 1].expand(problem.total - beyond, -1, -1)
    if problem.warm is not None:
        old = send(problem.warm[beyond - 1 :], held)
        held = old[1:] if problem.solver.copies_warm else held + old[1:] - old[:1]
    return torch.cat([live, held])


def _steepest(window: Window, changes: Array | None, rows: int) -> tuple[float, float]:
    """The largest quotient of the leading ``rows`` and its sigma; these are good and were evaluated before too."""
    if changes is None or rows == 0:
        return 0.0, 0.0
    measured = quotients(changes, window)[:rows]
    row = int(measured.argmax())
    return float(measured[row]), float(window.run.sigma[window.first + row])


def _evaluate(problem: Problem, front: Front) -> tuple[Tensor, int]:
    """D of the window and how many rows were evaluated."""
    sigma = problem.sigmas[front.first : front.stop]
    if front.stale is None or bool(front.stale.all()):
        return call_model(problem.denoise, front.x, sigma, problem.shape), len(front.x)
    assert front.D is not None
    index = front.stale.nonzero()[:, 0].to(front.x.device)
    D = front.D.index_copy(0, index, call_model(problem.denoise, front.x[index], sigma[index], problem.shape))
    return D, len(index)


def _sound(sizes: Array, window: Window) -> Flags:
    """``[n]`` which rows are finite, and not far larger than data or than the first row, the exact one."""
    unit = max(sizes[0], window.run.data_rms * window.size**0.5)
    return sizes < EXPLODED * unit  # false where either side is NaN, or the first row infinite


def call_model(denoise: Denoise, x: Tensor, sigma: Tensor, shape: torch.Size) -> Tensor:
    """``D [n, B, d]`` of ``x`` ``[n, B, d]`` at ``sigma`` ``[n]``, shown to ``denoise`` as ``[n, *shape]``.

    Raises:
        ValueError: it returned something else than floats of its input's shape.
    """
    return answer(denoise, x.reshape(len(x), *shape), sigma).reshape(x.shape)


def _matmul(weights: Tensor, D: Tensor, S: Tensor) -> Tensor:
    """``S + weights D`` for rows of states."""
    return torch.addmm(S.flatten(1), weights, D.flatten(1)).view_as(S)


def _add_row(S: Tensor, c: Tensor, D: Tensor) -> None:
    """``S_k += c_k D`` in place; two roundings, so that no fused kernel makes the result depend on the shapes."""
    S += send(c, S).reshape(-1, 1, 1) * D


def _add_in_order(S: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """``S + C D`` in place, summed as the sequential sampler does: row i's D before row i + 1's."""
    for i in range(len(D)):
        below = C[:, i].nonzero()[:, 0]
        if len(below):
            start = int(below[0])
            _add_row(S[start:], C[start:, i], D[i])
    return S


def _leading(flags: Flags) -> int:
    """How many leading entries are true."""
    return [*flags.tolist(), False].index(False)
