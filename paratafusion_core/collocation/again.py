"""Going on where a capped collocation run of the same system stopped (``resume.py`` serves the other solvers).

No row is final here: what the first run leaves is its nodes, each with the state at which it was evaluated. Before they
are taken over the ``telling`` one is evaluated again there, at windows above 1 the last one, too. D may differ by
``rounding``: in float32 the gap is 1.5e-4 at most (demo network, mixture, ideal denoiser; DDIM-50, 2M-30, flow-28;
windows 1 and 4; seeds 100-103); CFG 4.6 instead of 4 makes it 0.066 to 0.34 at the second and fifth node of the demo
network, 4.05 0.006 to 0.03.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import send
from ..resume import fingerprint, rounding, same_system, telling
from ..rows import Scales
from ..system import System
from ..trajectory import Part, half
from .doubts import Signs
from .nodes import Ground, Nodes, Secants, agree, grid
from .pieces import split


@dataclass(frozen=True)
class Begun:
    """What a capped run had, once it was checked.

    Attributes:
        nodes: those of the earlier run, None where they do not hold here. signs: what it had shown.
        rounds, nfe: to be added to the report's for what the nodes have cost; the check is no part of that.
        rows: that were evaluated again, y, d: ``[n, B, d]`` at which states, and what they gave.
        seconds: that this took.
    """

    nodes: Nodes | None
    signs: Signs
    rounds: int
    nfe: int
    rows: list[int]
    y: Tensor
    d: Tensor
    seconds: float

    def in_words(self) -> str:
        """What came of it, for the report."""
        if self.nodes is None:
            return "same noise levels; the sketch's rows do not hold here and are evaluated again"
        kept = len(self.nodes.rows)
        return f"continued behind {kept} evaluated rows of the same run, {len(self.rows)} of them checked"


def obstacle(system: System, part: Part) -> str | None:
    """Why a capped run's rows cannot be taken over, or None."""
    if not same_system(part.system, fingerprint(system)):
        return "it is of another run"
    return None if part.rows and part.changes is not None else f"it is of solver {part.solver}"


def part_of(nodes: Nodes, system: System, signs: Signs, cost: tuple[int, int]) -> Part:
    """What a run that stopped with ``nodes`` leaves to a second one; ``cost`` is its rounds and evaluations."""
    known = half(nodes.D).to(nodes.D.dtype)
    changes = [nodes.moved, known - nodes.d]
    if nodes.secants is not None:
        changes += [nodes.secants.s * nodes.secants.span, nodes.secants.E * nodes.secants.span]
    kept = half(torch.stack(changes)).reshape(len(changes), len(nodes.rows), *system.S.shape[1:]).cpu()
    slope, sigma = signs.steepest
    return Part(
        final=1,
        tolerance=0.0,
        solver="collocation",
        system=fingerprint(system),
        slope=max(slope, 0.0),
        slope_sigma=sigma,
        surprise=signs.surprise,
        changes=kept,
        rows=tuple(nodes.rows),
        rounds=cost[0],
        nfe=cost[1],
    )


def look_again(
    ground: Ground,
    part: Part,
    trajectory: Tensor,
    single: bool,
    evaluate: Callable[[list[int], Tensor], Tensor],
    scales: Scales,
    clock: Callable[[], float],
) -> Begun:
    """Evaluate the telling node again, the last of each later piece, at wider windows of all, and compare.

    Args:
        trajectory: ``[K, B, d]`` D of the earlier run. single: at window 1.
        evaluate: ``(rows, y [n, B, d]) -> [n, B, d]``. clock: seconds, rising.
    """
    nodes = _restored(ground, part, trajectory)
    noise = scales.noise[nodes.rows]
    wide = [] if single else [len(nodes.rows) - 1]
    places = sorted({telling(noise), *wide, *(piece.stop - 1 for piece in split(nodes.rows, ground.breaks)[1:])})
    rows, y = [nodes.rows[i] for i in places], nodes.y[places]
    begin = clock()
    # one by one, as a run's first evaluations are: the automatic plan measures them
    d = torch.cat([evaluate([row], state[None]) for row, state in zip(rows, y, strict=True)])
    gap = (d - nodes.d[places]).square().mean(-1).amax(1).sqrt().cpu().double() / scales.data_rms
    seconds = max(clock() - begin, 0.0)
    if not bool((gap <= rounding(noise[places])).all()):
        return Begun(None, Signs(), 0, 0, rows, y, d, seconds)
    signs = Signs((part.slope, part.slope_sigma), part.surprise)
    return Begun(nodes, signs, part.rounds - 1, part.nfe - len(rows), rows, y, d, seconds)


def _restored(ground: Ground, part: Part, trajectory: Tensor) -> Nodes:
    assert part.changes is not None
    rows = list(part.rows)
    D = send(trajectory[rows], ground.S)
    moved, turned, *secant = send(part.changes, ground.S).reshape(len(part.changes), *D.shape)
    _, W, _ = grid(ground, rows)
    x = ground.S[rows] + (send(W[rows], D) @ D.flatten(1)).view_as(D)
    known = None
    if secant:
        span = torch.linalg.vector_norm(secant[0], dim=-1, keepdim=True)
        inverse = torch.where(span > 0, 1 / span.clamp(min=1e-30), 0.0)
        known = Secants(secant[0] * inverse, secant[1] * inverse, span)
    return agree(ground, rows, x - moved, D - turned, known)
