"""The result's fidelity in dB, estimated without a reference."""

from __future__ import annotations

import math

from torch import Tensor

from .impact import Impact


def estimate_db(seen: Impact, picture: Tensor) -> float:
    """PSNR that ``picture`` ``[B, d]`` is expected to have against the sequential one, for its own range.

    The error is taken to be the expected effects of evaluating the moved nodes again and of halving the gaps, each
    added up as independent. More numbers of the run (single largest effects, the pictures' changes from round to
    round, the rows' share) in a linear fit gain nothing on held-out prompts: what is missing is how much a run
    amplifies an early error, which its evaluated rows do not show.
    """
    error = float(seen.again.square().sum().sqrt() + seen.gaps.square().sum().sqrt())
    peak = float(picture.max() - picture.min())
    return 20 * math.log10(max(peak, 1e-30) / max(error, 1e-30))
