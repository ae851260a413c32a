"""A sign that a run may have taken another branch than the sequential sampler, from numbers that a round has anyway.

Where the denoiser decides between two pictures, its slope J = dD/dx is large along their difference g: for two equally
likely ones alpha g^T J g / |g|^2 = |g|^2 / (4 sigma^2) at their midpoint. With ``lambda`` that number, a difference
between two paths grows as exp(integral of (lambda - 1) d log(alpha / sigma)), so a state that was frozen within the
tolerance can end in the other picture. A path decides late, at a large lambda, exactly where it ran near the middle
for long: there the tolerance's error had time to grow. A picture that is settled early shows lambda near 1.

What is measured is a lower bound of lambda, the Rayleigh quotient of each change between two evaluations of a row,

    alpha dx . dD / |dx|^2,

over all rows and rounds. Noise in D hardly enters: it is not aligned with dx. The run is doubtful from ``STEEP`` on.

How ``STEEP`` was chosen, at the balanced preset: six wrong pictures (below 20 dB) of two cases, memorised latents at
CFG 7.5, showed 5.2 to 10.4, the trained demo network at most 3.0 at CFG 4 and 7.5. Then, on seeds not used for that
(quasi-newton, picard, parataa; windows 4, 8, 16, full; DDIM, DDPM, 2M and flow; CFG 1, 4, 7.5; cases drawn at random),
runs above 40 dB called doubtful, and none was below: demo network 0 of 72, mixture 1 of 150, ideal denoiser of 256
rendered pictures 46 of 186, memorised random latents 10 of 186, close-lying ones 51 of 246. Among cases that a loose
run (picard, 2e-2) gets wrong, CFG 4 and 7.5, 8 balanced runs were wrong and showed 5.5 to 7.2: none was missed; most of
the right ones there are called doubtful, too.

It fails where no change between evaluations points along g, or where a loose tolerance lets a path take the other
branch early: at tolerance 1e-2 one of 12 wrong pictures showed 1.1. Picard with eps held on a full window hardly moves
along g: on two pictures it showed less than 0.1 next to the plane between them. It is a sign, not a bound.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .rows import Window
from .solvers.base import Array

#: The quotient from which a run is doubtful.
STEEP = 4.0
#: Changes smaller than this, in units of the row's own size, say more of rounding than of slopes.
SMALLEST = 1e-4


def products(x: Tensor, D: Tensor, before: tuple[Tensor, Tensor], skip: int) -> Tensor:
    """``[2, n, B]`` on the device: |dx|^2 and dx . dD since the round before, whose first ``skip`` rows have left.

    Rows beyond the earlier window are compared with its last row and mean nothing.
    """
    row = torch.arange(skip, skip + len(x), device=x.device).clamp_(max=len(before[0]) - 1)
    dx, dD = x - before[0][row], D - before[1][row]
    return torch.stack([(dx * dx).sum(-1), (dx * dD).sum(-1)])


def quotients(changes: Array, window: Window) -> Array:
    """``[n]`` alpha dx . dD / |dx|^2 of each row, the steepest image's; 0 where the change is too small to tell.

    Args:
        changes: ``[2, n, B]`` |dx|^2 and dx . dD.
        window: these rows.
    """
    squares, crossed = changes
    rows = slice(window.first, window.stop)
    unit = window.run.data_rms * window.run.norm[rows].numpy()
    least = SMALLEST**2 * window.size * unit**2
    told = squares > least[:, None]
    slopes = (crossed / np.where(told, squares, np.inf)).max(1) * window.run.alpha[rows].numpy()
    return np.maximum(slopes, 0.0)


def doubt(steepest: tuple[float, float]) -> str | None:
    """The report's sentence for a run's largest quotient and the sigma where it was seen, None below ``STEEP``."""
    slope, sigma = steepest
    if slope < STEEP:
        return None
    return (
        f"the model decides between pictures near sigma {sigma:.3g} (slope {slope:.1f}, {STEEP:g} is doubtful): "
        "a smaller tolerance, or the exact preset, makes sure"
    )
