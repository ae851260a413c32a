"""The pack in a running server, through its HTTP API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_server import ANSWER, PromptError
from PIL import Image

IDS = [
    "ParaTAF_KSampler", "ParaTAF_KSamplerAdvanced", "ParaTAF_Sampler", "ParaTAF_Options", "ParaTAF_SaveTrajectory",
    "ParaTAF_LoadTrajectory", "ParaTAF_KeepTrajectory", "ParaTAF_RecallTrajectory", "ParaTAF_Report", "ParaTAF_Compare",
    "ParaTAF_DemoModel", "ParaTAF_DemoPrompt",
]  # fmt: skip


def demo(sampler: str = "euler", *, node: str = "ParaTAF_KSampler", seed: int = 5, steps: int = 20, cfg: float = 4.0,
         scheduler: str = "normal", name: str = "demo", **options: Any) -> dict[str, Any]:  # fmt: skip
    """The demo model drawn with a KSampler node, the host's or ours, into a PNG."""
    graph = {
        "model": {"class_type": "ParaTAF_DemoModel", "inputs": {"batch_size": 1}},
        "yes": {"class_type": "ParaTAF_DemoPrompt", "inputs": {"text": "large red circle"}},
        "no": {"class_type": "ParaTAF_DemoPrompt", "inputs": {"text": ""}},
        "sampler": {
            "class_type": node,
            "inputs": {
                "model": ["model", 0], "seed": seed, "steps": steps, "cfg": cfg, "sampler_name": sampler,
                "scheduler": scheduler, "positive": ["yes", 0], "negative": ["no", 0], "latent_image": ["model", 2],
                "denoise": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["model", 1]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": name}},
    }  # fmt: skip
    if node == "ParaTAF_KSampler" and options:
        chosen = {"solver": "auto", "preset": "balanced", "tolerance": 0.003, "target_db": 0.0, "window": 8, "rows": 0,
                  "history": 0, "order": 0, "max_rounds": 0, **options}  # fmt: skip
        graph["options"] = {"class_type": "ParaTAF_Options", "inputs": chosen}
        graph["sampler"]["inputs"]["options"] = ["options", 0]
    return graph


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def test_the_nodes_are_there(server):
    info = server.get("/object_info")
    assert server.imported()
    for node in IDS:
        inputs = info[node]["input"]
        for part in ("required", "optional"):
            for name, spec in inputs.get(part, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{node}.{name} has no tooltip"


def test_inputs_are_the_hosts_and_in_its_order(server):
    for theirs, ours in (("KSampler", "ParaTAF_KSampler"), ("KSamplerAdvanced", "ParaTAF_KSamplerAdvanced")):
        host, pack = (server.get(f"/object_info/{n}")[n] for n in (theirs, ours))
        assert pack["input_order"]["required"] == host["input_order"]["required"]
        for name, spec in host["input"]["required"].items():
            mine = pack["input"]["required"][name]
            if isinstance(spec[0], list):
                assert mine[0] == spec[0] or mine[1]["options"] == spec[0], name
                continue
            assert mine[0] == spec[0], name
            for key in ("default", "min", "max", "step", "round", "control_after_generate"):
                wanted = spec[1].get(key) if len(spec) > 1 else None
                assert mine[1].get(key) == wanted, f"{ours}.{name}.{key}"


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "heun", "ddim"])
def test_strict_is_the_hosts_png(server, sampler):
    theirs = server.images(server.run(demo(sampler, node="KSampler", name="host")))["save"]
    ours = server.images(server.run(demo(sampler, preset="strict", name="ours")))["save"]
    assert np.abs(pixels(theirs) - pixels(ours)).max() <= 2


def test_sampler_custom_advanced_with_a_parallel_sampler(server):
    graph = demo()
    del graph["sampler"]
    graph |= {
        "select": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}},
        "options": {"class_type": "ParaTAF_Options", "inputs": demo(preset="strict")["options"]["inputs"]},
        "parallel": {
            "class_type": "ParaTAF_Sampler", "inputs": {"sampler": ["select", 0], "options": ["options", 0]},
        },
        "sigmas": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["model", 0], "scheduler": "karras", "steps": 16, "denoise": 1.0},
        },
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 4}},
        "guider": {
            "class_type": "CFGGuider",
            "inputs": {"model": ["model", 0], "positive": ["yes", 0], "negative": ["no", 0], "cfg": 3.0},
        },
    }  # fmt: skip
    for name, sampler in (("plain", "select"), ("fast", "parallel")):
        graph[name] = {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": [sampler, 0], "sigmas": ["sigmas", 0],
                       "latent_image": ["model", 2]},
        }  # fmt: skip
        for output in (0, 1):
            graph[f"{name}-decode-{output}"] = {
                "class_type": "VAEDecode", "inputs": {"samples": [name, output], "vae": ["model", 1]},
            }  # fmt: skip
            graph[f"{name}-{output}"] = {
                "class_type": "SaveImage",
                "inputs": {"images": [f"{name}-decode-{output}", 0], "filename_prefix": f"{name}-{output}"},
            }
    del graph["decode"], graph["save"]
    images = server.images(server.run(graph))
    for output in (0, 1):
        assert np.abs(pixels(images[f"plain-{output}"]) - pixels(images[f"fast-{output}"])).max() <= 2


