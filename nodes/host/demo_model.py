"""The embedded network in the host's clothes: a BaseModel in a ModelPatcher, and the VAE of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...paratafusion_core.demo.model import DATA_RMS
from ...paratafusion_core.demo.model import load as load_network
from ...paratafusion_core.demo.network import DemoNet
from ...paratafusion_core.demo.prompt import VOCABULARY
from ...paratafusion_core.demo.shapes import SIDE

__all__ = ["SIDE", "load_demo"]


class _Pixels(comfy.latent_formats.LatentFormat):
    """RGB in [-1, 1] as a latent."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class _Config(comfy.supported_models_base.BASE):
    """What the host wants to know of a model."""

    unet_extra_config: Mapping[str, Any] = MappingProxyType({})
    latent_format = _Pixels
    supported_inference_dtypes = (torch.float32,)


class _Network(nn.Module):
    """The network with the call that the host's BaseModel makes."""

    dtype = torch.float32

    def __init__(self, inner: DemoNet) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
        """v of ``x`` ``[N, 3, 32, 32]``; ``context`` is ``[N, 1, V]``, as the host passes prompts."""
        # as in the host's own networks: EasyCache and its like wrap this call
        patches = options.get("transformer_options") or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, patches)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, patches)

    def _forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None, _: dict[str, Any]) -> Tensor:
        words = x.new_zeros(len(x), len(VOCABULARY)) if context is None else context[:, 0]
        return self.inner(x, timesteps, words)


def load_demo() -> tuple[Any, Any]:
    """``(MODEL, VAE)`` of the embedded network.

    Raises:
        ValueError: its weights are missing from the pack.
    """
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    config = _Config({"disable_unet_model_creation": True, "in_channels": 3})
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION, device=offload_device)
    model.diffusion_model = _Network(load_network()).to(offload_device)
    # pixels are not of unit variance as latents are; the engine's scales want to know
    model.model_sampling.data_rms = DATA_RMS
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)
    return patcher, comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
