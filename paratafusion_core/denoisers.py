"""Any noise-, v-, x0- or flow-predicting model as the engine's ``denoise(x [W, B, ...], sigma [W])``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import check_choice, check_real
from .schedules import timestep_of

Denoise = Callable[[Tensor, Tensor], Tensor]
#: What a network computes: ``(x [N, ...], time [N]) -> [N, ...]``.
Network = Callable[[Tensor, Tensor], Tensor]
PREDICTIONS = ("eps", "v", "x0", "flow")


def answer(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """What ``denoise`` makes of ``x`` ``[n, B, ...]`` at ``sigma`` ``[n]``, in x's dtype; nothing is shared with it.

    Raises:
        ValueError: it returned something else than floats of its input's shape.
    """
    # models scale their input in place: give them copies
    D = _returned("denoise", denoise(x.clone(), sigma.clone()), x)
    # a copy: the model may write its next answer into the same tensor
    return torch.empty_like(x).copy_(D)


def _returned(whose: str, D: Any, x: Tensor) -> Tensor:
    """``D``, which ``whose`` call with ``x`` returned; ValueError where it is not floats of x's shape."""
    if not isinstance(D, Tensor) or D.shape != x.shape or not D.is_floating_point():
        found = f"{D.dtype} of shape {list(D.shape)}" if isinstance(D, Tensor) else type(D).__name__
        raise ValueError(f"{whose} returned {found}; floats of shape {list(x.shape)}, its input's, are allowed")
    return D


def as_flow(denoise: Denoise) -> Denoise:
    """A VE-scaled ``denoise`` for flow states ``(1 - sigma) x0 + sigma eps``, which is exact.

    Over 1 - sigma these are VE states of noise sigma / (1 - sigma); at pure noise, where the state says nothing of the
    picture, a level far beyond every schedule stands for infinity.
    """

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = (1 - sigma).clamp(min=1e-4)
        return denoise(x / alpha.reshape(-1, *[1] * (x.ndim - 1)).to(x), sigma / alpha)

    return call


def from_network(
    network: Network,
    prediction: str,
    *,
    dtype: torch.dtype | None = None,
    time: Callable[[Tensor], Tensor] | None = None,
) -> Denoise:
    """Wrap a network that takes scaled pictures and times.

    With alpha = 1 / sqrt(1 + sigma^2), the network is shown ``alpha x`` and predicts ``eps``, ``v = alpha eps - alpha
    sigma x0`` or ``x0`` of a VE-scaled x; for ``flow`` it is shown x itself and predicts ``eps - x0``.

    Args:
        network: the rows of a call are ``[w, b]`` flattened, b fastest; it must treat them independently.
        prediction: one of ``PREDICTIONS``.
        dtype: of what the network is shown (float16, bfloat16, ..); states and the formulas keep the state's dtype.
        time: sigma -> the network's time, float64 in and out; SD's timesteps by default, sigma itself for flow.

    Raises:
        ValueError: ``prediction`` is unknown. When called, the result raises it where the network returns something
            else than floats of its input's shape, or the contexts of :func:`guided` are not those of the images.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    clock = time or ((lambda sigma: sigma) if prediction == "flow" else timestep_of)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        W, B = x.shape[:2]
        if isinstance(network, _Guided):
            network.check(B)
        # float64 where there is one; on the device, so that no synchronisation is needed
        level = sigma.detach().to(x.device, torch.float32 if x.device.type == "mps" else torch.float64)
        alpha = torch.ones_like(level) if prediction == "flow" else (1 + level**2).rsqrt()

        def per_row(value: Tensor) -> Tensor:
            return value.to(x.device, x.dtype).reshape(W, *[1] * (x.ndim - 1))

        shown = (x * per_row(alpha)).flatten(0, 1).to(dtype or x.dtype)
        when = clock(level).repeat_interleave(B).to(x.device, torch.float32)
        out = _returned("network", network(shown, when), shown).to(x.dtype).unflatten(0, (W, B))
        if prediction == "x0":
            return out
        if prediction == "v":
            return x * per_row(alpha**2) - out * per_row(alpha * level)
        return x - out * per_row(level)

    return denoise


def guided(network: Callable[[Tensor, Tensor, Tensor], Tensor], cond: Tensor, uncond: Tensor, scale: float) -> Network:
    """Classifier-free guidance (arXiv 2207.12598): ``u + scale (c - u)``, both halves in one call.

    Args:
        network: ``(x [N, ...], time [N], context [N, ...])``.
        cond, uncond: contexts ``[B, ...]`` of the images of a batch, or ``[1, ...]`` for all of them; rows repeat them
            with b fastest.
        scale: guidance scale; at 1 the unconditional half is not computed.

    Raises:
        ValueError: ``scale`` is not finite.
    """
    return _Guided(network, cond, uncond, check_real("cfg", scale))


@dataclass(frozen=True)
class _Guided:
    """What :func:`guided` returns: a :data:`Network` that knows how many images its contexts are of."""

    network: Callable[[Tensor, Tensor, Tensor], Tensor]
    cond: Tensor
    uncond: Tensor
    scale: float

    def check(self, images: int) -> None:
        """Raises ValueError where rows of so many images would meet other images' contexts."""
        for name, context in (("cond", self.cond), ("uncond", self.uncond)):
            if len(context) not in (1, images):
                raise ValueError(f"{name} has {len(context)} contexts; 1 or {images}, one for each image, is allowed")

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        c = self._for_rows(self.cond, x)
        if self.scale == 1.0:
            return self.network(x, time, c)
        both, contexts = torch.cat([x, x]), torch.cat([c, self._for_rows(self.uncond, x)])
        yes, no = _returned("network", self.network(both, torch.cat([time, time]), contexts), both).chunk(2)
        return no + self.scale * (yes - no)

    @staticmethod
    def _for_rows(context: Tensor, x: Tensor) -> Tensor:
        return context.to(x.device).repeat(len(x) // len(context), *[1] * (context.ndim - 1))
