"""Networks of SD 1.5 and DiT-XL/2 size with random weights, resident on a device or streamed in for every call.

The classes are those of diffusers (extra ``bench``). Random weights make no picture; they cost what trained ones do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..denoisers import Denoise, from_network, guided
from .extra import require

CFG = 4.0
#: Class labels of ImageNet, and the one of the unconditional half.
_CLASSES = 1000


@dataclass(frozen=True)
class Spec:
    """A network to build.

    Attributes:
        name: for tables.
        kind: diffusers' class: a text-conditioned U-Net or a class-conditioned transformer.
        config: its arguments.
        latent: ``[C, H, W]`` of a state.
        dtype: of weights and activations on an accelerator; float32 on a CPU.
    """

    name: str
    kind: str
    latent: tuple[int, int, int]
    dtype: torch.dtype
    config: Mapping[str, Any] = field(default_factory=dict)


#: Configurations as published with the weights of SD 1.5 (512x512 pixels) and DiT-XL/2 (256x256 pixels).
LARGE = (
    Spec(
        "SD 1.5 U-Net",
        "UNet2DConditionModel",
        (4, 64, 64),
        torch.float16,
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    ),
    Spec(
        "DiT-XL/2",
        "DiTTransformer2DModel",
        (4, 32, 32),
        torch.bfloat16,
        {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8, "sample_size": 32},
    ),
)
SMALL = (
    Spec(
        "small U-Net",
        "UNet2DConditionModel",
        (4, 32, 32),
        torch.float16,
        {
            "sample_size": 32,
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "block_out_channels": (16, 32, 96, 160),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
    ),
    Spec(
        "small DiT",
        "DiTTransformer2DModel",
        (4, 32, 32),
        torch.bfloat16,
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 8,
            "out_channels": 8,
            "sample_size": 32,
            "patch_size": 4,
        },
    ),
)


@dataclass(frozen=True)
class Network:
    """A built network: ``denoise`` evaluates a conditional and an unconditional half in one call."""

    module: nn.Module
    denoise: Denoise
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def require_diffusers() -> Any:
    """The module.

    Raises:
        ValueError: it is not installed.
    """
    return require("speed", "diffusers")[0]


def build(spec: Spec, device: torch.device) -> Network:
    """``spec`` with random weights on ``device``, guided by ``CFG``, predicting eps.

    Raises:
        ValueError: diffusers is not installed.
    """
    kind = getattr(require_diffusers(), spec.kind)
    torch.manual_seed(0)
    # drawing a billion numbers takes a CPU half a minute; MPS has no float64, which the position embedding needs
    with torch.device(device if device.type == "cuda" else "cpu"):
        module: nn.Module = kind(**spec.config)
    dtype = _dtype(spec, device)
    # not diffusers' own `to`, which warns of layers to be kept in float32 even where there are none
    module = nn.Module.to(module, device=device, dtype=dtype).eval().requires_grad_(False)
    channels = spec.latent[0]
    if spec.kind == "UNet2DConditionModel":
        # convolutions are faster so in half precision
        module = nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
        cond, uncond = torch.randn(2, 1, 77, spec.config["cross_attention_dim"]).to(device, dtype)

        def network(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
            return module(x, time, encoder_hidden_states=context, return_dict=False)[0]
    else:
        cond, uncond = torch.tensor([[_CLASSES // 2], [_CLASSES]], device=device)

        def network(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
            # the other half of the channels is a learned variance
            return module(x, time, class_labels=context, return_dict=False)[0][:, :channels]

    return Network(module, from_network(guided(network, cond, uncond, CFG), "eps", dtype=dtype), dtype)


def _dtype(spec: Spec, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    old = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old or device.type == "mps" else spec.dtype


def stream(module: nn.Module, device: torch.device) -> None:
    """Move the weights to the host for good: each layer's are copied in when it is called and dropped after it.

    The host's copies are pinned for CUDA. Copies and kernels share one stream, so nothing overlaps: the plain form of
    what hosts do when weights do not fit. Buffers, which are small, stay on the device.
    """
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        if own:
            _stream_layer(layer, own, device)


def _stream_layer(layer: nn.Module, own: list[nn.Parameter], device: torch.device) -> None:
    kept = [p.data.to("cpu") for p in own]
    if device.type == "cuda":
        kept = [host.pin_memory() for host in kept]

    def drop(*_: Any) -> None:
        for p, host in zip(own, kept, strict=True):
            p.data = host

    def fetch(*_: Any) -> None:
        for p, host in zip(own, kept, strict=True):
            # on a CPU too: a copy per call
            p.data = host.to(device, non_blocking=device.type == "cuda", copy=True)

    drop()
    layer.register_forward_pre_hook(fetch)
    layer.register_forward_hook(drop, always_call=True)
