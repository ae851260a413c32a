"""The measurement of the engine's own time; what it finds is the bench's matter."""

from __future__ import annotations

import json

import pytest

from paratafusion_core.bench import overhead
from paratafusion_core.bench.overhead import measure_overhead


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "picard"])
def test_it_measures_rounds_with_a_full_window(solver: str) -> None:
    found = measure_overhead((2, 4, 4), 6, batch=2, solver=solver, rounds=30, callback=True)
    assert json.loads(json.dumps(found)) == found
    assert found["rounds"] >= 30 and 0 < found["fastest_ms"] <= found["median_ms"] and found["cpu_ms"] > 0
    assert (found["shape"], found["window"], found["batch"], found["dtype"]) == ([2, 4, 4], 6, 2, "float32")
    assert found["share_of_20_ms"] == pytest.approx(found["median_ms"] / (found["median_ms"] + 20))


def test_it_waits_for_its_device_whichever_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(overhead, "synchronise", lambda device: waited.append(device.type))
    found = measure_overhead((2, 4, 4), 4, rounds=1)
    assert len(waited) >= 2 * found["rounds"] and set(waited) == {"cpu"}
