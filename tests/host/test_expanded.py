"""Nodes that another node has expanded into, as loops do: what they read off the running graph, and what they keep."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from comfy_execution import progress, validation  # noqa: F401  (a server has imported both)
from comfy_execution.graph import DynamicPrompt
from comfy_server import Server
from paratafusion_pack.nodes.host.graph import UNKNOWN, is_linked, problem_of, running_prompt

#: A node that becomes a run with a Keep, and one that shows what kind of trajectory it is given.
PACK = """
import torch
from comfy_execution.graph_utils import GraphBuilder


class Expand:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "keep": ("STRING", {"default": ""}),
                             "objects": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES = ("STRING", "PARATAF_TRAJECTORY")
    FUNCTION, CATEGORY = "go", "test"

    def go(self, seed, keep, objects):
        g = GraphBuilder()
        model = g.node("ParaTAF_DemoModel", batch_size=1)
        yes, no = (g.node("ParaTAF_DemoPrompt", text=text) for text in ("large red circle", ""))
        latent = {"samples": torch.zeros(1, 3, 32, 32)} if objects else model.out(2)
        sketch, whole = (
            g.node("ParaTAF_Options", solver="auto", preset="balanced", tolerance=0.003, target_db=0.0, window=8,
                   rows=0, history=0, order=0, max_rounds=most) for most in (3, 0))
        inputs = dict(model=model.out(0), seed=seed, steps=16, cfg=4.0, sampler_name="euler", scheduler="normal",
                      positive=yes.out(0), negative=no.out(0), latent_image=latent, denoise=1.0)
        first = g.node("ParaTAF_KSampler", options=sketch.out(0), **inputs)
        second = g.node("ParaTAF_KSampler", options=whole.out(0), trajectory=first.out(1), **inputs)
        report = g.node("ParaTAF_Report", report=second.out(2))
        if keep:
            g.node("ParaTAF_KeepTrajectory", trajectory=second.out(1), name=keep)
        return {"result": (report.out(1), second.out(1)), "expand": g.finalize()}


class Seed:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"trajectory": ("PARATAF_TRAJECTORY",)}}

    RETURN_TYPES, OUTPUT_NODE, FUNCTION, CATEGORY = (), True, "go", "test"

    def go(self, trajectory):
        return {"ui": {"seed": [None if trajectory is None else trajectory.seed]}}


NODE_CLASS_MAPPINGS = {"TestExpand": Expand, "TestSeed": Seed}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("comfyui"))
    (running.base / "custom_nodes" / "expanding.py").write_text(PACK, encoding="utf-8")
    running.start()
    yield running
    running.stop()


def graph(seed: int, keep: str = "", objects: bool = False) -> dict[str, Any]:
    """A run inside an expansion, and the words of its report outside."""
    inputs = {"seed": seed, "keep": keep, "objects": objects}
    return {
        "expand": {"class_type": "TestExpand", "inputs": inputs},
        "words": {"class_type": "PreviewAny", "inputs": {"source": ["expand", 0]}},
    }


def with_recall(seed: int, name: str, objects: bool) -> dict[str, Any]:
    """A Recall outside, of what the Keep inside has kept in the run before."""
    return {
        **graph(seed, name, objects),
        "recall": {"class_type": "ParaTAF_RecallTrajectory", "inputs": {"name": name}},
        "shown": {"class_type": "TestSeed", "inputs": {"trajectory": ["recall", 0]}},
    }


@pytest.mark.parametrize("objects", [False, True], ids=["plain", "objects"])
def test_recall_follows_a_keep_inside_an_expansion(server, objects):
    name = f"loop {objects}"
    seeds = [server.run(with_recall(seed, name, objects))["outputs"]["shown"]["seed"] for seed in (1, 2, 3, 4)]
    assert seeds == [[None], [1], [2], [3]]
    unchanged = [server.run(with_recall(4, name, objects)) for _ in range(2)]
    assert unchanged[0]["outputs"]["shown"]["seed"] == [4]
    assert server.cached(unchanged[1]) == set(with_recall(4, name, objects))  # it comes to rest


