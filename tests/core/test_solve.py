"""What every solver promises, on every scheme."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, Progress, Status, solve
from paratafusion_core.errors import NotFinite
from paratafusion_core.report import fidelity

SOLVERS = ["quasi-newton", "parataa", "picard", "picard-eps"]
SEQUENTIAL = Options("sequential")


def plain(problem) -> Tensor:
    """The sampler as such: one row after the other, ``x_k = S_k + sum C D``."""
    system, D = problem.system, []
    x = system.S[0]
    for k in range(system.evaluations):
        D.append(problem.denoise(x[None], system.sigmas[k : k + 1])[0])
        x = system.S[k + 1] + sum(float(system.C[k + 1, i]) * D[i] for i in range(k + 1))
    return x


def test_sequential_steps_the_system(problem) -> None:
    before = problem.system.S.clone()
    done = solve(problem.system, problem.denoise, replace(SEQUENTIAL, flow=problem.flow))
    torch.testing.assert_close(done.x, plain(problem), rtol=1e-9, atol=1e-9)
    report, K = done.report, problem.system.evaluations
    assert (report.rounds, report.nfe, report.sequential_nfe) == (K, K, K)
    assert torch.equal(problem.system.S, before)


@pytest.mark.parametrize("solver", SOLVERS)
def test_converges_to_the_sequential_result(problem, solver: str) -> None:
    """At a small tolerance every solver finds the same picture, never in more rounds than the sampler has steps."""
    reference = solve(problem.system, problem.denoise, replace(SEQUENTIAL, flow=problem.flow)).x
    for window in (4, "full"):
        options = Options(solver, tol=1e-7, window=window, flow=problem.flow)
        done = solve(problem.system, problem.denoise, options)
        report = done.report
        assert fidelity(done.x, reference).psnr_db > 110, (window, report.rounds)
        assert report.rounds <= report.sequential_nfe and done.status is Status.CONVERGED
        assert sum(report.rows_per_round) == report.nfe and len(report.rows_per_round) == report.rounds
        assert report.frozen_per_round == sorted(set(report.frozen_per_round))
        assert report.frozen_per_round[-1] == report.sequential_nfe


@pytest.mark.parametrize("preset", ["fast", "balanced", "strict"])
def test_presets_save_rounds_and_keep_the_picture(mixture: Callable, preset: str) -> None:
    """Mean over seeds; the tighter the preset, the nearer."""
    floor = {"fast": 40, "balanced": 50, "strict": 60}[preset]
    rounds, psnr = [], []
    for seed in range(6):
        problem = mixture("ddim", seed=seed)
        reference = solve(problem.system, problem.denoise, SEQUENTIAL).x
        done = solve(problem.system, problem.denoise, Options(preset=preset))
        rounds.append(done.report.rounds)
        psnr.append(fidelity(done.x, reference).psnr_db)
    assert sum(psnr) / 6 > floor
    assert sum(rounds) / 6 < 0.55 * 30


def test_quasi_newton_needs_fewer_rounds_than_parataa(mixture: Callable) -> None:
    """At accuracies that both reach: equal tolerances in the same rule would not compare the same thing."""
    ratio, near = [], []
    for seed in range(6):
        problem = mixture("ddim", seed=seed)
        reference = solve(problem.system, problem.denoise, SEQUENTIAL).x
        ours = solve(problem.system, problem.denoise, Options(window=16))
        paper = solve(problem.system, problem.denoise, Options("parataa", window=16))
        ratio.append(ours.report.rounds / paper.report.rounds)
        near.append(min(fidelity(s.x, reference).psnr_db for s in (ours, paper)))
    assert sum(ratio) / 6 <= 0.85 and min(near) > 45


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_window_1_and_exact_are_the_sequential_bits(mixture: Callable, solver: str, dtype: torch.dtype) -> None:
    """The mixture's kernels do not depend on the batch size, so nothing may differ."""
    for scheme in ("ddim", "ddpm", "dpmpp_2m"):
        problem = mixture(scheme, seed=2, batch=2, dtype=dtype)
        reference = solve(problem.system, problem.denoise, SEQUENTIAL).x
        for options in (Options(solver, window=1), Options(solver, preset="exact"), Options(solver, tol=0, window=24)):
            done = solve(problem.system, problem.denoise, options)
            assert torch.equal(done.x, reference), (scheme, options)
            assert done.report.rounds <= problem.system.evaluations


