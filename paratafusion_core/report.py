"""What a run did, in plain numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Report:
    """A run's account; lists have one entry a round.

    Attributes:
        sampler, steps: of the system.
        solver, preset, tolerance: how it was solved; the preset is ``custom`` where a tolerance was given.
        sequential_nfe: K, the rows that the sequential sampler evaluates.
        rounds: batched model calls, but for those before the plan of solver ``auto`` and the probe's.
        nfe: rows evaluated, the sum of ``rows_per_round``.
        frozen_per_round: rows final after each round; with collocation, whose rows are refined to the end, how far it
            was.
        window_per_round: rows of the window of each round.
        window_reason: why the window is what it is.
        residuals: per round the window's first row and each row's residual in units of the solver's own rule: the
            freeze rule, ParaTAA's tau; with collocation a node's movement since it was evaluated, and between nodes the
            error expected of the interpolation. Where a run goes on from a capped one, its first round has NaN, None in
            :meth:`to_dict`, for the final rows that it did not look at.
        status: ``converged`` or ``max_rounds``.
        fallback: why the plain sampler ran instead (the host sets it), None if it did not.
        repairs: rows refilled because they were not finite or exploded.
        doubt: why the picture may be another one than the sequential sampler's, None where nothing speaks for it.
        target_db, estimated_db: the fidelity asked for and the one estimated without a reference, where the solver
            works to a target; for the range that ``Options.peak`` names, the picture's own without it.
        plan: what the automatic plan chose and why, None where nothing was left to choose.
        probe_nfe: rows evaluated before the run to see whether the model may be batched; not part of ``nfe``.
        warm: how a warm start was used, None for a cold one.
        seconds, model_seconds, engine_seconds: wall time; on an accelerator the wait for its queue counts as the
            model's, and what the caller's callback takes as the engine's, which the rounds' own seconds leave out.
        opening, recalled: where solver ``auto`` changed its plan, (rows, seconds) of the calls before that, and which
            rounds, counted from 0, took rows from them; or the round that checked a sketch's rows, one by one.
        predicted_speedup: sequential_nfe L(1) over the time of the rounds, from this run's measured latencies; None
            when no single row was measured, and of a run that ``max_rounds`` stopped.
        predicted_seconds: of the rounds, as the automatic plan had it when it was made.
        measured_speedup, psnr_db, max_abs, rel_l2, kernel_floor: filled where a sequential reference was run;
            ``psnr_peak`` names the range that PSNR refers to.
    """

    sampler: str
    steps: int
    solver: str
    preset: str
    tolerance: float
    sequential_nfe: int
    rounds: int = 0
    nfe: int = 0
    rows_per_round: list[int] = field(default_factory=list)
    frozen_per_round: list[int] = field(default_factory=list)
    window_per_round: list[int] = field(default_factory=list)
    window_reason: str = ""
    residuals: list[tuple[int, list[float]]] = field(default_factory=list)
    status: str = "converged"
    fallback: str | None = None
    repairs: int = 0
    doubt: str | None = None
    target_db: float | None = None
    estimated_db: float | None = None
    plan: str | None = None
    probe_nfe: int = 0
    warm: str | None = None
    seconds: float = 0.0
    model_seconds: float = 0.0
    engine_seconds: float = 0.0
    seconds_per_round: list[float] = field(default_factory=list)
    opening: list[tuple[int, float]] = field(default_factory=list)
    recalled: list[int] = field(default_factory=list)
    predicted_speedup: float | None = None
    measured_speedup: float | None = None
    psnr_db: float | None = None
    psnr_peak: float | None = None
    max_abs: float | None = None
    rel_l2: float | None = None
    kernel_floor: float | None = None
    predicted_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; an infinite PSNR becomes None: of equal pictures where ``max_abs`` is 0."""

        def clean(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            if isinstance(value, (list, tuple)):
                return [clean(v) for v in value]
            return value

        return {k: clean(v) for k, v in dataclasses.asdict(self).items()}

    @property
    def spent(self) -> float:
        """Seconds of the rounds and of the calls before the plan."""
        return sum(self.seconds_per_round) + sum(seconds for _, seconds in self.opening)

    def calls(self) -> list[tuple[int, float]]:
        """(rows, seconds) of the rounds that evaluated all of their rows, and of the calls before the plan."""
        rounds = zip(self.rows_per_round, self.seconds_per_round, strict=True)
        return [*self.opening, *(call for number, call in enumerate(rounds) if number not in self.recalled)]

    def compare(self, result: Tensor, reference: Tensor, peak: float | None = None) -> None:
        """Fill the fidelity figures against the sequential result (see :func:`fidelity`)."""
        figures = fidelity(result, reference, peak)
        self.psnr_db, self.psnr_peak = figures.psnr_db, figures.psnr_peak
        self.max_abs, self.rel_l2 = figures.max_abs, figures.rel_l2


@dataclass(frozen=True)
class Fidelity:
    """How near a result is to its reference: PSNR in dB for ``psnr_peak``, largest difference, relative L2 error.

    The PSNR of equal pictures is infinite, that of others for a range of 0 minus infinity.
    """

    psnr_db: float
    psnr_peak: float
    max_abs: float
    rel_l2: float


def in_decibels(psnr_db: float) -> str:
    """For people: a PSNR in dB, or that the pictures are equal and have none."""
    return "equal" if psnr_db == math.inf else f"{psnr_db:.1f} dB"


def fidelity(result: Tensor, reference: Tensor, peak: float | None = None) -> Fidelity:
    """Compare ``[B, ...]`` tensors; PSNR and relative error are the worst image's, peak the reference's range if None.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != reference.shape:
        raise ValueError(f"result has shape {list(result.shape)}; {list(reference.shape)}, the reference's, is allowed")
    a, b = (t.detach().to("cpu", torch.float64).reshape(len(t), -1) for t in (result, reference))
    peak = float(b.max() - b.min()) if peak is None else float(peak)
    square = ((a - b) ** 2).mean(1)
    worst = float(square.max())
    range_db = 20 * math.log10(peak) if peak > 0 else -math.inf
    psnr = math.inf if worst == 0 else range_db - 10 * math.log10(worst)
    relative = (square / (b**2).mean(1).clamp(min=1e-300)).max().sqrt()
    return Fidelity(psnr, peak, float((a - b).abs().max()), float(relative))
