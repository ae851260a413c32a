"""The object everything works on: a diffusion sampler written as a triangular system of equations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import check_count

#: A state farther from the start's direction than this share of its size holds noise of the sampler's own.
_STRAY = 1e-3


@dataclass(frozen=True)
class System:
    """A sampler's whole run as data.

        x_k = S_k + sum_{i<k} C[k,i] D_i,   k = 0..K,   D_i = denoised(x_i, sigma_i)

    This is the full-order form of ParaTAA's nonlinear equations (Tang et al., arXiv 2402.09970, section 3) with the
    denoised picture in place of eps. Every fixed-step sampler whose update is affine in the model's outputs fits.

    Attributes:
        S: ``[K+1, B, ...]`` float32 or float64: the states with every D at 0, the sampler's own noise included.
            ``S[0]`` is the noisy start.
        C: ``[K+1, K]``, strictly lower triangular; kept in float64 on the CPU.
        sigmas: ``[K]`` noise level of each evaluation, finite and not negative; kept in float64 on the CPU. They may
            rise or repeat: samplers with several evaluations a step do that.
        sampler: name for reports and trajectories.
        steps: the sampler's steps, at least 1, for reports; ``K`` unless given.
        breaks: rows, ascending and from 1 to K-1, that the model evaluates otherwise than the row before, so that D
            jumps there: where a prompt or a ControlNet begins or ends. Collocation does not interpolate across them.

    Raises:
        ValueError: a type, shape, dtype or value is out of these bounds.
    """

    S: Tensor
    C: Tensor
    sigmas: Tensor
    sampler: str = "custom"
    steps: int | None = None
    breaks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("S", "C", "sigmas"):
            if not isinstance(getattr(self, name), Tensor):
                raise ValueError(f"{name} is a {type(getattr(self, name)).__name__}; a tensor is allowed")
        if self.S.ndim < 2 or self.S.shape[0] < 2 or 0 in self.S.shape:
            raise ValueError(f"S has shape {list(self.S.shape)}; [K+1, B, ...] with K of at least 1 is allowed")
        if self.S.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"S has dtype {self.S.dtype}; torch.float32 or torch.float64 is allowed")
        if not self.S.isfinite().all():
            raise ValueError("S holds NaN or infinity; finite numbers are allowed")
        count = self.S.shape[0] - 1
        for name, value, shape in (("C", self.C, (count + 1, count)), ("sigmas", self.sigmas, (count,))):
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}; {list(shape)} is allowed, as S has {count + 1} rows"
                )
            kept = value.detach().to("cpu", torch.float64, copy=True)
            if not kept.isfinite().all():
                raise ValueError(f"{name} holds {float(kept[~kept.isfinite()][0])}; finite numbers are allowed")
            object.__setattr__(self, name, kept)
        above = self.C.triu().nonzero()
        if len(above):
            k, i = above[0].tolist()
            raise ValueError(
                f"C[{k}, {i}] is {float(self.C[k, i])!r}; only entries below the diagonal may differ from 0"
            )
        if (self.sigmas < 0).any():
            raise ValueError(f"sigmas holds {float(self.sigmas.min())!r}; numbers of at least 0 are allowed")
        object.__setattr__(self, "breaks", self._checked_breaks(count))
        object.__setattr__(self, "steps", count if self.steps is None else check_count("steps", self.steps))

    def _checked_breaks(self, count: int) -> tuple[int, ...]:
        allowed = f"whole numbers from 1 to {count - 1}, ascending, are allowed"
        if not isinstance(self.breaks, (tuple, list)):
            raise ValueError(f"breaks is {self.breaks!r}; {allowed}")
        try:
            breaks = tuple(check_count("breaks", at, 1, count - 1) for at in self.breaks)
        except ValueError:
            breaks = None
        if breaks is None or any(a >= b for a, b in itertools.pairwise(breaks)):
            raise ValueError(f"breaks is {self.breaks!r}; {allowed}")
        return breaks

    @property
    def evaluations(self) -> int:
        """K, the model evaluations of the sequential sampler (``sequential_nfe``)."""
        return self.C.shape[1]

    @cached_property
    def noisy(self) -> bool:
        """Whether the steps add noise of their own: else the states with every D at 0 are multiples of the start."""
        start = self.S[0].flatten()
        size = torch.linalg.vector_norm(start).clamp(min=1e-30)
        way = start / size
        states = [state.flatten() for state in self.S[1:]]
        off = torch.stack([torch.linalg.vector_norm(torch.addcmul(x, way, -(x @ way))) for x in states])
        allowed = _STRAY * torch.stack([torch.linalg.vector_norm(x) for x in states]).clamp(min=1e-3 * float(size))
        return bool((off > allowed).any())
