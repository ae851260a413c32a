"""The example workflows open in the host's frontend and run on its server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import as_prompt, fresh_node, missing_nodes, open_workflow
from graphs import EXAMPLES, NODE_IDS

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
WIDTHS = {"sd15": (768, 768), "controlnet": (768, 768), "flux": (4096, 768), "z-image": (2560, 768)}
#: Models whose tiny form no loader recognises.
CONFIGURED = {"z-image": "zimage"}
SMALL = {"width": 64, "height": 64, "length": 5}


def test_every_example_is_written_and_has_a_thumbnail():
    assert {p.stem for p in FOLDER.glob("*.json")} == set(EXAMPLES)
    assert {p.stem for p in FOLDER.glob("*.jpg")} == set(EXAMPLES)


def without_downloads(name: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """The graph with its checkpoint read as a bare model, random prompts for text encoders, and small latents."""
    width, pooled = WIDTHS.get(name, (4096, 2048))
    kept: dict[str, Any] = {}
    for number, node in prompt.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind == "CheckpointLoaderSimple":
            node = {"class_type": "UNETLoader", "inputs": {"unet_name": inputs["ckpt_name"], "weight_dtype": "default"}}
        elif kind == "UNETLoader" and name in CONFIGURED:
            node = {"class_type": "TinyModel", "inputs": {"kind": CONFIGURED[name]}}
        elif kind == "CLIPTextEncode":
            node = {"class_type": "TinyPrompt", "inputs": {"text": inputs["text"], "width": width, "pooled": pooled}}
        elif kind.startswith("Empty") and "Latent" in kind:
            node = {"class_type": kind, "inputs": {k: SMALL.get(k, v) for k, v in inputs.items()}}
        elif kind == "VAEDecode":
            node = {"class_type": "SaveLatent", "inputs": {"samples": inputs["samples"], "filename_prefix": name}}
        elif kind in ("SaveImage", "SaveAnimatedWEBP", "CLIPLoader", "DualCLIPLoader", "VAELoader"):
            continue
        kept[number] = node
    return kept


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example(server, page, name):
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    open_workflow(page, workflow)
    assert missing_nodes(page) == []
    prompt = as_prompt(page)
    written = EXAMPLES[name]().nodes
    assert {k: v["class_type"] for k, v in prompt.items()} == {k: v["class_type"] for k, v in written.items()}
    for number, node in written.items():
        for key, value in node["inputs"].items():
            assert prompt[number]["inputs"][key] == value, f"{node['class_type']}.{key}"
    offline = not any("Loader" in node["class_type"] for node in written.values())
    before = len(server.text())  # what other tests have written
    entry = server.run(prompt if offline else without_downloads(name, prompt))
    assert "ran sequentially" not in server.text()[before:]
    assert entry["outputs"]


def test_one_seed_makes_the_sketch_and_its_refinement(server, page):
    """A seed that is found in the sketch is the one that is finished; what is muted while looking leaves no gap."""
    open_workflow(page, json.loads((FOLDER / "preview-and-refine.json").read_text(encoding="utf-8")))
    page.evaluate("() => { window.app.graph.nodes.find((n) => n.type === 'PrimitiveInt').widgets[0].value = 77 }")
    prompt = as_prompt(page)
    samplers = {n: node["inputs"] for n, node in prompt.items() if node["class_type"] == "ParaTAF_KSampler"}
    seeds = [inputs["seed"] for inputs in samplers.values()]
    assert len(seeds) == 2 and seeds[0] == seeds[1]
    assert prompt[seeds[0][0]] == {**prompt[seeds[0][0]], "class_type": "PrimitiveInt", "inputs": {"value": 77}}
    reports = {n: node["inputs"]["report"][0] for n, node in prompt.items() if node["class_type"] == "ParaTAF_Report"}
    for report in reports:
        prompt[f"words {report}"] = {"class_type": "PreviewAny", "inputs": {"source": [report, 1]}}
    outputs = server.run(prompt)["outputs"]
    told = {sampler: outputs[f"words {report}"]["text"][0] for report, sampler in reports.items()}
    sketch, finished = sorted(told, key=lambda n: "trajectory" in samplers[n])
    assert '"status": "max_rounds"' in told[sketch] and "continued behind" in told[finished]

    branch = {finished}
    while more := {n for n, node in prompt.items() if n not in branch and _reads(node, branch)}:
        branch |= more
    mute = "ids => window.app.graph.nodes.filter((n) => ids.includes(String(n.id))).forEach((n) => { n.mode = 2 })"
    page.evaluate(mute, sorted(branch))
    left = as_prompt(page)
    assert not branch & set(left) and "seed" in left[sketch]["inputs"]
    assert server.run(left)["outputs"]


def _reads(node: dict[str, Any], sources: set[str]) -> bool:
    return any(isinstance(value, list) and value[0] in sources for value in node["inputs"].values())


def test_the_quickstart_is_the_sequential_picture(server, page):
    open_workflow(page, json.loads((FOLDER / "quickstart.json").read_text(encoding="utf-8")))
    prompt = as_prompt(page)
    for node in prompt.values():  # not what the test before has left in the cache
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] = 6
    texts = [o["text"][0] for o in server.run(prompt)["outputs"].values() if "text" in o]
    assert float(texts[0].split("PSNR ")[1].split(" dB")[0]) > 50


@pytest.mark.parametrize("node", NODE_IDS)
def test_golden_node(page, node):
    """Ids, input order and defaults of the first commit still hold; inputs may only have been added at the end."""
    golden = json.loads((Path(__file__).parent / "golden" / f"{node}.json").read_text(encoding="utf-8"))
    now = fresh_node(page, node)
    assert now["type"] == golden["type"]
    assert now["outputs"][: len(golden["outputs"])] == golden["outputs"]
    assert now["widgets_values"][: len(golden["widgets_values"])] == golden["widgets_values"]
    for is_widget in (False, True):  # the frontend lists sockets before widgets
        old, new = ([i for i in form["inputs"] if ("widget" in i) == is_widget] for form in (golden, now))
        assert new[: len(old)] == old
