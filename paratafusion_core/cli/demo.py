"""``paratafusion demo``: the same picture, step by step and in parallel, with the table that proves it."""

from __future__ import annotations

import argparse
import json

from torch import Tensor

from ..demo import model
from ..files import check_folder, write_json
from ..options import Options
from ..plots import convergence, picture, save_png
from ..report import Report, in_decibels
from ..solve import Solution
from .sample import make_task, play

#: What the table compares; the first line is the reference, the second is drawn.
RUNS = (
    ("sequential", Options(solver="sequential")),
    ("quasi-newton, window 8", Options()),
    ("quasi-newton, full window", Options(window="full")),
    ("parataa, window 8", Options(solver="parataa")),
    ("picard, window 8", Options(solver="picard")),
)


def run(arguments: argparse.Namespace) -> None:
    """The command. Raises ValueError on bad input, before anything is written."""
    out = check_folder(arguments.out)
    network = model.load()
    task = make_task(arguments.prompt, steps=arguments.steps, seed=arguments.seed, network=network)
    task.denoise(task.system.S[:1], task.system.sigmas[:1].float())  # the first call is slower than any later one
    previews: list[Tensor] = []
    solutions: list[Solution] = []
    for place, (label, options) in enumerate(RUNS):
        keep = (lambda progress: previews.append(progress.picture.clone())) if place == 1 else None
        solution = play(task, options, label, callback=keep)
        if place:
            solution.report.compare(solution.x, solutions[0].x, task.peak)
            solution.report.measured_speedup = solutions[0].report.seconds / max(solution.report.seconds, 1e-9)
        solutions.append(solution)
    reports = {label: s.report for (label, _), s in zip(RUNS, solutions, strict=True)}

    out.mkdir(parents=True, exist_ok=True)
    save_png(out / "sequential.png", picture(solutions[0].x))
    save_png(out / "parallel.png", picture(solutions[1].x))
    save_png(out / "convergence.png", convergence(solutions[1].report, previews))
    whole = {"prompt": arguments.prompt, "seed": arguments.seed, "runs": {k: r.to_dict() for k, r in reports.items()}}
    write_json(out / "report.json", whole)
    if arguments.json:
        print(json.dumps(whole))
        return
    print(f'"{arguments.prompt}", DDIM, {arguments.steps} steps, CFG 4, seed {arguments.seed}, on the CPU\n')
    print(table(reports))
    print(f"\nrounds: batched model calls; rows: evaluations in them. Pictures in {arguments.out}: sequential.png,")
    print("parallel.png, convergence.png. A CPU has no spare width: there, rows decide the seconds, not rounds.")


def table(reports: dict[str, Report]) -> str:
    """The runs as an aligned text table."""
    lines = [("", "rounds", "rows", "seconds", "PSNR")]
    for label, report in reports.items():
        psnr = "reference" if report.psnr_db is None else in_decibels(report.psnr_db)
        lines.append((label, str(report.rounds), str(report.nfe), f"{report.seconds:.2f}", psnr))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
