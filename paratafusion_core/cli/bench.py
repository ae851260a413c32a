"""``paratafusion bench``: solvers on the demo network over seeds, as json lines and a markdown table."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..demo import model
from ..demo.prompt import COLOURS, SHAPES, SIZES
from ..errors import check_count
from ..files import check_folder, write_text
from ..options import Options
from ..report import fidelity
from ..solve import solve
from .sample import make_task, play


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    sampler: str
    schedule: str
    steps: int
    cfg: float
    window: int | str
    solver: str = "quasi-newton"
    preset: str = "balanced"

    @property
    def problem(self) -> tuple[str, str, int, float]:
        """What the sequential reference depends on."""
        return self.sampler, self.schedule, self.steps, self.cfg


QUICK = (
    Case("ddim", "normal", 50, 4.0, 8),
    Case("ddim", "normal", 50, 4.0, 16),
    Case("ddim", "normal", 50, 4.0, 16, "parataa"),
    Case("ddim", "normal", 50, 4.0, 16, "picard"),
    Case("ddim", "normal", 50, 4.0, "full"),
    Case("ddim", "normal", 100, 4.0, "full"),
    Case("ddpm", "normal", 50, 4.0, 16),
    Case("dpmpp_2m", "karras", 20, 4.0, 8),
    Case("ddim", "normal", 50, 7.5, 16),
)
SUITES = {"quick": QUICK}


def prompts() -> Iterator[str]:
    """Prompts in an order that mixes sizes, colours and shapes, for ever; seed n takes the n-th."""
    for i in itertools.count():
        yield f"{SIZES[i % 2]} {COLOURS[i % 6]} {SHAPES[(i + i // 6) % 6]}"


def run(arguments: argparse.Namespace) -> None:
    """The command: writes ``<suite>.jsonl`` and ``<suite>.md`` into the folder."""
    seeds = check_count("seeds", arguments.seeds)
    cases, out = SUITES[arguments.suite], check_folder(arguments.out)
    network = model.load()
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * seeds, unit="run") as bar:
        for seed, prompt in zip(range(seeds), prompts(), strict=False):
            references: dict[tuple[str, str, int, float], tuple[Tensor, float]] = {}
            for case in cases:
                task = make_task(prompt, *case.problem, seed=seed, network=network)
                if case.problem not in references:
                    plain = play(task, Options(solver="sequential"), "sequential", quiet=True, keep_trajectory=False)
                    references[case.problem] = plain.x, plain.report.seconds
                reference, seconds = references[case.problem]
                options = Options(case.solver, case.preset, window=case.window, flow=task.flow, data_rms=task.data_rms)
                done = solve(task.system, task.denoise, options, keep_trajectory=False)
                report, near = done.report, fidelity(done.x, reference, task.peak)
                rows.append(
                    asdict(case)
                    | {"seed": seed, "prompt": prompt, "rounds": report.rounds, "nfe": report.nfe}
                    | {"sequential_nfe": report.sequential_nfe, "psnr_db": near.psnr_db, "seconds": report.seconds}
                    | {"sequential_seconds": seconds, "engine_seconds": report.engine_seconds}
                )
                bar.update()
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = table(rows)
    write_text(out / f"{arguments.suite}.jsonl", lines)
    write_text(out / f"{arguments.suite}.md", text + "\n")
    print(lines if arguments.json else text, end="" if arguments.json else "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and worst over the seeds of each case, in the order of the rows."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("sampler", "schedule", "steps", "cfg", "window", "solver", "preset"))
        groups.setdefault(key, []).append(row)
    lines = [
        "| sampler | CFG | window | solver | rounds, mean (worst) | nfe / sequential "
        "| PSNR dB, mean (worst) | time / sequential |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (sampler, schedule, steps, cfg, window, solver, _), runs in groups.items():

        def mean(values: Iterator[float], count: int = len(runs)) -> float:
            return sum(values) / count

        rounds, psnr = [r["rounds"] for r in runs], [r["psnr_db"] for r in runs]
        cost = mean(r["nfe"] / r["sequential_nfe"] for r in runs)
        clock = mean(r["seconds"] / r["sequential_seconds"] for r in runs)
        lines.append(
            f"| {sampler}-{steps} {schedule} | {cfg:g} | {window} | {solver} "
            f"| {mean(iter(rounds)):.1f} ({max(rounds)}) "
            f"| {cost:.2f} | {mean(iter(psnr)):.1f} ({min(psnr):.1f}) | {clock:.2f} |"
        )
    return "\n".join(lines)
