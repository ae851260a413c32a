"""The node that is executing, the client that queued it, and words for that node; nothing where there is no server."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

#: Their nodes carry the live widget themselves; a Parallel Sampler carries that of the sampler node it is linked to.
_OWN = frozenset({"ParaTAF_KSampler", "ParaTAF_KSamplerAdvanced"})
_LINKED = "ParaTAF_Sampler"
#: Frontends show a node's text line as HTML, and make links of what looks like one: a space without width breaks it.
_PLAIN = str.maketrans({"<": "‹", ">": "›", "[": "(", "]": ")"})
_LINK = re.compile(r"(?<=www\.)|(?<=://)", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where a running sampler is seen.

    Attributes:
        server: the host's ``PromptServer``. client: the client that queued the graph.
        prompt: id of the graph that runs.
        shown: id of the node with the live widget, ``12:5`` inside a subgraph; None where no node can be told.
        workflow: id of the workflow that was queued, None where it is not known.
    """

    server: Any
    client: str
    prompt: str
    shown: str | None
    workflow: str | None

    def send(self, event: str, data: dict[str, Any]) -> None:
        """Send ``data``, JSON-ready, to the client; may be called from the executing thread."""
        self.server.send_sync(event, data, self.client)


def current_place() -> Place | None:
    """Where the sampler that is running now is seen; None outside a server, or where nobody waits for it."""
    context, server = _executing(), _server()
    client = getattr(server, "client_id", None)
    if context is None or client is None or not hasattr(server, "send_sync"):
        return None
    node, prompt = str(context.node_id), str(context.prompt_id)
    return Place(server, client, prompt, _shown_on(node), _workflow(server, prompt))


def say_on_node(text: str) -> None:
    """Show ``text`` on the node that is executing now; nothing happens outside a server."""
    context, server = _executing(), _server()
    send = getattr(server, "send_progress_text", None)
    if context is not None and send is not None:
        send(_LINK.sub("\u200b", text.translate(_PLAIN)), context.node_id, getattr(server, "client_id", None))


def _server() -> Any:
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _executing() -> Any:
    ask = getattr(sys.modules.get("comfy_execution.utils"), "get_executing_context", None)
    return ask() if ask else None


def _shown_on(node: str) -> str | None:
    """``node`` itself where it is ours, else the one Parallel Sampler that is linked to it."""
    ask = getattr(sys.modules.get("comfy_execution.progress"), "get_progress_state", None)
    graph = getattr(ask() if ask else None, "dynprompt", None)
    if graph is None or not graph.has_node(node):
        return None
    entry = graph.get_node(node)
    if entry.get("class_type") in _OWN:
        return str(graph.get_display_node_id(node))
    links = [v for v in entry.get("inputs", {}).values() if isinstance(v, list) and len(v) == 2]
    sources = {v[0] for v in links if isinstance(v[0], str)}
    linked = [s for s in sources if graph.has_node(s) and graph.get_node(s).get("class_type") == _LINKED]
    return str(graph.get_display_node_id(linked[0])) if len(linked) == 1 else None


def _workflow(server: Any, prompt: str) -> str | None:
    """The id that the frontend gave the workflow, from what it queued."""
    running = getattr(getattr(server, "prompt_queue", None), "currently_running", None)
    for item in list(running.values()) if isinstance(running, dict) else []:
        if len(item) > 3 and item[1] == prompt and isinstance(item[3], dict):
            saved = (item[3].get("extra_pnginfo") or {}).get("workflow") or {}
            return str(saved["id"]) if saved.get("id") else None
    return None
