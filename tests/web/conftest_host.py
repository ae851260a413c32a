"""The host tests' own set-up, for tests of this folder that need the host's modules in the process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "host_conftest", Path(__file__).resolve().parents[1] / "host" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
if "paratafusion_pack" not in sys.modules:  # the host tests of the same session have done it
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
