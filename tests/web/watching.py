"""Looks at the live widget in the page: what it shows, what it has drawn, and what it holds on to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import tab
from comfy_server import Server
from playwright.sync_api import Browser, Page

WIDGET = ".paratafusion-live"
#: ``[x, y, width, height]`` of a node with its title; its own bounding box is empty until a frame is drawn.
BOX = "((n) => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])"
EVENT = "paratafusion.progress"
BEGUN = "paratafusion.begun"
#: Elements of a page, by node; the widget's own functions read them.
_FIND = """const node = (type) => window.app.graph.nodes.find((n) => n.type === type);
const live = (type) => node(type).widgets.find((w) => w.name === 'paratafusion_live').element;"""


def screenshots() -> Path:
    """Where pictures of this session are kept to be looked at; git ignores it."""
    folder = Path(os.environ.get("PARATAFUSION_SCREENSHOTS") or Path(__file__).parents[2] / ".cache" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def settings(server: Server, **values: Any) -> None:
    """Set the frontend's settings on the server, before a page is opened."""
    server.post("/settings", {f"Comfy.{name.replace('_', '.')}": value for name, value in values.items()})


@contextmanager
def opened(server: Server, browser: Browser, vue: bool) -> Iterator[tuple[Page, list[str]]]:
    """A page with Vue nodes or the classic canvas, and the pack's own complaints in its console."""
    settings(server, VueNodes_Enabled=vue, TutorialCompleted=True, ColorPalette="dark")
    with tab(browser, server.port) as page:
        faults: list[str] = []
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") and _ours(m) else None)
        page.on("pageerror", lambda e: faults.append(f"{e}\n{e.stack}"))
        page.on("dialog", lambda d: _answer(d, faults))
        try:
            yield page, faults
        finally:
            settings(server, VueNodes_Enabled=False, ColorPalette="dark")


def _answer(dialog: Any, faults: list[str]) -> None:
    """Leave the page where the frontend asks about an unsaved workflow; any other dialog is a fault."""
    if dialog.type != "beforeunload":
        faults.append(f"dialog: {dialog.message}")
    dialog.accept()


def _ours(message: Any) -> bool:
    return bool(re.search("paratafusion", f"{message.text} {message.location.get('url', '')}", re.IGNORECASE))


def look(page: Page, kind: str, script: str) -> Any:
    """The value of an expression over ``element``, the widget of the first node of this type, and ``node``."""
    return page.evaluate(f"([kind]) => {{ {_FIND} const element = live(kind); return {script} }}", [kind])


def state(page: Page, kind: str = "ParaTAF_KSampler") -> str:
    """The state that the widget has drawn last."""
    return look(page, kind, "element.dataset.state")


def until(page: Page, wanted: str, kind: str = "ParaTAF_KSampler") -> None:
    """Wait until the widget has drawn this state."""
    script = f"([kind, wanted]) => {{ {_FIND} return live(kind).dataset.state === wanted }}"
    page.wait_for_function(script, arg=[kind, wanted])


def words(page: Page, kind: str = "ParaTAF_KSampler") -> dict[str, str]:
    """Its pieces of text."""
    names = ("title", "progress", "effort", "gain", "note")
    script = ", ".join(f"{n}: element.querySelector('.paratafusion-live-{n}').textContent" for n in names)
    return look(page, kind, f"({{ {script} }})")


def filled(page: Page, kind: str = "ParaTAF_KSampler") -> float:
    """The final share of the strip's width, from the geometry that is drawn."""
    return look(page, kind, """(() => {
        const strip = element.querySelector('svg'), rows = strip.viewBox.baseVal.width;
        const boxes = ['even', 'odd'].map((n) => strip.querySelector('.paratafusion-live-' + n).getBBox());
        return Math.max(...boxes.map((b) => b.x + b.width)) / rows;
    })()""")  # fmt: skip


