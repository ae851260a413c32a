"""The demo network's training pictures: one shaded shape on a background, rendered from signed distances.

Everything is drawn from a :class:`torch.Generator`; no outside data is involved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt import BACKGROUNDS, CENTRE, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, VOCABULARY

SIDE = 32
#: RGB in [0, 1], in the order of ``COLOURS``.
PALETTE = torch.tensor(
    [
        [0.92, 0.14, 0.12],
        [0.12, 0.78, 0.22],
        [0.16, 0.30, 0.95],
        [0.96, 0.86, 0.12],
        [0.90, 0.16, 0.82],
        [0.96, 0.96, 0.96],
    ],
    device="cpu",
)


@dataclass(frozen=True)
class Batch:
    """Rendered pictures with what they show.

    Attributes:
        images: ``[B, 3, 32, 32]`` in [-1, 1].
        context: multi-hot attributes ``[B, V]``, each named with probability 0.85 (the prompt may leave any out).
        shape, colour: class indices ``[B]`` into ``SHAPES`` and ``COLOURS``.
    """

    images: Tensor
    context: Tensor
    shape: Tensor
    colour: Tensor


def _distance(shape: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of each picture's own shape; ``x, y`` are ``[B, N]``."""
    ax, ay, r = x.abs(), y.abs(), r[:, None]
    radius = (x * x + y * y).sqrt()
    side = 0.86 * r
    half = math.sqrt(3) / 2
    each = torch.stack(
        [
            radius - r,
            torch.maximum(ax, ay) - side,
            torch.maximum(ax * half + y * 0.5, -y) - 0.58 * r,  # an equilateral triangle, tip towards +y
            torch.maximum(torch.minimum(ax, ay) - 0.30 * r, torch.maximum(ax, ay) - r),
            (radius - 0.76 * r).abs() - 0.24 * r,
            (ax + ay - 1.15 * r) / math.sqrt(2),
        ]
    )
    return each.gather(0, shape[None, :, None].expand(1, -1, x.shape[1]))[0]


def render(count: int, generator: torch.Generator, mention: float = 0.85) -> Batch:
    """``count`` random pictures; each attribute enters ``context`` with probability ``mention``."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device="cpu") * (high - low) + low

    def pick(n: int) -> Tensor:
        return torch.randint(n, (count,), generator=generator, device="cpu")

    size, colour, shape = pick(2), pick(len(COLOURS)), pick(len(SHAPES))
    column, row, background = pick(3) - 1, pick(3) - 1, pick(2)
    r = torch.where(size == 0, uniform(5.0, 6.2), uniform(9.4, 11.2))
    r = r * torch.where(shape == SHAPES.index("triangle"), 1.04, 1.0)
    reach = torch.where(size == 0, 7.5, 3.2)
    middle = (SIDE - 1) / 2
    cx = middle + column * reach + uniform(-1.2, 1.2)
    cy = middle + row * reach + uniform(-1.2, 1.2)
    angle = uniform(-0.16, 0.16)

    grid = torch.arange(SIDE, dtype=torch.float32, device="cpu")
    gy, gx = (g.reshape(1, -1) for g in torch.meshgrid(grid, grid, indexing="ij"))
    dx, dy = gx - cx[:, None], gy - cy[:, None]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    inside = _distance(shape, cos * dx + sin * dy, -(cos * dy - sin * dx), r)
    coverage = (0.5 - inside).clamp(0, 1)

    # a gentle slope of light over the shape and over the background keeps the data continuous
    slope = uniform(-0.10, 0.10, 2)
    light = 1 + (dx * slope[:, :1] + dy * slope[:, 1:]) / r[:, None] - uniform(0.0, 0.10)[:, None]
    paint = PALETTE[colour] * (1 + uniform(-0.08, 0.08, 3))
    tint = uniform(-0.03, 0.03, 3)
    base = torch.where(background == 0, uniform(0.06, 0.16), uniform(0.40, 0.50))
    tilt = uniform(-0.05, 0.05, 2)
    ground = (gx - middle) / middle * tilt[:, :1] + (gy - middle) / middle * tilt[:, 1:]
    ground = (base[:, None] + ground)[:, None, :] + tint[:, :, None]
    picture = torch.lerp(ground, paint[:, :, None] * light[:, None, :], coverage[:, None, :])
    images = (picture.clamp(0, 1) * 2 - 1).reshape(count, 3, SIDE, SIDE)

    context = torch.zeros(count, len(VOCABULARY), device="cpu")

    def name(words: tuple[str, ...], index: Tensor, where: Tensor | None = None) -> None:
        mentioned = torch.rand(count, generator=generator, device="cpu") < mention
        mentioned = mentioned if where is None else mentioned & where
        rows = mentioned.nonzero()[:, 0]
        context[rows, index[rows] + VOCABULARY.index(words[0])] = 1.0

    name(SIZES, size)
    name(COLOURS, colour)
    name(SHAPES, shape)
    centred = (column == 0) & (row == 0)
    name(COLUMNS, (column > 0).long(), column != 0)
    name(ROWS, (row > 0).long(), row != 0)
    name(CENTRE, torch.zeros_like(column), centred)
    name(BACKGROUNDS, background)
    return Batch(images, context, shape, colour)
