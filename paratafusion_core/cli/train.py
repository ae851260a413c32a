"""``paratafusion train-demo``: the embedded network, from rendered pictures alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..demo.train import Recipe, train
from ..errors import check_count


def run(arguments: argparse.Namespace) -> None:
    """The command; resumes where an earlier one in the same folder stopped."""
    recipe = Recipe()
    if arguments.steps is not None:
        recipe = replace(recipe, steps=check_count("steps", arguments.steps))
    with tqdm(total=recipe.steps, unit="step") as bar:

        def tick(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(step - bar.n)

        path = train(Path(arguments.out), recipe, arguments.device, tick)
    print(f"weights: {path.name} ({path.stat().st_size / 1e6:.1f} MB) in {path.parent.name}/")
