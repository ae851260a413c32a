"""Help pages: one for every node, about every input and output of it, with pictures that the host serves."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
from comfy_server import ANSWER
from english import from_schemas
from PIL import Image

WEB = Path(__file__).resolve().parents[2] / "web"
PAGES = WEB / "docs"
LARGEST_PICTURE, ALL_PICTURES = 50_000, 400_000
PICTURE, LINK = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)"), re.compile(r"(?<!!)\[[^\]]*\]\(([^)]+)\)")
CODE, BOLD = re.compile(r"`([^`]+)`"), re.compile(r"\*\*([^*]+)\*\*", re.DOTALL)


@pytest.fixture(scope="module")
def texts():
    return from_schemas()


def page(node: str) -> str:
    return (PAGES / f"{node}.md").read_text(encoding="utf-8")


def test_every_node_has_a_page_and_every_page_a_node(texts):
    assert {p.stem for p in PAGES.glob("*.md")} == set(texts)


def test_every_input_and_output_is_on_the_page(texts):
    for node, entry in texts.items():
        named = set(CODE.findall(page(node)))
        wanted = {*entry["inputs"], *(o["name"] for o in entry.get("outputs", {}).values())}
        assert wanted <= named, (node, wanted - named)


def test_pages_are_made_alike(texts):
    for node, entry in texts.items():
        text = page(node)
        assert text.startswith(f"# {entry['display_name']}\n"), node
        assert PICTURE.search(text), node
        for heading in ("## Inputs", "## When not to use it", "## Related nodes"):
            assert heading in text, (node, heading)


def test_related_nodes_are_nodes(texts):
    ours = {entry["display_name"] for entry in texts.values()}
    for node in texts:
        related = {" ".join(name.split()) for name in BOLD.findall(page(node).split("## Related nodes")[1])}
        assert related and related <= ours and texts[node]["display_name"] not in related, node


def test_the_options_page_names_every_choice(texts):
    from paratafusion_pack.nodes.options import ParallelOptions

    named = set(CODE.findall(page("ParaTAF_Options")))
    required = ParallelOptions.GET_NODE_INFO_V1()["input"]["required"]
    for combo in ("solver", "preset"):
        assert set(required[combo][1]["options"]) <= named, combo


def test_pictures_exist_and_are_small(texts):
    used = set()
    for node in texts:
        for words, target in PICTURE.findall(page(node)):
            assert words.strip(), (node, target)
            path = (PAGES / target).resolve()
            assert path.is_file() and path.is_relative_to(WEB.resolve()), (node, target)
            used.add(path)
    for path in used:
        assert path.stat().st_size < LARGEST_PICTURE, path.name
        with Image.open(path) as picture:
            picture.verify()
    assert sum(p.stat().st_size for p in (WEB / "assets").iterdir()) < ALL_PICTURES


def test_links_lead_out_of_the_panel(texts):
    """The help panel resolves pictures against the page, but links against the frontend: relative ones would break."""
    for node in texts:
        for target in LINK.findall(page(node)):
            assert target.startswith("https://"), (node, target)
        assert "<" not in page(node), node


def test_the_host_serves_pages_and_pictures(server, texts):
    """At the addresses that the frontend asks for: /extensions/<folder>/docs/, and pictures relative to it."""

    def get(path: str) -> tuple[str, bytes]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=ANSWER) as answer:
            return answer.headers["Content-Type"], answer.read()

    info = server.get("/object_info")
    for node in texts:
        folder = info[node]["python_module"].split(".")[1]
        kind, body = get(f"/extensions/{folder}/docs/{node}.md")
        assert "html" not in kind
        assert body.decode() == page(node)
        for _, target in PICTURE.findall(page(node)):
            kind, body = get(f"/extensions/{folder}/{target.removeprefix('../')}")
            assert kind.startswith("image/")
            assert body == (PAGES / target).read_bytes()
