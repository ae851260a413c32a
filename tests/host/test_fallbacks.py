"""What cannot be batched runs as the host's own sampler, bit for bit, and says why."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.samplers
import pytest
import tiny
import torch
from comfy.patcher_extension import PatcherInjection
from paratafusion_pack.nodes.host.capture import CaptureError, capture
from paratafusion_pack.nodes.host.probing import PROBED, PROBES, probe
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from test_mixed import patched, unet_conds, with_values
from tiny import conditioning, latent, sample, sigmas_of
from torch import Tensor

SETTINGS = Settings(preset="strict", window=4)


@pytest.fixture(scope="session")
def unet():
    return tiny.load("sd15")


def falls_back(model: Any, sampler: Any, caplog: Any, reason: str, steps: int = 6, **asked: Any) -> None:
    """The run equals the plain one exactly; its reason is in the report, in the node's line and in the log."""
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model), **asked}
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    sigmas = sigmas_of(model, "euler", steps)
    torch.manual_seed(11)
    reference = sample(model, sampler, sigmas.clone(), **asked)
    outcome = Outcome()
    torch.manual_seed(11)
    with caplog.at_level(logging.WARNING):
        result = sample(model, parallel(sampler, SETTINGS, outcome), sigmas.clone(), **asked)
    parts = [r.unbind() if r.is_nested else [r] for r in (result, reference)]
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    assert reason in outcome.report.fallback
    assert reason in outcome.summary()
    assert reason in caplog.text


def test_adaptive_sampler(flow_model, caplog):
    falls_back(flow_model, "dpm_adaptive", caplog, "chooses its steps from the picture")


def test_ar_video_is_refused():
    def sample_ar_video(*_: Any) -> None: ...

    with pytest.raises(CaptureError, match="key-value cache"):
        capture(sample_ar_video, {}, None, torch.zeros(1, 1), torch.ones(2), {})


ON_FLOW = [
    (("nodes_easycache", "EasyCacheNode", 0.2, 0.15, 0.95, False), "EasyCache"),
    (("nodes_easycache", "LazyCacheNode", 0.2, 0.15, 0.95, False), "LazyCache"),
    (("nodes_apg", "APG", 1.0, 5.0, 0.5), "momentum"),
    (("nodes_mahiro", "Mahiro"), "Mahiro"),
    (("nodes_perpneg", "PerpNeg", conditioning(5), 0.1), "projection"),  # PerpNegGuider: test_guiders.py
    (("nodes_video_model", "VideoLinearCFGGuidance", 1.0), "Linear/Triangle"),
    (("nodes_video_model", "VideoTriangleCFGGuidance", 1.0), "Linear/Triangle"),
    (("nodes_eps", "TemporalScoreRescaling", 0.95, 1.0), "Temporal Score Rescaling"),
    (("nodes_slg", "SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "0", ""), "Skip Layer"),
    (("nodes_custom_sampler", "CFGOverride", 2.0, 0.3, 0.6), "CFG Override"),
]


@pytest.mark.parametrize(("patch", "reason"), ON_FLOW, ids=lambda p: p[1] if isinstance(p, tuple) else None)
def test_patches_that_mix_pictures_or_steps(flow_model, caplog, patch, reason):
    falls_back(patched(flow_model, *patch), "euler", caplog, reason)


def test_renorm_cfg(flow_model, caplog):
    model = patched(flow_model, "nodes_lumina2", "RenormCFG", 100.0, 1.0)
    # the node asks the network for its channels, which this one does not tell under that name
    model.model.diffusion_model.in_channels = 16
    falls_back(model, "euler", caplog, "RenormCFG")


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (("nodes_tomesd", "TomePatchModel", 0.3), "ToMe"),
        (
            ("nodes_model_downscale", "PatchModelAddDownscale", 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"),
            "Downscale",
        ),
        (("nodes_hypertile", "HyperTile", 256, 3, 0, False), "HyperTile"),
    ],
    ids=["ToMe", "Downscale", "HyperTile"],
)
def test_unet_patches_that_mix_pictures_or_steps(unet, caplog, patch, reason):
    falls_back(patched(unet, *patch), "euler", caplog, reason, **unet_conds())


def test_context_windows(caplog):
    model = tiny.load("wan")
    windowed = patched(model, "nodes_context_windows", "ContextWindowsManualNode", 4, 1, "standard_static", 1, False,
                       "pyramid", 2, False)  # fmt: skip
    falls_back(windowed, "euler", caplog, "context windows", latent_image=latent(model, shape=(1, 16, 6, 8, 8)))


def test_keyframed_hooks(flow_model, caplog):
    name = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    weight = flow_model.model.state_dict()[f"{name}.weight"]
    lora = {
        f"{name}.lora_up.weight": torch.ones(weight.shape[0], 1),
        f"{name}.lora_down.weight": torch.ones(1, weight.shape[1]),
    }
    hooks = comfy.hooks.create_hook_lora(lora, 0.05, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(1.0, 0.0))
    frames.add(comfy.hooks.HookKeyframe(0.2, 0.5))
    hooks.set_keyframes_on_hooks(frames)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(1), hooks)
    falls_back(flow_model.clone(), "euler", caplog, "keyframes", positive=positive)


