"""The result's fidelity in dB, estimated without a reference."""

from __future__ import annotations

import math

from torch import Tensor

from .impact import Impact
from .nodes import Ground, Nodes


def estimate_db(ground: Ground, nodes: Nodes, seen: Impact, picture: Tensor) -> float:
    """PSNR that the picture is expected to have against the sequential one, for its own range."""
    error = math.sqrt(float((seen.again**2).sum()) + float((seen.gaps**2).sum()))
    peak = float(picture.max() - picture.min())
    return 20 * math.log10(max(peak, 1e-30) / max(error, 1e-30))
