"""The gate of the embedded weights: a classifier that knows only rendered pictures reads the generated ones.

``python -m paratafusion_core.demo.gate`` trains the classifier, draws pictures of every size, colour and shape (DDIM,
50 steps, CFG 4) and prints how many show the shape and the colour that was asked for. Exit code 0 at 95 % or more of
both, 1 below, 2 where it cannot judge.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import schemes
from ..denoisers import from_network, guided
from ..errors import check_count
from ..noise import draw
from ..options import Options
from ..plots import picture, save_png
from ..schedules import normal
from ..solve import solve
from . import model
from .network import DemoNet
from .prompt import COLOURS, SHAPES, SIZES, encode
from .shapes import PALETTE, Batch, render

PASS = 0.95
#: Held-out rendered accuracy below which the classifier may not judge.
TRUST = 0.99
STEPS, CFG = 50, 4.0
COMBINATIONS = list(itertools.product(range(len(SIZES)), range(len(COLOURS)), range(len(SHAPES))))


class Reader(nn.Module):
    """A small CNN with a shape and a colour head: ``[B, 3, 32, 32]`` -> logits ``[B, 6]`` and ``[B, 6]``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        self.body = nn.Sequential(
            *itertools.chain.from_iterable(
                (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in itertools.pairwise(widths)
            ),
            nn.Flatten(),
            nn.Linear(96 * 16, 128),
            nn.ReLU(),
        )
        self.shape, self.colour = nn.Linear(128, len(SHAPES)), nn.Linear(128, len(COLOURS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.body(images)
        return self.shape(seen), self.colour(seen)


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture a little blurred and noisy, by random amounts: shapes must count, not exact pixels."""
    count = len(images)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    part = 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    level = 0.12 * torch.rand(count, 1, 1, 1, generator=generator)
    return torch.lerp(images, soft, part) + level * torch.randn(images.shape, generator=generator)


def train_reader(generator: torch.Generator, steps: int = 450, batch: int = 96) -> Reader:
    """The classifier, trained on freshly rendered pictures alone."""
    reader = Reader()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    with tqdm(range(steps), desc="classifier", unit="step", leave=False) as bar:
        for _ in bar:
            seen = render(batch, generator)
            shape, colour = reader(blurred(seen.images, generator))
            loss = F.cross_entropy(shape, seen.shape) + F.cross_entropy(colour, seen.colour)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return reader.eval().requires_grad_(False)


def read(reader: Reader, images: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and colour indices ``[B]`` that the classifier sees."""
    shape, colour = reader(images)
    return shape.argmax(1), colour.argmax(1)


def held_out(reader: Reader, batch: Batch) -> float:
    """Share of rendered pictures of which shape and colour are read right."""
    shape, colour = read(reader, batch.images)
    return float(((shape == batch.shape) & (colour == batch.colour)).float().mean())


def asked(index: int) -> tuple[int, int, int]:
    """Size, colour and shape that picture ``index`` is to show: all combinations in turn."""
    return COMBINATIONS[index % len(COMBINATIONS)]


def generate(network: DemoNet, samples: int, seed: int = 0, batch: int = 32) -> Tensor:
    """``[samples, 3, 32, 32]``: one picture a prompt, each from its own seed ``seed + index``."""
    sigmas = normal(STEPS)
    pictures = []
    with tqdm(total=samples, desc="pictures", unit="picture", leave=False) as bar:
        for first in range(0, samples, batch):
            own = range(first, min(first + batch, samples))
            start = torch.cat([draw(seed + i, 1, model.SHAPE)[0] for i in own])
            said = torch.stack([encode(prompt(i)) for i in own])
            denoise = from_network(guided(network, said, torch.zeros_like(said), CFG), "v")
            system = schemes.ddim(start * float(sigmas[0]), sigmas)
            options = Options(solver="sequential", data_rms=model.DATA_RMS)
            pictures.append(solve(system, denoise, options, keep_trajectory=False).x)
            bar.update(len(own))
    return torch.cat(pictures)


def prompt(index: int) -> str:
    """What picture ``index`` is asked to be."""
    size, colour, shape = asked(index)
    return f"{SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"


def summary(images: Tensor, reader: Reader) -> tuple[float, str]:
    """Share of pictures with shape and colour right, and the account in words."""
    count = len(images)
    wanted = torch.tensor([asked(i) for i in range(count)])
    shape, colour = read(reader, images.clamp(-1, 1))
    right_shape, right_colour = shape == wanted[:, 2], colour == wanted[:, 1]
    both = float((right_shape & right_colour).float().mean())
    whole = float((pieces(images, wanted[:, 1]) == 1).float().mean())
    lines = [
        f"shape  {float(right_shape.float().mean()):7.1%}   read wrong: {_confusions(wanted[:, 2], shape, SHAPES)}",
        f"colour {float(right_colour.float().mean()):7.1%}   read wrong: {_confusions(wanted[:, 1], colour, COLOURS)}",
        f"both   {both:7.1%}   of {count} pictures",
        f"whole  {whole:7.1%}   show one connected shape (not judged)",
    ]
    for place, name in enumerate(SIZES):
        mine = wanted[:, 0] == place
        if mine.any():
            lines.append(f"  {name}: {float((right_shape & right_colour)[mine].float().mean()):.1%}")
    return both, "\n".join(lines)


def pieces(images: Tensor, colour: Tensor, least: int = 6) -> Tensor:
    """``[B]`` connected pieces (of ``least`` pixels or more) that are nearer to the asked colour than to the ground.

    What the classifier cannot see: two rings are read as a ring.
    """
    paint = (PALETTE[colour] * 2 - 1)[:, :, None, None]
    ground = images.flatten(2).median(2).values[:, :, None, None]
    mask = ((images - paint).norm(dim=1) < (images - ground).norm(dim=1)).float()
    side = images.shape[-1]
    label = mask * torch.arange(1, side * side + 1, dtype=torch.float32).reshape(side, side)
    for _ in range(4 * side):  # longer than any shape's way round
        label = F.max_pool2d(label[:, None], 3, stride=1, padding=1)[:, 0] * mask
    sizes = (plane[plane > 0].unique(return_counts=True)[1] for plane in label)
    return torch.tensor([int((size >= least).sum()) for size in sizes])


def _confusions(wanted: Tensor, seen: Tensor, names: tuple[str, ...]) -> str:
    """Which names were read as which others, the most frequent first."""
    pairs = [(w, s) for w, s in zip(wanted.tolist(), seen.tolist(), strict=True) if w != s]
    counts = {pair: pairs.count(pair) for pair in dict.fromkeys(pairs)}
    ranked = sorted(counts, key=lambda pair: -counts[pair])
    return ", ".join(f"{names[w]} as {names[s]} {counts[w, s]}" for w, s in ranked) or "none"


def sheet(path: Path, images: Tensor, columns: int = 24) -> None:
    """All pictures in rows, as a PNG."""
    missing = -len(images) % columns
    padded = torch.cat([images, images.new_full((missing, *images.shape[1:]), -1.0)])
    rows = [torch.cat(list(row), dim=2) for row in padded.split(columns)]
    save_png(path, picture(torch.cat(rows, dim=1)[None], scale=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paratafusion_core.demo.gate", description=__doc__)
    parser.add_argument("--weights", type=Path, default=model.WEIGHTS, help="the network's safetensors file")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write the pictures into one PNG")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Judge the weights; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        samples, seed = check_count("samples", arguments.samples), check_count("seed", arguments.seed, low=0)
        network = model.load(arguments.weights)
    except (ValueError, OSError) as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(seed)
    reader = train_reader(torch.Generator().manual_seed(seed))
    trust = held_out(reader, render(4096, torch.Generator().manual_seed(seed + 10**6)))
    print(f"classifier: {trust:.2%} of 4096 held-out rendered pictures read right")
    if trust < TRUST:
        print(f"gate: the classifier reads {trust:.2%}; at least {TRUST:.0%} is needed to judge", file=sys.stderr)
        return 2
    images = generate(network, samples, seed)
    both, text = summary(images, reader)
    print(text)
    if arguments.sheet is not None:
        sheet(arguments.sheet, images)
    print(f"gate {'passed' if both >= PASS else 'FAILED'}: {both:.1%} against {PASS:.0%}")
    return 0 if both >= PASS else 1


if __name__ == "__main__":
    sys.exit(main())