def test_more_control_images_than_pictures(unet, caplog):
    from test_mixed import control_net

    conds = {k: with_values(c, control=control_net(unet, 2)) for k, c in unet_conds().items()}
    falls_back(unet, "euler", caplog, "ControlNet", latent_image=latent(unet, 1), steps=4, **conds)


def euler_with(step: Any) -> Any:
    """A SAMPLER of another pack: Euler with ``step(model, D, x, i)`` after each evaluation."""

    def function(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        for i in range(len(sigmas) - 1):
            D = step(model, model(x, sigmas[i].expand(len(x)), **extra_args), x, i)
            x = x + (x - D) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    return comfy.samplers.KSAMPLER(function)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda model, D, x, i: D.clamp(-1, 1), "no fixed combination"),
        (lambda model, D, x, i: D.clamp(-4, 4), "no fixed combination"),
        (lambda model, D, x, i: D.clamp(-20, 20) if i == 3 else D, "no fixed combination"),
        (lambda model, D, x, i: D / D.std().clamp(min=0.1), "no fixed combination"),
        (lambda model, D, x, i: D + 0 * model.inner_model(x, x.new_ones(len(x))), "could not be read off"),
        (lambda model, D, x, i: D + 0 * model.inner_model.predict_noise(x, x.new_ones(len(x))), "predict_noise"),
    ],
    ids=["clamp", "clamp at 4", "clamp once", "rescale", "guider", "predict_noise"],
)
def test_samplers_of_other_packs_that_are_not_affine(flow_model, caplog, step, reason):
    falls_back(flow_model, euler_with(step), caplog, reason)


def test_an_affine_sampler_of_another_pack_is_parallel(flow_model):
    """Nothing is known about it but that it passes the linearity check."""
    memory: dict[str, Tensor] = {}

    def momentum(model: Any, D: Tensor, x: Tensor, i: int) -> Tensor:
        D = 0.8 * D + 0.2 * memory["D"] if i else D
        memory["D"] = D
        return D

    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    sigmas, outcome = sigmas_of(flow_model, "euler", 8), Outcome()
    reference = sample(flow_model, euler_with(momentum), sigmas.clone(), **asked)
    result = sample(
        flow_model, parallel(euler_with(momentum), Settings(preset="exact", window=4), outcome), sigmas, **asked
    )
    assert outcome.report.fallback is None
    assert tiny.relative(result, reference) < 1e-4


