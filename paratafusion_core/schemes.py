"""Samplers written down as triangular systems: DDIM, DDPM, Euler, DPM-Solver++ 2M and its SDE form.

All work on the host's x: VE-scaled, ``x = x0 + sigma eps``, for eps-, v- and x0-predicting models, and with
``flow=True`` on ``x = (1 - sigma) x0 + sigma eps``. Each is a local recurrence

    y_{k+1} = A_k y_k + B0_k D_k + B1_k D_{k-1} + c_k xi_k

unrolled in float64, where the huge sigmas of a zero-terminal-SNR schedule would cancel in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import double, send
from .errors import check_real
from .system import System


def ddim(x0: Tensor, sigmas: Tensor, *, eta: float = 0.0, noise: Tensor | None = None, flow: bool = False) -> System:
    """DDIM (arXiv 2010.02502, equation 12): deterministic at ``eta`` 0, DDPM's noise at 1.

    Args:
        x0: ``[B, ...]`` the noisy start at ``sigmas[0]``, float32 or float64.
        sigmas: ``[K+1]`` strictly falling; the last may be 0.
        eta: of at least 0 and at most 1.
        noise: ``[K, B, ...]`` unit normals, needed when ``eta`` is above 0.
        flow: the states are flow-matching states.

    Raises:
        ValueError: an input is out of bounds.
    """
    return _ddim("ddim", x0, sigmas, eta, noise, flow)


def ddpm(x0: Tensor, sigmas: Tensor, *, noise: Tensor | None = None, flow: bool = False) -> System:
    """Ancestral sampling (arXiv 2006.11239): :func:`ddim` at eta 1. Arguments and errors as there."""
    return _ddim("ddpm", x0, sigmas, 1.0, noise, flow)


def euler(x0: Tensor, sigmas: Tensor, *, flow: bool = False) -> System:
    """Euler on the probability-flow ODE (arXiv 2206.00364, algorithm 1 without its correction).

    In VE-scaled states, which stand for VE and VP models alike, and in flow states the step is
    ``x + (sigma' - sigma) (x - D) / sigma``. Arguments and errors as in :func:`ddim`.
    """
    return _ddim("euler", x0, sigmas, 0.0, None, flow)


def dpmpp_2m(x0: Tensor, sigmas: Tensor, *, flow: bool = False) -> System:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2), first order on its first step and on a step to 0.

    Arguments and errors as in :func:`ddim`.
    """
    return _dpmpp("dpmpp_2m", x0, sigmas, 0.0, None, flow)


def dpmpp_2m_sde(
    x0: Tensor, sigmas: Tensor, *, eta: float = 1.0, noise: Tensor | None = None, flow: bool = False
) -> System:
    """SDE-DPM-Solver++ (2M) (arXiv 2211.01095; k-diffusion's midpoint form); ``eta`` scales its noise, 0 to 1.

    Arguments and errors as in :func:`ddim`.
    """
    return _dpmpp("dpmpp_2m_sde", x0, sigmas, eta, noise, flow)


def _ddim(name: str, x0: Tensor, sigmas: Tensor, eta: float, noise: Tensor | None, flow: bool) -> System:
    sigmas, alphas, ratio = _levels(x0, sigmas, flow)
    now, then = sigmas[:-1], sigmas[1:]
    _check_noise(x0, sigmas, eta, noise)
    up = eta * then * (1 - ratio**2).sqrt()
    A = (then**2 - up**2).clamp(min=0).sqrt() / now
    B0 = alphas[1:] - alphas[:-1] * A
    return _unroll(name, x0, sigmas, A, B0, torch.zeros_like(A), up, noise)


def _dpmpp(name: str, x0: Tensor, sigmas: Tensor, eta: float, noise: Tensor | None, flow: bool) -> System:
    sigmas, alphas, ratio = _levels(x0, sigmas, flow)
    now, then = sigmas[:-1], sigmas[1:]
    _check_noise(x0, sigmas, eta, noise)
    h = -ratio.log()  # lambda' - lambda; infinite on a step to 0 and from a flow's pure noise
    damp = torch.exp(-eta * h) if eta > 0 else torch.ones_like(h)
    A = then / now * damp
    pull = alphas[1:] * (1 - ratio * damp)
    extrapolate = torch.zeros_like(h)
    extrapolate[1:] = torch.where(h[1:].isfinite() & h[:-1].isfinite(), h[1:] / (2 * h[:-1]), 0.0)
    c = then * (1 - damp**2).clamp(min=0).sqrt()
    return _unroll(name, x0, sigmas, A, pull * (1 + extrapolate), -pull * extrapolate, c, noise)


def _levels(x0: Tensor, sigmas: Tensor, flow: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Checked sigmas and alphas ``[K+1]``, and ``exp(lambda - lambda')`` of each step ``[K]``, in float64."""
    if not isinstance(x0, Tensor):
        raise ValueError(f"x0 is a {type(x0).__name__}; a tensor [B, ...] is allowed")
    if x0.ndim < 1 or x0.numel() == 0 or x0.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x0 is {x0.dtype} of shape {list(x0.shape)}; [B, ...] in float32 or float64 is allowed")
    try:
        sigmas = torch.as_tensor(sigmas, device="cpu").detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"sigmas is {sigmas!r:.80}; [K+1] falling numbers are allowed") from None
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {list(sigmas.shape)}; [K+1] with at least 2 entries is allowed")
    if not sigmas.isfinite().all():
        raise ValueError(f"sigmas holds {float(sigmas[~sigmas.isfinite()][0])}; finite numbers are allowed")
    rising = (sigmas[1:] >= sigmas[:-1]).nonzero()
    if len(rising):
        k = int(rising[0])
        pair = f"{float(sigmas[k])!r} and then {float(sigmas[k + 1])!r} at {k}"
        raise ValueError(f"sigmas holds {pair}; strictly falling numbers are allowed")
    if sigmas[-1] < 0 or (flow and sigmas[0] > 1):
        bad = float(sigmas[-1] if sigmas[-1] < 0 else sigmas[0])
        raise ValueError(f"sigmas holds {bad!r}; numbers of at least 0{' and at most 1' if flow else ''} are allowed")
    alphas = 1 - sigmas if flow else torch.ones_like(sigmas)
    ratio = alphas[:-1] * sigmas[1:] / (alphas[1:] * sigmas[:-1])
    return sigmas, alphas, ratio


def _check_noise(x0: Tensor, sigmas: Tensor, eta: float, noise: Tensor | None) -> None:
    check_real("eta", eta, low=0.0)
    if eta > 1:
        raise ValueError(f"eta is {eta!r}; numbers from 0 to 1 are allowed")
    wanted = [len(sigmas) - 1, *x0.shape]
    if noise is None:
        if eta > 0:
            raise ValueError(f"noise is None; unit normals of shape {wanted} are needed as eta is {eta:g}")
    elif not isinstance(noise, Tensor):
        raise ValueError(f"noise is a {type(noise).__name__}; a tensor of shape {wanted} is allowed")
    elif list(noise.shape) != wanted:
        raise ValueError(f"noise has shape {list(noise.shape)}; {wanted} is allowed")
    elif not noise.isfinite().all():
        raise ValueError("noise holds NaN or infinity; finite numbers are allowed")


def _unroll(
    name: str, x0: Tensor, sigmas: Tensor, A: Tensor, B0: Tensor, B1: Tensor, c: Tensor, noise: Tensor | None
) -> System:
    if not x0.isfinite().all():
        raise ValueError("x0 holds NaN or infinity; finite numbers are allowed")
    K = len(sigmas) - 1
    C = torch.zeros(K + 1, K, dtype=torch.float64, device="cpu")
    S = x0.new_empty(K + 1, *x0.shape)
    y = double(x0)
    S[0] = x0
    for k in range(K):
        C[k + 1] = float(A[k]) * C[k]
        C[k + 1, k] += B0[k]
        if k > 0:
            C[k + 1, k - 1] += B1[k]
        y = float(A[k]) * y
        if noise is not None and c[k] != 0:
            y = y + float(c[k]) * noise[k].to(y.device, torch.float64)
        S[k + 1] = send(y, S)
    return System(S, C, sigmas[:-1], sampler=name)