def record(page: Page, kind: str = "ParaTAF_KSampler") -> None:
    """From now on note what is drawn; see :func:`drawn`."""
    look(page, kind, """(() => {
        window.__drawn = [];
        window.__observer?.disconnect();
        window.__observer = new MutationObserver(() => window.__drawn.push({
            state: element.dataset.state,
            progress: element.querySelector('.paratafusion-live-progress').textContent,
            moving: element.querySelector('[class^="paratafusion-live-far"]:not([d=""])') !== null,
        }));
        window.__observer.observe(element, { subtree: true, childList: true, characterData: true, attributes: true });
    })()""")  # fmt: skip


def drawn(page: Page) -> list[dict[str, Any]]:
    """What :func:`record` has noted so far, a drawing each."""
    return page.evaluate("() => window.__drawn")


def centre(page: Page, kind: str = "ParaTAF_KSampler") -> None:
    """Bring the node of this type to the middle of the canvas, at natural size."""
    look(page, kind, f"""(() => {{
        const ds = window.app.canvas.ds, box = {BOX}(node(kind));
        ds.scale = 1;
        ds.offset = [700 - box[0] - box[2] / 2, 450 - box[1] - box[3] / 2];
        window.app.canvas.setDirty(true, true);
    }})()""")  # fmt: skip
    page.wait_for_timeout(300)


def set_widgets(page: Page, kind: str, **values: Any) -> None:
    """Set inputs of the first node of this type, as typing would."""
    page.evaluate(
        f"([kind, values]) => {{ {_FIND} for (const [k, v] of Object.entries(values))"
        " node(kind).widgets.find((w) => w.name === k).value = v }",
        [kind, values],
    )


def living(page: Page) -> tuple[int, int]:
    """Views of the widget, and the host's own KSampler nodes, that are in memory after a garbage collection."""
    session = page.context.new_cdp_session(page)
    prototypes = (
        "import('/extensions/ParaTAFusion/live_view.js').then((m) => m.LiveView.prototype)",
        "window.LiteGraph.registered_node_types.KSampler.prototype",
    )
    counted = []
    try:
        for expression in prototypes:
            found = session.send("Runtime.evaluate", {"expression": expression, "awaitPromise": True})
            alive = session.send("Runtime.queryObjects", {"prototypeObjectId": found["result"]["objectId"]})
            ask = {"functionDeclaration": "function () { return this.length }", "returnByValue": True}
            length = session.send("Runtime.callFunctionOn", {"objectId": alive["objects"]["objectId"], **ask})
            counted.append(int(length["result"]["value"]))
    finally:
        session.detach()
    return counted[0], counted[1]


def listeners(page: Page, target: str, ours: bool = True) -> list[str]:
    """The types of the event listeners of an object of the page, named by an expression; the pack's own, or all."""
    session = page.context.new_cdp_session(page)
    scripts: dict[str, str] = {}
    session.on("Debugger.scriptParsed", lambda found: scripts.update({found["scriptId"]: found["url"]}))
    try:
        session.send("Debugger.enable")  # answers after it has told every script
        value = session.send("Runtime.evaluate", {"expression": target})
        found = session.send("DOMDebugger.getEventListeners", {"objectId": value["result"]["objectId"]})
        every = [(entry["type"], scripts.get(entry["scriptId"], "")) for entry in found["listeners"]]
        return sorted(kind for kind, script in every if not ours or "ParaTAFusion" in script)
    finally:
        session.detach()


def contrasts(page: Page, prefix: str, names: list[str], style: str) -> dict[str, float]:
    """WCAG contrast of a colour of these parts of the widget with its ground."""
    script = """([kind, prefix, names, style]) => { FIND
        const luminance = (colour) => {
            const canvas = document.createElement('canvas').getContext('2d');
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
                .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const element = live(kind), ground = luminance(getComputedStyle(element).backgroundColor);
        return Object.fromEntries(names.map((name) => {
            const own = luminance(getComputedStyle(element.querySelector('.' + prefix + name))[style]);
            return [name, (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05)];
        }));
    }""".replace("FIND", _FIND)
    return page.evaluate(script, ["ParaTAF_KSampler", prefix, names, style])
