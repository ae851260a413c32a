"""The solvers: one small record each; the loop that runs them is ``paratafusion_core/iterate.py``."""

from __future__ import annotations

from ..options import Options
from .base import Solver
from .newton import TriangularNewton
from .parataa import ParaTAA


def make(options: Options, total: int, warm: bool = False) -> Solver:
    """The solver that ``options`` name, with their hyper-parameters, for a cold or a warm start of ``total`` rows.

    A row is evaluated in no more rounds than the window has rows, so a longer history would take memory alone.
    """
    most = min(options.window, total) if isinstance(options.window, int) else total
    if options.solver == "parataa":
        return ParaTAA(tau=options.tolerance, history=min(options.history or 3, most), order=options.order)
    if options.solver == "quasi-newton":
        return TriangularNewton(history=min(options.history or 2, most), trust=0.15, borrows=warm)
    return TriangularNewton(history=0, slope="eps" if options.solver == "picard-eps" else "held")


__all__ = ["Solver", "make"]
