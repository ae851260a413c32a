"""What a program has set for all of torch, and what models and callbacks do with what they are given."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
def test_solver_auto_keeps_nothing_that_the_model_may_overwrite(
    w: float, preset: str, rows: int | None, ticking: Callable
) -> None:
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


def test_a_callback_is_told_of_each_round_once(ticking: Callable) -> None:
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


def other_runs(steps: int) -> tuple[System, System]:
    start, noise = draw(0, 1, MIXTURE.shape, steps)
    x0, sigmas = start * schedules.SIGMA_MAX, schedules.normal(steps)
    return schemes.dpmpp_2m(x0, sigmas), schemes.ddpm(x0, sigmas, noise=noise)


@pytest.mark.parametrize("preset", ["balanced", "standard", "exact"])
def test_where_no_round_can_be_wide_solver_auto_is_the_plain_sampler_to_the_bit(preset: str) -> None:
    """A short run is not measured; one towards a target is none of collocation where the sampler adds noise."""
    for system in other_runs(12 if preset != "exact" else 24)[preset == "standard" :]:
        plain = solve(system, denoise, Options("sequential")).x
        done = solve(system, denoise, Options("auto", preset))
        assert done.report.solver == "sequential" and torch.equal(done.x, plain)
        # another model's run is of no use, and no obstacle
        kept = solve(run(12), denoise, Options(max_rounds=3)).trajectory
        assert torch.equal(solve(system, denoise, Options("auto", preset), warm=kept).x, plain)


@pytest.mark.parametrize(
    ("steps", "options", "said"),
    [
        (12, Options("auto", "standard", window="auto"), "fewer than 20 evaluations"),
        (24, Options("auto", "standard", window=1), "auto: asked for one row"),
        (24, Options("auto", target_db=40.0, tol=0.0), "tolerance 0"),
        (12, Options("auto", rows=6), "no target in dB is asked for"),
    ],
)
def test_why_there_is_no_collocation_is_said_where_there_is_no_plan_either(
    steps: int, options: Options, said: str
) -> None:
    report = solve(other_runs(steps)[1], denoise, options).report
    assert report.plan is not None and said in report.plan and "no collocation, as " in report.plan
    assert "memory" not in report.plan and "no collocation" not in report.window_reason


def test_one_row_is_asked_for_or_all_that_fits() -> None:
    for options, machine, said in (
        (Options("auto", window=1), Machine(), "asked for one row"),
        (Options("auto", window=1), Machine(most=4), "asked for one row"),
        (Options("auto", window=4), Machine(most=1), "memory for one row"),
    ):
        assert solve(run(), denoise, options, machine=machine).report.plan == f"auto: {said}"


def test_a_default_device_is_no_matter_of_schedules_schemes_and_trajectories(tmp_path: Path) -> None:
    """In a process of its own, as importing makes constants too; ``meta`` stands for an accelerator."""
    code = """
        import sys, torch
        torch.set_default_device("meta")
        from paratafusion_core import Options, Trajectory, load_trajectory, save_trajectory, schedules, schemes, solve
        from paratafusion_core.demo import ideal, mixture, model, shapes
        from paratafusion_core.demo.train import noised
        from paratafusion_core.noise import draw
        from paratafusion_core.plots import picture
        small = mixture.Mixture.make(modes=8, classes=4, shape=(2, 3, 3))
        start, noise = draw(0, 1, small.shape, 8)
        for name, schedule in schedules.SCHEDULES.items():
            sigmas, flow = schedule(8), name == "flow"
            for system in (
                schemes.euler(start, sigmas.tolist(), flow=flow),
                schemes.dpmpp_2m_sde(start, sigmas, noise=noise, flow=flow),
            ):
                done = solve(system, lambda x, sigma: x * 0.5, Options(window=3, flow=flow))
                assert done.x.isfinite().all()
        kept = done.trajectory
        save_trajectory(sys.argv[1], kept)
        for levels in (schedules.karras(5)[:-1], schedules.karras(1)[:-1]):
            assert load_trajectory(sys.argv[1]).onto(levels, False).D.isfinite().all()
        assert Trajectory(kept.D[:1], kept.sigmas[:1]).onto(levels, True).D.isfinite().all()
        picture(done.x)
        batch = shapes.render(3, torch.Generator().manual_seed(0))
        made = [*noised(batch.images, torch.Generator().manual_seed(0)), ideal.Ideal.make(64).images]
        made.append(model.denoiser(model.load(), "red ring")(batch.images[None, :1], sigmas[:1].float()))
        assert all(t.device.type == "cpu" and t.isfinite().all() for t in made)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "kept.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [Options("collocation"), Options("collocation", window=4, rows=20)])
def test_what_collocation_and_picard_make_no_use_of(options: Options) -> None:
    """As the options' description has it."""

    def drawn(options: Options) -> Tensor:
        return solve(run(), denoise, options).x

    for other in (replace(options, tol=1e-5), replace(options, preset="fast"), replace(options, history=1, order=1)):
        assert torch.equal(drawn(other), drawn(options))
    assert torch.equal(drawn(replace(options, window="auto")), drawn(replace(options, window=1)))
    assert torch.equal(drawn(replace(options, tol=0.0)), drawn(Options("sequential")))
    for solver in ("picard", "picard-eps"):
        plain = Options(solver, window=4)
        assert torch.equal(drawn(replace(plain, history=5, order=1)), drawn(plain))


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa"])
@pytest.mark.parametrize("window", [1, 2, 5, "full"])
def test_a_history_beyond_the_window_is_as_long_as_the_window(solver: str, window: int | str) -> None:
    longest = 8 if window == "full" else int(window)
    one, other = (solve(run(8), denoise, Options(solver, window=window, history=h)) for h in (longest, 10**12))
    assert torch.equal(one.x, other.x) and one.report.rows_per_round == other.report.rows_per_round


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
def test_two_rows_are_nothing_to_tell_a_fidelity_by(solver: str, ticking: Callable) -> None:
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


def test_a_first_call_that_is_late_is_no_measure_of_the_plain_sampler(ticking: Callable) -> None:
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
