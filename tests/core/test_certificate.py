"""The sign of a decision between pictures: what is measured, and that it is raised where the picture is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, schedules, schemes, solve
from paratafusion_core.certificate import STEEP, doubt, products, quotients
from paratafusion_core.demo.ideal import Ideal
from paratafusion_core.errors import NotFinite
from paratafusion_core.noise import draw
from paratafusion_core.report import fidelity
from paratafusion_core.rows import Scales, Window

SOLVERS = ["quasi-newton", "parataa", "picard", "picard-eps"]
PICTURES = torch.sign(torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def two_pictures(x: Tensor, sigma: Tensor) -> Tensor:
    """The ideal denoiser of two pictures."""
    score = (x @ PICTURES.T - PICTURES.square().sum(1) / 2) / sigma.reshape(-1, 1, 1) ** 2
    return torch.softmax(score, -1) @ PICTURES


def undecided(offset: float):
    """A path that starts ``offset`` sigma from the plane between the two pictures, along their difference."""
    gap = PICTURES[1] - PICTURES[0]
    noise = torch.randn(1, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise -= (noise @ gap)[:, None] * gap / (gap @ gap)
    # D = the middle all the way: x = middle + sigma noise
    start = PICTURES.mean(0) + schedules.SIGMA_MAX * (noise + offset * gap / gap.norm())
    return schemes.ddim(start, schedules.karras(30))


@pytest.mark.parametrize("flow", [False, True])
def test_the_quotient_is_the_slope_along_the_change(flow: bool) -> None:
    """D linear in x with known eigenvalues: the quotient is theirs, times alpha; tiny changes tell nothing."""
    sigmas = schedules.flow(6) if flow else schedules.karras(6)
    scheme = schemes.euler(torch.zeros(1, 4), sigmas, flow=flow)
    scales = Scales.of(scheme, flow, 1.0)
    window = Window(1, 4, scheme.C[1:4, 1:4], scales, 4)
    slopes = torch.tensor([0.5, 7.0, -2.0, 1.0], dtype=torch.float64)
    old = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = torch.zeros(3, 2, 4, dtype=torch.float64)
    change[0, 0, 0], change[0, 1, 1], change[1, 0, 1], change[2, 1, 2] = 1.0, 2.0, 1e-6, 0.3
    x = old[1:] + change
    # one row has left the window
    found = quotients(products(x, x * slopes, (old, old * slopes), 1).numpy(), window)
    wanted = torch.tensor([7.0, 0.0, 0.0], dtype=torch.float64) * scales.alpha[1:4]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "picard"])
@pytest.mark.parametrize("window", [4, 8, "full"])
def test_a_path_near_the_middle_is_doubtful(solver: str, window: int | str) -> None:
    """The nearer to the plane between the pictures, the steeper; a settled path shows nothing."""
    assert solve(undecided(1e-3), two_pictures, Options(solver, window=window)).report.doubt is not None
    assert solve(undecided(-0.01), two_pictures, Options(solver, window=window)).report.doubt is not None
    assert solve(undecided(3.0), two_pictures, Options(solver, window=window)).report.doubt is None


@pytest.mark.parametrize(("solver", "window"), [("quasi-newton", 4), ("picard", 8), ("parataa", 8)])
def test_a_wrong_picture_says_so(solver: str, window: int) -> None:
    """64 memorised pictures close together, CFG 7.5, a seed found by search: balanced lands on another one."""
    g = torch.Generator().manual_seed(11)
    pictures = torch.randn(64, 12, generator=g) @ torch.randn(12, 256, generator=g)
    pictures = (pictures / pictures.square().mean().sqrt()).double()
    denoise = Ideal(pictures, torch.arange(64) % 8, (4, 8, 8)).denoiser(1, 7.5)
    start, _ = draw(1, 1, (4, 8, 8), 30)
    system = schemes.dpmpp_2m(start.float() * schedules.SIGMA_MAX, schedules.karras(30))
    reference = solve(system, denoise, Options("sequential")).x
    done = solve(system, denoise, Options(solver, window=window))
    assert fidelity(done.x, reference).psnr_db < 20  # or the case shows nothing
    assert done.report.doubt is not None


def test_exact_runs_are_never_doubtful() -> None:
    for options in (Options("sequential"), Options(preset="exact"), Options(window=1)):
        assert solve(undecided(1e-3), two_pictures, options).report.doubt is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_smooth_model_is_never_doubtful(gaussian: Callable, solver: str) -> None:
    for scheme in ("ddim", "ddpm", "dpmpp_2m"):
        problem = gaussian(scheme, batch=2)
        assert solve(problem.system, problem.denoise, Options(solver)).report.doubt is None


def test_the_sentence_names_the_place() -> None:
    assert doubt((STEEP - 0.01, 2.0)) is None
    sentence = doubt((6.0, 2.5))
    assert sentence is not None and "sigma 2.5" in sentence and "6.0" in sentence


def test_not_finite_has_its_own_error() -> None:
    """A host can tell it from a wrong shape."""
    with pytest.raises(NotFinite, match="NaN or infinity at row 0"):
        solve(undecided(1.0), lambda x, sigma: x * math.nan)
    with pytest.raises(ValueError) as raised:
        solve(undecided(1.0), lambda x, sigma: x[:1, :, :3])
    assert not isinstance(raised.value, NotFinite)
