"""Checks on what a caller passes in: one sentence that names the input, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

#: Seconds, some 30 years: sums and squares of such times stay finite.
LONGEST = 1e9


class NotFinite(ValueError):
    """The model gave NaN or infinity at a state that the plain sampler would have shown it too.

    With collocation, whose states are near those of the plain sampler, at any state.
    """


def check_count(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """``value`` (an int, or NumPy's) as an int of at least ``low`` and at most ``high``.

    Raises:
        ValueError: it is no whole number or out of range.
    """
    wanted = f"a whole number of at least {low}" + (f" and at most {high}" if high is not None else "")
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; {wanted} is allowed") from None
    if isinstance(value, bool) or count < low or (high is not None and count > high):
        raise ValueError(f"{name} is {value!r}; {wanted} is allowed")
    return count


def check_real(
    name: str, value: Any, low: float = -math.inf, above: float = -math.inf, high: float = math.inf
) -> float:
    """``value`` as a finite float, at least ``low``, greater than ``above`` and at most ``high``.

    Raises:
        ValueError: it is no finite number or out of range.
    """
    wanted = "a finite number"
    if low > -math.inf:
        wanted += f" of at least {low:g}"
    if above > -math.inf:
        wanted += f" above {above:g}"
    if high < math.inf:
        wanted += f" {'and ' if wanted[-1].isdigit() else 'of '}at most {high:g}"
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not (above < number and low <= number <= high):
        raise ValueError(f"{name} is {value!r}; {wanted} is allowed")
    return number


def check_seconds(name: str, value: Any) -> float:
    """``value`` as seconds that a call may take: 0 to ``LONGEST``.

    Raises:
        ValueError: it is none.
    """
    return check_real(name, value, low=0.0, high=LONGEST)


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """``value`` when it is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
    return value
