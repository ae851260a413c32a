"""A capped run whose window is chosen automatically, and the run that finishes it: their choices are those of one run.

The machines are synthetic. What a round takes follows from which round of the whole it is, so that a run in one go and
one that is cut in two see the same machine.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from paratafusion_core import Options, Solution, Trajectory, load_trajectory, save_trajectory, schedules, schemes, solve
from paratafusion_core.automatic import automatic
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.iterate import iterate
from paratafusion_core.job import Job
from paratafusion_core.noise import draw
from paratafusion_core.plan import Machine, Question
from paratafusion_core.report import fidelity
from paratafusion_core.timing import Timing
from paratafusion_core.window import Asked, Pilot, Timed

Make = Callable[..., Any]
KNOWN = {1: 1.0, 2: 2.0, 4: 4.0}
LATENCIES = [(0.0, 1.1), (1.0, 1.1), (4.0, 1.1), (16.0, 1.1), (1.0, 3.0), (8.0, 3.0)]


class Synthetic:
    """A machine on which b rows take w + b units, each call off by up to a factor that its number decides."""

    def __init__(self, problem: Any, w: float, factor: float, known: dict[int, float] | None = None) -> None:
        self._problem, self._w, self._factor, self._known = problem, w, factor, known or {}
        self.now, self.calls, self.rows = 0.0, 0, 0
        self._looks_above = float("inf")

    def _denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        if float(sigma[0]) < self._looks_above:  # a look at final rows is none of the whole run's rounds
            self.calls += 1
        off = self._factor ** random.Random(self.calls).uniform(-1, 1)
        self.now += (self._w + len(x)) * off
        self.rows += len(x)
        return self._problem.denoise(x, sigma)

    def run(self, options: Options, warm: Trajectory | None = None) -> Solution:
        """On and on: the next run's calls are numbered from where this one's end."""
        part = None if warm is None else warm.part
        if part is not None and not part.rows:
            self._looks_above = float(self._problem.system.sigmas[part.final - 1]) * (1 - 1e-4)
        before = self.rows
        job = Job(self._problem.system, self._denoise, options, warm, None, True)
        with torch.no_grad():
            if options.solver == "auto":
                done = automatic(job, Machine(self._known, clock=lambda: self.now))
            else:
                done = iterate(job, None, lambda: self.now)
        assert self.rows - before == done.report.nfe + done.report.probe_nfe
        return done


def both(machine: Synthetic, options: Options, cap: int) -> tuple[int, Solution]:
    """The rows that a sketch and its refinement evaluate, and how it ended."""
    done = machine.run(replace(options, max_rounds=cap))
    if done.status == "max_rounds":
        done = machine.run(options, done.trajectory)
    assert done.status == "converged"
    return machine.rows, done


def long(scheme: str, seed: int, steps: int = 40) -> Any:
    """The tests' mixture; 40 steps are enough for the automatic window to measure."""
    mixture = Mixture.make(modes=24, classes=6, shape=(2, 6, 6))
    start, noise = draw(seed, 1, mixture.shape, steps)
    x0, sigmas = start * schedules.SIGMA_MAX, schedules.normal(steps)
    system = {
        "ddim": lambda: schemes.ddim(x0, sigmas),
        "ddpm": lambda: schemes.ddpm(x0, sigmas, noise=noise),
        "dpmpp_2m": lambda: schemes.dpmpp_2m(x0, sigmas),
    }[scheme]()

    class Problem:
        denoise = staticmethod(mixture.denoiser(seed % 6, 4.0))

    Problem.system = system  # type: ignore[attr-defined]
    return Problem


