"""Runs as json lines: each is written as it ends, so that an interrupted suite resumes."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

Row = dict[str, Any]
#: The figures that a suite's tables read of each run, with their types.
Figures = Mapping[str, type | UnionType]
Number = int | float


def clean(value: Any) -> Any:
    """JSON has no infinities: they and NaN become None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """A file of json lines, appended to and flushed run by run.

    Attributes:
        rows: what the file holds, in its order.

    Args:
        path: the file. keys: the fields that tell one run from another.
        resume: read it first and cut off a torn last line; otherwise it is begun anew, and what was there renamed.
        figures: what a run has besides.

    Raises:
        ValueError: a line of it is no run of this suite.
    """

    def __init__(self, path: Path, keys: Sequence[str], resume: bool = False, figures: Figures | None = None) -> None:
        self.path, self._keys, self.rows = path, tuple(keys), list[Row]()
        if resume:
            self.rows = _read(path, self._keys, figures or {})
        else:
            _begin(path)
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


def open_journal(resume: str | None, fresh: Path, keys: Sequence[str], figures: Figures) -> Journal:
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
    return Journal(path, keys, resume=True, figures=figures)


def _begin(path: Path) -> None:
    """Make the file and its folder; one of an earlier bench, which may have taken hours, is kept under another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        path.rename(kept)
        print(f"{path.name} of an earlier bench is kept as {kept}", file=sys.stderr)
    path.write_bytes(b"")


def _read(path: Path, keys: Sequence[str], figures: Figures) -> list[Row]:
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
        wrong = [name for name, kind in figures.items() if name not in row or not isinstance(row[name], kind)]
        if wrong:
            raise ValueError(
                f"resume is {str(path)!r}; whole runs of this suite are allowed, and line {number} lacks "
                f"{', '.join(wrong)}"
            )
        rows.append(row)
    if len(whole) < len(data):  # a run that was being written when the power went
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return rows
