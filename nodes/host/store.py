"""Trajectories kept under a name between runs, bounded, on the CPU.

Other state of the process: what is known of models (``latency.KNOWN``) and the list of files (``listing``).
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from ...paratafusion_core import Trajectory
from .graph import UNKNOWN

#: The client that queued the graph, and the name.
Key = tuple[str, str]
#: Losses that are remembered; one that is older than all of them counts as none.
_LOSSES = 4096


@dataclass(frozen=True)
class Entry:
    """A kept trajectory and the hash of the problem that made it."""

    trajectory: Trajectory
    problem: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.trajectory.nbytes


class Store:
    """At most ``entries`` trajectories and ``max_bytes`` of them; the least recently used go first."""

    def __init__(self, entries: int = 16, max_bytes: int = 1 << 30) -> None:
        self._entries, self._max_bytes = entries, max_bytes
        self._kept: OrderedDict[Key, Entry] = OrderedDict()
        self._lost: OrderedDict[tuple[Key, str], int] = OrderedDict()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    @property
    def bounds(self) -> str:
        """What fits, in words."""
        return f"at most {self._entries} trajectories and {self._max_bytes / 1e6:.0f} MB"

    def keep(self, key: Key, entry: Entry) -> list[Key]:
        """Keep ``entry`` under ``key`` instead of what was there; returns what had to go, the oldest first.

        An unknown problem becomes one of its own: nothing says that it is the one before.

        Raises:
            ValueError: it alone is larger than the store.
        """
        if entry.size > self._max_bytes:
            raise ValueError(f"trajectory has {entry.size} bytes; at most {self._max_bytes} can be kept between runs")
        gone: list[Key] = []
        with self._lock:
            if entry.problem == UNKNOWN:
                entry = replace(entry, problem=f"{UNKNOWN} {next(self._numbers)}")
            before = self._kept.pop(key, None)
            if before is not None and before.problem != entry.problem:
                self._lose(key, before)
            self._kept[key] = entry
            while len(self._kept) > self._entries or sum(e.size for e in self._kept.values()) > self._max_bytes:
                oldest, dropped = self._kept.popitem(last=False)
                self._lose(oldest, dropped)
                gone.append(oldest)
        return gone

    def _lose(self, key: Key, entry: Entry) -> None:
        self._lost.pop((key, entry.problem), None)
        self._lost[key, entry.problem] = next(self._numbers)
        if len(self._lost) > _LOSSES:
            self._lost.popitem(last=False)

    def last_loss(self, client: str, name: str | None, problem: str) -> int:
        """Number of the last time that ``client`` lost this problem under ``name`` (None: any); 0 if it never did.

        It changes when the entry is dropped or replaced, and not when it is kept again.
        """
        with self._lock:
            lost = (n for ((c, own), p), n in self._lost.items() if (c, p) == (client, problem) and name in (None, own))
            return max(lost, default=0)

    def recall(self, key: Key) -> Entry | None:
        """What is kept under ``key``, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def problems(self, client: str) -> list[tuple[str, str]]:
        """Name and problem of all that is kept for ``client``, in the order of the names."""
        with self._lock:
            return sorted((name, entry.problem) for (owner, name), entry in self._kept.items() if owner == client)


STORE = Store()
