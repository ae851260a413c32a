"""KSampler, KSampler Advanced and any SAMPLER, solved in parallel."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..paratafusion_core import Trajectory
from .host import sampling
from .host.graph import UNKNOWN, is_linked, problem_of, running_prompt
from .host.sampler import parallel
from .host.settings import Outcome, Settings
from .types import CATEGORY, RARE, OptionsType, ReportType, TrajectoryType, schema

_OPTIONS_TIP = "From Parallel Options. Without it: automatic solver and window, preset balanced."
_WARM_TIP = (
    "A trajectory of an earlier run, from this sampler, Recall or Load: the run continues from it instead of starting "
    "over. Another number of steps or another sampler is interpolated; another latent size starts over all the same."
)
_SEED = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True}
_HIDDEN = [io.Hidden.prompt, io.Hidden.unique_id]
_TRAJECTORY_OUTPUT = 1
#: Inputs that change how a run is solved, not which picture comes out.
_NOT_THE_PROBLEM = ("options", "trajectory")


def _common_inputs() -> list[Any]:
    """steps .. latent_image, in the order of the host's nodes."""
    return [
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of steps of the sampler."),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How closely to follow the prompt. High values need more rounds.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            tooltip="The sampler whose picture you want; the parallel run gives the same one. Samplers that choose "
            "their steps as they go (dpm_adaptive) run as they are.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            tooltip="How the noise is removed along the steps.",
        ),
        io.Conditioning.Input("positive", tooltip="What you want to see in the picture."),
        io.Conditioning.Input("negative", tooltip="What you do not want to see in the picture."),
        io.Latent.Input("latent_image", tooltip="The latent to denoise."),
    ]


def _extra_inputs() -> list[Any]:
    return [
        OptionsType.Input("options", optional=True, tooltip=_OPTIONS_TIP),
        TrajectoryType.Input("trajectory", optional=True, tooltip=_WARM_TIP),
    ]


def _outputs() -> list[Any]:
    return [
        io.Latent.Output(display_name="LATENT", tooltip="The denoised latent."),
        TrajectoryType.Output(
            display_name="trajectory",
            tooltip="For a warm start of another run. It is kept only where this output is linked when the run starts.",
        ),
        ReportType.Output(display_name="report", tooltip="What the run did: rounds, rows, fallback, times."),
    ]


def _run(
    cls: type[io.ComfyNode], request: sampling.Request, options: Settings | None, trajectory: Trajectory | None
) -> io.NodeOutput:
    linked = is_linked(cls.hidden.prompt, cls.hidden.unique_id, _TRAJECTORY_OUTPUT)
    problem = problem_of(cls.hidden.prompt, cls.hidden.unique_id, _NOT_THE_PROBLEM)
    outcome = Outcome(want_trajectory=linked, problem=problem)
    latent = sampling.run(request, options or Settings(), outcome, trajectory)
    kept = outcome.trajectory
    if kept is not None:
        kept = dataclasses.replace(kept, seed=request.seed, problem=problem)
    return io.NodeOutput(latent, kept, outcome.report)


def _is_read(node: type[io.ComfyNode]) -> str:
    """For the host's cache: linking the trajectory output makes the node run again, so that there is one to keep.

    So does unlinking it: a cache knows no "either will do".
    """
    return "read" if is_linked(running_prompt(), node.hidden.unique_id, _TRAJECTORY_OUTPUT) else "not read"


class KSamplerParallel(io.ComfyNode):
    """The host's KSampler with its steps solved together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_KSampler",
            display_name="KSampler (Parallel)",
            category=CATEGORY,
            description="KSampler with its steps solved together: the same picture in fewer, batched model calls.",
            search_aliases=["parallel sampler", "paradigms", "parataa", "picard", "fast sampler", "speed up"],
            hidden=_HIDDEN,
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises the latent."),
                io.Int.Input("seed", tooltip="The random seed of the noise.", **_SEED),
                *_common_inputs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The amount of denoising; lower values keep the structure of the latent.",
                ),
                *_extra_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return _is_read(cls)

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, options=None,
        trajectory=None,
    ) -> io.NodeOutput:  # fmt: skip
        request = sampling.Request(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        )
        return _run(cls, request, options, trajectory)


class KSamplerAdvancedParallel(io.ComfyNode):
    """The host's KSampler (Advanced) with its steps solved together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_KSamplerAdvanced",
            display_name="KSampler Advanced (Parallel)",
            category=CATEGORY,
            description="KSampler (Advanced) with its steps solved together: the same picture in fewer model calls.",
            search_aliases=["parallel sampler advanced", "paradigms", "parataa", "start at step", "refiner"],
            hidden=_HIDDEN,
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises the latent."),
                io.Combo.Input(
                    "add_noise",
                    options=["enable", "disable"],
                    tooltip="disable where the latent is noisy already, from an earlier sampler.",
                    extra_dict=RARE,
                ),
                io.Int.Input("noise_seed", tooltip="The random seed of the noise.", **_SEED),
                *_common_inputs(),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="The first step to run; at or behind the end the latent is returned as it is.",
                    extra_dict=RARE,
                ),
                io.Int.Input(
                    "end_at_step",
                    default=10000,
                    min=0,
                    max=10000,
                    tooltip="The step to stop before; beyond the end means to the end.",
                    extra_dict=RARE,
                ),
                io.Combo.Input(
                    "return_with_leftover_noise",
                    options=["disable", "enable"],
                    tooltip="enable keeps the noise that is left at end_at_step, for another sampler to remove.",
                    extra_dict=RARE,
                ),
                *_extra_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return _is_read(cls)

    @classmethod
    def execute(
        cls, model, add_noise, noise_seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
        start_at_step, end_at_step, return_with_leftover_noise, options=None, trajectory=None,
    ) -> io.NodeOutput:  # fmt: skip
        request = sampling.Request(
            model, noise_seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
            disable_noise=add_noise == "disable", start_step=start_at_step, last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise != "enable",
        )  # fmt: skip
        return _run(cls, request, options, trajectory)


class ParallelSampler(io.ComfyNode):
    """Any SAMPLER as a parallel one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_Sampler",
            display_name="Parallel Sampler",
            category=CATEGORY,
            description="Makes any SAMPLER parallel, ComfyUI's or another pack's, for SamplerCustom and every guider.",
            search_aliases=["parallel custom sampler", "parataa", "paradigms", "wrap sampler", "KSamplerSelect"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler whose picture you want, with its own settings."),
                *_extra_inputs(),
            ],
            outputs=[io.Sampler.Output(tooltip="The same sampler with its steps solved together.")],
        )

    @classmethod
    def execute(cls, sampler, options=None, trajectory=None) -> io.NodeOutput:
        # which model and prompts it will run with no sampler is told
        return io.NodeOutput(parallel(sampler, options or Settings(), Outcome(problem=UNKNOWN), trajectory))