@pytest.mark.parametrize("objects", [False, True], ids=["plain", "objects"])
def test_a_sketch_inside_an_expansion_is_finished(server, objects):
    text = server.run(graph(31, objects=objects))["outputs"]["words"]["text"][0]
    assert json.loads(text[text.index("{") :])["warm"].startswith("continued behind")


def test_a_trajectory_leaves_an_expansion(server):
    """Nothing in the graph reads the sampler's own output: it is returned."""
    shown = {"shown": {"class_type": "TestSeed", "inputs": {"trajectory": ["expand", 1]}}}
    assert server.run(graph(32) | shown)["outputs"]["shown"]["seed"] == [32]


@pytest.fixture
def running(monkeypatch):
    """The host's own record of a run whose node "loop" has become a sampler and a Keep."""
    kinds = {"Loop": ("LATENT", "TRAJECTORY", "*"), "Sampler": ("LATENT", "TRAJECTORY"), "Keep": ("TRAJECTORY",)}
    classes = {name: SimpleNamespace(RETURN_TYPES=types) for name, types in kinds.items()}
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS=classes))
    prompt = {
        "model": {"class_type": "Model", "inputs": {"name": "a"}},
        "loop": {"class_type": "Loop", "inputs": {"model": ["model", 0]}},
        "shown": {"class_type": "Show", "inputs": {"value": ["loop", 0]}},
    }
    found = DynamicPrompt(prompt)
    sampler = {"class_type": "Sampler", "inputs": {"model": ["model", 0], "seed": 3, "latent": object()}}
    found.add_ephemeral_node("loop.0.1", sampler, "loop", "loop")
    monkeypatch.setattr(progress, "global_progress_registry", progress.ProgressRegistry("run", found))
    return found


def test_what_reads_an_expanded_node(running):
    """A reader inside counts, and one outside where the node it expands has an output that could pass it on."""
    prompt, sampler = running.get_original_prompt(), "loop.0.1"
    assert is_linked(prompt, sampler, 0)  # as the loop's LATENT
    assert not is_linked(prompt, sampler, 1) and not is_linked(running_prompt(), sampler, 1)
    for output, read in ((1, True), (2, True), (0, False)):
        running.get_node("shown")["inputs"]["value"] = ["loop", output]
        assert is_linked(prompt, sampler, 1) == read
    running.add_ephemeral_node("loop.0.2", {"class_type": "Keep", "inputs": {"t": [sampler, 1]}}, "loop", "loop")
    assert is_linked(prompt, sampler, 1)
    assert is_linked(prompt, "loop.0.2", 0) is False
    assert is_linked(prompt, "loop.0.3", 0)  # in no graph


def test_the_problem_of_an_expanded_node(running):
    """As of any other; an object among its inputs is the same as itself, and in no other run."""
    prompt, sampler = running.get_original_prompt(), "loop.0.1"
    same = problem_of(prompt, sampler)
    assert same == problem_of(running_prompt(), sampler) != UNKNOWN
    inputs = running.get_node(sampler)["inputs"]
    for name, other in (("seed", 4), ("latent", object())):
        before, inputs[name] = inputs[name], other
        assert problem_of(prompt, sampler) != same
        inputs[name] = before
    prompt["model"]["inputs"]["name"] = "b"
    assert problem_of(prompt, sampler) != same
    prompt["model"]["inputs"]["name"] = "a"
    assert problem_of(prompt, sampler) == same
    progress.get_progress_state().prompt_id = "the next run"
    assert problem_of(prompt, sampler) not in (same, UNKNOWN)
    itself: list[Any] = []
    itself.append(itself)
    for odd in ({1: "keys that", "have": "no order"}, itself):
        inputs["latent"] = odd
        assert problem_of(prompt, sampler) == UNKNOWN
