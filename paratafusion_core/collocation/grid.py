"""Where D is evaluated, and how it is interpolated in between: plain float64 numbers on the CPU."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

#: In units of the data's rms: noise above FAR and below NEAR changes D little, so that levels out there count as near
#: each other. On the demo network (16 seeds, four schedules) u = -log(sigma + NEAR) alone places rows better than
#: lambda or than the step's number, or a mean of both: worst pictures 36 to 44 dB instead of 29 to 39.
NEAR = 0.35
FAR = 80.0
#: Levels nearer to each other (a flow's beside 1, noise a thousand times the data) are taken to be so far apart.
_APART = 1e-6
#: How rows are spread, up to ``_FEW`` of them, up to ``_SOME``, and more: NEAR, the first gap, and by how much the gaps
#: rise to 1.
_SPREADS = ((NEAR, 0.75, 0.2), (0.5, 0.5, 0.15), (NEAR, 0.2, 0.07))
_FEW, _SOME = 11, 20
#: The same for runs that go on until a target is met (``place_surely``).
_SURE = (3.0, 0.5, 0.15)
#: The same for samplers that add noise in every step (``place_in_noise``).
_NOISY = (0.7, 0.5, 0.03)


def coordinate(sigma: Tensor, alpha: Tensor, data_rms: float) -> Tensor:
    """u ``[K]``, in which D is interpolated and rows are spread; it rises as the noise falls, by ``_APART`` or more."""
    level = (sigma / alpha.clamp(min=1e-6) / data_rms).clamp(max=1e6)
    level = level / (1 + (level / FAR) ** 4) ** 0.25
    u = -(level + NEAR).log()
    if bool((u.diff() < _APART).any()):
        least = _APART * torch.arange(len(u), dtype=u.dtype)
        u = (u - least).cummax(0).values + least
    return u


def noise_at(u: Tensor) -> Tensor:
    """The noise in units of the data's rms, up to ``FAR``, from the coordinate."""
    return (-u).exp() - NEAR


def place(u: Tensor, count: int, early: bool = False) -> list[int]:
    """``count`` rows (clamped to 2..K), the first and the last among them, spread over u, more densely at the start.

    D is held over the first gap, and pictures are decided early, so the first gaps are smaller than the others, and
    for 12 to 20 rows the spacing favours noise over detail (``_SPREADS``). Of 48 seeds that were not used for that
    choice (demo network, 12, 14, 12 and 16 rows) fewer pictures end below 34 dB than with the spacing for few rows:
    DDIM-50 2 instead of 4, DDIM-100 1 instead of 5, Karras-50 3 instead of 5, 2M-50 2 instead of 1; the means change
    by 0.7, 2.2, -0.3 and -1.3 dB. With 8 and 10 rows it would cost 2 to 3 dB of the mean. From 21 rows on, which is
    what high guidance wants, the densest start is best: DDIM-50 at CFG 7.5, 112 seeds, 1 dB of the mean and 1 to 5 dB
    of the worst twentieth over gaps that rise by 0.2. Where the schedule's own first rows lie that far apart (flow)
    nothing is gained by it: 2 dB of the mean lost.

    Rows found by coordinate descent on 24 seeds of Karras-50 (7 rows: 35.8 instead of 34.3 dB there) are 1.1 dB better
    on 32 others, with a worst picture 4 dB lower; for 12 rows of DDIM-50 the same gains nothing.

    ``early`` is for the front of windows above 2: up to 9 rows rise from 0.5 by 0.12 where the first gap has three
    rows or more inside. Over 24 to 88 seeds at window 4, 30 rows, that costs 1 to 2 dB of the mean and lifts the worst
    picture: DDIM-50 36.9 to 39.7, Karras-50 36.3 to 39.4, DDIM-100 34.8 to 38.2, CFG 7.5 27.5 to 33.4 dB (2M-50 stays
    at 34.5). Flow-50 would lose 4 dB of the mean.
    """
    count = _clamped(count, u)
    few, some, many = _SPREADS
    rows = _spread(u, count, *few)
    if count > _SOME:
        return _spread(u, count, *many)
    if count > _FEW and rows[1] > 1:
        return _spread(u, count, *some)
    return _spread(u, count, NEAR, 0.5, 0.12) if early and 2 < count <= 9 and rows[1] > 3 else rows


