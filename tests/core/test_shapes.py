"""Any rank, dtype and window: states keep their type, and the engine's work does not grow with the window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paratafusion_core import Options, System, schedules, schemes, solve
from paratafusion_core.denoisers import from_network
from paratafusion_core.report import fidelity


def smooth(x: Tensor, sigma: Tensor) -> Tensor:
    """A nonlinear denoiser for states of any rank, elementwise: rows cannot mix."""
    level = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(1.5 * x / (1 + level**2).sqrt())


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    batch=st.integers(1, 3),
    steps=st.integers(1, 12),
    window=st.one_of(st.integers(1, 15), st.just("full"), st.just("auto")),
    double=st.booleans(),
    solver=st.sampled_from(["quasi-newton", "parataa", "picard", "picard-eps", "sequential"]),
    flow=st.booleans(),
)
def test_any_shape(
    shape: list[int], batch: int, steps: int, window: Any, double: bool, solver: str, flow: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    x0 = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(steps)).to(dtype)
    sigmas = schedules.flow(steps) if flow else schedules.karras(steps)
    system = schemes.euler(x0 * float(sigmas[0]), sigmas, flow=flow)
    reference = solve(system, smooth, Options("sequential", flow=flow)).x
    done = solve(system, smooth, Options(solver, window=window, tol=1e-4, flow=flow))
    assert done.x.shape == x0.shape and done.x.dtype == dtype
    assert done.report.rounds <= steps
    assert done.trajectory is not None and done.trajectory.D.shape == (steps, *x0.shape)
    torch.testing.assert_close(done.x, reference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 25), (4, 8, 8), (4, 3, 5, 5)])
def test_half_precision_models(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """States stay float32 while the network computes in half: audio, image and video latents converge all the same."""
    seen = set()

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.add(x.dtype)
        return (x - torch.tanh(1.5 * x)) * 0.9

    denoise = from_network(network, "eps", dtype=dtype)
    x0 = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) * schedules.SIGMA_MAX
    system = schemes.ddim(x0, schedules.normal(25))
    reference = solve(system, denoise, Options("sequential")).x
    done = solve(system, denoise, Options())
    assert seen == {dtype} and done.x.dtype == torch.float32
    assert done.report.rounds <= 25
    assert (done.x - reference).pow(2).mean().sqrt() < 0.03


class Count(TorchDispatchMode):
    """Counts operators on tensors with at least ``size`` numbers: the device's work, not the small CPU algebra."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, Tensor)]
        views = ("view", "slice", "expand", "permute", "transpose", "select", "t.default", "detach", "unsqueeze")
        if any(t.numel() >= self.size for t in tensors) and not any(v in str(func) for v in views):
            self.seen[str(func)] += 1
        return out


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "picard"])
def test_work_of_a_round_does_not_grow_with_the_window(solver: str) -> None:
    """Tensor operations on states per round, model call apart: the same for W = 4 and W = 64."""
    size = 120_000  # more numbers than the algebra of either window has
    x0 = torch.randn(1, size, generator=torch.Generator().manual_seed(0)) * schedules.SIGMA_MAX
    system = schemes.ddim(x0, schedules.normal(80))

    def per_round(window: int) -> float:
        def outside(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                return smooth(x, sigma)

        with Count(size) as count:
            # so tight that neither window is frozen whole, which would leave a round less to do
            options = Options(solver, window=window, max_rounds=6, tol=1e-8)
            report = solve(system, outside, options, keep_trajectory=False).report
        assert report.rounds == 6 and max(report.rows_per_round) == window
        return sum(count.seen.values()) / 6

    narrow, wide = per_round(4), per_round(64)
    assert abs(wide - narrow) <= 1  # a round may or may not have rows left to guess
    assert wide <= 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to see its synchronisations")
def test_one_synchronisation_a_round(recwarn: pytest.WarningsRecorder) -> None:
    x0 = torch.randn(1, 4, 32, 32, device="cuda") * schedules.SIGMA_MAX
    system = schemes.ddim(x0, schedules.normal(30))
    solve(system, smooth, Options(max_rounds=2))  # the first use of a kernel synchronises
    before = len(recwarn)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        done = solve(system, smooth, Options(), keep_trajectory=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(recwarn) - before <= done.report.rounds + 2  # and the set-up's


def test_report_is_plain_json(mixture: Callable) -> None:
    import json

    problem = mixture("ddim")
    report = solve(problem.system, problem.denoise).report
    report.compare(torch.zeros(2, 3), torch.zeros(2, 3))
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["sequential_nfe"] == 30 and again["psnr_db"] is None and again["max_abs"] == 0
    assert len(again["residuals"]) == again["rounds"] and again["sampler"] == "ddim"


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "picard", "collocation", "auto"])
def test_the_layout_of_the_states_in_memory_changes_nothing(mixture: Callable, ticking: Callable, solver: str) -> None:
    """Rows made image by image, say with a generator each, and put side by side afterwards."""
    problem = mixture("ddim", batch=2)
    rows = problem.system.S
    apart = rows.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(apart, rows) and not apart.is_contiguous()
    for w in (0.0, 9.0):  # auto goes row by row on the first machine, and in windows on the second
        found = []
        for S in (rows, apart):
            call, machine, calls = ticking(problem.denoise, w, 1.0)
            system = System(S, problem.system.C, problem.system.sigmas)
            found.append((solve(system, call, Options(solver, window=8), machine=machine).x, calls))
        (plain, seen), (other, others) = found
        assert seen == others and (solver != "auto" or (max(seen[-4:]) > 1) == (w > 0))
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "picard", "collocation"])
def test_data_in_other_units_are_the_same_run(mixture: Callable, solver: str) -> None:
    """Pictures of 0 to 255, say: states, noise levels and ``data_rms`` are so many times as large."""
    problem = mixture("ddim", seed=1)

    def run(unit: float) -> tuple[int, Tensor]:
        old = problem.system
        system = System(old.S * unit, old.C, old.sigmas * unit)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return unit * problem.denoise(x / unit, sigma / unit)

        rows = 14 if solver == "collocation" else None
        done = solve(system, denoise, Options(solver, window=8, rows=rows, data_rms=2.0 * unit))
        return done.report.rounds, done.x / unit

    rounds, x = run(1.0)
    others, y = run(2.0**7)
    assert others == rounds
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    # below an rms of 0.5 as at 0.5, where noise counts twice as much as at 2
    few, small = run(2.0**-10)
    assert abs(few - rounds) <= 2 and fidelity(small, x).psnr_db > 50
