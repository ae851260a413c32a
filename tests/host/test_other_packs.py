"""Samplers, patches, guiders and ControlNets as other packs write them: the plain sampler's picture, or its own."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from test_guiders import draw, guided
from test_guiders import run as run_guider
from test_mixed import control_net, unet_conds, with_values
from tiny import conditioning, latent, load, relative, sample, sigmas_of
from torch import Tensor

EXACT = Settings(preset="exact", window=6)
CLOSE = 1e-4
Step = Callable[[Any, Tensor, Tensor, int, dict[str, Any]], Tensor]


def euler(step: Step, **kept: Any) -> Any:
    """Euler with D of ``step``, a sampler of another pack."""

    def own(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, **_: Any) -> Tensor:
        for i in range(len(sigmas) - 1):
            D = step(model, x, sigmas[i].expand(x.shape[0]), i, extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": D})
            x = D + (x - D) * (sigmas[i + 1] / sigmas[i])
        return x

    return comfy.samplers.KSAMPLER(own, kept)


def draws(model: Any, make: Callable[[], Any], settings: Settings = EXACT, **given: Any) -> tuple[Tensor, Tensor, Any]:
    """The plain picture, the parallel one, and its report; samplers are made anew for each."""
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model, 2, seed=9)} | given
    outcome = Outcome()
    reference = sample(model, make(), sigmas_of(model, "euler", 8), **asked)
    result = sample(model, parallel(make(), settings, outcome), sigmas_of(model, "euler", 8), **asked)
    return reference, result, outcome.report


def blurred(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    D = model(x, sigma, **args)
    return 0.7 * D + 0.3 * F.avg_pool2d(F.pad(D, (1, 1, 1, 1), mode="replicate"), 3, 1)


def mirrored(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    return model(x, sigma, **args).flip(-1)


def centred(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    D = model(x, sigma, **args)
    return D - 0.1 * D.mean((-2, -1), keepdim=True)


def averaged(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    D = model(x, sigma, **args)
    return 0.8 * D + 0.2 * D.mean(0, keepdim=True)


def differentiated(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    D, turn = torch.func.jvp(lambda state: model(state, sigma, **args), (x,), (0.1 * x,))
    return D + turn


def rescaled(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    model.inner_model.cfg = 8.0 if i < 4 else 4.0
    try:
        return model(x, sigma, **args)
    finally:
        model.inner_model.cfg = 4.0


def unmasked(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    return model(x, sigma, **{**args, "denoise_mask": None})


def fading(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    before, model.latent_image = model.latent_image, model.latent_image * 0.9
    try:
        return model(x, sigma, **args)
    finally:
        model.latent_image = before


def patching(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    args["model_options"]["transformer_options"]["patches"] = {"attn1_patch": [lambda q, k, v, extra: (q, k, v)]}
    return model(x, sigma, **args)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (blurred, "no fixed combination"),
        (mirrored, "no fixed combination"),
        (centred, "no fixed combination"),
        (averaged, "no fixed combination"),
        (differentiated, "no fixed combination"),
        (rescaled, "changes the guider's cfg"),
        (unmasked, "changes the model's denoise_mask"),
        (fading, "changes the model's latent_image"),
        (patching, "changes 'patches' of the model's options"),
    ],
)
def test_samplers_that_are_no_fixed_system(eps_model, step, why):
    mask = (torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    reference, result, report = draws(eps_model, lambda: euler(step), mask=mask)
    assert why in report.fallback
    assert torch.equal(result, reference)


def rounded(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    return model(x.float(), sigma.float(), **args)


def noised(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x)
    return model(x, sigma, **args) + 0.1 * noise / noise.std()


def handing_on(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    args["model_options"]["transformer_options"]["state"] = x
    return model(x, sigma, **args)


def looking(use: float) -> Step:
    def step(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
        kept = []

        def keep(given: dict[str, Any]) -> Tensor:
            kept.append(given["cond_denoised"])
            return given["denoised"] + (use * given["cond_denoised"] if use else 0)

        options = comfy.model_patcher.set_model_options_post_cfg_function(dict(args["model_options"]), keep)
        return model(x, sigma, **{**args, "model_options": options})

    return step


@pytest.mark.parametrize("step", [rounded, noised, handing_on, looking(0.0)])
def test_samplers_that_only_look_odd_are_parallel(eps_model, step):
    reference, result, report = draws(eps_model, lambda: euler(step))
    assert report.fallback is None
    assert relative(result, reference) < CLOSE


def test_the_conditional_picture_is_no_fixed_combination(eps_model):
    reference, result, report = draws(eps_model, lambda: euler(looking(0.1)))
    assert report.fallback.startswith("its steps are no fixed combination")
    assert torch.equal(result, reference)


def test_what_a_sampler_hands_on_to_patches_is_refused_beside_patches(eps_model):
    patched = eps_model.clone()
    patched.set_model_sampler_post_cfg_function(lambda given: given["denoised"] * 0.99)
    reference, result, report = draws(patched, lambda: euler(handing_on))
    assert "passes 'state' to the model's patches" in report.fallback
    assert torch.equal(result, reference)


@pytest.mark.parametrize("spoiled", [False, True], ids=["parallel", "falls back"])
def test_generators_of_a_samplers_own_are_put_back(eps_model, spoiled):
    def make() -> Any:
        generator = torch.Generator().manual_seed(7)

        def step(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
            D = model(x, sigma, **args)
            D = D.flip(-1) if spoiled else D
            return D + 0.1 * torch.randn(x.shape, generator=generator).to(x)

        return euler(step)

    reference, result, report = draws(eps_model, make)
    assert (report.fallback is None) != spoiled
    assert relative(result, reference) < CLOSE


def drawing(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    return model(x, sigma, **args) + 0.1 * torch.randn_like(x) * (1 + random.random() + np.random.rand())


@pytest.mark.parametrize("settings", [EXACT, Settings(solver="sequential")], ids=["parallel", "sequential"])
def test_nodes_that_draw_without_a_seed_draw_the_same_behind_it(eps_model, settings):
    drawn, pictures = [], []
    for wrap in (lambda inner: inner, lambda inner: parallel(inner, settings, Outcome())):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        given = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(eps_model)}
        pictures.append(sample(eps_model, wrap(euler(drawing)), sigmas_of(eps_model, "euler", 6), **given))
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]
    assert relative(pictures[1], pictures[0]) < CLOSE


def with_state(model: Any, weight: float) -> Any:
    """A patch that blends with the call before, which it keeps in the options."""
    clone = model.clone()

    def blend(given: dict[str, Any]) -> Tensor:
        D, kept = given["denoised"], given["model_options"].setdefault("before", {})
        D = D + weight * (kept.get("D", D) - D)
        kept["D"] = D
        return D

    clone.set_model_sampler_post_cfg_function(blend)
    return clone


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_patch_that_keeps_pictures_of_the_call_before(eps_model, fresh, weight):
    """Of other sizes than the next call's, it raises an error."""
    for _ in range(2):
        given = with_state(eps_model, weight), lambda: comfy.samplers.sampler_object("euler")
        reference, result, report = draws(*given)
        assert report.fallback is not None
        assert torch.equal(result, reference)


