"""What a node can read off the graph that it runs in."""

from __future__ import annotations

import hashlib
import json
from typing import Any

Prompt = dict[str, dict[str, Any]]


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def is_linked(prompt: Prompt | None, node_id: str | None, output: int) -> bool:
    """Whether anything in the graph reads this output; True where the graph is not known."""
    if not prompt or node_id is None:
        return True
    wanted = [str(node_id), output]
    return any(value == wanted for node in prompt.values() for value in node.get("inputs", {}).values())


def problem_of(prompt: Prompt | None, node_id: str | None) -> str:
    """A hash of everything upstream of a node: what made its inputs, never the numbers that came out."""
    if not prompt or node_id is None:
        return "unknown"
    seen: dict[str, Any] = {}
    waiting = [str(node_id)]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in prompt:
            continue
        inputs = prompt[name].get("inputs", {})
        seen[name] = [prompt[name].get("class_type"), inputs]
        waiting += [value[0] for value in inputs.values() if _is_link(value)]
    return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()[:16]
