"""What a program has set for all of torch, kept away from the engine's own sums and left to the model's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def plain_torch(device: str) -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """No autocast and no default device of the caller's; yields what gives a function of the caller's both back.

    Args:
        device: type of the device that the engine works on, beside the CPU.
    """
    kinds = [kind for kind in sorted({device, "cpu"}) if _casts(kind)]
    default = torch.get_default_device() if hasattr(torch, "get_default_device") else torch.device("cpu")
    if not kinds and default.type == "cpu":
        yield lambda function: function
        return
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in kinds}

    def as_before(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.device(default))
                for kind, dtype in dtypes.items():
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield as_before


def _casts(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except (RuntimeError, TypeError):  # a device without it; older torch, which asks for no device
        return False
