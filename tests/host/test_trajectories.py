"""Names, files, the store and warm starts on the real host, without a server."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
from pathlib import Path

import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
from paratafusion_pack.nodes import trajectories
from paratafusion_pack.nodes.host.demo_model import load_demo
from paratafusion_pack.nodes.host.graph import UNKNOWN
from paratafusion_pack.nodes.host.listing import Listing
from paratafusion_pack.nodes.host.names import check_name, check_path
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.nodes.host.store import Store
from paratafusion_pack.nodes.samplers import ParallelSampler
from paratafusion_pack.nodes.trajectories import KeepTrajectory, LoadTrajectory, RecallTrajectory, SaveTrajectory
from paratafusion_pack.paratafusion_core import Trajectory, save_trajectory
from paratafusion_pack.paratafusion_core.demo.prompt import encode

GOOD_NAMES = [
    "default", "Anna 2", "a.b", "käse", "夕焼け\u3000二", "<img src=x onerror=alert(1)>", "console", "COM10", "x" * 100,
]  # fmt: skip
BAD_NAMES = [
    "", "   ", "../x", "a/b", "a\\b", "/etc/passwd", "C:\\x", "c:x", "\\\\server\\share", "a\0b", "x" * 300, "CON",
    "nul", "Com1", "LPT9.txt", "aux .safetensors", "COM\u00b9", "CONIN$", "name.", "name ", " name", ".", "..", "a\nb",
    "a\x1bb", "a\u202eb", "\ud800",
]  # fmt: skip
GOOD_PATHS = ["run", "trajectories/ParaTAF", "a\\b", "%date%/x", "夕焼け/二"]
BAD_PATHS = [
    "", "../x", "a/../b", "a/..\\..\\b", "./x", "a//b", "a/", "/etc/passwd", "\\x", "C:/x", "C:x", "a/CON/b",
    "a/nul.txt", "a\0b", "x" * 300, "y/" + "夕" * 90, "a?b", "a<b", 'a"b', "a|b", "a*b", "a./b", "a /b", "a\tb",
]  # fmt: skip


def refusal(check, label: str, value: str) -> str:
    with pytest.raises(ValueError) as caught:
        check(label, value)
    text = str(caught.value)
    assert text.startswith(f"{label} is ") and text.endswith("allowed")
    assert text.isprintable() and len(text) < 320
    return text


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(name):
    assert check_name("name", name) == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_by_keep_and_recall(name):
    text = refusal(check_name, "name", name)
    for node in (KeepTrajectory, RecallTrajectory):
        assert node.validate_inputs(name=name) == text
    with pytest.raises(ValueError, match="allowed"):  # a linked name is only known now
        RecallTrajectory.execute(name)


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_good_paths(path):
    assert check_path("file", path) == path


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_paths_are_refused_by_save_and_load(path):
    assert SaveTrajectory.validate_inputs(filename_prefix=path) == refusal(check_path, "filename_prefix", path)
    for mark in ("", " [output]"):
        assert "allowed" in LoadTrajectory.validate_inputs(file=path + mark)


@pytest.mark.parametrize("file", [5, 1.5, True, ["run.safetensors"]])
def test_a_file_that_is_no_text_is_refused(file):
    text = f"file is {file!r}; a safetensors file inside the input or output folder is allowed"
    assert LoadTrajectory.validate_inputs(file=file) == text
    with pytest.raises(ValueError, match="a safetensors file inside"):  # linked, it is only known now
        LoadTrajectory.execute(file)
    assert LoadTrajectory.fingerprint_inputs(file=file) == [[file, None]]


def test_an_empty_path_is_said_to_be_empty():
    assert "it is empty" in refusal(check_path, "filename_prefix", "") and "absolute" in refusal(
        check_path, "file", "/x"
    )


def test_linked_names_are_checked_later():
    assert KeepTrajectory.validate_inputs() is True and SaveTrajectory.validate_inputs(filename_prefix=None) is True
    assert LoadTrajectory.validate_inputs() is True and LoadTrajectory.validate_inputs(file=None) is True
    assert LoadTrajectory.fingerprint_inputs(file=None) == LoadTrajectory.fingerprint_inputs()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path


def small(rows: int = 4, side: int = 4, **facts) -> Trajectory:
    return Trajectory(torch.zeros(rows, 1, 3, side, side).half(), torch.linspace(9, 1, rows).double(), "euler", **facts)


def test_a_linked_file_is_read_again_after_any_has_changed(folders):
    save_trajectory(Path(folder_paths.get_input_directory()) / "a.safetensors", small())
    before = LoadTrajectory.fingerprint_inputs(file=None)
    assert LoadTrajectory.fingerprint_inputs() == before != []
    save_trajectory(Path(folder_paths.get_input_directory()) / "a.safetensors", small(rows=5))
    assert LoadTrajectory.fingerprint_inputs() != before


def test_a_link_that_leads_outside_is_refused(folders):
    save_trajectory(folders / "secret.safetensors", small())
    (folders / "input" / "link.safetensors").symlink_to(folders / "secret.safetensors")
    assert "inside the input or output folder" in LoadTrajectory.validate_inputs(file="link.safetensors")


def test_only_names_that_load_takes_are_listed(folders):
    for name in ("good.safetensors", "bad?.safetensors", "CON.safetensors"):
        save_trajectory(folders / "output" / name, small())
    assert trajectories._files() == ["good.safetensors [output]"]


def test_a_large_or_damaged_file_is_refused_before_it_is_read(folders, monkeypatch):
    file = folders / "input" / "run.safetensors"
    save_trajectory(file, small())
    whole = file.read_bytes()
    core = sys.modules[Trajectory.__module__]
    monkeypatch.setattr(core, "safe_open", lambda *_, **__: pytest.fail("the file was read"))
    with file.open("r+b") as stream:
        stream.truncate(10**9)  # sparse: it takes no room
    with pytest.raises(ValueError, match="1000000000 bytes; at most 943718400 are allowed"):
        LoadTrajectory.execute("run.safetensors")
    for content in (b"", b"PK\x03\x04", whole[:7], struct.pack("<Q", 1 << 40) + whole[8:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            LoadTrajectory.execute("run.safetensors")


def test_another_safetensors_file_is_refused(folders):
    file = folders / "input" / "lora.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    with pytest.raises(ValueError, match="another kind of file"):
        LoadTrajectory.execute("lora.safetensors")


def test_files_are_listed_as_they_come_and_go(tmp_path):
    listing = Listing(".safetensors")
    assert listing.of(tmp_path / "none") == []
    for name in ("b.safetensors", "a/c.safetensors", "a/d.txt", "a/e/f.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert listing.of(tmp_path) == ["a/c.safetensors", "a/e/f.safetensors", "b.safetensors"]
    (tmp_path / "a" / "c.safetensors").unlink()
    (tmp_path / "a" / "e" / "g.safetensors").touch()
    assert listing.of(tmp_path) == ["a/e/f.safetensors", "a/e/g.safetensors", "b.safetensors"]


def test_a_folder_at_rest_is_not_walked_again(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.safetensors").touch()
    for folder in (tmp_path / "a", tmp_path):
        os.utime(folder, (1e9, 1e9))
    listing = Listing(".safetensors")
    found = listing.of(tmp_path)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("walked again"))
    assert listing.of(tmp_path) == found == ["a/b.safetensors"]
    monkeypatch.setattr(os, "walk", walk)
    (tmp_path / "a" / "c.safetensors").touch()
    assert listing.of(tmp_path) == ["a/b.safetensors", "a/c.safetensors"]


@pytest.fixture
def said(monkeypatch):
    """What the nodes show on themselves."""
    lines: list[str] = []
    monkeypatch.setattr(trajectories, "say_on_node", lines.append)
    monkeypatch.setattr(trajectories, "STORE", Store(entries=2, max_bytes=2000))
    unknown = type("Hidden", (), {"prompt": None, "unique_id": None})
    monkeypatch.setattr(KeepTrajectory, "hidden", unknown, raising=False)
    return lines


def test_keep_and_recall_say_what_happened(said):
    RecallTrajectory.execute("a")
    assert said.pop() == "nothing kept as 'a' yet: a cold start"
    kept = small(latent="Pixels")
    for name in ("a", "b"):
        assert KeepTrajectory.execute(kept, name).args[0] is kept
    assert said.pop() == "kept 'b': euler, 4 evaluations, [1, 3, 4, 4] Pixels, 0.0 MB"
    KeepTrajectory.execute(kept, "c")
    assert "dropped 'a', not used for longest (at most 2 trajectories and 0 MB are kept)" in said.pop()
    RecallTrajectory.execute("b")
    assert said.pop() == "recalled 'b': euler, 4 evaluations, [1, 3, 4, 4] Pixels, 0.0 MB"
    KeepTrajectory.execute(None, "d")
    assert said.pop() == "nothing to keep: the sampler ran sequentially, or had no steps to run"
    huge = small(side=40)
    assert KeepTrajectory.execute(huge, "huge").args[0] is huge  # no error: the picture is still to be saved
    assert "not kept: " in said[-1] and "at most 2000 can be kept" in said.pop()
    assert RecallTrajectory.execute("huge").args[0] is None
    said.clear()
    assert RecallTrajectory.execute("b").args[0] is kept


def test_nothing_to_save_is_said_and_no_error(said, folders):
    assert SaveTrajectory.execute(None, "run").ui is None
    assert said.pop().startswith("nothing to save: the trajectory is empty")
    assert list((folders / "output").iterdir()) == []


def test_what_is_too_large_to_save_is_said_and_no_error(said, folders, monkeypatch):
    monkeypatch.setattr(sys.modules[save_trajectory.__module__], "MAX_BYTES", 100)
    assert SaveTrajectory.execute(small(), "run").ui is None  # the picture is still to be saved
    assert said.pop().startswith("not saved: trajectory has ")
    assert list((folders / "output").iterdir()) == []


def test_save_says_where_the_file_is(said, folders):
    for prefix, file in (("run", "run_00001_.safetensors"), ("a/b", "a/b_00001_.safetensors")):
        saved = SaveTrajectory.execute(small(latent="Pixels"), prefix).ui["files"][0]
        assert said.pop() == f"saved {file}: euler, 0.0 MB"
        assert (folders / "output" / saved["subfolder"] / saved["filename"]).is_file()


def test_the_recall_of_an_unchanged_store_rests(said):
    KeepTrajectory.execute(small(), "a")
    for name in ("a", None, "missing"):
        assert RecallTrajectory.fingerprint_inputs(name=name) == RecallTrajectory.fingerprint_inputs(name=name)
    before = RecallTrajectory.fingerprint_inputs(name=None)
    KeepTrajectory.execute(small(), "b")
    assert RecallTrajectory.fingerprint_inputs(name=None) != before


def draw(warm: Trajectory | None = None, cfg: float = 4.0, steps: int = 16, sampler: str = "euler", batch: int = 1,
         max_rounds: int | None = None, problem: str | None = None) -> Outcome:  # fmt: skip
    """A run of the demo model through the host's own sampling."""
    model = load_demo()[0]
    plan = comfy.samplers.KSampler(model, steps, model.load_device, sampler, "normal", 1.0, model.model_options)
    latent = torch.zeros(batch, 3, 32, 32)
    outcome = Outcome(want_trajectory=True, problem=problem)
    settings = Settings(window=8, max_rounds=max_rounds)
    solver = parallel(comfy.samplers.sampler_object(sampler), settings, outcome, warm)
    yes, no = ([[encode(text)[None, None], {}]] for text in ("large red circle", ""))
    noise = comfy.sample.prepare_noise(latent, 3)
    comfy.sample.sample_custom(model, noise, cfg, solver, plan.sigmas, yes, no, latent, disable_pbar=True, seed=3)
    assert outcome.report.fallback is None
    return outcome


