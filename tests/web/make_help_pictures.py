"""Writes the pictures of the help pages with the host's own frontend and real runs of the demo model.

    COMFYUI_PATH=... python tests/web/make_help_pictures.py [name ...]

Run it in the host's environment after a change of a node; look at what it has written before keeping it.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

from browser import frontend  # noqa: E402
from comfy_server import Server  # noqa: E402
from graphs import Graph, out  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

TARGET = HERE.parents[1] / "web" / "assets"
COLOURS = 128
PROMPTS = (
    "large red circle", "small green triangle", "large blue square, grey", "large yellow ring, dark",
    "small magenta diamond, top left", "large white cross, dark", "small red square, bottom", "large green diamond",
)  # fmt: skip
GIVEN = {"seed": 5, "steps": 20, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
OPTIONS = {"solver": "auto", "preset": "balanced", "tolerance": 0.003, "target_db": 0.0, "window": 8, "rows": 0,
           "history": 0, "order": 0, "max_rounds": 0}  # fmt: skip


def _start(text: str = PROMPTS[0]) -> tuple[Graph, dict[str, Any]]:
    g = Graph("")
    model = g.add("ParaTAF_DemoModel", batch_size=1)
    yes, no = g.add("ParaTAF_DemoPrompt", text=text), g.add("ParaTAF_DemoPrompt", text="")
    links = {"model": out(model), "positive": out(yes), "negative": out(no), "latent_image": out(model, 2)}
    return g, links


def _fixed(g: Graph) -> dict[str, Any]:
    """A link to options with a fixed window: the same run on every machine."""
    return {"options": out(g.add("ParaTAF_Options", **OPTIONS))}


def _show(g: Graph, latent: str) -> None:
    image = g.add("VAEDecode", samples=out(latent), vae=out("1", 1))
    g.add("PreviewImage", images=out(image))


def ksampler() -> Graph:
    g, links = _start()
    _show(g, g.add("ParaTAF_KSampler", **links, **GIVEN, denoise=1.0, **_fixed(g)))
    return g


def ksampler_advanced() -> Graph:
    g, links = _start()
    given = {**{k: v for k, v in GIVEN.items() if k != "seed"}, "noise_seed": 5, **_fixed(g)}
    first = g.add("ParaTAF_KSamplerAdvanced", **links, **given, add_noise="enable", start_at_step=0, end_at_step=12,
                  return_with_leftover_noise="enable")  # fmt: skip
    links["latent_image"] = out(first)
    second = g.add("ParaTAF_KSamplerAdvanced", **links, **given, add_noise="disable", start_at_step=12,
                   end_at_step=10000, return_with_leftover_noise="disable")  # fmt: skip
    _show(g, second)
    return g


def sampler() -> Graph:
    g, links = _start(PROMPTS[3])
    plain = g.add("SamplerEulerAncestral", eta=0.7, s_noise=1.0)
    parallel = g.add("ParaTAF_Sampler", sampler=out(plain), **_fixed(g))
    sigmas = g.add("BasicScheduler", model=links["model"], scheduler="normal", steps=24, denoise=1.0)
    noise = g.add("RandomNoise", noise_seed=11)
    guider = g.add("CFGGuider", **{k: links[k] for k in ("model", "positive", "negative")}, cfg=4.0)
    run = g.add("SamplerCustomAdvanced", noise=out(noise), guider=out(guider), sampler=out(parallel),
                sigmas=out(sigmas), latent_image=links["latent_image"])  # fmt: skip
    _show(g, run)
    return g


def keep_recall() -> Graph:
    g, links = _start(PROMPTS[2])
    recall = g.add("ParaTAF_RecallTrajectory", name="mine")
    run = g.add("ParaTAF_KSampler", **links, **GIVEN, denoise=1.0, **_fixed(g), trajectory=out(recall))
    g.add("ParaTAF_KeepTrajectory", trajectory=out(run, 1), name="mine")
    _show(g, run)
    return g


def save_load() -> Graph:
    g, links = _start(PROMPTS[4])
    first = g.add("ParaTAF_KSampler", **links, **GIVEN, denoise=1.0)
    g.add("ParaTAF_SaveTrajectory", trajectory=out(first, 1), filename_prefix="trajectories/diamond")
    load = g.add("ParaTAF_LoadTrajectory", file="trajectories/diamond_00001_.safetensors [output]")
    again = g.add("ParaTAF_KSampler", **links, **{**GIVEN, "cfg": 4.6}, denoise=1.0, trajectory=out(load))
    _show(g, again)
    return g


def compare() -> Graph:
    g, links = _start(PROMPTS[5])
    ours = g.add("ParaTAF_KSampler", **links, **GIVEN, denoise=1.0, **_fixed(g))
    theirs = g.add("KSampler", **links, **GIVEN, denoise=1.0)
    both = g.add("ParaTAF_Compare", result=out(ours), reference=out(theirs))
    for name, run in (("parallel", ours), ("sequential", theirs)):
        g.add("SaveImage", images=out(g.add("VAEDecode", samples=out(run), vae=out("1", 1))), filename_prefix=name)
    g.add("SaveImage", images=out(both, 2), filename_prefix="difference")
    g.add("PreviewAny", source=out(both, 0))
    return g


#: picture -> (its graph, the node types it shows, one below the other: the help panel is narrow).
SCREENS: dict[str, tuple[Callable[[], Graph], tuple[str, ...]]] = {
    "ksampler": (ksampler, ("ParaTAF_KSampler",)),
    "ksampler-advanced": (ksampler_advanced, ("ParaTAF_KSamplerAdvanced",)),
    "sampler": (sampler, ("SamplerEulerAncestral", "ParaTAF_Sampler", "SamplerCustomAdvanced")),
    "options": (ksampler, ("ParaTAF_Options",)),
    "keep-recall": (keep_recall, ("ParaTAF_RecallTrajectory", "ParaTAF_KSampler", "ParaTAF_KeepTrajectory")),
    "save-load": (save_load, ("ParaTAF_SaveTrajectory", "ParaTAF_LoadTrajectory")),
}

_LAY_OUT = """async nodes => {
    await window.app.loadApiJson(nodes, 'help');
    const graph = window.app.graph;
    for (const node of graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name === 'control_after_generate') widget.value = 'fixed';
    graph.arrange(50);
}"""
_RUN = """async () => {
    const done = new Promise((resolve, reject) => {
        window.app.api.addEventListener('execution_success', () => resolve(true), { once: true });
        window.app.api.addEventListener('execution_error', e => reject(JSON.stringify(e.detail)), { once: true });
    });
    await window.app.queuePrompt(0, 1);
    return await done;
}"""
#: Removes the other nodes, moves these together and into the middle of the window; returns their box in it.
_FRAME = """async kinds => {
    const graph = window.app.graph, canvas = window.app.canvas, ds = canvas.ds;
    await new Promise(r => setTimeout(r, 600));
    const wanted = graph.nodes.filter(n => !kinds.length || kinds.includes(n.type));
    let top = 0;
    for (const node of wanted.sort((a, b) => a.pos[0] - b.pos[0] || a.pos[1] - b.pos[1])) {
        node.setSize([Math.max(node.size[0], 280), node.size[1]]);
        node.pos = [0, top + 30];
        top += node.size[1] + 65;
    }
    for (const node of [...graph.nodes]) if (!wanted.includes(node)) graph.remove(node);
    const right = Math.max(...wanted.map(n => n.pos[0] + n.size[0]));
    const bottom = Math.max(...wanted.map(n => n.pos[1] + n.size[1]));
    canvas.background_image = null;  // the grid costs more bytes than the nodes
    canvas._pattern = null;
    canvas.clear_background_color = '#1d1d21';
    canvas.deselectAll?.();
    for (let i = 0; i < 3; i++) {  // the frontend fits a loaded graph into its window a little later
        ds.scale = 1;
        ds.offset = [340, 130];
        canvas.draw(true, true);
        await new Promise(r => setTimeout(r, 500));
    }
    return [340 - 14, 130 - 26, right + 28, bottom + 40];
}"""


def _save(image: Image.Image, name: str, width: int = 960) -> None:
    """A palette PNG at most ``width`` pixels wide."""
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    image = image.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    image.save(TARGET / f"{name}.png", optimize=True)
    print(name, image.size, (TARGET / f"{name}.png").stat().st_size)


def _screens(server: Server, names: list[str]) -> None:
    # neither lies over the graph then
    server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
    for name in names:
        build, kinds = SCREENS[name]
        with frontend(server.port) as page:  # a fresh one: node numbers carry the pictures of the graph before
            page.set_viewport_size({"width": 1400, "height": 1500})
            page.wait_for_timeout(1000)
            page.evaluate(_LAY_OUT, build().nodes)
            page.evaluate(_RUN)
            x, y, width, height = page.evaluate(_FRAME, list(kinds))
            raw = page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
        _save(Image.open(io.BytesIO(raw)), name)


def _sheet(pictures: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Small pictures, enlarged by whole pixels, with words below each."""
    side, gap, font = 160, 16, ImageFont.load_default(11)
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, lines * (side + 40) + gap), (32, 32, 36))
    draw = ImageDraw.Draw(sheet)
    for i, (text, picture) in enumerate(pictures):
        x, y = gap + (i % columns) * (side + gap), gap + (i // columns) * (side + 40)
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.text((x + side / 2, y + side + 6), text, (225, 225, 225), font, anchor="ma")
    return sheet


def _compare(server: Server) -> None:
    entry = server.run(compare().nodes)
    files = {path.name.split("_")[0]: path for path in server.images(entry).values()}
    psnr = next(float(o["text"][0]) for o in entry["outputs"].values() if "text" in o)
    words = {"parallel": "parallel", "sequential": "sequential", "difference": f"difference, {psnr:.0f} dB"}
    _save(_sheet([(text, Image.open(files[name])) for name, text in words.items()], 3), "compare")


def _demo(server: Server) -> None:
    pictures = []
    for text in PROMPTS:
        g, links = _start(text)
        run = g.add("ParaTAF_KSampler", **links, **GIVEN, denoise=1.0)
        image = g.add("VAEDecode", samples=out(run), vae=out("1", 1))
        saved = g.add("SaveImage", images=out(image), filename_prefix="help")
        pictures.append(Image.open(server.images(server.run(g.nodes))[saved]))
    _save(_sheet(list(zip(PROMPTS, pictures, strict=True)), 4), "demo")


def _report(server: Server) -> None:
    g, links = _start(PROMPTS[0])
    run = g.add("ParaTAF_KSampler", **links, **{**GIVEN, "steps": 40}, denoise=1.0, **_fixed(g))
    drawn = g.add("ParaTAF_Report", report=out(run, 2))
    saved = g.add("SaveImage", images=out(drawn), filename_prefix="report")
    _save(Image.open(server.images(server.run(g.nodes))[saved]), "report")


DRAWN = {"demo": _demo, "report": _report, "compare": _compare}


def main(names: list[str]) -> None:
    """Write these pictures, or all of them where none is named."""
    names = names or [*SCREENS, *DRAWN]
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "output" / "trajectories"
        folder.mkdir(parents=True)
        server = Server(Path(base))
        server.start()
        try:
            for name, draw in DRAWN.items():
                if name in names:
                    draw(server)
            if "save-load" in names:  # its second half needs the file of its first
                first = {k: v for k, v in save_load().nodes.items() if int(k) <= 5}
                server.run(first)
            _screens(server, [name for name in SCREENS if name in names])
        finally:
            server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
