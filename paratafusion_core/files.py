"""Writing files so that an interrupted write leaves the old file, or none."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside ``path``: renamed onto it when the block ends well, removed when it does not."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            scratch.unlink()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    write_text(path, json.dumps(value, indent=1))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the folder is missing or not writable.
    """
    with replacing(path) as scratch:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(scratch), metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error}); a path in a writable folder is allowed") from None


def check_folder(name: str) -> Path:
    """``name`` as a folder's path, before a run whose picture would be lost; it need not exist yet.

    Raises:
        ValueError: it is empty, cannot be written to, or it or something above it is a file.
    """
    if not name:
        raise ValueError("out is ''; the path of a folder is allowed")
    path = Path(name)
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise ValueError(f"out is {name!r}; the path of a folder is allowed, and {nearest.name} is a file")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError:
        raise ValueError(f"out is {name!r}; a folder that can be written to is allowed") from None
    return path
