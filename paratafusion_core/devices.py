"""Moving small numbers between the CPU, where the coefficients live in float64, and the states' device."""

from __future__ import annotations

from torch import Tensor


def send(numbers: Tensor, like: Tensor) -> Tensor:
    """``numbers`` in the dtype and on the device of ``like``; to CUDA without waiting for its queue.

    The cast comes first: MPS has no float64. Pageable memory is staged by the driver before the call returns, so the
    source may be freed or changed at once.
    """
    return numbers.to(like.dtype).to(like.device, non_blocking=like.device.type == "cuda")
