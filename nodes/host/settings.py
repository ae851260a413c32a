"""What the artist chose, on its way from the options node to the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...paratafusion_core import Options, Report, Trajectory
from ...paratafusion_core.options import TARGETS

SOLVERS = ("auto", "quasi-newton", "parataa", "picard", "sequential", "collocation")
#: Presets that promise a tolerance, and all.
TOLERANCES = ("fast", "balanced", "strict", "exact")
PRESETS = (*TOLERANCES, *TARGETS)
#: The tolerances of the presets that ask for a fidelity in dB, where no solver works to one.
_WITHOUT_TARGET = {"sketch": "fast", "standard": "balanced", "fine": "strict"}
#: Rows of collocation at window 1 where neither rows nor a target is asked for: up to this CFG, and above.
_LOW_CFG, _LOW_ROWS, _HIGH_ROWS = 5.0, 12, 22


@dataclass(frozen=True)
class Settings:
    """Choices of a run; the defaults are those of a node without an options node.

    Attributes:
        solver: ``auto`` lets the engine choose, ``sequential`` is the host's own sampler; ``collocation`` becomes
            ``auto`` where it cannot serve.
        preset: how close to the sequential picture.
        tol: a tolerance of one's own instead of the preset's, or None.
        window: steps evaluated together; None measures and chooses (collocation: 1).
        history, order: of the solvers that have them, or None.
        max_rounds: stop there with the picture as it is, or None.
        target_db, rows: for solvers that evaluate fewer steps than the sampler has; the others ignore them.
    """

    solver: str = "auto"
    preset: str = "balanced"
    tol: float | None = None
    window: int | None = None
    history: int | None = None
    order: int | None = None
    max_rounds: int | None = None
    target_db: float | None = None
    rows: int | None = None

    @property
    def sequential(self) -> bool:
        """Whether the host's own sampler is asked for."""
        return self.solver == "sequential"

    @property
    def aims(self) -> bool:
        """Whether a fidelity in dB is asked for."""
        return self.target_db is not None or self.preset in TARGETS

    @property
    def asks_target(self) -> bool:
        """Whether a fidelity in dB is asked for, which collocation may serve."""
        return self.aims and self.own_refusal is None

    @property
    def own_refusal(self) -> str | None:
        """Why these choices rule collocation out, None where they do not."""
        exact = self.tol == 0 or (self.tol is None and self.preset == "exact")
        return "the exact picture is asked for, and it interpolates" if exact else None

    @property
    def one_by_one(self) -> Settings | None:
        """These choices where calls are of one noise level each; None where they ask for nothing that is faster so."""
        asks = self.solver == "collocation" or (self.solver == "auto" and self.asks_target)
        # a cap of rounds was meant for such of many rows
        wider = self.max_rounds is not None and (self.solver == "auto" or self.window not in (None, 1))
        serves = asks and not wider and self.own_refusal is None
        return replace(self, solver="collocation", window=None) if serves else None

    @property
    def plans(self) -> bool:
        """Whether the host's own sampler may be chosen: a window leaves nothing to choose, and it cannot be capped."""
        return self.solver == "auto" and self.window is None and self.max_rounds is None

    def options(self, flow: bool, data_rms: float, *, refusal: str | None = None, cfg: float | None = None) -> Options:
        """The engine's options for a model whose states are flow states or not, and the rms of its data.

        Args:
            refusal: why collocation cannot serve this run, None if it can. cfg: of the guider, None where unknown.

        Raises:
            ValueError: a value is out of range.
        """
        serves = (refusal or self.own_refusal) is None
        solver = self._solver(serves)
        spends = solver == "collocation" or (solver == "auto" and serves)
        window: int | str = "auto" if self.window is None else self.window
        rows = self.rows
        if solver == "collocation" and self.window is None:
            window = 1
            if rows is None and not self.asks_target and cfg is not None:
                rows = _LOW_ROWS if cfg <= _LOW_CFG else _HIGH_ROWS
        return Options(
            solver=solver,
            preset=self.preset if spends else _WITHOUT_TARGET.get(self.preset, self.preset),
            tol=self.tol if spends else self._tolerance(),
            window=window,
            history=self.history,
            order=self.order,
            max_rounds=self.max_rounds,
            rows=rows if spends else None,
            target_db=self.target_db if spends else None,
            flow=flow,
            data_rms=data_rms,
        )

    def _tolerance(self) -> float | None:
        """``tol``, or what a target in dB wants where collocation cannot serve it and the preset's does not do.

        Solvers that are asked for by name have no use for a target.
        """
        if self.tol is not None or self.target_db is None or self.solver not in ("collocation", "auto"):
            return self.tol
        wanted, usual = (Options("auto", self.preset, target_db=db).tolerance for db in (self.target_db, None))
        return wanted if wanted < usual else None

    def _solver(self, serves: bool) -> str:
        """The engine's solver; where collocation is asked for and cannot serve, what ``auto`` would take without it."""
        solver = self.solver
        if solver == "collocation" and not serves:
            solver = "auto"
        if solver == "auto" and self.window is not None:
            solver = "collocation" if self.asks_target and serves else "quasi-newton"
        return solver


@dataclass
class Outcome:
    """What a run leaves behind, filled by the sampler and read by the node that started it.

    Attributes:
        want_trajectory: set beforehand: whether anyone will read the trajectory.
        problem: set beforehand: tells apart what makes the picture; None where it is not known.
        report: the engine's account; of a fallback too.
        trajectory: of a parallel run, where it was wanted.
    """

    want_trajectory: bool = False
    problem: str | None = None
    report: Report | None = None
    trajectory: Trajectory | None = None

    def nothing_to_do(self, sampler: str, settings: Settings) -> None:
        """Account for a run without steps: denoise 0, an empty schedule, a start behind the end."""
        self.report = Report(sampler, 0, "sequential", settings.preset, settings.tol or 0.0, 0)

    def summary(self) -> str:
        """One line for the node."""
        report = self.report
        if report is None or report.steps == 0:
            return "nothing to do"
        if report.fallback is not None:
            return f"sequential: {report.fallback}"
        if report.solver == "sequential":
            return f"sequential: {report.steps} steps"
        return f"{report.rounds} rounds for {report.sequential_nfe} evaluations ({report.nfe} rows)"
