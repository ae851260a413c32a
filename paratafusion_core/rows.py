"""The rows of a window: their equations and scales as plain float64 numbers on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .system import System

#: The rms of data for which tolerances are as they were measured, latents and pictures in [-1, 1]. Data of another rms,
#: and the noise with them, are taken as if they were scaled to the nearer end: the same run in other units is the same.
_USUAL = 0.5, 2.0


@dataclass(frozen=True)
class Scales:
    """Per-row constants of a run, each ``[K]`` in float64.

    Attributes:
        sigma: noise level.
        alpha: signal level: 1 (VE-scaled x) or 1 - sigma (flow).
        norm: n = sqrt(alpha^2 + (sigma / unit)^2), the size of x for unit data.
        gaussian: the slope dD/dx of a Gaussian denoiser, alpha s^2 / (alpha^2 s^2 + sigma^2).
        eps: the slope that holds eps, 1 / alpha (0 where alpha is 0: a flow's pure noise).
        spread: standard deviation of DDPM's noise into this row, over the unit: ParaTAA's g.
        data_rms: s. unit: the rms from which noise is counted, 1 for data of an rms of ``_USUAL``.
    """

    sigma: Tensor
    alpha: Tensor
    norm: Tensor
    gaussian: Tensor
    eps: Tensor
    spread: Tensor
    data_rms: float
    unit: float = 1.0

    @staticmethod
    def of(system: System, flow: bool, data_rms: float) -> Scales:
        """The constants of ``system``.

        Raises:
            ValueError: a flow system has a sigma above 1.
        """
        sigma = system.sigmas
        if flow and float(sigma.max()) > 1:
            raise ValueError(f"sigmas holds {float(sigma.max())!r}; at most 1 is allowed as flow is on")
        alpha = 1 - sigma if flow else torch.ones_like(sigma)
        unit = data_rms / min(max(data_rms, _USUAL[0]), _USUAL[1])
        signal = (alpha * data_rms) ** 2
        gaussian = alpha * data_rms**2 / (signal + sigma**2).clamp(min=1e-300)
        eps = torch.where(alpha > 0, 1 / alpha.clamp(min=1e-300), 0.0)
        ve = torch.where(alpha > 0, sigma / alpha.clamp(min=1e-300), torch.inf)
        before = torch.cat([ve.new_tensor([torch.inf]), ve[:-1]])
        ratio = torch.where(before.isinf(), 0.0, ve / before).clamp(max=1)
        spread = sigma / unit * (1 - ratio**2).sqrt()
        norm = (alpha**2 + (sigma / unit) ** 2).sqrt()
        return Scales(sigma, alpha, norm, gaussian, eps, spread, data_rms, unit)

    def rows(self, first: int, stop: int) -> Scales:
        """The constants of rows ``first..stop-1``."""
        cut = slice(first, stop)
        return Scales(
            self.sigma[cut],
            self.alpha[cut],
            self.norm[cut],
            self.gaussian[cut],
            self.eps[cut],
            self.spread[cut],
            self.data_rms,
            self.unit,
        )

    @property
    def noise(self) -> Tensor:
        """``[K]`` noise in units of the data: sigma / (alpha s), whatever the kind of model."""
        return self.sigma / self.alpha.clamp(min=1e-6) / self.data_rms

    @property
    def allowed(self) -> Tensor:
        """The freeze rule's unit: rms(delta_k) / s of ``tol`` times this is allowed, n sqrt(alpha / n).

        The geometric mean of a constant tolerance on x and on the VP-scaled x; measured against both (DESIGN). Where
        alpha is 0 (a flow's pure noise) the row is the exact start.
        """
        return (self.alpha.clamp(min=0) * self.norm).sqrt()


@dataclass(frozen=True)
class Window:
    """Rows ``first..stop-1`` of a run, as a solver sees them.

    Attributes:
        first, stop: the row range; row ``first`` holds the exact state.
        C: ``[n, n]`` the equations among these rows, strictly lower triangular, float64 on the CPU.
        run: the constants of all the run's rows.
        size: numbers in one image's state (d).
        matrices: what the solver worked out of the run's equations before it began.
    """

    first: int
    stop: int
    C: Tensor
    run: Scales
    size: int
    matrices: Any = None

    def __len__(self) -> int:
        return self.stop - self.first

    @cached_property
    def scales(self) -> Scales:
        """The rows' constants."""
        return self.run.rows(self.first, self.stop)
