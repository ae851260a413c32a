"""Draws the registry's icon and banner, ``web/assets/icon.png`` and ``banner.png``: a run's convergence, by formula.

    python tests/web/draw_assets.py

Rounds go down, steps go across; green steps are final, warm ones are being solved, the redder the further from it.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).resolve().parents[2] / "web" / "assets"
#: The registry shows icons up to 400 pixels square, and banners of 21:9.
ICON, BANNER = (400, 400), (1260, 540)
PAPER, EMPTY, FINAL = (24, 27, 33), (44, 49, 58), (52, 168, 148)
HOT = ((250, 236, 176), (246, 190, 92), (232, 118, 64), (186, 50, 79))
INK, SOFT = (238, 240, 242), (160, 170, 180)
COLOURS = 64


def cell(round_: int, step: int, rounds: int, steps: int, window: int) -> tuple[int, int, int]:
    """Colour of a step in a round, ``rounds`` freezing ``steps`` evenly with ``window`` of them in work."""
    frozen = round(round_ * steps / rounds)
    if step < frozen:
        return FINAL
    ahead = step - frozen
    return HOT[min(ahead * len(HOT) // window, len(HOT) - 1)] if ahead < window else EMPTY


def staircase(size: tuple[int, int], rounds: int, steps: int, window: int) -> Image.Image:
    """The map of a run: ``rounds`` lines of ``steps`` rounded cells."""
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    wide, high = size[0] / steps, size[1] / rounds
    gap = min(wide, high) * 0.14
    for n in range(rounds):
        for i in range(steps):
            box = (i * wide + gap, n * high + gap, (i + 1) * wide - gap, (n + 1) * high - gap)
            draw.rounded_rectangle(box, radius=min(wide, high) * 0.18, fill=cell(n, i, rounds, steps, window))
    return image


def icon() -> Image.Image:
    """Seven rounds of seven steps; drawn large, so that its edges are smooth."""
    image = Image.new("RGB", (ICON[0] * 4, ICON[1] * 4), PAPER)
    image.paste(staircase((1376, 1376), 7, 7, 3), (112, 112))
    return image.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The name beside a run of 17 steps in 9 rounds."""
    image = Image.new("RGB", BANNER, PAPER)
    steps = staircase((680 * 2, 360 * 2), 9, 17, 5).resize((680, 360), Image.Resampling.LANCZOS)
    image.paste(steps, (530, 90))
    draw = ImageDraw.Draw(image)
    draw.text((60, 176), "ParaTAFusion", INK, ImageFont.load_default(66))
    for i, line in enumerate(("The sampler that you chose,", "its steps solved together.")):
        draw.text((62, 278 + 36 * i), line, SOFT, ImageFont.load_default(27))
    return image


def main() -> None:
    """Write both pictures."""
    for name, image in (("icon", icon()), ("banner", banner())):
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(TARGET / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
