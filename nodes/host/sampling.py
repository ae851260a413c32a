"""What the host's KSampler nodes do around a sampler, so that swapping them changes nothing but speed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...paratafusion_core import Trajectory
from .sampler import parallel
from .settings import Outcome, Settings


@dataclass(frozen=True)
class Request:
    """The inputs of the host's KSampler and KSampler (Advanced) nodes, in their words."""

    model: Any
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: list
    negative: list
    latent: dict[str, Any]
    denoise: float = 1.0
    disable_noise: bool = False
    start_step: int | None = None
    last_step: int | None = None
    force_full_denoise: bool = False


def schedule_of(request: Request) -> Tensor | None:
    """The sigmas to run, cut to the asked steps; None where the host would return the latent as it is."""
    plan = comfy.samplers.KSampler(
        request.model, steps=request.steps, device=request.model.load_device, sampler=request.sampler_name,
        scheduler=request.scheduler, denoise=request.denoise, model_options=request.model.model_options,
    )  # fmt: skip
    sigmas = plan.sigmas.clone()
    last, start = request.last_step, request.start_step
    if last is not None and last < len(sigmas) - 1:
        sigmas = sigmas[: last + 1]
        if request.force_full_denoise:
            sigmas[-1] = 0
    if len(sigmas) == 0:
        return None
    if start is not None:
        if start >= len(sigmas) - 1:
            return None
        sigmas = sigmas[start:]
    return sigmas


def fitted_latent(model: Any, latent: dict[str, Any]) -> Any:
    """The latent's samples with an empty one brought to the model's channels, as this host version does it.

    Raises:
        ValueError: the model cannot be sampled, or the latent has no elements.
    """
    if not hasattr(model, "get_model_object"):
        kind = type(model).__name__
        raise ValueError(f"model is a {kind} without a sampling object; a MODEL from a loader is allowed")
    samples = latent["samples"]
    if not samples.is_nested and samples.numel() == 0:
        raise ValueError(f"latent_image has shape {list(samples.shape)}; a latent with at least one element is allowed")
    fix = comfy.sample.fix_empty_latent_channels
    ratios = [latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")]
    return fix(model, samples, *ratios[: len(inspect.signature(fix).parameters) - 2])


def _noise(request: Request, samples: Any) -> Any:
    if request.disable_noise:
        return torch.zeros(samples.size(), dtype=samples.dtype, layout=samples.layout, device="cpu")
    return comfy.sample.prepare_noise(samples, request.seed, request.latent.get("batch_index"))


def run(request: Request, settings: Settings, outcome: Outcome, warm: Trajectory | None = None) -> dict[str, Any]:
    """Sample as the host's node would, in parallel; returns the LATENT and fills ``outcome``.

    Raises:
        ValueError: an input is out of bounds; one sentence that names it.
    """
    samples = fitted_latent(request.model, request.latent)
    noise, sigmas = _noise(request, samples), schedule_of(request)  # the host seeds torch where nothing is to do, too
    result = samples
    if sigmas is None:
        outcome.nothing_to_do(request.sampler_name, settings)
    else:
        sampler = parallel(comfy.samplers.sampler_object(request.sampler_name), settings, outcome, warm)
        result = comfy.sample.sample_custom(
            request.model, noise, request.cfg, sampler, sigmas, request.positive, request.negative,
            samples, noise_mask=request.latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(request.model, request.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=request.seed,
        )  # fmt: skip
    return {k: v for k, v in request.latent.items() if not k.startswith("downscale_ratio_")} | {"samples": result}