def place_surely(u: Tensor, count: int) -> list[int]:
    """``count`` rows as ``place`` gives them, for runs that are to come out alike: dense early, sparse late.

    Errors made early grow or fade by 20 dB from picture to picture. Along a few directions the slope of a guided model
    is 2 to 5 at noise 20 to 5 (power iterations on the demo network at CFG 4 and 7.5), 100 to 1000 times a Gaussian
    one's, and nothing that a run evaluates anyway shows it (two evaluations more, a power iteration at noise 5, tell
    such pictures from others with an AUC of 0.76). Late errors can be told from the nodes. So early rows lie densely
    enough here for late ones to decide. With 18 rows of 50 and ``_SURE`` at 1.5 instead of 3 5.0 % of 480 runs (seeds
    200-223, 400-423) were told more than 6 dB too much once each problem's bias was taken out, with 20 and 21 rows and
    3 2.1 and 1.3 %; with 21 rows and 1.5 the 6.0 % of seeds 200-223 and 1000-1023 become 5.2 %, with 3 1.3 %.

    (With few rows spread by ``_SPREADS``, 144 to 176 seeds, ``_fitted`` would gain nothing: -0.4 dB for DDIM-50, -1.5
    for flow, +0.4 for 2M-50.) Steps that adapt to how far the last node moved saved a twentieth of the rows and left
    the estimate no surer.
    """
    return _fitted(u, count, *_SURE)


def place_in_noise(u: Tensor, count: int) -> list[int]:
    """``count`` rows as ``place`` gives them, for samplers that add noise of their own in every step.

    D follows each step's noise, so that the error of a gap grows with the square of its width in log noise (12 dB for
    twice the width, DDPM-50 normal and 30 Karras, CFG 4 and 7.5) and is nearly the same at all levels above noise 1: no
    row may be far from a node, early and at the very end none. Evenly in the row's number 30 rows of DDPM-50 come to
    37.8 dB in the mean of 64 seeds, by ``place`` to 44.1, so to 45.5; with 17 of 25 and 20 of 30 the worst twentieth
    gains 1 to 3 dB by it.
    """
    return _fitted(u, count, *_NOISY)


def _fitted(u: Tensor, count: int, near: float, first: float, rise: float) -> list[int]:
    """As ``_spread``, but the rows for which the squared logarithms of the gaps, over those wanted, have the least sum.

    Rows nearest to wanted places leave uneven gaps where the schedule is coarse, which costs 0.5 to 1.5 dB of the mean
    where rows lie densely.
    """
    at = _nearer(u, near)
    wanted = _gaps(_clamped(count, u), first, rise) * (at[-1] - at[0])
    gaps = (at - at[:, None]).clamp(min=1e-30).log()  # from row, to row
    ahead = torch.ones_like(gaps, dtype=torch.bool).triu(1)
    cost = torch.full_like(at, math.inf)
    cost[0] = 0
    came_from: list[list[int]] = []
    for gap in wanted.log():
        cost, before = (cost[:, None] + torch.where(ahead, (gaps - gap) ** 2, math.inf)).min(0)
        came_from.append(before.tolist())
    rows = [len(u) - 1]
    for froms in reversed(came_from):
        rows.append(froms[rows[-1]])
    return rows[::-1]


def even(u: Tensor, count: int) -> list[int]:
    """``count`` rows (clamped to 2..K), the first and the last among them, evenly spread over u."""
    return _spread(u, _clamped(count, u), NEAR, 1.0, 0.0)


def _spread(u: Tensor, count: int, near: float, first: float, rise: float) -> list[int]:
    """``count`` rows with gaps that rise from ``first`` by ``rise`` to 1, in units of the last ones.

    Gaps are counted in the coordinate with ``near`` instead of ``NEAR``.
    """
    K = len(u)
    at = _nearer(u, near)
    gaps = _gaps(count, first, rise)
    share = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
    rows: list[int] = []
    for part in share.tolist():
        nearest = int((at - (at[0] + (at[-1] - at[0]) * part)).abs().argmin())
        rows.append(max(nearest, rows[-1] + 1) if rows else 0)
    # leave room for those still to come
    return [min(row, K - count + i) for i, row in enumerate(rows)]


def _clamped(count: int, u: Tensor) -> int:
    return max(min(count, len(u)), min(2, len(u)))


def _nearer(u: Tensor, near: float) -> Tensor:
    """The coordinate ``u`` with ``near`` instead of ``NEAR``."""
    return -(noise_at(u) + near).log()


def _gaps(count: int, first: float, rise: float) -> Tensor:
    """Shares of the whole way of ``count - 1`` gaps that rise from ``first`` by ``rise`` to 1."""
    gaps = torch.tensor([min(first + rise * i, 1.0) for i in range(count - 1)], dtype=torch.float64)
    return gaps / gaps.sum()


def middle(u: Tensor, a: int, b: int) -> int:
    """The row between ``a`` and ``b`` (at least two apart) nearest to halfway in u."""
    return a + 1 + int((u[a + 1 : b] - (u[a] + u[b]) / 2).abs().argmin())


