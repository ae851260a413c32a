"""``paratafusion bench``: hands its arguments to the suite asked for."""

from __future__ import annotations

import argparse
import importlib

from ..bench import SUITES


def run(arguments: argparse.Namespace) -> None:
    """The command. Raises ValueError on bad input, before anything is written."""
    importlib.import_module(f"...bench.{SUITES[arguments.suite].module}", __name__).run(arguments)