def test_a_trajectory_that_does_not_fit_starts_cold_and_says_why():
    kept = draw().trajectory
    assert kept.latent == "Pixels"
    cold = draw(batch=2).report
    other = draw(kept, batch=2).report
    assert other.warm == "cold: the trajectory is of latent shape [1, 3, 32, 32], this run's is [2, 3, 32, 32]"
    assert other.rows_per_round == cold.rows_per_round
    foreign = draw(dataclasses.replace(kept, latent="SD15"), cfg=4.4).report
    assert foreign.warm == "cold: the trajectory is of latent format SD15, this run's is Pixels"
    unmarked = draw(dataclasses.replace(kept, latent=None), cfg=4.4).report  # a file of the first version
    assert unmarked.warm == "same noise levels" and unmarked.rounds < foreign.rounds


@pytest.mark.parametrize("changed", [{"steps": 24}, {"sampler": "dpmpp_2m"}, {"steps": 24, "sampler": "heun"}])
def test_another_schedule_or_sampler_is_taken_and_said(changed):
    report = draw(draw().trajectory, **changed).report
    expected = "interpolated in lambda onto other noise levels" if "steps" in changed else "same noise levels"
    assert report.warm == expected and report.rounds < draw(**changed).report.rounds


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_a_sketch_is_finished_for_the_price_of_one_run(sampler):
    whole = draw(sampler=sampler).report
    sketch = draw(sampler=sampler, max_rounds=3)
    assert sketch.report.status == "max_rounds" and sketch.trajectory.part is not None
    finished = draw(sketch.trajectory, sampler=sampler).report
    assert "continued behind" in finished.warm and finished.status == "converged"
    assert sketch.report.nfe + finished.nfe <= whole.nfe + 8
    tweaked = draw(sketch.trajectory, sampler=sampler, cfg=6.0).report
    assert "do not hold here" in tweaked.warm


@pytest.mark.parametrize(
    ("made", "now", "word"),
    [("one", "one", None), ("one", "two", "was"), ("one", UNKNOWN, "may be"), (UNKNOWN, UNKNOWN, "may be")],
)
def test_a_sketch_is_taken_over_only_in_a_graph_that_is_known_to_be_its_own(made, now, word):
    sketch = dataclasses.replace(draw(max_rounds=3).trajectory, problem=made)
    told = draw(sketch, problem=now).report.warm
    if word is None:
        assert "continued behind" in told
    else:
        assert told == f"same noise levels; the sketch {word} of another prompt, model, seed or setting"


def test_a_sampler_node_does_not_know_what_it_will_run_with():
    """Neither the model nor the prompts are its inputs."""
    made = ParallelSampler.execute(comfy.samplers.sampler_object("euler"), None, None).args[0]
    assert made.sampler_function._outcome.problem == UNKNOWN
