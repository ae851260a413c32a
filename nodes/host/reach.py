"""What samplers and patches keep: variables of nested functions, attributes of objects, containers."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

#: How deep is searched, among how many values, and which keep nothing that counts.
_DEPTH, _MOST = 6, 2000
_PLAIN = (torch.Tensor, torch.nn.Module, ModelPatcher, type, ModuleType, str, int, float, type(None))


def closure(function: Any) -> dict[str, Any]:
    """The variables that a nested function has kept."""
    return {name: cell.cell_contents for name, cell in _cells(function)}


def reachable(*holders: Any) -> Iterator[Any]:
    """``holders`` and what they keep, the nearest first, without tensors and models."""
    waiting, seen = deque((holder, 0) for holder in holders), set[int]()
    while waiting and len(seen) < _MOST:
        value, depth = waiting.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if depth < _DEPTH:
            waiting.extend((item, depth + 1) for item in itertools.islice(_inside(value), _MOST))


def remembered(*holders: Any) -> Callable[[], None]:
    """What ``holders`` keep now; the returned function puts it back. Tensors are not copied."""
    found = list(reachable(*holders))
    kept = [(value, copy.copy(value)) for value in found if type(value) in (dict, list, set)]
    cells = [(cell, cell.cell_contents) for value in found for _, cell in _cells(value)]

    def put_back() -> None:
        for cell, content in cells:
            cell.cell_contents = content
        for value, before in kept:
            if _same(value, before):
                continue
            if isinstance(value, list):
                value[:] = before
            else:
                value.clear()
                value.update(before)

    return put_back


def _same(value: Any, before: Any) -> bool:
    """Whether a container holds the very same things."""
    if isinstance(value, dict):
        return value.keys() == before.keys() and all(value[key] is before[key] for key in before)
    return len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set)):
        return value
    names = ("__defaults__", "__kwdefaults__", "__self__", "__func__", "func", "args", "keywords", "__dict__")
    return [*closure(value).values(), *(getattr(value, name, None) for name in names)]


def _cells(function: Any) -> Iterator[tuple[str, Any]]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), cells or (), strict=False):
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:  # an empty cell
            continue
        yield name, cell
