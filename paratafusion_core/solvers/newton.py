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
from .base import Measured, Step, shift, unit_lower_inverse

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Secants:
    """What the solver remembers of a window's rows.

    Attributes:
        x, D: ``[n', B, d]`` each row's last evaluation; the first ``skip`` rows have left the window since.
        dx, dD: ``[m, n', B, d]`` the changes between its evaluations, newest first.
        seen: ``[n]`` bool on the CPU: x and D hold the row.
        valid: ``[m, n]`` bool on the CPU: dx and dD hold the change.
        gram: ``[B, 1 + 2m, k, 1 + 2m, k]`` products of the last round's (r, dx, dD) of the k rows that stayed, once
            they were measured.
    """

    x: Tensor
    D: Tensor
    dx: Tensor
    dD: Tensor
    seen: Tensor
    valid: Tensor
    gram: Array | None = None
    skip: int = 0


def _lenders(valid: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
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

    def start(self) -> Secants | None:
        return None

    def measure(self, window: Window, x: Tensor, D: Tensor, r: Tensor, state: Secants | None) -> Measured:
        m, n, kinds = self.history, len(window), 1 + 2 * self.history
        if m == 0:
            basis = r.transpose(0, 1)
            return Measured(None, basis, basis @ basis.transpose(1, 2))
        vectors = x.new_empty(x.shape[1], kinds, n, x.shape[2])
        vectors[:, 0] = r.transpose(0, 1)
        dx, dD = (vectors[:, at : at + m].permute(1, 2, 0, 3) for at in (1, 1 + m))  # [m, n, B, d]
        valid = torch.zeros(m, n, dtype=torch.bool)
        if state is None:
            vectors[:, 1:] = 0
        else:
            known = min(len(state.x) - state.skip, n)  # leading rows that were in the last window
            was = slice(state.skip, state.skip + known)
            for changes, now, before, older in ((dx, x, state.x, state.dx), (dD, D, state.D, state.dD)):
                torch.sub(now[:known], before[was], out=changes[0, :known])
                if m > 1:
                    changes[1:, :known] = older[:-1, was]
                if known < n:
                    changes[:, known:] = 0
            valid[0], valid[1:] = state.seen, state.valid[:-1]
        basis = vectors.flatten(1, 2)
        # the older changes' products among themselves are the last round's
        gram = None if state is None else state.gram
        every = basis.transpose(1, 2)
        if gram is None or m == 1:
            numbers = basis @ every
        else:
            new = slice((1 + m) * n, (2 + m) * n)
            upper = basis[:, : 2 * n] @ every  # the new r and dx with all; the new dD's with these are among them
            lower = basis[:, new] @ every[..., 2 * n :]
            numbers = torch.cat([upper, torch.cat([upper[..., new].transpose(1, 2), lower], 2)], 1)
        seen = torch.ones(n, dtype=torch.bool)
        return Measured(Secants(x, D, dx, dD, seen, valid, gram), basis, numbers)

    def step(self, window: Window, numbers: Tensor, state: Secants | None) -> Step:
        theta, images = self.theta(window.scales), numbers.shape[0]
        T = unit_lower_inverse(window.C * theta)
        if state is None:
            gram = numbers.numpy()
            delta, products = np.broadcast_to(T.numpy(), gram.shape), None
            change = theta.numpy()[:, None] * delta
        else:
            whole = self._gram(numbers.numpy(), state.gram, len(window))
            state = replace(state, gram=whole)
            gram = whole.reshape(images, numbers.shape[2], numbers.shape[2])
            C, valid = window.C.numpy(), state.valid.numpy()
            delta, change = self._sweep(C, theta.numpy(), T.numpy(), whole, valid)
            mine = np.einsum("bvkwk->vwkb", whole)[1, [1, 1 + self.history]] * valid[0][:, None]
            products = torch.from_numpy(mine)
        squares = np.maximum(((delta @ gram) * delta).sum(-1), 0)
        rms = np.sqrt(squares.max(0) / window.size) / window.scales.data_rms
        rms[0] = 0.0
        allowed = window.scales.allowed.numpy()
        residual = torch.from_numpy(rms / np.where(allowed > 0, allowed, 1.0))
        growth = torch.from_numpy(rms / window.scales.norm.numpy())
        return Step(residual, growth, torch.from_numpy(change), state, products)

    def _gram(self, numbers: Array, last: Array | None, n: int) -> Array:
        """``[B, 1 + 2m, n, 1 + 2m, n]`` from the products of all vectors, or of the new ones (r, dx, dD) with all."""
        m, kinds = self.history, 1 + 2 * self.history
        B, rows, _ = numbers.shape
        numbers = numbers.reshape(B, -1, n, kinds, n)
        if last is None or rows == kinds * n:
            return numbers
        new, old = [0, 1, 1 + m], [*range(2, 1 + m), *range(2 + m, kinds)]
        known = min(last.shape[2], n)
        was = [i - 1 for i in old]
        gram = np.zeros((B, kinds, n, kinds, n))
        for i, kind in zip(old, was, strict=True):
            gram[:, i, :known, old, :known] = last[:, kind, :known][:, :, was, :known].transpose(2, 0, 1, 3)
        gram[:, new] = numbers
        gram[:, :, :, new] = numbers.transpose(0, 3, 4, 1, 2)
        return gram

    def _sweep(self, C: Array, theta: Array, T: Array, gram: Array, valid: Array) -> tuple[Array, Array]:
        """Weights of delta and of J delta over the basis (r, dx, dD), ``[B, n, (1 + 2m) n]`` each.

        Letters: b image; k, j rows; v, w kinds of vector (r, then S, then E); p, q, s kinds within a row's 2m.
        """
        B, n, m = gram.shape[0], len(C), self.history
        S, E = slice(1, 1 + m), slice(1 + m, 1 + 2 * m)
        own = np.einsum("bvkwk->bkvw", gram)  # each row's own products
        squares = np.einsum("bkvv->bvk", own)[:, S]  # |dx|^2 [B, m, n]
        used = valid & (squares > 0)
        inverse = np.where(used, 1 / np.sqrt(np.where(used, squares, 1.0)), 0.0)
        scale = np.concatenate([np.ones((B, 1, n)), inverse, inverse], 1)
        g = gram * scale[..., None, None]
        g *= scale[:, None, None]
        g[:, E] -= theta[:, None, None] * g[:, S]
        g[..., E, :] -= theta * g[..., S, :]
        lenders = [*_lenders(valid), *_lenders(valid)] if self.borrows else []
        for v, row in enumerate(lenders, start=1):
            g[:, v] = g[:, v, row]
            g[:, :, :, v] = g[:, :, :, v, row]

        own = np.einsum("bvkwk->bkvw", g)
        P = self._fit(own[..., S, S], own[..., S, E])
        TC = T @ C
        known = (g[:, 1:, :, 0] * T).sum(-1).swapaxes(1, 2)  # [b, k, p]
        # products with (E_j, S_j), which carry (a, b) back: [b, j, k, p, q]
        back = np.concatenate([g[:, 1:, :, E], g[:, 1:, :, S]], 3).transpose(0, 4, 2, 1, 3) * TC.T[:, :, None, None]
        A = (back.reshape(B, n, 2 * m * n, 2 * m) @ P).swapaxes(1, 2).reshape(B, 2 * m * n, 2 * m * n)
        y = torch.linalg.solve_triangular(
            torch.from_numpy(np.eye(2 * m * n) - A),
            torch.from_numpy(known.reshape(B, -1, 1)),
            upper=False,
            unitriangular=True,
        ).numpy()
        ab = (P @ y.reshape(B, n, 2 * m, 1))[..., 0].swapaxes(1, 2)
        carried = np.concatenate([ab[:, m:], ab[:, :m]], 1)  # weights on (S, E)

        delta = np.empty((B, n, 1 + 2 * m, n))  # [b, k, v, j]
        delta[:, :, 0] = T
        delta[:, :, 1:] = TC[:, None] * carried[:, None]
        change = theta[:, None, None] * delta
        diagonal = np.einsum("bkvk->bvk", change)
        diagonal[:, 1:] += carried
        for weights in (delta, change):  # from (r, S, E) to (r, dx, dD)
            for v, row in enumerate(lenders, start=1):  # to the rows that lent
                weights[:, :, v] = weights[:, :, v] @ np.eye(n)[row]
            weights[:, :, S] -= theta * weights[:, :, E]
            weights *= scale[:, None]
        return delta.reshape(B, n, -1), change.reshape(B, n, -1)

    def _fit(self, squares: Array, crossed: Array) -> Array:
        """``[B, n, 2m, 2m]`` (u, w) -> (a, b) of equation (3), from each row's S S^T and S E^T ``[B, n, m, m]``."""
        B, n, m, _ = squares.shape
        Ginv = np.linalg.inv(squares + self.ridge * np.eye(m))
        P = np.zeros((B, n, 2 * m, 2 * m))
        P[..., :m, :m] = P[..., m:, m:] = Ginv
        P[..., m:, :m] = -Ginv @ ((crossed + crossed.swapaxes(2, 3)) / 2) @ Ginv
        return P

    def slide(self, state: Secants | None, frozen: int, kept: int, size: int) -> Secants | None:
        if state is None:
            return None
        cut = slice(frozen, frozen + kept)
        gram = None if state.gram is None else state.gram[:, :, cut, :, cut]
        seen, valid = shift(state.seen, 0, frozen, kept, size), shift(state.valid, 1, frozen, kept, size)
        return replace(state, seen=seen, valid=valid, gram=gram, skip=frozen)
