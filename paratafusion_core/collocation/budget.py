"""How many evaluations in how many rounds, and which rows a round takes."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import Options
from ..plan import collocation_rounds
from .grid import place, subdivide
from .impact import Impact, candidates
from .nodes import Ground, Nodes

#: Evaluations at window 1 and at 4 and more where none are asked for.
_ROWS, _PIPELINED = 16, 30


@dataclass(frozen=True)
class Budget:
    """A run's plan before it starts.

    Attributes:
        front: rows of the first pass, in order. rounds, rows: of the pass and what follows it; a target in dB may add
            to both. width: most rows of a round.
    """

    front: list[int]
    rounds: int
    rows: int
    width: int


def budget(ground: Ground, options: Options) -> Budget:
    """The plan for ``options``: window 1 walks ``rows`` nodes; wider windows spend two or three rows a round, so that
    rows behind the front are evaluated again while it moves on."""
    K = ground.total
    width = K if options.window == "full" else 1 if options.window == "auto" else min(int(options.window), K)
    if width == 1:
        rows = min(options.rows or _ROWS, K)
        front = place(ground.u, rows)
        return Budget(front, len(front), len(front), 1)
    default = {2: 19, 3: 25}.get(width, _PIPELINED)
    rows = options.rows or default
    rounds = collocation_rounds(rows, width, K)
    front = place(ground.u, max(rounds - 1, 2), early=width > 2)
    return Budget(front, max(rounds, len(front)), rows, width)


def next_rows(ground: Ground, plan: Budget, nodes: Nodes, seen: Impact, rounds: int, nfe: int) -> list[int]:
    """The rows of the next round, ascending: the next front node, and what is expected to matter most behind it."""
    ahead = [row for row in plan.front if row > nodes.rows[-1]][:1]
    rows = set(ahead)
    left = max(plan.rounds - rounds, 1)
    share = min(plan.width, max(1, round((plan.rows - nfe) / left)))
    if ahead and rounds == 1 and plan.width > 1:
        # nothing is known of the first gap yet; that is where pictures are decided
        rows |= set(subdivide(ground.u, nodes.rows[-1], ahead[0], plan.width - 1))
    for effect, row in candidates(ground, nodes, seen):
        if len(rows) >= share or effect <= 0:
            break
        rows.add(row)
    return sorted(rows)
