"""Pictures of tensors and of a run's convergence, drawn with Pillow (which ComfyUI brings)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import replacing
from .report import Report

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER, INK, FAINT = (250, 250, 248), (40, 40, 44), (214, 214, 210)
GREY, ALARM = (112, 112, 116), (158, 30, 40)
#: Residual far above the tolerance .. at it; rows that froze have a colour of their own.
_HOT = [(94, 24, 72), (186, 50, 79), (232, 118, 64), (246, 190, 92), (250, 236, 176)]
FROZEN = (46, 125, 120)
#: Stands in for the tolerance 0 of an exact run.
_SMALLEST = 1e-6


def picture(x: Tensor, scale: int = 8) -> Image.Image:
    """Images ``[B, C, H, W]`` side by side, enlarged by whole pixels; [-1, 1] for one or three channels.

    Other shapes (latents, closed-form problems) are folded to a grey plane in the range of their own values.
    """
    x = x.detach().to("cpu", torch.float32)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        flat = x.reshape(len(x), -1)
        width = math.ceil(math.sqrt(flat.shape[1]))
        plane = flat.new_zeros(len(flat), width * width)
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


@dataclass(frozen=True)
class _Line:
    """A line of the map: each cell is a residual, or FINAL, or OPEN where nothing was evaluated yet."""

    label: str
    cells: list[float | str]
    rows: float | None


FINAL, OPEN = "final", "open"
#: Of the map; longer runs are shown by groups of steps and rounds.
_CELLS, _LINES = 260, 36


def convergence(report: Report, previews: Sequence[Tensor] = (), width: int = 960) -> Image.Image:
    """What a run did: its figures and remarks, the picture after each round, and a map of rounds (down) by steps.

    A cell is a row that was evaluated in that round: the darker, the further its state was from its solution; a line
    runs through rows that are final. Bars on the right count the rows of each round. Previews are ``[B, C, H, W]``; the
    first of the batch is shown.

    Args:
        report: of any run, also of a sequential one.
        previews: the picture after each round, or nothing.
        width: of the image, at least 480 pixels.
    """
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    left, right = 104, 150
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    title = _wrapped(pen, headline(report), font, width - 48)
    said = [(name, _wrapped(pen, text, small, width - left - 24)) for name, text in remarks(report)]
    told = [(name, line, name if n == 0 else "") for name, lines in said for n, line in enumerate(lines)]
    strip = _strip(previews, width - left - 24, 12, small)
    lines = _map(report)
    cell_h = max(9, min(24, 380 // len(lines)))
    notes_top = 18 + 24 * len(title)
    strip_top = notes_top + 20 * len(told) + 14
    map_top = strip_top + (strip.height + 18 if strip else 0) + 20
    foot = map_top + cell_h * len(lines) + 6
    image = Image.new("RGB", (width, foot + (70 if len(lines) > 1 else 34)), PAPER)
    draw = ImageDraw.Draw(image)
    for n, line in enumerate(title):
        draw.text((24, 14 + 24 * n), line, INK, font)
    for n, (name, line, label) in enumerate(told):
        draw.text((left - 10, notes_top + 20 * n), label, GREY, small, anchor="ra")
        draw.text((left, notes_top + 20 * n), line, ALARM if name in _ALARMING else INK, small)
    if strip:
        image.paste(strip, (left, strip_top))
    _draw_map(draw, lines, report, (left, map_top, width - right, cell_h), small)
    draw.text((left, foot), "first step: noise", GREY, small)
    draw.text((width - right, foot), "last step: picture", GREY, small, anchor="ra")
    if len(lines) > 1:
        _legend(draw, left, foot + 34, report.tolerance, small)
    return image


def headline(report: Report) -> str:
    """A run in one line."""
    K, rounds = report.sequential_nfe, report.rounds
    done = f"{report.sampler}, {report.steps} step{'s' * (report.steps != 1)}"
    if K == 0:
        return f"{report.sampler}: nothing to do"
    if report.fallback is not None or report.solver == "sequential":
        return f"{done}: {rounds} model call{'s' * (rounds != 1)}, one by one"
    return f"{done}: {rounds} model call{'s' * (rounds != 1)} instead of {K}"


_ALARMING = ("doubt", "one by one", "stopped")


def remarks(report: Report) -> list[tuple[str, str]]:
    """What else there is to say of a run: a word and a sentence each, the most urgent first."""
    K, found = report.sequential_nfe, list[tuple[str, str]]()
    if report.fallback is not None:
        found.append(("one by one", report.fallback))
    if report.doubt is not None:
        found.append(("doubt", report.doubt))
    if report.status == "max_rounds":
        final = report.frozen_per_round[-1] if report.frozen_per_round else 0
        so_far = f"{final} of {K} rows are final, " if report.solver != "collocation" else ""
        rounds = f"{report.rounds} round{'s' * (report.rounds != 1)}"
        text = f"after {rounds}, as asked: {so_far}the picture is a sketch"
        found.append(("stopped", text))
    if report.psnr_db is not None and report.max_abs is not None:
        psnr = "equal" if report.max_abs == 0 else f"{report.psnr_db:.1f} dB, largest difference {report.max_abs:.2g}"
        found.append(("fidelity", f"{psnr}, measured against the sequential picture"))
    if report.estimated_db is not None:
        asked = "" if report.target_db is None else f", {report.target_db:.0f} dB asked for"
        found.append(("fidelity", f"{report.estimated_db:.1f} dB estimated{asked}"))
    if report.warm is not None:
        found.append(("warm start", report.warm))
    if report.plan is not None:
        found.append(("plan", report.plan))
    if K and report.fallback is None and report.solver != "sequential":
        rows = f"{report.nfe} row{'s' * (report.nfe != 1)} evaluated"
        how = f"{rows}, {report.nfe / K:.2f} times as many as one by one"
        tolerance = "" if report.solver == "collocation" else f", {report.preset}, tolerance {report.tolerance:g}"
        found.append(("cost", f"{how}; {report.solver}{tolerance}"))
    clock = f"{report.seconds:.2f} s, of which the model {report.model_seconds:.2f} s"
    predicted = None if report.solver == "sequential" else report.predicted_speedup
    for speed, kind in ((report.measured_speedup, "measured"), (predicted, "predicted")):
        clock += "" if speed is None else f"; {speed:.2f} times as fast as one by one ({kind})"
    return [*found, ("time", clock)]


def _map(report: Report) -> list[_Line]:
    """Lines for the rounds and one for the end; a single one where rounds have left no residuals."""
    K, rounds = report.sequential_nfe, report.rounds
    across, down = max(math.ceil(K / _CELLS), 1), max(math.ceil(rounds / _LINES), 1)
    lines: list[_Line] = []
    if len(report.residuals) == len(report.frozen_per_round) == rounds:
        for n in sorted({*range(down - 1, rounds, down), rounds - 1} - {-1}):
            recent = report.rows_per_round[max(n + 1 - down, 0) : n + 1]
            lines.append(_Line(f"{n + 1}", _pooled(_cells(report, n), across), sum(recent) / len(recent)))
    final = report.frozen_per_round[-1] if lines else K
    end: list[float | str] = [FINAL if i < final else OPEN for i in range(K)]
    return [*lines, _Line("end", _pooled(end, across), None)]


def _cells(report: Report, n: int) -> list[float | str]:
    """Of one round, a cell a row."""
    before, after = report.frozen_per_round[n - 1] if n else 0, report.frozen_per_round[n]
    cells: list[float | str] = [FINAL if i < before else OPEN for i in range(report.sequential_nfe)]
    first, residual = report.residuals[n]
    for i, value in enumerate(residual, first):
        # a round that looks at some rows again has no number for the others
        cells[i] = (FINAL if i < after else OPEN) if math.isnan(value) else value
    return cells


def _pooled(cells: list[float | str], across: int) -> list[float | str]:
    """Groups of ``across`` cells: the worst residual of each, or what all of them are."""
    pooled: list[float | str] = []
    for start in range(0, len(cells), across):
        group = cells[start : start + across]
        numbers = [c for c in group if not isinstance(c, str)]
        pooled.append(max(numbers) if numbers else FINAL if set(group) == {FINAL} else OPEN)
    return pooled


def _draw_map(
    draw: ImageDraw.ImageDraw, lines: list[_Line], report: Report, box: tuple[int, int, int, int], font: _Font
) -> None:
    """Cells, round numbers on the left, bars of rows on the right; ``box`` is left, top, right, line height."""
    left, top, right, height = box
    most = max([line.rows or 0.0 for line in lines] + [1.0])
    every = math.ceil(16 / height)  # labels that do not touch
    if len(lines) > 1:
        draw.text((left - 10, top - 4), "round", GREY, font, anchor="rb")
        draw.text((right + 12, top - 4), "rows", GREY, font, anchor="lb")
    for n, line in enumerate(lines):
        y, count = top + n * height, max(len(line.cells), 1)
        for i, cell in enumerate(line.cells):
            x0, x1 = (left + round(k * (right - left) / count) for k in (i, i + 1))
            _draw_cell(draw, (x0, y, max(x1 - (2 if x1 - x0 > 5 else 1), x0), y + height - 2), cell, report.tolerance)
        if line.label == "end" or (n % every == 0 and n + every < len(lines)):
            draw.text((left - 10, y + height / 2 - 1), line.label, INK, font, anchor="rm")
        if line.rows is not None:
            end = right + 12 + 80 * line.rows / most
            draw.rectangle((right + 12, y + height / 4, end, y + 3 * height / 4 - 1), fill=GREY)
            if n % every == 0 and n + every < len(lines):
                draw.text((end + 6, y + height / 2 - 1), f"{line.rows:.0f}", INK, font, anchor="lm")


def _draw_cell(
    draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], cell: float | str, tolerance: float
) -> None:
    x0, y0, x1, y1 = box
    if cell == OPEN:
        if x1 - x0 > 5:
            draw.rectangle(box, outline=FAINT)
        else:  # outlines that close together would be a grey plane
            draw.line((x0, y1, x1 + 1, y1), fill=FAINT)
        return
    draw.rectangle(box, fill=FROZEN if isinstance(cell, str) else _heat(cell, tolerance))
    if cell == FINAL:  # told apart without its colour
        draw.line((x0, (y0 + y1) // 2, x1, (y0 + y1) // 2), fill=PAPER, width=2)


def _heat(residual: float, tolerance: float) -> tuple[int, int, int]:
    """Colour by decades above the tolerance: pale at it, dark red three decades above."""
    floor = max(tolerance, _SMALLEST)
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
    side = min((width - gap * (count - 1)) // count, 160)
    image = Image.new("RGB", (width, side + 24), PAPER)
    draw = ImageDraw.Draw(image)
    for place, index in enumerate(chosen):
        tile = picture(previews[index][:1], 1).resize((side, side), Image.Resampling.NEAREST)
        x = place * (side + gap)
        image.paste(tile, (x, 0))
        draw.text((x + side / 2, side + 6), f"round {index + 1}", INK, font, anchor="ma")
    return image


def _wrapped(pen: ImageDraw.ImageDraw, text: str, font: _Font, width: float) -> list[str]:
    """Lines of at most ``width`` pixels, of at most three; words longer than a line are cut."""
    lines, line = list[str](), ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font) > width:
            lines.append(line)
            line = word
        else:
            line = longer
        if pen.textlength(line, font) > width:
            fits = bisect_left(range(len(line)), True, key=lambda n: pen.textlength(line[:n] + "..", font) > width)
            line = line[: max(fits - 1, 0)] + ".."
    lines.append(line)
    return lines if len(lines) <= 3 else [*lines[:2], lines[2] + " .."]


def _legend(draw: ImageDraw.ImageDraw, x: float, y: float, tolerance: float, font: _Font) -> None:
    floor = max(tolerance, _SMALLEST)
    unit = "tolerance" if tolerance > 0 else f"{_SMALLEST:g}"
    for cell, text in (
        (1000 * floor, f"1000 x {unit} or more"),
        (31.6 * floor, "30 x"),
        (floor, f"at {unit}"),
        (FINAL, "final"),
        (OPEN, "not evaluated"),
    ):
        _draw_cell(draw, (x, y, x + 26, y + 16), cell, tolerance)
        draw.text((x + 34, y), text, INK, font)
        x += 58 + draw.textlength(text, font)
