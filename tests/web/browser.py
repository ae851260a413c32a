"""The host's frontend in a headless browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

#: Its own first graph is there, too, which would take the place of one that is opened before.
READY = """() => window.app?.graph && 'ParaTAF_KSampler' in (window.LiteGraph?.registered_node_types ?? {})
    && window.app.extensionManager?.workflow?.activeWorkflow"""

#: Without the last one a GPU is emulated, for a third of all the time.
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-software-rasterizer"]
#: Milliseconds that a step may take at most, on a machine that is busy with other things.
PATIENCE = 300_000


@contextmanager
def chromium_driven() -> Iterator[Browser]:
    """A headless Chromium; one at a time in a process."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        raise RuntimeError("there is no chromium: install Debian's package, or name one in CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tab(browser: Browser, port: int, before: Callable[[Page], None] = lambda page: None) -> Iterator[Page]:
    """A page of its own with the frontend of the server on ``port``, ready for use; ``before`` it is loaded."""
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(PATIENCE)
    try:
        before(page)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_function(READY)
        page.keyboard.press("Escape")  # the template browser of a first run
        yield page
    finally:
        page.close()


@contextmanager
def frontend(port: int) -> Iterator[Page]:
    """A page with the frontend of the server on ``port`` in a browser of its own."""
    with chromium_driven() as browser, tab(browser, port) as page:
        yield page


def open_workflow(page: Page, workflow: dict[str, Any]) -> None:
    """Open a saved workflow, as a person would by dropping its file."""
    page.evaluate("async w => { await window.app.loadGraphData(w) }", workflow)


def as_prompt(page: Page) -> dict[str, Any]:
    """The open graph in API form."""
    return json.loads(page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))


def missing_nodes(page: Page) -> list[str]:
    """Types in the open graph that the frontend does not know."""
    return page.evaluate(
        "() => window.app.graph.nodes.map(n => n.type).filter(t => !(t in window.LiteGraph.registered_node_types))"
    )


def write_workflow(page: Page, nodes: dict[str, Any], note: str) -> dict[str, Any]:
    """What the frontend saves of a graph in API form, arranged, with a note and fixed seeds."""
    script = """async ([nodes, note]) => {
        await window.app.loadApiJson(nodes, 'example');
        const graph = window.app.graph;
        for (const node of graph.nodes)
            for (const widget of node.widgets ?? [])
                if (widget.name === 'control_after_generate') widget.value = 'fixed';
        const shown = { SaveImage: 290, PreviewImage: 290, SaveAnimatedWEBP: 290, PreviewAny: 190 };
        for (const node of graph.nodes) {  // room for the picture of a run, and for Vue nodes, which are wider
            const [width, height] = node.computeSize();
            const wide = node.type in shown ? 250 : 225;
            const prompt = ['ParaTAF_DemoPrompt', 'CLIPTextEncode'].includes(node.type);
            const [across, down] = prompt ? [300, 120] : node.size;
            node.setSize([Math.max(across, width, wide), Math.max(down, height, shown[node.type] ?? 0)]);
        }
        graph.arrange(60);
        // beside the graph: above it the frontend would open both so small that it leaves the texts out
        const text = window.LiteGraph.createNode('MarkdownNote');
        text.widgets[0].value = note;
        text.size = [340, 340];
        text.pos = [Math.min(...graph.nodes.map((node) => node.pos[0])) - 400, graph.nodes[0].pos[1]];
        graph.add(text);
        return JSON.stringify(graph.serialize());
    }"""
    return json.loads(page.evaluate(script, [nodes, note]))


def thumbnail(page: Page, path: Path) -> None:
    """The open graph as a small picture, without the windows of a first run around it."""
    drawn = page.evaluate("""() => {
        const canvas = window.app.canvas, ds = canvas.ds, boxes = window.app.graph.nodes.map(n => n.getBounding());
        const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
        const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
        canvas.min_font_size_for_lod = 0;  // words however small
        canvas.show_info = false;
        ds.scale = Math.min(1500 / (right - left), 800 / (bottom - top), 1);
        ds.offset = [800 / ds.scale - (left + right) / 2, 450 / ds.scale - (top + bottom) / 2];
        for (const node of window.app.graph.nodes) node.has_errors = false;
        canvas.draw(true, true);
        const small = document.createElement('canvas');
        small.width = 800;
        small.height = 450;
        const pen = small.getContext('2d'), size = 14 * ds.scale / 2;
        pen.drawImage(canvas.canvas, 0, 0, 800, 450);
        pen.font = `${size}px sans-serif`;
        pen.fillStyle = '#ddd';
        const texts = window.app.graph.nodes.flatMap(n => (n.widgets ?? []).map(w => [n, w]));
        for (const [node, widget] of texts.filter(([, w]) => w.element && typeof w.value === 'string')) {
            // a text is an element above the canvas
            const x = (node.pos[0] + 12 + ds.offset[0]) * ds.scale / 2, wide = (node.size[0] - 24) * ds.scale / 2;
            let y = (node.pos[1] + widget.y + 14 + ds.offset[1]) * ds.scale / 2, line = '';
            const put = () => { pen.fillText(line, x, y += 1.3 * size); line = ''; };
            for (const words of widget.value.replace(/\\*\\*|^## /gm, '').split('\\n')) {
                for (const word of words.split(' ')) {
                    if (line && pen.measureText(`${line} ${word}`).width > wide) put();
                    line = line ? `${line} ${word}` : word;
                    while (pen.measureText(line).width > wide) {  // a path, broken as the browser breaks it
                        let end = line.length;
                        while (end > 1 && pen.measureText(line.slice(0, end)).width > wide) end -= 1;
                        const rest = line.slice(end);
                        line = line.slice(0, end);
                        put();
                        line = rest;
                    }
                }
                put();
            }
        }
        return small.toDataURL('image/jpeg', 0.8);
    }""")
    path.write_bytes(base64.b64decode(drawn.split(",", 1)[1]))


def fresh_node(page: Page, node_id: str) -> dict[str, Any]:
    """A node as the frontend makes and saves it: what a shared workflow depends on."""
    script = """type => {
        const graph = new window.LiteGraph.LGraph(), node = window.LiteGraph.createNode(type);
        graph.add(node);
        return JSON.stringify(graph.serialize().nodes[0]);
    }"""
    saved = json.loads(page.evaluate(script, node_id))
    parts = {"inputs": ("name", "type", "shape", "widget"), "outputs": ("name", "type")}
    kept = {side: [{k: e[k] for k in keys if k in e} for e in saved.get(side, [])] for side, keys in parts.items()}
    return {"type": saved["type"], **kept, "widgets_values": saved.get("widgets_values", [])}