def test_bad_input_is_a_red_node_with_one_sentence(server):
    graph = demo(preset="strict")
    graph["yes"]["inputs"]["text"] = "large purpel circle"
    with pytest.raises(PromptError, match="text: unknown word 'purpel'"):
        server.run(graph)
    with pytest.raises(PromptError, match="window"):
        server.queue(demo(window=-1))


def test_the_node_says_why_it_fell_back(server):
    """What the live widget on the running node is told."""
    import websocket

    socket = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={server.client}", timeout=ANSWER)
    try:
        entry = server.run(demo("dpm_adaptive", preset="strict", seed=31, steps=4))
        said: dict[str, Any] = {}
        while said.get("type") != "paratafusion.progress":
            message = socket.recv()
            said = json.loads(message) if isinstance(message, str) else {}
    finally:
        socket.close()
    assert said["data"]["node"] == "sampler" and "dpm_adaptive" in said["data"]["reason"]
    assert "dpm_adaptive ran sequentially" in server.text()
    assert entry["status"]["status_str"] == "success"


def test_the_hosts_own_patch_nodes_are_known_in_a_server(server):
    """There the host loads its extra nodes under other module names than an import does."""
    graph = demo(preset="strict", seed=41)
    graph["patch"] = {"class_type": "Mahiro", "inputs": {"model": ["model", 0]}}
    graph["sampler"]["inputs"]["model"] = ["patch", 0]
    plain = demo(node="KSampler", seed=41)
    plain["patch"] = graph["patch"]
    plain["sampler"]["inputs"]["model"] = ["patch", 0]
    images = [server.images(server.run(g))["save"] for g in (graph, plain)]
    assert "Mahiro" in server.text()
    assert np.array_equal(*map(pixels, images))


def warm_graph(seed: int = 9) -> dict[str, Any]:
    graph = demo(seed=seed, preset="strict", name="warm")
    graph["recall"] = {"class_type": "ParaTAF_RecallTrajectory", "inputs": {"name": "a"}}
    graph["sampler"]["inputs"]["trajectory"] = ["recall", 0]
    graph["keep"] = {"class_type": "ParaTAF_KeepTrajectory", "inputs": {"trajectory": ["sampler", 1], "name": "a"}}
    return graph


def test_keep_and_recall_come_to_rest(server):
    """The first run is cold, the second warm, the third comes from the cache as a whole."""
    runs = [server.run(warm_graph()) for _ in range(3)]
    assert "sampler" not in server.cached(runs[0])
    assert "sampler" not in server.cached(runs[1])
    assert server.cached(runs[2]) == set(warm_graph())
    assert "keep" not in server.cached(server.run(warm_graph(seed=10)))


