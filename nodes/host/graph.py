"""What a node can read off the graph that it runs in."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection
from typing import Any

Prompt = dict[str, dict[str, Any]]
UNKNOWN = "unknown"


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def is_linked(prompt: Prompt | None, node_id: str | None, output: int) -> bool:
    """Whether anything in the graph reads this output; True where the graph, or the node in it, is not known."""
    if not prompt or node_id is None or str(node_id) not in prompt:
        return True
    wanted = [str(node_id), output]
    return any(value == wanted for node in prompt.values() for value in node.get("inputs", {}).values())


def problem_of(prompt: Prompt | None, node_id: str | None, without: Collection[str] = ()) -> str:
    """A hash of everything upstream of a node: what made its inputs, never the numbers that came out.

    Inputs of the node itself that are named in ``without`` do not count, nor does its own number.
    """
    if not prompt or node_id is None or str(node_id) not in prompt:
        return UNKNOWN
    own = prompt[str(node_id)]
    inputs = {name: value for name, value in own.get("inputs", {}).items() if name not in without}
    seen: dict[str, Any] = {}
    waiting = [value[0] for value in inputs.values() if _is_link(value)]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in prompt:
            continue
        above = prompt[name].get("inputs", {})
        seen[name] = [prompt[name].get("class_type"), above]
        waiting += [value[0] for value in above.values() if _is_link(value)]
    whole = [own.get("class_type"), inputs, seen]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]


def running_prompt() -> Prompt | None:
    """The graph that the host is executing, which it does not show to ``fingerprint_inputs``; None where unknown."""
    ask = getattr(sys.modules.get("comfy_execution.progress"), "get_progress_state", None)
    graph = getattr(ask() if ask else None, "dynprompt", None)
    return graph.get_original_prompt() if hasattr(graph, "get_original_prompt") else None
