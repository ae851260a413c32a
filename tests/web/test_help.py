"""Help pages and translations as an artist meets them: in the frontend, in a browser that asks for Japanese."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import PATIENCE, READY
from graphs import NODE_IDS

ROOT = Path(__file__).resolve().parents[2]
TEXTS = json.loads((ROOT / "locales" / "ja" / "nodeDefs.json").read_text(encoding="utf-8"))
_NODE = """type => {
    const node = window.LiteGraph.createNode(type), named = list => Object.fromEntries(list);
    window.app.graph.add(node);
    window.app.canvas.selectNode(node);
    return {
        title: node.title,
        inputs: named([
            ...node.inputs.map(i => [i.name, i.localized_name]),
            ...(node.widgets ?? []).map(w => [w.name, w.label]),
        ]),
        outputs: node.outputs.map(o => [o.name, o.type, o.localized_name]),
    };
}"""


@pytest.fixture(scope="module")
def japanese(page, server):
    context = page.context.browser.new_context(locale="ja-JP", viewport={"width": 1600, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    opened.goto(f"http://127.0.0.1:{server.port}/")
    opened.wait_for_function(READY)
    title = TEXTS["ParaTAF_KSampler"]["display_name"]
    opened.wait_for_function(
        "title => window.LiteGraph.registered_node_types['ParaTAF_KSampler'].title === title", arg=title
    )
    opened.keyboard.press("Escape")  # the template browser of a first run
    yield opened
    context.close()


@pytest.mark.parametrize("node", NODE_IDS)
def test_a_node_in_japanese(japanese, node):
    shown, wanted = japanese.evaluate(_NODE, node), TEXTS[node]
    assert shown["title"] == wanted["display_name"]
    for name, text in wanted["inputs"].items():
        assert shown["inputs"][name] == text["name"], name
    for (name, kind, label), text in zip(shown["outputs"], wanted.get("outputs", {}).values(), strict=True):
        if name != kind:  # an output that is named by its type has the host's own word for it
            assert label == text["name"], name


def test_the_help_panel_shows_the_page_and_its_picture(japanese):
    japanese.evaluate("() => window.app.graph.clear()")
    japanese.evaluate(_NODE, "ParaTAF_Options")
    japanese.locator('[data-testid="info-button"]').click()
    japanese.get_by_role("heading", name="Parallel Options").wait_for()
    japanese.wait_for_function("""() => [...document.querySelectorAll('img')].some(
        i => i.src.includes('/extensions/') && i.src.endsWith('/assets/options.png') && i.naturalWidth > 0)""")
    assert japanese.get_by_role("cell", name="quasi-newton", exact=True).count() == 1


def test_the_live_widget_speaks_japanese(japanese):
    japanese.evaluate("() => window.app.graph.clear()")
    japanese.evaluate(_NODE, "ParaTAF_KSampler")
    title = japanese.locator(".paratafusion-live-title")
    title.filter(has_text="未実行").wait_for()
