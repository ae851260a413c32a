"""Generators of random numbers that a run draws from: where they stand, and how they are put back there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reach import reachable

PutBack = Callable[[], None]


def random_numbers(x: Tensor, *holders: Any) -> PutBack:
    """Where the generators stand now; the returned function puts them back there.

    Args:
        x: on the device whose generator counts, beside the CPU's, Python's and numpy's.
        holders: functions, their options and other objects that may keep a ``torch.Generator`` of their own.
    """
    cpu, python, legacy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    kind = x.device.type
    backend: Any = None if kind == "cpu" else getattr(torch, kind, None)  # torch.cuda, torch.mps, torch.xpu ..
    which = () if kind == "mps" else (x.device,)  # of which there is one
    device = backend.get_rng_state(*which) if hasattr(backend, "get_rng_state") else None
    own = [(found, found.get_state()) for found in reachable(*holders) if isinstance(found, torch.Generator)]

    def put_back() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(legacy)
        if device is not None:
            backend.set_rng_state(device, *which)
        for generator, state in own:
            generator.set_state(state)

    return put_back


@contextmanager
def same_random_numbers(x: Tensor, *holders: Any) -> Iterator[None]:
    """Leave the generators as they were, so that the sampler draws what it would have drawn."""
    put_back = random_numbers(x, *holders)
    try:
        yield
    finally:
        put_back()
