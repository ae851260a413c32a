"""How many evaluations in how many rounds, and which rows a round takes."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import Options
from ..plan import HIGH_DB, collocation_rounds
from .grid import place, subdivide
from .impact import Impact, candidates
from .nodes import Ground, Nodes

#: Evaluations at windows 1, 2, 3, and 4 and more where none are asked for; the second row is for targets above
#: ``HIGH_DB``.
#: Rows that are added one by one come dearer than rows planned for: towards 48 dB at window 1, 16 to start with end at
#: 22.4 evaluations, 53.9 dB (36 of 42 runs reach the target), 20 at 21.2 and 62.7 dB (40); towards 42 dB 14 end at 16.5
#: and 51.3 dB (36), 16 at 17.2 and 53.4 dB (39). Demo network, seven problems, seeds 300-305.
_ROWS = ((16, 19, 25, 30), (20, 22, 28, 34))


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
    high = options.target is not None and options.target > HIGH_DB
    rows = options.rows or _ROWS[high][min(width, 4) - 1]
    if width == 1:
        rows = min(rows, K)
        front = place(ground.u, rows)
        return Budget(front, len(front), len(front), 1)
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
