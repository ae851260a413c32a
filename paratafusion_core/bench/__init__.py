"""``paratafusion bench``: what the solvers cost and how near they come, against each other and against others.

A suite is a module of this package with ``run(arguments: argparse.Namespace) -> None``, which reads the command line's
``suite, seeds, out, json, resume, device, model`` and checks them before any work. It is imported when it is asked for.
"""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    """The module of this package that runs a suite, and what it is, in a line."""

    module: str
    about: str


SUITES = {
    "quick": Suite("grid", "a few runs of each model with quasi-newton, parataa and picard, in minutes; 8 seeds"),
    "paper": Suite("grid", "samplers x steps x CFG x windows x solvers, collocation too, in hours; 8 seeds"),
    "rivals": Suite("rivals", "fewer evaluations: collocation, fewer steps, other solvers, skipped steps; 16 seeds"),
    "targets": Suite("targets", "collocation towards a fidelity in dB, and how right its estimate is; 12 seeds"),
    "peers": Suite("peers", "diffusers' ParaDiGMS on the same network, on the CPU (needs the extra bench); 8 seeds"),
    "speed": Suite("speed", "seconds of large networks, small ones on a CPU (needs the extra bench); 16 seeds"),
    "warm": Suite("warm", "edits that go on from the picture before, against starting over; 8 seeds"),
}
