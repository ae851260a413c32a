"""The host's own model classes beyond the plain ones: nested latents, and networks that cannot be batched."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.supported_models
import pytest
import tiny
import torch
from paratafusion_pack.nodes.host import sampling
from paratafusion_pack.nodes.host.latency import Latencies
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.nodes.reports import CompareWithSequential
from test_fallbacks import falls_back
from test_mixed import CLOSE, mixed, patched
from tiny import conditioning, latent, relative, sample, sigmas_of
from torch import Tensor

import nodes as host_nodes

nested_tensor = pytest.importorskip("comfy.nested_tensor", reason="this version of the host has no nested latents")
EXACT = Settings(preset="exact", window=5)


def configured(kind: str) -> Any:
    """A tiny model, where this version of the host has its class."""
    name = tiny.CONFIGURED[kind][0]
    if not hasattr(comfy.supported_models, name):
        pytest.skip(f"this version of the host has no {name}")
    return tiny.configured(kind)


def nested(*shapes: tuple[int, ...], seed: int | None = None) -> Any:
    """The host's nested latent, empty or random."""
    generator = torch.Generator().manual_seed(seed or 0)
    parts = [torch.zeros(s) if seed is None else torch.randn(s, generator=generator) for s in shapes]
    return nested_tensor.NestedTensor(parts)


def splats(batch: int = 1, seed: int | None = None) -> Any:
    """A latent of TripoSplat: tokens, and a camera beside them."""
    return nested((batch, 24, 16), (batch, 1, 5), seed=seed)


def conds(width: int, **kwargs: Any) -> dict[str, list]:
    return {"positive": conditioning(1, width=width, **kwargs), "negative": conditioning(2, width=width, **kwargs)}


def alike(result: Any, reference: Any) -> float:
    """Largest relative difference of a part of a nested latent."""
    assert result.is_nested
    assert reference.is_nested
    assert [t.shape for t in result.unbind()] == [t.shape for t in reference.unbind()]
    return max(relative(a, b) for a, b in zip(result.unbind(), reference.unbind(), strict=True))


@pytest.fixture(scope="module")
def splat_model():
    return configured("triposplat")


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "dpmpp_2m_sde", "uni_pc", "euler_cfg_pp", "ddim"])
@pytest.mark.parametrize("batch", [1, 3])
def test_nested_latents(splat_model, name, batch):
    inner, sigmas = comfy.samplers.sampler_object(name), sigmas_of(splat_model, name, 10)
    asked = {**conds(64), "latent_image": splats(batch)}
    reference = sample(splat_model, inner, sigmas.clone(), **asked)
    outcome, seen = Outcome(), []

    def callback(step: int, denoised: Any, x: Any, steps: int) -> None:
        seen.append((step, steps, [tuple(t.shape) for t in denoised.unbind()], [tuple(t.shape) for t in x.unbind()]))

    result = sample(splat_model, parallel(inner, EXACT, outcome), sigmas.clone(), callback=callback, **asked)
    assert outcome.report.fallback is None
    assert outcome.report.rounds <= outcome.report.sequential_nfe
    assert alike(result, reference) < 1e-4
    shapes = [(batch, 24, 16), (batch, 1, 5)]
    assert len(seen) == outcome.report.rounds
    assert all(s[2:] == (shapes, shapes) and s[0] < s[1] for s in seen)


