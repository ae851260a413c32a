"""Noise levels at which patches begin or end, as far as they can be told.

Nothing in the host says so; but patches keep such bounds under speaking names, as sigma_start or end_percent, in the
variables of a function, in an object or in a dictionary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .reach import closure, patches_in, reachable

_ENDS = re.compile(r"start|end|min|max|low|high|begin|until|(?<![a-z])(lo|hi)(?![a-z])")
#: Levels that are taken for bounds, at most: what has more keeps something else under such names.
_MOST = 6
#: No noise level is above.
_LARGEST = 1e6
#: Where the host's own guiders are.
_GUIDERS = ("comfy.samplers", "comfy_extras.nodes_custom_sampler")


def acting(guider: Any, options: dict[str, Any]) -> list[Any]:
    """The patches of a run, and the numbers that a guider of another pack keeps."""
    found = list(patches_in([options, getattr(guider, "model_options", {})]))
    if type(guider).__module__ not in _GUIDERS:
        found.append({name: value for name, value in vars(guider).items() if type(value) in (int, float)})
    return found


def bounds_of(patches: list[Any], model_sampling: Any, sigmas: Tensor) -> list[float]:
    """Noise levels, descending, inside a run along ``sigmas`` that ``patches`` keep as bounds; none where too many seem
    to be such.

    Of a share of the run nobody tells whether it is one of the steps or of the model's time: both are told.
    """
    found = {level for name, value in _numbers(patches) for level in _levels(name, value, model_sampling, sigmas)}
    low, high = float(sigmas.min()), float(sigmas.max())
    inside = sorted((level for level in found if low < level < high), reverse=True)
    return inside if len(inside) <= _MOST else []


def _numbers(patches: list[Any]) -> Iterator[tuple[str, float]]:
    own = [vars(patch) for patch in patches if hasattr(patch, "__dict__")]  # of the host's objects, too
    for value in (*own, *reachable(*patches)):
        named = value if isinstance(value, dict) else closure(value)
        for name, number in list(named.items()):
            if isinstance(name, str) and type(number) in (int, float) and 0 < number < _LARGEST:
                yield name.lower(), float(number)


def _levels(name: str, value: float, model_sampling: Any, sigmas: Tensor) -> Iterator[float]:
    if not _ENDS.search(name):
        return
    if "sigma" in name:
        yield value
    elif "percent" in name and value < 1:
        yield float(model_sampling.percent_to_sigma(value))
        row = math.ceil(value * (len(sigmas) - 1))
        yield float(sigmas[row - 1] + sigmas[row]) / 2
