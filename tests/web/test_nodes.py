"""What the pack's nodes other than the samplers do in the frontend, and messages that come while it loads."""

from __future__ import annotations

import json
import re
import uuid
from datetime import date
from typing import Any

from browser import as_prompt, open_workflow, tab
from test_widget import example
from watching import EVENT, until

SAVE = "ParaTAF_SaveTrajectory"
#: A graph of one sampler, titled "my sampler", and a Save Trajectory behind it, with this prefix.
_GRAPH = """(prefix) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    const [sampler, save] = ['ParaTAF_KSampler', 'ParaTAF_SaveTrajectory'].map((type) => LiteGraph.createNode(type));
    for (const node of [sampler, save]) app.graph.add(node);
    sampler.title = 'my sampler';
    sampler.widgets.find((w) => w.name === 'seed').value = 77;
    sampler.connect(1, save, 0);
    save.widgets.find((w) => w.name === 'filename_prefix').value = prefix;
}"""


def queued(page: Any, prefix: str) -> str:
    """What the server is asked to save under."""
    page.evaluate(_GRAPH, prefix)
    return next(n["inputs"]["filename_prefix"] for n in as_prompt(page).values() if n["class_type"] == SAVE)


def test_placeholders_of_a_file_name_are_filled_in(mode):
    page, faults, _ = mode
    prefix = "%date:yyyy-MM-dd%/img_%my sampler.seed%_%ParaTAF_KSampler.steps%"
    before, found, after = date.today(), queued(page, prefix), date.today()
    assert found in {f"{day:%Y-%m-%d}/img_77_20" for day in (before, after)}
    saved = json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    assert next(n["widgets_values"] for n in saved["nodes"] if n["type"] == SAVE) == [prefix]
    assert faults == []


def test_a_file_name_without_placeholders_is_as_typed(mode):
    page, faults, _ = mode
    for prefix in ("trajectories/ParaTAF", "100 %", "%year%/%nobody.seed%"):
        assert queued(page, prefix) == prefix
    page.evaluate("() => { window.comfyAPI.__utils = window.comfyAPI.utils; delete window.comfyAPI.utils }")
    try:  # of a frontend that has no such function
        assert queued(page, "%date:yyyy%/x") == "%date:yyyy%/x"
    finally:
        page.evaluate("() => { window.comfyAPI.utils = window.comfyAPI.__utils }")
    assert faults == []


def test_titles_have_room(mode):
    """In the classic canvas: Vue nodes are as wide as they need."""
    page, faults, name = mode
    cut = page.evaluate("""() => [...new Set(Object.keys(window.LiteGraph.registered_node_types))]
        .filter((type) => type.startsWith('ParaTAF_')).filter((type) => {
            const node = window.LiteGraph.createNode(type);
            const pen = document.createElement('canvas').getContext('2d');
            pen.font = node.titleFontStyle ?? '14px Arial';
            return node.size[0] < pen.measureText(node.title).width + 2 * window.LiteGraph.NODE_TITLE_HEIGHT;
        })""")
    assert name == "vue" or cut == []
    assert faults == []


def test_a_message_while_the_page_loads_is_not_lost(server, browser):
    """It comes as soon as the pack's module has been read, long before the frontend has set its extensions up."""
    workflow = {**example("quickstart"), "id": str(uuid.uuid4())}
    node = next(n["id"] for n in workflow["nodes"] if n["type"] == "ParaTAF_KSampler")
    detail = {"node": str(node), "workflow": workflow["id"], "state": "done", "rows": 20, "steps": 20, "frozen": 20}
    early = f"\napi.dispatchEvent(new CustomEvent({EVENT!r}, {{ detail: {json.dumps({**detail, 'round': 9})} }}));\n"

    def before(page: Any) -> None:
        def answer(route: Any) -> None:
            found = route.fetch()
            route.fulfill(response=found, body=found.text() + early)

        page.route(re.compile(r"/ParaTAFusion/live\.js"), answer)

    with tab(browser, server.port, before) as page:
        open_workflow(page, workflow)
        until(page, "done")
