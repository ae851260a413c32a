"""Parallel Options: how a parallel sampler solves its steps."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..paratafusion_core.errors import check_real
from .host.settings import PRESETS, SOLVERS, TOLERANCES, Settings
from .types import CATEGORY, RARE, OptionsType, schema

OWN_TOLERANCE = "custom"
#: Collocation needs the first and the last evaluation. The widget lets 1 through, and so may a link.
_FEWEST_ROWS = 2


def _fidelity_inputs() -> list[Any]:
    """solver, preset, tolerance, target_db."""
    return [
        io.Combo.Input(
            "solver",
            options=list(SOLVERS),
            default="auto",
            tooltip="With window 0 auto measures your machine and chooses; below 20 evaluations and without a target "
            "it is the plain sampler. With a window it is quasi-newton, or collocation with a target. quasi-newton "
            "needs the fewest rounds, collocation the fewest evaluations, parataa is the published method, picard the "
            "simplest. sequential is ComfyUI's own sampler, unchanged.",
        ),
        io.Combo.Input(
            "preset",
            options=[*TOLERANCES, OWN_TOLERANCE, *PRESETS[len(TOLERANCES) :]],
            default="balanced",
            tooltip="How close to the sequential picture. exact differs only by rounding and is slowest; sketch, "
            "standard and fine aim for 36, 42 and 48 dB with fewer evaluations; custom uses the tolerance, among the "
            "advanced inputs.",
        ),
        io.Float.Input(
            "tolerance",
            default=0.003,
            min=0.0,
            max=1.0,
            step=0.0001,
            round=False,
            tooltip="Used with preset custom, ignored otherwise. Smaller is closer to the sequential picture; "
            "0.003 is what balanced uses.",
            extra_dict=RARE,
        ),
        io.Float.Input(
            "target_db",
            default=0.0,
            min=0.0,
            max=120.0,
            step=1.0,
            tooltip="Fidelity to aim for, in dB, by collocation and auto. 0 leaves it to the preset; other solvers "
            "ignore it.",
            extra_dict=RARE,
        ),
    ]


def _effort_inputs() -> list[Any]:
    """window, rows, history, order, max_rounds."""
    return [
        io.Int.Input(
            "window",
            default=0,
            min=0,
            max=10000,
            tooltip="Steps evaluated together in one model call. More need more VRAM and fewer rounds. 0 measures "
            "your GPU and chooses, and is 1 for collocation; a window larger than the run is the whole run.",
        ),
        io.Int.Input(
            "rows",
            default=0,
            min=0,
            max=10000,
            tooltip="Evaluations that collocation may spend, instead of a preset's target; with target_db those it "
            "begins with. 0 leaves it to the solver, 1 counts as 2; other solvers ignore it.",
            extra_dict=RARE,
        ),
        io.Int.Input(
            "history",
            default=0,
            min=0,
            max=16,
            tooltip="Earlier rounds that a step learns from. 0 is the solver's own choice (2, parataa 3); "
            "picard has none.",
            extra_dict=RARE,
        ),
        io.Int.Input(
            "order",
            default=0,
            min=0,
            max=10000,
            tooltip="Order of parataa's equations: how many steps back each one reaches. 0 is its own choice "
            "(20, or the window); other solvers ignore it.",
            extra_dict=RARE,
        ),
        io.Int.Input(
            "max_rounds",
            default=0,
            min=0,
            max=10000,
            tooltip="Stop after so many rounds with the picture as it is: a quick preview. Feed its trajectory to a "
            "second sampler with the same solver, preset and window to finish it. 0 runs to the end.",
        ),
    ]


class ParallelOptions(io.ComfyNode):
    """Choices for the parallel samplers; without this node they use its defaults."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_Options",
            display_name="Parallel Options",
            category=CATEGORY,
            description="How a parallel sampler solves its steps. Leave it out for the defaults.",
            search_aliases=["parallel settings", "solver", "tolerance", "preset", "collocation", "psnr target"],
            inputs=[*_fidelity_inputs(), *_effort_inputs()],
            outputs=[OptionsType.Output(display_name="options", tooltip="For the options of a parallel sampler.")],
        )

    @classmethod
    def execute(
        cls,
        solver: str,
        preset: str,
        tolerance: float,
        target_db: float,
        window: int,
        rows: int,
        history: int,
        order: int,
        max_rounds: int,
    ) -> io.NodeOutput:
        own = preset == OWN_TOLERANCE
        # here, where the inputs have these names: no bounds of a widget stop a number that is none
        if own:
            check_real("tolerance", tolerance, low=0.0)
        check_real("target_db", target_db, low=0.0)
        return io.NodeOutput(
            Settings(
                solver=solver,
                preset="balanced" if own else preset,
                tol=tolerance if own else None,
                target_db=target_db or None,
                window=window or None,
                rows=_FEWEST_ROWS if rows == 1 else rows or None,
                history=history or None,
                order=order or None,
                max_rounds=max_rounds or None,
            )
        )
