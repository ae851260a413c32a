"""Noise levels at which patches begin or end, as far as they can be told.

Nothing in the host says so; but patches keep such bounds under speaking names, as sigma_start or end_percent, in the
variables of a function, in an object or in a dictionary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from .reach import closure, reachable

_ENDS = re.compile(r"start|end|min|max|low|high|begin|until")
#: Numbers of a graph that are taken for bounds, at most: what has more keeps something else under such names.
_MOST = 6


def bounds_of(patches: list[Any], model_sampling: Any) -> list[float]:
    """Noise levels, descending, that ``patches`` keep as bounds; none where there are too many to be such."""
    found = {level for name, value in _numbers(patches) for level in _levels(name, value, model_sampling)}
    return sorted(found, reverse=True) if len(found) <= _MOST else []


def _numbers(patches: list[Any]) -> Iterator[tuple[str, float]]:
    for value in reachable(*patches):
        named = value if isinstance(value, dict) else closure(value)
        for name, number in list(named.items()):
            if isinstance(name, str) and type(number) in (int, float) and math.isfinite(number):
                yield name.lower(), float(number)


def _levels(name: str, value: float, model_sampling: Any) -> Iterator[float]:
    if not _ENDS.search(name):
        return
    if "sigma" in name and value > 0:
        yield value
    elif "percent" in name and 0 < value < 1:
        yield float(model_sampling.percent_to_sigma(value))