def test_a_sampler_with_its_own_sample_method_runs_as_it_is(flow_model, caplog):
    class Own(comfy.samplers.KSAMPLER):
        def sample(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().sample(*args, **kwargs) * 0.5

    own = Own(comfy.samplers.sampler_object("euler").sampler_function)
    falls_back(flow_model, own, caplog, "its own way of sampling")


@pytest.mark.parametrize("steps", [2, 3, 4, 6])
def test_an_unknown_patch_that_mixes_pictures_is_found_by_the_probe(flow_model, caplog, steps):
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] - 0.2 * args["denoised"].mean(0, keepdim=True)
    )
    falls_back(model, "euler", caplog, "influence each other", steps=steps)


def test_an_unknown_patch_that_reads_the_first_level_is_found_by_the_probe(flow_model, caplog):
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(lambda a: a["denoised"] * (0.9 if float(a["sigma"][0]) > 0.5 else 1.0))
    falls_back(model, "euler", caplog, "influence each other")


def test_an_unknown_patch_that_reads_the_largest_level_is_found_by_the_probe(flow_model, caplog):
    """As LTX-2 does, whose name is known: the first row of a window always holds the largest level."""
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(lambda a: a["denoised"] * (1 - 0.2 * float(a["sigma"].max())))
    falls_back(model, "euler", caplog, "influence each other")


@pytest.mark.parametrize("band", [(0.15, 0.45), (0.55, 0.8), (0.2, 0.45), (0.0, 0.8), (0.7, 1.0)])
def test_an_unknown_patch_that_acts_on_a_part_of_the_schedule_is_found_by_the_probe(flow_model, caplog, band):
    """And reads where it is off the first level of a batch, as such patches do."""
    model, sampling = flow_model.clone(), flow_model.get_model_object("model_sampling")
    high, low = (sampling.percent_to_sigma(percent) for percent in band)
    model.set_model_sampler_post_cfg_function(
        lambda a: a["denoised"] * (1.5 if low <= float(a["sigma"][0]) <= high else 1.0)
    )
    falls_back(model, "euler", caplog, "influence each other", steps=20)


def test_code_injected_into_the_network_is_probed(flow_model, caplog):
    model, network = flow_model.clone(), flow_model.model.diffusion_model

    def inject(_: Any) -> None:
        forward = type(network).forward
        network.forward = lambda *args, **more: (lambda D: D + 0.3 * D.mean(0, keepdim=True))(
            forward(network, *args, **more)
        )

    def eject(_: Any) -> None:
        del network.forward

    model.set_injections("mixing", [PatcherInjection(inject=inject, eject=eject)])
    falls_back(model, "euler", caplog, "influence each other")


def test_a_t2i_adapter_with_several_images(unet, caplog):
    """It keeps what it has made of them in a run's first call."""

    class Adapter(torch.nn.Module):
        unshuffle_amount = 8

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 320, 8, 8)

        def forward(self, x: Tensor) -> dict[str, list]:
            return {"input": [None, self.conv(x)], "middle": [self.conv(x)]}

    adapter = comfy.controlnet.T2IAdapter(Adapter(), 3, 8, "nearest-exact", device=torch.device("cpu"))
    adapter.set_cond_hint(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)), 2.0, (0.0, 1.0))
    conds = {k: with_values(c, control=adapter, control_apply_to_uncond=False) for k, c in unet_conds().items()}
    falls_back(unet, "euler", caplog, "T2I-Adapter", latent_image=latent(unet, 2), steps=4, **conds)


def test_memory_that_runs_out_while_a_sampler_is_read_off(flow_model, caplog):
    def full(model: Any, D: Tensor, x: Tensor, i: int) -> Tensor:
        if type(model).__name__ == "_StandIn":
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return D

    falls_back(flow_model, euler_with(full), caplog, "memory ran out")


def test_a_sampler_whose_method_was_replaced(flow_model, caplog):
    inner = comfy.samplers.sampler_object("euler")
    own = inner.sample
    inner.sample = lambda *args, **more: 0.5 * own(*args, **more)
    falls_back(flow_model, inner, caplog, "its own way of sampling")


