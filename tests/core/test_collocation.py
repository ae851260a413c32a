"""Collocation: its linear solve as mathematics, and its pictures against the sequential ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, Status, System, schedules, schemes, solve
from paratafusion_core.bench.problems import Setting
from paratafusion_core.bench.problems import make_task as case
from paratafusion_core.cli.sample import Task, make_task
from paratafusion_core.collocation import refusal
from paratafusion_core.collocation.doubts import Signs, abruptness, doubt, watch
from paratafusion_core.collocation.estimate import MARGIN
from paratafusion_core.collocation.grid import (
    coordinate,
    interpolation,
)
from paratafusion_core.collocation.impact import Impact
from paratafusion_core.collocation.nodes import Ground, missed, states, with_evaluated
from paratafusion_core.demo import model
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.noise import draw
from paratafusion_core.plan import collocation_rounds
from paratafusion_core.report import Report, fidelity
from paratafusion_core.rows import Scales

SHAPE = (4, 8, 8)
SIGMAS = schedules.normal(30)


def ddim(sigmas: Tensor = SIGMAS, batch: int = 2, dtype: torch.dtype = torch.float64) -> System:
    return schemes.ddim(draw(0, batch, SHAPE)[0].to(dtype) * float(sigmas[0]), sigmas)


def test_states_and_denoised_pictures_agree() -> None:
    """Equation (1) of nodes.py, with secants of the rows that were evaluated twice, written out row by row."""
    system, denoise = ddim(batch=3), Mixture.make().denoiser(1, 1.0)
    S, sigma = system.S.flatten(2), system.sigmas
    u = coordinate(sigma, torch.ones_like(sigma), 1.0)
    ground = Ground(S, system.C, u, 0.5 / (1 + sigma**2), torch.ones_like(sigma))
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
        assert done.report.window_reason == "collocation: all 30 rows, so that no evaluation is saved"


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
    both = doubt(Signs((9.0, 2.0), 1e3), [0, 1, 2], seen, scales, report, 30.0)
    assert both is not None and "30 dB of the 42 dB" in both and "another picture" in both
    report.estimated_db = 41.97  # missed, if narrowly
    narrow = doubt(Signs(), [0, 1, 2], seen, scales, report, 41.97)
    assert narrow is not None and "41.9 dB of the 42 dB" in narrow
    report.estimated_db = 50.0
    alone = doubt(Signs((9.0, 2.0), 1e3), [0, 1, 2], seen, scales, report, 50.0)
    assert alone is not None and "of the 42 dB" not in alone and "more rows" in alone and "quasi-newton" in alone
    assert doubt(Signs((0.0, 2.0), 0.1), [0, 1, 2], seen, scales, report, 50.0) is None
    # the range that decibels are told for changes nothing of the risk
    assert doubt(Signs((9.0, 2.0), 1e3), [0, 1, 2], seen, scales, report, 30.0) is not None


def impact_of(turns: list[float], surprise: list[float], slope: float = 0.0) -> Impact:
    none = torch.zeros(len(turns), dtype=torch.float64)
    found = [torch.tensor(v, dtype=torch.float64) for v in (turns, surprise)]
    return Impact(none, none, none, none, none > 0, (slope, 0), *found)


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
    ones = torch.ones(30).double()
    u = coordinate(system.sigmas, ones, 1.0)
    ground = Ground(system.S.flatten(2), system.C, u, torch.zeros_like(ones), ones)
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
    options = Options(solver="collocation", window=window, rows=rows, **more)
    done = solve(task.system, task.denoise, options)
    assert fidelity(done.x, exact, 2.0).psnr_db < 20  # or the case shows nothing
    assert done.report.estimated_db is not None and done.report.estimated_db > 30
    assert done.report.doubt is not None and "another picture" in done.report.doubt
    wide = solve(task.system, task.denoise, replace(options, peak=20.0)).report.doubt
    assert wide is not None and "another picture" in wide  # whatever the range that decibels are for
    all_rows = solve(task.system, task.denoise, Options(solver="collocation", window=1, rows=kind[2], **more))
    assert all_rows.report.doubt is None


@pytest.mark.parametrize("seed", range(4))
def test_a_settled_run_raises_no_doubt(seed: int) -> None:
    task = demo(seed)
    more = {"flow": task.flow, "data_rms": task.data_rms}
    assert (
        solve(task.system, task.denoise, Options(solver="collocation", window=1, rows=20, **more)).report.doubt is None
    )


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
    """Within 3 dB in most runs; on other seeds 86 % were (``expected_error``)."""
    off = []
    for seed in range(30, 42):
        task = demo(seed, "euler", "flow") if seed % 2 else demo(seed)
        more = {"flow": task.flow, "data_rms": task.data_rms, "peak": 2.0}
        exact = solve(task.system, task.denoise, Options(solver="sequential", **more)).x
        done = solve(task.system, task.denoise, Options(solver="collocation", window=1, target_db=42.0, **more))
        assert done.report.estimated_db is not None
        off.append(abs(done.report.estimated_db - fidelity(done.x, exact, 2.0).psnr_db))
    assert sum(v <= 3 for v in off) >= 9


def test_the_estimate_is_for_the_range_that_is_named() -> None:
    """Decibels of one and the same error: 20 log10 of the ranges apart."""
    task = demo(30)
    options = Options("collocation", window=1, rows=16, data_rms=task.data_rms)
    own = solve(task.system, task.denoise, options)
    named = solve(task.system, task.denoise, replace(options, peak=20.0)).report.estimated_db
    found = own.report.estimated_db
    assert found is not None and named is not None
    span = float(own.x.max() - own.x.min())
    assert named - found == pytest.approx(20 * math.log10(20.0 / span), abs=1e-4)


def test_a_target_is_worked_towards() -> None:
    """A higher target spends more evaluations and comes nearer."""
    spent, near = [], []
    for target in (36.0, 62.0):
        nfe, db = [], []
        for seed in range(4):
            task = demo(seed)
            more = {"flow": task.flow, "data_rms": task.data_rms, "peak": 2.0}
            exact = solve(task.system, task.denoise, Options(solver="sequential", **more)).x
            done = solve(task.system, task.denoise, Options(solver="collocation", window=1, target_db=target, **more))
            report = done.report
            assert report.target_db == target and report.estimated_db is not None
            assert report.estimated_db >= target + MARGIN or report.nfe == 50
            nfe.append(report.nfe)
            db.append(fidelity(done.x, exact, 2.0).psnr_db)
        assert min(db) > 36
        spent.append(sum(nfe))
        near.append(sum(db))
    assert spent[0] < spent[1] <= 4 * 50
    assert near[1] > near[0]
