"""The schemes against the samplers' own recurrences, stepped in the plain way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, schedules, schemes, solve
from paratafusion_core.denoisers import from_network
from paratafusion_core.noise import draw


def model(x: Tensor, sigma: float) -> Tensor:
    """A smooth nonlinear denoiser of one row."""
    return torch.tanh(x / (1 + sigma)) * (1 + 0.3 * torch.sin(x.roll(1, -1)))


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.stack([model(row, float(s)) for row, s in zip(x, sigma, strict=True)])


def vp(sigma: float, flow: bool) -> tuple[float, float, float]:
    """Signal, noise and the factor from the VP state to x."""
    alpha = 1 - sigma if flow else 1.0
    scale = math.hypot(alpha, sigma)
    return alpha / scale, sigma / scale, scale


def ddim(x: Tensor, sigmas: Tensor, eta: float, noise: Tensor, flow: bool) -> Tensor:
    """DDIM's equation 12 in the paper's own alphas, x scaled to variance 1 (VP) and back."""
    for k in range(len(sigmas) - 1):
        now, then = float(sigmas[k]), float(sigmas[k + 1])
        D = model(x, now)
        (a, b, scale), (a_next, b_next, scale_next) = vp(now, flow), vp(then, flow)
        eps = (x / scale - a * D) / b
        ratio = 0.0 if a == 0 else a**2 / a_next**2
        std = eta * math.sqrt((1 - a_next**2) / (1 - a**2)) * math.sqrt(1 - ratio)
        x_vp = a_next * D + math.sqrt(max(b_next**2 - std**2, 0.0)) * eps + std * noise[k]
        x = x_vp * scale_next
    return x


def dpmpp(x: Tensor, sigmas: Tensor, eta: float, noise: Tensor) -> Tensor:
    """DPM-Solver++ 2M and its SDE (midpoint) form, VE-scaled, with the previous D carried along."""
    old, h_old = None, 0.0
    for k in range(len(sigmas) - 1):
        now, then = float(sigmas[k]), float(sigmas[k + 1])
        D = model(x, now)
        if then == 0:
            x = D
            continue
        h = math.log(now / then)
        push = 1 - math.exp(-h * (1 + eta))
        x = then / now * math.exp(-eta * h) * x + push * D
        if old is not None:
            x = x + 0.5 * push * (h / h_old) * (D - old)
        if eta:
            x = x + then * math.sqrt(1 - math.exp(-2 * eta * h)) * noise[k]
        old, h_old = D, h
    return x


@pytest.mark.parametrize("shape", [(), (2,), (3, 5, 5), (4, 8, 8)])
def test_a_longer_run_draws_the_same_numbers(shape: tuple[int, ...]) -> None:
    start, noise = draw(3, 2, shape, 11)
    for steps in (0, 1, 10):
        first, others = draw(3, 2, shape, steps)
        assert torch.equal(first, start) and torch.equal(others, noise[:steps])


def test_a_default_dtype_is_no_matter_of_the_noise() -> None:
    plain = draw(0, 1, (3, 5), 2)
    torch.set_default_dtype(torch.float64)
    try:
        other = draw(0, 1, (3, 5), 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(other, plain, strict=True))


@pytest.fixture
def draws() -> tuple[Tensor, Tensor]:
    start, noise = draw(5, 2, (12,), 24)
    return start.double(), noise.double()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", ["normal", "karras", "uniform"])
def test_ddim(draws: tuple[Tensor, Tensor], eta: float, schedule: str) -> None:
    start, noise = draws
    sigmas = schedules.SCHEDULES[schedule](24)
    x0 = start * sigmas[0]
    ours = solve(schemes.ddim(x0, sigmas, eta=eta, noise=noise), denoise, Options("sequential")).x
    torch.testing.assert_close(ours, ddim(x0, sigmas, eta, noise, False), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_on_flow_states(draws: tuple[Tensor, Tensor], eta: float) -> None:
    start, noise = draws
    sigmas = schedules.flow(24)
    ours = solve(
        schemes.ddim(start, sigmas, eta=eta, noise=noise, flow=True), denoise, Options("sequential", flow=True)
    )
    torch.testing.assert_close(ours.x, ddim(start, sigmas, eta, noise, True), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("flow", [False, True])
def test_euler_is_the_ode_step(draws: tuple[Tensor, Tensor], flow: bool) -> None:
    x0, _ = draws
    sigmas = schedules.flow(24) if flow else schedules.karras(24)
    x = x0 = x0 * sigmas[0]
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x + (then - now) * (x - model(x, now)) / now
    ours = solve(schemes.euler(x0, sigmas, flow=flow), denoise, Options("sequential", flow=flow)).x
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("eta", "last"), [(0.0, 0.0), (0.0, 0.05), (0.5, 0.0), (1.0, 0.05)])
def test_dpmpp_2m(draws: tuple[Tensor, Tensor], eta: float, last: float) -> None:
    start, noise = draws
    sigmas = schedules.karras(24).clone()
    sigmas[-1] = last / 2  # ends at 0, or above it
    x0 = start * sigmas[0]
    system = schemes.dpmpp_2m(x0, sigmas) if eta == 0 else schemes.dpmpp_2m_sde(x0, sigmas, eta=eta, noise=noise)
    ours = solve(system, denoise, Options("sequential")).x
    torch.testing.assert_close(ours, dpmpp(x0, sigmas, eta, noise), rtol=1e-10, atol=1e-10)


def test_dpmpp_2m_is_second_order() -> None:
    """On the flow and on the VE form of one Gaussian the error falls fourfold as the steps double."""

    def error(steps: int, flow: bool) -> float:
        x = torch.full((1, 1), 1.3, dtype=torch.float64)
        lam = torch.linspace(-1.0, 2.0, steps + 1, dtype=torch.float64)
        ve = torch.exp(-lam)
        sigmas = ve / (1 + ve) if flow else ve

        def linear(x: Tensor, sigma: Tensor) -> Tensor:
            alpha = 1 - sigma if flow else torch.ones_like(sigma)
            return (alpha * 0.5 / (alpha**2 * 0.5 + sigma**2)).reshape(-1, 1, 1) * x

        out = solve(schemes.dpmpp_2m(x, sigmas, flow=flow), linear, Options("sequential", flow=flow)).x
        a = [1 - float(sigmas[k]) if flow else 1.0 for k in (0, -1)]
        std = [math.sqrt(a[k] ** 2 * 0.5 + float(sigmas[k]) ** 2) for k in (0, -1)]
        return abs(float(out) - 1.3 * std[1] / std[0])

    for flow in (False, True):
        assert error(80, flow) < error(40, flow) / 3


def test_a_zero_terminal_snr_start_keeps_its_digits() -> None:
    """sigma 4518 in float32 states: the unrolled S is still the float64 recurrence to float32 rounding."""
    start, noise = draw(1, 1, (8,), 20)
    sigmas = torch.cat([torch.tensor([4518.0], dtype=torch.float64), schedules.normal(19)])
    single = schemes.ddpm(start * 4518, sigmas, noise=noise)
    double = schemes.ddpm((start * 4518).double(), sigmas, noise=noise.double())
    torch.testing.assert_close(single.S.double(), double.S, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_predictions_recover_the_picture(prediction: str) -> None:
    """A network that knows x0 and eps, asked for each kind of prediction, gives D = x0."""
    x0, eps = torch.randn(2, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64)
    level = sigma.reshape(-1, 1, 1)
    x = (1 - level) * x0 + level * eps if prediction == "flow" else x0 + level * eps
    alpha = (1 + level**2).rsqrt()
    answers = {"eps": eps.expand(2, 1, 5), "x0": x0.expand(2, 1, 5), "flow": (eps - x0).expand(2, 1, 5)}
    answers["v"] = alpha * eps - alpha * level * x0
    shown = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        shown.append(x)
        return answers[prediction].flatten(0, 1)

    D = from_network(network, prediction)(x.expand(2, 1, 5), sigma)
    torch.testing.assert_close(D, x0.expand(2, 1, 5), rtol=1e-12, atol=1e-12)
    wanted = x if prediction == "flow" else alpha * x
    torch.testing.assert_close(shown[0], wanted.expand(2, 1, 5).flatten(0, 1))


def test_schedules() -> None:
    for name, make in schedules.SCHEDULES.items():
        sigmas = make(20)
        assert len(sigmas) == 21 and sigmas[-1] == 0 and (sigmas.diff() < 0).all(), name
    # Stable Diffusion's extremes, as every implementation prints them
    assert abs(schedules.SIGMA_MIN - 0.0292) < 1e-4 and abs(schedules.SIGMA_MAX - 14.6146) < 1e-4
    t = torch.linspace(0, 999, 57, dtype=torch.float64)
    torch.testing.assert_close(schedules.timestep_of(schedules.sigma_of(t)), t)


def test_noise_of_an_image_depends_on_the_seed_and_its_place_alone() -> None:
    start, steps = draw(11, 3, (4, 2), 7)
    for batch, longer in ((1, 7), (3, 20)):
        other, more = draw(11, batch, (4, 2), longer)
        assert torch.equal(other, start[:batch]) and torch.equal(more[:7], steps[:, :batch])
    assert not torch.equal(draw(12, 1, (4, 2))[0], start[:1])
    whole = torch.cat([start.flatten(), steps.flatten()])
    assert len(whole.unique()) == len(whole)
