"""``paratafusion bench``: what the solvers cost and how near they come, against each other and against others.

A suite is a module of this package with ``run(arguments: argparse.Namespace) -> None``, which reads the command line's
``suite, seeds, out, json, resume, device, model`` and checks them before any work. It is imported when it is asked for.
"""

from __future__ import annotations

#: Suite -> the module of this package that runs it.
SUITES = {
    "quick": "grid",
    "paper": "grid",
    "rivals": "rivals",
    "targets": "targets",
    "peers": "peers",
    "speed": "speed",
    "warm": "warm",
}
