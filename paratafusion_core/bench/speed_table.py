"""Markdown of the ``speed`` suite: what lost, the replays, the latency curves, and the prediction for any w / c."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import hardware
from .journal import Row
from .table import grid

_REPLAY = (
    "The networks have random weights and make no picture: this is a **replay** of the rounds that the trained demo "
    "network needed for DDIM-50 (normal schedule, CFG 4, preset balanced; each plan's run of median nfe), batch by "
    "batch, with the engine's own work. The plain sampler is a bare loop of 50 calls and blends that never waits for "
    "the device. PyTorch runs eagerly: w holds the launching of kernels, which a compiled network would not pay."
)

#: Seconds of the same work that differ by more, in natural logarithms, are worth a word.
_DRIFT = 0.1


def markdown(rows: Sequence[Row]) -> str:
    """All tables, the losing cases first."""
    names = ("hardware", "overhead", "latency", "replay", "drift", "predicted")
    kinds = {kind: [r for r in rows if r["kind"] == kind] for kind in names}
    facts = kinds["hardware"][0]
    parts = [f"*Measured on:* {hardware.line(facts)}"]
    if facts["device"] == "cpu":
        parts.append("On a CPU the networks are small ones of the same classes: this says nothing about a GPU.")
    parts += [_losses(kinds["replay"]), _REPLAY]
    parts += [_drift(r) for r in kinds["drift"] if r["after"] and abs(math.log(r["after"] / r["before"])) > _DRIFT]
    parts.append(_replays(kinds["replay"]))
    parts += [_overhead(r) for r in kinds["overhead"]]
    parts += ["## Latency of a batch, L(b) = w + c b", _curves(kinds["latency"])]
    if kinds["predicted"]:
        parts += ["## Predicted for any device", _predicted(kinds["predicted"])]
    return "\n\n".join(parts)


def _drift(row: Row) -> str:
    return (
        f"Rough: {row['network']}, weights {row['weights']}: the plain sampler took {row['before']:.3f} s before the "
        f"replays and {row['after']:.3f} s after them, so the device was busy with something else, or throttled."
    )


def _overhead(row: Row) -> str:
    return (
        f"The engine alone, {'x'.join(map(str, row['shape']))} latents, window {row['window']}: "
        f"{row['median_ms']:.2f} ms a round in the median of {row['rounds']} ({row['fastest_ms']:.2f} ms at its 5th "
        f"percentile), {100 * row['share_of_20_ms']:.1f} % of a round whose evaluation takes 20 ms."
    )


def _losses(rows: Sequence[Row]) -> str:
    rated = [r for r in rows if r["measured_speedup"] is not None]
    lines = []
    for network, weights in dict.fromkeys((r["network"], r["weights"]) for r in rated):
        own = [r for r in rated if (r["network"], r["weights"]) == (network, weights)]
        lost = [r["plan"] for r in own if r["measured_speedup"] < 1]
        if lost:
            count = "all" if len(lost) == len(own) else f"{len(lost)} of"
            lines.append(f"- {network}, weights {weights}: {count} {len(own)} plans ({'; '.join(lost)})")
    if not lines:
        return "No replay was slower than the plain sampler."
    return "**Slower than the plain sampler:**\n\n" + "\n".join(lines)


def _replays(rows: Sequence[Row]) -> str:
    """The slowest first, then those that failed."""
    ordered = sorted((r for r in rows if not r["failed"]), key=lambda r: float(r["measured_speedup"]))
    lines = []
    for r in (*ordered, *(r for r in rows if r["failed"])):
        cells = [r["network"], r["weights"], r["plan"], str(r["rounds"]), str(r["nfe"])]
        if r["failed"]:
            lines.append([*cells, r["failed"], "", "", _number(r["predicted_speedup"]), ""])
            continue
        share = r["engine_seconds"] / r["seconds"] if r["engine_seconds"] is not None else None
        cells += [f"{r['sequential_seconds']:.3f}", f"{r['seconds']:.3f}", f"**{r['measured_speedup']:.2f}**"]
        lines.append([*cells, _number(r["predicted_speedup"]), "" if share is None else f"{100 * share:.1f} %"])
    head = ["network", "weights", "plan", "rounds", "nfe", "plain, s", "parallel, s", "speed-up, measured"]
    return grid([*head, "speed-up, predicted by w + c b", "engine's share"], lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _curves(rows: Sequence[Row]) -> str:
    sizes = sorted({size for r in rows for size in r.get("sizes", [])})
    lines = []
    for r in rows:
        if "curve" not in r:
            lines.append([r["network"], r["weights"], *[""] * (len(sizes) + 3), r["failed"]])
            continue
        times = {size: f"{1000 * seconds:.1f}" for size, seconds in r["curve"]}
        what = f"{r['parameters'] / 1e6:.0f} M, {r['dtype']}, {'x'.join(map(str, r['latent']))}"
        cells = [f"{r['network']} ({what})", f"{r['weights']}, {r['bytes'] / 2**30:.2f} GiB"]
        cells += [times.get(size, r["failed"] or "") for size in sizes]
        if r["w"] is None:
            lines.append([*cells, "", "", ""])
            continue
        ratio = f"{r['w'] / r['c']:.1f}" if r["c"] else "no end"
        lines.append([*cells, f"{1000 * r['w']:.1f}", f"{1000 * r['c']:.2f}", ratio])
    head = ["network", "weights", *(f"L({size})" for size in sizes), "w", "c", "w / c"]
    return "Milliseconds; a row is a conditional and an unconditional pass.\n\n" + grid(head, lines)


def _predicted(rows: Sequence[Row]) -> str:
    lines = []
    for r in rows:
        if r["plan"] is None:
            lines.append([f"{r['ratio']:g}", "the plain sampler", "", "", "", "1.00"])
            continue
        db = f"{r['psnr_mean']:.1f} ({r['psnr_worst']:.1f})"
        speed = f"{r['speedup']:.2f}"
        lines.append([f"{r['ratio']:g}", r["plan"], f"{r['rounds']:.1f}", f"{r['nfe']:.1f}", db, speed])
    head = ["w / c", "best plan", "rounds", "nfe", "PSNR dB, mean (worst)", "speed-up, predicted"]
    text = "Predicted, not measured: the best plan whose mean PSNR on the demo network is at least 42 dB"
    return f"{text}, {rows[0]['seeds']} seeds.\n\n{grid(head, lines)}"
