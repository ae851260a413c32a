"""ParaTAA: the order-k fixed point with triangular Anderson acceleration (Tang et al., arXiv 2402.09970).

In this System's notation, with r = S + C D - x and eps held (D_i - x_i / alpha_i fixed), one sequential sweep gives the
full-order fixed point; its residual is rhat = E r with E = (I - C Theta_eps)^-1. The paper's order-o equation starts
from the current state o rows back instead of from the window's first, exact row, so its residual is

    R_k = rhat_k - (alpha_k / alpha_j) rhat_j,     j = max(k - o, first row)                                     (1)

and o = 1 gives the residual of the plain step, which decides convergence. Triangular Anderson acceleration fits each
row with the rows before it alone, so that the update stays triangular:

    gamma_k = (sum_{j<=k} F_j^T F_j + ridge I)^-1 sum_{j<=k} F_j^T R_j,   x_k <- x_k + R_k - (X_k + F_k) gamma_k  (2)

with X, F the last m - 1 changes of x and R. The paper's suffix sums (it counts time downwards) are prefix sums here.
Rows up to and including the first unconverged one take the plain step (its safeguard). The fit is in VP-scaled states,
as the paper's: rows weigh 1 / n_k^2. For samplers with memory (2M) equation (1) is used as it stands: it has the same
solution, and differs from the paper only in what it carries over from row j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import send
from ..rows import Scales, Window
from .base import Array, Measured, Memory, Residual, Step, shift, unit_lower_inverse


@dataclass(frozen=True)
class Iterates:
    """What ParaTAA remembers of a window's rows.

    Attributes:
        x, R: ``[n, B, d]`` each row's last state and residual.
        X, F: ``[m-1, n, B, d]`` their changes, newest first.
        seen: ``[n]`` bool on the CPU: x and R hold the row.
        valid: ``[m-1, n]`` bool on the CPU: X and F hold the change.
    """

    x: Tensor
    R: Tensor
    X: Tensor
    F: Tensor
    seen: Tensor
    valid: Tensor


@dataclass(frozen=True)
class ParaTAA:
    """Equations (1) and (2).

    Attributes:
        tau: tolerance, by which the safeguard knows the first unconverged row.
        history: m, iterates that the acceleration sees, 2 to 5 recommended; 1 is the plain fixed point.
        order: o of equation (1); min(20, window) when None.
        ridge: added to the Gram matrices of residual changes.
    """

    tau: float
    history: int = 3
    order: int | None = None
    ridge: float = 1e-3
    trust: float = math.inf
    moves_x: bool = True
    copies_warm: bool = True
    knows_changes: bool = False

    def matrices(self, C: Tensor, scales: Scales) -> Tensor:
        """E of equation (1), ``[K, K]``; a block of a triangular matrix's inverse is the inverse of its block."""
        return unit_lower_inverse(C * scales.eps)

    def start(self) -> Iterates | None:
        return None

    def _equations(self, window: Window) -> Tensor:
        """``[2n, n]``: of r, the residuals of order o and below them those of order 1."""
        n, alpha = len(window), window.scales.alpha
        full = window.matrices[window.first : window.stop, window.first : window.stop]
        both = []
        for order in (min(self.order or 20, n), 1):
            back = (torch.arange(n) - order).clamp(min=0)
            # the first row is exact: its residual is 0, whatever alpha is there
            carry = torch.where(alpha[back] > 0, alpha / alpha[back].clamp(min=1e-300), 0.0)
            both.append(full - carry[:, None] * full[back])
        return torch.cat(both)

    def measure(self, window: Window, x: Tensor, D: Tensor, residual: Residual, state: Iterates | None) -> Measured:
        n, m = len(window), self.history - 1
        r = torch.empty_like(x)
        residual(r.transpose(0, 1))
        equations = send(self._equations(window), r)
        R, plain = (equations @ r.flatten(1)).view(2, *r.shape)
        if state is None:
            X = F = x.new_zeros(m, *x.shape)
            valid = torch.zeros(m, n, dtype=torch.bool)
        else:
            X = torch.cat([(x - state.x)[None], state.X])[:m]
            F = torch.cat([(R - state.R)[None], state.F])[:m]
            valid = torch.cat([state.seen[None], state.valid])[:m]
        state = Iterates(x, R, X, F, torch.ones(n, dtype=torch.bool), valid)
        rows = torch.cat([R[None], F, plain[None]]).permute(1, 2, 0, 3)  # [n, B, 1+m+1, d]
        basis = torch.cat([R[None], X, F]).permute(2, 0, 1, 3).flatten(1, 2)
        return Measured(state, basis, rows @ rows.transpose(2, 3))

    def step(self, window: Window, numbers: Array, state: Iterates) -> Step:
        n, m, scales = len(window), self.history - 1, window.scales
        B, gram = numbers.shape[1], torch.from_numpy(numbers)
        plain = (gram[..., -1, -1].clamp(min=0).amax(1) / window.size).sqrt() / scales.data_rms
        spread = torch.where(scales.spread > 0, scales.spread, scales.norm)
        residual = plain / spread
        residual[0] = 0.0
        growth = (gram[..., 0, 0].clamp(min=0).amax(1) / window.size).sqrt() / scales.data_rms / scales.norm

        weights = torch.zeros(B, n, 1 + 2 * m, n, dtype=torch.float64)
        own = torch.arange(n)
        weights[:, own, 0, own] = 1.0
        unconverged = (residual > self.tau).nonzero()
        first = int(unconverged[0]) if len(unconverged) else n
        if m:
            mask = state.valid.T.double()  # [n, m]
            mask[0] = 0.0  # the first row is exact: it is no equation of the fit
            vp = (gram / scales.norm[:, None, None, None] ** 2)[..., :-1, :-1]
            gram = (vp[..., 1:, 1:] * mask[:, None, :, None] * mask[:, None, None, :]).cumsum(0)
            right = (vp[..., 1:, 0] * mask[:, None]).cumsum(0)
            # a row uses the columns that it has itself
            gram = gram * mask[:, None, :, None] * mask[:, None, None, :]
            ridge = self.ridge * scales.unit**2 * torch.eye(m, dtype=torch.float64)
            gamma = torch.linalg.solve(gram + ridge, right * mask[:, None])  # [n, B, m]
            gamma[: first + 1] = 0.0
            weights[:, own, 1 : 1 + m, own] = -gamma
            weights[:, own, 1 + m :, own] = -gamma
        return Step(residual.numpy(), growth.numpy(), weights.flatten(2).numpy(), state)

    def slide(self, state: Iterates | None, frozen: int, kept: int, size: int) -> Iterates | None:
        if state is None:
            return None
        old = (state.x, state.R, state.X, state.F, state.seen, state.valid)
        return Iterates(*(shift(t, d, frozen, kept, size) for t, d in zip(old, (0, 0, 1, 1, 0, 1), strict=True)))

    def leave(self, state: Iterates | None, frozen: int, good: int) -> Memory | None:
        if state is None or good == frozen:
            return None
        rows = slice(frozen, good)
        # of the oldest change the next round has no use
        changes = torch.stack([state.X[:-1, rows], state.F[:-1, rows]], 1)
        valid = state.valid[:-1, None, rows, None, None].to(changes.device)
        return Memory(state.x[rows], state.R[rows], torch.where(valid, changes, 0.0).flatten(0, 1))

    def take_up(self, memory: Memory) -> Iterates | None:
        m, n = self.history - 1, len(memory.x)
        changes = memory.x.new_zeros(m, 2, *memory.x.shape)
        known = memory.changes[: 2 * m]
        changes.flatten(0, 1)[: len(known)] = known
        X, F = changes.unbind(1)
        valid = (X != 0).flatten(2).any(2).cpu()
        return Iterates(memory.x, memory.D, X, F, torch.ones(n, dtype=torch.bool), valid)
