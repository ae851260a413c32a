"""What a caller may choose, as one small frozen record."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import check_choice, check_count, check_real

SOLVERS = ("quasi-newton", "parataa", "picard", "picard-eps", "sequential")
#: Tolerances of the presets: of the freeze rule, and of ParaTAA's residual rule (its tau).
PRESETS = {"fast": 1e-2, "balanced": 3e-3, "strict": 1e-3, "exact": 0.0}
PARATAA_PRESETS = {"fast": 1e-2, "balanced": 1e-3, "strict": 1e-4, "exact": 0.0}


@dataclass(frozen=True)
class Options:
    """How to solve a :class:`System`.

    Attributes:
        solver: ``quasi-newton`` (default), ``parataa`` (the paper), ``picard`` (D held), ``picard-eps`` (eps held, as
            ParaDiGMS) or ``sequential``.
        preset: ``fast``, ``balanced``, ``strict`` or ``exact``: the tolerance, when ``tol`` is None.
        tol: tolerance of at least 0; 0 reproduces the sequential result to the rounding of the model's kernels.
        window: rows evaluated together: a number of at least 1 (clamped to the run), ``"full"``, or ``"auto"``, which
            widens the window while the measured rows frozen per second rise: equal runs may then differ within the
            tolerance.
        history: secants a row keeps (quasi-newton, 2), or the iterates that Anderson acceleration sees (parataa, 3;
            1 is the plain fixed point). At least 1.
        order: of ParaTAA's equations, at least 1 and clamped to the window; min(20, window) when None.
        max_rounds: stop after so many rounds with the picture as it is.
        rows, target_db: for the collocation solver, which is not in this version; must be None.
        flow: the states are flow-matching states, ``x = (1 - sigma) x0 + sigma eps``.
        data_rms: rms of clean data, above 0: 1 for latents. The tolerance is relative to it: data far smaller than
            it says are solved less accurately.

    Raises:
        ValueError: a value is out of these bounds.
    """

    solver: str = "quasi-newton"
    preset: str = "balanced"
    tol: float | None = None
    window: int | str = 8
    history: int | None = None
    order: int | None = None
    max_rounds: int | None = None
    rows: int | None = None
    target_db: float | None = None
    flow: bool = False
    data_rms: float = 1.0

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, SOLVERS)
        check_choice("preset", self.preset, PRESETS)
        if self.tol is not None:
            check_real("tol", self.tol, low=0.0)
        if isinstance(self.window, str):
            if self.window not in ("full", "auto"):
                raise ValueError(f"window is {self.window!r}; a whole number of at least 1, full or auto is allowed")
        else:
            object.__setattr__(self, "window", check_count("window", self.window))
        for name in ("history", "order", "max_rounds"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("rows", "target_db"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; solver {self.solver} has no use for it, leave it out"
                )
        check_real("data_rms", self.data_rms, above=0.0)

    @property
    def tolerance(self) -> float:
        """``tol``, or the preset's."""
        if self.tol is not None:
            return float(self.tol)
        return (PARATAA_PRESETS if self.solver == "parataa" else PRESETS)[self.preset]
