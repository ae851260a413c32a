"""Suites ``quick`` and ``paper``: samplers x steps x CFG x windows x solvers, each against its sequential result."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..cli.sample import Task
from ..devices import check_device
from ..errors import check_count
from ..files import check_folder, write_text
from ..options import Options
from ..plots import save_png
from ..report import Report, fidelity
from ..solve import Progress, solve
from . import curves, table
from .journal import Journal, Number, open_journal
from .problems import MODELS, Setting, make_task, prompt_of

#: A picture shown during the run counts as good from here on.
GOOD_DB = 40.0


@dataclass(frozen=True)
class Case:
    """One line of a table; ``rows`` are the evaluations that the collocation solver may spend."""

    model: str
    sampler: str
    schedule: str
    steps: int
    cfg: float
    window: int | str
    solver: str = "quasi-newton"
    preset: str = "balanced"
    rows: int | None = None

    @property
    def setting(self) -> Setting:
        return Setting(self.model, self.sampler, self.schedule, self.steps, self.cfg)


KEYS = ("model", "sampler", "schedule", "steps", "cfg", "window", "solver", "preset", "rows", "seed")
FIGURES = {
    "rounds": int,
    "nfe": int,
    "sequential_nfe": int,
    "seconds": Number,
    "sequential_seconds": Number,
    "psnr_db": Number | None,
    "good_round": int | None,
    "psnr_per_round": list,
    "doubt": str | None,
}

SOLVERS = ("quasi-newton", "parataa", "picard")
QUICK = (
    Case("demo", "ddim", "normal", 50, 4.0, 8),
    Case("demo", "ddim", "normal", 50, 4.0, 16),
    Case("demo", "ddim", "normal", 50, 4.0, 16, "parataa"),
    Case("demo", "ddim", "normal", 50, 4.0, 16, "picard"),
    Case("demo", "ddim", "normal", 50, 4.0, "full"),
    Case("demo", "ddim", "normal", 100, 4.0, "full"),
    Case("demo", "ddpm", "normal", 50, 4.0, 16),
    Case("demo", "dpmpp_2m", "karras", 20, 4.0, 8),
    Case("demo", "ddim", "normal", 50, 7.5, 16),
    *(Case("mixture", "ddim", "normal", 50, 4.0, 16, solver) for solver in SOLVERS),
    *(Case("ideal", "ddim", "normal", 50, 4.0, 16, solver) for solver in SOLVERS),
)
PAPER_RUNS = (
    *(("ddim", "normal", steps) for steps in (25, 50, 100)),
    *(("ddpm", "normal", steps) for steps in (50, 100)),
    ("euler", "flow", 28),
    *(("dpmpp_2m", schedule, steps) for schedule in ("normal", "karras") for steps in (20, 30)),
)
PAPER_CFG = (1.0, 4.0, 7.5)
PAPER_WINDOWS: tuple[int | str, ...] = (4, 8, 16, "full")
#: ParaTAA's fast stands beside balanced because its accuracy is nearer to the quasi-Newton solver's balanced.
PAPER_SOLVERS = (*((solver, "balanced") for solver in SOLVERS), ("parataa", "fast"))
#: (window, rows) of the collocation solver; ddpm, which it serves at window 1 for more rows, is left out.
COLLOCATION = ((1, 12), (1, 20), (4, 20), (4, 30))


def paper(models: Sequence[str] = MODELS) -> Iterator[Case]:
    """The paper's grid and more, the cheap models first."""
    for model in (m for m in ("ideal", "mixture", "demo") if m in models):
        for sampler, schedule, steps in PAPER_RUNS:
            for cfg in PAPER_CFG:
                for solver, preset in PAPER_SOLVERS:
                    for window in PAPER_WINDOWS:
                        yield Case(model, sampler, schedule, steps, cfg, window, solver, preset)
                if sampler != "ddpm":
                    for width, rows in COLLOCATION:
                        yield Case(model, sampler, schedule, steps, cfg, width, "collocation", rows=rows)


