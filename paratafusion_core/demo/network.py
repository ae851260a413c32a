"""The demo network: a small v-prediction U-Net on 32x32 RGB, conditioned on a multi-hot prompt."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .prompt import VOCABULARY


class _Residual(nn.Module):
    """Two 3x3 convolutions with group norms; the embedding scales and shifts between them."""

    def __init__(self, inner: int, outer: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.film = nn.Linear(emb, 2 * outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class _Attention(nn.Module):
    """Self-attention over all positions."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(b, c, height, width))


class DemoNet(nn.Module):
    """Predicts v = alpha eps - sigma x0 (VP) from a noisy picture, the timestep and a prompt.

    Call with ``x`` [B, 3, 32, 32] (VP-scaled, rms about 1), ``timestep`` [B] in [0, 999] (fractions allowed) and
    ``context`` [B, V], the multi-hot prompt of :func:`prompt.encode` (zeros: unconditional). Returns v like ``x``.
    Every picture of a batch is treated by itself, so pictures at different timesteps may share a call.
    """

    def __init__(self, width: int = 64, deep: int = 96, emb: int = 192) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(500), 32)), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.text = nn.Sequential(nn.Linear(len(VOCABULARY), emb), nn.SiLU(), nn.Linear(emb, emb))
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.down0 = _Residual(width, width, emb)
        self.shrink = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.down1, self.down2 = _Residual(deep, deep, emb), _Residual(deep, deep, emb)
        self.look1, self.middle, self.look2 = _Attention(deep), _Residual(deep, deep, emb), _Attention(deep)
        self.up2, self.up1 = _Residual(2 * deep, deep, emb), _Residual(2 * deep, deep, emb)
        self.grow = nn.Conv2d(deep, width, 3, padding=1)
        self.up0, self.last = _Residual(2 * width, width, emb), _Residual(width, width, emb)
        self.norm, self.head = nn.GroupNorm(8, width), nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        angle = (timestep.float() / 1000)[:, None] * self.frequencies.float()
        wave = torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype)
        emb = F.silu(self.time(wave) + self.text(context.to(x.dtype)))
        h0 = self.down0(self.stem(F.pixel_unshuffle(x, 2)), emb)
        h1 = self.down1(self.shrink(h0), emb)
        h2 = self.look1(self.down2(h1, emb))
        h = self.look2(self.middle(h2, emb))
        h = self.up2(torch.cat([h, h2], 1), emb)
        h = self.up1(torch.cat([h, h1], 1), emb)
        h = self.grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.last(self.up0(torch.cat([h, h0], 1), emb), emb)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)
