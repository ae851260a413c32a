"""Graphs that take one noise level a call: collocation serves them, evaluation by evaluation."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.demo import DemoModel, DemoPrompt
from paratafusion_pack.nodes.host import problem, sampling
from paratafusion_pack.nodes.host.bounds import bounds_of
from paratafusion_pack.nodes.host.probing import PROBED, PROBED_ALONE, PROBES, REMEMBERS, probe_alone
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.paratafusion_core import System
from paratafusion_pack.paratafusion_core.report import fidelity
from test_mixed import control_net, patched, unet_conds, with_values
from tiny import conditioning, latent, load, relative, sample, sigmas_of
from torch import Tensor

COLLOCATION = Settings(solver="collocation", preset="standard")
STANDARD = Settings(preset="standard")
ASKED = [
    COLLOCATION,
    Settings(preset="standard"),
    Settings(preset="standard", window=4),
    Settings(solver="collocation"),
]


@pytest.fixture(scope="module")
def demo():
    return DemoModel.execute(1).args[0]


def prompt(text: str, start: float = 0.0, end: float = 1.0) -> list:
    found = DemoPrompt.execute(text).args[0]
    return found if (start, end) == (0.0, 1.0) else with_values(found, start_percent=start, end_percent=end)


def draw(model: Any, settings: Settings, seed: int = 0, positive: Any = None, batch: int = 1, steps: int = 50):
    """The demo model's pixels, in [-1, 1], and the report."""
    outcome = Outcome()
    yes = positive or prompt("large red circle, dark background")
    empty = {"samples": torch.zeros(batch, 3, 32, 32)}
    request = sampling.Request(model, seed, steps, 4.0, "ddim", "normal", yes, prompt(""), empty)
    return sampling.run(request, settings, outcome)["samples"], outcome.report


def nearness(model: Any, settings: Settings, seeds: int = 3, **more: Any) -> tuple[list[float], list[Any]]:
    """dB against the plain sampler, and the reports."""
    found, reports = [], []
    for seed in range(seeds):
        reference, plain = draw(model, Settings(solver="sequential"), seed, **more)
        assert plain.fallback is None
        result, report = draw(model, settings, seed, **more)
        found.append(fidelity(result, reference, 2.0).psnr_db)
        reports.append(report)
    return found, reports


def ranged(model: Any, high: float, low: float, told: tuple[float, float] | None = None, factor: float = 1.15) -> Any:
    """A patch of another pack: it acts between two noise levels, and reads the level off the first picture.

    ``told``: what it keeps under the names of bounds.
    """
    model = model.clone()
    sigma_start, sigma_end = told or (0.0, 0.0)

    def patch(args: dict[str, Any]) -> Tensor:
        inside = low < float(args["sigma"][0]) <= high and sigma_start >= sigma_end
        return args["denoised"] * (factor if inside else 1.0)

    model.set_model_sampler_post_cfg_function(patch)
    return model


@pytest.fixture
def systems(monkeypatch) -> list[System]:
    """Those that runs come to."""
    made: list[System] = []
    monkeypatch.setattr(problem, "System", lambda *given: made.append(System(*given)) or made[-1])
    return made


@pytest.mark.parametrize("settings", ASKED, ids=str)
def test_a_known_patch_with_a_range(demo, settings, fresh, systems):
    model = patched(demo, "nodes_custom_sampler", "CFGOverride", 2.0, 0.3, 0.6)
    decibels, reports = nearness(model, settings)
    for report in reports:
        assert report.solver == "collocation" and report.fallback is None and set(report.rows_per_round) == {1}
        assert "one noise level a call, as CFG Override reads its range" in report.plan
        assert report.nfe < 40
    ends = [float(model.get_model_object("model_sampling").percent_to_sigma(at)) for at in (0.3, 0.6)]
    assert systems[-1].breaks == tuple(int((systems[-1].sigmas < end).nonzero()[0]) for end in ends)
    assert sum(decibels) / 3 >= 38 and min(decibels) >= 30


