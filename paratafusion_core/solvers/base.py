"""What a solver is: pure methods around one loop (``iterate.py``), with its state in a record the loop carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..rows import Scales, Window

Array = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

#: Writes the residuals ``S + C D - x`` into the ``[B, n, d]`` it is given, and gives it back.
Residual = Callable[[Tensor], Tensor]


class Measured(NamedTuple):
    """A round's device work.

    Attributes:
        state: the solver's state with this round's evaluations in it.
        basis: ``[B, L, d]`` vectors of which every correction is a combination.
        numbers: a small tensor for ``step``; copying it to the CPU is the round's one synchronisation.
    """

    state: Any
    basis: Tensor
    numbers: Tensor


class Memory(NamedTuple):
    """What a solver remembers of k rows.

    Attributes:
        x, D: ``[k, B, d]`` their last evaluation; in place of D the residual, if the solver moves x.
        changes: ``[2m, k, B, d]`` the changes before it, x, D, x, .., newest first; 0 where a row has none.
    """

    x: Tensor
    D: Tensor
    changes: Tensor


@dataclass(frozen=True)
class Step:
    """One round's decision, made on the CPU from a few numbers, in float64.

    Attributes:
        residual: ``[n]`` each row's distance from its solution, worst image; a row may freeze where it is at most the
            tolerance. Row 0 has 0.
        growth: ``[n]`` rms of each row's move in units of the row's own size, for the explosion guard.
        weights: ``[B, n, L]`` of the basis vectors in each row's correction.
        state: the solver's, with what this step worked out.
        products: ``[2, n, B]`` |dx|^2 and dx . dD of each row since the last round, 0 where it was not evaluated then;
            None where the solver does not measure them.
    """

    residual: Array
    growth: Array
    weights: Array
    state: Any
    products: Array | None = None


class Solver(Protocol):
    """A frozen record of hyper-parameters with pure methods; shapes: n rows, B images, d numbers an image."""

    @property
    def moves_x(self) -> bool:
        """Corrections move x with D held, instead of moving D (whence ``x = S + C D`` follows)."""
        ...

    @property
    def trust(self) -> float:
        """Rows from the first that would move by more than this many times its own size are refilled, not corrected."""
        ...

    @property
    def knows_changes(self) -> bool:
        """Its steps say how each row's x and D have changed; otherwise the engine measures it."""
        ...

    @property
    def copies_warm(self) -> bool:
        """A warm start copies the earlier D (the paper's way) instead of following how it has changed."""
        ...

    def matrices(self, C: Tensor, scales: Scales) -> Any:
        """What every round needs of the run's equations ``C`` ``[K, K]``: each window brings it along."""
        ...

    def start(self) -> Any:
        """The state before any evaluation."""
        ...

    def measure(self, window: Window, x: Tensor, D: Tensor, residual: Residual, state: Any) -> Measured:
        """Device work on states and denoised pictures ``[n, B, d]``, and on residuals that it makes room for."""
        ...

    def step(self, window: Window, numbers: Array, state: Any) -> Step:
        """CPU work on the measured numbers in float64."""
        ...

    def slide(self, state: Any, frozen: int, kept: int, size: int) -> Any:
        """The state for the next window of ``size`` rows: ``frozen`` leave in front, the next ``kept`` stay."""
        ...

    def leave(self, state: Any, frozen: int, good: int) -> Memory | None:
        """What the state knows of the rows from ``frozen`` up to ``good``, for a run that goes on from here."""
        ...

    def take_up(self, memory: Memory) -> Any:
        """The state of a solver that remembers this of its window's first rows."""
        ...


def shift(rows: Tensor, dim: int, frozen: int, kept: int, size: int) -> Tensor:
    """``kept`` rows after the first ``frozen`` along ``dim``, filled up with zeros to ``size``."""
    rows = rows.narrow(dim, frozen, kept)
    shape = list(rows.shape)
    shape[dim] = size - kept
    return torch.cat([rows, rows.new_zeros(shape)], dim)


def unit_lower_inverse(strictly_lower: Tensor) -> Tensor:
    """(I - L)^-1 for strictly lower triangular L ``[n, n]``."""
    eye = torch.eye(len(strictly_lower), dtype=strictly_lower.dtype)
    return torch.linalg.solve_triangular(eye - strictly_lower, eye, upper=False, unitriangular=True)
