"""English texts of the nodes, read off their schemas: ``locales/en/nodeDefs.json`` is written from here.

python tests/host/bootstrap.py prepare        # prints the interpreter to use, and the folder for COMFYUI_PATH
COMFYUI_PATH=... python tests/host/english.py           # what has drifted, in every language; exit status 1
COMFYUI_PATH=... python tests/host/english.py --write   # the same, after writing the English file anew
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = ("en", "zh", "ja", "ko", "de", "fr")
FILE = "nodeDefs.json"
#: The widget that the frontend adds below a seed.
SEED_WIDGET = "control_after_generate"
#: path of a text inside the file -> the text.
Texts = dict[tuple[str, ...], str]


def _pack() -> list[Any]:
    from paratafusion_pack.nodes.extension import ParaTAFusion

    return asyncio.run(ParaTAFusion().get_node_list())


def node_texts(kind: Any) -> dict[str, Any]:
    """Texts of one node class, in the form that the frontend reads."""
    info = kind.GET_NODE_INFO_V1()
    inputs: dict[str, Any] = {}
    for part in ("required", "optional"):
        for name, spec in info["input"].get(part, {}).items():
            given = spec[1] if len(spec) > 1 else {}
            inputs[name] = {"name": given.get("display_name") or name, "tooltip": given["tooltip"]}
            if given.get(SEED_WIDGET):
                inputs[SEED_WIDGET] = {"name": SEED_WIDGET.replace("_", " ")}
    outputs = {
        str(i): {"name": name, "tooltip": tip}
        for i, (name, tip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    texts = {"display_name": info["display_name"], "description": info["description"], "inputs": inputs}
    return {**texts, "outputs": outputs} if outputs else texts


def from_schemas() -> dict[str, Any]:
    """Texts of all nodes of the pack, by node id."""
    return {kind.GET_SCHEMA().node_id: node_texts(kind) for kind in _pack()}


def stored(language: str) -> dict[str, Any]:
    """What the repository holds of a language; empty where there is nothing."""
    path = LOCALES / language / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def flat(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(value, (*path, key))
    else:
        yield path, node


def drift(language: str, english: dict[str, Any]) -> list[str]:
    """What is missing in a language, what no node has any more, and for English what reads differently."""
    wanted, found = dict(flat(english)), dict(flat(stored(language)))
    lines = [f"{language}: missing {'.'.join(p)}: {wanted[p]!r}" for p in wanted if p not in found]
    lines += [f"{language}: stale {'.'.join(p)}" for p in found if p not in wanted]
    if language == "en":
        lines += [f"en: {'.'.join(p)} reads {found[p]!r}, now {t!r}" for p, t in wanted.items() if found.get(p, t) != t]
    return lines


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    import conftest  # noqa: F401  (makes the host importable)

    english = from_schemas()
    lines = [line for language in LANGUAGES for line in drift(language, english)]
    print("\n".join(lines) or "nothing has drifted")
    if "--write" in arguments:
        path = LOCALES / "en" / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(english, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