@pytest.mark.parametrize(
    ("patch", "batch"),
    [
        (("nodes_mahiro", "Mahiro"), 2),
        (("nodes_video_model", "VideoLinearCFGGuidance", 1.0), 2),
        (("nodes_eps", "TemporalScoreRescaling", 0.95, 1.0), 1),  # the node takes no more
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_a_known_patch_that_mixes_a_batch(demo, patch, batch, fresh):
    """At one level a call it meets the pictures that it would meet in the host's own sampler."""
    decibels, reports = nearness(patched(demo, *patch), COLLOCATION, 2, batch=batch)
    assert all(report.solver == "collocation" and report.nfe < 50 for report in reports)
    assert min(decibels) >= 36


def test_an_unknown_patch_with_a_range(demo, fresh):
    """The first run probes it both ways, others not at all."""
    model = ranged(demo, 4.0, 0.7)
    decibels, reports = nearness(model, Settings(preset="standard"))
    for report in reports:
        assert report.solver == "collocation" and "as the pictures of a batch influence each other" in report.plan
    assert [report.probe_nfe for report in reports] == [PROBED + PROBED_ALONE, 0, 0]
    assert min(decibels) >= 38


@pytest.mark.parametrize("told", [(0.7, 0.3), (0.75, 0.35), None], ids=["truly", "wrongly", "not at all"])
def test_where_the_bounds_are_told_windows_are_served(flow_model, fresh, told):
    """Rows on either side of one do not share a call, and each band is probed: what is told wrongly is found out."""
    model, plain, outcome = ranged(flow_model, 0.7, 0.3, told), comfy.samplers.sampler_object("euler"), Outcome()
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model, 2)}
    sigmas, settings = sigmas_of(model, "euler", 20), Settings(preset="strict", window=6)
    reference = sample(model, plain, sigmas.clone(), **asked)
    unpatched = sample(flow_model, plain, sigmas.clone(), **asked)
    assert relative(unpatched, reference) > 0.05
    result = sample(model, parallel(plain, settings, outcome), sigmas.clone(), **asked)
    if told == (0.7, 0.3):
        assert outcome.report.fallback is None and outcome.report.rounds < 20
        assert outcome.report.probe_nfe == PROBED + 8  # three bands
        assert relative(result, reference) < 1e-3
    else:
        assert "influence each other" in outcome.report.fallback
        assert torch.equal(result, reference)


def test_a_narrow_band_of_a_guider_is_found(flow_model, fresh):
    """Two of twelve steps, between the five levels that are tried in any case, and told by the first picture."""

    class Scheduled(comfy.samplers.CFGGuider):
        def set_range(self, start_percent: float, end_percent: float) -> None:
            self.start_percent, self.end_percent = start_percent, end_percent

        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
            levels = model_options["transformer_options"]["sample_sigmas"]
            step = int((levels - float(timestep[0])).abs().argmin())
            inside = self.start_percent <= step / (len(levels) - 1) <= self.end_percent
            return super().predict_noise(x, timestep, model_options, seed) * (1.1 if inside else 1.0)

    def run(settings: Settings | None, outcome: Outcome) -> Tensor:
        guider = Scheduled(flow_model)
        guider.set_conds(conditioning(1), conditioning(2))
        guider.set_range(0.5, 0.6)
        plain = comfy.samplers.sampler_object("euler")
        sampler = plain if settings is None else parallel(plain, settings, outcome)
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
        levels = sigmas_of(flow_model, "euler", 12)
        return guider.sample(noise, torch.zeros(1, 16, 8, 8), sampler, levels, disable_pbar=True)

    outcome = Outcome()
    reference = run(None, outcome)
    result = run(Settings(preset="strict", window=4), outcome)
    assert outcome.report.fallback is None and outcome.report.probe_nfe == PROBED + 4
    assert relative(result, reference) < 1e-3


def test_where_it_begins_and_ends_is_found_and_evaluated(demo, fresh, systems):
    _, report = draw(ranged(demo, 4.0, 0.7, (4.0, 0.7)), COLLOCATION)
    levels = systems[-1].sigmas
    assert systems[-1].breaks == tuple(int((levels <= at).nonzero()[0]) for at in (4.0, 0.7))
    assert report.solver == "collocation"


def test_bounds_are_told_by_their_names(demo):
    class Patch:
        def __init__(self) -> None:
            self.kwargs = [{"sigma_end": 0.5, "weight": 0.8, "start_at_percent": 0.25, "end_percent": 1.0}]
            self.low_sigma, self.steps_end, self.min_sigma, self.max_sigma = 0.3, 4, float("inf"), 10**400

        def __call__(self) -> None: ...

    of_time, levels = demo.get_model_object("model_sampling"), torch.linspace(10, 0, 13)
    quarter = float(of_time.percent_to_sigma(0.25)), float(levels[2] + levels[3]) / 2  # of time, and of 12 steps
    assert bounds_of([Patch()], of_time, levels) == sorted([0.5, 0.3, *quarter], reverse=True)
    assert bounds_of([Patch()], of_time, levels[:4]) == [float(levels[0] + levels[1]) / 2]  # nothing outside the run
    many = Patch()
    many.kwargs = [{f"sigma_start_{i}": 0.1 * (i + 1) for i in range(9)}]  # nothing keeps so many
    assert bounds_of([many], of_time, levels) == [] == bounds_of([], of_time, levels)