def test_a_trajectory_survives_a_file(server):
    graph = demo(seed=21, preset="strict", name="file")
    graph["file"] = {
        "class_type": "ParaTAF_SaveTrajectory", "inputs": {"trajectory": ["sampler", 1], "filename_prefix": "t/run"},
    }  # fmt: skip
    entry = server.run(graph)
    assert (server.base / "output" / "t" / "run_00001_.safetensors").is_file()
    listed = server.get("/object_info/ParaTAF_LoadTrajectory")["ParaTAF_LoadTrajectory"]["input"]["required"]["file"]
    assert "t/run_00001_.safetensors [output]" in (listed[1].get("options") or listed[0])
    first = server.images(entry)["save"]
    again = demo(seed=21, preset="strict", name="again")
    again["load"] = {"class_type": "ParaTAF_LoadTrajectory", "inputs": {"file": "t/run_00001_.safetensors [output]"}}
    again["sampler"]["inputs"]["trajectory"] = ["load", 0]
    assert np.abs(pixels(first) - pixels(server.images(server.run(again))["save"])).max() <= 2
    for outside in ("../../secret.safetensors", "/etc/passwd", "t/none.safetensors [output]"):
        again["load"]["inputs"]["file"] = outside
        with pytest.raises(PromptError):
            server.run(again)


@pytest.mark.parametrize("empty", [{"sampler_name": "dpm_adaptive"}, {"denoise": 0.0}])
def test_nothing_to_save_leaves_the_picture_alone(server, empty):
    """The host runs output nodes as they become ready: an error of this one would come before the picture is saved."""
    graph = demo(seed=22, steps=8, preset="balanced", name="unsaved")
    graph["sampler"]["inputs"] |= empty
    graph["file"] = {
        "class_type": "ParaTAF_SaveTrajectory", "inputs": {"trajectory": ["sampler", 1], "filename_prefix": "u/run"},
    }  # fmt: skip
    assert server.images(server.run(graph))["save"].is_file()
    assert not list((server.base / "output").glob("u/*"))


@pytest.mark.parametrize("solver", ["collocation", "auto"])
def test_one_row_draws_a_picture(server, solver):
    """The widget lets it through."""
    graph = demo(seed=23, preset="standard", solver=solver, window=0, rows=1, name="row")
    assert "save" in server.images(server.run(graph))


def test_report_and_comparison(server):
    graph = demo("dpmpp_2m", preset="strict", name="report")
    graph["plain"] = {"class_type": "KSampler", "inputs": {
        k: v for k, v in graph["sampler"]["inputs"].items() if k != "options"}}  # fmt: skip
    graph["report"] = {"class_type": "ParaTAF_Report", "inputs": {"report": ["sampler", 2]}}
    graph["compare"] = {
        "class_type": "ParaTAF_Compare", "inputs": {"result": ["sampler", 0], "reference": ["plain", 0]},
    }  # fmt: skip
    graph["map"] = {"class_type": "SaveImage", "inputs": {"images": ["report", 0], "filename_prefix": "map"}}
    graph["gap"] = {"class_type": "SaveImage", "inputs": {"images": ["compare", 2], "filename_prefix": "gap"}}
    graph["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 3]}}
    graph["words"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 1]}}
    entry = server.run(graph)
    assert pixels(server.images(entry)["map"]).std() > 10
    assert pixels(server.images(entry)["gap"]).shape == (32, 32, 3)
    line = entry["outputs"]["text"]["text"][0]
    assert float(line.split("PSNR ")[1].split(" dB")[0]) > 50
    assert '"fallback": null' in entry["outputs"]["words"]["text"][0]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def test_memory_does_not_grow(server):
    """Median resident memory of runs 6-10 and 26-30."""
    held = []
    for run in range(30):
        server.run(demo(seed=100 + run, steps=8, preset="balanced", name="memory"))
        held.append(resident_mb(server.pid))
    early, late = sorted(held[5:10])[2], sorted(held[25:30])[2]
    assert late - early < 50, held


def test_an_interrupted_run_stops_and_the_next_is_right(server):
    reference = server.images(server.run(demo(seed=77, node="KSampler", name="host")))["save"]
    slow = server.queue(demo(seed=78, steps=1000, preset="exact"))
    # an interrupt counts only while a node runs, so it is asked for until it is heard
    while (entry := server.get(f"/history/{slow}").get(slow)) is None:
        server.post("/interrupt", {})
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    after = server.images(server.run(demo(seed=77, preset="strict", name="after")))["save"]
    assert np.abs(pixels(reference) - pixels(after)).max() <= 2
