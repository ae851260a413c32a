"""A line of text on the node that is running, where there is a server and this host version can do it."""

from __future__ import annotations

import sys
from typing import Any


def say_on_node(text: str) -> None:
    """Show ``text`` on the node that is executing now; nothing happens outside a server."""
    context, server = _executing(), sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    send = getattr(instance, "send_progress_text", None)
    if context is not None and send is not None:
        send(text, context.node_id, getattr(instance, "client_id", None))


def _executing() -> Any:
    utils = sys.modules.get("comfy_execution.utils")
    ask = getattr(utils, "get_executing_context", None)
    return ask() if ask else None