def test_exact_saves_rounds_too(mixture: Callable) -> None:
    """Rows whose state is already equal to the bit freeze together and are not evaluated again."""
    problem = mixture("ddim", seed=1)
    report = solve(problem.system, problem.denoise, Options(preset="exact")).report
    assert report.rounds < problem.system.evaluations
    assert report.nfe < 8 * report.rounds


def test_a_linear_denoiser_is_solved_at_once(gaussian: Callable) -> None:
    """Unit data: theta is the true slope, so from half-precision D the first correction already finds every row."""
    problem = gaussian("ddim")

    def unit(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1) ** 2)

    cold = solve(problem.system, unit, Options(window="full", tol=1e-9))
    warm = solve(problem.system, unit, Options(window="full", tol=1e-9), warm=cold.trajectory)
    assert warm.report.rounds <= 2 < cold.report.rounds
    torch.testing.assert_close(warm.x, cold.x, rtol=1e-8, atol=1e-8)


def test_frozen_rows_never_change(mixture: Callable) -> None:
    """A row is evaluated in consecutive rounds until it freezes, and never again."""
    problem = mixture("ddpm", seed=4)
    rows_of = {float(s): k for k, s in enumerate(problem.system.sigmas)}
    calls = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append([rows_of[float(s)] for s in sigma])
        return problem.denoise(x, sigma)

    report = solve(problem.system, spy, Options(window=6)).report
    frozen = [0, *report.frozen_per_round]
    for n, rows in enumerate(calls):
        assert rows == list(range(frozen[n], min(frozen[n] + 6, problem.system.evaluations)))


def test_batch_members_are_independent(mixture: Callable) -> None:
    """Image b of a batch is image b alone, to the tolerance; permuting the batch permutes the result."""
    whole = mixture("ddpm", seed=7, batch=3)
    options = Options(tol=1e-8, window=8)
    batch = solve(whole.system, whole.denoise, options).x
    single = solve(replace(whole.system, S=whole.system.S[:, 1:2]), whole.denoise, options).x
    torch.testing.assert_close(batch[1:2], single, rtol=1e-6, atol=1e-6)
    order = [2, 0, 1]
    turned = solve(replace(whole.system, S=whole.system.S[:, order]), whole.denoise, options).x
    torch.testing.assert_close(turned, batch[order], rtol=1e-9, atol=1e-9)