def subdivide(u: Tensor, a: int, b: int, count: int) -> list[int]:
    """Up to ``count`` rows strictly between ``a`` and ``b``, each halving the widest gap left."""
    ends = [a, b]
    for _ in range(count):
        gaps = [(float(u[y] - u[x]), x, y) for x, y in itertools.pairwise(ends) if y - x > 1]
        if not gaps:
            break
        _, x, y = max(gaps)
        ends = sorted([*ends, middle(u, x, y)])
    return ends[1:-1]


def slopes(u: Tensor) -> Tensor:
    """``[n, n]`` weights of the derivative in u at each of n nodes: the parabola through it and its neighbours."""
    n = len(u)
    weights = torch.zeros(n, n, dtype=torch.float64)
    if n == 2:
        weights[:] = torch.tensor([-1.0, 1.0], dtype=torch.float64) / (u[1] - u[0])
    if n < 3:
        return weights
    at, last = torch.arange(n), n - 1
    one = torch.where(at == 0, 1, at - 1)
    two = torch.where(at == 0, 2, torch.where(at == last, n - 3, at + 1))
    places = torch.stack([at, one, two], 1)
    return weights.scatter_(1, places, _tangent(*u[places.T]))


def _tangent(u: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """``[m, 3]`` weights of the derivative at u of the parabola through u and two other places."""
    own = (2 * u - one - two) / ((u - one) * (u - two))
    return torch.stack([own, (u - two) / ((one - u) * (one - two)), (u - one) / ((two - u) * (two - one))], 1)


def left_out(u: Tensor) -> Tensor:
    """``[n, n]`` weights of each node less what ``interpolation`` through the others makes of it; 0 at both ends."""
    n = len(u)
    weights = torch.zeros(n, n, dtype=torch.float64)
    if n < 3:
        return weights
    at = torch.arange(1, n - 1)
    a, b = at - 1, at + 1
    h = u[b] - u[a]
    t = (u[at] - u[a]) / h
    rise = t**2 * (3 - 2 * t) if n > 3 else t
    weights[at, at] = 1.0
    weights[at, a] -= 1 - rise
    weights[at, b] -= rise
    if n > 3:
        before, behind = torch.where(at > 1, at - 2, at + 2), torch.where(at < n - 2, at + 2, at - 2)
        for end, other, third, size in ((a, b, before, h * t * (1 - t) ** 2), (b, a, behind, -h * t**2 * (1 - t))):
            places = torch.stack([end, other, third], 1)
            weights[at[:, None], places] -= size[:, None] * _tangent(*u[places.T])
    return weights


def interpolation(u: Tensor, nodes: list[int], leaning: Tensor | None = None, reach: float = 1.0) -> Tensor:
    """``M [K, n]``: D of every row from D of the nodes; ``leaning`` are the nodes' ``slopes``, where they are known.

    Cubic Hermite between nodes (linear while there are two), held while there is one. Beyond the last node the line
    through the last two bends towards where it is one gap later: a straight one sends rows too far on. ``reach`` is
    the share of that line that is followed. Exact at the nodes.

    The bend against the straight line (window 1, demo network, 64 seeds not used for it: 0 to 15, 500 to 523, 600 to
    623): DDIM-50 51.2 instead of 50.2 dB in the mean, DDIM-100 52.2 (51.5), 2M-50 54.6 (53.3), Karras-50 48.3 (47.1),
    DDIM-50 at CFG 7.5 54.7 (54.4), flow-50 44.3 (42.9); the worst twentieth up to 2 dB better. Half the slope or
    0.6 of it are as good. A Gaussian process over the slopes of Gaussian modes (rough part of 1 to 10 % added), between
    nodes or beyond them, came out 1 to 4 dB lower in the mean than cubic pieces.
    """
    K, n, at = len(u), len(nodes), u[nodes]
    M = torch.zeros(K, n, dtype=torch.float64)
    if n == 1:
        return M.fill_(1)
    last = nodes[-1]
    rows = torch.arange(last)
    gap = torch.searchsorted(torch.tensor(nodes), rows, right=True) - 1
    width = torch.diff(at)
    h = width[gap]
    t = (u[:last] - at[gap]) / h
    rise = t**2 * (3 - 2 * t) if n > 2 else t
    M[rows, gap] = 1 - rise
    M[rows, gap + 1] = rise
    if n > 2:
        leaning = slopes(at) if leaning is None else leaning
        M[:last] += (h * t * (1 - t) ** 2)[:, None] * leaning[gap] - (h * t**2 * (1 - t))[:, None] * leaning[gap + 1]
    ahead = -reach * torch.expm1(-(u[last:] - at[-1]) / width[-1])
    M[last:, n - 1] = 1 + ahead
    M[last:, n - 2] = -ahead
    return M
