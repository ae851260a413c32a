"""Suite ``rivals``: fewer evaluations than the sampler has steps, by every way at hand, against its full picture."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import schemes
from ..cli.sample import Task
from ..devices import check_device
from ..errors import check_count
from ..files import check_folder, write_text
from ..noise import draw
from ..options import Options
from ..report import fidelity
from ..schedules import SCHEDULES
from ..solve import solve
from ..system import System
from . import shortcuts
from .journal import Journal, Number, Row, open_journal
from .problems import Setting, make_task, prompt_of
from .shortcuts import Outcome
from .table import grid, grouped, mean, psnr
from .unipc import unipc

CASES = (
    Setting("demo", "ddim", "normal", 50, 4.0),
    Setting("demo", "ddim", "normal", 100, 4.0),
    Setting("demo", "dpmpp_2m", "normal", 50, 4.0),
    Setting("demo", "euler", "karras", 50, 4.0),
    Setting("demo", "euler", "flow", 50, 4.0),
    Setting("demo", "ddpm", "normal", 50, 4.0),
    Setting("demo", "ddim", "normal", 50, 7.5),
)
LADDER = (6, 8, 10, 12, 16, 20, 24, 32, 40)
THRESHOLDS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45)
#: Evaluations of the collocation solver with a window of 4, which needs more of them in fewer rounds.
PIPELINED = (16, 20, 24, 32, 40)
GUESSES = {"held": shortcuts.held, "linear": shortcuts.linear, "quadratic": shortcuts.quadratic}
#: Figures are asked for at this mean fidelity.
ASKED_DB = 42.0
SHOWN = (6, 8, 10, 12, 16, 20, 24, 32)

Rival = Callable[[Setting, int, Task, float, str], Outcome]


def _coarse(setting: Setting, seed: int, task: Task, steps: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The start, the levels and the noise of ``steps`` steps; levels of the fine grid's own where there is noise."""
    _, noise = draw(seed, 1, tuple(task.system.S.shape[2:]), setting.steps)
    fine = SCHEDULES[setting.schedule](setting.steps)
    x0 = task.system.S[0]
    if setting.sampler != "ddpm":
        return x0, SCHEDULES[setting.schedule](steps), None
    rows = [*shortcuts.evenly(setting.steps, steps), setting.steps]
    return x0, fine[rows], shortcuts.coupled(noise, fine, rows).to(x0)


def _run(task: Task, system: System) -> Outcome:
    done = solve(system, task.denoise, _options(task), keep_trajectory=False)
    return Outcome(done.x, done.report.nfe)


def _options(task: Task, solver: str = "sequential", **more: Any) -> Options:
    return Options(solver, flow=task.flow, data_rms=task.data_rms, **more)


def fewer(setting: Setting, seed: int, task: Task, size: float, _: str) -> Outcome:
    """The same sampler with ``size`` steps; an ancestral one on rows of the fine grid, with coupled noise."""
    x0, sigmas, noise = _coarse(setting, seed, task, int(size))
    if setting.sampler == "ddpm":
        return _run(task, schemes.ddpm(x0, sigmas, noise=noise))
    scheme = schemes.dpmpp_2m if setting.sampler == "dpmpp_2m" else schemes.ddim
    return _run(task, scheme(x0, sigmas, flow=task.flow))


def multistep(setting: Setting, seed: int, task: Task, size: float, name: str) -> Outcome:
    """DPM-Solver++ 2M (its SDE form with coupled noise for an ancestral sampler) or UniPC, with ``size`` steps."""
    x0, sigmas, noise = _coarse(setting, seed, task, int(size))
    if name == "unipc":
        return _run(task, unipc(x0, sigmas, flow=task.flow))
    if noise is not None:
        return _run(task, schemes.dpmpp_2m_sde(x0, sigmas, noise=noise))
    return _run(task, schemes.dpmpp_2m(x0, sigmas, flow=task.flow))


def skip(setting: Setting, seed: int, task: Task, size: float, name: str) -> Outcome:
    """Skipping: ``name`` is ``<guess> even`` with ``size`` rows, or ``<guess> threshold`` with ``size`` as that."""
    guess, how = name.split()
    if how == "even":
        rows = shortcuts.evenly(setting.steps, int(size))
        return shortcuts.skipping(task.system, task.denoise, GUESSES[guess], rows, flow=task.flow)
    return shortcuts.skipping(task.system, task.denoise, GUESSES[guess], threshold=size, flow=task.flow)


def collocation(setting: Setting, seed: int, task: Task, size: float, name: str) -> Outcome:
    """This project's own, with a window of 1 or 4."""
    options = _options(task, "collocation", window=int(name.split()[-1]), rows=int(size))
    done = solve(task.system, task.denoise, options, keep_trajectory=False)
    return Outcome(done.x, done.report.nfe)


def entries(setting: Setting) -> Iterator[tuple[str, float, Rival]]:
    """What competes on a setting: a name, a size (steps, rows or threshold), and the run."""
    ladder = [n for n in LADDER if n < setting.steps]
    for n in ladder:
        yield "fewer steps", n, fewer
        if setting.sampler != "dpmpp_2m":
            yield "dpm-solver++ 2m", n, multistep
        if setting.sampler != "ddpm":  # it knows no noise
            yield "unipc", n, multistep
        for guess in GUESSES:
            yield f"{guess} even", n, skip
    for guess, size in itertools.product(("held", "linear"), THRESHOLDS):
        yield f"{guess} threshold", size, skip
    for n in ladder:
        yield "collocation 1", n, collocation
    for n in PIPELINED:
        if n < setting.steps and setting.sampler != "ddpm":  # which it serves at window 1
            yield "collocation 4", n, collocation