@pytest.mark.parametrize("settings", [
    Settings(solver="collocation", rows=14), Settings(solver="collocation", rows=20, window=2), STANDARD,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["lasting", "renewed", "early", "late"])
def test_what_remembers_a_call_falls_back_at_window_1_too(flow_model, fresh, kind, settings):
    """Momentum is another one where steps are left out; found in a run that would never share a call, too."""
    memory: dict[str, Any] = {}

    def momentum(args: dict[str, Any]) -> Tensor:
        D, sigma = args["denoised"], float(args["sigma"][0])
        if kind != "lasting" and sigma >= memory.get("sigma", 0.0):  # where the noise rises a new run begins
            memory.clear()
        if (sigma > 0.7) if kind == "early" else (sigma < 0.3) if kind == "late" else True:
            D = 0.7 * D + 0.3 * memory.get("D", D)
        memory.update(D=D, sigma=sigma)
        return D

    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(momentum)
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model)}
    sigmas = sigmas_of(model, "euler", 20)
    plain = comfy.samplers.sampler_object("euler")
    reference = sample(model, plain, sigmas.clone(), **asked)
    memory.clear()
    outcome = Outcome()
    result = sample(model, parallel(plain, settings, outcome), sigmas.clone(), **asked)
    assert "remembers the call before" in outcome.report.fallback
    assert torch.equal(result, reference)


def test_plain_graphs_are_not_probed_alone(demo, fresh):
    assert draw(demo, COLLOCATION)[1].probe_nfe == 0


def test_a_control_net_remembers_nothing(fresh):
    """Its images are more than the pictures, which only calls of one level each take as the host's own sampler does."""
    unet = load("sd15")
    conds = {name: with_values(cond, control=control_net(unet, 2)) for name, cond in unet_conds().items()}
    asked, plain, outcome = {**conds, "latent_image": latent(unet)}, comfy.samplers.sampler_object("euler"), Outcome()
    sigmas = sigmas_of(unet, "euler", 20)
    reference = sample(unet, plain, sigmas.clone(), **asked)
    for rows, close in ((14, 0.05), (20, 1e-4)):
        settings = Settings(solver="collocation", rows=rows)
        result = sample(unet, parallel(plain, settings, outcome), sigmas.clone(), **asked)
        assert outcome.report.solver == "collocation" and outcome.report.fallback is None
        assert outcome.report.nfe == rows and outcome.report.probe_nfe == 0
        assert "2 images for a batch of 1" in outcome.report.plan
        assert relative(result, reference) < close


def test_a_patch_that_keeps_calls_apart_is_probed_alone_once(demo, fresh):
    model = demo.clone()
    model.set_model_sampler_post_cfg_function(lambda args: 1.01 * args["denoised"])
    assert [draw(model, COLLOCATION, seed)[1].probe_nfe for seed in range(2)] == [PROBED_ALONE, 0]


def test_a_model_that_takes_one_picture(demo, fresh):
    model = demo.clone()

    def single(apply_model: Any, args: dict[str, Any]) -> Tensor:
        if len(args["timestep"].unique()) > 1:
            raise RuntimeError("one noise level, please")
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(single)
    decibels, reports = nearness(model, Settings(preset="standard"), 2)
    assert all(r.solver == "collocation" and "does not take several noise levels at once" in r.plan for r in reports)
    assert min(decibels) >= 38
    reference, _ = draw(model, Settings(solver="sequential"), steps=12)
    result, report = draw(model, Settings(window=4), steps=12)  # nothing to win one by one
    assert "one noise level, please" in report.fallback and torch.equal(result, reference)


def test_auto_leaves_a_run_that_would_leave_nothing_out(demo, fresh):
    """And one that is capped: rounds were meant to have many rows."""
    model = ranged(demo, 4.0, 0.7)
    for settings, steps in ((STANDARD, 10), (Settings(preset="standard", max_rounds=4), 50)):
        reference, _ = draw(model, Settings(solver="sequential"), steps=steps)
        result, report = draw(model, settings, steps=steps)
        assert "influence each other" in report.fallback and torch.equal(result, reference)
    assert draw(model, COLLOCATION, steps=10)[1].solver == "collocation"  # asked for by name


