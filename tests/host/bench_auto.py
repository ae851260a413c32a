"""KSampler against KSampler (Parallel) with its defaults: paired runs, one after the other.

    python tests/host/bootstrap.py run tests/host/bench_auto.py [--pairs 10] [--model demo sd15 sdxl]
        [--preset balanced standard]

Prints for each setting the ratio of the two times (parallel over the host's own), its median and worst over the pairs,
the first of which also measures the machine; of the wall clock, and of the processor's time, which other programs on
the machine disturb less (both are run with one thread). The demo model is a trained one, sd15 and sdxl have random
weights and make no picture: what they show is what evaluations cost, and that the node does not lose where it finds
nothing to gain. On a GPU: ``COMFYUI_PATH=.. PARATAFUSION_HOST_ARGS=--fp16-unet python tests/host/bench_auto.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401  (makes the host and the pack importable)
import torch
from full import FULL
from paratafusion_pack.nodes.demo import DemoModel, DemoPrompt
from paratafusion_pack.nodes.host import sampling
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.paratafusion_core.bench import hardware
from paratafusion_pack.paratafusion_core.report import fidelity

import nodes as host_nodes

SETTINGS = (("euler", 20), ("ddim", 50))
CFG = 4.0
#: Pictures that the host draws together, to see what a batch costs.
BATCHES = (1, 2, 4, 8, 16)


class Case:
    """A model with prompts, an empty latent, and the range of its pictures (None: each one's own)."""

    def __init__(self, name: str) -> None:
        self.model: Any
        self.peak: float | None
        if name == "demo":
            self.model = DemoModel.execute(1).args[0]
            self.conds = [DemoPrompt.execute(text).args[0] for text in ("large red circle, dark background", "")]
            self.latent, self.peak = {"samples": torch.zeros(1, 3, 32, 32)}, 2.0
        else:
            full, self.peak = FULL[name], None
            self.model, self.conds, self.latent = full.build(), full.prompts(), full.latent()

    def theirs(self, sampler: str, steps: int, seed: int, batch: int = 1) -> torch.Tensor:
        """The host's KSampler, for ``batch`` pictures."""
        latent = {"samples": self.latent["samples"].expand(batch, -1, -1, -1).clone()}
        given = (seed, steps, CFG, sampler, "normal", *self.conds, latent)
        return host_nodes.common_ksampler(self.model, *given)[0]["samples"]

    def ours(self, sampler: str, steps: int, seed: int, outcome: Outcome, settings: Settings) -> torch.Tensor:
        """KSampler (Parallel)."""
        given = (seed, steps, CFG, sampler, "normal", *self.conds, dict(self.latent))
        return sampling.run(sampling.Request(self.model, *given), settings, outcome)["samples"]


def seconds(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """Result, wall time and processor time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def pairs(
    case: Case, sampler: str, steps: int, count: int, settings: Settings
) -> list[tuple[float, float, float, Outcome]]:
    """``(wall, processor, dB, outcome)`` of each pair, times as parallel / host's own; which is first alternates."""
    found = []
    for seed in range(count):
        outcome = Outcome()
        calls: list[Callable[[], torch.Tensor]] = [
            lambda seed=seed: case.theirs(sampler, steps, seed),
            lambda seed=seed, outcome=outcome: case.ours(sampler, steps, seed, outcome, settings),
        ]
        took = [seconds(calls[one]) for one in ((0, 1) if seed % 2 == 0 else (1, 0))]
        (reference, *own), (result, *mine) = took if seed % 2 == 0 else took[::-1]
        wall, cpu = (m / o for m, o in zip(mine, own, strict=True))
        found.append((wall, cpu, fidelity(result, reference, case.peak).psnr_db, outcome))
    return found


def batches(case: Case, repeats: int = 3, steps: int = 10) -> None:
    """Print what a step of the host's KSampler takes for one picture and for more of them together."""
    shown = []
    for batch in BATCHES:
        case.theirs("euler", 2, 0, batch)
        took = [seconds(lambda batch=batch: case.theirs("euler", steps, 0, batch))[1] for _ in range(repeats)]
        shown.append(f"{batch}: {1e3 * statistics.median(took) / steps:.1f}")
    print(f"    ms a step, pictures: {', '.join(shown)}", flush=True)


def show(title: str, found: list[tuple[float, float, float, Outcome]]) -> None:
    """Print what :func:`pairs` found."""
    walls, cpus, decibels, _ = zip(*found, strict=True)
    for name, ratios in (("wall clock", walls), ("processor", cpus)):
        print(f"{title}, {name}: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}, "
              f"each {' '.join(f'{r:.2f}' for r in ratios)}")  # fmt: skip
    shown = [min(one, 120.0) for one in decibels]
    print(f"    against KSampler's: mean {statistics.mean(shown):.1f} dB, worst {min(shown):.1f} dB")
    for at in (0, -1):
        report = found[at][3].report
        print(f"    {report.solver}, {report.rounds} rounds, {report.nfe} rows; {report.plan}", flush=True)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="KSampler (Parallel) with defaults against KSampler")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--model", nargs="+", choices=("demo", *FULL), default=["demo"])
    parser.add_argument("--preset", nargs="+", default=["balanced"], help="of Parallel Options, whose default it is")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.model:
        case = Case(name)
        print(f"{name} on {hardware.line(hardware.describe(case.model.load_device))}", flush=True)
        pairs(Case("demo"), "euler", 4, 1, Settings())  # warms the program up, on a model of its own
        batches(case)
        for sampler, steps in SETTINGS:
            for preset in chosen.preset:
                found = pairs(case, sampler, steps, chosen.pairs, Settings(preset=preset))
                show(f"{name}, {sampler} {steps}, {preset}", found)


if __name__ == "__main__":
    main()
