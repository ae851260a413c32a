"""Other ways to spend fewer evaluations than the sampler has steps: fewer steps, and steps with D made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoisers import Denoise
from ..system import System

#: Evaluations that a threshold never skips: a rate of change needs two of them.
WARM_UP = 2


@dataclass(frozen=True)
class Outcome:
    """A picture ``[B, ...]`` and the evaluations it took."""

    x: Tensor
    nfe: int


def evenly(total: int, count: int) -> list[int]:
    """``count`` of the rows ``0..total-1`` (all, if there are fewer), equally spaced, both ends among them."""
    count = min(count, total)
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def coupled(noise: Tensor, sigmas: Tensor, rows: Sequence[int]) -> Tensor:
    """The noise of coarse ancestral steps that take the fine ones' increments together.

    In VE-scaled states a fine step with D held is ``x' = D + r^2 (x - D) + sigma' sqrt(1 - r^2) xi``, r = sigma' /
    sigma. A run of such steps adds up to the coarse step of the same form with ``xi`` the sum of the fine ones, each
    weighted by what is left of its standard deviation at the end, over the coarse step's.

    Args:
        noise: ``[K, ...]`` unit normals of the fine steps. sigmas: ``[K+1]`` fine levels.
        rows: falling in sigma, of the coarse levels; the first 0 and the last K.

    Returns:
        ``[len(rows) - 1, ...]`` unit normals; zeros where the coarse step adds none.
    """
    levels = sigmas.double()
    own = levels[1:] * (1 - (levels[1:] / levels[:-1]) ** 2).clamp(min=0).sqrt()
    out = noise.new_zeros(len(rows) - 1, *noise.shape[1:])
    for q, (a, b) in enumerate(itertools.pairwise(rows)):
        if levels[b] > 0:
            weights = own[a:b] * (levels[b] / levels[a + 1 : b + 1]) ** 2
            weights = weights / weights.square().sum().sqrt()
            out[q] = torch.tensordot(weights.to(noise), noise[a:b], 1)
    return out


def held(D: Sequence[Tensor], lam: Sequence[float], at: float) -> Tensor:
    """The last D."""
    return D[-1]


def linear(D: Sequence[Tensor], lam: Sequence[float], at: float) -> Tensor:
    """The line in lambda through the last two."""
    return _polynomial(D[-2:], lam[-2:], at)


def quadratic(D: Sequence[Tensor], lam: Sequence[float], at: float) -> Tensor:
    """The parabola in lambda through the last three."""
    return _polynomial(D[-3:], lam[-3:], at)


def _polynomial(D: Sequence[Tensor], lam: Sequence[float], at: float) -> Tensor:
    """Lagrange's, through as many points as there are."""
    out = torch.zeros_like(D[-1])
    for i, value in enumerate(D):
        weight = 1.0
        for j in range(len(D)):
            if j != i:
                weight *= (at - lam[j]) / (lam[i] - lam[j])
        out = out + weight * value
    return out


Guess = Callable[[Sequence[Tensor], Sequence[float], float], Tensor]


def skipping(
    system: System,
    denoise: Denoise,
    guess: Guess,
    rows: Sequence[int] | None = None,
    threshold: float | None = None,
    flow: bool = False,
) -> Outcome:
    """Step ``system`` through all its rows, evaluating D on some and making it up by ``guess`` on the others.

    Either ``rows`` says which; or, as step caches do (EasyCache, arXiv 2507.02860), a row is skipped while the relative
    change of D since the last evaluation, guessed from the change of the (VP-scaled) state at the rate seen between the
    last two evaluations and summed up, stays below ``threshold``. The first two rows and the last are evaluated always.
    """
    K, sigmas = system.evaluations, system.sigmas
    alpha = (1 - sigmas).clamp(min=1e-3) if flow else torch.ones_like(sigmas)
    lam = (alpha / sigmas).log().tolist()
    norm = torch.ones_like(sigmas) if flow else (1 + sigmas**2).sqrt()
    C, level = system.C.to(system.S), sigmas.to(system.S)
    x, D = system.S.clone(), system.S.new_zeros(K, *system.S.shape[1:])
    seen: list[int] = []
    rate, moved = 0.0, 0.0
    for k in range(K):
        if rows is not None:
            wanted = k in rows
        else:
            if k > 0:
                moved += rate * float((x[k] / norm[k] - x[k - 1] / norm[k - 1]).norm())
            wanted = len(seen) < WARM_UP or k == K - 1 or moved >= (threshold or 0.0)
        if wanted:
            D[k] = denoise(x[k : k + 1].clone(), level[k : k + 1])[0]
            if seen:
                way = float((x[k] / norm[k] - x[seen[-1]] / norm[seen[-1]]).norm())
                rate = float((D[k] - D[seen[-1]]).norm()) / max(way * float(D[k].norm()), 1e-12)
            seen.append(k)
            moved = 0.0
        else:
            D[k] = guess([D[i] for i in seen[-3:]], [lam[i] for i in seen[-3:]], lam[k])
        column = C[k + 1 :, k].reshape(-1, *[1] * (x.ndim - 1))
        x[k + 1 :] += column * D[k]
    return Outcome(x[K], len(seen))
