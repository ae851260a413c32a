"""Markdown of a grid's runs: each case, each model in brief, solvers against each other, and doubts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .journal import Row

#: Equal pictures have no PSNR; in a mean they, and all above, count as this.
CAP_DB = 120.0
#: Below this a picture is another one.
WRONG_DB = 20.0
_CASE = ("model", "sampler", "schedule", "steps", "cfg", "window", "solver", "preset", "rows")
_ORDER = ("quasi-newton", "parataa", "picard")
#: Solver and preset.
Contender = tuple[str, str]
_OTHERS: tuple[Contender, ...] = (("parataa", "balanced"), ("parataa", "fast"), ("picard", "balanced"))


def psnr(row: Row) -> float:
    """In dB, equal pictures and all above ``CAP_DB`` as that."""
    return CAP_DB if row["psnr_db"] is None else min(float(row["psnr_db"]), CAP_DB)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def grouped(rows: Iterable[Row], fields: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of ``fields``, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(f) for f in fields), []).append(row)
    return groups


def grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    body = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def cases(rows: Sequence[Row]) -> str:
    """Every case with mean and worst over its seeds."""
    lines = []
    for (model, sampler, schedule, steps, cfg, window, solver, preset, number), runs in grouped(rows, _CASE).items():
        rounds, db = [r["rounds"] for r in runs], [psnr(r) for r in runs]
        cost, seconds = [r["nfe"] / r["sequential_nfe"] for r in runs], [r["seconds"] for r in runs]
        good = [r["good_round"] for r in runs]
        reached = f"{mean(good):.1f} ({max(good)})" if None not in good else f"{sum(g is None for g in good)} never"
        lines.append(
            (
                model,
                f"{sampler}-{steps} {schedule}",
                f"{cfg:g}",
                str(window),
                " ".join([solver, *([preset] if preset != "balanced" else []), *([str(number)] if number else [])]),
                f"{mean(rounds):.1f} ({max(rounds)})",
                f"{mean(cost):.2f} ({max(cost):.2f})",
                f"{mean(db):.1f} ({min(db):.1f})",
                reached,
                f"{mean(seconds):.2f} ({max(seconds):.2f})",
                f"{mean(r['seconds'] / r['sequential_seconds'] for r in runs):.2f}",
            )
        )
    head = ("model", "sampler", "CFG", "window", "solver", "rounds, mean (worst)", "nfe / sequential, mean (worst)")
    more = ("PSNR dB, mean (worst)", "first round at 40 dB", "seconds, mean (worst)", "time / sequential")
    return grid((*head, *more), lines)


def brief(rows: Sequence[Row]) -> str:
    """One model: a line for each sampler and CFG, each cell the solvers' mean rounds in the order of the head."""
    rows = [r for r in rows if r["preset"] == "balanced"]
    solvers = [s for s in _ORDER if any(r["solver"] == s for r in rows)]
    windows = list(dict.fromkeys(r["window"] for r in rows if r["solver"] in solvers))
    lines = []
    for (sampler, schedule, steps, cfg), runs in grouped(rows, ("sampler", "schedule", "steps", "cfg")).items():

        def cell(value: Callable[[list[Row]], str], chosen: list[Row]) -> str:
            return " / ".join(value([r for r in chosen if r["solver"] == s]) for s in solvers)

        line = [f"{sampler}-{steps} {schedule}", f"{cfg:g}"]
        for window in windows:
            inside = [r for r in runs if r["window"] == window]
            line.append(cell(lambda some: f"{mean(r['rounds'] for r in some):.1f}", inside))
        line.append(cell(lambda some: f"{mean(psnr(r) for r in some):.0f}", runs))
        line.append(cell(lambda some: f"{min((psnr(r) for r in some), default=math.nan):.0f}", runs))
        lines.append(line)
    head = ["sampler", "CFG", *(f"rounds, window {w}" for w in windows), "PSNR dB, mean", "PSNR dB, worst"]
    return f"Cells: {' / '.join(solvers)}; rounds are means over the seeds.\n\n" + grid(head, lines)


