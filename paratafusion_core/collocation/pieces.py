"""Where the model itself changes from one row to the next, D is interpolated on either side for itself.

A prompt, a ControlNet or a patch that begins or ends at some noise level makes D jump there. A *break* is the number of
the first row behind such a jump. With evaluated rows right before and right at it nothing is interpolated across.

Towards 42 dB (demo network, DDIM-50 and Karras-30, six changes: another guidance scale below noise 1, 3, or between 5
and 0.5, another prompt below 2 and 0.7; 16 seeds each): with breaks 5 of 192 runs at window 1 end below 42 dB, with as
many rows as without (23.5 in the mean), at window 4 7; without breaks 31 and 27. Looked at once, at the end, four
changes each, 16 seeds, window 1: flow-50 and 2M-Karras-30 16 of 128, ten of them by less than 1.5 dB; another network
(48/80 channels) with Karras-30 7 of 64, with DDIM-50 8 of 64, where without a change it is 3 of 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import grid

#: Evaluated rows that a piece has at least, if it has as many.
_LEAST = 3
#: Rows more that each has towards a target.
_MORE = 2
#: Rows that breaks leave to the rest of a run at least.
_ENOUGH = 12


def split(nodes: Sequence[int], breaks: Sequence[int]) -> list[slice]:
    """The pieces of ``nodes`` (ascending rows): a break counts once the rows on both sides of it are nodes."""
    cuts = [i for i, (a, b) in enumerate(itertools.pairwise(nodes), 1) if b in breaks and a == b - 1]
    return [slice(a, b) for a, b in itertools.pairwise([0, *cuts, len(nodes)])]


def slopes(u: Tensor, nodes: list[int], breaks: Sequence[int]) -> Tensor:
    """``grid.slopes`` of each piece, ``[n, n]``."""
    return torch.block_diag(*(grid.slopes(u[nodes[piece]]) for piece in split(nodes, breaks)))


def left_out(u: Tensor, nodes: list[int], breaks: Sequence[int]) -> Tensor:
    """``grid.left_out`` of each piece, ``[n, n]``."""
    return torch.block_diag(*(grid.left_out(u[nodes[piece]]) for piece in split(nodes, breaks)))


def interpolation(u: Tensor, nodes: list[int], leaning: Tensor, reach: float, breaks: Sequence[int]) -> Tensor:
    """``grid.interpolation`` of each piece, ``M [K, n]``; the last one goes on beyond its last node."""
    blocks = []
    for piece in split(nodes, breaks):
        start, end = nodes[piece.start], len(u) if piece.stop == len(nodes) else nodes[piece.stop]
        inside = [row - start for row in nodes[piece]]
        blocks.append(grid.interpolation(u[start:end], inside, leaning[piece, piece], reach))
    return torch.block_diag(*blocks)


def placed(
    place: Callable[[Tensor, int], list[int]], u: Tensor, count: int, breaks: Sequence[int], enough: int = _ENOUGH
) -> list[int]:
    """Up to ``count`` rows (clamped) by ``place``, and among them those on both sides of the ``breaks``.

    As many breaks count, from the first on, as leave ``enough`` rows to ``place``. With 16 of 50 rows that lifts the
    mean by 4 dB (DDIM-50, window 1, five of the changes, 32 seeds each); with 12, of which 8 or 9 would be left, the
    worst tenth loses 4 dB.
    Windows above 1 that spend a number of rows have a front of ten rows, and gain nothing by breaks.
    """
    least = place(u, enough)
    kept = next((n for n in range(len(breaks), 0, -1) if len(_around(u, least, breaks[:n])) <= count), 0)
    for spread in range(count, enough - 1, -1) if kept else ():
        rows = _around(u, place(u, spread), breaks[:kept])
        if len(rows) <= count:
            return rows
    return place(u, count)


def _around(u: Tensor, rows: list[int], breaks: Sequence[int]) -> list[int]:
    """``rows`` and those on both sides of the ``breaks``; of each piece ``_LEAST`` or all."""
    found = {*rows, *breaks, *(b - 1 for b in breaks)}
    for a, b in itertools.pairwise([0, *breaks, len(u)]):
        found.update(grid.subdivide(u, a, b - 1, max(_LEAST - sum(a <= row < b for row in found), 0)))
    return sorted(found)


def placed_surely(u: Tensor, count: int, breaks: Sequence[int]) -> list[int]:
    """``grid.place_surely``, but each of the ``breaks`` begins anew, dense at first, with ``_MORE`` rows.

    Where another prompt takes over, pictures are decided once more: with the rows on both sides of a break alone
    Karras-30 comes to 34 instead of 49 dB where another object is asked for below noise 2.
    """
    rows = grid.place_surely(u, count)
    if not breaks:
        return rows
    first, *ends = breaks
    found = sorted({*(row for row in rows if row < first), first - 1})
    for a, b in itertools.pairwise([first, *ends, len(u)]):
        wanted = max(sum(a <= row < b for row in rows) + _MORE, _LEAST)
        found += [a + row for row in grid.place_surely(u[a:b], wanted)]
    return found


def jumps(nodes: list[int], breaks: Sequence[int]) -> list[bool]:
    """Of each gap between ``nodes`` whether it is a break that counts (``split``)."""
    return [a == b - 1 and b in breaks for a, b in itertools.pairwise(nodes)]