class First:
    """A patch that goes by the first noise level that it meets, ever."""

    def __init__(self, mixing: float) -> None:
        self.level: Any = None
        self.mixing = mixing

    def __call__(self, given: dict[str, Any]) -> Tensor:
        self.level = self.level or float(given["sigma"].max())
        D = given["denoised"] * (1 + 0.01 * self.level)
        return D + self.mixing * D.mean(0, keepdim=True)


@pytest.mark.parametrize("mixing", [0.0, 0.2], ids=["parallel", "falls back"])
@pytest.mark.parametrize("in_closure", [False, True])
def test_what_a_patch_remembers_is_put_back_behind_the_probe(eps_model, fresh, mixing, in_closure):
    def patched() -> Any:
        patch, clone = First(mixing), eps_model.clone()
        clone.set_model_sampler_post_cfg_function((lambda given: patch(given)) if in_closure else patch)
        return clone

    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(eps_model, seed=9)}
    levels, pictures, outcome = sigmas_of(eps_model, "euler", 8), [], Outcome()
    plain = comfy.samplers.sampler_object("euler")
    reference = sample(patched(), plain, levels, **asked)
    model = patched()
    for inner in (
        parallel(comfy.samplers.sampler_object("euler"), EXACT, outcome),
        comfy.samplers.sampler_object("euler"),
    ):
        pictures.append(sample(model, inner, levels, **asked))
    assert (outcome.report.fallback is None) == (mixing == 0)
    assert all(relative(picture, reference) < CLOSE for picture in pictures)


@pytest.fixture
def unet():
    return load("sd15")


