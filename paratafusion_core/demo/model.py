"""The trained demo network as a ready ``denoise`` function, on SD's schedule or as a flow."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..denoisers import Denoise, as_flow, from_network, guided
from ..errors import check_real
from .network import DemoNet
from .prompt import encode
from .shapes import SIDE

WEIGHTS = Path(__file__).with_name("demo.safetensors")
#: rms of the rendered pictures in [-1, 1], measured over 8192 of them.
DATA_RMS = 0.57
SHAPE = (3, SIDE, SIDE)


def load(path: Path = WEIGHTS, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> DemoNet:
    """The network with the weights of ``path``, in eval mode, without gradients.

    Args:
        path: a safetensors file of ``paratafusion train-demo``; the embedded one by default.
        dtype: of the weights in memory; the file's are float16.

    Raises:
        ValueError: there is no such file, or it does not hold this network.
    """
    if not path.is_file():
        raise ValueError(f"weights {path.name} is no file; the file of `paratafusion train-demo` is allowed")
    with torch.device("cpu"):  # whatever the default device
        network = DemoNet()
    try:
        network.load_state_dict(load_file(str(path)))
    except (SafetensorError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"weights {path.name} do not fit ({why}); the file of `paratafusion train-demo` is allowed"
        ) from None
    # convolutions run 1.5 times as fast on a CPU with the channels last
    network = network.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def denoiser(network: DemoNet, prompt: str, cfg: float = 4.0, batch: int = 1, flow: bool = False) -> Denoise:
    """``denoise(x [W, B, 3, 32, 32], sigma [W])`` for a prompt, guided by ``cfg``.

    With ``flow`` x is a flow-matching state; it is rescaled to the VP state of the same signal-to-noise ratio, which
    is exact.

    Raises:
        ValueError: the prompt has an unknown word, or ``cfg`` is not finite.
    """
    check_real("cfg", cfg)
    context = encode(prompt).expand(batch, -1)
    dtype = next(network.parameters()).dtype
    call = guided(network, context, torch.zeros_like(context), cfg)
    ve = from_network(call, "v", dtype=dtype)
    return as_flow(ve) if flow else ve