def test_a_patch_that_mixes_pictures_is_found_behind_prompts_with_ranges(flow_model, caplog):
    """The first, middle and last evaluation have different prompts, so that these would never share a call."""
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(lambda a: a["denoised"] + 0.3 * a["denoised"].mean(0, keepdim=True))
    cuts = (0.0, 0.3, 0.7, 1.0)
    positive = [
        c
        for i, (start, end) in enumerate(itertools.pairwise(cuts))
        for c in with_values(conditioning(i + 1), start_percent=start, end_percent=end)
    ]
    falls_back(model, "euler", caplog, "influence each other", steps=12, positive=positive)


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_an_unknown_step_cache_is_found_by_the_probe(flow_model, threshold):
    """It answers from the call before where its input has moved little, as step caches do."""
    memory: dict[str, Tensor] = {}

    def cached(apply_model: Any, args: dict[str, Any]) -> Tensor:
        x = args["input"]
        last = memory.get("x")
        if last is not None and last.shape == x.shape and (x - last).abs().mean() < threshold * last.abs().mean():
            return x + memory["rest"]
        result = apply_model(x, args["timestep"], **args["c"])
        memory["x"], memory["rest"] = x, result - x
        return result

    model, outcome = flow_model.clone(), Outcome()
    model.set_model_unet_function_wrapper(cached)
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model)}
    sampler = parallel(comfy.samplers.sampler_object("euler"), SETTINGS, outcome)
    sample(model, sampler, sigmas_of(model, "euler", 12), **asked)
    assert "remembers the call before" in outcome.report.fallback


def test_step_caches_of_other_packs_are_known_by_name(flow_model, caplog):
    def wrapper(apply_model: Any, args: dict[str, Any]) -> Tensor:
        return apply_model(args["input"], args["timestep"], **args["c"])

    wrapper.__module__ = "custom_nodes.ComfyUI-TeaCache.nodes"
    model = flow_model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    falls_back(model, "euler", caplog, "reuses the step before")


def test_a_model_that_returns_nan_ends_as_it_does_on_the_host(flow_model):
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(
        lambda a: torch.where(a["sigma"].reshape(-1, 1, 1, 1) < 0.5, torch.nan, a["denoised"])
    )
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model)}
    outcome = Outcome()
    sampler = parallel(comfy.samplers.sampler_object("euler"), SETTINGS, outcome)
    assert sample(model, sampler, sigmas_of(model, "euler", 6), **asked).isnan().all()
    assert "NaN" in outcome.report.fallback


def test_memory_that_runs_out_beside_the_model_is_no_failed_run(flow_model, caplog, monkeypatch):
    def short(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("not enough memory")

    monkeypatch.setattr("paratafusion_pack.nodes.host.sampler.solve", short)
    falls_back(flow_model, "euler", caplog, "memory ran out")


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 6), ("heun", 11), ("dpmpp_sde", 11)])
def test_the_plain_sampler_is_told_by_its_evaluations(flow_model, name, evaluations):
    calls: list[int] = []
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(lambda a: calls.append(1) or a["denoised"])
    outcome = Outcome()
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model)}
    inner = comfy.samplers.sampler_object(name)
    sample(model, parallel(inner, Settings(solver="sequential"), outcome), sigmas_of(model, name, 6), **asked)
    report = outcome.report
    assert len(calls) == evaluations == report.nfe == report.rounds == report.sequential_nfe
    assert report.steps == 6 and outcome.summary() == "sequential: 6 steps"


