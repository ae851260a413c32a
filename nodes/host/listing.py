"""Files below a folder, for a list that the host asks for again and again: several times for every queued graph."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

#: Seconds for which a folder that has just changed is looked at again, as some file systems tell times no finer, and
#: after which all is walked anew, as some do not tell of new files.
_RECENT, _OLD = 3.0, 60.0


class Listing:
    """Walks a folder again only once it, or a folder inside it, has changed."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._known: dict[Path, tuple[float, dict[str, int], list[str]]] = {}
        self._lock = threading.Lock()

    def of(self, base: Path) -> list[str]:
        """Paths of the files below ``base``, relative to it, with forward slashes and in order; none without it."""
        with self._lock:
            now = time.time()
            walked, stamps, files = self._known.get(base, (-_OLD, {}, []))
            changed = any(_changed(folder) != stamp for folder, stamp in stamps.items())
            if changed or not stamps or not 0 <= now - walked < _OLD:
                stamps, files = self._walk(base)
                newest = max(stamps.values(), default=0) / 1e9
                self._known[base] = (now, stamps if now - newest > _RECENT else {}, files)
            return list(files)

    def _walk(self, base: Path) -> tuple[dict[str, int], list[str]]:
        stamps: dict[str, int] = {}
        files: list[str] = []
        for folder, _, names in os.walk(base):
            stamps[folder] = _changed(folder)
            inside = (Path(folder, name) for name in names if name.endswith(self._suffix))
            files += [path.relative_to(base).as_posix() for path in inside if path.is_file()]
        return stamps, sorted(files)


def _changed(folder: str) -> int:
    """When files of ``folder`` came or went, in nanoseconds; -1 if it is gone."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1