@pytest.mark.parametrize("batch", [1, 3])
def test_nested_latents_inpainting(splat_model, batch):
    """A mask for the first part; the host gives the others one of its own."""
    mask = (torch.rand(1, 24, 16, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    inner, sigmas = comfy.samplers.sampler_object("euler"), sigmas_of(splat_model, "euler", 8)
    asked = {**conds(64), "latent_image": splats(batch, seed=4), "mask": mask}
    reference, outcome = sample(splat_model, inner, sigmas.clone(), **asked), Outcome()
    result = sample(splat_model, parallel(inner, EXACT, outcome), sigmas.clone(), **asked)
    assert outcome.report.fallback is None
    assert alike(result, reference) < 1e-4


@pytest.mark.parametrize("asked", [{}, {"denoise": 0.6}, {"start_step": 2, "last_step": 6}, {"denoise": 0.0}], ids=str)
def test_nested_latents_through_the_node(splat_model, asked):
    """KSampler (Parallel) against the host's KSampler, the trajectory of one run as the next one's start, Compare."""
    prompts, given = conds(64), {"samples": splats(seed=4), "type": "splat"}
    words = (splat_model, 3, 8, 4.0, "euler", "normal", prompts["positive"], prompts["negative"])
    theirs = host_nodes.common_ksampler(*words, dict(given), **asked)[0]
    outcome = Outcome(want_trajectory=True)
    ours = sampling.run(sampling.Request(*words, dict(given), **asked), EXACT, outcome)
    assert set(ours) == set(theirs)
    assert alike(ours["samples"], theirs["samples"]) < 1e-4
    assert outcome.report.fallback is None
    assert CompareWithSequential.execute(ours, theirs).args[0] > 80
    if outcome.trajectory is not None:
        again = Outcome()
        warm = sampling.run(sampling.Request(*words, dict(given), **asked), EXACT, again, outcome.trajectory)
        assert alike(warm["samples"], theirs["samples"]) < 1e-4


#: kind -> (width of its prompts, more of them, its latent).
REFUSED: dict[str, tuple[int, dict[str, Any], Any]] = {
    "ltxav": (128, {}, lambda batch: nested((batch, 128, 2, 4, 4), (batch, 8, 5, 16))),
    "hunyuan": (4096, {"pooled": 768}, lambda batch: torch.zeros(batch, 16, 2, 8, 8)),
    "minimax": (64, {}, lambda batch: nested((batch, 24, 2, 4, 4), (batch, 32, 2, 5))),
}


@pytest.mark.parametrize(
    ("kind", "batch", "reason"),
    [
        ("ltxav", 1, "LTX-2"),
        ("ltxav", 2, "LTX-2"),
        ("hunyuan", 1, "MeanFlow"),
        ("hunyuan", 2, "MeanFlow"),
        ("minimax", 1, "does not take several noise levels at once"),
    ],
)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_models_that_cannot_be_batched(kind, batch, reason, sampler, caplog):
    model = configured(kind)
    width, more, empty = REFUSED[kind]
    falls_back(model, sampler, caplog, reason, **conds(width, **more), latent_image=empty(batch))


@pytest.mark.parametrize(("kind", "batch", "why"), [
    ("ltxav", 1, "LTX-2"), ("ltxav", 2, "LTX-2"), ("minimax", 1, "does not take several noise levels at once"),
])  # fmt: skip
def test_models_of_one_noise_level_are_served_by_collocation(kind, batch, why):
    model = configured(kind)
    width, more, empty = REFUSED[kind]
    asked = {**conds(width, **more), "latent_image": empty(batch)}
    plain, sigmas, outcome = comfy.samplers.sampler_object("euler"), sigmas_of(model, "euler", 20), Outcome()
    reference = sample(model, plain, sigmas.clone(), **asked)
    for rows, close in ((13, 0.05), (20, 1e-4)):
        settings = Settings(solver="collocation", rows=rows, window=4)
        result = sample(model, parallel(plain, settings, outcome), sigmas.clone(), **asked)
        assert outcome.report.solver == "collocation" and outcome.report.fallback is None
        assert outcome.report.rounds == outcome.report.nfe == rows and why in outcome.report.plan
        assert alike(result, reference) < close


def test_a_meanflow_free_hunyuan_is_parallel():
    """Not the model class but its MeanFlow is the reason."""
    name, sizes, seed = tiny.CONFIGURED["hunyuan"]
    tiny.CONFIGURED["plain_hunyuan"] = (name, {**sizes, "meanflow": False}, seed)
    model = configured("plain_hunyuan")
    assert mixed(model, latent_image=latent(model, shape=(1, 16, 2, 8, 8)), **conds(4096, pooled=768)) < CLOSE


@pytest.mark.parametrize("batch", [1, 3])
def test_z_image(batch):
    model = configured("zimage")
    assert mixed(model, latent_image=latent(model, batch), **conds(2560)) < CLOSE


def test_an_interrupt_during_the_probe_is_an_interrupt(splat_model, monkeypatch):
    """Not a reason to fall back."""

    def cancelled(*_: Any) -> Tensor:
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr("paratafusion_pack.nodes.host.sampler.KNOWN", Latencies())  # or it is known already
    monkeypatch.setattr("paratafusion_pack.nodes.host.fitting.probe", cancelled)
    sampler = parallel(comfy.samplers.sampler_object("euler"), EXACT, Outcome())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(splat_model, sampler, sigmas_of(splat_model, "euler", 6), **conds(64), latent_image=splats())


def stand_in() -> Any:
    """A model patch's weights, for patches that are idle: their class and the attributes it is read by are real."""
    from comfy.model_patcher import ModelPatcher

    weights = torch.nn.Linear(1, 1)
    weights.num_layers = 0
    return ModelPatcher(weights, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def with_lllite(model: Any) -> Any:
    lllite = pytest.importorskip("comfy.ldm.anima.lllite")
    patch = lllite.AnimaLLLitePatch(stand_in(), torch.zeros(1, 8, 8, 3), None, 0.0, 1.0, 0.0)
    model.set_model_post_input_patch(patch)
    model.set_model_attn1_patch(lllite.AnimaLLLiteAttentionPatch(patch, {"q": "self_attn_q_proj"}))
    return model


def with_uni3c(model: Any) -> Any:
    kind = getattr(pytest.importorskip("comfy_extras.nodes_model_patch"), "WanUni3CCnetPatch", None)
    if kind is None:
        pytest.skip("this version of the host has no Uni3C")
    empty = torch.zeros(1, 8, 8, 3)
    model.set_model_double_block_patch(kind(stand_in(), empty, None, None, 1.0, -1.0, -2.0))  # active at no level
    return model


def with_supir(model: Any) -> Any:
    supir = pytest.importorskip("comfy.ldm.supir.supir_patch")
    supir.SUPIRPatch(stand_in(), torch.nn.ModuleList(), None, 0.0, 0.0).register(model)
    return model


@pytest.mark.parametrize(
    ("kind", "patch", "reason"),
    [("sd3", with_lllite, "LLLite"), ("wan", with_uni3c, "WanUni3CCnetPatch"), ("sd15", with_supir, "SUPIR")],
    ids=["LLLite", "Uni3C", "SUPIR"],
)
def test_model_patches_with_a_range(kind, patch, reason, caplog):
    model = patch(tiny.load(kind).clone())
    asked = conds(768 if kind == "sd15" else 4096)
    shape = (1, 16, 2, 8, 8) if kind == "wan" else None
    falls_back(model, "euler", caplog, reason, **asked, latent_image=latent(model, shape=shape))


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (("nodes_slg", "SkipLayerGuidanceDiTSimple", 0.0, 1.0, "0", ""), "Skip Layer"),
        (("nodes_sd3", "SkipLayerGuidanceSD3", "0", 3.0, 0.0, 1.0), "Skip Layer"),
    ],
    ids=["Simple", "SD3"],
)
def test_skip_layer_guidance_by_any_node(flow_model, caplog, patch, reason):
    falls_back(patched(flow_model, *patch), "euler", caplog, reason)


def test_patch_seam_smoothing(flow_model, caplog):
    hidream = pytest.importorskip("comfy_extras.nodes_hidream_o1")
    kind = getattr(hidream, "HiDreamO1PatchSeamSmoothing", None)
    if kind is None:
        pytest.skip("this version of the host has no seam smoothing")
    given = {"start_percent": 0.5, "end_percent": 1.0, "pattern": "single_shift", "passes": "2", "blend": "average"}
    model = kind.execute(model=flow_model, **given, strength=1.0).args[0]
    falls_back(model, "euler", caplog, "seam smoothing", latent_image=latent(model, side=40))


@pytest.mark.parametrize("batch", [1, 2])
def test_flux_with_a_picture_to_edit(batch):
    """Reference latents (Kontext) belong to every picture, and Flux goes without the probe."""
    model = tiny.load("flux")
    picture = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(6))
    asked = {k: conditioning(i, pooled=768, reference_latents=[picture], guidance=3.5 + i)
             for i, k in enumerate(("positive", "negative"))}  # fmt: skip
    assert mixed(model, latent_image=latent(model, batch), **asked) < CLOSE


def test_a_parallel_sampler_made_parallel_again(flow_model, caplog):
    """The settings given last count, and no warning is logged."""
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    plain, sigmas = comfy.samplers.sampler_object("dpmpp_2m"), sigmas_of(flow_model, "dpmpp_2m", 8)
    inner, outer = Outcome(), Outcome()
    twice = parallel(parallel(plain, Settings(solver="sequential"), inner), EXACT, outer)
    result = sample(flow_model, twice, sigmas.clone(), **asked)
    assert outer.report.fallback is None
    assert outer.report.sampler == "dpmpp_2m"
    assert outer.report.rounds > 0
    assert inner.report is None
    assert "sequentially" not in caplog.text
    assert relative(result, sample(flow_model, plain, sigmas.clone(), **asked)) < 1e-4
