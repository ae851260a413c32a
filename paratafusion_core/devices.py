"""Devices: which there are, and moving numbers between the CPU, where the coefficients live in float64, and theirs."""

from __future__ import annotations

import torch
from torch import Tensor


def send(numbers: Tensor, like: Tensor) -> Tensor:
    """``numbers`` in the dtype and on the device of ``like``; to CUDA without waiting for its queue.

    The cast comes first: MPS has no float64. Pageable memory is staged by the driver before the call returns, so the
    source may be freed or changed at once.
    """
    return numbers.to(like.dtype).to(like.device, non_blocking=like.device.type == "cuda")


def double(x: Tensor) -> Tensor:
    """``x`` in float64, on its own device where that has float64: from MPS it moves to the CPU."""
    return x.to("cpu", torch.float64) if x.device.type == "mps" else x.double()


def check_device(name: str) -> str:
    """``name`` of a device that torch can compute on here.

    Raises:
        ValueError: it has none of that name, or one that computes nothing (``meta``).
    """
    try:
        usable = torch.empty(1, device=name).device.type != "meta"
    except (RuntimeError, AssertionError, ValueError, ImportError):
        usable = False
    if not usable:
        raise ValueError(f"device is {name!r}; a device that this torch computes on is allowed, such as cpu")
    return name
