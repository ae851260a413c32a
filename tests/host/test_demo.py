"""Fidelity on a trained network: the demo model, every core sampler, preset strict."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.demo import DemoModel, DemoPrompt
from paratafusion_pack.nodes.host import sampling
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.paratafusion_core.report import fidelity
from test_capture import SAMPLERS

PROMPTS = ("large red circle, dark background", "small blue cross, top left", "yellow ring, grey background")
MEAN_DB, WORST_DB = 60.0, 50.0


@pytest.fixture(scope="module")
def demo():
    return DemoModel.execute(1).args


def draw(model, prompt: str, sampler: str, seed: int, settings: Settings) -> tuple[torch.Tensor, Outcome]:
    """The demo model's pixels, in [-1, 1]."""
    yes, no = (DemoPrompt.execute(text).args[0] for text in (prompt, ""))
    empty = {"samples": torch.zeros(1, 3, 32, 32)}
    outcome = Outcome()
    request = sampling.Request(model, seed, 12, 4.0, sampler, "normal", yes, no, empty)
    return sampling.run(request, settings, outcome)["samples"], outcome


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strict_is_close_on_every_sampler(demo, sampler, record_property):
    decibels = []
    for seed, prompt in enumerate(PROMPTS):
        reference, _ = draw(demo[0], prompt, sampler, seed, Settings(solver="sequential"))
        result, outcome = draw(demo[0], prompt, sampler, seed, Settings(preset="strict", window=8))
        assert outcome.report.fallback is None
        assert outcome.report.rounds <= outcome.report.sequential_nfe
        decibels.append(min(fidelity(result, reference, 2.0).psnr_db, 200.0))
    record_property("psnr_db", decibels)
    assert sum(decibels) / len(decibels) >= MEAN_DB
    assert min(decibels) >= WORST_DB


def test_the_model_is_an_ordinary_model(demo):
    """Saved weights and LoRA-style patches reach it by the host's own key names."""
    model = demo[0].clone()
    key = next(k for k in model.model.state_dict() if k.endswith("head.weight"))
    assert key.startswith("diffusion_model.")
    weight = model.model.state_dict()[key]
    assert model.add_patches({key: (0.1 * torch.ones_like(weight),)}, 1.0) == [key]
    before, _ = draw(demo[0], PROMPTS[0], "euler", 1, Settings(solver="sequential"))
    patched, _ = draw(model, PROMPTS[0], "euler", 1, Settings(solver="sequential"))
    parallel, outcome = draw(model, PROMPTS[0], "euler", 1, Settings(preset="strict", window=8))
    assert not torch.equal(before, patched)
    assert outcome.report.fallback is None
    assert fidelity(parallel, patched, 2.0).psnr_db > WORST_DB
    after, _ = draw(demo[0], PROMPTS[0], "euler", 1, Settings(solver="sequential"))
    assert torch.equal(before, after)


def test_the_vae_and_the_empty_latent_fit(demo):
    _, vae, latent = demo
    image = vae.decode(latent["samples"])
    assert image.shape == (1, 32, 32, 3)
    assert float(image.mean()) == pytest.approx(0.5)
    assert vae.encode(image).shape == latent["samples"].shape


def test_prompts_are_checked():
    with pytest.raises(ValueError, match="unknown word"):
        DemoPrompt.execute("a photograph")
    assert DemoPrompt.execute("").args[0][0][0].abs().max() == 0


def test_the_first_latent_of_the_hosts_own_node_fits_too(demo):
    """EmptyLatentImage makes four channels at an eighth: the host brings them to the model's."""
    yes, no = (DemoPrompt.execute(text).args[0] for text in (PROMPTS[0], ""))
    request = sampling.Request(demo[0], 1, 4, 4.0, "euler", "normal", yes, no, {"samples": torch.zeros(1, 4, 32, 32)})
    assert sampling.run(request, Settings(), Outcome())["samples"].shape == (1, 3, 32, 32)
    assert "euler" in comfy.samplers.KSampler.SAMPLERS
