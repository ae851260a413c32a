"""Runs as json lines: each is written as it ends, so that an interrupted suite resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def clean(value: Any) -> Any:
    """JSON has no infinities: they and NaN become None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """A file of json lines, appended to and flushed run by run.

    Attributes:
        rows: what the file holds, in its order.

    Args:
        path: the file. keys: the fields that tell one run from another.
        resume: read it first and cut off a torn last line; otherwise it is begun anew.

    Raises:
        ValueError: a line of it is no run of this suite.
    """

    def __init__(self, path: Path, keys: Sequence[str], resume: bool = False) -> None:
        self.path, self._keys, self.rows = path, tuple(keys), list[Row]()
        if resume:
            self.rows = _read(path, self._keys)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        self._seen = {self._key(row) for row in self.rows}

    def _key(self, row: Row) -> str:
        return json.dumps([row.get(k) for k in self._keys])

    def __contains__(self, row: Row) -> bool:
        """Whether the run that ``row``'s key fields name is in the file."""
        return self._key(row) in self._seen

    def add(self, row: Row) -> None:
        """Append a run."""
        row = {k: clean(v) for k, v in row.items()}
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._seen.add(self._key(row))


def open_journal(resume: str | None, fresh: Path, keys: Sequence[str]) -> Journal:
    """The file that ``--resume`` names, or a new one at ``fresh``.

    Raises:
        ValueError: ``resume`` is no file of such runs.
    """
    if resume is None:
        return Journal(fresh, keys)
    path = Path(resume)
    if not path.is_file():
        raise ValueError(
            f"resume is {resume!r}; the json lines of an earlier run are allowed, and there is no such file"
        )
    return Journal(path, keys, resume=True)


def _read(path: Path, keys: Sequence[str]) -> list[Row]:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or any(k not in row for k in keys):
            raise ValueError(
                f"resume is {str(path)!r}; json lines of this suite are allowed, and line {number} is none"
            )
        rows.append(row)
    if len(whole) < len(data):  # a run that was being written when the power went
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return rows