@pytest.mark.parametrize("settings", [SETTINGS, Settings(solver="sequential")], ids=["parallel", "sequential"])
@pytest.mark.parametrize("kind", ["function", "partial", "around"])
def test_a_sampler_that_wraps_the_model_itself_runs_as_it_is(flow_model, settings, kind):
    """As packs do that change the noise level on the way to the model, or call the guider behind the host's wrapper."""
    outcome = Outcome()
    ours = parallel(comfy.samplers.sampler_object("euler"), settings, outcome)

    def wrapped(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        def inner(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
            if kind == "around":
                kwargs.pop("denoise_mask", None)
                return model.inner_model(x, sigma, **kwargs)
            return model(x, sigma, **kwargs)

        given = functools.partial(inner) if kind == "partial" else inner
        return ours.sampler_function(given, x, sigmas, extra_args, callback, disable)

    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    sigmas = sigmas_of(flow_model, "euler", 6)
    reference = sample(flow_model, comfy.samplers.sampler_object("euler"), sigmas, **asked)
    assert torch.equal(sample(flow_model, comfy.samplers.KSAMPLER(wrapped), sigmas, **asked), reference)
    assert outcome.report.nfe == 6 and outcome.summary().startswith("sequential: ")


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa"])
def test_solvers_that_know_no_target_say_nothing_of_it(flow_model, solver):
    outcome = Outcome()
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    settings = Settings(solver=solver, preset="standard", window=4)
    inner = comfy.samplers.sampler_object("euler_ancestral")
    sample(flow_model, parallel(inner, settings, outcome), sigmas_of(flow_model, "euler", 6), **asked)
    assert outcome.report.plan is None


def test_a_target_that_is_not_served_is_not_dropped_without_a_word(flow_model):
    outcome = Outcome()
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    inner = comfy.samplers.sampler_object("euler_ancestral")
    settings = Settings(preset="standard", window=4)
    sample(flow_model, parallel(inner, settings, outcome), sigmas_of(flow_model, "euler", 6), **asked)
    assert "no collocation, as it adds noise" in outcome.report.plan


def test_the_probe_sees_places():
    """A model that treats the pictures of a batch by their place."""

    def by_place(x: Tensor, sigma: Tensor) -> Tensor:
        return x * torch.linspace(1, 1.1, len(x)).reshape(-1, 1, 1)

    assert probe(by_place, torch.ones(1, 4), torch.linspace(1, 0.1, 8))
    assert probe(lambda x, sigma: x * sigma.reshape(-1, 1, 1), torch.ones(1, 4), torch.linspace(1, 0.1, 8)) is None


def by_levels(which: str) -> Any:
    """A model that takes one level for all pictures of a call."""

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        level = {"first": sigma[0], "last": sigma[-1], "largest": sigma.max(), "mean": sigma.mean()}[which]
        return x * (0.5 + 0.1 * level)

    return model


@pytest.mark.parametrize("which", ["first", "last", "largest", "mean"])
@pytest.mark.parametrize(
    "levels", [[9.0, 1.0], [9.0, 9.0, 1.0], [9.0, 5.0, 1.0], [1.0, 5.0, 9.0], [9.0, 7.0, 3.0, 1.0]]
)
def test_the_probe_sees_one_level_for_all(which, levels):
    assert "influence" in probe(by_levels(which), torch.ones(2, 4), torch.tensor(levels))


@pytest.mark.parametrize("start", range(0, 37, 3))
def test_the_probe_sees_a_band_of_a_quarter_of_the_schedule(start):
    levels = torch.linspace(10, 0.1, 50)
    high, low = levels[start], levels[start + 13]

    def banded(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (1.5 if low <= sigma[0] <= high else 1.0)

    assert "influence" in probe(banded, torch.ones(1, 4), levels)


def test_the_probe_counts_its_rows():
    for count, probed in ((1, 10), (2, 10), (3, 10), (4, 12), (5, 14), (20, PROBED)):
        rows: list[int] = []

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            rows.append(len(x))  # noqa: B023
            return x

        levels = torch.linspace(9, 1, count)
        assert probe(model, torch.ones(1, 4), levels) is None and sum(rows) == probed <= PROBED
        assert len(rows) <= PROBES
