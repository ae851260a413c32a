"""The commands, in this process through ``cli.main`` and once as installed."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from paratafusion_core import __version__, cli
from paratafusion_core.bench import SUITES
from paratafusion_core.cli import demo, sample, train
from paratafusion_core.cli.sample import SAMPLERS
from paratafusion_core.demo import model
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.demo.train import Recipe
from paratafusion_core.options import SOLVERS
from paratafusion_core.report import Report

Outcome = tuple[int, str, str]
Cli = Callable[..., Outcome]
FILES = {"result.safetensors", "result.png", "report.json"}
MIXTURE = ["sample", "--model", "mixture", "--prompt", "a cat", "--steps", "7", "--out", "out"]
SHAPE = list(Mixture.make().shape)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: Any) -> Outcome:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stopped:  # argparse leaves this way
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return call


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sample(run: Cli, tmp_path: Path, solver: str, dtype: str) -> None:
    code, out, _ = run(*MIXTURE, "--solver", solver, "--batch", 2, "--dtype", dtype, "--compare", "--json")
    assert code == 0
    told = json.loads(out)  # JSON alone
    assert told == json.loads((tmp_path / "out/report.json").read_text())
    assert set(told) == set(Report("", 0, "", "", 0.0, 0).to_dict())
    assert told["sampler"] == "ddim"
    if solver == "auto":  # says what it took, and why
        assert told["solver"] in SOLVERS and told["solver"] != "auto" and told["plan"]
    else:
        assert told["solver"] == solver
    assert told["steps"] == told["sequential_nfe"] == 7
    assert told["rounds"] == len(told["rows_per_round"]) <= 7
    assert told["nfe"] == sum(told["rows_per_round"])
    assert told["frozen_per_round"][-1] == 7
    assert all(told[k] is not None for k in ("max_abs", "rel_l2", "kernel_floor", "measured_speedup"))
    assert (told["psnr_db"] is None) == (told["max_abs"] == 0)
    assert (solver == "sequential") <= (told["max_abs"] == 0)

    assert files(tmp_path / "out") == FILES
    samples = load_file(tmp_path / "out/result.safetensors")
    assert set(samples) == {"samples"}
    assert list(samples["samples"].shape) == [2, *SHAPE]
    assert samples["samples"].dtype == getattr(torch, dtype)
    with Image.open(tmp_path / "out/result.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_is_sequential_to_the_bit(run: Cli, solver: str) -> None:
    code, out, _ = run(*MIXTURE, "--solver", solver, "--preset", "exact", "--dtype", "float64", "--compare", "--json")
    told = json.loads(out)
    assert (code, told["max_abs"], told["kernel_floor"]) == (0, 0.0, 0.0)


@pytest.mark.parametrize("schedule", ["normal", "karras", "uniform"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_schedule(run: Cli, sampler: str, schedule: str) -> None:
    code, out, _ = run(*MIXTURE, "--sampler", sampler, "--schedule", schedule, "--json")
    assert code == 0
    assert json.loads(out)["sampler"] == sampler


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        (["--window", 3], "window_per_round", 3),
        (["--window", "full"], "window_per_round", 7),
        (["--window", 99], "window_per_round", 7),
    ],
)
def test_window_is_obeyed(run: Cli, option: list[Any], field: str, value: int) -> None:
    _, out, _ = run(*MIXTURE, *option, "--json")
    assert max(json.loads(out)[field]) == value


def test_max_rounds_ends_early_with_a_picture(run: Cli, tmp_path: Path) -> None:
    _, out, _ = run(*MIXTURE, "--tol", 0, "--max-rounds", 2, "--json", "--compare")
    told = json.loads(out)
    assert told["psnr_db"] is not None and told["measured_speedup"] is None  # of no finished picture
    assert (told["rounds"], told["status"], told["tolerance"]) == (2, "max_rounds", 0)
    assert load_file(tmp_path / "out/result.safetensors")["samples"].isfinite().all()


def test_words_without_json(run: Cli) -> None:
    code, out, _ = run(*MIXTURE, "--compare")
    assert code == 0
    for part in ("rounds", "rows evaluated", "against sequential", "result.png", "report.json"):
        assert part in out


def test_the_seed_and_nothing_else_decides_an_image(run: Cli, tmp_path: Path) -> None:
    def drawn(*more: Any) -> torch.Tensor:
        assert run(*MIXTURE, "--solver", "sequential", "--sampler", "ddpm", *more)[0] == 0
        return load_file(tmp_path / "out/result.safetensors")["samples"]

    one = drawn("--seed", 5)
    assert torch.equal(one, drawn("--seed", 5))
    assert torch.equal(one, drawn("--seed", 5, "--batch", 3)[:1])
    assert not torch.equal(one, drawn("--seed", 6))


BAD = [
    (["--steps", "0"], "steps", "0"),
    (["--steps", "-4"], "steps", "-4"),
    (["--steps", "2.5"], "steps", "2.5"),
    (["--window", "0"], "window", "0"),
    (["--window", "wide"], "window", "'wide'"),
    (["--tol", "-0.1"], "tol", "-0.1"),
    (["--tol", "nan"], "tol", "nan"),
    (["--cfg", "nan"], "cfg", "nan"),
    (["--cfg", "inf"], "cfg", "inf"),
    (["--history", "0"], "history", "0"),
    (["--order", "0"], "order", "0"),
    (["--max-rounds", "0"], "max_rounds|max-rounds", "0"),
    (["--batch", "0"], "batch", "0"),
    (["--seed", "-1"], "seed", "-1"),
    (["--rows", "9"], "rows", "9"),
    (["--solver", "collocation", "--target", "0"], "target is 0.0", "above 0"),
    (["--target", "40"], "target", "40"),
    (["--solver", "magic"], "solver", "'magic'"),
    (["--preset", "best"], "preset", "'best'"),
    (["--sampler", "heun"], "sampler", "'heun'"),
    (["--schedule", "cosine"], "schedule", "'cosine'"),
    (["--schedule", "flow"], "schedule", "'flow'"),
    (["--dtype", "float16"], "dtype", "'float16'"),
    (["--model", "sdxl"], "model", "'sdxl'"),
    (["--model", "demo", "--prompt", "large rde ring"], "prompt", "'rde' (did you mean 'red'?)"),
    (["--model", "demo", "--prompt", "red blue ring"], "prompt", "red, blue"),
]


@pytest.mark.parametrize(("words", "name", "value"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input(run: Cli, tmp_path: Path, words: list[str], name: str, value: str) -> None:
    code, out, err = run(*MIXTURE, *words, "--json")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("paratafusion sample: "), "one sentence"
    assert any(part in err for part in name.split("|")) and value in err
    assert "allowed" in err or "choose from" in err or "leave it out" in err or "invalid int value" in err
    assert not any(word in err for word in ("Traceback", " _", "None"))
    assert files(tmp_path) == set(), "nothing is written"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["demo", "--steps", "0"], "steps"),
        (["demo", "--prompt", "green dragon"], "dragon"),
        (["bench", "--seeds", "0"], "seeds"),
        (["bench", "--suite", "slow"], "suite"),
        (["train-demo", "--out", "weights", "--steps", "0"], "steps"),
        (["train-demo", "--out", "weights", "--device", "meta"], "device is 'meta'"),
        (["train-demo", "--out", "weights", "--device", "hpu"], "device is 'hpu'"),
        (["train-demo", "--out", "weights", "--device", "cuda:77"], "device is 'cuda:77'"),
        (["train-demo"], "--out"),
        (["paint"], "paint"),
        ([], "command"),
    ],
)
def test_bad_input_of_the_other_commands(run: Cli, tmp_path: Path, words: list[str], part: str) -> None:
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err
    assert files(tmp_path) == set()


def test_bad_input_leaves_earlier_results_alone(run: Cli, tmp_path: Path) -> None:
    run(*MIXTURE)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run(*MIXTURE, "--tol", "-1")[0] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_out_that_is_a_file(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the run: its picture would be lost."""
    (tmp_path / "out").write_text("mine")
    monkeypatch.setattr(sample, "solve", lambda *_, **__: pytest.fail("the run began"))
    code, out, err = run(*MIXTURE)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "out" in err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("schedule", ["normal", "flow"])
