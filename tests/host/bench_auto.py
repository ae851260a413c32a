"""KSampler against KSampler (Parallel) with its defaults on the demo model: paired runs, one after the other.

    python tests/host/bootstrap.py run tests/host/bench_auto.py [PAIRS]

Prints for each setting the ratio of the two times (parallel over the host's own), its median and worst over PAIRS
(10) pairs, the first of which also measures the machine; of the wall clock, and of the processor's time, which other
programs on the machine disturb less (both are run with one thread).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401  (makes the host and the pack importable)
import torch
from paratafusion_pack.nodes.demo import DemoModel, DemoPrompt
from paratafusion_pack.nodes.host import sampling
from paratafusion_pack.nodes.host.settings import Outcome, Settings

import nodes as host_nodes

SETTINGS = (("euler", 20), ("ddim", 50))
CFG = 4.0


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall time and processor time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def pairs(model: Any, sampler: str, steps: int, count: int) -> list[tuple[float, float, Outcome]]:
    """``(wall, processor, outcome)`` of each pair, times as parallel / host's own; which comes first alternates."""
    conds = [DemoPrompt.execute(text).args[0] for text in ("large red circle, dark background", "")]
    latent = {"samples": torch.zeros(1, 3, 32, 32)}
    found = []
    for seed in range(count):
        outcome = Outcome()

        def theirs(seed: int = seed) -> None:
            host_nodes.common_ksampler(model, seed, steps, CFG, sampler, "normal", *conds, dict(latent))

        def ours(seed: int = seed, outcome: Outcome = outcome) -> None:
            request = sampling.Request(model, seed, steps, CFG, sampler, "normal", *conds, dict(latent))
            sampling.run(request, Settings(), outcome)

        first, second = (theirs, ours) if seed % 2 == 0 else (ours, theirs)
        took = {first: seconds(first), second: seconds(second)}
        wall, cpu = (mine / own for mine, own in zip(took[ours], took[theirs], strict=True))
        found.append((wall, cpu, outcome))
    return found


def main(arguments: list[str]) -> None:
    """Command line of this script."""
    torch.set_num_threads(1)
    count = int(arguments[0]) if arguments else 10
    model = DemoModel.execute(1).args[0]
    pairs(DemoModel.execute(1).args[0], "euler", 4, 1)  # warms the program up, on a model of its own
    for sampler, steps in SETTINGS:
        found = pairs(model, sampler, steps, count)
        for name, ratios in zip(("wall clock", "processor"), list(zip(*found, strict=True))[:2], strict=True):
            print(f"{sampler} {steps}, {name}: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}, "
                  f"each {' '.join(f'{r:.2f}' for r in ratios)}", flush=True)  # fmt: skip
        for at in (0, -1):
            report = found[at][2].report
            print(f"    {report.solver}, {report.rounds} rounds, {report.nfe} rows; {report.plan}")


if __name__ == "__main__":
    main(sys.argv[1:])
