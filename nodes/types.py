"""The socket types of the pack, and what its nodes share in their schemas."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

OptionsType = io.Custom("PARATAF_OPTIONS")
TrajectoryType = io.Custom("PARATAF_TRAJECTORY")
ReportType = io.Custom("PARATAF_REPORT")

CATEGORY = "sampling/parallel"
#: Marks a rarely needed input. As a plain entry it reaches hosts whose inputs do not know the field yet.
RARE = {"advanced": True}


def schema(**fields: Any) -> io.Schema:
    """An ``io.Schema`` without the fields that this host does not know."""
    known = io.Schema.__dataclass_fields__
    return io.Schema(**{name: value for name, value in fields.items() if name in known})
