"""Generators of random numbers that a run draws from: where they stand, and how they are put back there."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reach import reachable

PutBack = Callable[[], None]
#: ``{generator: (its setter, its state)}``
States = dict[Hashable, tuple[Callable[[Tensor], Any], Tensor]]


def states(x: Tensor, *holders: Any) -> States:
    """Where torch's generators stand now.

    Args:
        x: on the device whose generator counts, beside the CPU's.
        holders: functions, their options and other objects that may keep a ``torch.Generator`` of their own.
    """
    found: States = {"cpu": (torch.set_rng_state, torch.get_rng_state())}
    kind = x.device.type
    backend: Any = None if kind == "cpu" else getattr(torch, kind, None)  # torch.cuda, torch.mps, torch.xpu ..
    if hasattr(backend, "get_rng_state"):
        if kind == "mps":  # of which there is one
            found[kind] = backend.set_rng_state, backend.get_rng_state()
        else:
            found[kind] = partial(backend.set_rng_state, device=x.device), backend.get_rng_state(x.device)
    for own in reachable(*holders):
        if isinstance(own, torch.Generator):
            found[id(own)] = own.set_state, own.get_state()
    return found


def random_numbers(x: Tensor, *holders: Any) -> PutBack:
    """The returned function puts torch's generators back to where they stand now."""
    return partial(_set, states(x, *holders))


def moved(since: States, x: Tensor, *holders: Any) -> PutBack:
    """As :func:`random_numbers`, for those that have moved ``since`` then."""
    now = states(x, *holders)
    return partial(_set, {k: v for k, v in now.items() if k not in since or not torch.equal(v[1], since[k][1])})


@contextmanager
def same_random_numbers(x: Tensor, *holders: Any) -> Iterator[States]:
    """Leave all generators as they were, so that the sampler draws what it would have drawn; gives torch's states."""
    before, python, legacy = states(x, *holders), random.getstate(), np.random.get_state()
    try:
        yield before
    finally:
        _set(before)
        random.setstate(python)
        np.random.set_state(legacy)


def _set(found: States) -> None:
    for setter, state in found.values():
        setter(state)
