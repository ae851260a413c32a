"""A closed-form problem: a guided Gaussian mixture with many modes, classes and a power-law spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoisers import Denoise
from ..errors import check_count, check_real


@dataclass(frozen=True)
class Mixture:
    """Modes ``m_j`` with a shared diagonal covariance ``Lambda``; each class owns an equal share of the modes.

    The denoiser is exact: ``D(x) = sum_j w_j(x) (m_j + Lambda / (Lambda + sigma^2) (x - m_j))`` with ``w_j`` the
    posterior of mode j under ``N(m_j, Lambda + sigma^2)``.

    Attributes:
        means: ``[M, d]`` float64. variances: ``[d]`` float64. labels: ``[M]`` class of each mode.
        shape: of one picture, d numbers.
    """

    means: Tensor
    variances: Tensor
    labels: Tensor
    shape: tuple[int, ...]

    @staticmethod
    def make(
        modes: int = 64, classes: int = 8, shape: tuple[int, ...] = (4, 8, 8), power: float = 1.0, seed: int = 0
    ) -> Mixture:
        """A mixture whose data has rms 1, three quarters of its variance between modes; both spectra fall as i^-power.

        Raises:
            ValueError: a count is below 1 or ``classes`` does not divide ``modes``.
        """
        check_count("modes", modes)
        check_count("classes", classes)
        check_real("power", power)
        if modes % classes:
            raise ValueError(f"classes is {classes}; a divisor of modes, {modes}, is allowed")
        size = math.prod(shape)
        spectrum = torch.arange(1, size + 1, dtype=torch.float64, device="cpu") ** -power
        spectrum = spectrum / spectrum.mean()
        generator = torch.Generator().manual_seed(seed)
        unit = torch.randn(modes, size, generator=generator, dtype=torch.float64, device="cpu")
        means = unit * (0.75 * spectrum).sqrt()
        return Mixture(means, 0.25 * spectrum, torch.arange(modes, device="cpu") % classes, shape)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def data_rms(self) -> float:
        """Root mean square of clean data, in closed form."""
        return float(((self.means**2).mean() + self.variances.mean()).sqrt())

    def label_of(self, prompt: str) -> int:
        """The class that a text stands for: any text will do."""
        return sum(prompt.strip().lower().encode()) % self.classes

    def denoiser(self, label: int, cfg: float = 1.0) -> Denoise:
        """``denoise(x [W, B, *shape], sigma [W])`` for a class, guided: ``D_all + cfg (D_class - D_all)``.

        Each picture is computed by itself, by operations of one shape: the batch never changes a bit.

        Raises:
            ValueError: ``cfg`` is not finite, or there is no such class.
        """
        check_real("cfg", cfg)
        if not 0 <= label < self.classes:
            raise ValueError(f"label is {label!r}; a whole number from 0 to {self.classes - 1} is allowed")
        off = torch.where(self.labels == label, 0.0, -torch.inf).double()

        def one(x: Tensor, sigma: Tensor) -> Tensor:
            means, variances, exclude = (t.to(x.device, x.dtype) for t in (self.means, self.variances, off))
            total = variances + sigma**2
            apart = x - means
            score = -0.5 * (apart**2 / total).sum(1)
            shrunk = variances / total

            def mean(weights: Tensor) -> Tensor:
                centre = (weights[:, None] * means).sum(0)
                return centre + shrunk * (x - centre)

            chosen = mean(torch.softmax(score + exclude, 0))
            if cfg == 1.0:
                return chosen
            whole = mean(torch.softmax(score, 0))
            return whole + cfg * (chosen - whole)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            W, B = x.shape[:2]
            flat = x.reshape(W, B, -1)
            rows = [one(flat[w, b], sigma[w]) for w in range(W) for b in range(B)]
            return torch.stack(rows).reshape(x.shape)

        return denoise
