"""The live widget on messages that a test sends: what it says aloud, what it outlives, and forced colours."""

from __future__ import annotations

from typing import Any

from browser import open_workflow
from test_widget import SAMPLER, example, idle, run, start
from watching import BOX, EVENT, WIDGET, centre, look, screenshots, state, until, words

#: A message as nodes/host/live.py sends it, of a run of twenty steps.
MESSAGE = {"rows": 20, "steps": 20, "frozen": 12, "round": 4, "nfe": 30, "first": 12, "levels": [0, 0.3, 0.6, 1]}
DONE = {"state": "done", "frozen": 20, "round": 9}


def tell(page: Any, *changes: dict[str, Any]) -> None:
    """Send these messages to the sampler's widget, one a frame."""
    page.evaluate(
        """async ([event, kind, messages]) => {
            const id = String(window.app.graph.nodes.find((n) => n.type === kind).id);
            for (const message of messages) {
                const detail = { node: id, workflow: window.app.rootGraph.id, ...message };
                window.app.api.dispatchEvent(new CustomEvent(event, { detail }));
                await new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)));
            }
        }""",
        [EVENT, SAMPLER, [{**MESSAGE, **change} for change in changes]],
    )


def listen(page: Any) -> None:
    """From now on note what a screen reader would be told; see :func:`heard`."""
    look(page, SAMPLER, """(() => {
        const status = element.querySelector('[role=status]');
        window.__heard = [];
        new MutationObserver((all) => {
            if (all.some((change) => change.addedNodes.length)) window.__heard.push(status.textContent);
        }).observe(status, { childList: true, characterData: true, subtree: true });
    })()""")  # fmt: skip


def heard(page: Any) -> list[str]:
    """What :func:`listen` has noted so far."""
    return page.evaluate("() => window.__heard")


def test_a_screen_reader_hears_beginnings_and_ends(mode):
    page, faults, _ = mode
    start(page)
    listen(page)
    steps = [{"state": "sequential", "round": n, "frozen": n, "nfe": n, "reason": "why"} for n in range(21)]
    ended = {**DONE, "plain": True, "reason": "why"}
    tell(page, *steps, ended)
    assert heard(page) == [
        "Parallel sampling. Started", "Parallel sampling. Done, sequentially. 20 steps. ⚠ Not parallel: why",
    ]  # fmt: skip
    tell(page, *steps, ended)
    assert heard(page)[2:] == heard(page)[:2]
    tell(page, ended)  # of a run so short that its beginning was never shown
    assert heard(page)[4:] == heard(page)[1:2]
    tell(page, *({"state": "running", "round": n} for n in range(1, 9)), {"state": "sketch"})
    assert len(heard(page)) == 7 and "Sketch, 4 rounds" in heard(page)[-1]
    look(page, SAMPLER, "node(kind).collapse()")
    page.wait_for_timeout(300)
    look(page, SAMPLER, "node(kind).collapse()")
    centre(page)
    assert len(heard(page)) == 7  # drawn again, and not told again
    assert faults == []


def test_an_old_run_is_shown_and_not_told_again(mode):
    page, faults, _ = mode
    start(page)
    tell(page, {"state": "running"}, DONE)
    saved = page.evaluate("() => JSON.parse(JSON.stringify(window.app.rootGraph.serialize()))")
    page.evaluate("w => window.app.loadGraphData(w, true, false)", saved)
    centre(page)
    until(page, "done")
    assert page.locator(WIDGET).get_by_role("status").text_content() == ""
    assert faults == []


def test_a_node_that_is_taken_out_and_put_back_lives_on(mode):
    page, faults, _ = mode
    start(page)
    tell(page, DONE)
    until(page, "done")
    look(page, SAMPLER, "(() => { const n = node(kind), g = n.graph; g.remove(n); g.add(n) })()")
    centre(page)
    assert page.locator(WIDGET).count() == 1 and state(page) == "done"
    tell(page, {"state": "running"})
    until(page, "running")
    assert words(page)["title"] == "Round 4"
    assert faults == []


def test_a_lost_end_is_made_up_for_when_the_graph_has_ended(mode):
    page, faults, _ = mode
    end = "([kind, prompt_id]) => window.app.api.dispatchEvent(new CustomEvent(kind, { detail: { prompt_id } }))"
    for kind in ("execution_error", "execution_interrupted", "execution_success"):
        start(page)
        tell(page, {"state": "running", "prompt": f"one {kind}"})
        until(page, "running")
        page.evaluate(end, [kind, "another"])
        page.wait_for_timeout(1300)
        assert state(page) == "running"
        page.evaluate(end, [kind, f"one {kind}"])
        until(page, "stopped")
        assert words(page)["title"] == "Stopped in round 4"
    tell(page, {"state": "running", "prompt": "late"})
    page.evaluate(end, ["execution_success", "late"])
    tell(page, {**DONE, "prompt": "late"})  # held back, a moment behind the end
    page.wait_for_timeout(1300)
    assert state(page) == "done"
    assert faults == []


def test_forced_colours_are_the_systems(mode):
    """Dark theme and both ways to draw nodes: no colour of the pack's or of a theme's is left."""
    page, faults, name = mode
    start(page)
    tell(page, {"state": "running", "jumps": [3, 7], "reason": "why"})
    until(page, "running")
    page.emulate_media(forced_colors="active")
    try:
        left = look(page, SAMPLER, """(() => {
            const probe = document.createElement('i');
            probe.style.forcedColorAdjust = 'none';
            document.body.append(probe);
            const computed = (value) => { probe.style.color = value; return getComputedStyle(probe).color };
            const systems = ['Canvas', 'CanvasText', 'GrayText', 'Highlight', 'LinkText'].map(computed);
            const [own, found] = [getComputedStyle(element), { ground: getComputedStyle(element).backgroundColor }];
            for (const part of ['back', 'text', 'quiet', 'warn', 'final', 'final-too', 'far0', 'far1', 'far2', 'far3'])
                found[part] = computed(own.getPropertyValue('--ptf-' + part).trim());
            for (const part of ['even', 'odd', 'rest', 'far0', 'far1', 'far2', 'far3'])
                found[part + ' drawn'] = getComputedStyle(element.querySelector('.paratafusion-live-' + part)).fill;
            for (const part of ['title', 'progress', 'note'])
                found[part] = getComputedStyle(element.querySelector('.paratafusion-live-' + part)).color;
            probe.remove();
            return Object.entries(found).filter(([, colour]) => !systems.includes(colour));
        })()""")  # fmt: skip
        page.screenshot(path=screenshots() / f"{name}-forced-colours.png")
    finally:
        page.emulate_media(forced_colors="none")
    assert left == []
    assert faults == []


def test_a_name_never_becomes_a_link(server, mode):
    """The frontend makes links of what looks like one in a node's line of text."""
    page, faults, _ = mode
    workflow = example("warm-start")
    for node in workflow["nodes"]:
        if node["type"] in ("ParaTAF_KeepTrajectory", "ParaTAF_RecallTrajectory"):
            node["widgets_values"][0] = "www.example.com"
    open_workflow(page, workflow)
    page.evaluate(f"""() => {{
        const {{ app }} = window, box = {BOX}(app.graph.nodes.find((n) => n.type === 'ParaTAF_KeepTrajectory'));
        app.canvas.ds.offset = [500 / app.canvas.ds.scale - box[0], 300 / app.canvas.ds.scale - box[1]];
        app.canvas.setDirty(true, true);
    }}""")
    run(page)
    page.get_by_text("kept 'www.").first.wait_for()
    assert page.locator("a[href*='example.com']").count() == 0
    idle(server)
    assert faults == []
