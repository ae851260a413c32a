"""Stable Diffusion's networks in full width, with random weights, as the host builds them: they cost what trained ones
do, and make no picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from tiny import conditioning

#: What all U-Nets of the family share.
_UNET = {
    "use_checkpoint": False, "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False,
}  # fmt: skip


@dataclass(frozen=True)
class Full:
    """A model to build: the host's configuration of that ``name``, the network's sizes, and what it samples.

    Attributes:
        side: of the square latent. context, pooled: widths of a prompt's vectors.
    """

    name: str
    sizes: dict[str, Any]
    side: int
    context: int
    pooled: int

    def build(self) -> Any:
        """A MODEL in half precision, on the host's device."""
        device = comfy.model_management.get_torch_device()
        config = getattr(comfy.supported_models, self.name)(_UNET | self.sizes)
        config.set_inference_dtype(torch.float16 if device.type != "cpu" else torch.float32, None)
        torch.manual_seed(0)
        model = config.get_model({}, device=device).eval().requires_grad_(False)
        for name, weight in model.diffusion_model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(std=weight[0].numel() ** -0.5)
            else:
                weight.fill_(float(name.endswith("weight")))
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))

    def prompts(self) -> list[list]:
        """A positive and a negative prompt of 77 random tokens."""
        return [conditioning(seed, 77, self.context, self.pooled) for seed in (1, 2)]

    def latent(self) -> dict[str, torch.Tensor]:
        """An empty one of the size that the model was made for."""
        return {"samples": torch.zeros(1, 4, self.side, self.side)}


FULL = {
    "sd15": Full(
        "SD15",
        {"adm_in_channels": None, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
         "num_head_channels": -1, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
         "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False,
         "context_dim": 768},
        side=64, context=768, pooled=768,
    ),
    "sdxl": Full(
        "SDXL",
        {"num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
         "num_head_channels": 64, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
         "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
         "context_dim": 2048},
        side=128, context=2048, pooled=1280,
    ),
}  # fmt: skip
