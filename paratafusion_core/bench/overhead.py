"""What a round costs beside the model call, measured with a model that costs next to nothing."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from ..schedules import SIGMA_MAX, karras
from ..schemes import ddim
from ..solve import Progress, solve
from ..system import System
from .hardware import synchronise

_SEED = 20_240_709


def measure_overhead(
    shape: tuple[int, ...],
    window: int,
    batch: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    solver: str = "quasi-newton",
    rounds: int = 200,
    callback: bool = False,
) -> dict[str, Any]:
    """The engine's milliseconds a round: time between two model calls, from one's return to the next one's start.

    The model is ``0.9 x + 0.1 (start of the run)``, which the tolerance keeps from freezing more than a row a round;
    on an accelerator it waits for the queue at its start and at its end, so that the engine's kernels count as the
    engine's and its own do not. Whole runs are made until ``rounds`` rounds with a full window are measured; the
    first run only warms up. Trajectories are kept, as by default.

    Args:
        shape: of one image's state, ``[C, H, W]`` as a rule.
        window: rows a round, of at least 2.
        batch: images. device, dtype: of the states; float32 or float64.
        solver: see :class:`Options`. rounds: measured, of at least 1. callback: whether a callback takes previews.

    Returns:
        JSON-ready: the arguments, ``rounds`` measured, wall time as ``median_ms`` and ``fastest_ms`` (the 5th
        percentile), ``cpu_ms`` (the median of the thread's own time, which other processes do not stretch), and
        ``share_of_20_ms`` of the median beside a 20 ms evaluation.
    """
    device = torch.device(device)
    start = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(_SEED), dtype=dtype).to(device)
    sigmas = karras(max(3 * window, 48))
    system = ddim(start * SIGMA_MAX, sigmas)
    options = Options(solver, tol=1e-30, window=window)
    _run(system, options, callback, start)
    gaps: list[tuple[float, float]] = []
    while len(gaps) < rounds:
        gaps += _run(system, options, callback, start)
    taken = sorted(wall for wall, _ in gaps)
    median = statistics.median(taken) * 1e3
    return {
        "shape": list(shape),
        "window": window,
        "batch": batch,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "solver": solver,
        "callback": callback,
        "rounds": len(taken),
        "median_ms": median,
        "fastest_ms": taken[len(taken) // 20] * 1e3,
        "cpu_ms": statistics.median(cpu for _, cpu in gaps) * 1e3,
        "share_of_20_ms": median / (median + 20),
    }


def _run(system: System, options: Options, callback: bool, start: Tensor) -> list[tuple[float, float]]:
    """Seconds between the model calls of one run, of the rounds whose window was full: wall, and this thread's."""
    wait = partial(synchronise, start.device)
    gaps: list[tuple[float, float]] = []
    left: list[tuple[float, float]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        wait()
        if left and len(x) == options.window:
            wall, cpu = left[-1]
            gaps.append((time.perf_counter() - wall, time.thread_time() - cpu))
        D = torch.lerp(start, x, 0.9)
        wait()
        left.append((time.perf_counter(), time.thread_time()))
        return D

    def look(progress: Progress) -> None:
        del progress

    solve(system, denoise, options, callback=look if callback else None)
    return gaps
