"""CFG++ samplers as ordinary systems: the unconditional pictures folded into the denoised ones.

Such a sampler steps with D_i and with u_i, the unconditional picture. With M = C^-1 U on the rows 1..K, which is lower
triangular and in practice a narrow band,

    x_k = S_k + sum_i C[k,i] D_i + U[k,i] u_i = S_k + sum_i (C[k,i] a_i) E_i
    E_i = (D_i + sum_{j<=i} M[i,j] u_j) / a_i,   a_i = 1 + M[i,i]

so the engine sees one output a row. E_i is D_i guided more strongly (D + w (D - u) with w = -M[i,i] / a_i), and the
division by a_i keeps its slope that of a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batched import BatchedModel
from .capture import CaptureError

#: Weights below this share of the largest are rounding of the fold, not part of the sampler.
_NEGLIGIBLE = 1e-9
#: Below this a row's E would be dominated by rounding; it is left unscaled.
_SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class Fold:
    """``E_i = own[i] D_i + sum_{j<=i} others[i,j] u_j`` with weights ``C`` ``[K+1, K]`` in the system."""

    C: Tensor
    own: Tensor
    others: Tensor

    def needed(self, row: int) -> list[int]:
        """The rows whose unconditional pictures E of ``row`` is made of."""
        return self.others[row].nonzero()[:, 0].tolist()


def fold_uncond(C: Tensor, U: Tensor) -> Fold:
    """Fold ``U`` into ``C``, both ``[K+1, K]`` strictly lower triangular.

    Raises:
        CaptureError: some evaluation's D has no part in the state right after it.
    """
    if (C[1:].diagonal().abs() < 1e-12).any():
        raise CaptureError(
            "it steps with the unconditional picture in a way that cannot be folded into the denoised one"
        )
    M = torch.linalg.solve_triangular(C[1:], U[1:], upper=False)
    M = torch.where(M.abs() > _NEGLIGIBLE * M.abs().max(), M, 0.0)
    scale = 1 + M.diagonal()
    scale = torch.where(scale.abs() > _SMALLEST_SCALE, scale, 1.0)
    return Fold(C * scale, 1 / scale, M / scale[:, None])


def distinct(sigmas: Tensor) -> Tensor:
    """``sigmas`` with repeated levels moved by float32's least step, so that a level names its row.

    Earlier ones go down: above 1 no flow has a level, and repeated ones must not fall, as if they were a schedule that
    collocation serves. At 0, where nothing is below, later ones go up.
    """
    moved = sigmas.float()
    at_zero = moved <= torch.finfo(moved.dtype).tiny
    rows = range(len(moved))
    up, down = (moved.new_tensor(end) for end in (torch.inf, 0.0))
    order = [(row, up) for row in rows if at_zero[row]] + [(row, down) for row in reversed(rows) if not at_zero[row]]
    seen: set[float] = set()
    for row, end in order:
        level = moved[row]
        while float(level) in seen:
            level = torch.nextafter(level, end)
        moved[row] = level
        seen.add(float(level))
    return moved.double()


def by_level(levels: Tensor) -> Callable[[Tensor], list[int]]:
    """The rows of noise levels that are among ``levels`` ``[K]``, no two of which are equal."""
    rows = {float(level): row for row, level in enumerate(levels.float())}
    return lambda sigma: [rows[float(level)] for level in sigma.float()]


class NumberedModel:
    """``denoise`` that is called with the :func:`distinct` form ``levels`` of its ``sigmas``."""

    def __init__(self, model: BatchedModel, sigmas: Tensor, levels: Tensor) -> None:
        self._model, self._sigmas, self._rows_of = model, sigmas, by_level(levels)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``D [W, B, ...]`` of ``x`` ``[W, B, ...]``."""
        return self._model(x, self._sigmas[self._rows_of(sigma)])


class FoldedModel:
    """``denoise`` of the folded system: E of each row from the model's D and the latest u of the rows it needs."""

    def __init__(self, model: BatchedModel, fold: Fold, sigmas: Tensor, levels: Tensor) -> None:
        """``levels`` are the :func:`distinct` form of ``sigmas``, which the model is shown."""
        self._model, self._fold, self._sigmas, self._rows_of = model, fold, sigmas, by_level(levels)
        self._uncond: dict[int, Tensor] = {}
        band = (fold.others != 0).nonzero()
        self._reach = int((band[:, 0] - band[:, 1]).max()) if len(band) else 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``E [W, B, ...]`` of ``x`` ``[W, B, ...]``."""
        rows = self._rows_of(sigma)
        D, u = self._model.with_uncond(x, self._sigmas[rows])
        for place, row in enumerate(rows):
            self._uncond[row] = u[place].clone()
        out = torch.stack([self._fold.own[row].item() * D[place] for place, row in enumerate(rows)])
        for place, row in enumerate(rows):
            for j in self._fold.needed(row):
                # a row that was never evaluated is stood in for by the one that asks
                out[place] += self._fold.others[row, j].item() * self._uncond.get(j, u[place])
        for row in [r for r in self._uncond if r < min(rows) - self._reach]:
            del self._uncond[row]
        return out
