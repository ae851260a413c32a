"""The suite ``warm``: the edits are what they say, and the table is right."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paratafusion_core.bench import warm
from paratafusion_core.bench.journal import Journal
from paratafusion_core.noise import draw


def test_slerp_keeps_the_length_and_the_angle() -> None:
    a, b = draw(0, 1, (3, 32, 32))[0], draw(1, 1, (3, 32, 32))[0]
    assert torch.allclose(warm.slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(warm.slerp(a, b, 1.0), b, atol=1e-5)
    part = warm.slerp(a, b, 0.1)
    assert float(part.norm() / a.norm()) == pytest.approx(1.0, abs=0.02)
    cosine = float((part * a).sum() / part.norm() / a.norm())
    assert cosine == pytest.approx(0.988, abs=0.003)  # cos of a tenth of about 90 degrees


def test_one_word_changes() -> None:
    from paratafusion_core.demo.prompt import COLOURS, SHAPES

    assert warm.another_word("small red circle", COLOURS) == "small green circle"
    assert warm.another_word("large white diamond", SHAPES) == "large white circle"


def test_the_edits_are_what_they_say() -> None:
    for name, edit in warm.EDITS.items():
        before, after = edit(3)
        changed = {k for k in vars(before) if getattr(before, k) != getattr(after, k)}
        assert len(changed) == (name != "nothing"), name
    before, after = warm.EDITS["denoise 0.6 of the picture"](3)
    picture = torch.full((1, 3, 32, 32), 0.25)
    system = after.task("cpu", picture).system
    assert system.evaluations == 50 and float(system.sigmas[0]) < float(before.task("cpu").system.sigmas[15])
    residue = (system.S[0] - picture) / float(system.sigmas[0])
    assert float(residue.std()) == pytest.approx(1.0, abs=0.05)


def test_it_measures_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs of two edits; the second call finds everything done."""
    short = {"steps": 8}
    edits = {"CFG 4 -> 4.6": warm._pair(short, short | {"cfg": 4.6}), "steps": warm._pair(short, {"steps": 10})}
    monkeypatch.setattr(warm, "EDITS", edits)
    journal = Journal(tmp_path / "warm.jsonl", warm.KEYS)
    warm.play(1, journal, edits=tuple(edits))
    assert [(r["edit"], r["window"]) for r in journal.rows] == [(e, w) for e in edits for w in warm.WINDOWS]
    for row in journal.rows:
        assert row["warm_rounds"] <= row["cold_rounds"] <= row["sequential_nfe"]
        assert min(row["cold_psnr_db"], row["warm_psnr_db"]) > 40
        assert ("interpolated" in row["said"]) == (row["edit"] == "steps")
    again = Journal(tmp_path / "warm.jsonl", warm.KEYS, resume=True)
    monkeypatch.setattr(warm, "measure", lambda *_: pytest.fail("it ran again"))
    warm.play(1, again, edits=tuple(edits))
    assert again.rows == json.loads(json.dumps(journal.rows))


def row(edit: str, cold: int, heat: int, psnr: float | None) -> dict[str, Any]:
    figures = {"cold_rounds": cold, "warm_rounds": heat, "cold_nfe": 8 * cold, "warm_nfe": 8 * heat}
    return {"edit": edit, "window": 8, "cold_psnr_db": psnr, "warm_psnr_db": 60.0} | figures


def test_the_table() -> None:
    lines = warm.markdown([row("a", 10, 7, 70.0), row("a", 14, 11, 50.0), row("b", 4, 1, None)]).splitlines()
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:5] == ["a", "8", "12.0", "9.0", "0.75"] and cells[8] == "60.0 (50.0)"


def test_another_model_is_refused(tmp_path: Path) -> None:
    given = {"suite": "warm", "seeds": 1, "out": str(tmp_path / "o"), "json": False, "resume": None, "device": "cpu"}
    with pytest.raises(ValueError, match="demo is allowed"):
        warm.run(argparse.Namespace(**given, model=["mixture"]))
    with pytest.raises(ValueError, match="seeds is 0"):
        warm.run(argparse.Namespace(**given | {"seeds": 0}, model=None))
    assert not (tmp_path / "o").exists()
