"""The evaluated rows, and the one linear solve that makes states and denoised pictures agree.

With D = M D_J on all rows (``M`` interpolates from the evaluated rows J) the sampler's states are x = S + W D_J,
W = C M. D of a row was evaluated at a state y that later evaluations have moved; it follows to first order,

    D_J = d + theta (x_J - y) + E (s . (x_J - y)),     s = dy / |dy|,  E = (dd - theta dy) / |dy|                 (1)

with the row's Gaussian slope theta, and E and s of the row's last two evaluations where it has been evaluated twice.
That is a linear system: with A = (I - theta W)^-1 and the plain numbers c = s . (x_J - y) of each image,

    D_J = A (d + theta (S_J - y) + E c),     c_i = s_i . (S + W A (d + theta (S - y)) - y)_i + (W A)_ij (s_i . E_j) c_j

so one product of secants and one small solve in float64 give all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..devices import send
from . import pieces
from .grid import noise_at

#: Share of the Gaussian slope that is used. Guided networks follow their state less than a Gaussian denoiser: of 0,
#: 0.3, 0.5, 0.7 and 1, 0.5 is best or within 0.6 dB of it in six problems of the demo network (16 seeds).
#: Along a node's movement the slope of three networks is nearly 0.35 - 0.28 (w - 1) above noise 3, with the guidance
#: scale w (0.35 at CFG 1, -0.5 at 4, -1.3 at 7.5; deviations as large); below noise 1 low spatial frequencies have 0.5
#: to 1, high ones 0.1. Neither that law nor a table by noise and frequency gained anything: means 1.6 dB lower to 0.5
#: higher, worst pictures better and worse (24 and 16 seeds). With exact states at its nodes a run of 8 rows would be
#: 15 dB nearer, but D beyond the last node is foretold only 1 to 2 dB better by a regression for each frequency.
#: Interpolating D less a share of the Gaussian slope times the state, which a linear model would make smooth, is no
#: better either: shares of 0.25, 0.5 and 1 cost 0.1 to 1.9, 1 to 4 and 4 to 9 dB, -0.15 changes -0.3 to 0.2, and -0.3
#: or -0.5 above noise 3 alone cost 0.2 to 8 (Karras-50, DDIM-50 and 2M-50 with 7 to 12 rows, 32 seeds).
SLOPE = 0.5
#: Where each step adds noise, D beyond the last node follows so much of the line through the last two: their difference
#: is half noise. Of 0, 0.3, 0.6 and 1 (64 seeds of DDPM-50, 25 and Karras-30 and of 2M SDE, a third of the rows left
#: out) 0.3 is best or within 0.3 dB of it; straight pieces between the nodes are no better than cubic ones.
_NOISY_REACH = 0.3
#: A secant is believed up to so many times the movement that it was measured over.
_REACH = 4.0


@dataclass(frozen=True)
class Ground:
    """What stays the same during a run: rows are flat states ``[B, d]``.

    Attributes:
        S: ``[K+1, B, d]``. C: ``[K+1, K]`` float64 on the CPU. u: ``[K]`` coordinate of each row. theta: ``[K]``
        slope of each row, alpha: ``[K]`` signal level, float64. unit: the data's rms.
        noisy: whether the steps add noise of their own. breaks: rows that another model evaluates than the row before.
        weights: ``[K+1, K+1]``, column k has the sums of |C| over the columns before k.
    """

    S: Tensor
    C: Tensor
    u: Tensor
    theta: Tensor
    alpha: Tensor
    unit: float = 1.0
    noisy: bool = False
    breaks: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.C.shape[1]

    @cached_property
    def weights(self) -> Tensor:
        return torch.nn.functional.pad(self.C.abs().cumsum(1), (1, 0))

    @cached_property
    def signal(self) -> Tensor:
        """``[K+1]`` signal level of every state, above 0; the final one's is taken to be the last row's."""
        return torch.cat([self.alpha, self.alpha[-1:]]).clamp(min=1e-6)

    @cached_property
    def quiet(self) -> Tensor:
        """``[K]`` the data's rms in a state, over sqrt(1 + noise^2)."""
        return self.unit * self.alpha / (1 + noise_at(self.u) ** 2).sqrt()

    def inside(self, rows: list[int]) -> Tensor:
        """``[n-1]`` what D of the rows inside each gap of ``rows`` weighs in the state at the gap's end."""
        places = torch.tensor(rows)
        ends, inside = places[1:], places[:-1] + 1
        return self.weights[ends, ends] - self.weights[ends, inside]


@dataclass(frozen=True)
class Secants:
    """How D of each row changed between its last two evaluations; 0 where it was evaluated once.

    Attributes:
        s: ``[n, B, d]`` direction in which the state moved. E: ``[n, B, d]`` change of D beyond the slope's, for a
        movement of 1. span: ``[n, B, 1]`` the movement.
    """

    s: Tensor
    E: Tensor
    span: Tensor


@dataclass(frozen=True)
class Nodes:
    """The evaluated rows, ascending.

    Attributes:
        rows: their numbers. y, d: ``[n, B, d]`` the state and denoised picture of each row's last evaluation.
        secants: None until a row was evaluated twice.
        D: ``[n, B, d]`` solution of (1). M: ``[K, n]``, W: ``[K+1, n]``, leaning: ``[n, n]`` weights of the slopes at
            the nodes; float64 on the CPU. moved: ``[n, B, d]``, how far the states have moved from y.
    """

    rows: list[int]
    y: Tensor
    d: Tensor
    secants: Secants | None
    D: Tensor
    M: Tensor
    W: Tensor
    leaning: Tensor
    moved: Tensor


