"""The result's fidelity in dB, estimated without a reference."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..devices import send
from ..plan import from_window
from .impact import Impact
from .nodes import Ground, Nodes
from .pieces import left_out, split

#: What a node's movement since its evaluation counts in the picture, and the error that nodes left out would make over
#: a gap; from which window on both count how many times as much; and the powers of 1 + noise^2 by which they count less
#: where they happen early.
_COUNTS = 0.41, 0.265
_WIDER = ((1, 1.0), (5, 1.27))
_MOVED_FADES, _LEFT_OUT_FADES = 0.6, 0.75
#: Both count so many times as much where each step adds noise. Without it the estimate of 560 runs (two networks, seven
#: problems of DDPM and 2M SDE with half to three quarters of the rows) is 2 dB too high in the mean; with it 64 % are
#: within 3 dB and 7 % more than 6 dB too high. That is rough, so there is no target for such samplers.
_NOISY = 1.26
#: Most times that a later state is taken to weigh a node as much as the next one does. It is 3.3 for 2M in the last
#: steps of ``normal``, whose movements it makes count 1.8 times; with 3.3 runs of 20 steps at CFG 4 are told 8 dB too
#: little, without it 5.5 dB too much at CFG 7 (8 seeds each).
_MOST_REGAINED = 10.0
#: A node is taken to weigh at least this share of what the heaviest one does in the next state.
_LEAST_WEIGHT = 0.1
#: A run goes on until the estimate is so many dB above its target.
MARGIN = 2.0


def expected_error(ground: Ground, nodes: Nodes, seen: Impact, noise: Tensor, width: int) -> float:
    """rms by which the picture is expected to differ from the sequential one, of the worst image.

    The error is taken to be the nodes' movements since their evaluation and what interpolation leaves inside the gaps,
    added up as independent; the latter as large as where a node is left out and interpolated from the others, times the
    cube root of the rows from node to node, which was found: without it a problem's runs are told 3 dB too much or too
    little, as its schedule is fine or coarse. The numbers were fitted on 780 runs of three networks (13 problems of 20
    to 100 steps, window 1, 42 dB; the embedded one and two that were trained for 3500 steps, 48/80 and 64/96 channels)
    and moved by half a dB after 720 more, as a compromise: fitted on one network they are 1 to 2 dB off on another,
    which nothing in a run foretells (how the error falls from gaps of four to gaps of two, shares of both parts,
    gradient boosting over bands of noise). They hold for windows 2 to 4, too (360 runs each); 6 wants a quarter more.
    With fewer than three nodes there is nothing to tell it by, and it is the data's rms.

    Of runs looked at once, at the end (42 dB, ten problems of 30 to 100 steps) the estimate is within 3 dB of the truth
    in 86 % and more than 6 dB too high in 0.6 % (embedded network, window 1, 720 runs), 78 % and 4.8 %, 86 % and 4.0 %
    (the other two, 480 runs each); at window 2 in 85 % and 2.1 %, at window 4 in 80 % and 2.1 %, at 6 in 70 % and 2.9 %
    (embedded, 240 runs each; the other two at window 4 78 % and 3.7 %, 75 % and 4.2 %).

    Samplers of higher order weigh anew, in later states, what was interpolated before. At the end of ``normal`` 2M goes
    from noise 0.27 to 0.03 in one step, which weighs D of the row before -2.5 times. With a look at each gap's own end
    alone its runs of 16 steps at CFG 4 and of 20 and 25 at CFG 7 were told 6.7, 6.3 and 5.9 dB too much in the mean,
    now -4.1, 1.8 and 2.5 (16 seeds each), and ``lms`` and ``ipndm_v`` (normal 50, weights 7, -6, 5, -3 ..) 3.7 and 4.2,
    now -1.1 and -0.4 (8 seeds). It costs runs of 2M-50 and 100 about a dB: 2 % fewer of all runs are within 3 dB.

    What is told wrongly was decided early. There D turns within one gap of two rows, the state behind it is off by
    0.002 to 0.03, and that becomes 0.6 to 26 times as much in the picture, as the slope along it is up to 5; the gap's
    own error is foretold to 3.5 to 4 dB at best. So early rows are dense and settled (``budget.unsettled``), that late
    errors decide, which can be told. A front of 9 to 13 rows at windows above 1, some of them evaluated twice, was more
    than 6 dB too high in 12 to 17 % on a network that nothing was fitted on; all rows settled alike, 10 to 30 %.

    What came no nearer: bends beside nodes left out, the ratio of both, the width of a gap beside those around it, a
    weight of its own for the last gap or for rows evaluated twice, surprises; gradient boosting over all of these in
    bands of noise; how far the picture moves from round to round (correlation with the estimate's error at most 0.09).
    The difference from the picture of another interpolation through the same nodes has nothing in common with the error
    (cosines within 0.05), and the difference from a second run with fewer rows tells the error of that one within 1 to
    2 dB, of this one only within 4.

    Nor does it help to go on while there is doubt: the estimate rises, and the picture stays what it is (19.4 dB at an
    estimated 58.9, 74 rows of 100; at window 4 the runs that were too high went from 4.2 to 6.7 %). Early nodes
    evaluated twice show the slope along their movement, and where it is above 2 the gap before them can be filled: of a
    network made for this test (48 runs of DDIM-50 and 100) 6 % instead of 19 % were too high then, for 29 rows instead
    of 22; 29 rows placed as ever come to 8 %.

    Args:
        noise: ``[K]`` in units of the data's rms. width: most rows of a round.
    """
    if len(nodes.rows) < 3:  # nothing was foreseen that could be compared
        return ground.unit
    # the final state is taken to be without noise
    quiet, alpha = 1 / (1 + torch.cat([noise, noise.new_zeros(1)]) ** 2), ground.signal
    times = from_window(_WIDER, width)[1] * (_NOISY if ground.noisy else 1.0)
    of_moved, of_left_out = (times * count for count in _COUNTS)
    moved = of_moved * seen.moved / alpha[nodes.rows] * quiet[nodes.rows] ** _MOVED_FADES * _regained(nodes, alpha)
    between = of_left_out * _between(ground, nodes, seen) * _weights_inside(ground, nodes.rows, quiet)
    rounding = torch.finfo(nodes.D.dtype).eps * ground.unit
    return max(math.sqrt(float(moved.square().sum() + between.square().sum())), rounding)


def decibels(error: float, peak: float) -> float:
    """PSNR of an rms ``error`` for the range ``peak``."""
    return 20 * math.log10(max(peak, 1e-30) / max(error, 1e-30))


def _between(ground: Ground, nodes: Nodes, seen: Impact) -> Tensor:
    """``[n-1]`` how far D is taken to be off inside each gap: as it is foreseen at the nodes around by the others, of
    which the first and last gap of a piece have one, and the only one none: there it is half of how D changes."""
    weights = send(left_out(ground.u, nodes.rows, ground.breaks), nodes.D)
    off = torch.linalg.vector_norm((weights @ nodes.D.flatten(1)).view_as(nodes.D), dim=-1)
    off = off.amax(1).cpu().double() / nodes.D.shape[-1] ** 0.5
    sizes = seen.turns / 2
    for piece in split(nodes.rows, ground.breaks):
        start, end = piece.start, piece.stop - 1  # the gaps are start to end - 1
        if end - start > 1:
            inner = off[start + 1 : end]
            around = torch.cat([inner[:1], inner, inner[-1:]]).square()
            sizes[start:end] = ((around[1:] + around[:-1]) / 2).sqrt()
    spans = torch.diff(torch.tensor(nodes.rows)).double()
    return sizes * spans ** (1 / 3)


def _weights_inside(ground: Ground, rows: list[int], quiet: Tensor) -> Tensor:
    """``[n-1]`` what D inside each gap weighs in the state at its end, and by how much more in a later one.

    There the error of interpolating, t^2 (1 - t)^2 at t of the gap's way, has one sign, and the weights may have two.
    ``quiet`` is that of all states, ``[K+1]``.
    """
    faded, C = quiet**_LEFT_OUT_FADES, ground.C / ground.signal[:, None]
    own, found = ground.inside(rows) / ground.signal[rows[1:]], []
    for now, (a, b) in zip(own.tolist(), itertools.pairwise(rows), strict=True):
        t = (ground.u[a + 1 : b] - ground.u[a]) / (ground.u[b] - ground.u[a])
        later = (C[b + 1 :, a + 1 : b] @ (16 * t**2 * (1 - t) ** 2)).abs() - now
        found.append(now * float(faded[b]) + float((later.clamp(min=0) * faded[b + 1 :]).max()))
    return torch.tensor(found, dtype=torch.float64)


def _regained(nodes: Nodes, alpha: Tensor) -> Tensor:
    """``[n]`` the root of how many times as much D of each node weighs in a later state as in that of the next node, if
    it is more; of ``_MOST_REGAINED`` at most, and not as where it happens to weigh nothing there."""
    W, found = nodes.W.abs() / alpha[:, None], []
    for at, after in enumerate([*nodes.rows[1:], len(W) - 1]):
        now, most = max(float(W[after, at]), _LEAST_WEIGHT * float(W[after].max())), float(W[after:, at].max())
        found.append(min(max(most / max(now, 1e-30), 1.0), _MOST_REGAINED) ** 0.5)
    return torch.tensor(found, dtype=torch.float64)
