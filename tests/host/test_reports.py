"""Convergence Report and Compare with Sequential, without a server."""

from __future__ import annotations

import json
import math

import pytest
import torch
from paratafusion_pack.nodes.reports import CompareWithSequential, ConvergenceReport
from paratafusion_pack.paratafusion_core import Report


def sample_report(**facts) -> Report:
    report = Report("euler", 4, "quasi-newton", "balanced", 3e-3, 4, rounds=2, nfe=5)
    report.rows_per_round, report.frozen_per_round = [3, 2], [2, 4]
    report.residuals = [(0, [0.0, 1e-3, 1.0]), (2, [0.0, 1e-3])]
    for name, value in facts.items():
        setattr(report, name, value)
    return report


def test_a_report_as_picture_words_and_json():
    report = sample_report(
        doubt="it may be another picture", warm="same noise levels", plan="window 8", estimated_db=41.0
    )
    image, text = ConvergenceReport.execute(report).args
    assert image.shape[0] == 1 and image.shape[2:] == (960, 3) and image.min() >= 0 and image.max() <= 1
    words, numbers = text.split("\n\n", 1)
    assert words.splitlines()[0] == "euler, 4 steps: 2 model calls instead of 4"
    for line in ("doubt: it may be another picture", "warm start: same noise levels", "plan: window 8"):
        assert line in words.splitlines()
    assert json.loads(numbers) == json.loads(json.dumps(report.to_dict()))
    for line in (' "rows_per_round": [3, 2],', "  [0, [0.0, 0.001, 1.0]],", "  [2, [0.0, 0.001]]", ' "repairs": 0,'):
        assert line in numbers.splitlines()


def test_a_report_of_nothing_and_no_report():
    nothing = Report("euler", 0, "sequential", "balanced", 3e-3, 0)
    image, text = ConvergenceReport.execute(nothing).args
    assert image.shape[2] == 960 and text.startswith("euler: nothing to do")
    with pytest.raises(ValueError, match="report is empty"):
        ConvergenceReport.execute(None)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 16, 3, 8, 8)])
def test_comparing_latents(shape):
    a = (torch.randn(shape) * 64).round() / 64  # a half more is exact
    b = a.clone()
    b[:, :, ..., 2, 3] += 0.5
    psnr, error, picture, line = CompareWithSequential.execute({"samples": a}, {"samples": b}).args
    assert 10 < psnr < 60 and error == pytest.approx(0.5, abs=1e-6)
    assert picture.shape == (shape[0], 8, 8, 3) and picture[0, 2, 3, 0] == 1 and picture.sum() == 3 * shape[0]
    assert line.startswith(f"PSNR {psnr:.1f} dB (of the reference's range")


def test_comparing_images():
    a = torch.rand(2, 8, 8, 3)
    psnr, error, picture, line = CompareWithSequential.execute(a, a.clone()).args
    assert (psnr, error, float(picture.max())) == (999.0, 0.0, 0.0) and line.endswith("equal")
    psnr, *_, line = CompareWithSequential.execute(a, a + 0.1).args
    assert psnr == pytest.approx(20.0, abs=0.1) and "(of the range of an image, 1)" in line


def test_comparing_images_with_alpha():
    image = torch.full((1, 8, 8, 4), 0.5)
    other = image.clone()
    other[0, 2, 3, 3] = 1.0
    psnr, error, difference, _ = CompareWithSequential.execute(other, image).args
    assert error == 0.5 and psnr == pytest.approx(20 * math.log10(1 / math.sqrt(0.25 / 256)), abs=0.1)
    assert difference.shape == (1, 8, 8, 3) and difference.sum() == 3 and (difference[0, 2, 3] == 1).all()


def test_what_cannot_be_compared():
    image, latent = torch.rand(1, 8, 8, 3), {"samples": torch.rand(1, 4, 8, 8)}
    with pytest.raises(ValueError, match=r"result is IMAGE \[1, 8, 8, 3\]; LATENT \[1, 4, 8, 8\]"):
        CompareWithSequential.execute(image, latent)
    with pytest.raises(ValueError, match="reference is a str"):
        CompareWithSequential.execute(image, "x")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_pictures_that_cannot_be_measured_stop_nothing(broken):
    """An empty latent has no range, and a picture may hold no numbers: the graph's other nodes run all the same."""
    empty, noise = {"samples": torch.zeros(1, 4, 8, 8)}, {"samples": torch.randn(1, 4, 8, 8)}
    psnr, error, picture, _ = CompareWithSequential.execute(noise, empty).args
    assert psnr == -999.0 and error > 0 and picture.isfinite().all()
    bad = {"samples": noise["samples"].clone()}
    bad["samples"][0, 0, 2, 3] = broken
    _, error, picture, line = CompareWithSequential.execute(bad, noise).args
    assert not math.isfinite(error) and picture.isfinite().all() and picture[0, 2, 3, 0] == 1
    assert line.endswith("there are values that are no numbers")
