"""``paratafusion bench``: the grid's runs as json lines, resuming them, its tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paratafusion_core import cli, options
from paratafusion_core.bench import curves, grid, journal, peers, rivals, table, targets, warm
from paratafusion_core.bench.grid import Case
from paratafusion_core.bench.journal import Journal

Outcome = tuple[int, str, str]
Cli = Callable[..., Outcome]
TINY = (
    Case("mixture", "ddim", "normal", 5, 4.0, 2),
    Case("mixture", "ddim", "normal", 5, 4.0, "full", "parataa", "fast"),
    Case("mixture", "euler", "flow", 5, 2.0, 3, "picard"),
    Case("ideal", "ddpm", "normal", 5, 1.0, 2),
)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command in an empty folder, with a tiny quick suite: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "QUICK", TINY)

    def call(*words: Any) -> Outcome:
        try:
            code = cli.main(["bench", *map(str, words)])
        except SystemExit as stopped:  # argparse leaves this way
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return call


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_run_is_a_line(run: Cli, tmp_path: Path) -> None:
    code, out, _ = run("--seeds", 2, "--out", "out", "--json")
    rows = lines(tmp_path / "out/quick.jsonl")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == rows
    assert [(r["seed"], r["solver"], r["model"]) for r in rows] == [
        (seed, case.solver, case.model) for seed in (0, 1) for case in TINY
    ]
    for row in rows:
        assert row["rounds"] == len(row["rows_per_round"]) == len(row["psnr_per_round"]) <= row["sequential_nfe"] == 5
        assert row["nfe"] == sum(row["rows_per_round"])
        assert (row["psnr_db"] is None) == (row["max_abs"] == 0)
        first = next((n for n, db in enumerate(row["psnr_per_round"], 1) if db is None or db >= 40), None)
        assert row["good_round"] == first
        assert 0 <= row["engine_seconds"] <= row["seconds"]
        assert {"doubt", "estimated_db", "torch", "device", "sequential_seconds"} <= set(row)


def test_table_and_listing(run: Cli, tmp_path: Path) -> None:
    code, out, _ = run("--seeds", 1, "--out", "out")
    text = (tmp_path / "out/quick.md").read_text()
    assert (code, out) == (0, text)
    assert len(text.splitlines()) == 2 + len(TINY)
    for case, line in zip(TINY, text.splitlines()[2:], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [case.model, f"{case.sampler}-5 {case.schedule}", f"{case.cfg:g}", str(case.window)]
        assert cells[4] == case.solver + (" fast" if case.preset == "fast" else "")


def test_a_model_alone(run: Cli, tmp_path: Path) -> None:
    run("--seeds", 1, "--out", "out", "--model", "ideal")
    assert {row["model"] for row in lines(tmp_path / "out/quick.jsonl")} == {"ideal"}


def test_resume_runs_what_is_missing(run: Cli, tmp_path: Path) -> None:
    run("--seeds", 1, "--out", "out")
    path = tmp_path / "out/quick.jsonl"
    kept = path.read_bytes()
    code, out, _ = run("--seeds", 2, "--out", "again", "--resume", path, "--json")
    assert code == 0 and path.read_bytes().startswith(kept)
    rows = lines(path)
    assert len(rows) == 2 * len(TINY) == len(out.splitlines())
    assert [row["seed"] for row in rows] == [0] * len(TINY) + [1] * len(TINY)
    assert (tmp_path / "again/quick.md").is_file() and not (tmp_path / "again/quick.jsonl").exists()


def test_resume_after_a_line_was_deleted(run: Cli, tmp_path: Path) -> None:
    run("--seeds", 1, "--out", "out")
    path = tmp_path / "out/quick.jsonl"
    whole = lines(path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "parataa" not in line))
    run("--seeds", 1, "--out", "out", "--resume", path)
    again = lines(path)
    assert again[:-1] == [row for row in whole if row["solver"] != "parataa"]
    same = ("rounds", "nfe", "psnr_db", "psnr_per_round")
    assert [again[-1][k] for k in same] == [next(r for r in whole if r["solver"] == "parataa")[k] for k in same]


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_last_line_is_run_again(run: Cli, tmp_path: Path, cut: int) -> None:
    run("--seeds", 1, "--out", "out")
    path = tmp_path / "out/quick.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert run("--seeds", 1, "--out", "out", "--resume", path)[0] == 0
    assert len(lines(path)) == len(TINY)
    assert path.read_bytes().startswith(whole[: whole[:-cut].rfind(b"\n") + 1])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--seeds", 0], ["seeds", "0"]),
        (["--seeds", -3], ["seeds", "-3"]),
        (["--resume", "none.jsonl"], ["resume", "'none.jsonl'", "no such file"]),
        (["--device", "toaster"], ["device", "'toaster'"]),
        (["--device", "meta"], ["device", "'meta'"]),
        (["--suite", "rivals", "--device", "meta"], ["device", "'meta'"]),
        (["--model", "sdxl"], ["model", "'sdxl'"]),
        (["--suite", "slow"], ["suite", "'slow'"]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_refusals(run: Cli, tmp_path: Path, words: list[Any], parts: list[str]) -> None:
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in parts)
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_runs_of_an_earlier_bench_are_not_overwritten(run: Cli, tmp_path: Path) -> None:
    run("--seeds", 1, "--out", "out")
    before = (tmp_path / "out/quick.jsonl").read_bytes()
    for number in (1, 2):
        code, _, err = run("--seeds", 1, "--out", "out")
        assert code == 0 and f"kept as {Path('out') / f'quick-{number}.jsonl'}" in err
    assert (tmp_path / "out/quick-1.jsonl").read_bytes() == before
    (tmp_path / "out/quick.jsonl").write_bytes(b"")
    assert "kept" not in run("--seeds", 1, "--out", "out")[2]


@pytest.mark.parametrize("change", [{"nfe": None}, {"rounds": "five"}, {"psnr_per_round": None}])
def test_a_run_without_its_figures_is_refused(run: Cli, tmp_path: Path, change: dict[str, Any]) -> None:
    run("--seeds", 1, "--out", "out")
    path, name = tmp_path / "out/quick.jsonl", next(iter(change))
    rows = lines(path)
    for wrong in (rows[1] | change, {key: rows[1][key] for key in grid.KEYS}):
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], wrong)))
        code, _, err = run("--resume", path, "--out", "again")
        assert (code, err.count("\n")) == (2, 1) and "line 2 lacks" in err and name in err
    assert not (tmp_path / "again").exists()


def test_every_suite_names_the_figures_that_its_tables_read() -> None:
    """A run of nothing but them and its keys makes all its tables."""
    kinds: dict[Any, Any] = {int: 5, list: [40.0], journal.Number: 1.0}
    keys = {"model": "demo", "sampler": "ddim", "schedule": "normal", "preset": "balanced", "who": "picard"}
    keys |= {"edit": "nothing", "rival": "unipc", "steps": 50, "cfg": 4.0, "window": 16, "target_db": 42.0, "size": 8}
    for suite in (grid, peers, rivals, targets, warm):
        run = {key: keys.get(key) for key in suite.KEYS} | {key: kinds.get(kind) for key, kind in suite.FIGURES.items()}
        if suite is not grid:
            assert suite.markdown([run])
            continue
        for solver in ("picard", "collocation"):
            run["solver"] = solver
            assert table.cases([run]) and table.markdown([run])
            assert len(list(curves.plots([run]))) == (solver == "picard")


@pytest.mark.parametrize("content", ["{}\n", "rubbish\n", "[1, 2]\n", '{"suite": "another"}\n{"seed": 1}\n'])
def test_a_file_of_something_else_is_refused_and_left_alone(run: Cli, tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").write_text(content)
    code, _, err = run("--resume", "mine")
    assert (code, err.count("\n")) == (2, 1)
    assert "resume" in err and "line 1" in err
    assert (tmp_path / "mine").read_text() == content


def test_a_run_that_is_interrupted_keeps_its_lines(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, count = Journal.add, iter(range(3))

    def stops(journal: Journal, row: dict[str, Any]) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        add(journal, row)

    monkeypatch.setattr(Journal, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        run("--seeds", 1, "--out", "out")
    assert len(lines(tmp_path / "out/quick.jsonl")) == 2


def test_the_paper_grid() -> None:
    cases = list(grid.paper())
    assert len(cases) == len(set(cases))
    plain = [c for c in cases if c.solver != "collocation"]
    assert len(plain) == 3 * 10 * 3 * 4 * 4  # models, samplers, CFG, windows, solvers and presets
    for model in ("demo", "mixture", "ideal"):
        for solver in ("quasi-newton", "parataa", "picard"):
            for window in (4, 8, 16, "full"):
                for cfg in (1.0, 4.0, 7.5):
                    assert Case(model, "ddim", "normal", 100, cfg, window, solver) in cases
    assert {(c.sampler, c.schedule, c.steps) for c in cases} == set(grid.PAPER_RUNS)
    assert {c.model for c in grid.paper(["ideal"])} == {"ideal"}


def test_collocation_enters_the_grid_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "SOLVERS", ("quasi-newton", "collocation"))
    added = [c for c in grid.paper(["demo"]) if c.solver == "collocation"]
    assert {(c.window, c.rows) for c in added} == set(grid.COLLOCATION)
    assert all(c.sampler != "ddpm" for c in added)


def row(solver: str, rounds: int, db: float | None, preset: str = "balanced", **more: Any) -> dict[str, Any]:
    """A line as :func:`grid.play` writes it, the picture gaining 10 dB a round."""
    shown = [10.0 * n for n in range(1, rounds)] + [db]
    base = {"model": "demo", "sampler": "ddim", "schedule": "normal", "steps": 50, "cfg": 4.0, "window": 16, "seed": 0}
    figures = {"rounds": rounds, "nfe": 16 * rounds, "sequential_nfe": 50, "psnr_db": db, "psnr_per_round": shown}
    rest = {"rows": None, "good_round": 4, "seconds": 1.0, "sequential_seconds": 2.0, "doubt": None}
    return base | {"solver": solver, "preset": preset} | figures | rest | more


def test_ratios_are_of_pairs_that_both_meet() -> None:
    rows = [
        row("quasi-newton", 8, 70.0),
        row("parataa", 10, 80.0),
        row("quasi-newton", 4, 30.0, seed=1),  # not near enough: left out of the first figure
        row("parataa", 50, 80.0, seed=1),
        row("quasi-newton", 9, None, seed=2),  # equal pictures count as 120 dB
        row("parataa", 10, 80.0, seed=2),
        row("quasi-newton", 3, 70.0, seed=3),  # without its pair
    ]
    text = table.ratios(rows, ("quasi-newton", "balanced"), ("parataa", "balanced"))
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["all", "3", "0.850 (2)"]
    assert cells[4] == "95.0 / 80.0"
    assert cells[5] == "1.000 (2)", "both show 40 dB in round 4; one never does"


def test_doubts_count_false_alarms_and_misses() -> None:
    rows = [
        row("picard", 5, 10.0, doubt="secants disagree"),
        row("picard", 5, 12.0, seed=1),
        row("picard", 5, 30.0, seed=2),
        row("picard", 5, 70.0, seed=3, doubt="secants disagree"),
    ]
    cells = [cell.strip() for cell in table.doubts(rows).splitlines()[-1].strip("|").split("|")]
    assert cells == ["demo", "picard", "4", "1", "1", "1 (0)", "1 (50.00 %)"]


def test_brief_and_plots() -> None:
    steps = [row(s, n // 5, 60.0, steps=n, window=w) for s in grid.SOLVERS for n in (25, 50, 100) for w in (16, "full")]
    text = table.brief([*steps, row("parataa", 99, 10.0, preset="fast")])
    assert "5.0 / 5.0 / 5.0" in text and "99" not in text and "ddim-100 normal" in text
    drawn = dict(curves.plots(steps))
    assert set(drawn) == {"demo-rounds", "demo-psnr"}
    colours = {colour for _, colour in drawn["demo-rounds"].getcolors(1 << 20) or []}
    assert {(46, 125, 120), (232, 148, 64)} <= colours, "first and last line are drawn"
    fast = [row("parataa", 99, 10.0, preset="fast", steps=n, window=w) for n in (25, 50) for w in (16, "full")]
    more = dict(curves.plots([*steps, *fast]))
    assert all(more[name].tobytes() == image.tobytes() for name, image in drawn.items()), "a preset of its own"
    assert not list(curves.plots([row("picard", 5, 60.0, cfg=1.0)])), "nothing to draw"


def test_collocation_has_a_table_of_its_own() -> None:
    runs = [row("collocation", 12, 44.0, window=1, rows=12, nfe=12, seed=n) for n in (0, 1)]
    runs.append(row("collocation", 9, 50.0, window=4, rows=8, nfe=27))
    text = table.markdown([*runs, row("quasi-newton", 9, 70.0)])
    assert "| 12.0 / 12.0 / 44.0 (44.0) | 9.0 / 27.0 / 50.0 (50.0) |" in text
    assert "## Collocation" not in table.markdown([row("quasi-newton", 9, 70.0)])


def test_a_mean_of_nothing_says_so() -> None:
    assert math.isnan(table.mean([]))
