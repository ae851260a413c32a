"""diffusers' ParaDiGMS on the demo network, where diffusers is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from paratafusion_core import Options, cli, solve
from paratafusion_core.bench import paradigms, peers
from paratafusion_core.bench.problems import network, prompt_of
from paratafusion_core.demo import model
from paratafusion_core.demo.prompt import encode
from paratafusion_core.report import fidelity

HERE = all(importlib.util.find_spec(name) for name in ("diffusers", "transformers"))
needed = pytest.mark.skipif(not HERE, reason="diffusers and transformers, of the extra bench, are not installed")


@pytest.mark.skipif(HERE, reason="diffusers is installed")
def test_without_diffusers_the_suite_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--suite", "peers", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert "diffusers" in told.err and "bench" in told.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [["--device", "cuda"], ["--model", "mixture"], ["--seeds", "0"]])
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert cli.main(["bench", "--suite", "peers", "--out", str(tmp_path / "out"), *more]) == 2
    assert "allowed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needed
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_their_sequential_steps_are_ours(sampler: str, cfg: float) -> None:
    task = peers.task_of(sampler, 10, cfg, seed=1)
    ours = solve(task.system, task.denoise, Options("sequential")).x
    context = encode(prompt_of(1))[None]
    theirs = paradigms.sequential(network("cpu"), context, model.SHAPE, sampler, 10, cfg, 1)
    assert float((ours - theirs).abs().max()) < 5e-5


@needed
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_their_pipeline_reaches_the_same_picture(sampler: str) -> None:
    task = peers.task_of(sampler, 10, 4.0, seed=0)
    reference = solve(task.system, task.denoise, Options("sequential")).x
    context = encode(prompt_of(0))[None]
    for tolerance, least in ((0.1, 30.0), (1e-5, 80.0)):
        x, count = paradigms.run(network("cpu"), context, model.SHAPE, sampler, 10, 4.0, 4, tolerance, 0)
        assert fidelity(x, reference, 2.0).psnr_db > least
        assert count.rounds <= 10 and count.nfe == sum(count.rows_per_round) and max(count.rows_per_round) == 4


@needed
def test_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "RUNS", (("ddim", 5, 4.0),))
    assert cli.main(["bench", "--suite", "peers", "--seeds", "1", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    assert {row["who"] for row in rows} == {case.who for case in peers.cases()}
    assert max(row["sequential_max_abs"] for row in rows) < 5e-5
    assert "ParaDiGMS (diffusers), tolerance 0.1" in capsys.readouterr().out
    assert torch.isfinite(torch.tensor([row["psnr_db"] or 0.0 for row in rows])).all()
