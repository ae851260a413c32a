"""How many evaluations in how many rounds, and which rows a round takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..options import Options
from ..plan import collocation_rounds, from_window, target_rows
from .grid import even, place, place_in_noise, subdivide
from .impact import Impact, candidates
from .nodes import Ground, Nodes
from .pieces import placed, placed_surely

#: Evaluations by window where neither rows nor a target are asked for.
_ROWS = {1: 16, 2: 19, 3: 25, 4: 30}
#: Window 1: expected effect of a node's movement on the picture, in units of the data's rms, from which the node is
#: evaluated again at once, and the rows that leave none for that.
_FAR_OFF, _FEW = 0.0105, 20
#: The movement itself for that, towards a target.
_MOVED_FAR = 0.03
#: The same at wider windows, over sqrt(1 + noise^2).
_SETTLED = 0.05
#: Weight of a row's D in a state, over the state's signal, from which on it is evaluated: rounding above 1.
_ALL = 1.01
#: Steps from which on such rows may be left out: with them runs of 2M with 30 to 100 steps are no nearer, and their
#: estimates 2 to 4 % less often within 3 dB.
_FINE = 30
#: Towards a target: from which window on a round takes so many rows on its way, and so many of them new ones.
_PACES = ((1, 1, 1), (2, 2, 2), (3, 3, 2), (5, 6, 3))
#: Towards a target: most rows of a round behind the front; and a round takes one row once so many times the sampler's
#: evaluations are spent.
_BEHIND, _MOST = 4, 2


@dataclass(frozen=True)
class Budget:
    """A run's plan before it starts.

    Attributes:
        front: rows of the first pass, in order, unless window 1 leaves it (``_step``). rounds, rows: of the pass
            and what follows it, without a target. width: most rows of a round.
        inside: rows of the first gap that are evaluated with its end, or the row after it: pictures are decided there,
            and nothing is known of it yet.
        open: towards a target: what is evaluated again costs the front no row, and rounds follow behind the plan.
        loose: the last row for which ``unsettled`` counts, -1 for none.
    """

    front: list[int]
    rounds: int
    rows: int
    width: int
    inside: list[int]
    open: bool = False
    loose: int = -1


def budget(ground: Ground, options: Options, dense: bool = True) -> Budget:
    """The plan for ``options``: window 1 walks ``rows`` nodes; wider windows spend two or three rows a round, so that
    rows behind the front are evaluated again while it moves on. Towards a target all of them walk the same nodes.
    ``dense``: there are no nodes yet, or each row up to the last one is one, evaluated once."""
    K = ground.total
    width = K if options.window == "full" else 1 if options.window == "auto" else min(int(options.window), K)
    rows = options.rows
    if options.target is not None:
        spread = placed_surely(ground.u, target_rows(K, options.target, rows), ground.breaks)
        front = sorted({*spread, *_heavy(ground)})
        return at_window(Budget(front, len(front), len(front), 1, [], open=True), width, 0)
    rows = rows or _ROWS[min(width, 4)]
    if width == 1:
        front = placed(place_in_noise if ground.noisy else place, ground.u, rows, ground.breaks)
        return Budget(front, len(front), len(front), 1, [])
    rounds = collocation_rounds(rows, width, K)
    if dense and rounds >= K:  # no round is saved, so the exact picture costs no more
        return Budget(list(range(K)), K, K, 1, [])
    front = place(ground.u, max(rounds - 1, 2), early=width > 2)
    inside = subdivide(ground.u, 0, front[1], width - 1)
    if width == 2:  # the automatic plan opens with it, and may go on with window 1
        single = place(ground.u, rows)
        inside = single[1:2] if single[1] < front[1] else inside or front[2:3]
    return Budget(front, max(rounds, len(front)), rows, width, inside[: max(rows - len(front), 0)])


def _heavy(ground: Ground) -> list[int]:
    """Rows whose D some state weighs by more than all of its signal.

    Samplers of higher order do that late on coarse schedules (2M on ``normal``: 3.5 and -2.5 of the last rows but one
    and two), and multiply what interpolation is off by there. With them 2M-16 at CFG 7 comes to 52.7 dB with 14 rows
    (mean of 6 seeds) instead of 42.0 with all 16, one after the other; with 20 and 25 steps it takes a row less for the
    same picture (16 seeds). Where D follows a state strongly that helps little: ``ipndm``, ``lms`` and ``deis`` with 20
    steps of ``normal`` come to 49 dB and more at CFG 4, but to 15 to 54 at CFG 7, where they are told 5 to 18 dB too
    much in the mean (5 seeds each).
    """
    if ground.total >= _FINE:
        return []
    most = (ground.C.abs() / ground.signal[:, None]).amax(0)
    return [row for row, weight in enumerate(most.tolist()) if weight > _ALL]


def at_window(plan: Budget, width: int, last: int) -> Budget:
    """``plan`` towards a target, from now on at another window; ``last`` is the last node."""
    if not plan.open or width == plan.width:
        return plan
    return replace(plan, width=width, loose=last if width == 1 else plan.front[-1])


def begun_wide(plan: Budget, last: int) -> Budget:
    """``plan`` for a run that goes on from a sketch at a wider window, which evaluated nodes up to ``last``."""
    return replace(plan, loose=max(plan.loose, last)) if plan.open else plan


def next_rows(
    ground: Ground, plan: Budget, nodes: Nodes, seen: Impact, rounds: int, nfe: int, again: list[int]
) -> list[int]:
    """The rows of the next round, ascending: the next front node, and what is expected to matter most behind it.

    ``again`` are the ``unsettled`` ones.
    """
    ahead = [row for row in plan.front if row > nodes.rows[-1]]
    if plan.width == 1 and ahead and not again:
        return [_step(ground, plan, nodes, seen, rounds, nfe)]
    if plan.open:
        dear = nfe >= _MOST * ground.total
        if ahead:
            spare = ground.total - rounds - len(ahead)  # never more rounds than the sampler has evaluations
            return ahead[:1] if dear else _slide(plan.width, again if spare > 0 else [], ahead)
        share = 1 if dear else min(plan.width, _BEHIND)
        rows = set(again[:share])
    else:
        share = min(plan.width, max(1, round((plan.rows - nfe) / max(plan.rounds - rounds, 1))))
        rows = set(ahead[:1])
        if ahead and rounds == 1:
            rows |= set(plan.inside)
    for effect, row in candidates(ground, nodes, seen) if len(rows) < share else ():
        if len(rows) >= share or effect <= 0:
            break
        rows.add(row)
    return sorted(rows)


def unsettled(ground: Ground, plan: Budget, nodes: Nodes, seen: Impact) -> list[int]:
    """The nodes, ascending, that a wide window evaluates again before a run may end that goes on until a target is met.

    They are those that have moved by more than ``_SETTLED``, which is less at high noise: there a change lasts and
    grows, while late ones fade, and their effect can be told. Window 1 has none but what wider ones left.
    """
    if plan.loose < 0:
        return []
    far = (seen.moved > _SETTLED * ground.quiet[nodes.rows]).tolist()
    return [row for row, moved in zip(nodes.rows, far, strict=True) if moved and row <= plan.loose]


def _slide(width: int, again: list[int], ahead: list[int]) -> list[int]:
    """The first rows of those still to be evaluated, as a sliding window has them: ``again`` before ``ahead``."""
    _, most, new = from_window(_PACES, width)
    return (again + ahead[:new])[: min(most, width)]


def _step(ground: Ground, plan: Budget, nodes: Nodes, seen: Impact, rounds: int, nfe: int) -> int:
    """The next row of window 1 on its way through the front.

    A node whose state its own evaluation has moved far is evaluated again there before the way goes on, which costs one
    of the rows that are left; these are spread evenly then. With DDIM-50 at CFG 7.5 and 22 rows (demo network, 144
    seeds) the two pictures of 28.9 and 35.1 dB come to 46.8 and 43.6 dB, the mean from 54.7 to 55.0 dB. Fewer rows have
    none to spare: with 8 of DDIM-50 the mean falls by 7 dB, with 12 five of 128 pictures end below 34 dB instead of
    two. Towards a target such an evaluation costs no other row.
    """
    last, left = nodes.rows[-1], plan.rows - nfe
    onward = next(row for row in plan.front if row > last)
    if ground.noisy:  # every node moves there, and the front is dense as it is: 9 dB of the mean lost otherwise
        return onward
    if plan.open:
        far = float(seen.moved[-1]) > ground.unit * _MOVED_FAR and not seen.twice[-1]
        spare = ground.total - nfe - sum(row > last for row in plan.front)
        return last if far and spare > 0 else onward
    repeats = nfe - len(nodes.rows) if rounds == nfe else 0  # a sketch at a wider window evaluated rows again, too
    if float(seen.again[-1]) > ground.unit * _FAR_OFF and repeats < plan.rows - _FEW and left > 2:
        return last
    if not 0 < repeats <= plan.rows - _FEW:
        return onward
    ahead = [at - last for at in ground.breaks if at > last + 1]
    return last + placed(even, ground.u[last:], left + 1, ahead, enough=2)[1]
