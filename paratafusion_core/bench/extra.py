"""The libraries of the extra ``bench``, which some suites need."""

from __future__ import annotations

import importlib
from typing import Any


def require(suite: str, *names: str) -> list[Any]:
    """The modules ``names``, for ``suite``.

    Raises:
        ValueError: one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        what = f"{' and '.join(names)} of the extra paratafusion[bench]"
        how = "`pip install -e '.[bench]'` on Python 3.11 or newer"
        raise ValueError(f"suite is {suite!r}; it needs {what}, as of {how} ({error})") from None
