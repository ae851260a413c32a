"""What the artist chose, on its way from the options node to the engine."""

from __future__ import annotations

from dataclasses import dataclass

from ...paratafusion_core import Options, Report, Trajectory

SOLVERS = ("auto", "quasi-newton", "parataa", "picard", "sequential")
PRESETS = ("fast", "balanced", "strict", "exact")


@dataclass(frozen=True)
class Settings:
    """Choices of a run; the defaults are those of a node without an options node.

    Attributes:
        solver: ``auto`` lets the engine choose, ``sequential`` is the host's own sampler.
        preset: how close to the sequential picture.
        tol: a tolerance of one's own instead of the preset's, or None.
        window: steps evaluated together; None measures and chooses.
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

    def options(self, flow: bool, data_rms: float) -> Options:
        """The engine's options for a model whose states are flow states or not, and the rms of its data.

        Raises:
            ValueError: a value is out of range.
        """
        return Options(
            solver="quasi-newton" if self.solver == "auto" else self.solver,
            preset=self.preset,
            tol=self.tol,
            window="auto" if self.window is None else self.window,
            history=self.history,
            order=self.order,
            max_rounds=self.max_rounds,
            flow=flow,
            data_rms=data_rms,
        )


@dataclass
class Outcome:
    """What a run leaves behind, filled by the sampler and read by the node that started it.

    Attributes:
        want_trajectory: set beforehand: whether anyone will read the trajectory.
        report: the engine's account; of a fallback too.
        trajectory: of a parallel run, where it was wanted.
    """

    want_trajectory: bool = False
    report: Report | None = None
    trajectory: Trajectory | None = None

    def nothing_to_do(self, sampler: str, settings: Settings) -> None:
        """Account for a run without steps: denoise 0, an empty schedule, a start behind the end."""
        self.report = Report(sampler, 0, "sequential", settings.preset, settings.tol or 0.0, 0)

    def summary(self) -> str:
        """One line for the node."""
        report = self.report
        if report is None or report.sequential_nfe == 0:
            return "nothing to do"
        if report.fallback is not None:
            return f"sequential: {report.fallback}"
        if report.solver == "sequential":
            return f"sequential: {report.sequential_nfe} steps"
        return f"{report.rounds} rounds for {report.sequential_nfe} evaluations ({report.nfe} rows)"
