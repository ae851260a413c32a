"""Collocation: its grid and its linear solve as mathematics, and its pictures against the sequential ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paratafusion_core import Options, Status, System, schedules, schemes, solve
from paratafusion_core.bench.problems import Setting
from paratafusion_core.bench.problems import make_task as case
from paratafusion_core.cli.sample import Task, make_task
from paratafusion_core.collocation import refusal
from paratafusion_core.collocation.doubts import Signs, abruptness, doubt, watch
from paratafusion_core.collocation.grid import (
    _SPREADS,
    _SURE,
    NEAR,
    _spread,
    coordinate,
    interpolation,
    middle,
    place,
    place_surely,
    subdivide,
)
from paratafusion_core.collocation.impact import Impact
from paratafusion_core.collocation.nodes import Ground, missed, states, with_evaluated
from paratafusion_core.demo import model
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.noise import draw
from paratafusion_core.plan import collocation_rounds, target_rows
from paratafusion_core.report import Report, fidelity
from paratafusion_core.rows import Scales

SHAPE = (4, 8, 8)
SIGMAS = schedules.normal(30)


def levels(count: int = 30) -> Tensor:
    sigma = schedules.normal(count)[:-1]
    return coordinate(sigma, torch.ones_like(sigma), 1.0)


def ddim(sigmas: Tensor = SIGMAS, batch: int = 2, dtype: torch.dtype = torch.float64) -> System:
    return schemes.ddim(draw(0, batch, SHAPE)[0].to(dtype) * float(sigmas[0]), sigmas)


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
    for window in (1, 2):
        assert target_rows(steps, 5.0, window) == target_rows(steps, 36.0, window)


def test_evaluating_again_never_costs_more_than_the_sampler() -> None:
    """A denoiser that follows its state beyond reason."""
    task = demo(0, steps=20)
    wild = torch.randn(task.system.S[0].shape, generator=torch.Generator().manual_seed(0))
    options = Options("collocation", window=1, target_db=60.0, data_rms=task.data_rms)
    report = solve(task.system, lambda x, sigma: torch.tanh(3 * x * wild), options).report
    assert report.nfe == report.rounds <= 20


def test_towards_a_target_a_node_that_moved_far_is_evaluated_again_at_once() -> None:
    task = make_task("small blue ring", "ddim", "normal", 50, 7.5, 14)
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.extend(sigma.tolist())
        return task.denoise(x, sigma)

    options = Options("collocation", window=1, target_db=30.0, data_rms=task.data_rms)
    assert solve(task.system, denoise, options).report.nfe == len(asked)
    assert all(asked.count(sigma) <= 2 for sigma in asked)
    repeated = [i for i in range(1, len(asked)) if asked[i] == asked[i - 1]]
    assert repeated and len(asked) == len(set(asked)) + len(repeated)
    assert len(set(asked)) == target_rows(50, 30.0)


def test_a_node_that_moved_far_is_evaluated_again_where_rows_can_be_spared() -> None:
    """Seed 14 at CFG 7.5 is such a run; the way goes on to the last row, within the rows asked for."""
    task = make_task("small blue ring", "ddim", "normal", 50, 7.5, 14)
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.extend(sigma.tolist())
        return task.denoise(x, sigma)

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


def test_middles_lie_inside() -> None:
    u = levels()
    assert all(a < middle(u, a, b) < b for a in range(10) for b in range(a + 2, 30))
    assert subdivide(u, 3, 5, 7) == [4]
    assert subdivide(u, 3, 4, 2) == []
    assert len(subdivide(u, 0, 29, 5)) == 5


def test_states_and_denoised_pictures_agree() -> None:
    """Equation (1) of nodes.py, with secants of the rows that were evaluated twice, written out row by row."""
    system, denoise = ddim(batch=3), Mixture.make().denoiser(1, 1.0)
    S, sigma = system.S.flatten(2), system.sigmas
    ground = Ground(S, system.C, levels(), 0.5 / (1 + sigma**2), torch.ones_like(sigma))
    nodes = None
    for rows in ([0], [3, 7], [3, 7, 12], [7, 16, 29]):
        y = states(ground, nodes, rows)
        d = denoise(y.view(len(rows), 3, *SHAPE), sigma[rows]).flatten(2)
        nodes = with_evaluated(ground, nodes, rows, y, d)
    assert nodes is not None and nodes.rows == [0, 3, 7, 12, 16, 29]
    secants = nodes.secants
    assert secants is not None
    D = torch.einsum("kn,nbd->kbd", nodes.M, nodes.D)
    for i, row in enumerate(nodes.rows):
        x = S[row] + torch.einsum("k,kbd->bd", system.C[row], D)
        moved = x - nodes.y[i]
        along = (secants.s[i] * moved).sum(-1, keepdim=True)
        assert torch.allclose(nodes.moved[i], moved, atol=1e-9)
        assert torch.allclose(nodes.D[i], nodes.d[i] + ground.theta[row] * moved + secants.E[i] * along, atol=1e-9)
    twice = [nodes.rows.index(3), nodes.rows.index(7)]
    once = [i for i in range(6) if i not in twice]
    assert torch.allclose(secants.s[twice].norm(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    assert not secants.s[once].any() and not secants.E[once].any()


@pytest.mark.parametrize("window", [1, 4])
def test_every_row_evaluated_is_the_sequential_picture(window: int) -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 4.0)
    exact = solve(system, denoise, Options(solver="sequential")).x
    rows = 30 if window == 1 else 120
    done = solve(system, denoise, Options(solver="collocation", window=window, rows=rows))
    assert fidelity(done.x, exact).psnr_db > (200 if window == 1 else 60)
    if window == 1:
        assert done.report.rounds == done.report.nfe == 30


def test_tolerance_zero_evaluates_all_rows_to_the_bit() -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 4.0)
    exact = solve(system, denoise, Options(solver="sequential")).x
    assert torch.equal(solve(system, denoise, Options(solver="collocation", preset="exact", window=1)).x, exact)


def test_more_rows_come_nearer() -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 1.0)
    exact = solve(system, denoise, Options(solver="sequential")).x
    near = [
        fidelity(solve(system, denoise, Options(solver="collocation", window=1, rows=n)).x, exact).psnr_db
        for n in (4, 8, 16, 24)
    ]
    assert near == sorted(near) and near[-1] > near[0] + 20


def with_noise() -> System:
    return schemes.ddpm(ddim().S[0], SIGMAS, noise=draw(1, 2, SHAPE, 30)[1].double())


def repeated() -> System:
    plain = ddim()
    sigmas = plain.sigmas.clone()
    sigmas[3] = sigmas[2]
    return System(plain.S, plain.C, sigmas, "two evaluations a step")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_noise, "adds noise"),
        (repeated, "do not fall"),
        (lambda: ddim(schedules.normal(2)), "2 evaluations"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_any_call(make: object, why: str) -> None:
    system = make()  # type: ignore[operator]
    reason = refusal(system)
    assert reason is not None and why in reason

    def never(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(ValueError, match="solver is 'collocation'; quasi-newton is allowed"):
        solve(system, never, Options(solver="collocation"))


@pytest.mark.parametrize("make", [schemes.ddim, schemes.euler, schemes.dpmpp_2m])
def test_it_serves_the_deterministic_samplers(make: object) -> None:
    assert refusal(make(ddim().S[0], SIGMAS)) is None  # type: ignore[operator]


def test_the_system_and_the_callbacks_picture_stay_their_owners() -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 4.0)
    before = system.S.clone()
    plain = solve(system, denoise, Options(solver="collocation", window=4)).x
    spoiled = solve(system, denoise, Options(solver="collocation", window=4), callback=lambda p: p.picture.zero_()).x
    assert torch.equal(system.S, before)
    # sums may depend on where their numbers lie in memory
    torch.testing.assert_close(spoiled, plain, rtol=0, atol=1e-6)


def test_a_run_that_has_nothing_left_to_gain_ends_whole() -> None:
    seen: list[int] = []
    options = Options(solver="collocation", window=4)
    done = solve(ddim(), lambda x, sigma: torch.zeros_like(x), options, callback=lambda p: seen.append(p.frozen))
    assert done.status is Status.CONVERGED and done.report.nfe < 30
    assert done.report.frozen_per_round[-1] == seen[-1] == 30


def scales_of(sigmas: Tensor, data_rms: float = 1.0) -> Scales:
    return Scales.of(ddim(torch.cat([sigmas, sigmas.new_zeros(1)])), False, data_rms)


def test_a_missed_target_does_not_hide_the_certificates_doubt() -> None:
    report = Report("ddim", 30, "collocation", "standard", 3e-3, 30, target_db=42.0, estimated_db=30.0)
    scales = scales_of(torch.tensor([20.0, 1.2, 0.5], dtype=torch.float64))
    seen = impact_of([0.4, 0.4], [0.0])
    both = doubt(Signs((9.0, 2.0), 1e3), [0, 1, 2], seen, scales, report)
    assert both is not None and "30 dB of the 42 dB" in both and "another picture" in both
    report.estimated_db = 50.0
    alone = doubt(Signs((9.0, 2.0), 1e3), [0, 1, 2], seen, scales, report)
    assert alone is not None and "of the 42 dB" not in alone and "more rows" in alone and "quasi-newton" in alone
    assert doubt(Signs((0.0, 2.0), 0.1), [0, 1, 2], seen, scales, report) is None


def impact_of(turns: list[float], surprise: list[float], slope: float = 0.0) -> Impact:
    none = torch.zeros(len(turns), dtype=torch.float64)
    found = [torch.tensor(v, dtype=torch.float64) for v in (turns, surprise)]
    return Impact(none, none, none, none, none, none > 0, (slope, 0), *found)


def test_the_signs_are_the_largest_of_all_rounds() -> None:
    """Surprise as a vector over sigma, the quietest rows left out; the slope with the sigma of its row."""
    scales = scales_of(torch.tensor([20.0, 2.0, 0.1], dtype=torch.float64), 0.5)
    first = watch(Signs(), impact_of([], [0.3, 0.2], 3.0), scales, [0, 1], 400)
    assert first.steepest == (3.0, 20.0) and first.surprise == pytest.approx(20 * 0.2 / 2.0)
    quiet = watch(first, impact_of([], [50.0], 1.0), scales, [2], 400)
    assert quiet == first


def test_a_picture_chosen_at_once_is_abrupt() -> None:
    level = torch.tensor([30.0, 5.0, 1.0, 0.2], dtype=torch.float64)
    change = torch.tensor([9.0, 0.5, 0.05, 0.01], dtype=torch.float64)
    assert abruptness(change, level) == pytest.approx(10.0)
    assert abruptness(change[:2], level[:2]) == pytest.approx(500.0)
    assert abruptness(change[[0, 2, 1, 3]], level) == pytest.approx(1.0)


def test_what_the_rows_foresaw_is_what_they_interpolate() -> None:
    system = ddim(batch=3)
    ground = Ground(system.S.flatten(2), system.C, levels(), torch.zeros(30).double(), torch.ones(30).double())
    assert not missed(None, [0], torch.ones(1, 3, 256, dtype=torch.float64)).any()
    some = torch.randn(3, 3, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nodes = with_evaluated(ground, None, [0, 4, 9], states(ground, None, [0, 4, 9]), some)
    d = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    foreseen = torch.einsum("kn,nbd->kbd", interpolation(ground.u, [0, 4, 9])[[6, 12]], nodes.D)
    torch.testing.assert_close(missed(nodes, [6, 12], d), d - foreseen)


@pytest.mark.parametrize(
    ("kind", "seed", "window", "rows"),
    [
        (("dpmpp_2m", "karras", 20, 1.0), 18, 1, 12),
        (("ddim", "normal", 50, 7.5), 17, 1, 12),
        (("euler", "flow", 28, 7.5), 8, 1, 12),
        (("euler", "normal", 20, 4.0), 8, 4, 20),
        (("dpmpp_2m", "normal", 30, 1.0), 18, 4, 30),
    ],
)
def test_another_picture_says_so(kind: tuple[str, str, int, float], seed: int, window: int, rows: int) -> None:
    """Runs of the ideal denoiser, found by search, that end in another picture although the estimate is above 30 dB."""
    task = case(Setting("ideal", *kind), seed)
    more = {"flow": task.flow, "data_rms": task.data_rms}
    exact = solve(task.system, task.denoise, Options(solver="sequential", **more)).x
    done = solve(task.system, task.denoise, Options(solver="collocation", window=window, rows=rows, **more))
    assert fidelity(done.x, exact, 2.0).psnr_db < 20  # or the case shows nothing
    assert done.report.estimated_db is not None and done.report.estimated_db > 30
    assert done.report.doubt is not None and "another picture" in done.report.doubt
    all_rows = solve(task.system, task.denoise, Options(solver="collocation", window=1, rows=kind[2], **more))
    assert all_rows.report.doubt is None


@pytest.mark.parametrize("seed", range(4))
def test_a_settled_run_raises_no_doubt(seed: int) -> None:
    task = demo(seed)
    more = {"flow": task.flow, "data_rms": task.data_rms}
    assert (
        solve(task.system, task.denoise, Options(solver="collocation", window=1, rows=20, **more)).report.doubt is None
    )


@pytest.mark.parametrize("rows", [12, 16])
def test_a_sketch_at_a_wide_window_goes_on_at_window_1_without_a_jump(rows: int) -> None:
    """What the sketch evaluated again is no reason to hurry to the last row."""
    task = make_task("large red ring", "ddim", "normal", 50, 4.0, 0, kind="mixture")
    wide = Options("collocation", window=4, max_rounds=5, data_rms=task.data_rms)
    sketch = solve(task.system, task.denoise, wide)
    assert sketch.trajectory is not None and sketch.trajectory.part is not None
    gone = sketch.trajectory.part.rows
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.extend(sigma.tolist())
        return task.denoise(x, sigma)

    narrow = Options("collocation", window=1, rows=rows, data_rms=task.data_rms)
    solve(task.system, denoise, narrow, warm=sketch.trajectory)
    levels = task.system.sigmas.tolist()
    ahead = [row for row in place(ground_of(task), rows) if row > gone[-1]]
    assert [min(range(50), key=lambda k: abs(levels[k] - sigma)) for sigma in asked[1 : 1 + len(ahead)]] == ahead


def ground_of(task: Task) -> Tensor:
    sigma = task.system.sigmas
    return coordinate(sigma, torch.ones_like(sigma), task.data_rms)


@pytest.mark.parametrize(("window", "rows"), [(2, 2), (4, 2), (4, 3), (4, 4)])
def test_few_rows_are_not_exceeded(window: int, rows: int) -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 4.0)
    assert solve(system, denoise, Options("collocation", window=window, rows=rows)).report.nfe <= rows


def test_few_rows_of_a_wide_window_still_get_ten_rounds() -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 4.0)
    for rows, rounds in ((20, 10), (24, 10), (30, 10), (39, 13), (8, 4)):
        report = solve(system, denoise, Options(solver="collocation", window=4, rows=rows)).report
        assert report.rounds <= rounds == collocation_rounds(rows, 4, 30) and report.nfe <= rows
        assert report.nfe >= rows - 1


def test_max_rounds_stops_with_the_picture_so_far_and_a_whole_trajectory() -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 4.0)
    pictures: list[Tensor] = []
    options = Options(solver="collocation", window=1, rows=12, max_rounds=5)
    done = solve(system, denoise, options, callback=lambda p: pictures.append(p.picture))
    assert done.status is Status.MAX_ROUNDS and done.report.rounds == len(pictures) == 5
    assert torch.equal(done.x, pictures[-1])
    assert done.trajectory is not None and done.trajectory.D.shape == (30, 2, *SHAPE)


def test_a_warm_start_from_the_same_run_needs_few_rows() -> None:
    system, denoise = ddim(), Mixture.make().denoiser(1, 1.0)
    full = solve(system, denoise, Options(solver="sequential"))
    options = Options(solver="collocation", window=1, rows=4)
    cold = fidelity(solve(system, denoise, options).x, full.x).psnr_db
    warm = fidelity(solve(system, denoise, options, warm=full.trajectory).x, full.x).psnr_db
    assert warm > cold + 20


NETWORK = model.load()


def demo(seed: int, sampler: str = "ddim", schedule: str = "normal", steps: int = 50, cfg: float = 4.0) -> Task:
    prompt = ("large red ring", "small blue square", "large green cross", "small yellow circle")[seed % 4]
    return make_task(prompt, sampler, schedule, steps, cfg, seed, network=NETWORK)


@pytest.mark.parametrize(
    ("kind", "window", "rows", "rounds", "nfe", "mean"),
    [
        (("ddim", "normal", 50, 4.0), 1, 12, 12, 12, 42.0),
        (("ddim", "normal", 50, 4.0), 4, None, 10, 30, 43.0),
        (("euler", "karras", 50, 4.0), 1, 12, 12, 12, 41.0),
        (("euler", "flow", 50, 4.0), 1, 16, 16, 16, 38.0),
    ],
)
def test_the_demo_networks_pictures(
    kind: tuple[str, str, int, float], window: int, rows: int | None, rounds: int, nfe: int, mean: float
) -> None:
    """The bench has the worst cases over many seeds; here the plan is kept and pictures are near."""
    near = []
    for seed in range(3):
        task = demo(seed, *kind)
        more = {"flow": task.flow, "data_rms": task.data_rms}
        exact = solve(task.system, task.denoise, Options(solver="sequential", **more)).x
        done = solve(task.system, task.denoise, Options(solver="collocation", window=window, rows=rows, **more))
        assert done.report.rounds <= rounds and done.report.nfe <= nfe
        assert sum(done.report.rows_per_round) == done.report.nfe
        near.append(fidelity(done.x, exact, 2.0).psnr_db)
    assert sum(near) / len(near) >= mean


def test_the_estimate_is_near_the_truth() -> None:
    """Within 3 dB in most runs; on other seeds 80 % were (``estimate_db``)."""
    off = []
    for seed in range(30, 42):
        task = demo(seed, "euler", "flow") if seed % 2 else demo(seed)
        more = {"flow": task.flow, "data_rms": task.data_rms}
        exact = solve(task.system, task.denoise, Options(solver="sequential", **more)).x
        done = solve(task.system, task.denoise, Options(solver="collocation", window=1, target_db=42.0, **more))
        assert done.report.estimated_db is not None
        off.append(abs(done.report.estimated_db - fidelity(done.x, exact, 2.0).psnr_db))
    assert sum(v <= 3 for v in off) >= 8


def test_a_target_is_worked_towards() -> None:
    """A higher target spends more evaluations and comes nearer."""
    spent, near = [], []
    for target in (36.0, 62.0):
        nfe, db = [], []
        for seed in range(4):
            task = demo(seed)
            more = {"flow": task.flow, "data_rms": task.data_rms}
            exact = solve(task.system, task.denoise, Options(solver="sequential", **more)).x
            done = solve(task.system, task.denoise, Options(solver="collocation", window=1, target_db=target, **more))
            report = done.report
            assert report.target_db == target and report.estimated_db is not None
            assert report.estimated_db >= target or report.doubt
            nfe.append(report.nfe)
            db.append(fidelity(done.x, exact, 2.0).psnr_db)
        assert min(db) > 36
        spent.append(sum(nfe))
        near.append(sum(db))
    assert spent[0] < spent[1] <= 4 * 50
    assert near[1] > near[0]
