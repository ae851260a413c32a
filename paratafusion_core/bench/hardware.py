"""The device that a bench runs on: its name, its memory, and a clock that waits for it."""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def synchronise(device: torch.device) -> None:
    """Wait until everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def clock(call: Callable[[], Any], device: torch.device, repeats: int, warmup: int, budget: float) -> float:
    """Median seconds of ``call``, the wait for the device included.

    Args:
        repeats, warmup: timed calls, and untimed ones before them.
        budget: seconds; once they are used up no call is added to the second one, and the last ones count.
    """
    begin, seconds = time.perf_counter(), list[float]()
    synchronise(device)
    while len(seconds) < warmup + repeats:
        started = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
        if len(seconds) > 1 and time.perf_counter() - begin > budget:
            break
    return statistics.median(seconds[min(warmup, len(seconds) - 1) :])


def release(device: torch.device) -> None:
    """Give cached memory back to the device."""
    gc.collect()
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()


def attempt(work: Callable[[], T], device: torch.device) -> T | None:
    """What ``work`` returns, or None where the device's memory does not hold it."""
    try:
        return work()
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
    release(device)  # out here the exception no longer holds the tensors of its frames
    return None


def memory(device: torch.device) -> int | None:
    """Bytes that tensors take on the device now; None where torch does not tell."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, CUDA (or ROCm) and torch versions, CPU, its count of cores and torch's threads."""
    facts: dict[str, Any] = {"device": device.type, "name": device.type.upper(), "cpu": _cpu()}
    if device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(device)
        facts["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts["driver"] = _driver()
        facts["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    facts |= {"torch": torch.__version__, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    return facts | {"system": platform.system(), "python": platform.python_version()}


def line(facts: dict[str, Any]) -> str:
    """:func:`describe` in one line."""
    memory = f" ({facts['memory_gib']} GiB)" if "memory_gib" in facts else ""
    driver = f", driver {facts['driver']}, {facts['runtime']}" if "driver" in facts else ""
    cpus = f"{facts['cpus']} CPU cores ({facts['cpu']}), torch threads: {facts['threads']}"
    return f"{facts['name']}{memory}{driver}, torch {facts['torch']}, {cpus}, {facts['system']}"


def _cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _driver() -> str:
    """The NVIDIA driver's version as Linux shows it."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group(1) if found else "unknown"
