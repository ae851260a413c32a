"""Random numbers, all drawn before the run: image b's depend on the seed and on b alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import check_count


def draw(seed: int, batch: int, shape: Sequence[int], steps: int = 0) -> tuple[Tensor, Tensor]:
    """Unit normals for a run: the start ``[B, *shape]`` and one draw a step ``[steps, B, *shape]``, float32 on CPU.

    Image b has a generator of its own seeded from ``(seed, b)``, and its numbers are drawn in the order start,
    step 0, step 1, ..: neither the batch size nor the window, nor a longer run, changes them.

    Raises:
        ValueError: ``seed`` or ``steps`` is negative, or ``batch`` below 1.
    """
    check_count("seed", seed, low=0)
    check_count("batch", batch)
    check_count("steps", steps, low=0)
    images = []
    for b in range(batch):
        state = np.random.SeedSequence([seed, b]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        # one by one: the last numbers of a call depend on how many it draws
        drawn = [
            torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu") for _ in range(steps + 1)
        ]
        images.append(torch.stack(drawn))
    stacked = torch.stack(images, dim=1)
    return stacked[0], stacked[1:]
