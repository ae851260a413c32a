"""Noise schedules: decreasing sigmas [K+1] in float64 on the CPU, for VE-scaled and for flow states."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .devices import send
from .errors import check_count, check_real

TIMESTEPS = 1000
#: A system holds steps^2 coefficients and steps states.
MAX_STEPS = 10_000


@functools.lru_cache(maxsize=1)
def _log_table() -> Tensor:
    """log sigma of the 1000 training timesteps of Stable Diffusion (beta scaled linearly, 0.00085 to 0.012)."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64, device="cpu") ** 2
    keep = torch.cumprod(1 - beta, 0)
    return 0.5 * torch.log((1 - keep) / keep)


def sigma_of(timestep: Tensor) -> Tensor:
    """sigma at a (fractional) timestep in [0, 999]: linear in log sigma between the table's entries; float64."""
    table = _log_table()
    t = timestep.double().clamp(0, TIMESTEPS - 1)
    low = t.floor().long().clamp(max=TIMESTEPS - 2)
    return torch.lerp(table[low], table[low + 1], t - low).exp()


def timestep_of(sigma: Tensor) -> Tensor:
    """The inverse of :func:`sigma_of`, clamped to [0, 999] (sigma 0: 0, infinity: 999).

    The result is on sigma's device, in float64 except on MPS.
    """
    sigma = sigma if sigma.device.type == "mps" else sigma.double()
    table = send(_log_table(), sigma)
    log = sigma.log().clamp(table[0], table[-1])
    high = torch.searchsorted(table, log).clamp(1, TIMESTEPS - 1)
    return (high - 1) + (log - table[high - 1]) / (table[high] - table[high - 1])


SIGMA_MIN = math.exp(float(_log_table()[0]))
SIGMA_MAX = math.exp(float(_log_table()[-1]))


def normal(steps: int) -> Tensor:
    """Evenly spaced timesteps of the scaled-linear schedule, then 0 (ComfyUI's "normal"). [steps + 1]"""
    check_count("steps", steps, high=MAX_STEPS)
    spaced = sigma_of(torch.linspace(TIMESTEPS - 1, 0, steps, dtype=torch.float64, device="cpu"))
    return torch.cat([spaced, spaced.new_zeros(1)])


def karras(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0) -> Tensor:
    """Evenly spaced in sigma^(1/rho), then 0 (Karras et al., arXiv 2206.00364, equation 5). [steps + 1]"""
    check_count("steps", steps, high=MAX_STEPS)
    _check_range(sigma_min, sigma_max)
    check_real("rho", rho, above=0.0)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    spaced = torch.linspace(high, low, steps, dtype=torch.float64, device="cpu") ** rho
    return torch.cat([spaced, spaced.new_zeros(1)])


def uniform(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """Evenly spaced in log sigma (DPM-Solver's uniform lambda, arXiv 2206.00927), then 0. [steps + 1]"""
    check_count("steps", steps, high=MAX_STEPS)
    _check_range(sigma_min, sigma_max)
    spaced = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64, device="cpu").exp()
    return torch.cat([spaced, spaced.new_zeros(1)])


def flow(steps: int, shift: float = 1.0) -> Tensor:
    """Flow-matching times from 1 to 0, t -> shift t / (1 + (shift - 1) t) (SD3, arXiv 2403.03206). [steps + 1]"""
    check_count("steps", steps, high=MAX_STEPS)
    check_real("shift", shift, above=0.0)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")
    return shift * t / (1 + (shift - 1) * t)


def _check_range(sigma_min: float, sigma_max: float) -> None:
    low, high = (float(level) for level in (sigma_min, sigma_max))
    check_real("sigma_min", low, above=0.0)
    check_real("sigma_max", high, low=low)


SCHEDULES = {"normal": normal, "karras": karras, "uniform": uniform, "flow": flow}
