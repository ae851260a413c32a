"""UniPC-2 (Zhao et al., arXiv 2302.04867; B(h) = e^h - 1, data prediction, multistep) as a triangular system.

Its corrector takes up the evaluation at the predicted state, so an evaluation a step is all it needs, and every state
is affine in the evaluations. A rival for the bench; a test holds it against diffusers' own scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import double, send
from ..system import System


def unipc(x0: Tensor, sigmas: Tensor, *, flow: bool = False) -> System:
    """UniPC of order 2 on ``sigmas [K+1]`` from ``x0 [B, ...]``; first order on its first step and on one to 0.

    The corrector is left out where lambda is infinite: after a flow's first step, and at the end.
    """
    levels = sigmas.double()
    alphas = 1 - levels if flow else torch.ones_like(levels)
    steps = _Steps(levels, alphas, (alphas / levels).log())
    K = len(levels) - 1
    evaluated = torch.zeros(K + 1, K + 1, dtype=torch.float64)
    evaluated[0, 0] = 1.0
    state = evaluated[0]
    for k in range(K):
        evaluated[k + 1] = steps.predicted(state, k)
        if k + 1 < K:  # the last state is not evaluated
            state = steps.corrected(state, evaluated[k + 1], k)
    start = double(x0)
    S = send(torch.stack([float(c) * start for c in evaluated[:, 0]]), x0)
    return System(S, evaluated[:, 1:], levels[:-1], sampler="unipc")


@dataclass(frozen=True)
class _Steps:
    """The steps' formulas. A state is a row of numbers: the coefficient of x0, then those of D_0 .. D_{K-1}."""

    levels: Tensor
    alphas: Tensor
    lam: Tensor

    def _change(self, a: int, b: int) -> Tensor:
        """``D_a - D_b``."""
        row = torch.zeros(len(self.levels), dtype=torch.float64)
        row[1 + a], row[1 + b] = 1.0, -1.0
        return row

    def _ratio(self, k: int) -> float | None:
        """(lambda_{k-1} - lambda_k) / h of the step from k; None where there is no finite one."""
        h = self.lam[k + 1] - self.lam[k]
        if k == 0 or not h.isfinite() or not self.lam[k - 1].isfinite():
            return None
        return float((self.lam[k - 1] - self.lam[k]) / h)

    def _plain(self, state: Tensor, k: int) -> tuple[Tensor, float]:
        """The first-order step from k, and ``alpha' B(h)``."""
        scale = float(self.alphas[k + 1] * torch.expm1(self.lam[k] - self.lam[k + 1]))
        out = self.levels[k + 1] / self.levels[k] * state
        out[1 + k] -= scale
        return out, scale

    def predicted(self, state: Tensor, k: int) -> Tensor:
        """State k + 1 from the corrected ``state`` k: UniP-2, equation 3 with rho 1/2."""
        out, scale = self._plain(state, k)
        r = self._ratio(k)
        return out if r is None else out - scale * 0.5 / r * self._change(k - 1, k)

    def corrected(self, state: Tensor, predicted: Tensor, k: int) -> Tensor:
        """State k + 1 once D_{k+1} is known at the predicted one: UniC-2, or UniC-1 on the first step."""
        h = float(self.lam[k + 1] - self.lam[k])
        if not abs(h) < float("inf"):
            return predicted
        out, scale = self._plain(state, k)
        newest, r = self._change(k + 1, k), self._ratio(k)
        if r is None:
            return out - scale * 0.5 * newest
        # the order conditions: sum_m rho_m r_m^(n-1) = n! phi_{n+1}(h) h / B(h), with r_2 = 1
        first = torch.expm1(torch.tensor(-h, dtype=torch.float64))
        second = first / -h - 1
        third = second / -h - 0.5
        matrix = torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64)
        rho = torch.linalg.solve(matrix, torch.stack([second, 2 * third]) / first)
        return out - scale * (rho[0] / r * self._change(k - 1, k) + rho[1] * newest)
