"""A closed-form problem that memorises: the ideal denoiser of a small set of rendered pictures.

Near the noise levels where the posterior decides between two pictures a small change of the state decides the outcome:
the hardest case for any solver that stops at a tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoisers import Denoise
from ..devices import double, send
from ..errors import check_count, check_real
from .prompt import SHAPES
from .shapes import SIDE, render


@dataclass(frozen=True)
class Ideal:
    """The exact denoiser of a finite set: ``D(x) = sum_j w_j(x) m_j``, ``w_j`` the posterior of picture j.

    For ``x = alpha m_j + sigma eps`` the posterior is ``softmax_j((alpha x . m_j - alpha^2 |m_j|^2 / 2) / sigma^2)``
    (Karras et al., arXiv 2206.00364, appendix B.3).

    Attributes:
        images: ``[N, d]`` float64 in [-1, 1]. labels: ``[N]`` class of each: the shape that it shows.
        shape: of one picture, d numbers.
    """

    images: Tensor
    labels: Tensor
    shape: tuple[int, ...] = (3, SIDE, SIDE)

    @staticmethod
    def make(count: int = 256, seed: int = 0) -> Ideal:
        """``count`` pictures as the demo network was trained on, drawn from ``seed``.

        Raises:
            ValueError: ``count`` is so small that a shape is missing.
        """
        check_count("count", count)
        batch = render(count, torch.Generator().manual_seed(seed))
        missing = [name for i, name in enumerate(SHAPES) if not (batch.shape == i).any()]
        if missing:
            raise ValueError(f"count is {count}; a number that shows every shape is allowed, {missing[0]} is missing")
        return Ideal(batch.images.flatten(1).double(), batch.shape)

    @property
    def classes(self) -> int:
        return len(SHAPES)

    @property
    def data_rms(self) -> float:
        """Root mean square of the pictures."""
        return float((self.images**2).mean().sqrt())

    def label_of(self, prompt: str) -> int:
        """The class of the first shape that a text names; of any other text, one of the classes."""
        words = prompt.strip().lower().split()
        named = [SHAPES.index(word) for word in words if word in SHAPES]
        return named[0] if named else sum(prompt.encode()) % self.classes

    def denoiser(self, label: int, cfg: float = 1.0, flow: bool = False) -> Denoise:
        """``denoise(x [W, B, *shape], sigma [W])`` for a class, guided: ``D_all + cfg (D_class - D_all)``.

        Computed in float64 (of MPS on the CPU) and returned like x; with ``flow``, x is ``(1 - sigma) x0 + sigma eps``.

        Raises:
            ValueError: ``cfg`` is not finite, or there is no such class.
        """
        check_real("cfg", cfg)
        if not 0 <= label < self.classes:
            raise ValueError(f"label is {label!r}; a whole number from 0 to {self.classes - 1} is allowed")
        chosen = self.labels == label
        half = (self.images**2).sum(1) / 2

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            flat = double(x.flatten(2))
            images, norms, own = (t.to(flat.device) for t in (self.images, half, chosen))
            level = double(sigma).to(flat.device).reshape(-1, 1, 1)
            alpha = 1 - level if flow else torch.ones_like(level)
            score = (alpha * (flat @ images.T) - alpha**2 * norms) / level.clamp(min=1e-12) ** 2
            weights = torch.softmax(score.masked_fill(~own, -torch.inf), -1)
            if cfg != 1.0:
                whole = torch.softmax(score, -1)
                weights = whole + cfg * (weights - whole)
            return send(weights @ images, x).reshape(x.shape)

        return denoise
