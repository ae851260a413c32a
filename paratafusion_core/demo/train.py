"""``paratafusion train-demo``: trains the embedded network from rendered pictures alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import replacing, write_tensors
from ..schedules import TIMESTEPS, sigma_of
from .network import DemoNet
from .shapes import render


@dataclass(frozen=True)
class Recipe:
    """What training does.

    The committed weights took these 10,000 steps, in 89 minutes on two shared CPU cores; their run was first planned
    longer, so their rate began to fall at step 6,600 instead of 6,000.

    Attributes:
        steps: optimiser steps in all. batch: pictures a step. seed: of pictures, noise and initial weights.
        lr: of AdamW after ``warmup`` steps; constant, then falling linearly over the last ``decay`` of the steps.
        ema: decay of the averaged weights, the ones that are kept.
        drop: probability that a picture loses its whole prompt (for classifier-free guidance).
        every: steps between checkpoints.
    """

    steps: int = 10000
    batch: int = 32
    seed: int = 0
    lr: float = 1.5e-3
    warmup: int = 300
    decay: float = 0.4
    ema: float = 0.9995
    drop: float = 0.12
    every: int = 250

    def rate(self, step: int) -> float:
        """Learning rate of ``step``."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


def noised(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """VP states, timesteps and v targets for ``images``: x = alpha x0 + sigma eps, v = alpha eps - sigma x0.

    Timesteps are stratified over [0, 999], which lowers the variance of the loss.
    """
    count = images.shape[0]
    order = torch.randperm(count, generator=generator, device="cpu")
    strata = (order + torch.rand(count, generator=generator, device="cpu")) / count
    timestep = strata * (TIMESTEPS - 1)
    ve = sigma_of(timestep)
    alpha = (1 / (1 + ve**2).sqrt()).float()[:, None, None, None]
    sigma = alpha * ve.float()[:, None, None, None]
    eps = torch.randn(images.shape, generator=generator, device="cpu")
    return alpha * images + sigma * eps, timestep, alpha * eps - sigma * images


def save_weights(network: DemoNet, path: Path) -> None:
    """Write float16 weights as safetensors."""
    write_tensors(path, {k: v.half() for k, v in network.state_dict().items()})


class Trained(NamedTuple):
    """The file of the averaged weights, and the step that they are of."""

    weights: Path
    step: int


def train(
    out: Path,
    recipe: Recipe = Recipe(),
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train, or resume from ``out/checkpoint.pt``, and write ``out/demo.safetensors``.

    ``progress(step, loss)`` is called after every step with a running mean of the loss. A checkpoint at or beyond
    ``recipe.steps`` is trained no further; its weights are written.

    Raises:
        ValueError: the checkpoint is damaged, or none of this network's.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, weights = out / "checkpoint.pt", out / "demo.safetensors"
    torch.manual_seed(recipe.seed)
    network = DemoNet().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = DemoNet().to(device)
    average.load_state_dict(network.state_dict())
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01)
    start, running = 0, math.nan
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            network.load_state_dict(state["network"])
            average.load_state_dict(state["average"])
            optimiser.load_state_dict(state["optimiser"])
            start, running = int(state["step"]), float(state["loss"])
        except OSError:
            raise
        except Exception as error:  # on damaged bytes an unpickler raises whatever it comes upon
            raise ValueError(
                f"checkpoint {str(checkpoint)!r} is damaged or another network's ({type(error).__name__}); one that "
                "train-demo wrote is allowed, or none, to begin anew"
            ) from None
    if start >= recipe.steps:
        save_weights(average, weights)

    for step in range(start, recipe.steps):
        # a generator per step: a resumed run sees the pictures that an unbroken one would have seen
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        batch = render(recipe.batch, generator)
        keep = torch.rand(recipe.batch, 1, generator=generator, device="cpu") >= recipe.drop
        x, timestep, target = noised(batch.images, generator)
        x = x.to(device, memory_format=torch.channels_last)
        predicted = network(x, timestep.to(device), (batch.context * keep).to(device))
        loss = F.mse_loss(predicted, target.to(device))
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            blend = 1 - min(recipe.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), blend)
        value = float(loss.detach())
        running = value if math.isnan(running) else running + 0.01 * (value - running)
        if progress is not None:
            progress(step + 1, running)
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            state = {"network": network.state_dict(), "average": average.state_dict()}
            state |= {"optimiser": optimiser.state_dict(), "step": step + 1, "loss": running}
            with replacing(checkpoint) as scratch:
                torch.save(state, scratch)
            save_weights(average, weights)
    return Trained(weights, max(start, recipe.steps))
