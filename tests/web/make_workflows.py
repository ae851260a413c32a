"""Writes ``example_workflows/`` with the host's own frontend; run it in the host's environment after a change.

    COMFYUI_PATH=... python tests/web/make_workflows.py [name ...]

A node that has no golden form yet gets one. A golden form is never rewritten: it is what shared workflows rely on.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

from browser import fresh_node, frontend, open_workflow, thumbnail, write_workflow  # noqa: E402
from comfy_server import Server  # noqa: E402
from graphs import EXAMPLES, NODE_IDS  # noqa: E402

TARGET, GOLDEN = HERE.parents[1] / "example_workflows", HERE / "golden"


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main(names: list[str]) -> None:
    """Write these examples and their thumbnails; all of them where none is named."""
    TARGET.mkdir(exist_ok=True)
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        server = Server(Path(base))
        server.start()
        try:
            for name in names or EXAMPLES:
                graph = EXAMPLES[name]()
                with frontend(server.port) as page:
                    workflow = write_workflow(page, graph.nodes, graph.note)
                    _write(TARGET / f"{name}.json", workflow)
                    open_workflow(page, workflow)
                    thumbnail(page, TARGET / f"{name}.jpg")
            with frontend(server.port) as page:
                for node in NODE_IDS:
                    if not (GOLDEN / f"{node}.json").exists():
                        _write(GOLDEN / f"{node}.json", fresh_node(page, node))
        finally:
            server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