def test_sample_on_the_network(run: Cli, tmp_path: Path, schedule: str) -> None:
    words = ["sample", "--prompt", "a ring, red and large", "--schedule", schedule, "--steps", 6, "--preset", "exact"]
    code, out, _ = run(*words, "--window", 3, "--out", "out", "--compare", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["max_abs"] <= 1e-4
    samples = load_file(tmp_path / "out/result.safetensors")["samples"]
    assert list(samples.shape) == [1, 3, 32, 32] and samples.dtype == torch.float32
    with Image.open(tmp_path / "out/result.png") as image:
        assert image.mode == "RGB" and image.width == image.height >= 32


def test_demo(run: Cli, tmp_path: Path) -> None:
    code, out, _ = run("demo", "--steps", 6)
    assert code == 0
    assert files(tmp_path / "paratafusion-demo") == {"sequential.png", "parallel.png", "convergence.png", "report.json"}
    for png in (tmp_path / "paratafusion-demo").glob("*.png"):
        with Image.open(png) as image:
            image.load()
    runs = json.loads((tmp_path / "paratafusion-demo/report.json").read_text())["runs"]
    for label, report in runs.items():
        line = next(line for line in out.splitlines() if line.startswith(label + " "))
        assert {str(report["rounds"]), str(report["nfe"])} <= set(line.split())


def test_demo_json(run: Cli) -> None:
    _, out, _ = run("demo", "--steps", 3, "--json", "--prompt", "small blue cross")
    assert json.loads(out)["prompt"] == "small blue cross"


def test_train_demo_resumes(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "Recipe", lambda: Recipe(batch=2))
    assert run("train-demo", "--steps", 1, "--out", "weights")[0] == 0
    first = torch.load(tmp_path / "weights/checkpoint.pt", weights_only=True)["step"]
    code, out, _ = run("train-demo", "--steps", 2, "--out", "weights")
    assert (code, first, torch.load(tmp_path / "weights/checkpoint.pt", weights_only=True)["step"]) == (0, 1, 2)
    assert files(tmp_path / "weights") == {"checkpoint.pt", "demo.safetensors"}
    assert "demo.safetensors" in out
    assert (tmp_path / "weights/demo.safetensors").stat().st_size <= 4_000_000
    model.load(tmp_path / "weights/demo.safetensors")


def test_train_demo_writes_weights_that_are_missing(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "Recipe", lambda: Recipe(batch=2))
    run("train-demo", "--steps", 2, "--out", "weights")
    weights = tmp_path / "weights/demo.safetensors"
    before = weights.read_bytes()
    for steps in (2, 1):
        weights.unlink()
        code, out, _ = run("train-demo", "--steps", steps, "--out", "weights")
        assert code == 0 and "step 2" in out and weights.read_bytes() == before
        assert ("beyond the 1 steps" in out) == (steps == 1)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:900], lambda b: b"\x80\x02}.", lambda b: b"(cos\nsystem\n.", lambda b: b"", None]
)
def test_a_damaged_checkpoint(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    monkeypatch.setattr(train, "Recipe", lambda: Recipe(batch=2))
    run("train-demo", "--steps", 1, "--out", "weights")
    path = tmp_path / "weights/checkpoint.pt"
    if damage is None:
        torch.save({"step": 1, "network": {}}, path)
    else:
        path.write_bytes(damage(path.read_bytes()))
    left = {name: (tmp_path / "weights" / name).read_bytes() for name in files(tmp_path / "weights")}
    code, _, err = run("train-demo", "--steps", 2, "--out", "weights")
    assert (code, err.count("\n")) == (2, 1) and "checkpoint.pt" in err and "allowed" in err
    assert {name: (tmp_path / "weights" / name).read_bytes() for name in files(tmp_path / "weights")} == left


@pytest.mark.parametrize("out", [".", "a/b", "b/.."])
def test_folders_are_named_as_they_were_given(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr(train, "Recipe", lambda: Recipe(batch=2))
    (tmp_path / "b").mkdir()
    runs = (["sample", *MIXTURE[1:-1]], ["demo", "--steps", 2, "--out"], ["train-demo", "--steps", 1, "--out"])
    for words, said in zip(runs, ("written to {}:", "Pictures in {}:", "in {}\n"), strict=True):
        assert said.format(out) in run(*words, out)[1]


def test_equal_pictures_are_said_to_be_equal(run: Cli) -> None:
    assert "against sequential: equal, " in run(*MIXTURE, "--solver", "sequential", "--compare")[1]
    told = Report("ddim", 50, "quasi-newton", "balanced", 3e-3, 50)
    told.compare(torch.ones(1, 2), torch.ones(1, 2), 2.0)
    assert demo.table({"quasi-newton": told}).split()[-1] == "equal"


def test_help_tells_of_every_option_and_its_default() -> None:
    commands = next(action.choices for action in cli._parser()._actions if action.dest == "command")
    assert isinstance(commands, dict) and set(commands) == {"demo", "sample", "bench", "train-demo"}
    for name, command in commands.items():
        text = " ".join(command.format_help().split())
        for action in command._actions:
            said = " ".join(str(action.help).split())
            assert action.help and said in text, (name, action.dest)
            if action.default not in (None, False, argparse.SUPPRESS) or action.dest == "seed":
                assert f"{said} (default: {action.default})" in text, (name, action.dest)
            elif action.default is None and not action.required:
                assert "(default: " in said, (name, action.dest)
    for suite, about in SUITES.items():
        assert f"{suite} {about.about}" in " ".join(commands["bench"].format_help().split())


def test_version(run: Cli) -> None:
    assert run("--version") == (0, f"paratafusion {__version__}\n", "")


def test_numbers_that_are_too_large_are_cut(run: Cli) -> None:
    for solver, option, value in (("parataa", "--order", 10**21), ("parataa", "--history", 10**8)):
        assert run(*MIXTURE, "--solver", solver, option, value, "--window", 3)[0] == 0
    assert run(*MIXTURE, "--history", 10**21)[0] == 0


def test_ctrl_c_is_a_word_and_no_traceback(
    run: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):  # a program that calls it decides for itself
        run(*MIXTURE)
    monkeypatch.setattr("sys.argv", ["paratafusion", *map(str, MIXTURE)])
    assert cli.command() == 130
    assert capsys.readouterr().err.endswith("paratafusion: interrupted\n")


def test_the_installed_command(tmp_path: Path) -> None:
    command = shutil.which("paratafusion", path=sysconfig.get_path("scripts"))
    assert command, "the package is not installed here: python -m pip install -e '.[dev]'"
    words = [command, *MIXTURE, "--json"]
    good = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["rounds"] <= 7
    bad = subprocess.run([*words, "--window", "0"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
