"""Pictures of tensors and of a run's convergence, drawn with Pillow (which ComfyUI brings)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import replacing
from .report import Report

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER, INK, FAINT = (250, 250, 248), (40, 40, 44), (214, 214, 210)
#: Residual far above the tolerance .. at it; rows that froze have a colour of their own.
_HOT = [(94, 24, 72), (186, 50, 79), (232, 118, 64), (246, 190, 92), (250, 236, 176)]
FROZEN = (46, 125, 120)


def picture(x: Tensor, scale: int = 8) -> Image.Image:
    """Images ``[B, C, H, W]`` side by side, enlarged by whole pixels; [-1, 1] for one or three channels.

    Other shapes (latents, closed-form problems) are folded to a grey plane in the range of their own values.
    """
    x = x.detach().to("cpu", torch.float32)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        flat = x.flatten(1)
        width = math.ceil(math.sqrt(flat.shape[1]))
        plane = torch.zeros(len(flat), width * width)
        plane[:, : flat.shape[1]] = flat
        x = (plane / flat.abs().amax(1, keepdim=True).clamp(min=1e-12)).reshape(-1, 1, width, width)
    rgb = ((x.expand(-1, 3, -1, -1).clamp(-1, 1) + 1) * 127.5).round().byte()
    row = torch.cat(list(rgb.permute(0, 2, 3, 1)), dim=1)
    image = Image.fromarray(row.contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all."""
    with replacing(path) as scratch:
        image.save(scratch, format="PNG")


def convergence(report: Report, previews: Sequence[Tensor] = (), width: int = 960) -> Image.Image:
    """The full picture after each round, above a map of rounds (down) by steps (across).

    A cell is a row that was evaluated in that round: the redder, the further its state was from its solution; green
    rows are final. Previews are ``[B, C, H, W]``; the first of the batch is shown.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    left, right, gap = 64, 24, 12
    K, rounds = report.sequential_nfe, report.rounds
    cell_w = (width - left - right) / K
    cell_h = max(10, min(22, 360 // max(rounds, 1)))
    strip = _strip(previews, width - left - right, gap, small)
    top = 44
    map_top = top + (strip.height + 3 * gap if strip else 0)
    height = map_top + rounds * cell_h + 64
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    title = f"{report.sampler}, {K} evaluations one by one, or {rounds} rounds ({report.solver}, {report.preset})"
    draw.text((left, 12), title, INK, font)
    if strip:
        image.paste(strip, (left, top))
    frozen = 0
    for n, (first, residual) in enumerate(report.residuals):
        y = map_top + n * cell_h
        for i in range(K):
            if i < frozen:
                colour: tuple[int, int, int] | None = FROZEN
            elif first <= i < first + len(residual):
                colour = _heat(residual[i - first], report.tolerance)
            else:
                colour = None
            box = (left + i * cell_w, y, left + (i + 1) * cell_w - 1, y + cell_h - 2)
            if colour:
                draw.rectangle(box, fill=colour)
            else:
                draw.rectangle(box, outline=FAINT)
        draw.text((left - 10, y + cell_h / 2), str(n + 1), INK, small, anchor="rm")
        frozen = report.frozen_per_round[n]
    foot = map_top + rounds * cell_h + 8
    draw.text((left, foot), "noise", INK, small)
    draw.text((width - right, foot), "picture", INK, small, anchor="ra")
    draw.text((width / 2, foot), "steps", INK, small, anchor="ma")
    draw.text((left - 10, map_top - 14), "round", INK, small, anchor="rm")
    _legend(draw, left, foot + 26, small)
    return image


def _heat(residual: float, tolerance: float) -> tuple[int, int, int]:
    """Colour by decades above the tolerance: pale at it, dark red three decades above."""
    floor = max(tolerance, 1e-6)
    decades = 3.0 if not math.isfinite(residual) else math.log10(max(residual, floor) / floor)
    place = (1 - min(decades / 3, 1)) * (len(_HOT) - 1)
    low = min(int(place), len(_HOT) - 2)
    a, b, t = _HOT[low], _HOT[low + 1], place - low
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def _strip(previews: Sequence[Tensor], width: int, gap: int, font: _Font) -> Image.Image | None:
    """The previews in a line (about 10 of them, the first and the last among them), with their rounds below."""
    if not previews:
        return None
    count = min(len(previews), 10)
    chosen = sorted({round(i * (len(previews) - 1) / max(count - 1, 1)) for i in range(count)})
    side = (width - gap * (count - 1)) // count
    image = Image.new("RGB", (width, side + 22), PAPER)
    draw = ImageDraw.Draw(image)
    for place, index in enumerate(chosen):
        tile = picture(previews[index][:1], 1).resize((side, side), Image.Resampling.NEAREST)
        x = place * (side + gap)
        image.paste(tile, (x, 0))
        draw.text((x + side / 2, side + 6), f"round {index + 1}", INK, font, anchor="ma")
    return image


def _legend(draw: ImageDraw.ImageDraw, x: float, y: float, font: _Font) -> None:
    for colour, text in (
        (_HOT[0], "1000 x tolerance or more"),
        (_HOT[2], "30 x"),
        (_HOT[4], "at tolerance"),
        (FROZEN, "final"),
        (None, "not evaluated yet"),
    ):
        draw.rectangle((x, y, x + 14, y + 14), fill=colour, outline=FAINT)
        draw.text((x + 20, y + 1), text, INK, font)
        x += 46 + draw.textlength(text, font)
