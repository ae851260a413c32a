"""Collocation: the user's own sampler stepped through all its rows with D evaluated on a few of them."""

from .run import collocate, refusal

__all__ = ["collocate", "refusal"]
