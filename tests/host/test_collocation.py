"""Collocation in the host: served and refused samplers, targets, warm starts, previews, memory running out."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler
from paratafusion_pack.nodes.demo import DemoModel, DemoPrompt
from paratafusion_pack.nodes.host import sampler, sampling
from paratafusion_pack.nodes.host.latency import Known, Latencies
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.paratafusion_core.plan import Machine
from paratafusion_pack.paratafusion_core.report import fidelity
from tiny import conditioning, latent, sample, sigmas_of

COLLOCATION = Settings(solver="collocation")


@pytest.fixture(scope="module")
def demo():
    return DemoModel.execute(1).args


def draw(model, settings, sampler="ddim", steps=50, cfg=4.0, seed=0, warm=None, outcome=None, **asked):
    """The demo model's pixels, in [-1, 1]."""
    yes, no = (DemoPrompt.execute(text).args[0] for text in ("large red circle, dark background", ""))
    outcome = outcome or Outcome()
    request = sampling.Request(
        model, seed, steps, cfg, sampler, "normal", yes, no, {"samples": torch.zeros(1, 3, 32, 32)}, **asked
    )
    return sampling.run(request, settings, outcome, warm)["samples"], outcome.report


@pytest.mark.parametrize(("cfg", "rows"), [(4.0, 12), (7.5, 22)])
def test_rows_follow_the_cfg_where_nothing_is_asked_for(demo, cfg, rows):
    _, report = draw(demo[0], COLLOCATION, cfg=cfg)
    assert report.solver == "collocation" and report.fallback is None
    assert report.rounds == report.nfe == rows and set(report.rows_per_round) == {1}


@pytest.mark.parametrize(
    "settings",
    [
        COLLOCATION,
        Settings(solver="collocation", rows=16),
        Settings(solver="collocation", preset="standard"),
        Settings(solver="collocation", target_db=42.0, window=4),
        Settings(preset="standard", window=2),
        Settings(preset="standard"),
    ],
    ids=str,
)
def test_the_same_picture_from_fewer_evaluations(demo, settings, monkeypatch):
    """Whatever this machine is like, its latencies are those of one that a row fills."""
    monkeypatch.setattr(sampler, "KNOWN", Latencies())
    monkeypatch.setattr(Known, "machine", lambda self, most=None: Machine({1: 1.0, 2: 2.0, 4: 4.0}, 0.0, most))
    decibels = []
    for seed in range(3):
        reference, _ = draw(demo[0], Settings(solver="sequential"), seed=seed)
        result, report = draw(demo[0], settings, seed=seed)
        assert report.solver == "collocation" and report.fallback is None and report.nfe < 40
        decibels.append(fidelity(result, reference, 2.0).psnr_db)
    assert sum(decibels) / len(decibels) >= 38 and min(decibels) >= 30


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        ("heun", "noise levels do not fall"),
        ("euler_ancestral", "noise of its own"),
        ("euler_cfg_pp", "unconditional picture"),
    ],
)
@pytest.mark.parametrize("solver", ["collocation", "auto"])
def test_a_sampler_it_cannot_serve_gets_another_solver(demo, sampler, why, solver):
    settings = Settings(solver=solver, preset="standard", window=4)
    reference, _ = draw(demo[0], Settings(solver="sequential"), sampler, 12)
    result, report = draw(demo[0], settings, sampler, 12)
    assert report.solver == "quasi-newton" and report.fallback is None
    assert solver == "auto" or why in report.plan
    assert fidelity(result, reference, 2.0).psnr_db > 35


def test_without_a_window_the_other_solver_is_planned(demo):
    _, report = draw(demo[0], Settings(solver="collocation", preset="standard"), "euler_ancestral", 20)
    assert report.solver in ("quasi-newton", "sequential") and report.fallback is None
    assert "noise of its own" in report.plan


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("settings", [
    Settings(solver="collocation", rows=38), Settings(solver="collocation", preset="standard", rows=38, window=1)
], ids=str)  # fmt: skip
def test_a_sampler_with_noise_is_served_for_a_number_of_rows(demo, sampler, settings):
    decibels = []
    for seed in range(2):
        reference, _ = draw(demo[0], Settings(solver="sequential"), sampler, seed=seed)
        result, report = draw(demo[0], settings, sampler, seed=seed)
        assert report.solver == "collocation" and report.fallback is None
        assert report.nfe == report.rounds == 38 and report.target_db is None
        decibels.append(fidelity(result, reference, 2.0).psnr_db)
    assert min(decibels) > 36


def test_it_is_not_served_without_or_at_a_wider_window(demo):
    """The CFG's rows are for samplers without noise."""
    for settings in (COLLOCATION, Settings(solver="collocation", rows=15, window=4)):
        _, report = draw(demo[0], settings, "euler_ancestral", 20)
        assert report.solver in ("quasi-newton", "sequential") and report.fallback is None
        assert "for a number of rows, at window 1" in report.plan


