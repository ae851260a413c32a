"""Tiny models with random weights that the host's own loaders accept, and what is needed to sample with them."""

from __future__ import annotations

import math
from typing import Any

import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from torch import Tensor, nn

OPS = comfy.ops.disable_weight_init


def randomise(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights that keep activations near 1; returns the state dict."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim >= 2:
                weight.copy_(normal(weight.shape) / math.sqrt(weight[0].numel()))
            else:
                weight.copy_(float(name.endswith(("weight", "scale"))) + 0.1 * normal(weight.shape))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.02 * normal(buffer.shape))
    return {k: v.clone().contiguous() for k, v in module.state_dict().items()}


def sd3() -> nn.Module:
    """A two-block MMDiT with SD3's interface (flow)."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    return OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=2, adm_in_channels=2048,
        context_embedder_config=embedder, num_patches=64 * 64, pos_embed_max_size=64, pos_embed_scaling_factor=None,
        operations=OPS, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def sd15() -> nn.Module:
    """A one-level UNet with SD 1.5's interface (eps)."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=[1], channel_mult=[1],
        transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1, context_dim=768,
        use_linear_in_transformer=False, num_heads=8, num_head_channels=-1, use_spatial_transformer=True,
        legacy=False, adm_in_channels=None, operations=OPS, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def wan() -> nn.Module:
    """A two-block Wan text-to-video model (5-D latents, flow)."""
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v", patch_size=(1, 2, 2), dim=128, ffn_dim=256, freq_dim=256, text_dim=4096, in_dim=16,
        out_dim=16, num_heads=1, num_layers=2, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
        operations=OPS, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def flux() -> nn.Module:
    """A Flux with one block of each kind (flow, guidance embedding)."""
    from comfy.ldm.flux.model import Flux

    return Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=256,
        mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=torch.float32, device="cpu", operations=OPS,
    )  # fmt: skip


def control() -> nn.Module:
    """A ControlNet for :func:`sd15`."""
    import comfy.cldm.cldm

    return comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, model_channels=320, hint_channels=3, num_res_blocks=[1], channel_mult=[1],
        transformer_depth=[1], transformer_depth_middle=1, context_dim=768, num_heads=8, num_head_channels=-1,
        use_spatial_transformer=True, legacy=False, dtype=torch.float32, device="cpu", operations=OPS,
    )  # fmt: skip


BUILDERS = {"sd3": (sd3, 2), "sd15": (sd15, 1), "wan": (wan, 3), "flux": (flux, 4), "control": (control, 7)}


def state_dict(kind: str) -> dict[str, Tensor]:
    """The weights of a tiny model."""
    build, seed = BUILDERS[kind]
    return randomise(build(), seed)


def load(kind: str) -> Any:
    """A tiny model, as the host's own loader makes it of its weights; skips the test where it reads no small Flux."""
    try:
        return comfy.sd.load_diffusion_model_state_dict(state_dict(kind))
    except ValueError as error:
        if kind == "flux" and "num_heads" in str(error):  # ComfyUI 0.8 takes every Flux to have 24 heads
            pytest.skip(f"this host reads no small Flux: {error}")
        raise


def as_prediction(model: Any, sampling: str, zsnr: bool = False) -> Any:
    """``model`` read as another prediction type by the host's ModelSamplingDiscrete node."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]


def conditioning(
    seed: int, tokens: int = 7, width: int = 4096, pooled: int = 2048, batch: int = 1, **extra: Any
) -> list:
    """A random prompt in the host's CONDITIONING form."""
    generator = torch.Generator().manual_seed(seed)
    cross = torch.randn(batch, tokens, width, generator=generator)
    return [[cross, {"pooled_output": torch.randn(batch, pooled, generator=generator), **extra}]]


def latent(
    model: Any, batch: int = 1, side: int = 8, seed: int | None = None, shape: tuple[int, ...] | None = None
) -> Tensor:
    """An empty latent of the model's format, or a random one for ``seed``."""
    channels = model.get_model_object("latent_format").latent_channels
    shape = shape or (batch, channels, side, side)
    if seed is None:
        return torch.zeros(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigmas_of(model: Any, sampler: str, steps: int, scheduler: str = "normal", denoise: float = 1.0) -> Tensor:
    """The schedule that the host's KSampler node uses."""
    return comfy.samplers.KSampler(
        model, steps=steps, device=model.load_device, sampler=sampler, scheduler=scheduler, denoise=denoise
    ).sigmas


def sample(
    model: Any,
    sampler: Any,
    sigmas: Tensor,
    *,
    cfg: float = 4.0,
    positive: list,
    negative: list,
    latent_image: Tensor,
    seed: int = 3,
    mask: Tensor | None = None,
    callback: Any = None,
) -> Tensor:
    """One run of the host's own sampling with a SAMPLER object."""
    noise = comfy.sample.prepare_noise(latent_image, seed)
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, latent_image, noise_mask=mask, seed=seed,
        callback=callback, disable_pbar=True,
    )  # fmt: skip


def relative(result: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest magnitude."""
    return float((result - reference).abs().max() / reference.abs().max().clamp(min=1e-12))


#: kind -> (the host's model configuration, what makes it tiny, seed). The loader's own detection knows these models in
#: their full width only, so their configuration is given.
CONFIGURED: dict[str, tuple[str, dict[str, Any], int]] = {
    "triposplat": ("TripoSplat", {"q_token_length": 24, "model_channels": 128, "cond_channels": 64, "cond2_channels":
                                  None, "num_blocks": 1, "num_refiner_blocks": 1, "num_head_channels": 64}, 5),
    "zimage": ("ZImage", {"patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 2560, "n_layers": 1,
                          "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims":
                          [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
                          "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}, 6),
    "hunyuan": ("HunyuanVideo", {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size":
                                 [1, 2, 2], "vec_in_dim": 768, "axes_dim": [16, 56, 56], "meanflow": True,
                                 "context_in_dim": 4096, "hidden_size": 128, "mlp_ratio": 2.0, "num_heads": 1, "depth":
                                 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "byt5": False,
                                 "guidance_embed": False, "use_cond_type_embedding": False, "vision_in_dim": None,
                                 "meanflow_sum": False}, 8),
    "ltxav": ("LTXAV", {"in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 128,
                        "audio_cross_attention_dim": 128, "attention_head_dim": 64, "audio_attention_head_dim": 64,
                        "num_attention_heads": 2, "audio_num_attention_heads": 2, "caption_channels": 64, "num_layers":
                        1, "connector_num_layers": 1, "connector_num_attention_heads": 2,
                        "connector_attention_head_dim": 32}, 9),
    "minimax": ("MiniMaxH3", {"hidden_size": 96, "num_layers": 1, "token_refiner_num_layers": 1, "num_attention_heads":
                              2, "attention_head_dim": 96, "ffn_hidden_size": 128, "text_dim": 64,
                              "time_embed_hidden_size": 64, "time_embed_dim": 32}, 10),
}  # fmt: skip


def configured(kind: str) -> Any:
    """A MODEL of the host's own class and network, made tiny by its configuration."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    name, sizes, seed = CONFIGURED[kind]
    config = getattr(comfy.supported_models, name)(dict(sizes))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    randomise(model.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
