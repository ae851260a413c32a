"""What samplers and patches keep: variables of nested functions, attributes of objects, containers."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

#: How deep is searched, among how many values, and which keep nothing that counts.
_DEPTH, _MOST = 6, 2000
_PLAIN = (torch.Tensor, torch.nn.Module, ModelPatcher, type, ModuleType, str, int, float, type(None))
_DICTS = (dict, OrderedDict, defaultdict)
_LISTS = (list, deque)
#: Packages whose objects are left alone: what they keep belongs to other threads, or to the host.
_OTHERS = frozenset(
    {"_io", "_queue", "_thread", "aiohttp", "app", "asyncio", "comfy", "comfy_api", "comfy_execution", "concurrent"}
    | {"execution", "io", "logging", "multiprocessing", "numpy", "queue", "server", "socket", "threading", "torch"}
)


def patches_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """Functions and patch objects anywhere inside the model's options."""
    if depth > 8 or torch.is_tensor(value):
        return
    if isinstance(value, dict):
        for item in value.values():
            yield from patches_in(item, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from patches_in(item, depth + 1)
    elif callable(value):
        yield value
        yield from patches_in(getattr(value, "func", None), depth + 1)  # functools.partial
        yield from patches_in(getattr(value, "__self__", None), depth + 1)


def closure(function: Any) -> dict[str, Any]:
    """The variables that a nested function has kept."""
    return {name: cell.cell_contents for name, cell in _cells(function)}


def reachable(*holders: Any) -> Iterator[Any]:
    """``holders`` and what they keep, the nearest first, without tensors and models."""
    waiting, seen = deque((holder, 0) for holder in holders), set[int]()
    while waiting and len(seen) < _MOST:
        value, depth = waiting.popleft()
        if id(value) in seen or _is_plain(value):
            continue
        seen.add(id(value))
        yield value
        if depth < _DEPTH:
            waiting.extend((item, depth + 1) for item in itertools.islice(_inside(value), _MOST))


def remembered(*holders: Any) -> Callable[[], None]:
    """What ``holders`` keep now; the returned function puts it back.

    Tensors are not copied. Truth values stay as they are: what they say was done, such as a change of the model, is not
    undone either.
    """
    found = list(reachable(*holders))
    dicts = [(value, dict(value)) for value in found if type(value) in _DICTS]
    lists = [(value, copy.copy(value)) for value in found if type(value) in _LISTS]
    cells = [(cell, cell.cell_contents) for value in found for _, cell in _cells(value)]

    def put_back() -> None:
        for cell, content in cells:
            if not isinstance(content, bool):
                cell.cell_contents = content
        for value, before in dicts:
            _restore(value, before)
        for value, before in lists:
            if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=True)):
                value.clear()
                value.extend(before)

    return put_back


def _restore(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Key by key, as other threads may look at it meanwhile."""
    for key in [key for key in list(value) if key not in before]:
        if not isinstance(value.get(key), bool):
            value.pop(key, None)
    for key, old in before.items():
        if value.get(key) is not old and not isinstance(old, bool):
            value[key] = old


def _is_plain(value: Any) -> bool:
    """Whether it keeps nothing that counts; objects of other packs may fail in any way when they are looked at."""
    try:
        return isinstance(value, _PLAIN)
    except Exception:
        return True


def _inside(value: Any) -> Iterable[Any]:
    kind = type(value)
    if kind in _DICTS:
        return [*value.values()]
    if kind in (*_LISTS, tuple, set):
        return [*value]
    if kind is FunctionType:
        return [*closure(value).values(), value.__defaults__, value.__kwdefaults__, value.__dict__]
    if kind is MethodType:
        return [value.__self__, value.__func__]
    if kind is partial:
        return [value.func, value.args, value.keywords]
    if kind.__module__.split(".")[0] in _OTHERS:
        return []
    try:
        return [object.__getattribute__(value, "__dict__")]
    except Exception:
        return []


def _cells(function: Any) -> Iterator[tuple[str, Any]]:
    if type(function) is not FunctionType:
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:  # an empty cell
            continue
        yield name, cell