def cases_of(suite: str, models: Sequence[str] | None) -> list[Case]:
    """The cases of a suite, of some models alone if they are given."""
    if suite == "paper":
        return list(paper(models or MODELS))
    return [case for case in QUICK if not models or case.model in models]


def run(arguments: argparse.Namespace) -> None:
    """The command: appends to ``<suite>.jsonl``, then writes ``<suite>.md`` and the plots into the folder.

    Raises:
        ValueError: an argument is out of bounds.
    """
    suite = arguments.suite
    seeds = check_count("seeds", 8 if arguments.seeds is None else arguments.seeds)
    out, device = check_folder(arguments.out), check_device(arguments.device)
    cases = cases_of(suite, arguments.model)
    journal = open_journal(arguments.resume, out / f"{suite}.jsonl", KEYS, FIGURES)
    play(cases, seeds, journal, device)
    out.mkdir(parents=True, exist_ok=True)
    listing = table.cases(journal.rows)
    text = listing if suite == "quick" else table.markdown(journal.rows)
    write_text(out / f"{suite}.md", text + "\n")
    write_text(out / f"{suite}-cases.md", listing + "\n")
    for name, image in curves.plots(journal.rows):
        save_png(out / f"{suite}-{name}.png", image)
    print("".join(json.dumps(row) + "\n" for row in journal.rows) if arguments.json else text + "\n", end="")


def play(cases: Sequence[Case], seeds: int, journal: Journal, device: str = "cpu") -> None:
    """Run what the journal lacks, seed by seed, with one sequential reference a setting and seed."""
    with tqdm(total=len(cases) * seeds, unit="run") as bar:
        for seed in range(seeds):
            settings: dict[Setting, list[Case]] = {}
            for case in cases:
                settings.setdefault(case.setting, []).append(case)
            for setting, group in settings.items():
                missing = [case for case in group if (asdict(case) | {"seed": seed}) not in journal]
                bar.update(len(group) - len(missing))
                if not missing:
                    continue
                task = make_task(setting, seed, device)
                plain = solve(task.system, task.denoise, _options("sequential", task), keep_trajectory=False)
                for case in missing:
                    figures = measure(task, _options(case.solver, task, case), plain.x)
                    about = {"seed": seed, "prompt": prompt_of(seed), "sequential_seconds": plain.report.seconds}
                    journal.add(asdict(case) | about | figures | {"torch": torch.__version__, "device": device})
                    bar.update()


def _options(solver: str, task: Task, case: Case | None = None) -> Options:
    if case is None:
        return Options(solver, flow=task.flow, data_rms=task.data_rms)
    more: dict[str, Any] = {} if case.rows is None else {"rows": case.rows}
    more |= {"flow": task.flow, "data_rms": task.data_rms, "peak": task.peak}
    return Options(solver, case.preset, window=case.window, **more)


def measure(task: Task, options: Options, reference: Tensor) -> dict[str, Any]:
    """Solve and compare; the seconds are those of the rounds, the picture that each shows included."""
    shown: list[float] = []

    def note(progress: Progress) -> None:
        shown.append(fidelity(progress.picture, reference, task.peak).psnr_db)

    done = solve(task.system, task.denoise, options, callback=note, keep_trajectory=False)
    report, near = done.report, fidelity(done.x, reference, task.peak)
    seconds = sum(report.seconds_per_round)
    return _account(report) | {
        "psnr_db": near.psnr_db,
        "max_abs": near.max_abs,
        "good_round": next((n for n, db in enumerate(shown, 1) if db >= GOOD_DB), None),
        "psnr_per_round": [round(db, 1) if math.isfinite(db) else None for db in shown],
        "seconds": seconds,
        "engine_seconds": max(seconds - report.model_seconds, 0.0),
    }


def _account(report: Report) -> dict[str, Any]:
    return {
        "rounds": report.rounds,
        "nfe": report.nfe,
        "sequential_nfe": report.sequential_nfe,
        "rows_per_round": report.rows_per_round,
        "doubt": report.doubt,
        "estimated_db": report.estimated_db,
        "repairs": report.repairs,
    }
