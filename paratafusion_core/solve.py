"""The public entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .automatic import automatic
from .collocation import by_collocation
from .denoisers import Denoise
from .iterate import iterate
from .job import Job, Progress, Solution, Status
from .options import Options
from .plan import Machine
from .surroundings import plain_torch
from .system import System
from .trajectory import Trajectory

__all__ = ["Progress", "Solution", "Status", "solve"]


def solve(
    system: System,
    denoise: Denoise,
    options: Options = Options(),
    *,
    warm: Trajectory | None = None,
    callback: Callable[[Progress], Any] | None = None,
    keep_trajectory: bool = True,
    machine: Machine | None = None,
) -> Solution:
    """Solve ``system``: the sequential sampler's result in fewer, batched model calls.

    The rounds never exceed ``system.evaluations``: the first row of a window is exact, so it freezes. Exceptions of
    ``denoise`` and ``callback`` pass through; nothing is kept, and ``system`` is never changed. Both run under the
    caller's autocast and default device, the engine's own sums without. These are float32 matrix products: leave
    ``torch.backends.cuda.matmul.allow_tf32`` off, as it is by default.

    Args:
        system: the sampler's run.
        denoise: ``(x [n, B, ...], sigma [n]) -> [n, B, ...]`` with n at most the window, in the dtype and on the
            device of ``system.S``. Rows must not influence each other.
        options: see :class:`Options`.
        warm: an earlier run's trajectory of the same latent shape; other noise levels are interpolated. Of a run of
            this same system that was capped by ``max_rounds``, the final rows are not evaluated again but for a few,
            and an automatic plan or window goes on from where it was.
        callback: called after each round.
        keep_trajectory: gather D of every row in half precision (K states of memory on the device until the end).
        machine: what is known of the machine, for solver ``auto``; without it the run measures all it needs.

    Raises:
        ValueError: an argument is of another type, ``warm`` has another latent shape, ``options.flow`` does not fit the
            sigmas, solver ``collocation`` cannot serve the system (see :class:`Options`), or ``denoise`` returned
            something else than floats of its input's shape.
        NotFinite: a ValueError; ``denoise`` is not finite at an exact state, with solver ``collocation`` at any state
            that it is shown.
    """
    for name, value, kind in (("system", system, System), ("options", options, Options)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}; a {kind.__name__} is allowed")
    if machine is not None and not isinstance(machine, Machine):
        raise ValueError(f"machine is a {type(machine).__name__}; a Machine is allowed")
    if warm is not None and not isinstance(warm, Trajectory):
        raise ValueError(f"warm is a {type(warm).__name__}; a Trajectory, as of load_trajectory, is allowed")
    for name, function in (("denoise", denoise), ("callback", denoise if callback is None else callback)):
        if not callable(function):
            raise ValueError(f"{name} is a {type(function).__name__}; a function is allowed")
    with torch.no_grad(), plain_torch(system.S.device.type) as as_before:
        tell = None if callback is None else as_before(callback)
        job = Job(system, as_before(denoise), options, warm, tell, keep_trajectory)
        if options.solver == "auto":
            return automatic(job, machine or Machine())
        if options.solver == "collocation" and options.tolerance > 0:
            return by_collocation(job)
        if options.solver == "collocation":  # exact: row by row costs least
            job = replace(job, options=replace(options, window=1))
        return iterate(job)