def test_the_exact_picture_is_not_interpolated(demo):
    reference, _ = draw(demo[0], Settings(solver="sequential"), steps=12)
    result, report = draw(demo[0], Settings(solver="collocation", preset="exact", window=4), steps=12)
    assert report.solver == "quasi-newton" and "interpolates" in report.plan
    assert fidelity(result, reference, 2.0).psnr_db > 90


def test_warm_starts(demo):
    first = Outcome(want_trajectory=True)
    draw(demo[0], COLLOCATION, outcome=first)
    assert first.trajectory is not None and len(first.trajectory.D) == 50
    reference, _ = draw(demo[0], Settings(solver="sequential"), cfg=4.3)
    settings = Settings(solver="collocation", rows=6)
    cold, _ = draw(demo[0], settings, cfg=4.3)
    warm, report = draw(demo[0], settings, cfg=4.3, warm=first.trajectory)
    assert report.warm == "same noise levels"
    assert fidelity(warm, reference, 2.0).psnr_db > fidelity(cold, reference, 2.0).psnr_db


def test_rows_follow_the_guidance_of_two_prompts(flow_model):
    """That guider leaves ``cfg`` as it is and has two of its own."""
    guider = nodes_custom_sampler.Guider_DualCFG(flow_model)
    guider.set_conds(conditioning(1), conditioning(4), conditioning(2))
    guider.set_cfg(8.0, 8.0)
    outcome, empty = Outcome(), latent(flow_model)
    inner = parallel(comfy.samplers.sampler_object("euler"), COLLOCATION, outcome)
    sigmas = sigmas_of(flow_model, "euler", 50)
    guider.sample(comfy.sample.prepare_noise(empty, 3), empty, inner, sigmas, disable_pbar=True, seed=3)
    assert outcome.report.nfe == 22


def test_a_preview_and_its_callbacks(flow_model):
    sigmas = sigmas_of(flow_model, "euler", 30)
    steps: list[int] = []
    outcome = Outcome()
    inner = comfy.samplers.sampler_object("euler")
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    settings = Settings(solver="collocation", rows=10, max_rounds=6)
    sample(flow_model, parallel(inner, settings, outcome), sigmas, callback=lambda i, *_: steps.append(i), **asked)
    assert outcome.report.status == "max_rounds" and len(steps) == 6
    assert steps == sorted(steps) and steps[0] >= 0 and steps[-1] < 30


def test_where_noise_is_left_over_the_preview_is_the_furthest_row(demo):
    """After the first pass rows far behind are evaluated again; the picture shown must not jump back to them."""
    yes, no = (DemoPrompt.execute(text).args[0] for text in ("large red circle, dark background", ""))
    model, inner = demo[0], comfy.samplers.sampler_object("euler")
    sigmas = sigmas_of(model, "euler", 60)[:41]
    shown: list[torch.Tensor] = []
    asked = {"positive": yes, "negative": no, "latent_image": torch.zeros(1, 3, 32, 32)}
    settings = Settings(solver="collocation", window=4, target_db=90.0, rows=20)
    outcome = Outcome()
    sample(model, parallel(inner, settings, outcome), sigmas.clone(),
           callback=lambda i, x0, *_: shown.append(x0.clone()), **asked)  # fmt: skip
    theirs: list[torch.Tensor] = []
    sample(model, inner, sigmas.clone(), callback=lambda i, x0, *_: theirs.append(x0.clone()), **asked)
    assert outcome.report.solver == "collocation"
    passed = next(i for i, row in enumerate(outcome.report.frozen_per_round) if row >= 39)
    assert passed < len(shown) - 1  # rounds went on behind the last row
    for picture in shown[passed:]:
        assert fidelity(picture, theirs[-1], 2.0).psnr_db > 30


def test_memory_running_out_splits_a_round(demo, monkeypatch):
    """The network refuses more than one row at a time, as if it were out of memory."""
    network = demo[0].model.diffusion_model
    forward = type(network).forward

    def small(self, x, *args, **kwargs):
        if len(x) > 2:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return forward(self, x, *args, **kwargs)

    reference, _ = draw(demo[0], Settings(solver="collocation", window=4), steps=30)
    monkeypatch.setattr(type(network), "forward", small)
    result, report = draw(demo[0], Settings(solver="collocation", window=4), steps=30)
    assert report.fallback is None and max(report.rows_per_round) > 1
    assert fidelity(result, reference, 2.0).psnr_db > 60


def test_other_solvers_ignore_rows_and_target(demo):
    plain, _ = draw(demo[0], Settings(solver="picard", window=4), steps=12)
    asked, report = draw(demo[0], Settings(solver="picard", window=4, rows=3, target_db=20.0), steps=12)
    assert report.solver == "picard" and torch.equal(plain, asked)
