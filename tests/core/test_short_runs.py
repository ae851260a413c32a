"""Runs of few steps: what they cost, what their estimates say, and what a plan makes of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, schedules, schemes, solve
from paratafusion_core.bench.problems import Setting, make_task
from paratafusion_core.collocation.estimate import _regained, _weights_inside
from paratafusion_core.collocation.nodes import Ground, agree, grid
from paratafusion_core.report import fidelity


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("w", [1.0, 3.0, 9.0])
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_a_known_machine_makes_no_short_run_slower(ticking: Callable, w: float, preset: str, warm: bool) -> None:
    """As after a longer run of the same model; with the ratios of 20 steps 8 steps took half as long again."""
    for steps in (2, 3, 4, 6, 8, 10, 12, 16):
        for seed in (0, 1):
            task = make_task(Setting("demo", "euler", "normal", steps, 4.6 if warm else 4.0), seed)
            earlier = make_task(Setting("demo", "euler", "normal", steps, 4.0), seed)
            kept = solve(earlier.system, earlier.denoise, Options("sequential")).trajectory if warm else None
            call, machine, calls = ticking(task.denoise, w, 1.0)
            known = type(machine)({rows: w + rows for rows in (1, 2, 4, 8)}, clock=machine.clock)
            solve(task.system, call, Options("auto", preset, data_rms=task.data_rms), machine=known, warm=kept)
            assert sum(w + rows for rows in calls) <= 1.05 * steps * (w + 1), (steps, seed)


@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize("steps", [3, 4, 5, 7])
def test_where_collocation_saves_no_round_it_evaluates_each_row_once(window: int, steps: int) -> None:
    task = make_task(Setting("demo", "euler", "karras", steps, 4.0), 1)
    exact = solve(task.system, task.denoise, Options("sequential")).x
    done = solve(task.system, task.denoise, Options("collocation", window=window, data_rms=task.data_rms))
    assert done.report.nfe == done.report.rounds == steps and done.report.doubt is None
    assert fidelity(done.x, exact, 2.0).psnr_db > 100


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 160), (torch.float64, 330)])
def test_the_estimate_knows_of_rounding(gaussian: Callable, dtype: torch.dtype, most: float) -> None:
    problem = gaussian("ddim", dtype=dtype)
    report = solve(problem.system, problem.denoise, Options("collocation", window=1, rows=30, peak=2.0)).report
    assert report.nfe == 30 and report.estimated_db is not None and 100 < report.estimated_db < most


def test_tolerance_zero_evaluates_each_row_once(gaussian: Callable) -> None:
    problem = gaussian("ddim")
    exact = solve(problem.system, problem.denoise, Options("sequential")).x
    done = solve(problem.system, problem.denoise, Options("collocation", "exact", rows=5, target_db=30.0))
    assert done.report.nfe == done.report.rounds == 30 and torch.equal(done.x, exact)


@pytest.mark.parametrize(
    "options", [Options("sequential"), Options("auto", window=1), Options("auto", "exact")], ids=str
)
def test_the_plain_sampler_predicts_no_gain_over_itself(gaussian: Callable, options: Options) -> None:
    problem = gaussian("ddim")
    report = solve(problem.system, problem.denoise, options).report
    assert report.solver == "sequential" and report.predicted_speedup is None


@pytest.mark.parametrize(("steps", "rows", "more"), [(10, 12, 30), (10, 16, 30), (20, 30, 60), (8, 30, 30)])
def test_a_sketch_of_few_steps_goes_on_to_its_rows(steps: int, rows: int, more: int) -> None:
    """Each row once is no plan for a run that takes over a few rows far apart."""
    for seed in (0, 1):
        task = make_task(Setting("demo", "euler", "karras", steps, 4.0), seed)
        exact = solve(task.system, task.denoise, Options("sequential")).x
        options = Options("collocation", window=4, rows=rows, data_rms=task.data_rms)
        sketch = solve(task.system, task.denoise, replace(options, max_rounds=4)).trajectory
        done = solve(task.system, task.denoise, replace(options, rows=more), warm=sketch)
        assert fidelity(done.x, exact, 2.0).psnr_db > 60


@pytest.mark.parametrize(("steps", "cfg"), [(16, 4.0), (20, 7.0), (25, 7.0)])
def test_2m_on_normal_is_not_told_too_much(steps: int, cfg: float) -> None:
    """Its last steps weigh anew what was interpolated before. Of 16 seeds each the medians are -4.9, 1.0 and 1.2 dB too
    much; they were 5.6, 6.3 and 5.2 with a look at each gap's own end alone."""
    off = []
    for seed in range(600, 608):
        task = make_task(Setting("demo", "dpmpp_2m", "normal", steps, cfg), seed)
        exact = solve(task.system, task.denoise, Options("sequential")).x
        options = Options("collocation", window=1, target_db=42.0, data_rms=task.data_rms, peak=2.0)
        done = solve(task.system, task.denoise, options)
        assert done.report.estimated_db is not None
        off.append(done.report.estimated_db - fidelity(done.x, exact, 2.0).psnr_db)
    assert -8.0 < statistics.median(off) < 4.5


