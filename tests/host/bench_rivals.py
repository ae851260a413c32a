"""The host's own EasyCache against collocation and fewer steps, at equal evaluations; a table on standard output.

    python tests/host/bootstrap.py run tests/host/bench_rivals.py [--seeds 8]

Everything runs through the host: EasyCache is its node on the demo model and its KSampler, collocation is the Parallel
sampler. Evaluations are counted at the network itself; one is a picture at one noise level with both prompts. A picture
is held against the KSampler's own of all steps, of the same seed; PSNR is for pixels of [-1, 1].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import conftest  # noqa: F401  (makes the host and the pack importable)
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from paratafusion_pack.nodes.demo import DemoModel, DemoPrompt
from paratafusion_pack.nodes.host import sampling
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.paratafusion_core.bench.problems import prompt_of
from paratafusion_pack.paratafusion_core.report import fidelity
from torch import Tensor

import nodes as host_nodes

#: sampler, scheduler.
CASES = (("ddim", "normal"), ("euler", "karras"))
STEPS, CFG = 50, 4.0
#: Of EasyCache, whose default is 0.2.
THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
WAYS = ("EasyCache", "collocation, window 1", "collocation, window 4", "fewer steps")


@dataclass
class Case:
    """A seed's run on a sampler: what its ways to fewer evaluations have in common."""

    model: Any
    seed: int
    sampler: str
    scheduler: str
    conds: tuple[list, list] = field(init=False)
    reference: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.conds = tuple(DemoPrompt.execute(text).args[0] for text in (prompt_of(self.seed), ""))
        self.reference = self.plain(self.model)

    @staticmethod
    def latent() -> dict[str, Tensor]:
        return {"samples": torch.zeros(1, 3, 32, 32)}

    def plain(self, model: Any, steps: int = STEPS) -> Tensor:
        """The host's KSampler."""
        given = (self.seed, steps, CFG, self.sampler, self.scheduler, *self.conds, self.latent())
        return host_nodes.common_ksampler(model, *given)[0]["samples"]

    def collocation(self, rows: int, window: int) -> Tensor:
        """The parallel sampler."""
        given = (self.seed, STEPS, CFG, self.sampler, self.scheduler, *self.conds, self.latent())
        outcome = Outcome()
        settings = Settings(solver="collocation", rows=rows, window=window)
        result = sampling.run(sampling.Request(self.model, *given), settings, outcome)["samples"]
        if outcome.report is None or outcome.report.fallback or outcome.report.solver != "collocation":
            raise RuntimeError(f"collocation did not run: {outcome.report}")
        return result

    def decibels(self, result: Tensor) -> float:
        return min(fidelity(result, self.reference, 2.0).psnr_db, 200.0)


@contextmanager
def counting(model: Any) -> Iterator[Callable[[], float]]:
    """Evaluations of the network so far: its rows over the two prompts."""
    seen = 0

    def count(_: Any, given: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(given[0])

    hook = model.model.diffusion_model.inner.register_forward_pre_hook(count)
    try:
        yield lambda: seen / 2
    finally:
        hook.remove()


def counted(case: Case, run: Callable[[], Tensor]) -> tuple[float, float]:
    """``(evaluations, PSNR in dB)`` of a run."""
    with counting(case.model) as evaluations:
        result = run()
        return evaluations(), case.decibels(result)


def rung(case: Case, threshold: float) -> list[tuple[float, float]]:
    """EasyCache at a threshold, then the other ways with as many evaluations, in the order of :data:`WAYS`."""
    cached = EasyCacheNode.execute(case.model, threshold, 0.15, 0.95, False).args[0]
    spent, decibels = counted(case, lambda: case.plain(cached))
    rows = max(round(spent), 2)
    return [
        (spent, decibels),
        counted(case, lambda: case.collocation(rows, 1)),
        counted(case, lambda: case.collocation(rows, 4)),
        counted(case, lambda: case.plain(case.model, rows)),
    ]


def cell(figures: list[tuple[float, float]]) -> str:
    """Mean and lowest PSNR of the seeds, and the mean of the evaluations."""
    spent, decibels = zip(*figures, strict=True)
    mean = sum(decibels) / len(decibels)
    return f"{mean:.1f} ({min(decibels):.1f}) at {sum(spent) / len(spent):.1f}"


def main() -> None:
    """Print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="pictures of each rung, from seed 0 on")
    seeds = parser.parse_args().seeds
    if seeds < 1:
        parser.error(f"seeds is {seeds}; a whole number of at least 1 is allowed")
    host_nodes.comfy.utils.PROGRESS_BAR_ENABLED = False
    model = DemoModel.execute(1).args[0]
    for sampler, scheduler in CASES:
        cases = [Case(model, seed, sampler, scheduler) for seed in range(seeds)]
        print(f"\n{sampler}, {scheduler}, {STEPS} steps, CFG {CFG:g}, {seeds} seeds: mean (lowest) dB at evaluations\n")
        print(f"| threshold | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}", flush=True)
        for threshold in THRESHOLDS:
            rungs = [rung(case, threshold) for case in cases]
            print(f"| {threshold:g} | {' | '.join(cell(list(way)) for way in zip(*rungs, strict=True))} |", flush=True)


if __name__ == "__main__":
    main()