def collocated(rows: Sequence[Row]) -> str:
    """The collocation solver: a line for each model, sampler and CFG, a column for each window and number of rows."""
    kinds = list(dict.fromkeys((r["window"], r["rows"]) for r in rows))
    lines = []
    for (model, sampler, schedule, steps, cfg), runs in grouped(rows, _CASE[:5]).items():
        line = [model, f"{sampler}-{steps} {schedule}", f"{cfg:g}"]
        for window, number in kinds:
            some = [r for r in runs if (r["window"], r["rows"]) == (window, number)]
            figures = f"{mean(r['rounds'] for r in some):.1f} / {mean(r['nfe'] for r in some):.1f}"
            db = [psnr(r) for r in some] or [math.nan]
            line.append(f"{figures} / {mean(db):.1f} ({min(db):.1f})")
        lines.append(line)
    head = ("model", "sampler", "CFG", *(f"window {w}, {n} rows" for w, n in kinds))
    return "Cells: rounds / nfe / PSNR dB, means, and the worst PSNR.\n\n" + grid(head, lines)


def reach(row: Row, db: float) -> int | None:
    """The first round whose picture has ``db``, None if none has."""
    for number, shown in enumerate(row["psnr_per_round"], 1):
        if shown is None or shown >= db:
            return number
    return None


def ratios(rows: Sequence[Row], one: Contender, other: Contender) -> str:
    """Rounds of ``one`` over those of ``other``, run by run at the same seed, setting and window.

    Three ways of matching the accuracy: the runs as they stopped, where both have 40 dB or more (with the PSNR that
    each has); and the first round in which the picture shown has 40 or 60 dB, whatever the stopping rule.
    """
    same = ("model", "sampler", "schedule", "steps", "cfg", "window", "seed")
    runs = {
        who: {tuple(r[f] for f in same): r for r in rows if (r["solver"], r["preset"]) == who} for who in (one, other)
    }
    pairs = [(row, runs[other][key]) for key, row in runs[one].items() if key in runs[other]]
    lines = []
    for model in [*dict.fromkeys(a["model"] for a, _ in pairs), "all"]:
        own = [(a, b) for a, b in pairs if model in (a["model"], "all")]
        both = [(a, b) for a, b in own if min(psnr(a), psnr(b)) >= 40.0]
        cells = [f"{mean(a['rounds'] / b['rounds'] for a, b in both):.3f} ({len(both)})"]
        cells.append(f"{mean(a['nfe'] / b['nfe'] for a, b in both):.3f}")
        cells.append(" / ".join(f"{mean(psnr(pair[i]) for pair in both):.1f}" for i in (0, 1)))
        for db in (40.0, 60.0):
            shown = [(reach(a, db), reach(b, db)) for a, b in own]
            counted = [a / b for a, b in shown if a is not None and b is not None]
            cells.append(f"{mean(counted):.3f} ({len(counted)})")
        lines.append((model, str(len(own)), *cells))
    head = ("model", "pairs", "rounds, both at 40 dB or more (pairs)", "nfe, same pairs", "their mean PSNR dB, each")
    return grid((*head, "first round at 40 dB (pairs)", "first round at 60 dB (pairs)"), lines)


def doubts(rows: Sequence[Row]) -> str:
    """Wrong pictures with and without a warning, and warnings about right ones."""
    lines = []
    for (model, solver, preset), runs in grouped(rows, ("model", "solver", "preset")).items():
        wrong = [r for r in runs if psnr(r) < WRONG_DB]
        right = [r for r in runs if psnr(r) >= WRONG_DB]
        alarms = [r for r in right if r["doubt"]]
        far = [r for r in right if psnr(r) < 40.0]
        lines.append(
            (
                model,
                solver if preset == "balanced" else f"{solver} {preset}",
                str(len(runs)),
                str(sum(bool(r["doubt"]) for r in wrong)),
                str(sum(not r["doubt"] for r in wrong)),
                f"{len(far)} ({sum(bool(r['doubt']) for r in far)})",
                f"{len(alarms)} ({100 * len(alarms) / max(len(right), 1):.2f} %)",
            )
        )
    head = ("model", "solver", "runs", "under 20 dB, doubted", "under 20 dB, not doubted", "20 to 40 dB (doubted)")
    return grid((*head, "doubted at 20 dB or more"), lines)


def markdown(rows: Sequence[Row]) -> str:
    """The tables of a paper suite: a model in brief each, then the solvers against each other, then the doubts."""
    parts = [f"## {model}\n\n{brief(runs)}" for (model,), runs in grouped(rows, ("model",)).items()]
    for other in _OTHERS:
        parts.append(f"## quasi-newton over {' '.join(other)}\n\n{ratios(rows, ('quasi-newton', 'balanced'), other)}")
    own = [r for r in rows if r["solver"] == "collocation"]
    if own:
        parts.append(f"## Collocation\n\n{collocated(own)}")
    parts.append(f"## Doubt\n\n{doubts(rows)}")
    return "\n\n".join(parts)
