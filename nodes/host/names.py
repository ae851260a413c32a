"""Names that an artist types: of kept trajectories, and of files inside the host's folders. The same on every OS."""

from __future__ import annotations

import re
import unicodedata

_LONGEST = 100
#: File systems count bytes, and a counter with an ending has to fit behind the name.
_LONGEST_BYTES = 200
_FORBIDDEN = '\\/:*?"<>|'
#: Devices of Windows, with or without an ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3]|conin\$|conout\$)", re.I)


def check_name(label: str, name: str) -> str:
    """``name`` of a kept trajectory.

    Raises:
        ValueError: it could be taken for a path, is a reserved word of Windows, empty, too long, or does not print.
    """
    fault = "it looks like a path" if "/" in name or "\\" in name or re.match(r"[A-Za-z]:", name) else _fault(name)
    return _accepted(label, name, fault, f"a name of up to {_LONGEST} letters without / and \\ is allowed")


def check_path(label: str, path: str) -> str:
    """``path`` of a file below one of the host's folders: names with / between them.

    Raises:
        ValueError: it is absolute, has a part like .. or one that not every system takes, or is too long.
    """
    parts = path.replace("\\", "/").split("/")
    faults = [_fault(part) or _unfit(part) for part in parts]
    absolute = bool(path.strip()) and (not parts[0] or path[1:2] == ":")
    fault = "it is absolute" if absolute else next((f for f in faults if f), None)
    return _accepted(label, path, fault, "names of folders and a file with / between them are allowed")


def _accepted(label: str, value: str, fault: str | None, allowed: str) -> str:
    if fault is not None:
        shown = repr(value) if len(value) <= 60 else f"{value[:40]!r} .. ({len(value)} letters)"
        raise ValueError(f"{label} is {shown}; {fault}, {allowed}")
    return value


def _fault(name: str) -> str | None:
    """What is wrong with a name or a part of a path, if anything."""
    if not name.strip():
        return "it is empty"
    if len(name) > _LONGEST:
        return f"it is longer than {_LONGEST} letters"
    if not all(c.isprintable() or unicodedata.category(c) == "Zs" for c in name):
        return "it has characters that do not print"
    if name in (".", ".."):
        return "it steps out of its folder"
    if name != name.strip() or name.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if _DEVICES.fullmatch(name.split(".")[0].rstrip()):
        return "it is a reserved word of Windows"
    return None


def _unfit(part: str) -> str | None:
    """What no file system, or not every one, takes in a file's name."""
    if any(c in _FORBIDDEN for c in part):
        return f"it has one of {_FORBIDDEN[2:]}"
    if len(part.encode()) > _LONGEST_BYTES:
        return "it is too long for a file's name"
    return None
