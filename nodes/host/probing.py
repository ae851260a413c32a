"""A look at a model that nothing is known of: what its calls do to the pictures in them, and to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ...paratafusion_core.denoisers import Denoise
from ...paratafusion_core.errors import NotFinite

#: Rows that do not touch each other agree to this, relative to the largest value; rows that do are off by 3e-2 or more.
INDEPENDENT_WITHIN = 1e-2
#: Noise levels that the probe tries, if there are as many. Each is first in a call once, so that what acts in a band of
#: a quarter of the evaluations, by the first level of a batch, is seen.
_TRIED = 5
#: Rows that it evaluates then, and in how many calls.
PROBED, PROBES = 2 * _TRIED + 4, _TRIED + 2
#: Rows that :func:`probe_alone` evaluates.
PROBED_ALONE = 10

REMEMBERS = "this model or one of its patches remembers the call before, or draws random numbers"
MIXES = "the pictures of a batch influence each other in this model or one of its patches"


def probe(denoise: Denoise, x: Tensor, sigmas: Tensor) -> str | None:
    """What speaks against evaluating several levels in one batch, ``REMEMBERS`` or ``MIXES``, or None.

    That is where a row's result depends on the other rows of its batch, on its place in it or on their noise levels, or
    a call on the one before. States of up to ``_TRIED`` levels, the real first one and others, form a ring: each stands
    in front of the next in a call of two, and behind the one before. A model that mixes them, or takes one level for
    all, its first row's or the largest, answers differently. Another call is made twice, once right behind one of
    states nearby and once behind a distant one: a step cache answers the first from what it has. What keeps rows and
    calls apart agrees.

    Args:
        denoise: the batched model call.
        x: a noisy state ``[B, ...]`` of the first level.
        sigmas: ``[K]`` noise levels of evaluations that may share a call.

    Raises:
        NotFinite: the model is not, and nothing can be told.
    """
    levels = _tried(sigmas)
    count, states = len(levels), _states(x, len(levels))

    def pair(place: int) -> tuple[Tensor, Tensor]:
        both = [place, (place + 1) % count]
        return torch.stack([states[i] for i in both]), levels[both].to(sigmas)

    # the first call is one of the run's own first level: a patch may keep what it meets first
    late = count - 2
    first, *others = (i for i in range(count) if i != late)
    x_late, at = pair(late)
    nearby = _nearby(x_late)
    ring = {first: denoise(*pair(first)), late: denoise(x_late, at)}
    soon = denoise(nearby, at)
    *others, distant = others  # the last level together with the first
    ring[distant] = denoise(*pair(distant))
    later = denoise(nearby, at)
    ring |= {place: denoise(*pair(place)) for place in others}
    _check_finite(*ring.values(), soon, later)
    if _differ(soon, later):
        return REMEMBERS
    return MIXES if any(_differ(ring[i][0], ring[i - 1 if i else count - 1][1]) for i in range(count)) else None


def probe_alone(denoise: Denoise, x: Tensor, sigmas: Tensor) -> str | None:
    """What speaks against leaving out evaluations, ``REMEMBERS``, or None: calls are of one level each.

    At both ends of the run a call is made right behind one of states nearby and behind a distant one, and one at the
    next lower level behind these and behind itself: what begins anew where the noise rises shows there.

    Args and errors are those of :func:`probe`.
    """
    levels = _tried(sigmas)
    states = _states(x, len(levels))

    def one(place: int, aside: bool = False) -> Tensor:
        state = states[place][None]
        return denoise(_nearby(state) if aside else state, levels[[place]].to(sigmas))

    pairs: list[tuple[Tensor, Tensor]] = []
    behind_near: list[tuple[int, Tensor]] = []
    for place in (0, len(levels) - 2):
        one(place)
        behind_near.append((place, one(place, aside=True)))
        pairs.append((one(place + 1), one(place + 1)))
    pairs += [(soon, one(place, aside=True)) for place, soon in reversed(behind_near)]
    _check_finite(*(D for pair in pairs for D in pair))
    return REMEMBERS if any(_differ(a, b) for a, b in pairs) else None


def probe_two(denoise: Denoise, x: Tensor, sigmas: Tensor) -> str | None:
    """As :func:`probe`, ``MIXES`` or None, of a model that has passed it at other levels: states of the first and the
    last of these stand in front of each other once each."""
    levels, states = sigmas[[0, -1]], torch.stack(_states(x, 2))
    forth, back = denoise(states, levels), denoise(states.flip(0), levels.flip(0)).flip(0)
    _check_finite(forth, back)
    return MIXES if _differ(forth[0], back[0]) or _differ(forth[1], back[1]) else None


def _states(x: Tensor, count: int) -> list[Tensor]:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    return [(1 - 0.9 * part) * x + 0.2 * part * noise for part in torch.linspace(0, 1, count).tolist()]


def _nearby(x: Tensor) -> Tensor:
    return x + 0.08 * x.roll(1, -1)


def _tried(sigmas: Tensor) -> Tensor:
    """``[3..5]`` the levels that the probe tries, spread over the different ones among ``sigmas``.

    Where there are two the second stands twice: in a ring of two each state would have the same companion both times.
    """
    found = list(dict.fromkeys(sigmas.tolist()))
    count = max(min(len(found), _TRIED), 3)
    return torch.tensor([found[-(-i * (len(found) - 1) // (count - 1))] for i in range(count)], dtype=torch.float64)


def _check_finite(*results: Tensor) -> None:
    if not all(bool(D.isfinite().all()) for D in results):
        raise NotFinite("the model returned NaN or infinity in the probe; finite values are allowed")


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same rows are further apart than kernels explain."""
    return bool((a - b).abs().max() > INDEPENDENT_WITHIN * a.abs().max().clamp_min(1e-12))