@pytest.mark.parametrize("scheme", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize(
    "options",
    [Options(), Options("picard"), Options("parataa"), Options("auto"), Options("auto", "standard")],
    ids=["quasi-newton", "picard", "parataa", "auto", "auto-42-dB"],
)
def test_whatever_the_latencies_both_cost_one_run_and_one_window(scheme: str, options: Options) -> None:
    options = replace(options, window="auto")
    for w, factor in LATENCIES:
        problem = long(scheme, int(factor))
        for cap in (1, 2, 3, 5, 6, 12):
            rows, done = both(Synthetic(problem, w, factor), options, cap)
            whole = Synthetic(problem, w, factor)
            if cap == 1 and done.report.solver == "collocation":
                whole.calls = 1  # it had no plan yet, so the second run is a whole one that meets the next calls
            widest = max(whole.run(options).report.rows_per_round)
            assert rows <= whole.rows + widest, (w, factor, cap)
            assert "do not hold" not in (done.report.warm or "")


class Shrinking(Asked):
    """A window of 8 rows in four rounds, of one in the next, then of 2."""

    def __init__(self) -> None:
        super().__init__("auto", 40)
        self._round = 0

    def next(self, frozen: int) -> tuple[int, str]:
        self._round += 1
        return (8 if self._round < 5 else 1 if self._round == 5 else 2), "told"

    def resume(self, timing: Timing) -> None:
        self._round = len(timing.rounds)


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa"])
def test_what_a_shrinking_window_forgets_is_forgotten_by_the_second_run(solver: str) -> None:
    """Rows that have left the window behind are guessed anew."""
    for scheme in ("ddim", "ddpm", "dpmpp_2m"):
        problem, options = long(scheme, 0), Options(solver, window="auto")

        def run(rounds: int | None, warm: Trajectory | None = None, p: Any = problem, o: Options = options) -> Solution:
            job = Job(p.system, p.denoise, replace(o, max_rounds=rounds), warm, None, True)
            return iterate(job, Shrinking())

        whole, sketch = run(None).report.frozen_per_round, run(4)
        assert run(None, sketch.trajectory).report.frozen_per_round == whole[3:]


@pytest.mark.parametrize("cap", [1, 3, 8])
@pytest.mark.parametrize(("steps", "known"), [(16, {}), (40, KNOWN)])
def test_where_every_round_is_one_row_one_row_is_looked_at(steps: int, known: dict[int, float], cap: int) -> None:
    problem, other = long("dpmpp_2m", 0, steps), long("dpmpp_2m", 3, steps)
    options = Options("auto", window="auto")
    rows, done = both(Synthetic(problem, 0.0, 1.0, known), options, cap)
    assert rows == steps + 1 and done.report.solver == "sequential"
    reference = solve(problem.system, problem.denoise, Options("sequential")).x
    assert fidelity(done.x, reference).psnr_db > 60
    # another prompt: row 0 is evaluated then, too
    sketch = Synthetic(problem, 0.0, 1.0, known).run(replace(options, max_rounds=cap)).trajectory
    other.system = problem.system
    done = Synthetic(other, 0.0, 1.0, known).run(options, sketch)
    assert cap == 1 or "do not hold here" in done.report.warm
    reference = solve(problem.system, other.denoise, Options("sequential")).x
    assert fidelity(done.x, reference).psnr_db > 60


@pytest.mark.parametrize(("w", "known", "window"), [(0.0, KNOWN, 1), (9.0, {}, 6)])
def test_a_collocation_sketch_is_gone_on_with_as_it_was_planned(w: float, known: dict[int, float], window: int) -> None:
    problem = long("ddim", 1)
    options = Options("auto", "standard", window="auto")
    machine = Synthetic(problem, w, 1.0, known)
    sketch = machine.run(replace(options, max_rounds=4))
    assert sketch.report.solver == "collocation" and sketch.trajectory.part.timing == Timing(window)
    before = machine.rows
    done = machine.run(options, sketch.trajectory)
    whole = Synthetic(problem, w, 1.0, known).run(options)
    assert done.report.solver == "collocation" and "as the sketch had it" in done.report.plan
    assert machine.rows - before < whole.report.nfe and fidelity(done.x, whole.x).psnr_db > 45


def test_a_sketch_without_a_plan_is_begun_anew() -> None:
    problem, options = long("ddim", 0), Options("auto", "standard", window="auto")
    machine = Synthetic(problem, 4.0, 1.0)
    sketch = machine.run(replace(options, max_rounds=1)).trajectory
    assert sketch.part.timing == Timing() and machine.rows == 1
    whole, done = Synthetic(problem, 4.0, 1.0), machine.run(options, sketch)
    assert torch.equal(done.x, whole.run(options).x) and machine.rows == whole.rows + 1


ROUNDS = st.lists(st.tuples(st.integers(1, 3), st.floats(0.01, 10.0), st.floats(0.0, 1.0)), min_size=1, max_size=25)


@given(ROUNDS, st.integers(0, 25), st.booleans(), st.sampled_from([{}, {1: 1.0, 2: 1.2}]))
@settings(deadline=None)
def test_a_window_told_of_its_rounds_chooses_as_if_it_had_lived_through_them(
    rounds: list[tuple[int, float, float]], cut: int, pilot: bool, known: dict[int, float]
) -> None:
    """Whatever the rounds took, and wherever the run was cut."""

    def fresh(machine: Machine) -> Asked | Pilot:
        timed = Timed(lambda x, sigma: x, time.perf_counter, accelerator=True)
        timed.let_go()  # all seconds are the model's
        return Pilot(Question(100, 3e-3), machine, timed) if pilot else Asked("auto", 100)

    whole, final = fresh(Machine(known)), 0
    second: Asked | Pilot | None = None
    for number, (frozen, seconds, _) in enumerate(rounds):
        if number == cut:
            second = fresh(Machine({1: 9.0, 2: 3.0}, 5.0))
            told = whole.timing()
            assert told is not None
            second.resume(told)
        width, reason = whole.next(final)
        if second is not None:
            assert second.next(final) == (width, reason)
            second.record(frozen, width, seconds * width)
        whole.record(frozen, width, seconds * width)
        final += frozen
    if second is not None:
        assert second.timing() == whole.timing()


def sketch_of(mixture: Make) -> Trajectory:
    problem = mixture(dtype=torch.float32)
    kept = Synthetic(problem, 4.0, 1.1).run(Options("auto", window="auto", max_rounds=6)).trajectory
    assert kept is not None and kept.part.timing.rounds
    return kept


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with other facts."""
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["facts"])
    change(facts["part"])
    save_file(tensors, str(path), {**metadata, "facts": json.dumps(facts)})
    return path


def test_what_the_window_has_gone_by_is_kept_in_the_file(mixture: Make, tmp_path: Path) -> None:
    sketch = sketch_of(mixture)
    save_trajectory(tmp_path / "sketch.safetensors", sketch)
    assert load_trajectory(tmp_path / "sketch.safetensors").part == sketch.part


def test_a_file_of_before_is_read(mixture: Make, tmp_path: Path) -> None:
    save_trajectory(tmp_path / "old.safetensors", sketch_of(mixture))
    old = load_trajectory(rewritten(tmp_path / "old.safetensors", lambda part: part.pop("timing")))
    assert old.part is not None and old.part.timing is None
    done = Synthetic(mixture(dtype=torch.float32), 4.0, 1.1).run(Options("auto", window="auto"), old)
    assert done.status == "converged" and done.report.warm.startswith("continued behind")


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": -1},
        {"window": 1.5},
        {"warm": 1},
        {"engine": float("nan")},
        {"given": [[0, 1.0]]},
        {"given": [[1, -1.0]]},
        {"given": [[1]]},
        {"given": {"1": 1.0}},
        {"rounds": [[0, 1, 1.0, 0.0]]},
        {"rounds": [[1, 1, float("inf"), 0.0]]},
        {"rounds": [[1, 1, 1e308, 0.0]]},
        {"given": [[1, 1e308], [2, 1e308]]},
        {"rounds": [[1, 1, 1.0, "0"]]},
        {"rounds": [[1, 1, 1.0, 0.0]] * 100_001},
        {"more": 1},
    ],
    ids=str,
)
def test_numbers_of_a_file_are_checked(mixture: Make, tmp_path: Path, wrong: dict[str, Any]) -> None:
    save_trajectory(tmp_path / "bad.safetensors", sketch_of(mixture))
    with pytest.raises(ValueError, match=r"trajectory .* allowed"):
        load_trajectory(rewritten(tmp_path / "bad.safetensors", lambda part: part["timing"].update(wrong)))