def test_rows_that_weigh_more_than_all_are_evaluated() -> None:
    """Left out, they took 2M-16 at CFG 7 to 32 to 39 dB with 13 rows, told 48."""
    near = []
    for seed in range(600, 604):
        task = make_task(Setting("demo", "dpmpp_2m", "normal", 16, 7.0), seed)
        seen: list[float] = []

        def noted(x: Tensor, sigma: Tensor, task: Any = task, seen: list[float] = seen) -> Tensor:
            seen.extend(sigma.tolist())
            return task.denoise(x, sigma)

        exact = solve(task.system, task.denoise, Options("sequential")).x
        options = Options("collocation", window=1, target_db=42.0, data_rms=task.data_rms, peak=2.0)
        near.append(fidelity(solve(task.system, noted, options).x, exact, 2.0).psnr_db)
        assert seen[: len(set(seen))] == sorted(set(seen), reverse=True)  # on the way, not in an afterthought
        assert {round(float(level), 5) for level in task.system.sigmas[-3:]} <= {round(level, 5) for level in seen}
    assert sum(near) / len(near) > 45 and min(near) > 33


def ground(C: Tensor, sigmas: Tensor) -> Ground:
    K = len(sigmas)
    S = torch.zeros(K + 1, 1, 3, dtype=torch.float64)
    u = -(sigmas + 0.35).log()
    return Ground(S, C, u, torch.zeros(K, dtype=torch.float64), torch.ones(K, dtype=torch.float64))


def test_what_later_states_weigh_anew_counts() -> None:
    """Euler's states keep the weight of a gap's end; one that takes it back and more is weighed by that."""
    x, sigmas = torch.zeros(1, 3, dtype=torch.float64), schedules.karras(9)
    C = schemes.euler(x, sigmas).C
    rows = [0, 1, 2, 4, 6, 8]
    alpha, quiet = torch.ones(10, dtype=torch.float64), torch.ones(10, dtype=torch.float64)

    def weights(C: Tensor) -> tuple[Tensor, Tensor]:
        given = ground(C, sigmas[:9].double())
        y = torch.zeros(len(rows), 1, 3, dtype=torch.float64)
        nodes = agree(given, rows, y, y)
        assert torch.equal(nodes.W, grid(given, rows)[1])
        return _weights_inside(given, rows, quiet), _regained(nodes, alpha)

    inside, regained = weights(C)
    assert torch.allclose(inside, ground(C, sigmas[:9].double()).inside(rows))
    assert torch.equal(regained, torch.ones(6, dtype=torch.float64))
    later = C.clone()
    later[9, 5] = -2.5
    more, regained = weights(later)
    assert torch.allclose(more[[0, 1, 2, 4]], inside[[0, 1, 2, 4]]) and 1.0 < more[3] <= 2.5
    assert regained[3] > 1.0 or regained[4] > 1.0
