"""What a caller may choose, as one small frozen record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import check_choice, check_count, check_real

SOLVERS = ("quasi-newton", "parataa", "picard", "picard-eps", "sequential", "collocation", "auto")
#: Tolerances of the presets: of the freeze rule, and of ParaTAA's residual rule (its tau). The last three ask for a
#: fidelity in dB instead, where the solver works to one.
PRESETS = {"fast": 1e-2, "balanced": 3e-3, "strict": 1e-3, "exact": 0.0, "sketch": 1e-2, "standard": 3e-3, "fine": 1e-3}
PARATAA_PRESETS = PRESETS | {"balanced": 1e-3, "strict": 1e-4, "standard": 1e-3, "fine": 1e-4}
TARGETS = {"sketch": 36.0, "standard": 42.0, "fine": 48.0}


@dataclass(frozen=True)
class Options:
    """How to solve a :class:`System`.

    Attributes:
        solver: ``quasi-newton`` (default), ``parataa`` (the paper), ``picard`` (D held), ``picard-eps`` (eps held, as
            ParaDiGMS), ``sequential``, or ``collocation``: D evaluated on a few rows and interpolated on the others,
            for samplers of one evaluation a step (at tolerance 0, all rows one by one); one that adds noise in every
            step is served at window 1 for a number of rows, half to three quarters of its steps, without a target.
            ``auto`` measures and takes what is predicted to be fastest: collocation where a target is asked for, else
            quasi-newton or sequential.
        preset: ``fast``, ``balanced``, ``strict`` or ``exact``: the tolerance, when ``tol`` is None. ``sketch``,
            ``standard`` and ``fine`` are targets of 36, 42 and 48 dB for collocation, and tolerances of 1e-2, 3e-3 and
            1e-3 for the others. For collocation ``fast``, ``balanced`` and ``strict`` are the same: it has no
            tolerance, ``rows`` and ``target_db`` decide.
        tol: tolerance of at least 0; 0 reproduces the sequential result to the rounding of the model's kernels, with
            collocation too, which makes no use of any other number.
        window: rows evaluated together: a number of at least 1 (clamped to the run), ``"full"``, or ``"auto"``, which
            widens the window while the measured rows frozen per second rise: equal runs may then differ within the
            tolerance. With solver ``auto`` a number is the most rows of a call; with collocation ``"auto"`` is 1.
        history: secants a row keeps (quasi-newton, 2), or the iterates that Anderson acceleration sees (parataa, 3;
            1 is the plain fixed point). At least 1 and clamped to the window; the other solvers have none.
        order: of ParaTAA's equations, at least 1 and clamped to the window; min(20, window) when None. The other
            solvers have none.
        max_rounds: stop after so many rounds with the picture as it is.
        rows: evaluations that collocation spends, at least 2; when None 16 at window 1 and 30 from window 4 on.
            Towards a target it begins with them, or with 5 if they are fewer; when None with what the target wants
            (``plan.target_rows``).
        target_db: fidelity in dB, above 0, that collocation works towards: rows are added until its estimate is 2 dB
            above and, at windows above 1, no evaluated row has moved far. Where solver ``auto`` takes another solver,
            that one's tolerance follows from it, if none is given.
        flow: the states are flow-matching states, ``x = (1 - sigma) x0 + sigma eps``.
        data_rms: rms of clean data, above 0: 1 for latents. The tolerance is relative to it: data far smaller than
            it says are solved less accurately, and of data far larger collocation estimates too many dB.
        peak: the range of clean data, above 0, that collocation's dB refer to; the picture's own range when None.

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
    peak: float | None = None

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
        if self.solver in ("collocation", "auto"):
            self._check_collocation()
        else:
            for name in ("rows", "target_db"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}; solver {self.solver} has no use for it, leave it out"
                    )
        if not isinstance(self.flow, (bool, np.bool_)):
            raise ValueError(f"flow is {self.flow!r}; True or False is allowed")
        object.__setattr__(self, "flow", bool(self.flow))
        object.__setattr__(self, "data_rms", check_real("data_rms", self.data_rms, above=0.0))
        if self.peak is not None:
            object.__setattr__(self, "peak", check_real("peak", self.peak, above=0.0))

    def _check_collocation(self) -> None:
        if self.rows is not None:
            check_count("rows", self.rows, low=2)
        if self.target_db is not None:
            check_real("target_db", self.target_db, above=0.0)

    @property
    def target(self) -> float | None:
        """``target_db``, or the preset's where no number of rows is asked for; None without one."""
        if self.target_db is not None:
            return float(self.target_db)
        return TARGETS.get(self.preset) if self.solver in ("collocation", "auto") and self.rows is None else None

    @property
    def tolerance(self) -> float:
        """``tol``, or the preset's; less where ``target_db`` wants it, should another solver than collocation run.

        The worst of the demo network's pictures have 60 dB at 3e-3 (``bench --suite quick``), and 20 more at a tenth.
        """
        if self.tol is not None:
            return float(self.tol)
        usual = (PARATAA_PRESETS if self.solver == "parataa" else PRESETS)[self.preset]
        return usual if self.target_db is None else min(usual, 3e-3 * 10 ** (-(float(self.target_db) - 56) / 20))
