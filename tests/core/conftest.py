"""Problems that the solver tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from paratafusion_core import System, schedules, schemes
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.denoisers import Denoise
from paratafusion_core.noise import draw
from paratafusion_core.plan import Machine

# the problems are small: threads would only wait for each other
torch.set_num_threads(1)
# no test is one of speed: on a busy machine any example may take long
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@dataclass(frozen=True)
class Problem:
    system: System
    denoise: Denoise
    flow: bool = False


#: name -> (steps, from (x0, noise))
SCHEMES: dict[str, tuple[int, Callable[[Tensor, Tensor], System]]] = {
    "ddim": (30, lambda x, n: schemes.ddim(x, schedules.normal(30))),
    "ddim-eta": (20, lambda x, n: schemes.ddim(x, schedules.karras(20), eta=0.5, noise=n[:20])),
    "ddpm": (30, lambda x, n: schemes.ddpm(x, schedules.normal(30), noise=n[:30])),
    "euler": (20, lambda x, n: schemes.euler(x, schedules.uniform(20))),
    "dpmpp_2m": (20, lambda x, n: schemes.dpmpp_2m(x, schedules.karras(20))),
    "dpmpp_2m_sde": (20, lambda x, n: schemes.dpmpp_2m_sde(x, schedules.karras(20), noise=n[:20])),
}


def mixture_problem(
    scheme: str = "ddim", seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float64, cfg: float = 4.0
) -> Problem:
    """A guided Gaussian mixture, the class chosen by the seed."""
    mixture = Mixture.make(modes=24, classes=6, shape=(2, 6, 6))
    start, noise = draw(seed, batch, mixture.shape, 30)
    x0 = (start * schedules.SIGMA_MAX).to(dtype)
    return Problem(SCHEMES[scheme][1](x0, noise.to(dtype)), mixture.denoiser(seed % 6, cfg))


def gaussian_problem(
    scheme: str = "ddim", seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float64
) -> Problem:
    """One Gaussian mode: D is linear in x, mean 0.3, per-coordinate variances from 0.05 to 2."""
    start, noise = draw(seed, batch, (40,), 30)
    variance = torch.linspace(0.05, 2.0, 40, dtype=dtype)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.3 + variance / (variance + sigma.reshape(-1, 1, 1) ** 2) * (x - 0.3)

    return Problem(SCHEMES[scheme][1]((start * schedules.SIGMA_MAX).to(dtype), noise.to(dtype)), denoise)


def flow_problem(seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float64) -> Problem:
    """The mixture as a flow-matching model: Euler from pure noise."""
    mixture = Mixture.make(modes=24, classes=6, shape=(2, 6, 6))
    ve = mixture.denoiser(seed % 6, 4.0)
    start, _ = draw(seed, batch, mixture.shape)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = (1 - sigma).clamp(min=1e-4)
        return ve(x / alpha.reshape(-1, *[1] * (x.ndim - 1)), sigma / alpha)

    return Problem(schemes.euler(start.to(dtype), schedules.flow(28, shift=3.0), flow=True), denoise, flow=True)


def ticking_machine(model: Denoise, w: float, c: float) -> tuple[Denoise, Machine, list[int]]:
    """``model`` on a machine where a batch of b rows takes w + c b; the rows of its calls."""
    now, calls = [0.0], list[int]()

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        now[0] += w + c * len(x)
        calls.append(len(x))
        return model(x, sigma)

    return call, Machine(clock=lambda: now[0], engine=0.0), calls


@pytest.fixture
def mixture() -> Callable[..., Problem]:
    return mixture_problem


@pytest.fixture
def gaussian() -> Callable[..., Problem]:
    return gaussian_problem


@pytest.fixture
def flow() -> Callable[..., Problem]:
    return flow_problem


@pytest.fixture
def ticking() -> Callable[..., tuple[Denoise, Machine, list[int]]]:
    return ticking_machine


@pytest.fixture(params=[*SCHEMES, "flow"])
def problem(request: pytest.FixtureRequest) -> Problem:
    """Every scheme on the mixture, batch of 2."""
    if request.param == "flow":
        return flow_problem(seed=3, batch=2)
    return mixture_problem(request.param, seed=3, batch=2)
