"""ParaTAFusion's engine: diffusion samplers solved in parallel, as a triangular system of nonlinear equations."""

from __future__ import annotations

from . import schemes
from .errors import NotFinite
from .options import Options
from .plan import Machine
from .report import Report
from .solve import Progress, Solution, Status, solve
from .system import System
from .trajectory import Trajectory, load_trajectory, save_trajectory

__version__ = "0.1.0"

__all__ = [
    "Machine",
    "NotFinite",
    "Options",
    "Progress",
    "Report",
    "Solution",
    "Status",
    "System",
    "Trajectory",
    "load_trajectory",
    "save_trajectory",
    "schemes",
    "solve",
]
