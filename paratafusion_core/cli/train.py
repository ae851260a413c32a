"""``paratafusion train-demo``: the embedded network, from rendered pictures alone."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from tqdm import tqdm

from ..demo.train import Recipe, train
from ..errors import check_count
from ..files import check_folder


def run(arguments: argparse.Namespace) -> None:
    """The command; resumes where an earlier one in the same folder stopped."""
    out, recipe = check_folder(arguments.out), Recipe()
    if arguments.steps is not None:
        recipe = replace(recipe, steps=check_count("steps", arguments.steps))
    try:
        torch.empty(1, device=arguments.device)
    except RuntimeError:
        raise ValueError(f"device is {arguments.device!r}; a device that torch has, such as cpu, is allowed") from None
    with tqdm(total=recipe.steps, unit="step") as bar:

        def tick(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(step - bar.n)

        path = train(out, recipe, arguments.device, tick)
    print(f"weights: {path.name} ({path.stat().st_size / 1e6:.1f} MB) in {path.parent.name}/")
