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
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows import Scales, Window
from .base import Measured, Step, shift, unit_lower_inverse


@dataclass(frozen=True)
class Secants:
    """What the solver remembers of a window's rows.

    Attributes:
        x, D: ``[n, B, d]`` each row's last evaluation.
        dx, dD: ``[m, n, B, d]`` the changes between its evaluations, newest first.
        seen: ``[n]`` bool on the CPU: x and D hold the row.
        valid: ``[m, n]`` bool on the CPU: dx and dD hold the change.
    """

    x: Tensor
    D: Tensor
    dx: Tensor
    dD: Tensor
    seen: Tensor
    valid: Tensor


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
    """

    history: int = 2
    slope: str = "gaussian"
    ridge: float = 0.01
    trust: float = math.inf
    moves_x: bool = False
    copies_warm: bool = False

    def theta(self, scales: Scales) -> Tensor:
        """theta of each row, float64."""
        return {"gaussian": scales.gaussian, "eps": scales.eps, "held": torch.zeros_like(scales.sigma)}[self.slope]

    def start(self) -> Secants | None:
        return None

    def measure(self, window: Window, x: Tensor, D: Tensor, r: Tensor, state: Secants | None) -> Measured:
        m, n = self.history, len(window)
        if m == 0:
            basis = r.transpose(0, 1)
            return Measured(None, basis, basis @ basis.transpose(1, 2))
        if state is None:
            dx = dD = x.new_zeros(m, *x.shape)
            valid = torch.zeros(m, n, dtype=torch.bool)
        else:
            dx = torch.cat([(x - state.x)[None], state.dx[:-1]])
            dD = torch.cat([(D - state.D)[None], state.dD[:-1]])
            valid = torch.cat([state.seen[None], state.valid[:-1]])
        basis = torch.cat([r[None], dx, dD]).permute(2, 0, 1, 3).flatten(1, 2)
        state = Secants(x, D, dx, dD, torch.ones(n, dtype=torch.bool), valid)
        return Measured(state, basis, basis @ basis.transpose(1, 2))

    def step(self, window: Window, numbers: Tensor, state: Secants | None) -> Step:
        theta, images = self.theta(window.scales), numbers.shape[0]
        T = unit_lower_inverse(window.C * theta)
        if state is None:
            delta = T.expand(images, -1, -1)
            change = theta[:, None] * delta
        else:
            delta, change = self._sweep(window.C, theta, T, numbers, state.valid)
        squares = ((delta @ numbers) * delta).sum(-1).clamp(min=0)
        rms = (squares.amax(0) / window.size).sqrt() / window.scales.data_rms
        rms[0] = 0.0
        allowed = window.scales.allowed
        return Step(rms / torch.where(allowed > 0, allowed, 1.0), rms / window.scales.norm, change)

    def _sweep(self, C: Tensor, theta: Tensor, T: Tensor, gram: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of delta and of J delta over the basis (r, dx, dD), ``[B, n, (1 + 2m) n]`` each.

        Letters: b image; k, j rows; v, w kinds of vector (r, then S, then E); p, q, s kinds within a row's 2m.
        """
        B, n, m = gram.shape[0], len(C), self.history
        S, E = slice(1, 1 + m), slice(1 + m, 1 + 2 * m)
        g = gram.reshape(B, 1 + 2 * m, n, 1 + 2 * m, n).clone()
        squares = g.diagonal(dim1=1, dim2=3).diagonal(dim1=1, dim2=2)[:, S]  # |dx|^2 [B, m, n]
        inverse = torch.where(valid & (squares > 0), squares.clamp(min=1e-300).rsqrt(), 0.0)
        scale = torch.cat([torch.ones(B, 1, n, dtype=torch.float64), inverse, inverse], 1)
        g *= scale[..., None, None] * scale[:, None, None]
        g[:, E] -= theta[:, None, None] * g[:, S]
        g[..., E, :] -= theta * g[..., S, :]

        own = g.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)  # each row's own products [B, n, 1+2m, 1+2m]
        Ginv = torch.linalg.inv(own[..., S, S] + self.ridge * torch.eye(m, dtype=torch.float64))
        cross = own[..., S, E]
        P = torch.zeros(B, n, 2 * m, 2 * m, dtype=torch.float64)  # (u, w) -> (a, b)
        P[..., :m, :m] = P[..., m:, m:] = Ginv
        P[..., m:, :m] = -Ginv @ ((cross + cross.transpose(2, 3)) / 2) @ Ginv

        TC = T @ C
        known = torch.einsum("kj,bpkj->bkp", T, g[:, 1:, :, 0])
        back = torch.cat([g[:, 1:, :, E], g[:, 1:, :, S]], 3)  # products with (E_j, S_j), which carry (a, b) back
        A = torch.einsum("bpkqj,bjqs->bkpjs", back * TC[:, None], P).reshape(B, 2 * m * n, 2 * m * n)
        eye = torch.eye(2 * m * n, dtype=torch.float64)
        y = torch.linalg.solve_triangular(eye - A, known.reshape(B, -1, 1), upper=False, unitriangular=True)
        ab = torch.einsum("bjqs,bjs->bqj", P, y.reshape(B, n, 2 * m))
        carried = torch.cat([ab[:, m:], ab[:, :m]], 1)  # weights on (S, E)

        delta = torch.cat([T.expand(B, n, n)[:, :, None], TC[:, None] * carried[:, None]], 2)  # [B, k, v, j]
        change = theta[:, None, None] * delta
        change[:, :, 1:] += torch.eye(n, dtype=torch.float64)[:, None] * carried[:, None]
        for weights in (delta, change):  # from (r, S, E) to (r, dx, dD)
            weights[:, :, S] -= theta * weights[:, :, E]
            weights *= scale[:, None]
        return delta.flatten(2), change.flatten(2)

    def slide(self, state: Secants | None, frozen: int, kept: int, size: int) -> Secants | None:
        if state is None:
            return None
        old = (state.x, state.D, state.dx, state.dD, state.seen, state.valid)
        return Secants(*(shift(t, d, frozen, kept, size) for t, d in zip(old, (0, 0, 1, 1, 0, 1), strict=True)))
