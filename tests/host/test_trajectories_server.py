"""Trajectories in a running server: linking, names, sketches, and what the artist is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfy_server import PromptError


def graph(seed: int = 5, **options: Any) -> dict[str, Any]:
    """A picture of the demo model, its report as text."""
    sampler = {
        "model": ["model", 0], "seed": seed, "steps": 16, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": ["yes", 0], "negative": ["no", 0], "latent_image": ["model", 2], "denoise": 1.0,
        "options": ["options", 0],
    }  # fmt: skip
    chosen = {"solver": "auto", "preset": "balanced", "tolerance": 0.003, "target_db": 0.0, "window": 8, "rows": 0,
              "history": 0, "order": 0, "max_rounds": 0, **options}  # fmt: skip
    return {
        "model": {"class_type": "ParaTAF_DemoModel", "inputs": {"batch_size": 1}},
        "yes": {"class_type": "ParaTAF_DemoPrompt", "inputs": {"text": "large red circle"}},
        "no": {"class_type": "ParaTAF_DemoPrompt", "inputs": {"text": ""}},
        "options": {"class_type": "ParaTAF_Options", "inputs": chosen},
        "sampler": {"class_type": "ParaTAF_KSampler", "inputs": sampler},
        **told("sampler", "report", "words"),
    }


def told(sampler: str, report: str, words: str) -> dict[str, Any]:
    return {
        report: {"class_type": "ParaTAF_Report", "inputs": {"report": [sampler, 2]}},
        words: {"class_type": "PreviewAny", "inputs": {"source": [report, 1]}},
    }


def report_of(entry: dict[str, Any], words: str = "words") -> dict[str, Any]:
    text = entry["outputs"][words]["text"][0]
    return json.loads(text[text.index("{") :])


def keeping(base: dict[str, Any], name: str) -> dict[str, Any]:
    keep = {"class_type": "ParaTAF_KeepTrajectory", "inputs": {"trajectory": ["sampler", 1], "name": name}}
    return {**base, "keep": keep}


def test_linking_the_trajectory_after_a_run_runs_again(server):
    """There is then something to keep, without another seed; an unchanged graph stays cached before and after."""
    plain, kept = graph(seed=11), keeping(graph(seed=11), "linked late")
    server.run(plain)
    assert "sampler" in server.cached(server.run(plain))
    assert "sampler" not in server.cached(server.run(kept))
    assert server.cached(server.run(kept)) >= {"sampler", "keep"}
    recalled = graph(seed=11)
    recalled["recall"] = {"class_type": "ParaTAF_RecallTrajectory", "inputs": {"name": "linked late"}}
    recalled["sampler"]["inputs"] |= {"trajectory": ["recall", 0], "cfg": 4.4}
    assert report_of(server.run(recalled))["warm"] == "same noise levels"


def recalled(server: Any, client: str, name: str) -> bool:
    """Whether the client finds a trajectory under the name."""
    recall = {"recall": {"class_type": "ParaTAF_RecallTrajectory", "inputs": {"name": name}}}
    shown = {"show": {"class_type": "PreviewAny", "inputs": {"source": ["recall", 0]}}}
    return server.run(recall | shown, client)["outputs"]["show"]["text"] != ["None"]


def test_each_client_keeps_its_own(server):
    """The host's cache serves all clients alike, and must not stand in for what one of them has never kept."""
    kept = keeping(graph(seed=14), "shared")
    server.run(kept, "anna")
    second = server.cached(server.run(kept, "ben"))
    assert "sampler" in second and "keep" not in second
    assert "keep" in server.cached(server.run(kept, "ben"))
    assert recalled(server, "anna", "shared") and recalled(server, "ben", "shared")
    assert not recalled(server, "cleo", "shared")


def test_what_was_dropped_is_kept_again(server):
    """Sixteen fit into the store; a graph whose own had to go keeps it again, once."""
    kept = keeping(graph(seed=15), "n0")
    server.run(kept)
    for number in range(1, 17):
        entry = server.run({**kept, "other": keeping({}, f"n{number}")["keep"]})
        assert "keep" in server.cached(entry)
    assert "keep" not in server.cached(server.run(kept))
    assert "keep" in server.cached(server.run(kept))
    assert recalled(server, server.client, "n0") and not recalled(server, server.client, "n1")


def test_a_sketch_and_its_refinement_in_one_graph(server):
    """The second node takes the first one's final rows over; together they cost one run and at most a window."""
    whole = report_of(server.run(graph(seed=12)))
    both = graph(seed=12, max_rounds=3)
    both["full"] = {**both["options"], "inputs": {**both["options"]["inputs"], "max_rounds": 0}}
    inputs = {**both["sampler"]["inputs"], "options": ["full", 0], "trajectory": ["sampler", 1]}
    both["refine"] = {"class_type": "ParaTAF_KSampler", "inputs": inputs}
    both |= told("refine", "report 2", "words 2")
    entry = server.run(both)
    sketch, finished = report_of(entry), report_of(entry, "words 2")
    assert sketch["status"] == "max_rounds" and finished["status"] == "converged"
    assert finished["warm"].startswith("continued behind")
    assert sketch["nfe"] + finished["nfe"] <= whole["nfe"] + 8
    both["refine"]["inputs"]["cfg"] = 5.0
    other = "same noise levels; the sketch was of another prompt, model, seed or setting"  # nothing of it is final
    assert report_of(server.run(both), "words 2")["warm"] == other


def test_another_latent_shape_starts_cold_and_says_so(server):
    server.run(keeping(graph(seed=13), "small"))
    other = graph(seed=13)
    other["model"]["inputs"]["batch_size"] = 2
    other["recall"] = {"class_type": "ParaTAF_RecallTrajectory", "inputs": {"name": "small"}}
    other["sampler"]["inputs"]["trajectory"] = ["recall", 0]
    report = report_of(server.run(other))
    assert report["warm"] == "cold: the trajectory is of latent shape [1, 3, 32, 32], this run's is [2, 3, 32, 32]"
    assert report["fallback"] is None


@pytest.mark.parametrize("name", ["../x", "/etc/x", "C:\\x", "a\0b", "x" * 300, "CON", "com1.txt", "x.", "a\nb"])
def test_bad_names_never_run(server, name):
    kept = keeping(graph(), name)
    recall = {"recall": {"class_type": "ParaTAF_RecallTrajectory", "inputs": {"name": name}}}
    shown = {"show": {"class_type": "PreviewAny", "inputs": {"source": ["recall", 0]}}}
    saved = graph()
    file = {"trajectory": ["sampler", 1], "filename_prefix": name}
    saved["file"] = {"class_type": "ParaTAF_SaveTrajectory", "inputs": file}
    load = {"load": {"class_type": "ParaTAF_LoadTrajectory", "inputs": {"file": name}}}
    load["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}}
    nodes = {"keep": kept, "recall": recall | shown, "file": saved, "load": load}
    for node, bad in nodes.items():
        try:
            server.queue({k: v for k, v in bad.items() if k != "words"})
        except PromptError as error:
            refused = json.loads(str(error))["node_errors"]
        else:  # another output of the graph may still run; the bad node's does not
            pytest.fail(f"{node} was queued")
        assert any("allowed" in e["details"] for e in refused[node]["errors"])
