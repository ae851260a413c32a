"""How often the widget of a node is told something, whatever number of runs tell it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

#: Seconds between two messages; with one a second that need not wait, at most ten go in any second.
PERIOD = 0.112
_EXEMPT = 1.0
#: Widgets whose last message is remembered.
_WIDGETS = 256
Later = Callable[[float, Callable[[], None]], Any]


def _in_thread(seconds: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


class Pace:
    """Lets messages to one widget go, holds back those that must be seen, and leaves out the others.

    Args:
        clock: seconds, rising.
        later: calls a function after so many seconds; what it returns can be cancelled.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, later: Later = _in_thread) -> None:
        self.clock, self._later = clock, later
        self._lock = threading.Lock()
        self._last = self._exempt = -math.inf
        self._held: Callable[[], None] | None = None
        self._timer: Any = None

    def tell(self, send: Callable[[], None], now: float, must: bool = False) -> None:
        """Call ``send``, now or, where it ``must`` be called, soon: unless a newer message takes its place."""
        with self._lock:
            free = now - self._last >= PERIOD
            if must and not free and now - self._exempt >= _EXEMPT:
                self._exempt, free = now, True
            if free:
                self._go(send, now)
            elif must:
                if self._held is None:
                    self._timer = self._later(PERIOD - (now - self._last), self._let_go)
                self._held = send

    def _let_go(self) -> None:
        with self._lock:
            if self._held is not None:
                self._go(self._held, self.clock())

    def _go(self, send: Callable[[], None], now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._last, self._held, self._timer = now, None, None
        send()


@lru_cache(maxsize=_WIDGETS)
def pace_of(client: str, node: str) -> Pace:
    """Of all runs that this node shows to this client."""
    return Pace()
