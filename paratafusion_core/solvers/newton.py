"""The triangular quasi-Newton solver, and the Picard iterations as its special cases without secants.

With the window's equations ``x = S + C D(x)`` and a model J_i of each row's slope dD/dx, one round solves

    delta_k = r_k + sum_{i<k} C[k,i] J_i delta_i,     r_k = S_k + sum_i C[k,i] D_i - x_k                         (1)

for the whole window and moves ``D_i <- D_i + J_i delta_i`` (after which ``S + C D`` is ``x + delta``). The slope is
that of a Gaussian denoiser, corrected by a symmetric two-sided secant update over the row's last m rounds:

    J v = theta v + E^T g + S^T G^-1 (E v - H g),     G = S S^T + ridge I,  g = G^-1 S v,  H = sym(S E^T)        (2)

with ``S = dx/|dx|`` and ``E = dD/|dx| - theta S``, what theta left unexplained. theta = 0 and no secants is Picard with
D held; theta = 1/alpha is Picard with eps held, ParaDiGMS (Shih et al., arXiv 2305.16317).

(1) looks sequential but is linear: with T = (I - C Theta)^-1, u_i = S_i delta_i and w_i = E_i delta_i,

    delta = T (r + C (E^T a + S^T b)),   a = G^-1 u,   b = G^-1 (w - H a)                                        (3)

leaves 2 m n unknown numbers (u, w) per image in a block triangular system. One Gram matrix of the vectors (r, dx, dD)
holds all the inner products it needs.

A row evaluated for the first time has no S and E. With ``borrows`` it takes, for each of the m, those of the last row
before it that has them: what theta leaves unexplained changes little from row to row. A warm start freezes many rows
at their first evaluation, and they come out nearer (demo network, DDIM-50, CFG 4 -> 4.6, window 8, 32 seeds: 0.780
instead of 0.787 of the cold run's rounds, mean PSNR 1.4 dB above instead of 0.9 dB below the cold run's). A cold run
takes up to a fifth more rounds with it (2M, ideal denoiser, window 16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rows import Scales, Window
from .base import Array, Flags, Measured, Memory, Residual, Step, unit_lower_inverse


@dataclass(frozen=True)
class Matrices:
    """What the rounds need of a run's equations, ``[K, ..]``; a window takes its block.

    A block of a triangular matrix's inverse is the inverse of its block, and so with products of triangular matrices.

    Attributes:
        theta: each row's slope. T: (I - C Theta)^-1. TC: T C.
        unit: rms of delta that a tolerance of 1 allows. size: rms of a row's own state.
    """

    theta: Array
    T: Array
    TC: Array
    unit: Array
    size: Array


@dataclass(frozen=True)
class Secants:
    """What the solver remembers of a window's rows.

    Attributes:
        x, D: ``[n', B, d]`` each row's last evaluation. The first ``skip`` rows have left the window since, and the
            ``kept`` next ones are the next window's first.
        vectors: ``[B, 1 + 2m, n', d]`` r and the changes between evaluations dx, dD, dx, dD, .., newest first; 0 where
            a row has none.
        valid: ``[m, n']`` bool: which rows have the change.
        gram: ``[B, 1 + 2m, k, 1 + 2m, k]`` products of the vectors, once they were measured; of the rows kept.
    """

    x: Tensor
    D: Tensor
    vectors: Tensor
    valid: Flags
    gram: Array | None = None
    skip: int = 0
    kept: int = 0


def _lenders(valid: Flags) -> np.ndarray[Any, Any]:
    """``[m, n]`` the last row up to each one that has the change, the first row where none has."""
    return np.maximum.accumulate(np.where(valid, np.arange(valid.shape[1]), 0), axis=1)


@dataclass(frozen=True)
class TriangularNewton:
    """Equations (1)-(3).

    Attributes:
        history: m, secants a row keeps. More than 3 gain nothing; 0 leaves the slope at theta.
        slope: theta: ``gaussian``, ``eps`` (eps held) or ``held`` (D held).
        ridge: added to the Gram matrix of the normalised state changes; raise it where D is noisy.
        trust: rows from the first that would move by more than this many times its own size hold the D of the last row
            before it instead: their own was measured too far from the solution for any slope to help. 0.1 to 0.2 saves
            0.5 to 2 of 10 rounds of a full window and nothing at 8 rows (mixture, 8 seeds; demo network, 4 seeds).
        borrows: a row without secants uses an earlier row's.
    """

    history: int = 2
    slope: str = "gaussian"
    ridge: float = 0.01
    trust: float = math.inf
    borrows: bool = False
    moves_x: bool = False
    copies_warm: bool = False

    @property
    def knows_changes(self) -> bool:
        return self.history > 0

    def theta(self, scales: Scales) -> Tensor:
        """theta of each row, float64."""
        if self.slope == "held":
            return torch.zeros_like(scales.sigma)
        return scales.gaussian if self.slope == "gaussian" else scales.eps

    def matrices(self, C: Tensor, scales: Scales) -> Matrices:
        theta, allowed = self.theta(scales), scales.allowed
        T = unit_lower_inverse(C * theta)
        unit = torch.where(allowed > 0, allowed, 1.0) * scales.data_rms
        parts = (theta, T, T @ C, unit, scales.norm * scales.data_rms)
        return Matrices(*(part.numpy() for part in parts))

    def start(self) -> Secants | None:
        return None

    def measure(self, window: Window, x: Tensor, D: Tensor, residual: Residual, state: Secants | None) -> Measured:
        n, B, d = x.shape
        vectors = x.new_empty(B, 1 + 2 * self.history, n, d)
        residual(vectors[:, 0])
        if self.history == 0:
            basis = vectors[:, 0]
            return Measured(None, basis, basis @ basis.transpose(1, 2))
        valid = np.zeros((self.history, n), np.bool_)
        known = 0 if state is None else min(state.kept, n)
        if known < n:
            vectors[:, 1:, known:] = 0
        if state is not None and known:
            was = slice(state.skip, state.skip + known)
            for kind, now, before in ((1, x, state.x), (2, D, state.D)):
                torch.sub(now[:known].transpose(0, 1), before[was].transpose(0, 1), out=vectors[:, kind, :known])
            vectors[:, 3:, :known] = state.vectors[:, 1:-2, was]
            valid[0, :known] = True
            valid[1:, :known] = state.valid[:-1, was]
        basis = vectors.flatten(1, 2)
        # the products of the older changes among themselves are the last round's
        numbers = basis[:, : 3 * n] @ basis.transpose(1, 2)
        return Measured(Secants(x, D, vectors, valid, None if state is None else state.gram), basis, numbers)

    def step(self, window: Window, numbers: Array, state: Secants | None) -> Step:
        rows, matrices = slice(window.first, window.stop), window.matrices
        theta, T, TC = matrices.theta[rows], matrices.T[rows, rows], matrices.TC[rows, rows]
        products = None
        if state is None:
            gram = numbers
            delta = np.broadcast_to(T, gram.shape)
            change = theta[:, None] * delta
        else:
            whole = self._gram(numbers, state.gram, len(window))
            state = replace(state, gram=whole)
            gram = whole.reshape(len(whole), whole.shape[1] * len(window), -1)
            delta, change = self._sweep(theta, T, TC, whole, state.valid)
            products = np.einsum("bvkwk->vwkb", whole)[1, 1:3]
        squares = np.maximum(((delta @ gram) * delta).sum(-1), 0)
        rms = np.sqrt(squares.max(0) / window.size)
        rms[0] = 0.0
        return Step(rms / matrices.unit[rows], rms / matrices.size[rows], change, state, products)

    def _gram(self, numbers: Array, last: Array | None, n: int) -> Array:
        """``[B, 1 + 2m, n, 1 + 2m, n]`` from the products of the new vectors (r, dx, dD) with all."""
        kinds = 1 + 2 * self.history
        new = numbers.reshape(-1, 3, n, kinds, n)
        if kinds == 3:
            return new
        gram = np.zeros((len(new), kinds, n, kinds, n))
        gram[:, :3] = new
        gram[:, 3:, :, :3] = new[:, :, :, 3:].transpose(0, 3, 4, 1, 2)
        if last is not None:
            known = min(last.shape[2], n)
            gram[:, 3:, :known, 3:, :known] = last[:, 1:-2, :known, 1:-2, :known]
        return gram

    def _sweep(self, theta: Array, T: Array, TC: Array, gram: Array, valid: Flags) -> tuple[Array, Array]:
        """Weights of delta and of J delta over the basis (r, dx, dD, dx, ..), ``[B, n, (1 + 2m) n]`` each.

        Letters: b image; k, j rows; v, w kinds of vector (r, S, E, S, ..); p, q those without r.
        """
        B, n, m = gram.shape[0], len(theta), self.history
        S, E = slice(1, None, 2), slice(2, None, 2)
        squares = np.einsum("bvkvk->bvk", gram)[:, S]  # |dx|^2 [B, m, n]
        used = valid & (squares > 0)
        scale = np.ones((B, 1 + 2 * m, n))
        scale[:, S] = scale[:, E] = used / np.sqrt(np.where(used, squares, 1.0))
        g = gram * scale[..., None, None]
        g *= scale[:, None, None]
        g[:, E] -= theta[:, None, None] * g[:, S]
        g[..., E, :] -= theta * g[..., S, :]
        lenders = [*np.repeat(_lenders(valid), 2, axis=0)] if self.borrows else []
        for v, row in enumerate(lenders, start=1):
            g[:, v] = g[:, v, row]
            g[:, :, :, v] = g[:, :, :, v, row]

        own = np.einsum("bvkwk->bkvw", g)  # each row's own products
        P = self._fit(own[..., S, S], own[..., S, E])
        known = (g[:, 1:, :, 0] * T).sum(-1).swapaxes(1, 2)  # [b, k, p]
        back = g[:, 1:, :, 1:].transpose(0, 4, 2, 1, 3) * TC.T[:, :, None, None]  # [b, j, k, p, q]
        A = (back.reshape(B, n, 2 * m * n, 2 * m) @ P).swapaxes(1, 2).reshape(B, 2 * m * n, 2 * m * n)
        y = torch.linalg.solve_triangular(
            torch.from_numpy(np.eye(2 * m * n) - A),
            torch.from_numpy(known.reshape(B, -1, 1)),
            upper=False,
            unitriangular=True,
        ).numpy()
        carried = (P @ y.reshape(B, n, 2 * m, 1))[..., 0].swapaxes(1, 2)
        delta = np.empty((B, n, 1 + 2 * m, n))  # [b, k, v, j]
        delta[:, :, 0] = T
        delta[:, :, 1:] = TC[:, None] * carried[:, None]
        change = theta[:, None, None] * delta
        diagonal = np.einsum("bkvk->bvk", change)
        diagonal[:, 1:] += carried
        for weights in (delta, change):  # from (r, S, E, ..) to (r, dx, dD, ..)
            for v, row in enumerate(lenders, start=1):  # to the rows that lent
                weights[:, :, v] = weights[:, :, v] @ np.eye(n)[row]
            weights[:, :, S] -= theta * weights[:, :, E]
            weights *= scale[:, None]
        return delta.reshape(B, n, -1), change.reshape(B, n, -1)

    def _fit(self, squares: Array, crossed: Array) -> Array:
        """``[B, n, 2m, 2m]`` (u, w, u, ..) -> (b, a, b, ..) of equation (3), the weights on (S, E, S, ..).

        From each row's S S^T and S E^T ``[B, n, m, m]``.
        """
        B, n, m, _ = squares.shape
        Ginv = np.linalg.inv(squares + self.ridge * np.eye(m))
        P = np.zeros((B, n, 2 * m, 2 * m))
        P[..., ::2, 1::2] = P[..., 1::2, ::2] = Ginv
        P[..., ::2, ::2] = Ginv @ ((crossed + crossed.swapaxes(2, 3)) / -2) @ Ginv
        return P

    def slide(self, state: Secants | None, frozen: int, kept: int, size: int) -> Secants | None:
        if state is None:
            return None
        cut = slice(frozen, frozen + kept)
        gram = None if state.gram is None else state.gram[:, :, cut, :, cut]
        return replace(state, gram=gram, skip=frozen, kept=kept)

    def leave(self, state: Secants | None, frozen: int, good: int) -> Memory | None:
        if state is None or good == frozen:
            return None
        rows = slice(frozen, good)
        # of the oldest change the next round has no use
        return Memory(state.x[rows], state.D[rows], state.vectors[:, 1:-2, rows].permute(1, 2, 0, 3))

    def take_up(self, memory: Memory) -> Secants | None:
        m, n = self.history, len(memory.x)
        if m == 0:
            return None
        vectors = memory.x.new_zeros(memory.x.shape[1], 1 + 2 * m, n, memory.x.shape[2])
        changes = memory.changes[: 2 * m - 2]
        vectors[:, 1 : 1 + len(changes)] = changes.permute(2, 0, 1, 3)
        valid = (vectors[:, 1::2] != 0).any(3).any(0).cpu().numpy()
        flat = vectors.flatten(1, 2)
        gram = (flat @ flat.transpose(1, 2)).cpu().double().numpy().reshape(-1, 1 + 2 * m, n, 1 + 2 * m, n)
        return Secants(memory.x, memory.D, vectors, valid, gram, 0, n)