def states(ground: Ground, nodes: Nodes | None, rows: list[int]) -> Tensor:
    """``[len(rows), B, d]`` as they are known now (row K is the picture)."""
    base = ground.S[rows]
    return base if nodes is None else _combine(nodes.W[rows], nodes.D, base)


def missed(nodes: Nodes | None, rows: list[int], d: Tensor, breaks: tuple[int, ...] = ()) -> Tensor:
    """``[len(rows), B, d]``: the denoised pictures ``d`` of ``rows`` less what ``nodes`` foresaw, 0 without nodes.

    Behind one of the ``breaks`` that the nodes have not reached they foresee nothing.
    """
    if nodes is None:
        return torch.zeros_like(d)
    last = nodes.rows[-1]
    foreseen = torch.tensor([not any(last < at <= row for at in breaks) for row in rows])
    return _combine(-nodes.M[rows], nodes.D, d) * _column(foreseen, d)


def with_evaluated(ground: Ground, nodes: Nodes | None, rows: list[int], y: Tensor, d: Tensor) -> Nodes:
    """``nodes`` after rows ``rows`` (ascending) were evaluated at ``y`` and gave ``d``, agreeing again."""
    if nodes is None:
        return agree(ground, rows, y, d)
    secants = _renewed(ground, nodes, rows, y, d)
    if rows[0] > nodes.rows[-1]:
        every, place = [*nodes.rows, *rows], None
    else:
        every = sorted({*nodes.rows, *rows})
        old, new = ({row: i for i, row in enumerate(some)} for some in (nodes.rows, rows))
        place = [new[r] + len(old) if r in new else old[r] for r in every]
    if secants is not None:
        known = [nodes.rows.index(r) if r in nodes.rows else -1 for r in every]
        secants = Secants(*(torch.cat([v, torch.zeros_like(v[:1])])[known] for v in vars(secants).values()))
    y, d = torch.cat([nodes.y, y]), torch.cat([nodes.d, d])
    if place is not None:
        y, d = y[place], d[place]
    return agree(ground, every, y, d, secants)


def _renewed(ground: Ground, nodes: Nodes, rows: list[int], y: Tensor, d: Tensor) -> Secants | None:
    """The secants of ``nodes`` with those of the rows that were evaluated again."""
    again = [row for row in rows if row in nodes.rows]
    if not again:
        return nodes.secants
    blank = torch.zeros_like(nodes.y)
    known = nodes.secants or Secants(blank, blank, blank[..., :1])
    at, was = [rows.index(r) for r in again], [nodes.rows.index(r) for r in again]
    dy, dd = y[at] - nodes.y[was], d[at] - nodes.d[was]
    size = torch.linalg.vector_norm(dy, dim=-1, keepdim=True)
    enough = size > 1e-6 * torch.linalg.vector_norm(y[at], dim=-1, keepdim=True)
    inverse = torch.where(enough, 1 / size.clamp(min=1e-30), 0.0)
    s, E, span = known.s.clone(), known.E.clone(), known.span.clone()
    span[was] = torch.where(enough, size, span[was])
    s[was] = torch.where(enough, dy * inverse, s[was])
    E[was] = torch.where(enough, (dd - _column(ground.theta[again], dy) * dy) * inverse, E[was])
    return Secants(s, E, span)


def grid(ground: Ground, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """M ``[K, n]``, W ``[K+1, n]`` and the slopes' weights ``[n, n]`` of the nodes ``rows``."""
    leaning = pieces.slopes(ground.u, rows, ground.breaks)
    M = pieces.interpolation(ground.u, rows, leaning, _NOISY_REACH if ground.noisy else 1.0, ground.breaks)
    return M, ground.C @ M, leaning


def agree(ground: Ground, rows: list[int], y: Tensor, d: Tensor, secants: Secants | None = None) -> Nodes:
    """Solve (1)."""
    M, W, leaning = grid(ground, rows)
    theta, own = ground.theta[rows], W[rows]
    A = torch.linalg.inv(torch.eye(len(own), dtype=torch.float64) - theta[:, None] * own)
    S = ground.S[rows]
    fixed = torch.addcmul(d, _column(theta, S), S - y)
    D = _combine(A, fixed)
    if secants is not None:
        rest = _combine(own, D, S) - y
        D = _combine(A, fixed + secants.E * _along(secants, own @ A, rest))
    return Nodes(rows, y, d, secants, D, M, W, leaning, _combine(own, D, S) - y)


def _along(secants: Secants, spread: Tensor, rest: Tensor) -> Tensor:
    """c ``[n, B, 1]``: with ``spread`` = W A ``[n, n]`` and the movement without secants ``rest`` ``[n, B, d]``."""
    s, E = secants.s.transpose(0, 1), secants.E.transpose(0, 1)
    products = (s @ E.transpose(1, 2)).cpu().double()
    right = (secants.s * rest).sum(-1).T.cpu().double()
    eye = torch.eye(len(spread), dtype=torch.float64)
    c = torch.linalg.lstsq(eye - spread * products, right[..., None]).solution
    most = _REACH * secants.span
    return send(c.transpose(0, 1), secants.s).clamp(-most, most)


def _combine(weights: Tensor, values: Tensor, base: Tensor | None = None) -> Tensor:
    """``base + weights values`` over the first dimension."""
    w, flat = send(weights, values), values.flatten(1)
    if base is None:
        return (w @ flat).view(len(w), *values.shape[1:])
    return torch.addmm(base.flatten(1), w, flat).view_as(base)


def _column(value: Tensor, like: Tensor) -> Tensor:
    return send(value, like).reshape(-1, 1, 1)