def test_why_collocation_does_not_serve_is_told(demo, fresh):
    outcome = Outcome()
    request = sampling.Request(
        patched(demo, "nodes_mahiro", "Mahiro"), 0, 12, 4.0, "heun", "normal", prompt("large red circle"), prompt(""),
        {"samples": torch.zeros(1, 3, 32, 32)},
    )  # fmt: skip
    sampling.run(request, COLLOCATION, outcome)
    assert "Mahiro" in outcome.report.fallback and "noise levels do not fall" in outcome.report.fallback


def test_a_failure_on_the_way_does_not_last(demo, fresh):
    calls, model = torch.zeros(1), demo.clone()  # a list would be put back as it was

    def failing(args: dict[str, Any]) -> Tensor:
        calls.add_(1)
        if calls == PROBED_ALONE + 5:
            raise RuntimeError("once")
        return 1.01 * args["denoised"]

    model.set_model_sampler_post_cfg_function(failing)
    assert "fails in the parallel run (RuntimeError: once)" in draw(model, COLLOCATION)[1].fallback
    assert draw(model, COLLOCATION)[1].solver == "collocation"


def test_what_fails_in_the_plain_sampler_too_is_no_trouble_of_the_parallel_run(demo, fresh):
    broken: Any = ModuleType("broken")  # where nothing is put back
    broken.calls, broken.after, model = 0, PROBES + 1, demo.clone()

    def failing(args: dict[str, Any]) -> Tensor:
        broken.calls += 1
        if broken.calls > broken.after:
            raise RuntimeError("a file is missing")
        return 1.01 * args["denoised"]

    model.set_model_sampler_post_cfg_function(failing)
    with pytest.raises(RuntimeError, match="a file is missing"):
        draw(model, Settings(window=4), steps=12)
    assert broken.calls == PROBES + 3 and [known.trouble for known in fresh._known.values()] == [None]
    broken.after = 10**6
    assert draw(model, Settings(window=4), steps=12)[1].fallback is None


def test_two_rows_that_do_not_fit(demo, fresh, monkeypatch):
    from paratafusion_pack.nodes.host.batched import BatchedModel

    own = BatchedModel._call

    def small(self: Any, x: Tensor, *rest: Any) -> Tensor:
        if len(x) > 1:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return own(self, x, *rest)

    monkeypatch.setattr(BatchedModel, "_call", small)
    _, report = draw(ranged(demo, 4.0, 0.7), Settings(preset="standard"))
    assert report.solver == "collocation" and "two noise levels at once do not fit" in report.plan


def test_prompts_that_take_turns(demo, fresh, systems):
    """Their ends are known to the host."""
    positive = prompt("large red circle", 0.0, 0.6) + prompt("large blue circle", 0.6, 1.0)
    decibels, reports = nearness(demo, COLLOCATION, positive=positive)
    assert all(report.solver == "collocation" and report.nfe < 40 for report in reports)
    assert sum(decibels) / 3 >= 40 and min(decibels) >= 36
    assert systems and all(len(system.breaks) == 1 for system in systems)


@pytest.mark.parametrize("count", [3, 4, 12])
def test_the_probe_of_single_calls(count):
    """What begins anew where the noise rises, a cache, and random numbers; and what keeps calls apart."""
    levels, x = torch.linspace(1, 0.1, count), torch.ones(1, 4)
    assert probe_alone(lambda x, sigma: x * sigma.reshape(-1, 1, 1), x, levels) is None
    generator = torch.Generator().manual_seed(0)
    assert probe_alone(lambda x, sigma: torch.randn(x.shape, generator=generator), x, levels) == REMEMBERS
    kept: dict[str, Any] = {}

    def falling(x: Tensor, sigma: Tensor) -> Tensor:
        D = x + (0.2 * kept["D"] if "D" in kept and float(sigma[0]) < kept["sigma"] else 0.0)
        kept.update(D=D, sigma=float(sigma[0]))
        return D

    def cached(x: Tensor, sigma: Tensor) -> Tensor:
        if "x" in kept and (kept["x"] - x).abs().mean() < 0.1 * x.abs().mean():
            return kept["y"]
        kept.update(x=x, y=x * sigma.reshape(-1, 1, 1))
        return kept["y"]

    assert probe_alone(falling, x, levels) == REMEMBERS
    kept.clear()
    assert probe_alone(cached, torch.linspace(0.5, 2, 4)[None], levels) == REMEMBERS
