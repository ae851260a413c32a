"""A whole run of the collocation solver: its report, trajectory and outcome."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from ..job import Job, Progress, Solution, Status, close
from ..rows import Scales
from ..trajectory import Trajectory
from .run import collocate, refusal


def by_collocation(
    job: Job, window: Callable[[], int] | None = None, clock: Callable[[], float] = time.perf_counter
) -> Solution:
    """Run ``job`` with the collocation solver.

    Args:
        window: towards a target, the window of the next round; None for the options' throughout.
        clock: seconds, rising; of the rounds.

    Raises:
        ValueError: it cannot serve the system.
    """
    begin = time.perf_counter()
    system, options, callback = job.system, job.options, job.callback
    why = refusal(system, options)
    if why is not None:
        raise ValueError(f"solver is 'collocation'; quasi-newton is allowed for sampler {system.sampler}, as {why}")
    report = job.report()
    report.target_db = options.target
    K, shape = system.evaluations, system.S.shape[1:]

    def tell(frozen: int, first: int, residual: list[float], picture: Tensor) -> None:
        if callback is not None:
            shown = picture.reshape(shape).clone()
            callback(Progress(report.rounds, frozen, K, report.nfe, first, residual, shown))

    scales = Scales.of(system, options.flow, options.data_rms)
    found = collocate(job, scales, report, tell, window, clock)
    trajectory = None
    if found.D is not None:
        kept = found.D.reshape(K, *shape)
        trajectory = Trajectory(
            kept, system.sigmas.clone(), system.sampler, flow=options.flow, part=found.part, noisy=system.noisy
        )
    status = Status.CONVERGED if found.finished else Status.MAX_ROUNDS
    close(report, status, time.perf_counter() - begin)
    return Solution(found.picture, status, report, trajectory)
