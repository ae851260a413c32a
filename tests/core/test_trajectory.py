"""Trajectories: files that are whole or refused, other schedules, warm starts."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from paratafusion_core import (
    Options,
    System,
    Trajectory,
    files,
    load_trajectory,
    save_trajectory,
    schedules,
    schemes,
    solve,
)
from paratafusion_core import trajectory as module
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.noise import draw

modest = settings(deadline=None, max_examples=50)
FACTS = {"sampler": "ddim", "seed": 7, "flow": False}
META = {"format": module.FORMAT, "version": str(module.VERSION), "facts": json.dumps(FACTS)}


def example(rows: int = 5) -> Trajectory:
    D = torch.randn(rows, 2, 3, 4, generator=torch.Generator().manual_seed(rows)).half()
    return Trajectory(D, schedules.normal(rows)[:-1], "ddim", 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_trajectory(path)
    text = str(caught.value)
    assert text.startswith("trajectory") and "allowed" in text and "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("shape", [(1, 3), (2, 8, 16), (1, 4, 8, 8), (2, 4, 3, 4, 4)])
@pytest.mark.parametrize(("seed", "flow"), [(None, False), (0, True), (2**63, False)])
def test_round_trip(path: Path, shape: tuple[int, ...], seed: int | None, flow: bool) -> None:
    sigmas = (schedules.flow(6) if flow else schedules.karras(6))[:-1]
    saved = Trajectory(torch.randn(6, *shape).half(), sigmas, "dpmpp_2m", seed, flow)
    save_trajectory(path, saved)
    loaded = load_trajectory(path)
    assert torch.equal(loaded.D, saved.D) and loaded.D.dtype == torch.float16
    assert torch.equal(loaded.sigmas, sigmas) and loaded.sigmas.dtype == torch.float64
    assert (loaded.sampler, loaded.seed, loaded.flow, loaded.shape) == ("dpmpp_2m", seed, flow, shape)


def test_levels_are_the_same_to_rounding() -> None:
    sigmas = schedules.karras(6)[:-1]
    for kept in (sigmas, sigmas.float()):
        one = Trajectory(torch.randn(6, 1, 4).half(), kept, "dpmpp_2m")
        assert one.onto(sigmas * (1 + 3e-7), False) is one
        assert not one.has_levels(sigmas * 1.001, False) and not one.has_levels(sigmas[:-1], False)
        assert not one.has_levels(sigmas, True)


@pytest.mark.parametrize("then", [lambda file: file.write(b"\x11" * 4096), lambda file: file.truncate(0)])
def test_a_file_that_changes_later_changes_nothing(path: Path, then: Callable[[Any], Any]) -> None:
    """To read a mapped page of a file that was cut off would kill the process: first of all it is a copy of its own."""
    saved = example(200)
    save_trajectory(path, saved)
    kept = load_trajectory(path)
    assert kept.D.untyped_storage().resizable()
    with path.open("r+b") as file:
        then(file)
    assert torch.equal(kept.D, saved.D) and torch.equal(kept.sigmas, saved.sigmas)


@pytest.mark.parametrize("failing", ["save_file", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [True, False])
def test_a_failing_write_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException, old: bool
) -> None:
    if old:
        save_trajectory(path, example(3))
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    assert list(before) == ([path.name] if old else [])

    def fail(first: Any, target: Any, **more: Any) -> None:
        if failing == "save_file":
            Path(target).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files if failing == "save_file" else os, failing, fail)
    with pytest.raises(type(error)):
        save_trajectory(path, example(5))
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        save_trajectory(tmp_path / "missing" / "run.safetensors", example())


def test_truncated_at_every_interesting_length(path: Path) -> None:
    save_trajectory(path, example())
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, path.name)
    path.write_bytes(whole + b"\0")
    refused(path, path.name)


@pytest.mark.parametrize("length", [0, 1, 10**5, 2**20 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(path: Path, length: int) -> None:
    save_trajectory(path, example())
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(path, path.name)


def test_a_header_that_promises_terabytes(path: Path) -> None:
    header = {"__metadata__": META, "sigmas": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}
    header["D"] = {"dtype": "F16", "shape": [1, 2**40], "data_offsets": [8, 8 + 2**41]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    refused(path, path.name)


@modest
@given(st.data())
def test_any_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """No byte of the header makes anything but a trajectory or the sentence come out."""
    path = tmp_path_factory.mktemp("damage") / "run.safetensors"
    save_trajectory(path, example())
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        assert isinstance(load_trajectory(path), Trajectory)
    except ValueError as error:
        assert "allowed" in str(error)


def test_what_could_not_be_loaded_is_not_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = example()
    monkeypatch.setattr(module, "MAX_BYTES", large.nbytes)
    with pytest.raises(ValueError, match=f"a file of at most {large.nbytes} is allowed"):
        save_trajectory(path, large)
    assert not path.exists()


def test_too_large_is_refused_before_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_trajectory(path, example())
    assert load_trajectory(path, max_bytes=path.stat().st_size).shape == (2, 3, 4)
    monkeypatch.setattr(module, "safe_open", lambda *_, **__: pytest.fail("the file was read"))
    with pytest.raises(ValueError, match=f"{path.stat().st_size} bytes; at most 99 are allowed"):
        load_trajectory(path, max_bytes=99)
    for size in (module.MAX_BYTES + 1, 10**9, 1 << 30):
        with path.open("r+b") as file:
            file.truncate(size)  # sparse: takes no room
        refused(path, str(size), str(module.MAX_BYTES))


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    return {"D": example().D, "sigmas": example().sigmas} | changes


PART = {"final": 1, "tolerance": 0.1, "solver": "collocation", "system": "x", "slope": 0.0, "slope_sigma": 0.0,
        "surprise": 0.0, "rows": [], "rounds": 5, "nfe": 9}  # fmt: skip


def facts(**changes: Any) -> dict[str, str]:
    return META | {"facts": json.dumps(FACTS | changes)}


@pytest.mark.parametrize(
    ("content", "meta", "part"),
    [
        ({"samples": torch.ones(2, 3)}, {}, "another kind"),
        ({"samples": torch.ones(2, 3)}, META, "another kind"),
        (tensors(extra=torch.ones(1)), META, "another kind"),
        (tensors(), {}, "another kind"),
        (tensors(), META | {"format": "pt"}, "another kind"),
        (tensors(), META | {"version": "2"}, "version 2"),
        (tensors(D=torch.full((5, 1, 2), torch.nan).half()), META, "NaN"),
        (tensors(D=torch.full((5, 1, 2), torch.inf).half()), META, "infinity"),
        (tensors(D=torch.ones(5, 1, 2, dtype=torch.int64)), META, "torch.int64"),
        (tensors(D=torch.ones(5, 1, 2).to(torch.float8_e4m3fn)), META, "D"),
        (tensors(D=torch.ones(5).half()), META, "[5]"),
        (tensors(D=torch.ones(5, 0, 2).half()), META, "[5, 0, 2]"),
        (tensors(sigmas=torch.full((5,), torch.nan).double()), META, "sigmas"),
        (tensors(sigmas=torch.tensor([4.0, 3.0, 2.0, 1.0, -1.0]).double()), META, "sigmas"),
        (tensors(sigmas=torch.ones(4).double()), META, "[4]"),
        (tensors(sigmas=torch.ones(5, dtype=torch.complex64)), META, "sigmas"),
        (tensors(), META | {"facts": "{"}, "damaged"),
        (tensors(), META | {"facts": "[]"}, ""),
        (tensors(), META | {"facts": "[" * 5000}, ""),
        (tensors(), facts(sampler=3), "3"),
        (tensors(), facts(seed="x"), "'x'"),
        (tensors(), facts(latent="x" * 201), "at most 200 letters"),
        (tensors(), facts(sampler="ddim\x00"), "letters that print"),
        (tensors(), facts(part=PART | {"rows": [3, 3]}), "rise"),
        (tensors(), facts(part=PART | {"rows": [0, 5]}), "reach 5"),
        (tensors(), facts(part=PART | {"rows": "0"}), "list"),
        (tensors(changes=torch.ones(2, 1, 1, 3).half()), facts(part=PART), "changes"),
    ],
)
def test_foreign_files(path: Path, content: dict[str, Tensor], meta: dict[str, str], part: str) -> None:
    save_file(content, str(path), metadata=meta)
    refused(path, part)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("hello, I am text")])
def test_no_trajectory_at_all(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    refused(path, path.name)


def test_the_same_levels_are_the_same_trajectory() -> None:
    kept = example()
    assert kept.onto(kept.sigmas.clone(), False) is kept
    assert kept.onto(kept.sigmas * 1.01, False) is not kept


levels = st.lists(st.floats(0.01, 200), min_size=1, max_size=12, unique=True).map(
    lambda s: torch.tensor(sorted(s, reverse=True), dtype=torch.float64)
)


@modest
@given(levels, levels)
def test_interpolation_is_linear_in_lambda_and_held_beyond_the_ends(have: Tensor, want: Tensor) -> None:
    kept = Trajectory((-have.log() / 8).reshape(-1, 1, 1).half(), have)
    # levels that are the same to rounding give back the trajectory itself, see above
    assume(torch.equal(have, want) or not kept.has_levels(want, False))
    got = kept.onto(want, False)
    expected = -want.clamp(have.min(), have.max()).log() / 8
    torch.testing.assert_close(got.D.double().flatten(), expected, atol=2e-3, rtol=0)
    assert torch.equal(got.sigmas, want) and got.D.dtype == torch.float16


@modest
@given(levels, levels, st.data())
def test_interpolation_adds_no_bumps(have: Tensor, want: Tensor, data: st.DataObject) -> None:
    values = st.lists(st.floats(-100, 100), min_size=len(have), max_size=len(have))
    D = torch.tensor(sorted(data.draw(values))).half().reshape(-1, 1, 1)
    got = Trajectory(D, have).onto(want, False).D.flatten()
    assert (got.diff() >= 0).all()
    assert D.min() <= got.min() and got.max() <= D.max()


@modest
@given(levels)
def test_flow_and_ve_levels_meet_in_lambda(sigmas: Tensor) -> None:
    kept = Trajectory(torch.randn(len(sigmas), 1, 3).half(), sigmas)
    times = sigmas / (1 + sigmas)  # alpha = 1 - t, sigma_ve = t / (1 - t)
    flowing = kept.onto(times, True)
    assert flowing.flow and torch.equal(flowing.sigmas, times)
    # levels may lie close together, where lambda's rounding moves the weights
    near = sigmas.log().diff().abs().min() > 1e-6 if len(sigmas) > 1 else True
    if near:
        torch.testing.assert_close(flowing.D, kept.D, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(flowing.onto(sigmas, False).D, kept.D, atol=1e-2, rtol=1e-2)


def test_pure_noise_and_pure_data_have_a_place() -> None:
    flowing = Trajectory(torch.tensor([1.0, 2.0]).half().reshape(2, 1, 1), torch.tensor([1.0, 0.0]), flow=True)
    assert flowing.onto(torch.tensor([1e9, 0.0]), False).D.flatten().tolist() == [1.0, 2.0]


def test_of_repeated_levels_the_last_counts() -> None:
    D = torch.tensor([0.0, 5.0, 1.0, 9.0, 2.0]).half().reshape(-1, 1, 1)
    kept = Trajectory(D, torch.tensor([8.0, 4.0, 4.0, 2.0, 2.0]))
    assert kept.onto(torch.tensor([8.0, 4.0, 2.0]), False).D.flatten().tolist() == [0.0, 1.0, 2.0]


MIXTURE = Mixture.make(modes=16, classes=4, shape=(2, 4, 4))


def rounds(seed: int, cfg: float, steps: int, warm: Trajectory | None = None, **more: Any) -> tuple[int, Any]:
    sigmas = schedules.normal(steps)
    system = schemes.ddim(draw(seed, 1, MIXTURE.shape)[0].double() * sigmas[0], sigmas)
    solution = solve(system, MIXTURE.denoiser(seed % 4, cfg), Options(**more), warm=warm)
    return solution.report.rounds, solution


@pytest.mark.parametrize(("solver", "steps"), [("quasi-newton", 24), ("quasi-newton", 30), ("parataa", 24)])
def test_a_warm_start_from_a_file_saves_rounds(path: Path, solver: str, steps: int) -> None:
    cold = warm = 0
    for seed in range(4):
        kept = rounds(seed, 4.0, 24, solver=solver)[1].trajectory
        save_trajectory(path, kept)
        alone, _ = rounds(seed, 4.4, steps, solver=solver)
        fewer, solution = rounds(seed, 4.4, steps, load_trajectory(path), solver=solver)
        cold, warm = cold + alone, warm + fewer
        assert ("same" if steps == 24 else "interpolated") in solution.report.warm
    assert warm < cold


@pytest.mark.parametrize("options", [{"solver": "sequential"}, {"window": 1}], ids=str)
def test_a_warm_start_of_one_row_after_the_other_is_told_to_save_nothing(options: dict[str, Any]) -> None:
    kept = rounds(0, 4.0, 12)[1].trajectory
    taken, done = rounds(0, 4.4, 12, kept, **options)
    assert taken == 12 and "only pictures on the way gain by it" in done.report.warm
    assert torch.equal(done.x, rounds(0, 4.4, 12, **options)[1].x)


def test_another_latent_shape_is_refused(path: Path) -> None:
    save_trajectory(path, example())
    with pytest.raises(ValueError, match=r"warm has latent shape \[2, 3, 4\]; \[1, 2, 4, 4\]"):
        rounds(0, 4.0, 5, load_trajectory(path))


@pytest.mark.parametrize(
    "facts", [{"sampler": "x" * 300}, {"sampler": "a\nb"}, {"problem": "p" * 201}, {"latent": 3}, {"seed": "x"}]
)
def test_what_no_file_takes_is_refused_before_it_is_written(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(facts))):
        made = Trajectory(torch.zeros(3, 1, 2).half(), torch.tensor([3.0, 2.0, 1.0]), **facts)
        save_trajectory(tmp_path / "a.safetensors", made)
    assert not list(tmp_path.iterdir())


def test_a_name_that_no_file_takes_loses_no_picture() -> None:
    system = schemes.ddim(draw(0, 1, (2, 6, 6))[0] * schedules.SIGMA_MAX, schedules.normal(6))
    named = System(system.S, system.C, system.sigmas, "a\nb", 6)
    done = solve(named, Mixture.make(modes=8, classes=2, shape=(2, 6, 6)).denoiser(1, 4.0), Options(window=3))
    assert done.trajectory is not None and done.trajectory.sampler == "a\nb"


def test_numbers_of_other_kinds_are_taken(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"seed": np.int64(3), "flow": 1}
    made = Trajectory(torch.zeros(3, 1, 2).half(), torch.tensor([3.0, 2.0, 1.0]), **facts)
    save_trajectory(tmp_path / "a.safetensors", made)
    read = load_trajectory(tmp_path / "a.safetensors")
    assert (read.seed, read.flow) == (3, True)


def test_whether_a_run_was_noisy_is_kept_and_may_be_missing(path: Path) -> None:
    save_trajectory(path, replace(example(), noisy=True))
    assert load_trajectory(path).noisy
    save_file({"D": example().D, "sigmas": example().sigmas}, str(path), META)  # of an earlier version
    assert not load_trajectory(path).noisy