KEYS = ("model", "sampler", "schedule", "steps", "cfg", "rival", "size", "seed")
FIGURES = {"nfe": int, "psnr_db": Number | None}


def run(arguments: argparse.Namespace) -> None:
    """The command: appends to ``rivals.jsonl`` and writes ``rivals.md`` into the folder.

    Raises:
        ValueError: an argument is out of bounds.
    """
    seeds = check_count("seeds", 16 if arguments.seeds is None else arguments.seeds)
    out, device = check_folder(arguments.out), check_device(arguments.device)
    settings = [Setting(m, *list(asdict(c).values())[1:]) for m in arguments.model or ("demo",) for c in CASES]
    journal = open_journal(arguments.resume, out / "rivals.jsonl", KEYS, FIGURES)
    compete(settings, seeds, journal, device)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(journal.rows)
    write_text(out / "rivals.md", text + "\n")
    print("".join(json.dumps(row) + "\n" for row in journal.rows) if arguments.json else text + "\n", end="")


def compete(settings: Sequence[Setting], seeds: int, journal: Journal, device: str = "cpu") -> None:
    """Run what the journal lacks."""
    total = seeds * sum(len(list(entries(s))) for s in settings)
    with tqdm(total=total, unit="run") as bar:
        for seed, setting in itertools.product(range(seeds), settings):
            about = asdict(setting) | {"seed": seed}
            todo = [(n, s, f) for n, s, f in entries(setting) if (about | {"rival": n, "size": s}) not in journal]
            bar.update(len(list(entries(setting))) - len(todo))
            if not todo:
                continue
            task = make_task(setting, seed, device)
            with torch.no_grad():
                reference = _run(task, task.system).x
                for name, size, rival in todo:
                    done = rival(setting, seed, task, size, name)
                    db = fidelity(done.x, reference, task.peak).psnr_db
                    row = about | {"rival": name, "size": size, "nfe": done.nfe, "psnr_db": db}
                    journal.add(row | {"prompt": prompt_of(seed), "torch": torch.__version__, "device": device})
                    bar.update()


@dataclass(frozen=True)
class Point:
    """One size of one rival over the seeds."""

    nfe: float
    mean_db: float
    worst_db: float


def ladder_of(rows: Sequence[Row]) -> list[Point]:
    """A rival's points by rising mean evaluations."""
    points = []
    for runs in grouped(rows, ("size",)).values():
        db = [psnr(r) for r in runs]
        points.append(Point(mean(r["nfe"] for r in runs), mean(db), min(db)))
    return sorted(points, key=lambda p: p.nfe)


def at(points: Sequence[Point], nfe: float) -> tuple[float, float] | None:
    """Mean and worst PSNR at ``nfe``, by straight lines between the points; None outside them."""
    for a, b in itertools.pairwise(points):
        if a.nfe <= nfe <= b.nfe:
            t = (nfe - a.nfe) / max(b.nfe - a.nfe, 1e-9)
            return a.mean_db + t * (b.mean_db - a.mean_db), a.worst_db + t * (b.worst_db - a.worst_db)
    return None


def needed(points: Sequence[Point], db: float = ASKED_DB) -> str:
    """Evaluations for a mean of ``db``, by straight lines between the points; a bound outside them."""
    if points[0].mean_db >= db:
        return f"<= {points[0].nfe:.0f}"
    for a, b in itertools.pairwise(points):
        if a.mean_db < db <= b.mean_db:
            return f"{a.nfe + (db - a.mean_db) / (b.mean_db - a.mean_db) * (b.nfe - a.nfe):.1f}"
    best = max(points, key=lambda p: p.mean_db)
    return f"> {points[-1].nfe:.0f} ({best.mean_db:.0f} dB at {best.nfe:.0f})"


def markdown(rows: Sequence[Row]) -> str:
    """For each case the rivals' PSNR at each number of evaluations, then what each needs for ``ASKED_DB``."""
    parts, summary = [], []
    names = list(dict.fromkeys(r["rival"] for r in rows))
    for key, runs in grouped(rows, ("model", "sampler", "schedule", "steps", "cfg")).items():
        model, sampler, schedule, steps, cfg = key
        ladders = {name: ladder_of(some) for (name,), some in grouped(runs, ("rival",)).items()}
        lines = []
        for name, points in ladders.items():
            cells = (at(points, n) for n in SHOWN)
            lines.append([name, *("" if c is None else f"{c[0]:.1f} ({c[1]:.1f})" for c in cells)])
        title = f"{model}, {sampler}-{steps} {schedule}, CFG {cfg:g}"
        parts.append(f"## {title}\n\n" + grid(["PSNR dB, mean (worst), at", *map(str, SHOWN)], lines))
        summary.append([title, *(needed(ladders[n]) if n in ladders else "" for n in names)])
    head = ["case", *names]
    return f"## Evaluations for {ASKED_DB:g} dB mean\n\n" + grid(head, summary) + "\n\n" + "\n\n".join(parts)
