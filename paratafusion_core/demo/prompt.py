"""The demo network's vocabulary: a prompt in any natural order becomes a multi-hot vector of attributes."""

from __future__ import annotations

import difflib
import re

import torch
from torch import Tensor

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLUMNS = ("left", "right")
ROWS = ("top", "bottom")
CENTRE = ("center",)
BACKGROUNDS = ("dark", "grey")
VOCABULARY = SIZES + COLOURS + SHAPES + COLUMNS + ROWS + CENTRE + BACKGROUNDS

#: Groups of which a prompt may name one member only.
_EXCLUSIVE = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "column": COLUMNS + CENTRE,
    "row": ROWS + CENTRE,
    "background": BACKGROUNDS,
}
_SYNONYMS = {
    "big": "large", "tiny": "small", "little": "small", "huge": "large",
    "purple": "magenta", "pink": "magenta",
    "disc": "circle", "disk": "circle", "dot": "circle", "plus": "cross", "donut": "ring", "rhombus": "diamond",
    "upper": "top", "lower": "bottom", "centre": "center", "middle": "center", "centered": "center",
    "centred": "center", "gray": "grey", "black": "dark",
}  # fmt: skip
_FILLERS = frozenset(("a", "an", "the", "of", "on", "in", "at", "and", "with", "its", "is", "it")).union(
    ("side", "corner", "part", "picture", "image", "background", "backdrop")
)
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}


def words_of(prompt: str, name: str = "prompt") -> list[str]:
    """The vocabulary words that ``prompt`` names, in its order with synonyms resolved.

    Args:
        name: what errors call the prompt.

    Raises:
        ValueError: a word is unknown, or two words of one group (two colours, say) are named.
    """
    found: list[str] = []
    for raw in re.findall(r"[^\s,.;:!?\-_/()\"']+", prompt.lower()):
        word = _SYNONYMS.get(raw, raw)
        if word in _FILLERS:
            continue
        if word not in _INDEX:
            close = difflib.get_close_matches(word, [*VOCABULARY, *_SYNONYMS], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{name}: unknown word {raw!r}{hint}; allowed are {', '.join(VOCABULARY)}")
        if word not in found:
            found.append(word)
    for group, members in _EXCLUSIVE.items():
        named = [word for word in found if word in members]
        if len(named) > 1:
            raise ValueError(f"{name}: names more than one {group} ({', '.join(named)}); at most one is allowed")
    return found


def encode(prompt: str, name: str = "prompt") -> Tensor:
    """``prompt`` as the network's conditioning: a float32 multi-hot vector ``[len(VOCABULARY)]``.

    The empty prompt is the zero vector, which is also the unconditional input of guidance. Errors call it ``name``.

    Raises:
        ValueError: see :func:`words_of`.
    """
    vector = torch.zeros(len(VOCABULARY), device="cpu")
    for word in words_of(prompt, name):
        vector[_INDEX[word]] = 1.0
    return vector
