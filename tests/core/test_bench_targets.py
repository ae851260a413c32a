"""The suite ``targets``: its shares are those of its runs, and it goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from paratafusion_core import cli
from paratafusion_core.bench import targets
from paratafusion_core.bench.problems import Setting


def row(estimated: float, true: float | None, steps: int = 50, window: int = 1) -> dict[str, object]:
    about = {"model": "demo", "sampler": "ddim", "schedule": "normal", "steps": steps, "cfg": 4.0, "seed": 0}
    cost = {"rounds": 21, "nfe": 21, "sequential_nfe": steps}
    return {**about, **cost, "window": window, "target_db": 42.0, "estimated_db": estimated, "psnr_db": true}


def test_shares_are_those_of_the_runs() -> None:
    rows = [row(44.0, 45.0), row(50.0, 43.0), row(48.1, 45.0), row(45.0, 41.0), row(130.0, None), row(44.5, 44.0, 20)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in targets.markdown(rows).splitlines()]
    long, short = (dict(zip(lines[0], line, strict=True)) for line in lines[2:])
    assert (long["steps"], long["runs"], short["steps"], short["runs"]) == ("50", "5", "20", "1")
    assert long["reach the target"] == "80.0 %" and long["worst PSNR dB"] == "41.0"
    assert long["estimate within 3 dB"] == "40.0 %" and long["too high by more than 6 dB"] == "20.0 %"
    assert long["rows / sequential, mean"] == "0.42" and short["rows / sequential, mean"] == "1.05"


def test_an_estimate_that_is_infinite_is_null_in_the_file() -> None:
    assert targets.too_high(row(math.inf, None)) == targets.too_high({**row(1.0, None), "estimated_db": None}) == 0.0


def test_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    some = (Setting("demo", "ddim", "normal", 12, 4.0), Setting("demo", "euler", "flow", 12, 4.0))
    monkeypatch.setattr(targets, "CASES", ((some, ((1, 30.0), (2, 30.0), (1, 40.0))),))
    words = ["bench", "--suite", "targets", "--model", "mixture", "ideal", "--seeds", "1"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    text, file = capsys.readouterr().out, tmp_path / "targets.jsonl"
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {r["model"] for r in found} == {"mixture", "ideal"} and {r["seed"] for r in found} == {targets.FIRST}
    assert len(found) == 2 * 2 * 3
    assert text == (tmp_path / "targets.md").read_text(encoding="utf-8")
    kept = file.read_bytes()
    assert cli.main([*words, "--out", str(tmp_path), "--resume", str(file)]) == 0
    assert file.read_bytes() == kept
