"""diffusers' ParaDiGMS (Shih et al., arXiv 2305.16317) on this project's networks: its own pipeline, unchanged.

The pipeline is given two small adapters, one that looks like its UNet and calls the network, and one that looks like
its VAE and is never called. Needs the extra ``bench``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import sigma_of
from .extra import require

#: ``(x [N, ...] VP-scaled, timestep [N], context [N, V]) -> v [N, ...]``, as the demo network is.
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def diffusers() -> Any:
    """The library.

    Raises:
        ValueError: it is not installed.
    """
    library, _ = require("peers", "diffusers", "transformers")
    library.utils.logging.set_verbosity_error()
    return library


def scheduler(sampler: str, steps: int) -> Any:
    """Their parallel scheduler of ``ddim`` or ``ddpm`` on Stable Diffusion's betas, spaced as theirs is by default."""
    library = diffusers()
    common = _BETAS | {"clip_sample": False, "prediction_type": "v_prediction", "timestep_spacing": "leading"}
    if sampler == "ddim":
        made = library.DDIMParallelScheduler(**common, set_alpha_to_one=True)
    else:
        made = library.DDPMParallelScheduler(**common, variance_type="fixed_small")
    made.set_timesteps(steps)
    return made


def levels(sampler: str, steps: int) -> Tensor:
    """The same run's sigmas ``[steps + 1]``, the last one 0."""
    spaced = sigma_of(scheduler(sampler, steps).timesteps)
    return torch.cat([spaced, spaced.new_zeros(1)])


@dataclass
class Count:
    """Calls of a network and the rows in them; a conditional and an unconditional one are a row."""

    rounds: int = 0
    nfe: int = 0
    rows_per_round: list[int] = field(default_factory=list)

    def add(self, rows: int) -> None:
        self.rounds += 1
        self.nfe += rows
        self.rows_per_round.append(rows)


class _Unet(nn.Module):
    def __init__(self, network: Network, shape: tuple[int, ...], count: Count, halves: int) -> None:
        super().__init__()
        self.network, self.count, self.halves = network, count, halves
        self.config = SimpleNamespace(in_channels=shape[0], sample_size=shape[1])
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.count.add(len(sample) // self.halves)
        return (self.network(sample, timestep.float(), encoder_hidden_states[:, 0]),)


class _Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(1,), scaling_factor=1.0)
        self.dtype, self.device = torch.float32, torch.device("cpu")


def noise_of(seed: int, shape: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor]:
    """The start and each step's unit normals, ``[1, *shape]`` and ``[steps, 1, *shape]``, as the pipeline draws them.

    It draws its steps' noise itself, in their order, from the generator it is given.
    """
    start = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2 * seed))
    steps_own = _generator(seed)
    return start, torch.stack([torch.randn(1, *shape, generator=steps_own) for _ in range(steps)])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(2 * seed + 1)


def run(
    network: Network,
    context: Tensor,
    shape: tuple[int, ...],
    sampler: str,
    steps: int,
    cfg: float,
    window: int,
    tolerance: float,
    seed: int,
) -> tuple[Tensor, Count]:
    """Their pipeline's picture ``[1, *shape]`` from :func:`noise_of`'s start, and what it took.

    Args:
        context: ``[1, V]``; zeros stand for the unconditional one. window, tolerance: their ``parallel`` and
            ``tolerance``; by default theirs are 10 and 0.1.
    """
    count = Count()
    unet = _Unet(network, shape, count, 2 if cfg > 1 else 1)
    kind = importlib.import_module(
        "diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_paradigms"
    ).StableDiffusionParadigmsPipeline
    pipe = kind(_Vae(), None, None, unet, scheduler(sampler, steps), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    start, _ = noise_of(seed, shape, 1)
    with torch.no_grad(), _quiet():
        done = pipe(
            prompt_embeds=context[:, None],
            negative_prompt_embeds=torch.zeros_like(context)[:, None],
            height=shape[1],
            width=shape[2],
            num_inference_steps=steps,
            parallel=window,
            tolerance=tolerance,
            guidance_scale=cfg,
            latents=start,
            generator=_generator(seed),
            output_type="latent",
        )
    return done.images, count


def sequential(
    network: Network, context: Tensor, shape: tuple[int, ...], sampler: str, steps: int, cfg: float, seed: int
) -> Tensor:
    """Their scheduler's own steps, one by one, from the same numbers."""
    made = scheduler(sampler, steps)
    x, noise = noise_of(seed, shape, steps)
    with torch.no_grad():
        for k, t in enumerate(made.timesteps):
            when = t.float().expand(2 if cfg > 1 else 1)
            if cfg > 1:
                no, yes = network(torch.cat([x, x]), when, torch.cat([torch.zeros_like(context), context])).chunk(2)
                v = no + cfg * (yes - no)
            else:
                v = network(x, when, context)
            x = made.batch_step_no_noise(v, t[None], x)
            if sampler == "ddpm" and t > 0:
                x = x + made._get_variance(t) ** 0.5 * noise[k]
    return x


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without their warning that scipy, or a safety checker, is missing."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
