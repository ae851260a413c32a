"""The live widget in the host's own frontend, in the classic canvas and in Vue nodes, on real runs."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from browser import as_prompt, open_workflow
from watching import (
    BEGUN,
    BOX,
    EVENT,
    WIDGET,
    centre,
    contrasts,
    drawn,
    filled,
    listeners,
    living,
    look,
    record,
    screenshots,
    set_widgets,
    state,
    until,
    words,
)

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
SAMPLER = "ParaTAF_KSampler"
MARKUP = "<img src=x onerror=\"window.__pwned = 'yes'\"><script>window.__pwned = 1</script>"


def example(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def start(page: Any, name: str = "quickstart", **values: Any) -> None:
    """A fresh graph with a seed of its own, its sampler in view."""
    open_workflow(page, example(name))
    if name == "quickstart":
        set_widgets(page, SAMPLER, seed=random.randrange(10**9), **values)
    centre(page, SAMPLER if name == "quickstart" else "ParaTAF_Sampler")


def run(page: Any) -> None:
    page.get_by_test_id("queue-button").click()


def idle(server: Any) -> None:
    """Wait until nothing is queued or runs."""
    for _ in range(3000):
        queue = server.get("/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            return
        time.sleep(0.1)
    raise AssertionError("the queue does not come to rest")


def finish(server: Any, page: Any, **values: Any) -> None:
    """A fresh graph, run to its end."""
    start(page, **values)
    run(page)
    until(page, "done")
    idle(server)


def test_quickstart_from_the_template_browser_in_one_click(server, mode):
    page, faults, name = mode
    page.get_by_role("button", name="Templates").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("ParaTAFusion", exact=True).click()
    dialog.get_by_test_id("template-workflow-quickstart").click()
    page.wait_for_function(f"() => window.app.graph.nodes.some((n) => n.type === '{SAMPLER}')")
    dialog.wait_for(state="hidden")
    set_widgets(page, SAMPLER, steps=240, seed=random.randrange(10**9))
    set_widgets(page, "ParaTAF_DemoModel", batch_size=2)  # work for several updates of the widget
    centre(page)
    assert state(page) == "idle"
    record(page)
    run(page)
    until(page, "running")
    page.screenshot(path=screenshots() / f"{name}-running.png")
    until(page, "done")
    page.screenshot(path=screenshots() / f"{name}-done.png")

    seen = drawn(page)
    counts = [int(d["progress"].split(" of ")[0]) for d in seen if d["state"] == "running"]
    assert len(set(counts)) >= 3 and counts == sorted(counts) and counts[0] > 0 and counts[-1] <= 240
    assert any(d["moving"] for d in seen)
    assert filled(page) == 1
    said = words(page)
    assert said["progress"].startswith(("240 steps", "est. speed ")) and "for 240 steps" in said["effort"]
    rounds = int(said["title"].removeprefix("Done in ").removesuffix(" rounds"))
    assert 1 < rounds < 240
    assert said["gain"] == f"{240 / rounds:.1f} steps per call"

    shown = """() => {
        const node = window.app.graph.nodes.find((n) => n.type === 'SaveImage');
        const vue = document.querySelector(`[data-node-id="${node.id}"] img`);
        return (vue ?? node.imgs?.[0])?.naturalWidth === 32;
    }"""
    page.wait_for_function(shown)
    idle(server)
    page.screenshot(path=screenshots() / f"{name}-graph.png")
    assert faults == []


def test_a_reload_restores_the_graph(mode):
    page, faults, _ = mode
    open_workflow(page, example("quickstart"))
    page.wait_for_timeout(1500)  # the frontend keeps its drafts with a delay
    before = as_prompt(page)
    page.reload()
    page.wait_for_function(f"() => window.app?.graph?.nodes?.some((n) => n.type === '{SAMPLER}')")
    assert as_prompt(page) == before
    centre(page)
    assert state(page) == "idle"
    assert faults == []


def test_the_saved_workflow_and_the_queued_graph_do_not_know_the_widget(mode):
    page, _, _ = mode
    start(page)
    saved = json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    written = {n["id"]: n for n in example("quickstart")["nodes"]}
    for node in saved["nodes"]:
        if node["type"].startswith("ParaTAF_") and node["type"] != SAMPLER:
            assert (node.get("widgets_values") or []) == (written[node["id"]].get("widgets_values") or [])
        assert [i["name"] for i in node.get("inputs", [])] == [i["name"] for i in written[node["id"]].get("inputs", [])]
    ours = next(n for n in saved["nodes"] if n["type"] == SAMPLER)
    assert ours["widgets_values"][1:] == written[ours["id"]]["widgets_values"][1:]  # all but the seed
    assert "paratafusion" not in json.dumps(saved).replace("ParaTAFusion", "")
    assert "paratafusion_live" not in json.dumps(as_prompt(page))


@pytest.mark.parametrize("hidden", ["collapsed", "off screen"])
def test_what_cannot_be_seen_is_not_drawn(server, mode, hidden):
    page, faults, _ = mode
    start(page, steps=60)
    if hidden == "collapsed":
        look(page, SAMPLER, "node(kind).collapse()")
    else:
        page.evaluate("() => { window.app.canvas.ds.offset = [9000, 9000]; window.app.canvas.setDirty(true, true) }")
    page.wait_for_timeout(600)
    page.evaluate("""(event) => {
        window.__told = 0;
        window.__count = () => { window.__told += 1 };
        window.app.api.addEventListener(event, window.__count);
    }""", EVENT)  # fmt: skip
    record(page)
    run(page)
    page.wait_for_function("() => window.__told > 1")
    idle(server)
    page.wait_for_timeout(300)
    page.evaluate("(event) => window.app.api.removeEventListener(event, window.__count)", EVENT)
    changed = look(page, SAMPLER, "window.__drawn.filter((d) => d.state !== 'idle').length")
    assert changed == 0 and state(page) == "idle"
    if hidden == "collapsed":
        look(page, SAMPLER, "node(kind).collapse()")
    centre(page)
    until(page, "done")
    assert filled(page) == 1 and faults == []


def test_nothing_is_left_behind(server, mode):
    page, faults, _ = mode
    remove = f"() => {{ const g = window.app.graph; g.remove(g.nodes.find((n) => n.type === '{SAMPLER}')) }}"
    page.evaluate("() => window.app.graph.clear()")
    page.wait_for_timeout(300)
    views, nodes = living(page)
    for moment in ("while it runs", "after its run"):
        start(page, steps=1000 if moment == "while it runs" else 8)
        assert page.locator(WIDGET).count() == 1
        run(page)
        until(page, "running" if moment == "while it runs" else "done")
        page.evaluate(remove)
        server.post("/interrupt", {})
        idle(server)
    start(page)  # another graph takes the place of this one, and then none does
    page.evaluate("() => window.app.graph.clear()")
    page.wait_for_timeout(500)
    assert page.locator(WIDGET).count() == 0
    assert listeners(page, "window.app.api", ours=False).count(EVENT) == 1
    assert listeners(page, "document") == listeners(page, "window") == []
    views_now, nodes_now = living(page)
    # the frontend's Vue nodes keep the graph's own nodes for a while; nothing of ours may outlive those
    assert views_now - views <= max(nodes_now - nodes, 0)
    assert faults == []


@pytest.mark.parametrize("kinds", [("ParaTAF_KeepTrajectory", "ParaTAF_RecallTrajectory"), ("ParaTAF_DemoPrompt",)])
def test_workflow_text_never_becomes_markup(server, mode, kinds):
    page, faults, name = mode
    workflow = example("warm-start")
    for node in workflow["nodes"]:
        node["title"] = MARKUP
        if node["type"] in kinds:
            node["widgets_values"][0] = MARKUP
    open_workflow(page, workflow)
    centre(page)
    run(page)
    page.wait_for_timeout(500)
    idle(server)
    tell = """([event, text]) => {
        const id = String(window.app.graph.nodes.find((n) => n.type === 'ParaTAF_KSampler').id);
        const detail = { node: id, state: 'done', plain: true, rows: 4, steps: 4, frozen: 4, nfe: 4, reason: text };
        window.app.api.dispatchEvent(new CustomEvent(event, { detail }));
    }"""
    page.evaluate(tell, [EVENT, MARKUP])
    until(page, "done")
    assert words(page)["note"].endswith(MARKUP)
    page.screenshot(path=screenshots() / f"{name}-markup.png")
    assert page.evaluate("() => window.__pwned") is None
    assert page.locator("img[src='x']").count() == 0
    assert look(page, SAMPLER, "element.querySelectorAll('img, script, a').length") == 0
    assert faults == []


def test_a_fallback_says_why_in_both_themes(server, mode):
    page, faults, name = mode
    finish(server, page, sampler_name="dpm_adaptive", steps=12)
    page.wait_for_timeout(300)
    said = words(page)
    assert said["title"] == "Done, sequentially" and "dpm_adaptive" in said["note"] and said["gain"] == ""
    inside = look(page, SAMPLER, "element.scrollHeight <= element.clientHeight + 1")
    assert inside, "the reason does not fit"
    for theme in ("light", "dark"):
        page.evaluate("t => window.app.ui.settings.setSettingValueAsync('Comfy.ColorPalette', t)", theme)
        page.wait_for_timeout(500)
        page.screenshot(path=screenshots() / f"{name}-fallback-{theme}.png")
        text = contrasts(page, "paratafusion-live-", ["title", "progress", "note"], "color")
        assert min(text.values()) >= 4.5, (theme, text)
    assert faults == []


def test_it_is_legible_without_a_mouse_or_a_screen(server, mode):
    page, _, name = mode
    finish(server, page, steps=12)
    widget = page.locator(WIDGET)
    assert widget.get_attribute("tabindex") == "0" and widget.get_attribute("role") == "group"
    label = widget.get_attribute("aria-label")
    assert label.startswith("Parallel sampling. Done in ") and "rows evaluated, 12 sequentially" in label
    assert widget.get_by_role("img").get_attribute("aria-label").startswith("Done in ")
    assert widget.get_by_role("status").text_content() == label
    widget.focus()
    assert page.evaluate(f"() => document.activeElement?.matches('{WIDGET}')")
    for theme in ("light", "dark"):
        page.evaluate("t => window.app.ui.settings.setSettingValueAsync('Comfy.ColorPalette', t)", theme)
        page.wait_for_timeout(500)
        page.screenshot(path=screenshots() / f"{name}-done-{theme}.png")
        text = contrasts(page, "paratafusion-live-", ["title", "progress", "effort", "gain"], "color")
        assert min(text.values()) >= 4.5, (theme, text)
        strip = contrasts(page, "paratafusion-live-", ["even", "odd", "far0", "far1", "far2", "far3", "rest"], "fill")
        assert min(strip.values()) >= 3, (theme, strip)


def test_inside_a_subgraph(server, mode):
    page, faults, name = mode
    start(page, steps=12)
    page.evaluate(f"""() => {{
        const graph = window.app.graph, inner = graph.nodes.find((n) => n.type === '{SAMPLER}');
        const made = graph.convertToSubgraph(new Set([inner]));
        window.app.canvas.openSubgraph(made.subgraph, made.node);
    }}""")
    page.wait_for_timeout(500)
    find = f"window.app.canvas.graph.nodes.find((n) => n.type === '{SAMPLER}')"
    page.evaluate(f"""() => {{
        const box = {BOX}({find}), ds = window.app.canvas.ds;
        ds.scale = 1;
        ds.offset = [700 - box[0] - box[2] / 2, 450 - box[1] - box[3] / 2];
        window.app.canvas.setDirty(true, true);
    }}""")
    run(page)
    element = f"{find}.widgets.find((w) => w.name === 'paratafusion_live').element"
    page.wait_for_function(f"() => {element}.dataset.state === 'done'")
    page.screenshot(path=screenshots() / f"{name}-subgraph.png")
    idle(server)
    page.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph)")
    assert faults == []


def test_a_parallel_sampler_shows_the_run_it_is_part_of(server, mode):
    page, faults, name = mode
    start(page, "sampler-custom-advanced")
    set_widgets(page, "RandomNoise", noise_seed=random.randrange(10**9))
    run(page)
    until(page, "done", "ParaTAF_Sampler")
    page.screenshot(path=screenshots() / f"{name}-sampler.png")
    assert filled(page, "ParaTAF_Sampler") == 1
    idle(server)
    assert faults == []


def test_coming_back_to_a_workflow_shows_its_last_run(server, mode):
    page, faults, _ = mode
    finish(server, page, steps=12)
    said = words(page)
    saved = json.loads(page.evaluate("() => JSON.stringify(window.app.rootGraph.serialize())"))
    page.evaluate("w => window.app.loadGraphData(w, true, false)", saved)
    centre(page)
    until(page, "done")
    assert words(page) == said
    assert faults == []


def test_a_graph_that_comes_from_the_cache_after_a_reload_says_so(server, mode):
    page, faults, _ = mode
    finish(server, page, steps=8)
    page.wait_for_timeout(1500)  # the frontend keeps its drafts with a delay
    page.reload()
    page.wait_for_function(f"() => window.app?.graph?.nodes?.some((n) => n.type === '{SAMPLER}')")
    centre(page)
    assert state(page) == "idle"
    run(page)
    until(page, "cached")
    assert words(page)["title"] == "Unchanged, not run again"
    idle(server)
    start(page, steps=8)  # another workflow, whose nodes have the same numbers
    cached = """() => {
        const nodes = window.app.graph.nodes.map((n) => String(n.id));
        window.app.api.dispatchEvent(new CustomEvent('execution_cached', { detail: { nodes, prompt_id: 'p' } }));
    }"""
    page.evaluate("() => { window.app.rootGraph.id = 'another' }")
    page.evaluate(cached)
    page.wait_for_timeout(300)
    assert state(page) == "idle"
    assert faults == []


def test_the_first_round_does_not_show_the_run_before(server, mode):
    page, faults, _ = mode
    finish(server, page, steps=8)
    tell = """([kind, prompt]) => {
        const node = String(window.app.graph.nodes.find((n) => n.type === 'ParaTAF_KSampler').id);
        const detail = { node, workflow: window.app.rootGraph.id, prompt, steps: 8 };
        window.app.api.dispatchEvent(new CustomEvent(kind, { detail }));
    }"""
    page.evaluate(tell, [BEGUN, "p"])
    until(page, "starting")
    assert words(page)["title"] == "Started" and words(page)["note"] == ""
    end = "() => window.app.api.dispatchEvent(new CustomEvent('execution_error', { detail: { prompt_id: 'p' } }))"
    page.evaluate(end)
    until(page, "stopped")
    listen = """(kinds) => {
        window.__told = [];
        window.__note = (event) => window.__told.push(event.type);
        for (const kind of kinds) window.app.api.addEventListener(kind, window.__note);
    }"""
    page.evaluate(listen, [BEGUN, EVENT])
    record(page)
    # long enough for frames to be drawn while it runs, on a machine whose every core is busy too
    set_widgets(page, SAMPLER, steps=240, seed=random.randrange(10**9))
    set_widgets(page, "ParaTAF_DemoModel", batch_size=2)
    run(page)
    until(page, "done")
    idle(server)
    forget = "(kinds) => { for (const kind of kinds) window.app.api.removeEventListener(kind, window.__note) }"
    page.evaluate(forget, [BEGUN, EVENT])
    told = page.evaluate("() => window.__told")
    assert told.count(BEGUN) == 1 and told[0] == BEGUN and told[-1] == EVENT
    assert drawn(page)[0]["state"] in ("starting", "running")  # of the server's own
    assert faults == []


def test_the_canvas_is_moved_and_zoomed_over_the_widget(server, mode):
    page, _, name = mode
    if name != "classic":
        pytest.skip("Vue nodes let the canvas have these themselves")
    start(page)
    box = page.locator(WIDGET).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    look_at = "() => [...window.app.canvas.ds.offset, window.app.canvas.ds.scale]"
    before = page.evaluate(look_at)
    page.mouse.move(x, y)
    page.mouse.down(button="middle")
    page.mouse.move(x + 60, y + 30, steps=4)
    page.mouse.up(button="middle")
    moved = page.evaluate(look_at)
    assert [round(b - a) for a, b in zip(before[:2], moved[:2], strict=True)] == [60, 30]
    kept = """() => new Promise((done) => {
        window.addEventListener('wheel', (event) => done(event.defaultPrevented), { once: true });
    })"""
    page.evaluate(f"() => {{ window.__kept = ({kept})() }}")
    page.mouse.move(x + 60, y + 30)
    page.mouse.wheel(0, -120)
    assert page.evaluate("() => window.__kept") is True
    page.wait_for_timeout(300)
    assert page.evaluate(look_at)[2] > moved[2]
