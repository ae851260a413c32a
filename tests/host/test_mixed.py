"""A call at many noise levels equals one call per level, in everything the host can put into a graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.samplers
import pytest
import tiny
import torch
from paratafusion_pack.nodes.host.batched import BatchedModel
from paratafusion_pack.nodes.host.guards import known_trouble, needs_probe
from paratafusion_pack.nodes.host.probing import probe
from tiny import conditioning, latent, relative, sample, sigmas_of
from torch import Tensor

#: What the kernels of another batch size change.
CLOSE = 2e-5


def mixed(
    model: Any, steps: int = 8, levels: tuple[int, ...] = (0, 3, 5, 7), scheduler: str = "normal", **asked: Any
) -> float:
    """Worst relative difference of a batched call from one call a row, in some run of ``model``."""
    found: list[float] = []

    def look(wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        assert known_trouble(wrapped, extra_args["model_options"], x.shape[0]) is None
        batched = BatchedModel(wrapped, extra_args, x.shape[0])
        generator = torch.Generator().manual_seed(5)
        rows = [x * (sigmas[i] / sigmas[0]) + 0.3 * torch.randn(x.shape, generator=generator).to(x) for i in levels]
        chosen = sigmas[list(levels)]
        alone = [wrapped(r, s.expand(len(x)), **extra_args) for r, s in zip(rows, chosen, strict=True)]
        together = batched(torch.stack(rows), chosen)
        backwards = batched(torch.stack(rows[::-1]), chosen.flip(0))
        for i, reference in enumerate(alone):
            found.extend([relative(together[i], reference), relative(backwards[-1 - i], reference)])
        assert probe(batched, x, sigmas[:-1]) is None
        return x

    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model), **asked}
    sample(model, comfy.samplers.KSAMPLER(look), sigmas_of(model, "euler", steps, scheduler), **asked)
    return max(found)


def with_values(cond: list, **values: Any) -> list:
    return [[c[0], {**c[1], **values}] for c in cond]


def unet_conds(batch: int = 1) -> dict[str, list]:
    return {"positive": conditioning(1, width=768, batch=batch), "negative": conditioning(2, width=768, batch=batch)}


@pytest.fixture(scope="session")
def unet():
    return tiny.load("sd15")


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_plain_guidance(flow_model, cfg, batch):
    assert mixed(flow_model, cfg=cfg, latent_image=latent(flow_model, batch)) < CLOSE


@pytest.mark.parametrize(("conds", "batch"), [(3, 3), (2, 3), (4, 3), (3, 1)])
def test_cond_batches(flow_model, conds, batch):
    error = mixed(flow_model, positive=conditioning(1, batch=conds), latent_image=latent(flow_model, batch))
    assert error < CLOSE


def test_several_conds_with_areas_and_masks(flow_model):
    positive = [
        *with_values(conditioning(1), area=(4, 8, 0, 0), strength=0.7),
        *with_values(conditioning(3), area=(5, 6, 3, 1)),
        *with_values(conditioning(4), mask=torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(1))),
    ]
    assert mixed(flow_model, positive=positive, latent_image=latent(flow_model, 2)) < CLOSE


def test_a_mask_a_picture(flow_model):
    mask = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    positive = [*conditioning(1), *with_values(conditioning(3), mask=mask, mask_strength=0.6)]
    assert mixed(flow_model, positive=positive, latent_image=latent(flow_model, 3)) < CLOSE


def test_conds_that_change_with_the_noise_level(flow_model):
    positive = [
        *with_values(conditioning(1), start_percent=0.0, end_percent=0.4),
        *with_values(conditioning(3), start_percent=0.3, end_percent=1.0),
    ]
    assert mixed(flow_model, positive=positive, latent_image=latent(flow_model, 2)) < CLOSE


@pytest.mark.parametrize("cut", [0.15, 0.25, 0.35, 0.5, 0.75])
def test_a_range_that_ends_on_a_noise_level(flow_model, cut):
    """The host compares in float32: a bound and a level that differ in float64 may be equal there, and the reverse."""
    model = patched(flow_model, "nodes_model_advanced", "ModelSamplingSD3", 3.0)
    positive = [
        *with_values(conditioning(1), start_percent=0.0, end_percent=cut),
        *with_values(conditioning(3), start_percent=cut, end_percent=1.0),
    ]
    assert mixed(model, 20, tuple(range(20)), positive=positive, scheduler="simple") < CLOSE


@pytest.mark.parametrize("batch", [1, 3])
def test_inpainting(flow_model, batch):
    mask = (torch.rand(batch, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    assert mixed(flow_model, mask=mask, latent_image=latent(flow_model, batch, seed=4)) < CLOSE


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_differential_diffusion(flow_model, batch, strength):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = DifferentialDiffusion.execute(flow_model, strength).args[0]
    mask = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2))
    assert mixed(model, mask=mask, latent_image=latent(flow_model, batch, seed=4)) < CLOSE


def test_flux():
    model = tiny.load("flux")
    conds = {k: conditioning(i, pooled=768) for i, k in enumerate(("positive", "negative"))}
    assert mixed(model, latent_image=latent(model, 2), cfg=1.0, **conds) < CLOSE


def test_video_latents():
    model = tiny.load("wan")
    asked = {"positive": conditioning(1), "negative": conditioning(2)}
    assert mixed(model, latent_image=latent(model, shape=(2, 16, 3, 8, 8)), **asked) < CLOSE


def control_net(unet: Any, hints: int) -> Any:
    """A tiny ControlNet for the tiny UNet."""
    net = tiny.control()
    tiny.randomise(net, 7)
    control = comfy.controlnet.ControlNet(net, load_device=unet.load_device)
    hint = torch.rand(hints, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return control.set_cond_hint(hint, 0.8, (0.2, 0.7))


@pytest.mark.parametrize(("hints", "batch"), [(1, 1), (1, 2), (2, 2)])
def test_control_nets_with_a_range(unet, hints, batch):
    conds = unet_conds()
    control = control_net(unet, hints)
    asked = {k: with_values(c, control=control, control_apply_to_uncond=False) for k, c in conds.items()}
    assert mixed(unet, latent_image=latent(unet, batch), **asked) < CLOSE


def test_static_lora_hooks(flow_model):
    generator = torch.Generator().manual_seed(6)
    name = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    weight = flow_model.model.state_dict()[f"{name}.weight"]
    lora = {
        f"{name}.lora_up.weight": torch.randn(weight.shape[0], 4, generator=generator) * 0.1,
        f"{name}.lora_down.weight": torch.randn(4, weight.shape[1], generator=generator) * 0.1,
    }
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(1), hooks)
    assert mixed(flow_model.clone(), positive=positive) < CLOSE


def patched(model: Any, module: str, node: str, *args: Any) -> Any:
    """``model`` through one of the host's own patch nodes, of whatever form."""
    try:
        kind = getattr(importlib.import_module(f"comfy_extras.{module}"), node)
    except (ImportError, AttributeError):
        pytest.skip(f"this version of the host has no {node}")
    made = kind.execute(model, *args) if hasattr(kind, "execute") else kind().patch(model, *args)
    return made[0]


