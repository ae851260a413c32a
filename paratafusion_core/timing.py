"""What an automatic window has gone by: kept with a capped run, so that the run that finishes it measures nothing anew.

A window's choice follows from its rounds alone, so a second run that is told them stands where the first one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import check_count, check_seconds

#: Entries of a list: more than any run has rounds.
_MOST = 100_000


@dataclass(frozen=True)
class Timing:
    """The rounds of a run whose window was chosen automatically, and what was known before them.

    Raises ValueError where a number is out of its bounds.

    Attributes:
        window: of collocation, as the automatic plan had it; 0 where the plan was none of collocation.
        warm: the run had started from an earlier one.
        given: (rows, seconds of a call for so many) before the first round; twice where several calls told it.
            engine: seconds of a round that were not the model's.
        rounds: of each round the rows it made final, at least 1, the rows it evaluated, its seconds, 0 where these tell
            nothing, and those of them that were not the model's, 0 where these are not known.
    """

    window: int = 0
    warm: bool = False
    given: tuple[tuple[int, float], ...] = ()
    engine: float = 0.0
    rounds: tuple[tuple[int, int, float, float], ...] = ()

    def __post_init__(self) -> None:
        check_count("trajectory window", self.window, low=0)
        if not isinstance(self.warm, bool):
            raise ValueError(f"trajectory warm is {self.warm!r:.80}; true or false is allowed")
        check_seconds("trajectory engine", self.engine)
        for rows, seconds in self.given:
            check_count("trajectory rows of a latency", rows)
            check_seconds("trajectory latency", seconds)
        for final, rows, seconds, engine in self.rounds:
            check_count("trajectory final rows of a round", final)
            check_count("trajectory rows of a round", rows)
            check_seconds("trajectory seconds of a round", seconds)
            check_seconds("trajectory engine seconds of a round", engine)

    @property
    def widest(self) -> int:
        """The most rows of its rounds, 0 without any."""
        return max((rows for _, rows, _, _ in self.rounds), default=0)

    def facts(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return dataclasses.asdict(self)


def timing_of(facts: Mapping[str, Any]) -> Timing:
    """A :class:`Timing` from the table of :meth:`Timing.facts`.

    Raises:
        ValueError: an entry is missing, of another type or length, or out of its bounds.
    """
    names = [field.name for field in dataclasses.fields(Timing)]
    if sorted(facts) != sorted(names):
        raise ValueError(f"trajectory timing has {sorted(facts)!r:.80}; {', '.join(names)} are allowed")
    pairs, rounds = (_rows(facts[name], name, length) for name, length in (("given", 2), ("rounds", 4)))
    return Timing(**{**facts, "given": pairs, "rounds": rounds})


def _rows(table: Any, name: str, length: int) -> tuple[Any, ...]:
    fits = isinstance(table, list) and len(table) <= _MOST
    if not fits or not all(isinstance(row, list) and len(row) == length for row in table):
        raise ValueError(f"trajectory {name} is {table!r:.80}; a list of lists of {length} numbers is allowed")
    return tuple(tuple(row) for row in table)
