"""What the live widget says and draws for a message: its words in every language, and its strip."""

from __future__ import annotations

import re
from typing import Any

import pytest

BASE = {"rows": 20, "steps": 20, "frozen": 12, "round": 4, "nfe": 30, "state": "running", "first": 12, "levels": [0, 1]}
SAID = [
    ({}, ("Round 4", "12 of 20 steps", "30 rows for 20 steps", "3.0 steps per call", "")),
    ({"rows": 40, "round": 1}, ("Round 1", "12 of 40 evaluations", "30 rows for 40 evaluations",
                                "12.0 evaluations per call", "")),
    ({"start": 8}, ("Round 4", "12 of 20 steps", "30 rows for 20 steps", "1.0 steps per call", "")),
    ({"speedup": 1.84}, ("Round 4", "12 of 20 steps", "30 rows for 20 steps", "est. speed 1.8×", "")),
    ({"state": "sketch"}, ("Sketch, 4 rounds", "12 of 20 steps", "30 rows for 20 steps", "3.0 steps per call", "")),
    ({"state": "stopped"}, ("Stopped in round 4", "12 of 20 steps", "30 rows for 20 steps", "3.0 steps per call", "")),
    ({"state": "sequential", "reason": "why"}, ("Sequential", "12 of 20 steps", "", "", "⚠ Not parallel: why")),
    ({"state": "done", "speedup": 2.345},
     ("Done in 4 rounds", "est. speed 2.3×", "30 rows for 20 steps", "3.0 steps per call", "")),
    ({"state": "done", "round": 1, "speedup": 0.5, "doubt": "hm"},
     ("Done in 1 round", "est. speed 0.5×", "30 rows for 20 steps", "12.0 steps per call", "⚠ In doubt: hm")),
    ({"state": "done", "warm": "same noise levels"}, ("Done in 4 rounds", "20 steps", "30 rows for 20 steps",
                                                      "3.0 steps per call", "Warm start: same noise levels")),
    ({"state": "done", "warm": "cold: other shape"}, ("Done in 4 rounds", "20 steps", "30 rows for 20 steps",
                                                      "3.0 steps per call", "Cold start: other shape")),
    ({"state": "done", "plain": True, "plan": "sequential, as"},
     ("Done, sequentially", "20 steps", "", "", "Chosen: sequential, as")),
    ({"state": "done", "rows": 0, "nfe": 0, "round": 0}, ("Nothing to do", "", "", "", "")),
    ({"state": "stopped", "rows": None, "round": None, "frozen": "x"}, ("Stopped", "", "", "", "")),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), SAID)
def test_words(page, change, said):
    script = "(m) => import('/extensions/ParaTAFusion/live_words.js').then((w) => w.wordsOf(m))"
    got = page.evaluate(script, {**BASE, **change})
    assert tuple(got[part] for part in ("title", "progress", "effort", "gain", "note")) == said
    assert got["label"].startswith("Parallel sampling. ")


def test_every_language_says_the_same(page):
    """No text is missing, and each fills in what the English one does; the plural forms of a unit are a pair."""
    texts = page.evaluate("() => import('/extensions/ParaTAFusion/live_texts.js').then((t) => t.TEXTS)")
    assert set(texts) == {"en", "zh", "ja", "ko", "fr", "de"}
    for language, own in texts.items():
        assert set(own) == set(texts["en"]), language
        for key, text in own.items():
            forms, english = ([t] if isinstance(t, str) else t for t in (text, texts["en"][key]))
            assert len(forms) == len(english)
            for form, model in zip(forms, english, strict=True):
                assert sorted(re.findall(r"{\w+}", form)) == sorted(re.findall(r"{\w+}", model)), (language, key)


def test_calls_are_not_sold_as_time(page):
    """Steps per call are no speed: the whole says so where none is known."""
    script = "(m) => import('/extensions/ParaTAFusion/live_words.js').then((w) => w.wordsOf(m).label)"
    for change in ({}, {"state": "done"}, {"state": "sketch", "speedup": 1.5}):
        assert "calls saved, speed not known" in page.evaluate(script, {**BASE, **change})
    for change in ({"speedup": 1.5}, {"state": "done", "speedup": 1.5}, {"state": "sequential"}):
        assert "calls saved" not in page.evaluate(script, {**BASE, **change})


@pytest.mark.parametrize(
    ("locale", "title"), [("fr", "Terminé en 4 passes"), ("zh-TW", "4 轮完成"), ("xx", "Done in 4 rounds")]
)
def test_words_in_the_frontends_language(page, locale, title):
    script = "([m, l]) => import('/extensions/ParaTAFusion/live_words.js').then((w) => w.wordsOf(m, l))"
    words = page.evaluate(script, [{**BASE, "state": "done"}, locale])
    assert words["title"] == title and "{" not in words["label"] and "undefined" not in words["label"]


def test_the_strip_stays_in_its_bounds(page):
    """Whatever order rows become final in, and whatever a message leaves out."""
    script = "(m) => import('/extensions/ParaTAFusion/live_view.js').then((w) => w.stripPaths(m))"
    changes: list[dict[str, Any]] = [
        {}, {"jumps": [3, 3, 2, 40, 12]}, {"levels": None, "jumps": None}, {"frozen": 99}, {"frozen": -4, "first": -2},
        {"rows": 0}, {"rows": 5000, "frozen": 4000, "jumps": list(range(8, 4000, 8))}, {"levels": [9, -9]},
    ]  # fmt: skip
    for change in changes:
        message = {**BASE, **change}
        got = page.evaluate(script, message)
        assert got["rows"] == max(message["rows"], 1)
        for name, path in got["paths"].items():
            if name != "lines" and path:
                edges = [float(n) for n in re.findall(r"[MH](-?[0-9.]+)", path)]
                assert min(edges) >= 0 and max(edges) <= got["rows"], (change, name, path)
                heights = [float(n) for n in re.findall(r"V(-?[0-9.]+)", path)]
                assert min(heights) >= 0 and max(heights) <= 24, (change, name, path)