def test_callback_sees_the_picture_grow(mixture: Callable) -> None:
    problem = mixture("ddim", seed=0)
    reference = solve(problem.system, problem.denoise, SEQUENTIAL).x
    seen: list[tuple[Progress, float]] = []
    done = solve(
        problem.system,
        problem.denoise,
        callback=lambda p: seen.append((p, fidelity(p.picture, reference).psnr_db)),
    )
    assert [p.round for p, _ in seen] == list(range(1, done.report.rounds + 1))
    assert [p.frozen for p, _ in seen] == done.report.frozen_per_round
    assert seen[0][0].picture.shape == done.x.shape and torch.equal(seen[-1][0].picture, done.x)
    assert seen[0][1] < seen[len(seen) // 2][1] < seen[-1][1]


def test_cancelling_leaves_nothing_behind(mixture: Callable) -> None:
    problem = mixture("ddim", seed=0)
    first = solve(problem.system, problem.denoise).x

    class Cancelled(Exception):
        pass

    def cancel(progress: Progress) -> None:
        if progress.round == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        solve(problem.system, problem.denoise, callback=cancel)
    assert torch.equal(solve(problem.system, problem.denoise).x, first)


def test_max_rounds_and_refining(mixture: Callable) -> None:
    """A capped run gives its best picture; a second one fed with its trajectory needs fewer rounds than a cold one."""
    problem = mixture("ddim", seed=3)
    cold = solve(problem.system, problem.denoise)
    sketch = solve(problem.system, problem.denoise, Options(max_rounds=5))
    assert sketch.status is Status.MAX_ROUNDS and sketch.report.rounds == 5 and sketch.report.status == "max_rounds"
    assert fidelity(sketch.x, cold.x).psnr_db > 10
    refined = solve(problem.system, problem.denoise, warm=sketch.trajectory)
    assert refined.report.rounds < cold.report.rounds
    assert fidelity(refined.x, cold.x).psnr_db > 45


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_and_callbacks_may_overwrite_what_they_are_given(
    mixture: Callable, solver: str, dtype: torch.dtype
) -> None:
    """In-place scaling of x and sigma, one output buffer for all calls, a callback that draws into its picture."""
    problem = mixture("ddim", seed=2, dtype=dtype)
    before = [t.clone() for t in (problem.system.S, problem.system.C, problem.system.sigmas)]
    wanted = solve(problem.system, problem.denoise, Options(solver)).x
    buffer = torch.empty(8, *problem.system.S.shape[1:], dtype=dtype)

    def rude(x: Tensor, sigma: Tensor) -> Tensor:
        buffer[: len(x)] = problem.denoise(x, sigma)
        x.zero_()
        sigma.zero_()
        return buffer[: len(x)]

    done = solve(problem.system, rude, Options(solver), callback=lambda p: p.picture.zero_())
    assert torch.equal(done.x, wanted)
    after = (problem.system.S, problem.system.C, problem.system.sigmas)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e12])
def test_bad_rows_are_refilled(mixture: Callable, solver: str, broken: float) -> None:
    """A model that breaks down away from the sampler's own states, by NaN or by exploding, still converges."""
    problem = mixture("ddim", seed=5)
    states: dict[float, Tensor] = {}

    def record(x: Tensor, sigma: Tensor) -> Tensor:
        states[float(sigma[0])] = x[0].clone()
        return problem.denoise(x, sigma)

    reference = solve(problem.system, record, SEQUENTIAL).x

    def fragile(x: Tensor, sigma: Tensor) -> Tensor:
        D = problem.denoise(x, sigma)
        off = torch.stack([(row - states[float(s)]).pow(2).mean().sqrt() for row, s in zip(x, sigma, strict=True)])
        D[off > 0.3] = broken
        return D

    done = solve(problem.system, fragile, Options(solver))
    assert done.report.repairs > 0
    assert fidelity(done.x, reference).psnr_db > 45


@pytest.mark.parametrize("window", [1, "auto", 8])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_exact_state_without_an_answer_ends_the_run(mixture: Callable, window: int | str, broken: float) -> None:
    """One row alone or in a window: what the model cannot evaluate is named, with its noise level."""
    problem = mixture("ddim", seed=5)
    sigma = problem.system.sigmas[3]

    def fails(x: Tensor, sigmas: Tensor) -> Tensor:
        D = problem.denoise(x, sigmas)
        D[sigmas <= sigma] = broken
        return D

    with pytest.raises(NotFinite, match=rf"at row 3 \(sigma {float(sigma):g}\); finite values"):
        solve(problem.system, fails, Options(window=window))


def test_auto_window_measures(mixture: Callable) -> None:
    problem = mixture("ddim", seed=0)
    reference = solve(problem.system, problem.denoise, SEQUENTIAL).x
    done = solve(problem.system, problem.denoise, Options(window="auto"))
    assert done.report.window_per_round[0] == 1 and done.report.window_reason.startswith("auto")
    assert fidelity(done.x, reference).psnr_db > 45


def test_fidelity_of_pictures_without_a_range_or_an_end() -> None:
    flat, other = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    assert fidelity(other, flat).psnr_db == -math.inf and fidelity(flat, flat).psnr_db == math.inf
    assert fidelity(other, flat, 1.0).psnr_db == pytest.approx(10 * math.log10(4))
    assert fidelity(torch.full((1, 4), math.inf), other).psnr_db == -math.inf
    assert math.isnan(fidelity(torch.full((1, 4), math.nan), other).psnr_db)
