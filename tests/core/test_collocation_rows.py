"""Where collocation evaluates: its rows, what lies between them, and what it evaluates again."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paratafusion_core import Options, Report, schedules, solve
from paratafusion_core.cli.sample import Task, make_task
from paratafusion_core.collocation import run
from paratafusion_core.collocation.budget import Budget, at_window, unsettled
from paratafusion_core.collocation.grid import (
    _SPREADS,
    _SURE,
    NEAR,
    _spread,
    coordinate,
    interpolation,
    left_out,
    middle,
    noise_at,
    place,
    place_surely,
    subdivide,
)
from paratafusion_core.collocation.impact import impact
from paratafusion_core.collocation.nodes import Ground, agree
from paratafusion_core.denoisers import Denoise
from paratafusion_core.plan import target_rows


def levels(count: int = 30) -> Tensor:
    sigma = schedules.normal(count)[:-1]
    return coordinate(sigma, torch.ones_like(sigma), 1.0)


def test_levels_that_all_lie_beyond_what_matters_are_told_apart() -> None:
    sigma = torch.tensor([1.0, 1 - 3e-8, 1 - 6e-8, 0.99, 0.7, 0.4, 0.1], dtype=torch.float64)
    u = coordinate(sigma, 1 - sigma, 1.0)
    assert (u.diff() > 0).all() and torch.equal(u[3:], coordinate(sigma[3:], 1 - sigma[3:], 1.0))
    for rows in (3, 5, 7):
        assert interpolation(u, place(u, rows)).isfinite().all()
        assert interpolation(u, [0, 1, 2, 6]).abs().max() < 1e7


def way_ends(report: Report) -> int:
    """The round that reaches the last of 50 rows."""
    return next(i for i, row in enumerate(report.frozen_per_round) if row >= 49)


def listened(task: Task) -> tuple[list[float], Denoise]:
    """The sigmas that are asked for, in their order, and the denoiser that writes them down."""
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.extend(sigma.tolist())
        return task.denoise(x, sigma)

    return asked, denoise


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(schedules.SCHEDULES)), st.integers(2, 120), st.integers(1, 130), st.booleans())
def test_rows_are_spread_over_the_whole_run(schedule: str, steps: int, count: int, early: bool) -> None:
    sigma = schedules.SCHEDULES[schedule](steps)[:-1]
    flow = schedule == "flow"
    u = coordinate(sigma, 1 - sigma if flow else torch.ones_like(sigma), 0.6)
    assert (u.diff() > 0).all()
    rows = place(u, count, early)
    assert len(rows) == max(min(count, steps), 2)
    assert rows[0] == 0 and rows[-1] == steps - 1
    assert all(a < b for a, b in itertools.pairwise(rows))


def first_gap(rows: list[int], u: Tensor) -> float:
    return float((u[rows[1]] - u[rows[0]]) / (u[-1] - u[0])) * (len(rows) - 1)


def test_more_rows_and_wide_windows_start_densely() -> None:
    """Pictures are decided early; where the schedule has no rows to choose from nothing changes."""
    u = levels(100)
    assert first_gap(place(u, 9, early=True), u) < 0.9 * first_gap(place(u, 9), u)
    assert place(u, 13, early=True) == place(u, 13)
    few, some, many = (first_gap(place(u, n), u) for n in (11, 12, 21))
    assert many < 0.8 * some < 0.8 * few
    sigma = schedules.flow(28)[:-1]
    coarse = coordinate(sigma, 1 - sigma, 0.6)
    assert place(coarse, 9, early=True) == place(coarse, 9)
    assert place(coarse, 12) == _spread(coarse, 12, *_SPREADS[0]) != _spread(coarse, 12, *_SPREADS[1])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(schedules.SCHEDULES)), st.integers(1, 120), st.integers(1, 130))
def test_rows_towards_a_target_are_spread_over_the_whole_run(schedule: str, steps: int, count: int) -> None:
    sigma = schedules.SCHEDULES[schedule](steps)[:-1]
    u = coordinate(sigma, 1 - sigma if schedule == "flow" else torch.ones_like(sigma), 0.6)
    rows = place_surely(u, count)
    assert len(rows) == min(max(count, 2), steps)
    assert rows[0] == 0 and rows[-1] == steps - 1
    assert all(a < b for a, b in itertools.pairwise(rows))


def test_rows_towards_a_target_are_dense_early_and_evenly_so() -> None:
    u = levels(100)
    assert max(place_surely(u, 18)[:6]) < max(place(u, 18)[:6])
    u = levels(50)
    rows = place_surely(u, 16)

    def off(rows: list[int]) -> float:
        """How far the gaps are from those wanted, as what is to be least."""
        near, first, rise = _SURE
        at = -((-u).exp() - NEAR + near).log()
        wanted = torch.tensor([min(first + rise * i, 1.0) for i in range(15)], dtype=torch.float64)
        return float(((at[rows].diff() / (at[-1] - at[0]) / (wanted / wanted.sum())).log() ** 2).sum())

    assert off(rows) < off(_spread(u, 16, *_SURE))
    for place_of in range(1, 15):
        for step in (-1, 1):
            other = [*rows[:place_of], rows[place_of] + step, *rows[place_of + 1 :]]
            assert len(set(other)) < 16 or off(other) >= off(rows)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_low_targets_begin_with_no_fewer_rows_than_a_sketch(steps: int) -> None:
    """Estimates of runs of a few rows are 15 dB too high."""
    assert target_rows(steps, 5.0) == target_rows(steps, 36.0)


def test_evaluating_again_never_costs_more_than_the_sampler() -> None:
    """A denoiser that follows its state beyond reason."""
    task = make_task("large red ring", "ddim", "normal", 20, 4.0, 0)
    wild = torch.randn(task.system.S[0].shape, generator=torch.Generator().manual_seed(0))
    options = Options("collocation", window=1, target_db=60.0, data_rms=task.data_rms)
    report = solve(task.system, lambda x, sigma: torch.tanh(3 * x * wild), options).report
    assert report.nfe == report.rounds <= 20


@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize(("steps", "target"), [(20, 60.0), (50, 42.0)])
def test_nodes_that_never_settle_are_left_in_the_end(window: int, steps: int, target: float) -> None:
    """A denoiser that follows its state beyond reason: never more rounds than the sampler has evaluations."""
    task = make_task("large red ring", "ddim", "normal", steps, 4.0, 0)
    wild = torch.randn(task.system.S[0].shape, generator=torch.Generator().manual_seed(0))
    options = Options("collocation", window=window, target_db=target, data_rms=task.data_rms)
    report = solve(task.system, lambda x, sigma: torch.tanh(30 * x * wild), options).report
    assert report.rounds <= steps and max(report.rows_per_round) <= window


def test_a_run_towards_a_target_ends_with_its_nodes_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("small blue ring", "ddim", "normal", 50, 7.5, 14)
    left: list[list[int]] = []

    def watched(*args: object) -> list[int]:
        left.append(unsettled(*args))  # type: ignore[arg-type]
        return left[-1]

    monkeypatch.setattr(run, "unsettled", watched)
    waited = 0
    for window in (2, 4, 6):
        left.clear()
        options = Options("collocation", window=window, target_db=20.0, data_rms=task.data_rms)
        report = solve(task.system, task.denoise, options).report
        behind = left[way_ends(report) :]  # the target is met there
        assert report.rounds == len(left) and behind[-1] == [] and all(behind[:-1])
        waited += len(behind) - 1
    assert waited > 0


@pytest.mark.parametrize(("steps", "target"), [(12, 42.0), (16, 48.0), (20, 60.0)])
def test_a_wide_window_saves_rounds_where_nearly_all_rows_are_nodes(steps: int, target: float) -> None:
    task = make_task("small blue ring", "ddim", "normal", steps, 4.0, 1)
    options = Options("collocation", window=4, target_db=target, data_rms=task.data_rms)
    assert solve(task.system, task.denoise, options).report.rounds <= 0.75 * steps


def test_few_rows_asked_for_towards_a_target_are_a_beginning() -> None:
    task = make_task("small blue ring", "ddim", "normal", 50, 4.0, 1)
    options = Options("collocation", window=1, rows=2, target_db=42.0, data_rms=task.data_rms)
    report = solve(task.system, task.denoise, options).report
    assert target_rows(50, 42.0, 2) == 5 < report.nfe < 50 and report.estimated_db is not None


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_towards_a_target_every_window_walks_the_same_rows(seed: int) -> None:
    task = make_task("small blue ring", "ddim", "normal", 50, 4.0, seed)
    rounds = []
    for window in (1, 2, 4, 6):
        asked, denoise = listened(task)
        options = Options("collocation", window=window, target_db=42.0, data_rms=task.data_rms)
        report = solve(task.system, denoise, options).report
        u = coordinate(task.system.sigmas, torch.ones(50, dtype=torch.float64), task.data_rms)
        front = task.system.sigmas[place_surely(u, target_rows(50, 42.0))]
        assert {round(float(s), 4) for s in front} <= {round(s, 4) for s in asked}
        assert max(report.rows_per_round) <= window
        rounds.append(report.rounds)
    assert rounds == sorted(rounds, reverse=True) and rounds[3] < 0.6 * rounds[0]


def test_wide_windows_evaluate_again_what_moved_far_for_its_noise() -> None:
    """The same movement is too far early and near enough late; window 1 has only what wider windows left."""
    u = levels(20)
    ground = Ground(torch.zeros(21, 1, 4), torch.zeros(21, 20, dtype=torch.float64), u, u * 0, u * 0 + 1)
    rows = [0, 4, 10, 16, 19]
    moved = torch.tensor([0.0, 0.02, 0.02, 0.02, 0.02], dtype=torch.float64)
    nodes = agree(ground, rows, torch.zeros(5, 1, 4), torch.zeros(5, 1, 4))
    seen = replace(impact(ground, nodes, torch.ones(20), torch.zeros(1, 1, 4)), moved=moved)
    noise = noise_at(u[rows])
    assert noise[1] > 3 and noise[4] < 0.5
    plan = Budget(rows, rounds=5, rows=5, width=4, inside=[], open=True, loose=19)
    far = [row for row, level in zip(rows, noise.tolist(), strict=True) if row and 0.05 / (1 + level**2) ** 0.5 < 0.02]
    assert unsettled(ground, plan, nodes, seen) == far and 4 in far and 19 not in far
    assert unsettled(ground, at_window(plan, 1, 3), nodes, seen) == []
    assert unsettled(ground, at_window(plan, 1, 4), nodes, seen) == [4]
    assert at_window(replace(plan, open=False), 1, 4).width == 4


@pytest.mark.parametrize("window", [4, 8, "full"])
def test_behind_its_plan_a_run_spends_four_rows_a_round_up_to_twice_the_samplers_own(window: int | str) -> None:
    task = make_task("large red ring", "ddim", "normal", 50, 4.0, 2)
    options = Options("collocation", window=window, target_db=78.0, data_rms=task.data_rms)
    report = solve(task.system, task.denoise, options).report
    rows, begun = report.rows_per_round, way_ends(report) + 1
    assert sum(rows) > 100 and begun < len(rows)  # or the run shows nothing
    for i in range(begun, len(rows)):
        assert rows[i] <= (4 if sum(rows[:i]) < 100 else 1)


def test_a_sketch_that_goes_on_at_a_wider_window_keeps_to_its_rows() -> None:
    task = make_task("large red ring", "ddim", "normal", 50, 4.0, 1)
    options = Options("collocation", window=1, rows=16, max_rounds=10, data_rms=task.data_rms)
    sketch = solve(task.system, task.denoise, options)
    wide = Options("collocation", window="full", rows=16, data_rms=task.data_rms)
    done = solve(task.system, task.denoise, wide, warm=sketch.trajectory)
    checked = 2
    assert sketch.report.nfe + done.report.nfe - checked <= 16 + 2


def test_towards_a_target_a_node_that_moved_far_is_evaluated_again_at_once() -> None:
    task = make_task("small blue ring", "ddim", "normal", 50, 7.5, 14)
    asked, denoise = listened(task)
    options = Options("collocation", window=1, target_db=30.0, data_rms=task.data_rms)
    assert solve(task.system, denoise, options).report.nfe == len(asked)
    assert all(asked.count(sigma) <= 2 for sigma in asked)
    repeated = [i for i in range(1, len(asked)) if asked[i] == asked[i - 1]]
    assert repeated and len(asked) == len(set(asked)) + len(repeated)
    assert len(set(asked)) == target_rows(50, 30.0)


def test_a_node_that_moved_far_is_evaluated_again_where_rows_can_be_spared() -> None:
    """Seed 14 at CFG 7.5 is such a run; the way goes on to the last row, within the rows asked for."""
    task = make_task("small blue ring", "ddim", "normal", 50, 7.5, 14)
    asked, denoise = listened(task)
    for rows, repeated in ((22, True), (12, False)):
        asked.clear()
        report = solve(task.system, denoise, Options("collocation", window=1, rows=rows, data_rms=task.data_rms)).report
        assert report.nfe == report.rounds == len(asked) == rows
        assert asked == sorted(asked, reverse=True) and asked[-1] == pytest.approx(float(task.system.sigmas[-1]))
        assert (len(set(asked)) < rows) is repeated


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 29), min_size=1, max_size=20))
def test_interpolation_is_exact_at_nodes_and_for_straight_lines(some: set[int]) -> None:
    u, nodes = levels(), sorted({0, *some})
    M = interpolation(u, nodes)
    assert torch.allclose(M[nodes], torch.eye(len(nodes), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(M.sum(1), torch.ones(30, dtype=torch.float64))
    last = nodes[-1]
    found, line = M @ (3 * u[nodes] - 1), 3 * u - 1
    assert torch.allclose(found[: last + 1], line[: last + 1])
    # beyond it goes on at the line's slope, and on from the last node by one gap's rise at most
    assert (found[last + 1 :].diff() > 0).all()
    assert (found[last + 1 :] < line[last + 1 :]).all()
    assert (found <= line[last] + (line[last] - line[nodes[-2]])).all()


def test_interpolation_is_exact_for_parabolas_between_nodes() -> None:
    u, nodes = levels(), [0, 4, 9, 15, 22, 29]
    assert torch.allclose(interpolation(u, nodes) @ u[nodes] ** 2, u**2)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 29), min_size=1, max_size=20))
def test_a_node_left_out_is_what_interpolation_through_the_others_makes_of_it(some: set[int]) -> None:
    nodes = sorted({0, *some})
    u = levels()[nodes]
    weights = left_out(u)
    assert not weights[[0, -1]].any()
    for q in range(1, len(nodes) - 1):
        others = [i for i in range(len(nodes)) if i != q]
        made = torch.zeros(len(nodes), dtype=torch.float64)
        made[others] = interpolation(u, others)[q]
        torch.testing.assert_close(weights[q], torch.eye(len(nodes), dtype=torch.float64)[q] - made)


def test_middles_lie_inside() -> None:
    u = levels()
    assert all(a < middle(u, a, b) < b for a in range(10) for b in range(a + 2, 30))
    assert subdivide(u, 3, 5, 7) == [4]
    assert subdivide(u, 3, 4, 2) == []
    assert len(subdivide(u, 0, 29, 5)) == 5


@pytest.mark.parametrize("rows", [12, 16])
def test_a_sketch_at_a_wide_window_goes_on_at_window_1_without_a_jump(rows: int) -> None:
    """What the sketch evaluated again is no reason to hurry to the last row."""
    task = make_task("large red ring", "ddim", "normal", 50, 4.0, 0, kind="mixture")
    wide = Options("collocation", window=4, max_rounds=5, data_rms=task.data_rms)
    sketch = solve(task.system, task.denoise, wide)
    assert sketch.trajectory is not None and sketch.trajectory.part is not None
    gone = sketch.trajectory.part.rows
    asked, denoise = listened(task)
    narrow = Options("collocation", window=1, rows=rows, data_rms=task.data_rms)
    solve(task.system, denoise, narrow, warm=sketch.trajectory)
    levels = task.system.sigmas.tolist()
    ahead = [row for row in place(ground_of(task), rows) if row > gone[-1]]
    assert [min(range(50), key=lambda k: abs(levels[k] - sigma)) for sigma in asked[1 : 1 + len(ahead)]] == ahead


def test_window_1_settles_what_a_wide_sketch_left_loose() -> None:
    task = make_task("large red ring", "ddim", "normal", 50, 4.0, 1)
    options = Options("collocation", window=4, target_db=42.0, max_rounds=4, data_rms=task.data_rms)
    sketch = solve(task.system, task.denoise, options)
    assert sketch.trajectory is not None and sketch.trajectory.part is not None
    levels = task.system.sigmas.tolist()
    asked, denoise = listened(task)
    narrow = replace(options, window=1, max_rounds=None)
    done = solve(task.system, denoise, narrow, warm=sketch.trajectory)
    rows = [min(range(50), key=lambda k: abs(levels[k] - sigma)) for sigma in asked]
    last = max(sketch.trajectory.part.rows)
    checked, front = 1, next(i for i, row in enumerate(rows) if row > last)
    assert checked < front, "it goes on without evaluating anything again"
    assert set(rows[:front]) <= set(sketch.trajectory.part.rows)
    assert done.report.rounds == done.report.nfe == len(asked)


def ground_of(task: Task) -> Tensor:
    sigma = task.system.sigmas
    return coordinate(sigma, torch.ones_like(sigma), task.data_rms)