class Strange(dict):
    """Fails when it is asked for what it has not."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def test_what_patches_and_samplers_keep_may_be_strange(eps_model, fresh):
    options, ready = Strange(scale=0.99), threading.Event()

    def patch(given: dict[str, Any]) -> Tensor:
        ready.set()
        assert ready.wait(2)
        return given["denoised"] * options["scale"]

    patched = eps_model.clone()
    patched.set_model_sampler_post_cfg_function(patch)

    def step(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
        return model(x, sigma, **args) * options["scale"]

    reference, result, report = draws(patched, lambda: euler(step))
    assert report.fallback is None and ready.is_set()
    assert relative(result, reference) < CLOSE


@pytest.mark.parametrize("kind", [AssertionError, IndexError, KeyError, ValueError])
def test_a_patch_that_takes_no_large_batch(eps_model, fresh, kind):
    """The probe's calls have two rows."""

    def patch(given: dict[str, Any]) -> Tensor:
        if given["denoised"].shape[0] > 4:
            raise kind("too many")
        return given["denoised"] * 0.99

    patched = eps_model.clone()
    patched.set_model_sampler_post_cfg_function(patch)
    for _ in range(2):
        reference, result, report = draws(patched, lambda: comfy.samplers.sampler_object("euler"))
        assert "does not take calls of different sizes" in report.fallback
        assert torch.equal(result, reference)


def test_memory_that_runs_out_leaves_nothing_of_the_failed_call(eps_model, fresh):
    """Its tensors are freed at once: the plain sampler needs the room."""
    notes: Any = ModuleType("notes")  # where nothing is put back
    notes.kept, notes.sizes = [], []

    def full(given: dict[str, Any]) -> Tensor:
        """Room for the probe's two rows, then for none until a single one has failed."""
        D = given["denoised"]
        notes.sizes.append(D.shape[0])
        if max(notes.sizes) > 2 and notes.sizes.count(1) <= 1:
            notes.kept.append(weakref.ref(D))
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        assert all(one() is None for one in notes.kept)
        return D

    patched = eps_model.clone()
    patched.set_model_sampler_post_cfg_function(full)
    gc.disable()
    try:
        outcome = Outcome()
        asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(eps_model)}
        inner = parallel(comfy.samplers.sampler_object("euler"), EXACT, outcome)
        sample(patched, inner, sigmas_of(patched, "euler", 8), **asked)
    finally:
        gc.enable()
    assert notes.kept and "memory ran out" in outcome.report.fallback


@pytest.mark.parametrize("mirrored_too", [False, True], ids=["parallel", "falls back"])
def test_a_samplers_own_list_is_not_used_up(eps_model, mirrored_too):
    def make() -> Any:
        noises = [torch.full((1,), 0.1 * i) for i in range(8)]

        def step(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
            D = model(x, sigma, **args)
            return (D.flip(-1) if mirrored_too else D) + noises.pop().to(x)

        return euler(step)

    reference, result, report = draws(eps_model, make)
    assert (report.fallback is None) != mirrored_too
    assert relative(result, reference) < CLOSE


def nesting(model: Any, x: Tensor, sigma: Tensor, i: int, args: dict[str, Any]) -> Tensor:
    args["model_options"]["transformer_options"]["kept"]["step"] = i
    return model(x, sigma, **args)


def test_what_a_sampler_writes_deeper_into_the_options_is_seen(eps_model):
    patched = eps_model.clone()
    kept = patched.model_options["transformer_options"]["kept"] = {"step": None}

    def patch(given: dict[str, Any]) -> Tensor:
        step = given["model_options"]["transformer_options"]["kept"]["step"] or 0
        return given["denoised"] * (1 + 0.1 * step)

    patched.set_model_sampler_post_cfg_function(patch)
    reference, result, report = draws(patched, lambda: euler(nesting))
    assert "changes 'kept' of the model's options" in report.fallback
    assert torch.equal(result, reference) and kept["step"] is None


def test_keyframes_of_another_packs_controlnet_are_refused(unet):
    control = control_net(unet, 1)
    control.timestep_keyframes = SimpleNamespace(keyframes=["one", "two"])
    conds = {k: with_values(c, control=control, control_apply_to_uncond=False) for k, c in unet_conds().items()}
    euler_of_the_host = comfy.samplers.sampler_object("euler")
    reference, result, report = draws(unet, lambda: euler_of_the_host, latent_image=latent(unet), **conds)
    assert "keyframes advance with the steps" in report.fallback
    assert torch.equal(result, reference)


class Scheduled(comfy.samplers.CFGGuider):
    """A guider whose scale is a list, one for each step."""

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        scales, self.cfg = self.cfg, self.cfg[0]
        try:
            return super().predict_noise(x, timestep, model_options or {}, seed)
        finally:
            self.cfg = scales


def test_a_guider_with_a_list_of_scales(eps_model, fresh):
    def guider() -> Any:
        return guided(eps_model, [4.0, 3.0], kind=Scheduled)

    result, report = run_guider(guider())
    assert report.fallback is None
    assert relative(result, draw(guider(), comfy.samplers.sampler_object("euler"))) < 1e-2
