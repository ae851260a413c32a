"""The solvers: one small record each; the loop that runs them is ``paratafusion_core/iterate.py``."""

from __future__ import annotations

from ..options import Options
from .base import Solver
from .newton import TriangularNewton
from .parataa import ParaTAA


def make(options: Options, warm: bool = False) -> Solver:
    """The solver that ``options`` name, with their hyper-parameters, for a cold or a warm start."""
    if options.solver == "parataa":
        return ParaTAA(tau=options.tolerance, history=options.history or 3, order=options.order)
    if options.solver == "quasi-newton":
        return TriangularNewton(history=options.history or 2, trust=0.15, borrows=warm)
    return TriangularNewton(history=0, slope="eps" if options.solver == "picard-eps" else "held")


__all__ = ["Solver", "make"]
