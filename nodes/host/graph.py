"""What a node can read off the graph that it runs in."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection
from typing import Any

Prompt = dict[str, dict[str, Any]]
#: The problem of a node that no graph knows; the store takes each entry of it for another one.
UNKNOWN = "unknown"


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def is_linked(prompt: Prompt | None, node_id: str | None, output: int) -> bool:
    """Whether anything in the graph reads this output; True where the graph, or the node in it, is not known.

    A node that another one has expanded into is looked up in the running graph, and its output may leave through one
    of that node's.
    """
    graph = _graph_of(prompt, node_id)
    if graph is None:
        return True
    return output in _read(graph, str(node_id)) or _may_leave(graph, str(node_id), output)


def _read(graph: Prompt, node_id: str) -> set[int]:
    """The outputs of a node that others have for an input."""
    values = (value for node in graph.values() for value in node.get("inputs", {}).values())
    return {value[1] for value in values if _is_link(value) and value[0] == node_id}


def _may_leave(graph: Prompt, node_id: str, output: int) -> bool:
    """Whether what an expanded node gives may be read as its parent's: the graph does not say what that returns."""
    ask = getattr(_running(), "get_parent_node_id", None)
    fits = getattr(sys.modules.get("comfy_execution.validation"), "validate_node_input", None)
    kind = _kind(graph, node_id, output)
    parent = ask(node_id) if ask else None
    while parent in graph:
        if any(fits is None or fits(_kind(graph, parent, slot), kind) for slot in _read(graph, parent)):
            return True
        parent = ask(parent) if ask else None
    return False


def _kind(graph: Prompt, node_id: str, output: int) -> Any:
    """The type of an output, in the host's words; any where it is not known."""
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    kinds = getattr(classes.get(graph[node_id].get("class_type")), "RETURN_TYPES", ())
    return kinds[output] if output < len(kinds) else "*"


def problem_of(prompt: Prompt | None, node_id: str | None, without: Collection[str] = ()) -> str:
    """A hash of everything upstream of a node: what made its inputs, never the numbers that came out.

    Inputs of the node itself that are named in ``without`` do not count, nor does its own number. Objects, which only
    expanded nodes have for inputs, are the same as themselves, and in no other run.
    """
    graph = _graph_of(prompt, node_id)
    if graph is None:
        return UNKNOWN
    own = graph[str(node_id)]
    inputs = {name: value for name, value in own.get("inputs", {}).items() if name not in without}
    seen: dict[str, Any] = {}
    waiting = [value[0] for value in inputs.values() if _is_link(value)]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in graph:
            continue
        above = graph[name].get("inputs", {})
        seen[name] = [graph[name].get("class_type"), above]
        waiting += [value[0] for value in above.values() if _is_link(value)]
    whole = [own.get("class_type"), inputs, seen]
    run = getattr(_progress(), "prompt_id", None)
    try:
        text = json.dumps(whole, sort_keys=True, default=lambda held: [run, id(held)])
    except (TypeError, ValueError):  # an object whose keys have no order, or that holds itself
        return UNKNOWN
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def running_prompt() -> Prompt | None:
    """The graph that the host is executing, with the nodes that others have expanded into; None where unknown.

    The host shows it to no ``fingerprint_inputs``, and the expanded nodes not as a prompt.
    """
    graph = _running()
    return {name: graph.get_node(name) for name in graph.all_node_ids()} if hasattr(graph, "all_node_ids") else None


def _graph_of(prompt: Prompt | None, node_id: str | None) -> Prompt | None:
    """``prompt``, or the running graph where only that has the node; None where neither does."""
    if node_id is None:
        return None
    if prompt and str(node_id) in prompt:
        return prompt
    graph = running_prompt()
    return graph if graph and str(node_id) in graph else None


def _running() -> Any:
    """The host's ``DynamicPrompt`` of this run, None where unknown."""
    return getattr(_progress(), "dynprompt", None)


def _progress() -> Any:
    ask = getattr(sys.modules.get("comfy_execution.progress"), "get_progress_state", None)
    return ask() if ask else None
