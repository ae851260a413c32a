"""Suite ``warm``: an artist's edits, each continued from the trajectory before it and started over.

Every edit has a first picture, whose run leaves the trajectory, and a second one, which is drawn cold and warm against
its own sequential result. The demo network alone: its prompts have words to change.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..cli.sample import SAMPLERS, Task
from ..demo import model
from ..demo.prompt import COLOURS, SHAPES
from ..devices import check_device
from ..errors import check_count
from ..files import check_folder, write_text
from ..noise import draw
from ..options import Options
from ..report import fidelity
from ..schedules import SCHEDULES
from ..solve import Solution, solve
from ..trajectory import Trajectory
from .journal import Journal, Number, Row, open_journal
from .problems import network, prompt_of
from .table import grid, grouped, mean, psnr

WINDOWS: tuple[int | str, ...] = (8, "full")
KEYS = ("edit", "window", "seed")
FIGURES = {
    "cold_rounds": int,
    "warm_rounds": int,
    "cold_nfe": int,
    "warm_nfe": int,
    "cold_psnr_db": Number | None,
    "warm_psnr_db": Number | None,
}
#: Seeds of the second noise lie this far from those of the first.
_OTHER = 1000


@dataclass(frozen=True)
class Draft:
    """A picture to draw.

    Attributes:
        seed, words: of the noise; of the prompt.
        sampler, schedule, steps, cfg: of the run.
        turn: part of the way on the sphere to the noise of another seed.
        strength: below 1 a variation of ``base``: that part of the schedule, begun from the noised picture.
    """

    seed: int
    words: str
    sampler: str = "ddim"
    schedule: str = "normal"
    steps: int = 50
    cfg: float = 4.0
    turn: float = 0.0
    strength: float = 1.0

    def task(self, device: str, base: Tensor | None = None) -> Task:
        """The run; ``base`` ``[1, ...]`` is the picture that it varies."""
        whole = SCHEDULES[self.schedule](int(self.steps / self.strength))
        sigmas = whole[-(self.steps + 1) :]  # the last part of a longer schedule, as in ComfyUI
        start, noise = draw(self.seed, 1, model.SHAPE, self.steps)
        other, _ = draw(self.seed + _OTHER, 1, model.SHAPE)
        x0 = (slerp(start, other, self.turn) if base is None else other) * float(sigmas[0])
        if base is not None:
            x0 = x0 + base.cpu()
        system = SAMPLERS[self.sampler](x0.to(device), sigmas, noise.to(device), False)
        denoise = model.denoiser(network(device), self.words, self.cfg)
        return Task(system, denoise, 2.0, model.DATA_RMS, False)


def slerp(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Between two noises on the great circle: ``part`` 0 is ``a``, 1 is ``b``."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / torch.sin(angle)


def another_word(words: str, among: Sequence[str]) -> str:
    """The prompt with its word of a group replaced by the next one of the group."""
    return " ".join(among[(among.index(w) + 1) % len(among)] if w in among else w for w in words.split())


def _pair(first: dict[str, Any], second: dict[str, Any]) -> Callable[[int], tuple[Draft, Draft]]:
    return lambda seed: (Draft(seed, prompt_of(seed), **first), Draft(seed, prompt_of(seed), **second))


def _word(among: Sequence[str]) -> Callable[[int], tuple[Draft, Draft]]:
    return lambda seed: (Draft(seed, prompt_of(seed)), Draft(seed, another_word(prompt_of(seed), among)))


#: What is edited -> the two pictures of a seed.
EDITS: dict[str, Callable[[int], tuple[Draft, Draft]]] = {
    "nothing": _pair({}, {}),
    "CFG 4 -> 4.6": _pair({}, {"cfg": 4.6}),
    "another colour": _word(COLOURS),
    "another shape": _word(SHAPES),
    "seed slerp 0.1": _pair({}, {"turn": 0.1}),
    "denoise 0.6 of the picture": _pair({}, {"strength": 0.6}),
    "20 -> 30 steps": _pair({"steps": 20}, {"steps": 30}),
    "euler -> dpmpp_2m": _pair({"sampler": "euler"}, {"sampler": "dpmpp_2m"}),
}


def run(arguments: argparse.Namespace) -> None:
    """The command: appends to ``warm.jsonl``, then writes ``warm.md`` into the folder.

    Raises:
        ValueError: an argument is out of bounds.
    """
    seeds = check_count("seeds", 8 if arguments.seeds is None else arguments.seeds)
    if arguments.model and list(arguments.model) != ["demo"]:
        raise ValueError(f"model is {' '.join(arguments.model)!r}; demo is allowed for suite warm")
    out, device = check_folder(arguments.out), check_device(arguments.device)
    journal = open_journal(arguments.resume, out / "warm.jsonl", KEYS, FIGURES)
    play(seeds, journal, device)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(journal.rows)
    write_text(out / "warm.md", text + "\n")
    print("".join(json.dumps(row) + "\n" for row in journal.rows) if arguments.json else text + "\n", end="")


def play(seeds: int, journal: Journal, device: str = "cpu", edits: Sequence[str] = tuple(EDITS)) -> None:
    """Run what the journal lacks."""
    with tqdm(total=len(edits) * len(WINDOWS) * seeds, unit="run") as bar:
        for seed in range(seeds):
            for edit in edits:
                wanted = [{"edit": edit, "window": window, "seed": seed} for window in WINDOWS]
                missing = [about for about in wanted if about not in journal]
                bar.update(len(wanted) - len(missing))
                if missing:
                    before, after = EDITS[edit](seed)
                    for row in measure(before, after, missing, device):
                        journal.add(row)
                        bar.update()


def measure(before: Draft, after: Draft, wanted: Sequence[Row], device: str) -> list[Row]:
    """Rounds, evaluations and PSNR of the second picture at each window, cold and warm."""
    first = before.task(device)
    base = _solve(first, "sequential", 1).x if after.strength < 1 else None
    second = after.task(device, base)
    reference = _solve(second, "sequential", 1).x
    rows = []
    for about in wanted:
        kept = _solve(first, "quasi-newton", about["window"], keep=True).trajectory
        row = about | {"prompt": after.words, "sequential_nfe": second.system.evaluations}
        for name, warm in (("cold", None), ("warm", kept)):
            done = _solve(second, "quasi-newton", about["window"], warm=warm)
            row |= {f"{name}_rounds": done.report.rounds, f"{name}_nfe": done.report.nfe}
            row[f"{name}_psnr_db"] = fidelity(done.x, reference, second.peak).psnr_db
        rows.append(row | {"said": done.report.warm, "after": asdict(after), "device": device})
    return rows


def _solve(task: Task, solver: str, window: int | str, warm: Trajectory | None = None, keep: bool = False) -> Solution:
    options = Options(solver, window=window, data_rms=task.data_rms)
    return solve(task.system, task.denoise, options, warm=warm, keep_trajectory=keep)


def markdown(rows: Sequence[Row]) -> str:
    """A line for each edit and window: means over the seeds, the worst PSNR, and warm over cold."""
    head = ["edit", "window", "rounds cold", "warm", "warm / cold", "nfe cold", "warm", "warm / cold"]
    head += ["PSNR dB cold (worst)", "warm (worst)"]
    lines = []
    for (edit, window), runs in grouped(rows, ("edit", "window")).items():
        line = [edit, str(window)]
        for figure in ("rounds", "nfe"):
            cold, warm = (mean(r[f"{name}_{figure}"] for r in runs) for name in ("cold", "warm"))
            line += [f"{cold:.1f}", f"{warm:.1f}", f"{warm / cold:.2f}"]
        for name in ("cold", "warm"):
            heights = [psnr({"psnr_db": r[f"{name}_psnr_db"]}) for r in runs]
            line.append(f"{mean(heights):.1f} ({min(heights):.1f})")
        lines.append(line)
    return grid(head, lines)
