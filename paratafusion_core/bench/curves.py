"""Plots of a grid's runs, drawn with Pillow: rounds against steps, and the picture's PSNR after each round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from ..plots import FAINT, INK, PAPER
from .journal import Row
from .table import CAP_DB, grouped, mean

_COLOURS = ((46, 125, 120), (186, 50, 79), (232, 148, 64), (90, 90, 160), (120, 120, 120))
Line = tuple[str, list[tuple[float, float]]]


def plots(rows: Sequence[Row]) -> Iterator[tuple[str, Image.Image]]:
    """Named plots of each model's DDIM runs at CFG 4, as far as ``rows`` holds them."""
    for (model,), runs in grouped(rows, ("model",)).items():
        ddim = [r for r in runs if (r["sampler"], r["cfg"], r["preset"]) == ("ddim", 4.0, "balanced")]
        ddim = [r for r in ddim if r["solver"] != "collocation"]
        against = _against_steps([r for r in ddim if r["window"] == "full"])
        if any(len(points) > 1 for _, points in against):
            yield f"{model}-rounds", chart(f"{model}, DDIM, CFG 4, full window: mean rounds", "steps", against)
        curves = _per_round([r for r in ddim if (r["steps"], r["window"]) == (50, 16)])
        if curves:
            title = f"{model}, DDIM-50, CFG 4, window 16: mean PSNR dB of the picture shown"
            yield f"{model}-psnr", chart(title, "round", curves)


def _against_steps(rows: Sequence[Row]) -> list[Line]:
    lines: list[Line] = []
    for (solver,), runs in grouped(rows, ("solver",)).items():
        points = [(float(k), mean(r["rounds"] for r in some)) for (k,), some in grouped(runs, ("steps",)).items()]
        lines.append((solver, sorted(points)))
    return lines


def _per_round(rows: Sequence[Row]) -> list[Line]:
    """A run that has ended keeps its last picture."""
    lines: list[Line] = []
    for (solver,), runs in grouped(rows, ("solver",)).items():
        shown = [[CAP_DB if v is None else min(v, CAP_DB) for v in r["psnr_per_round"]] for r in runs]
        longest = max(map(len, shown))
        lines.append((solver, [(n + 1.0, mean(s[min(n, len(s) - 1)] for s in shown)) for n in range(longest)]))
    return lines


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the range, about six."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / 5))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 7)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title: str, across: str, lines: Sequence[Line], size: tuple[int, int] = (760, 420)) -> Image.Image:
    """Named polylines on common axes, the vertical one from 0."""
    width, height = size
    left, right, top, bottom = 56, 20, 64, 44
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    points = [p for _, line in lines for p in line]
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(0.0, min(p[1] for p in points)), max(p[1] for p in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across_part, up = (x - x0) / max(x1 - x0, 1e-9), (y - y0) / max(y1 - y0, 1e-9)
        return left + across_part * (width - left - right), height - bottom - up * (height - top - bottom)

    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((left, 12), title, INK, font)
    for y in _ticks(y0, y1):
        draw.line((place(x0, y), place(x1, y)), fill=FAINT)
        draw.text((left - 8, place(x0, y)[1]), f"{y:g}", INK, small, anchor="rm")
    for x in _ticks(x0, x1):
        draw.text((place(x, y0)[0], height - bottom + 8), f"{x:g}", INK, small, anchor="ma")
    draw.text((width - right, height - 18), across, INK, small, anchor="ra")
    where = float(left)
    for (name, line), colour in zip(lines, _COLOURS * (1 + len(lines) // len(_COLOURS)), strict=False):
        draw.line([place(*p) for p in line], fill=colour, width=2)
        for p in line:
            x, y = place(*p)
            draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=colour)
        draw.rectangle((where, 40, where + 12, 52), fill=colour)
        draw.text((where + 18, 39), name, INK, small)
        where += 40 + draw.textlength(name, small)
    return image
