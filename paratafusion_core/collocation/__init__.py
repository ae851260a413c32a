"""Collocation: the user's own sampler stepped through all its rows with D evaluated on a few of them."""

from .run import refusal
from .solution import by_collocation

__all__ = ["by_collocation", "refusal"]
