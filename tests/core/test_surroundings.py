"""What a program has set for all of torch, and what models and callbacks do with what they are given."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, Progress, System, schedules, schemes, solve
from paratafusion_core.collocation import by_collocation
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.job import Job, predict_speedup
from paratafusion_core.noise import draw
from paratafusion_core.plan import Machine
from paratafusion_core.report import Report, fidelity

MIXTURE = Mixture.make(modes=24, classes=6, shape=(2, 6, 6))
denoise = MIXTURE.denoiser(1, 4.0)
EVERY = [
    Options(window=4),
    Options(preset="exact", window=4),
    Options("parataa"),
    Options("picard"),
    Options("collocation", window=1),
    Options("collocation", window=4),
    Options("sequential"),
    Options("auto", preset="standard"),
]


def run(steps: int = 30) -> System:
    return schemes.ddim(draw(0, 1, MIXTURE.shape)[0] * schedules.SIGMA_MAX, schedules.normal(steps))


def ticking(model: Callable[[Tensor, Tensor], Tensor], w: float, c: float) -> tuple[Any, Machine, list[int]]:
    """``model`` on a machine where a batch of b rows takes w + c b; the rows of its calls."""
    now, calls = [0.0], list[int]()

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        now[0] += w + c * len(x)
        calls.append(len(x))
        return model(x, sigma)

    return call, Machine(clock=lambda: now[0], engine=0.0), calls


@pytest.mark.parametrize("options", EVERY, ids=lambda o: f"{o.solver}-{o.preset}-{o.window}")
def test_autocast_and_a_default_device_are_the_models_own(options: Options) -> None:
    seen: list[tuple[bool, str]] = []

    def note() -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_device().type))

    def told(x: Tensor, sigma: Tensor) -> Tensor:
        note()
        with torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return denoise(x, sigma)

    system, machine = run(), Machine(clock=lambda: 0.0)
    plain = solve(system, denoise, options, machine=machine)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        done = solve(system, told, options, machine=machine, callback=lambda _: note())
    assert torch.equal(done.x, plain.x) and done.report.rounds == plain.report.rounds
    assert set(seen) == {(True, "meta")}


@pytest.mark.parametrize(("w", "preset", "rows"), [(1.0, "standard", None), (10.0, "sketch", 40), (0.0, "fine", None)])
def test_solver_auto_keeps_nothing_that_the_model_may_overwrite(w: float, preset: str, rows: int | None) -> None:
    buffer = torch.empty(64, 1, *MIXTURE.shape)

    def overwriting(x: Tensor, sigma: Tensor) -> Tensor:
        buffer[: len(x)] = denoise(x, sigma)
        x.fill_(7.0)
        sigma.fill_(3.0)
        return buffer[: len(x)]

    system, found = run(50), []
    for model in (denoise, overwriting):
        call, machine, calls = ticking(model, w, 1.0)
        options = Options("auto", preset=preset, rows=rows)
        done = solve(system, call, options, machine=machine)
        found.append((done.x, calls))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("preset", ["balanced", "standard"])
@pytest.mark.parametrize(
    "wrong",
    [lambda x: None, lambda x: (x,), lambda x: x[:0], lambda x: torch.cat([x, x]), lambda x: x[..., :1], lambda x: 1.0],
)
def test_what_is_no_answer_is_said_in_a_sentence(preset: str, wrong: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"denoise returned .* are allowed"):
        solve(run(), lambda x, sigma: wrong(x), Options("auto", preset=preset))


def test_a_callback_is_told_of_each_round_once() -> None:
    call, machine, _ = ticking(denoise, 10.0, 1.0)
    told: list[int] = []
    options = Options("auto", preset="sketch", rows=40)
    done = solve(run(50), call, options, machine=machine, callback=lambda p: told.append(p.round))
    assert done.report.recalled  # the plan has changed on the way
    assert told == list(range(1, done.report.rounds + 1))


@pytest.mark.parametrize("solver", ["quasi-newton", "collocation", "sequential"])
def test_a_callback_costs_the_rounds_nothing_and_holds_nothing_of_theirs(solver: str) -> None:
    def slow(progress: Progress) -> None:
        time.sleep(0.05)
        progress.residual.clear()

    report = solve(run(8), denoise, Options(solver, window=4), callback=slow).report
    assert min(report.seconds_per_round) < 0.05
    assert all(values for _, values in report.residuals)


def test_a_falling_clock_takes_no_picture() -> None:
    times = iter(range(100_000, 0, -1))
    options = Options("auto", max_rounds=3)
    assert solve(run(), denoise, options, machine=Machine(clock=lambda: float(next(times)))).report.rounds == 3


def test_with_a_window_of_one_solver_auto_is_the_plain_sampler_to_the_bit() -> None:
    system = run()
    plain = solve(system, denoise, Options("sequential")).x
    assert torch.equal(solve(system, denoise, Options("auto", window=1)).x, plain)


def test_a_state_of_one_number_is_gone_on_with() -> None:
    def one(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(1.5 * x / (1 + sigma.reshape(-1, 1, 1) ** 2).sqrt())

    system = schemes.ddim(draw(0, 1, (1,))[0] * schedules.SIGMA_MAX, schedules.normal(8))
    sketch = solve(system, one, Options(window=6, tol=1e-12, max_rounds=1))
    done = solve(system, one, Options(window=6, tol=1e-12), warm=sketch.trajectory)
    assert fidelity(done.x, solve(system, one, Options("sequential")).x, 1.0).psnr_db > 100


@pytest.mark.parametrize("window", [2, 4, 8, 16, "full"])
@pytest.mark.parametrize("rows", [2, 3, 5, 8, 10, 14, 30])
def test_collocation_spends_no_more_than_it_may(window: int | str, rows: int) -> None:
    report = solve(run(50), denoise, Options("collocation", window=window, rows=rows)).report
    assert report.nfe <= rows


@pytest.mark.parametrize("solver", ["collocation", "auto"])
def test_two_rows_are_nothing_to_tell_a_fidelity_by(solver: str) -> None:
    options = Options(solver, preset="standard", rows=2, data_rms=MIXTURE.data_rms)
    call, machine, _ = ticking(denoise, 0.0, 1.0)
    report = solve(run(20), call, options, machine=machine).report
    assert report.solver == "collocation" and report.nfe == 2
    assert report.estimated_db is not None and report.estimated_db < 20
    assert report.doubt is not None and "too few" in report.doubt


@pytest.mark.parametrize(("name", "value"), [("denoise", None), ("callback", 3)])
def test_what_is_no_function_is_said_before_work_starts(name: str, value: Any) -> None:
    given = {"denoise": denoise, **{name: value}}
    with pytest.raises(ValueError, match=f"{name} is a "):
        solve(run(), **given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.karras(3, rho=0.0),
        lambda: schedules.uniform(3, sigma_min=0.0),
        lambda: schedules.karras(3, sigma_min=2.0, sigma_max=1.0),
        lambda: schedules.flow(3, 0.0),
    ],
)
def test_levels_that_are_none_are_refused(make: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        make()


def test_a_first_call_that_is_late_is_no_measure_of_the_plain_sampler() -> None:
    def late(first: float) -> float | None:
        call, machine, calls = ticking(denoise, 1.0, 1.0)
        now = machine.clock

        def clock() -> float:
            return now() + (first if calls else 0.0)

        options = Options("collocation", window=4)
        job = Job(run(50), call, options, None, None, False)
        return by_collocation(job, clock=clock).report.predicted_speedup

    on_time, found = late(0.0), late(100.0)
    assert on_time is not None and found is not None
    assert found < on_time < 5  # the run took longer, and one row no longer


def test_a_late_call_of_one_row_promises_nothing() -> None:
    """On a busy machine; a batch of several rows tells that one takes no longer."""
    report = Report("ddim", 50, "quasi-newton", "balanced", 3e-3, 50)
    report.rows_per_round, report.seconds_per_round = [8, 8, 8, 1], [0.1, 0.1, 0.1, 5.0]
    predict_speedup(report)
    assert report.predicted_speedup == pytest.approx(50 * 0.1 / 5.3)


def test_collocation_is_as_far_as_its_rounds() -> None:
    told: list[int] = []
    options = Options("collocation", window=4, rows=30)
    done = solve(run(50), denoise, options, callback=lambda p: told.append(p.frozen))
    rounds = done.report.rounds
    assert told[-1] == 50 and told == sorted(told)
    assert all(frozen <= 50 * (i + 1) // rounds for i, frozen in enumerate(told))


@pytest.mark.parametrize("value", [0, "", ()])
def test_a_callback_that_is_nothing_is_none_too(value: Any) -> None:
    with pytest.raises(ValueError, match="callback is a "):
        solve(run(), denoise, callback=value)


def test_levels_of_a_model_may_be_tensors() -> None:
    given = schedules.karras(5, torch.tensor(0.03), torch.tensor(14.6))  # type: ignore[arg-type]
    assert torch.allclose(given[[0, 4]], torch.tensor([14.6, 0.03], dtype=torch.float64), rtol=1e-4)


def test_states_of_one_dimension_are_compared() -> None:
    assert fidelity(torch.zeros(3), torch.ones(3), 1.0).max_abs == 1.0
