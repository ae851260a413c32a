"""``paratafusion train-demo``: the embedded network, from rendered pictures alone."""

from __future__ import annotations

import argparse
from dataclasses import replace

from tqdm import tqdm

from ..demo.train import Recipe, train
from ..devices import check_device
from ..errors import check_count
from ..files import check_folder


def run(arguments: argparse.Namespace) -> None:
    """The command; resumes where an earlier one in the same folder stopped."""
    out, recipe = check_folder(arguments.out), Recipe()
    if arguments.steps is not None:
        recipe = replace(recipe, steps=check_count("steps", arguments.steps))
    device = check_device(arguments.device)
    with tqdm(total=recipe.steps, unit="step", delay=1) as bar:  # not before a step: a checkpoint may be refused

        def tick(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(step - bar.n)

        done = train(out, recipe, device, tick)
    size = done.weights.stat().st_size / 1e6
    print(f"weights of step {done.step}: {done.weights.name} ({size:.1f} MB) in {arguments.out}")
    if done.step > recipe.steps:
        print(f"The checkpoint there is beyond the {recipe.steps} steps asked for; nothing was trained.")