ON_FLOW = [
    ("nodes_model_advanced", "RescaleCFG", 0.7),
    ("nodes_tcfg", "TCFG"),
    ("nodes_cfg", "CFGZeroStar"),
    ("nodes_cfg", "CFGNorm", 1.0),
    ("nodes_fresca", "FreSca", 1.0, 1.25, 3),
    ("nodes_eps", "EpsilonScaling", 1.01),
    ("nodes_apg", "APG", 1.0, 5.0, 0.0),
    ("nodes_model_advanced", "ModelSamplingSD3", 2.0),
]
ON_UNET = [
    ("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    ("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0),
    ("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2),
    ("nodes_hypertile", "HyperTile", 256, 2, 0, False),
]


@pytest.mark.parametrize("patch", ON_FLOW, ids=lambda p: p[1])
def test_patches_that_keep_pictures_apart(flow_model, patch):
    assert mixed(patched(flow_model, *patch), latent_image=latent(flow_model, 2)) < CLOSE


@pytest.mark.parametrize("patch", ON_UNET, ids=lambda p: p[1])
def test_unet_patches_that_keep_pictures_apart(unet, patch):
    assert mixed(patched(unet, *patch), latent_image=latent(unet, 2), **unet_conds()) < CLOSE


def test_only_a_plain_graph_goes_without_the_probe(flow_model, unet):
    asked: list[bool] = []

    def look(wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        asked.append(needs_probe(wrapped, extra_args["model_options"]))
        return x

    def asks(model: Any, **conds: Any) -> bool:
        conds = {"positive": conditioning(1), "negative": conditioning(2), **conds}
        sigmas = sigmas_of(model, "euler", 4)
        sample(model, comfy.samplers.KSAMPLER(look), sigmas, latent_image=latent(model), **conds)
        return asked.pop()

    assert not asks(flow_model)
    assert not asks(patched(flow_model, "nodes_model_advanced", "ModelSamplingSD3", 2.0))
    assert asks(patched(flow_model, "nodes_cfg", "CFGZeroStar"))
    controlled = {k: with_values(c, control=control_net(unet, 1)) for k, c in unet_conds().items()}
    assert not asks(unet, **unet_conds())
    assert asks(unet, **controlled)
    replaced = flow_model.clone()
    replaced.add_object_patch("extra", 1)
    assert asks(replaced)


def test_memory_pressure_splits_the_rows_and_changes_nothing(flow_model, monkeypatch):
    """Free memory for about one row, then none at all: smaller calls, the same numbers."""
    sizes: list[int] = []
    real = BatchedModel._call

    def counted(self: Any, x: Tensor, levels: Tensor, options: dict) -> Tensor:
        sizes.append(len(x))
        return real(self, x, levels, options)

    monkeypatch.setattr(BatchedModel, "_call", counted)
    monkeypatch.setattr(BatchedModel, "_free", lambda self, device: 0.0)
    assert mixed(flow_model) < CLOSE
    assert set(sizes) == {1}


def out_of_memory_above(rows: int) -> Callable[..., Tensor]:
    real = BatchedModel._call

    def call(self: Any, x: Tensor, levels: Tensor, options: dict) -> Tensor:
        if len(x) > rows:
            raise torch.cuda.OutOfMemoryError("not enough memory")
        return real(self, x, levels, options)

    return call


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_out_of_memory_halves_and_retries(flow_model, monkeypatch, rows):
    monkeypatch.setattr(BatchedModel, "_call", out_of_memory_above(rows))
    assert mixed(flow_model) < CLOSE


def test_out_of_memory_on_one_row_is_the_hosts_matter(flow_model, monkeypatch):
    monkeypatch.setattr(BatchedModel, "_call", out_of_memory_above(0))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        mixed(flow_model)
