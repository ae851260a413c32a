"""How many rows the next round evaluates."""

from __future__ import annotations

from collections.abc import Sequence

_SETTLE = 2  # rounds at a size before its rate is believed


def next_window(asked: int | str, total: int, rounds: Sequence[tuple[int, int, float]]) -> tuple[int, str]:
    """The window of the next round and why.

    Args:
        asked: a number of rows (clamped to ``total``), ``full`` or ``auto``.
        total: K, the run's rows.
        rounds: of each round so far the window asked for, the rows it froze, and its seconds.

    ``auto`` climbs 1, 2, 4, .. while rows frozen per measured second rise, and falls back to the best size seen.
    """
    if asked == "full":
        return total, "full"
    if isinstance(asked, int):
        return min(asked, total), f"asked for {asked}" if asked <= total else f"asked for {asked}, the run has {total}"
    sizes = sorted({size for size, _, _ in rounds})
    if not sizes:
        return 1, "auto: measuring"
    rates = {}
    for size in sizes:
        seen = [(frozen, seconds) for s, frozen, seconds in rounds if s == size]
        if len(seen) < _SETTLE:
            return size, "auto: measuring"
        late = seen[1:]  # the first call at a size pays for kernel selection
        rates[size] = sum(f for f, _ in late) / max(sum(s for _, s in late), 1e-9)
    best = max(rates, key=lambda size: rates[size])
    if best == sizes[-1] and best < total:
        return min(2 * best, total), "auto: measuring"
    return best, "auto: most rows frozen per second"
