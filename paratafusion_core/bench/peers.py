"""Suite ``peers``: diffusers' ParaDiGMS and this project's solvers on the same network, from the same noise."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import schemes
from ..cli.sample import Task
from ..demo import model
from ..demo.prompt import encode
from ..errors import check_count
from ..files import check_folder, write_text
from ..options import Options
from ..report import fidelity
from ..solve import solve
from . import paradigms
from .journal import Journal, Number, Row, open_journal
from .problems import network, prompt_of
from .table import grid, grouped, mean, psnr


@dataclass(frozen=True)
class Case:
    """A run; ``who`` is a solver at preset balanced, or ParaDiGMS with its tolerance."""

    sampler: str
    steps: int
    cfg: float
    window: int
    who: str


PARADIGMS = "ParaDiGMS (diffusers), tolerance"
#: Their default tolerance, and one that comes as near as balanced does.
TOLERANCES = (0.1, 0.01)
SOLVERS = ("picard-eps", "picard", "parataa", "quasi-newton")
RUNS = (("ddim", 50, 4.0), ("ddim", 100, 4.0), ("ddpm", 50, 4.0), ("ddim", 50, 7.5))
KEYS = ("sampler", "steps", "cfg", "window", "who", "seed")
FIGURES = {"rounds": int, "nfe": int, "sequential_nfe": int, "psnr_db": Number | None, "sequential_max_abs": Number}


def cases() -> Iterator[Case]:
    """The table's lines."""
    contenders = [*(f"{PARADIGMS} {t:g}" for t in TOLERANCES), *SOLVERS]
    for sampler, steps, cfg in RUNS:
        for window, who in itertools.product((8, 16, steps), contenders):
            yield Case(sampler, steps, cfg, window, who)


def task_of(sampler: str, steps: int, cfg: float, seed: int) -> Task:
    """The run as a system, on their timesteps and from their pipeline's random numbers."""
    levels = paradigms.levels(sampler, steps)
    start, noise = paradigms.noise_of(seed, model.SHAPE, steps)
    x0 = start * float((1 + levels[0] ** 2).sqrt())  # their start is the VP state itself
    system = schemes.ddim(x0, levels) if sampler == "ddim" else schemes.ddpm(x0, levels, noise=noise)
    return Task(system, model.denoiser(network("cpu"), prompt_of(seed), cfg), 2.0, model.DATA_RMS, False)


def run(arguments: argparse.Namespace) -> None:
    """The command: appends to ``peers.jsonl`` and writes ``peers.md`` into the folder.

    Raises:
        ValueError: an argument is out of bounds, or diffusers is not installed.
    """
    seeds, out = check_count("seeds", 8 if arguments.seeds is None else arguments.seeds), check_folder(arguments.out)
    if arguments.device != "cpu" or set(arguments.model or ("demo",)) != {"demo"}:
        raise ValueError("suite is 'peers'; device cpu and model demo are allowed with it")
    paradigms.diffusers()
    journal = open_journal(arguments.resume, out / "peers.jsonl", KEYS, FIGURES)
    meet(list(cases()), seeds, journal)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(journal.rows)
    write_text(out / "peers.md", text + "\n")
    print("".join(json.dumps(row) + "\n" for row in journal.rows) if arguments.json else text + "\n", end="")


def meet(chosen: Sequence[Case], seeds: int, journal: Journal) -> None:
    """Run what the journal lacks."""
    with tqdm(total=len(chosen) * seeds, unit="run") as bar:
        for seed in range(seeds):
            references: dict[tuple[str, int, float], tuple[Task, Tensor, float]] = {}
            for case in chosen:
                bar.update()
                if (asdict(case) | {"seed": seed}) in journal:
                    continue
                key = (case.sampler, case.steps, case.cfg)
                if key not in references:
                    references[key] = _reference(*key, seed)
                task, reference, apart = references[key]
                figures = _measure(case, seed, task, reference)
                more = {"sequential_nfe": case.steps, "sequential_max_abs": apart, "torch": torch.__version__}
                journal.add(asdict(case) | {"seed": seed} | figures | more | {"device": "cpu"})


def _reference(sampler: str, steps: int, cfg: float, seed: int) -> tuple[Task, Tensor, float]:
    """The run, this project's sequential result, and its largest difference from their scheduler's own steps."""
    task = task_of(sampler, steps, cfg, seed)
    plain = solve(task.system, task.denoise, Options("sequential", data_rms=task.data_rms), keep_trajectory=False).x
    context = encode(prompt_of(seed))[None]
    theirs = paradigms.sequential(network("cpu"), context, model.SHAPE, sampler, steps, cfg, seed)
    return task, plain, float((plain - theirs).abs().max())


def _measure(case: Case, seed: int, task: Task, reference: Tensor) -> dict[str, Any]:
    if case.who.startswith(PARADIGMS):
        tolerance, context = float(case.who.split()[-1]), encode(prompt_of(seed))[None]
        x, count = paradigms.run(
            network("cpu"), context, model.SHAPE, case.sampler, case.steps, case.cfg, case.window, tolerance, seed
        )
        rounds, nfe, doubt = count.rounds, count.nfe, None
    else:
        options = Options(case.who, window=case.window, data_rms=task.data_rms)
        done = solve(task.system, task.denoise, options, keep_trajectory=False)
        x, rounds, nfe, doubt = done.x, done.report.rounds, done.report.nfe, done.report.doubt
    near = fidelity(x, reference, task.peak)
    return {"rounds": rounds, "nfe": nfe, "psnr_db": near.psnr_db, "max_abs": near.max_abs, "doubt": doubt}


def markdown(rows: Sequence[Row]) -> str:
    """Each case's mean and worst over its seeds."""
    lines = []
    for (sampler, steps, cfg, window, who), runs in grouped(rows, KEYS[:-1]).items():
        rounds, db = [r["rounds"] for r in runs], [psnr(r) for r in runs]
        cost = mean(r["nfe"] / r["sequential_nfe"] for r in runs)
        size = "full" if window == steps else str(window)
        figures = (f"{mean(rounds):.1f} ({max(rounds)})", f"{cost:.2f}", f"{mean(db):.1f} ({min(db):.1f})")
        lines.append((f"{sampler}-{steps}", f"{cfg:g}", size, who, *figures))
    head = ("sampler", "CFG", "window", "who", "rounds, mean (worst)", "nfe / sequential", "PSNR dB, mean (worst)")
    apart = max(r["sequential_max_abs"] for r in rows)
    note = f"Their sequential steps and this project's differ by {apart:.1e} at most."
    return f"{grid(head, lines)}\n\n{note}"
