"""Suite ``targets``: collocation towards a fidelity in dB, and how far its estimate is from the truth.

Its seeds begin at ``FIRST``: nothing was fitted on them or chosen by them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from ..devices import check_device
from ..errors import check_count
from ..files import check_folder, write_text
from ..options import Options
from ..report import fidelity
from ..solve import solve
from .journal import Journal, Number, Row, open_journal
from .problems import Setting, make_task, prompt_of
from .table import grid, grouped, mean, psnr

FIRST = 10_000
LONG = (
    Setting("demo", "ddim", "normal", 50, 4.0),
    Setting("demo", "ddim", "normal", 100, 4.0),
    Setting("demo", "dpmpp_2m", "normal", 50, 4.0),
    Setting("demo", "euler", "karras", 50, 4.0),
    Setting("demo", "euler", "flow", 50, 4.0),
    Setting("demo", "ddim", "normal", 50, 7.5),
    Setting("demo", "dpmpp_2m", "karras", 30, 4.0),
    Setting("demo", "ddim", "normal", 30, 1.0),
    Setting("demo", "euler", "flow", 30, 7.5),
    Setting("demo", "ddim", "uniform", 50, 4.0),
)
SHORT = (
    Setting("demo", "dpmpp_2m", "karras", 20, 4.0),
    Setting("demo", "ddim", "normal", 20, 4.0),
    Setting("demo", "euler", "flow", 20, 4.0),
)
#: (window, target in dB) of a run.
Aim = tuple[int, float]
CASES: tuple[tuple[tuple[Setting, ...], tuple[Aim, ...]], ...] = (
    (LONG, ((1, 42.0), (2, 42.0), (4, 42.0), (6, 42.0), (1, 36.0), (4, 36.0), (1, 48.0), (4, 48.0))),
    (SHORT, ((1, 42.0), (4, 42.0))),
)
#: An estimate is near, or far too high, from so many dB on.
NEAR_DB, FAR_DB = 3.0, 6.0
KEYS = ("model", "sampler", "schedule", "steps", "cfg", "window", "target_db", "seed")
FIGURES = {"rounds": int, "nfe": int, "sequential_nfe": int, "estimated_db": Number | None, "psnr_db": Number | None}


def run(arguments: argparse.Namespace) -> None:
    """The command: appends to ``targets.jsonl`` and writes ``targets.md`` into the folder.

    Raises:
        ValueError: an argument is out of bounds.
    """
    seeds = check_count("seeds", 12 if arguments.seeds is None else arguments.seeds)
    out, device = check_folder(arguments.out), check_device(arguments.device)
    journal = open_journal(arguments.resume, out / "targets.jsonl", KEYS, FIGURES)
    models = arguments.model or ("demo",)
    work = [
        (replace(setting, model=model), seed, aims)
        for settings, aims in CASES
        for setting in settings
        for model in models
        for seed in range(FIRST, FIRST + seeds)
    ]
    for setting, seed, aims in tqdm(work, unit="picture"):
        measure(setting, seed, aims, journal, device)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(journal.rows)
    write_text(out / "targets.md", text + "\n")
    print("".join(json.dumps(row) + "\n" for row in journal.rows) if arguments.json else text + "\n", end="")


def measure(setting: Setting, seed: int, aims: Sequence[Aim], journal: Journal, device: str) -> None:
    """Run what the journal lacks of one picture."""
    about = asdict(setting) | {"seed": seed}
    todo = [(w, t) for w, t in aims if about | {"window": w, "target_db": t} not in journal]
    if not todo:
        return
    task = make_task(setting, seed, device)
    asked = Options("collocation", flow=task.flow, data_rms=task.data_rms, peak=task.peak)
    with torch.no_grad():
        plain = replace(asked, solver="sequential")
        reference = solve(task.system, task.denoise, plain, keep_trajectory=False).x
        for window, target in todo:
            options = replace(asked, window=window, target_db=target)
            done = solve(task.system, task.denoise, options, keep_trajectory=False)
            report = done.report
            row = about | {"window": window, "target_db": target, "rounds": report.rounds, "nfe": report.nfe}
            row |= {"sequential_nfe": report.sequential_nfe, "estimated_db": report.estimated_db}
            row |= {"doubted": report.doubt is not None, "prompt": prompt_of(seed), "torch": torch.__version__}
            journal.add(row | {"psnr_db": fidelity(done.x, reference, task.peak).psnr_db, "device": device})


def markdown(rows: Sequence[Row]) -> str:
    """A line for each model, target and window, short runs apart."""
    lines = []
    told = [row | {"short": row["steps"] <= 20} for row in rows]
    for (model, target, _, window), runs in grouped(told, ("model", "target_db", "short", "window")).items():
        off = [too_high(r) for r in runs]
        lines.append(
            (
                model,
                f"{target:g} dB",
                str(window),
                " to ".join(dict.fromkeys(str(f(r["steps"] for r in runs)) for f in (min, max))),
                str(len(runs)),
                f"{mean(r['rounds'] for r in runs):.1f}",
                f"{mean(r['nfe'] / r['sequential_nfe'] for r in runs):.2f}",
                _share(psnr(r) >= target for r in runs),
                _share(abs(d) <= NEAR_DB for d in off),
                _share(d > FAR_DB for d in off),
                f"{min(psnr(r) for r in runs):.1f}",
            )
        )
    head = ("model", "target", "window", "steps", "runs", "rounds, mean", "rows / sequential, mean", "reach the target")
    more = (f"estimate within {NEAR_DB:g} dB", f"too high by more than {FAR_DB:g} dB", "worst PSNR dB")
    return grid((*head, *more), lines)


def too_high(row: Row) -> float:
    """dB by which the estimate is above the truth; 0 where both are ``table.CAP_DB`` and more."""
    return psnr({"psnr_db": row["estimated_db"]}) - psnr(row)


def _share(values: Iterable[bool]) -> str:
    return f"{100 * mean(values):.1f} %"
