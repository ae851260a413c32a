"""What ComfyUI asks the pack for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import demo, options, reports, samplers, trajectories


class ParaTAFusion(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Ids and input order are frozen; see the golden workflows in the tests."""
        return [
            samplers.KSamplerParallel,
            samplers.KSamplerAdvancedParallel,
            samplers.ParallelSampler,
            options.ParallelOptions,
            trajectories.SaveTrajectory,
            trajectories.LoadTrajectory,
            trajectories.KeepTrajectory,
            trajectories.RecallTrajectory,
            reports.ConvergenceReport,
            reports.CompareWithSequential,
            demo.DemoModel,
            demo.DemoPrompt,
        ]
