"""The picture of a run: every kind of run has one, it says what the report says, and its map is the rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from paratafusion_core import Options, Report, System, plots, schedules, schemes, solve
from paratafusion_core.plots import FINAL, FROZEN, OPEN, convergence, headline, remarks

Make = Callable[..., Any]


def report_of(make: Make, **options: Any) -> Report:
    given = make()
    return solve(given.system, given.denoise, Options(**options)).report


def linear(steps: int) -> tuple[System, Callable[..., Any]]:
    """A cheap run of many steps: D pulls to 0.3."""
    sigmas = schedules.karras(steps)
    return schemes.ddim(torch.ones(1, 4) * float(sigmas[0]), sigmas), lambda x, s: 0.3 + 0.0 * x


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {c[1] for c in image.getcolors(1 << 20) or ()}  # type: ignore[misc]


@pytest.mark.parametrize(
    "options", [{}, {"window": "full"}, {"max_rounds": 3}, {"preset": "exact"}, {"solver": "parataa"}]
)
def test_every_run_has_a_picture(mixture: Make, options: dict[str, Any]) -> None:
    report = report_of(mixture, **options)
    image = convergence(report)
    assert image.width == 960 and 200 < image.height < 700
    assert FROZEN in colours(image)
    assert convergence(report, width=600).width == 600


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_few_and_many_steps(steps: int) -> None:
    system, denoise = linear(steps)
    for window in (1, 64):
        image = convergence(solve(system, denoise, Options(window=window)).report)
        assert image.height < 700 and FROZEN in colours(image)


def test_runs_without_rounds() -> None:
    fallback = Report("dpm_adaptive", 20, "sequential", "balanced", 3e-3, 20, rounds=20, nfe=20)
    fallback.fallback = "the number of its evaluations depends on the picture. " * 40
    nothing = Report("euler", 0, "sequential", "balanced", 3e-3, 0)
    for report in (fallback, nothing):
        assert 60 < convergence(report).height < 300
    assert headline(nothing) == "euler: nothing to do"
    assert headline(fallback) == "dpm_adaptive, 20 steps: 20 model calls, one by one"
    assert remarks(fallback)[0] == ("one by one", fallback.fallback)
    fallback.predicted_speedup = 0.64  # of the engine row by row, which is no speed-up of anything
    assert not any("times as fast" in text for _, text in remarks(fallback))


def test_what_is_said(mixture: Make) -> None:
    report = report_of(mixture, max_rounds=2)
    report.doubt, report.warm, report.plan = "it may be another picture", "same noise levels", "window 8"
    report.target_db, report.estimated_db = 42.0, 40.25
    report.psnr_db, report.max_abs = math.inf, 0.0
    said = dict(remarks(report)[:3])
    assert list(said) == ["doubt", "stopped", "fidelity"]
    texts = [f"{name}: {text}" for name, text in remarks(report)]
    assert "fidelity: equal, measured against the sequential picture" in texts
    assert "fidelity: 40.2 dB estimated, 42 dB asked for" in texts
    assert "warm start: same noise levels" in texts and "plan: window 8" in texts
    assert said["stopped"].startswith(f"after 2 rounds, as asked: {report.frozen_per_round[-1]} of 30 rows are final")
    assert headline(report) == "ddim, 30 steps: 2 model calls instead of 30"
    assert plots.ALARM in colours(convergence(report))


def test_the_map_is_the_rounds(mixture: Make) -> None:
    report = report_of(mixture, max_rounds=5)
    lines = plots._map(report)
    assert [line.label for line in lines] == ["1", "2", "3", "4", "5", "end"]
    assert [line.rows for line in lines[:-1]] == report.rows_per_round
    for n, line in enumerate(lines[:-1]):
        first, residual = report.residuals[n]
        assert line.cells[:first] == [FINAL] * first
        assert line.cells[first : first + len(residual)] == residual
        assert set(line.cells[first + len(residual) :]) <= {OPEN}
    final = report.frozen_per_round[-1]
    assert lines[-1].cells == [FINAL] * final + [OPEN] * (30 - final)


def test_a_round_that_looks_again_shows_what_it_looked_at(mixture: Make) -> None:
    given = mixture()
    sketch = solve(given.system, given.denoise, Options(max_rounds=5)).trajectory
    assert sketch is not None and sketch.part is not None
    report = solve(given.system, given.denoise, Options(), warm=sketch).report
    cells = plots._map(report)[0].cells
    numbers = [i for i, cell in enumerate(cells) if not isinstance(cell, str)]
    assert numbers == [0, sketch.part.final - 1]
    assert cells[1 : sketch.part.final - 1] == [FINAL] * (sketch.part.final - 2)


def test_long_runs_keep_their_worst_cells() -> None:
    cells: list[float | str] = [FINAL, FINAL, FINAL, 0.5, 2.0, OPEN, OPEN, OPEN, OPEN]
    assert plots._pooled(cells, 2) == [FINAL, 0.5, 2.0, OPEN, OPEN]
    report = Report("euler", 90, "quasi-newton", "balanced", 3e-3, 90, rounds=90, nfe=90)
    report.rows_per_round, report.frozen_per_round = [1] * 90, list(range(1, 91))
    report.residuals = [(n, [0.0]) for n in range(90)]
    lines = plots._map(report)
    assert len(lines) <= plots._LINES + 1 and [line.label for line in lines[-2:]] == ["90", "end"]


def test_lines_fit_their_width() -> None:
    pen, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(14)
    for text in ("a few words", "word " * 300, "x" * 500, ""):
        lines = plots._wrapped(pen, text, font, 200)
        assert 1 <= len(lines) <= 3 and all(pen.textlength(line, font) <= 220 for line in lines)


def test_darker_is_further() -> None:
    shades = [sum(plots._heat(3e-3 * 10.0**d, 3e-3)) for d in (-1, 0, 1, 2, 3, 9)]
    assert shades[0] == shades[1] > shades[2] > shades[3] > shades[4] == shades[5]
    assert plots._heat(math.inf, 3e-3) == plots._heat(1e9, 3e-3)


def test_previews_stand_above_the_map(mixture: Make) -> None:
    shown = [torch.full((2, 3, 8, 8), value) for value in (-1.0, 0.0, 1.0)]
    report = report_of(mixture)
    assert convergence(report, shown).height > convergence(report).height + 80
    assert convergence(report, shown[:1]).width == 960


def test_states_of_one_number_are_drawn() -> None:
    assert plots.picture(torch.tensor([0.5, -1.0]), scale=1).size == (2, 1)
