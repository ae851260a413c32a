"""A capped run and the one that finishes it: together little more than one run, and never the wrong picture."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, System, load_trajectory, save_trajectory, schemes, solve
from paratafusion_core.bench.problems import Setting, make_task, model_of
from paratafusion_core.job import predict_speedup
from paratafusion_core.report import Report, fidelity
from paratafusion_core.resume import fingerprint, same_system

Make = Callable[..., Any]


@pytest.mark.parametrize("solver", ["quasi-newton", "picard", "parataa"])
@pytest.mark.parametrize("scheme", ["ddim", "dpmpp_2m", "ddpm", "dpmpp_2m_sde"])
def test_sketch_and_refinement_cost_one_run_and_one_window(mixture: Make, scheme: str, solver: str) -> None:
    window = 8
    for seed in range(3):
        given = mixture(scheme, seed=seed, dtype=torch.float32)
        options = Options(solver, window=window)
        reference = solve(given.system, given.denoise, Options("sequential")).x
        whole = solve(given.system, given.denoise, options)
        for rounds in {1, 3, whole.report.rounds // 2, whole.report.rounds - 1}:
            sketch = solve(given.system, given.denoise, replace(options, max_rounds=rounds))
            finished = solve(given.system, given.denoise, options, warm=sketch.trajectory)
            assert sketch.report.nfe + finished.report.nfe <= whole.report.nfe + window
            assert "continued behind" in finished.report.warm
            assert finished.report.frozen_per_round[0] == sketch.report.frozen_per_round[-1]
            assert finished.status == "converged"
            assert fidelity(finished.x, reference).psnr_db > min(fidelity(whole.x, reference).psnr_db - 10, 60)


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa"])
@pytest.mark.parametrize("window", [8, "full"])
def test_the_second_run_takes_the_path_of_the_whole_one(mixture: Make, window: int | str, solver: str) -> None:
    """It knows what the first one's solver knew: its rounds are those that the whole run has left."""
    same, told, runs = 0, 0, 0
    for scheme in ("ddim", "dpmpp_2m", "dpmpp_2m_sde"):
        for seed in range(4):
            given = mixture(scheme, seed=seed, dtype=torch.float32)
            options = Options(solver, window=window)
            whole = solve(given.system, given.denoise, options).report.frozen_per_round
            for rounds in range(2, len(whole) - 1):
                sketch = solve(given.system, given.denoise, replace(options, max_rounds=rounds))
                told += sketch.trajectory.part.changes is not None
                finished = solve(given.system, given.denoise, options, warm=sketch.trajectory).report
                same += finished.frozen_per_round == whole[rounds - 1 :]
                runs += 1
    assert told and same >= 0.9 * runs, (same, told, runs)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (Options(preset="fast"), Options(), "its tolerance 0.01 is above this run's 0.003"),
        (Options(), Options(preset="exact"), "this run is exact"),
        (Options("parataa"), Options(), "its tolerance is that of parataa"),
        (Options("collocation", window=1), Options(), "it was interpolated"),
    ],
)
def test_a_sketch_that_is_of_no_use_says_why(mixture: Make, first: Options, second: Options, why: str) -> None:
    given = mixture(dtype=torch.float32)
    sketch = solve(given.system, given.denoise, replace(first, max_rounds=3)).trajectory
    report = solve(given.system, given.denoise, second, warm=sketch).report
    assert report.warm == f"same noise levels; nothing of the sketch is taken over, as {why}"
    assert report.status == "converged"


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa"])
def test_what_the_solver_knew_is_kept_in_the_file(mixture: Make, tmp_path: Path, solver: str) -> None:
    given, options = mixture(dtype=torch.float32), Options(solver, window=8)
    sketch = solve(given.system, given.denoise, replace(options, max_rounds=4)).trajectory
    save_trajectory(tmp_path / "sketch.safetensors", sketch)
    back = load_trajectory(tmp_path / "sketch.safetensors")
    assert torch.equal(back.part.changes, sketch.part.changes) and back.nbytes == sketch.nbytes > back.D.nbytes
    runs = [solve(given.system, given.denoise, options, warm=warm) for warm in (sketch, back)]
    assert torch.equal(runs[0].x, runs[1].x)


def test_a_parataa_sketch_of_before_goes_on_from_its_rows_alone(mixture: Make) -> None:
    """Older files hold nothing that ParaTAA remembers; too few changes are none."""
    given, options = mixture(dtype=torch.float32), Options("parataa", window=8)
    reference = solve(given.system, given.denoise, Options("sequential")).x
    sketch = solve(given.system, given.denoise, replace(options, max_rounds=4)).trajectory
    runs = []
    for changes in (None, sketch.part.changes[:2]):
        old = replace(sketch, part=replace(sketch.part, changes=changes))
        runs.append(solve(given.system, given.denoise, options, warm=old))
        assert "continued behind" in runs[-1].report.warm and fidelity(runs[-1].x, reference).psnr_db > 50
    assert torch.equal(runs[0].x, runs[1].x)


@pytest.mark.parametrize(("first", "second"), [("parataa", "quasi-newton"), ("quasi-newton", "parataa")])
def test_what_another_kind_of_solver_knew_is_not_taken_up(mixture: Make, first: str, second: str) -> None:
    given = mixture(dtype=torch.float32)
    sketch = solve(given.system, given.denoise, Options(first, "exact", window=8, max_rounds=4)).trajectory
    assert sketch.part.changes is not None
    rows_alone = replace(sketch, part=replace(sketch.part, changes=None))
    runs = [solve(given.system, given.denoise, Options(second, window=8), warm=warm) for warm in (sketch, rows_alone)]
    assert "continued behind" in runs[0].report.warm and torch.equal(runs[0].x, runs[1].x)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda given: given[:, :, :, :1], "shape"),
        (lambda given: given[:1], "2m, k"),
        (lambda given: given.repeat(1, 30, *[1] * (given.ndim - 2)), "at most"),
        (lambda given: torch.full_like(given, math.inf), "infinity"),
    ],
)
def test_changes_that_do_not_fit_are_refused(mixture: Make, changes: Callable[[Tensor], Tensor], said: str) -> None:
    given = mixture(dtype=torch.float32)
    sketch = solve(given.system, given.denoise, Options(window=8, max_rounds=4)).trajectory
    with pytest.raises(ValueError, match=said):
        replace(sketch, part=replace(sketch.part, changes=changes(sketch.part.changes)))


def test_the_account_adds_up(mixture: Make) -> None:
    given = mixture()
    sketch = solve(given.system, given.denoise, Options(max_rounds=4))
    told: list[int] = []
    report = solve(
        given.system, given.denoise, Options(), warm=sketch.trajectory, callback=lambda p: told.append(p.frozen)
    ).report
    assert sum(report.rows_per_round) == report.nfe and told == report.frozen_per_round
    first, residual = report.residuals[0]
    assert first == 0 and len(residual) == sketch.trajectory.part.final
    checked = [value for value in residual if not math.isnan(value)]
    assert len(checked) == report.rows_per_round[0] and max(checked) <= report.tolerance
    assert "NaN" not in str(report.to_dict()["residuals"])


def test_a_sketch_of_a_sketch(mixture: Make) -> None:
    given = mixture("dpmpp_2m")
    reference = solve(given.system, given.denoise, Options("sequential")).x
    warm, before = None, 0
    for _ in range(30):
        done = solve(given.system, given.denoise, Options(max_rounds=2), warm=warm)
        assert done.report.rounds <= 2
        if done.status == "converged":
            break
        assert done.trajectory.part.final > before
        warm, before = done.trajectory, done.trajectory.part.final
    assert done.status == "converged"
    assert fidelity(done.x, reference).psnr_db > 50


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa"])
@pytest.mark.parametrize("from_row", [0, 0.5])
def test_another_problem_on_the_same_system_is_found_out(mixture: Make, from_row: float, solver: str) -> None:
    """Another prompt, for all rows or only for late ones."""
    given, other = mixture(), mixture(seed=3)
    sketch = solve(given.system, given.denoise, Options(solver, max_rounds=6)).trajectory
    limit = float(given.system.sigmas[int(sketch.part.final * from_row)])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        changed = (sigma <= limit).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(changed, other.denoise(x, sigma), given.denoise(x, sigma))

    reference = solve(given.system, denoise, Options("sequential")).x
    done = solve(given.system, denoise, Options(solver), warm=sketch)
    assert "do not hold here" in done.report.warm
    assert done.report.frozen_per_round[0] == 1 and done.report.rounds <= given.system.evaluations
    assert fidelity(done.x, reference).psnr_db > 45


def test_more_guidance_for_late_rows_alone_is_found_out() -> None:
    """At preset fast, whose rows are allowed to be off by more, on a model that follows its prompt smoothly."""
    task = make_task(Setting("demo", "ddim", "normal", 50, 4.0), 0)
    stronger = model_of(Setting("demo", "ddim", "normal", 50, 7.0), 0)[0]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        late = (sigma < 2).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(late, stronger(x, sigma), task.denoise(x, sigma))

    options = Options(preset="fast", window=16, data_rms=task.data_rms)
    sketch = solve(task.system, task.denoise, replace(options, max_rounds=8)).trajectory
    assert float(task.system.sigmas[sketch.part.final - 1]) < 0.5
    assert "do not hold here" in solve(task.system, denoise, options, warm=sketch).report.warm
    assert "continued behind" in solve(task.system, task.denoise, options, warm=sketch).report.warm


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        (Options("collocation", window=1, rows=20), 10),
        (Options("collocation", window=1, preset="standard"), 12),
        (Options("collocation", window=4, preset="standard"), 4),
    ],
    ids=["rows", "target", "wide"],
)
def test_a_sketch_that_began_warm_is_finished_as_a_cold_one(options: Options, rounds: int) -> None:
    task = make_task(Setting("demo", "ddim", "normal", 50, 4.0), 1)
    stronger = model_of(Setting("demo", "ddim", "normal", 50, 4.6), 1)[0]
    options = replace(options, data_rms=task.data_rms, peak=2.0)
    reference = solve(task.system, stronger, Options("sequential")).x
    first = solve(task.system, task.denoise, Options(data_rms=task.data_rms)).trajectory
    cold = solve(task.system, stronger, options)
    sketch = solve(task.system, stronger, replace(options, max_rounds=rounds), warm=first)
    done = solve(task.system, stronger, options, warm=sketch.trajectory)
    assert "continued behind" in str(done.report.warm) and done.status == "converged"
    spent = sketch.report.nfe + done.report.nfe
    assert spent <= cold.report.nfe + (1 if options.window == 1 else 4)
    truth = [fidelity(run.x, reference, 2.0).psnr_db or 0.0 for run in (cold, done)]
    assert truth[1] > min(truth[0], 45.0) - 2


def test_a_model_that_fails(mixture: Make) -> None:
    """At a late row the run goes back to the start, and says where the model fails; at the start it ends at once."""
    given = mixture()
    sketch = solve(given.system, given.denoise, Options(max_rounds=6)).trajectory
    for row in (sketch.part.final - 1, 0):
        limit = float(given.system.sigmas[row])

        def denoise(x: Tensor, sigma: Tensor, limit: float = limit) -> Tensor:
            bad = (sigma <= limit).reshape(-1, *[1] * (x.ndim - 1))
            return torch.where(bad, math.nan, given.denoise(x, sigma))

        with pytest.raises(ValueError, match=f"NaN or infinity at row {row}"):
            solve(given.system, denoise, Options(), warm=sketch)


def test_the_doubt_of_a_sketch_is_not_forgotten(mixture: Make) -> None:
    given = mixture()
    sketch = solve(given.system, given.denoise, Options(max_rounds=6)).trajectory
    assert sketch.part.slope > 0
    assert solve(given.system, given.denoise, Options(), warm=sketch).report.doubt is None
    steep = replace(sketch, part=replace(sketch.part, slope=1e6))
    assert solve(given.system, given.denoise, Options(), warm=steep).report.doubt is not None
    assert solve(given.system, mixture(seed=3).denoise, Options(), warm=steep).report.doubt is None


def refused(given: Any, options: Options, trajectory: Any) -> bool:
    return "final rows" not in solve(given.system, given.denoise, options, warm=trajectory).report.warm


def test_rows_are_taken_over_only_where_they_can_be(mixture: Make) -> None:
    given = mixture()
    sketch = solve(given.system, given.denoise, Options(preset="balanced", max_rounds=5)).trajectory
    assert not refused(given, Options(preset="balanced"), sketch)
    assert not refused(given, Options(preset="fast"), sketch)
    assert not refused(given, Options("picard"), sketch)
    assert refused(given, Options(preset="strict"), sketch)  # they are not that accurate
    assert refused(given, Options(preset="exact"), sketch)  # nor is half precision
    assert refused(given, Options("parataa", "fast"), sketch)  # its tolerance means something else
    assert refused(mixture(seed=1), Options(), sketch)
    assert refused(given, Options(), replace(sketch, part=None))
    assert solve(given.system, given.denoise, Options()).trajectory.part is None  # a finished run leaves nothing over


def test_rows_of_an_exact_sketch_serve_every_tolerance(mixture: Make) -> None:
    given = mixture()
    sketch = solve(given.system, given.denoise, Options(preset="exact", max_rounds=6)).trajectory
    assert sketch.part.tolerance == 0
    assert not refused(given, Options(preset="strict"), sketch)
    assert not refused(given, Options("parataa"), sketch)


def test_through_a_file(mixture: Make, tmp_path: Path) -> None:
    given = mixture("ddpm")
    sketch = solve(given.system, given.denoise, Options(max_rounds=5)).trajectory
    save_trajectory(tmp_path / "sketch.safetensors", replace(sketch, latent="Pixels", problem="p"))
    loaded = load_trajectory(tmp_path / "sketch.safetensors")
    assert (loaded.part, loaded.latent, loaded.problem) == (sketch.part, "Pixels", "p")
    assert not refused(given, Options(), loaded)


def test_systems_are_told_apart(mixture: Make) -> None:
    system = mixture("ddpm").system
    others = [mixture("ddpm", seed=1).system, mixture("ddim").system]
    others.append(System(system.S, system.C, system.sigmas * 1.001))
    noise = system.S.clone()
    noise[3:] += 1e-3  # another draw of the noise of step 3
    others.append(System(noise, system.C, system.sigmas))
    marks = [fingerprint(s) for s in [system, *others]]
    assert all(same_system(a, b) == (i == j) for i, a in enumerate(marks) for j, b in enumerate(marks))
    assert same_system(marks[0], fingerprint(mixture("ddpm").system))
    for foreign in ("", "00" * 16, "zz" * 80, "0000c07f" * 20, "0000807f" * 20):
        assert not same_system(foreign, marks[0]) and not same_system(marks[0], foreign)


@pytest.mark.parametrize("solver", ["quasi-newton", "collocation"])
def test_a_schedule_rounded_otherwise_is_the_same(mixture: Make, solver: str) -> None:
    """As where the first run computes it on the CPU and the second on the GPU."""
    given = mixture("ddim", dtype=torch.float32)
    noise = torch.randn(len(given.system.sigmas), generator=torch.Generator().manual_seed(0))
    rounded = given.system.sigmas * (1 + 2e-7 * noise)
    levels = torch.cat([rounded, torch.zeros(1)])
    other = schemes.ddim(given.system.S[0] * (1 + 1e-7), levels)
    assert not torch.equal(other.C, given.system.C)
    options = Options(solver, rows=14) if solver == "collocation" else Options()
    sketch = solve(given.system, given.denoise, replace(options, max_rounds=4)).trajectory
    done = solve(other, given.denoise, options, warm=sketch).report
    assert done.warm.startswith("continued behind")
    whole = solve(given.system, given.denoise, options)
    again = solve(other, given.denoise, options, warm=whole.trajectory).report
    assert again.warm == "same noise levels"


def test_a_run_of_one_row(mixture: Make) -> None:
    system = mixture().system
    short = System(system.S[:2], system.C[:2, :1], system.sigmas[:1])
    done = solve(short, mixture().denoise, Options(max_rounds=1))
    assert done.status == "converged" and done.trajectory.part is None


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("scheme", ["ddim", "dpmpp_2m"])
def test_collocation_goes_on_where_it_stopped(mixture: Make, scheme: str, window: int, tmp_path: Path) -> None:
    """The same picture as in one go, for the check more, a call at most of the window; through a file, too."""
    rows = 14 if window == 1 else 24
    for seed in range(3):
        given = mixture(scheme, seed=seed, dtype=torch.float32)
        options = Options("collocation", window=window, rows=rows)
        whole = solve(given.system, given.denoise, options)
        for rounds in (1, 3, whole.report.rounds - 2):
            sketch = solve(given.system, given.denoise, replace(options, max_rounds=rounds))
            assert sketch.status == "max_rounds" and len(sketch.trajectory.part.rows) <= sketch.report.nfe
            save_trajectory(tmp_path / "sketch.safetensors", sketch.trajectory)
            warm = load_trajectory(tmp_path / "sketch.safetensors")
            finished = solve(given.system, given.denoise, options, warm=warm)
            checked = finished.report.rows_per_round[0]
            assert checked <= window
            assert "rows of the same run" in finished.report.warm and finished.status == "converged"
            assert sketch.report.nfe + finished.report.nfe <= whole.report.nfe + window
            assert fidelity(finished.x, whole.x).psnr_db > 45


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("changed", [{"seed": 3}, {"cfg": 7.5}])
def test_a_collocation_sketch_of_another_prompt_is_found_out(
    mixture: Make, changed: dict[str, Any], window: int
) -> None:
    """However far the sketch came: late nodes look alike whatever is asked for. The look is no round of the run."""
    given, other = mixture(dtype=torch.float32), mixture(dtype=torch.float32, **changed)
    options = Options("collocation", window=window)
    rounds = solve(given.system, given.denoise, options).report.rounds
    for cap in range(2, rounds):
        sketch = solve(given.system, given.denoise, replace(options, max_rounds=cap)).trajectory
        told: list[int] = []
        done = solve(given.system, other.denoise, options, warm=sketch, callback=lambda p, t=told: t.append(p.round))
        report = done.report
        assert "do not hold here" in report.warm and report.status == "converged"
        assert 1 <= report.probe_nfe <= 2 and sum(report.rows_per_round) == report.nfe
        assert told == [*range(1, report.rounds + 1)]
    stopped = solve(given.system, other.denoise, replace(options, max_rounds=1), warm=sketch)
    assert stopped.report.rounds == 1 and stopped.status == "max_rounds"


@pytest.mark.parametrize("window", [8, "auto"])
def test_a_model_that_changes_late_is_found_out(mixture: Make, window: int | str) -> None:
    given = mixture()
    rounds = solve(given.system, given.denoise, Options(window=8)).report.rounds
    sketch = solve(given.system, given.denoise, Options(window=8, max_rounds=rounds - 1)).trajectory
    assert 20 < sketch.part.final < 30
    limit = float(given.system.sigmas[2])

    def late(x: Tensor, sigma: Tensor) -> Tensor:
        D = given.denoise(x, sigma)
        return torch.where((sigma < limit).reshape(-1, *[1] * (x.ndim - 1)), 0.8 * D, D)

    done = solve(given.system, late, Options(window=window), warm=sketch)
    assert "do not hold" in done.report.warm
    assert fidelity(done.x, solve(given.system, late, Options("sequential")).x).psnr_db > 50


def test_a_look_alone_keeps_the_sketch(mixture: Make) -> None:
    given = mixture(dtype=torch.float32)
    sketch = solve(given.system, given.denoise, Options(window=8, max_rounds=4)).trajectory
    again = solve(given.system, given.denoise, Options(window=8, max_rounds=1), warm=sketch).trajectory
    assert again.part.final == sketch.part.final and torch.equal(again.part.changes, sketch.part.changes)


def test_states_without_dimensions(mixture: Make) -> None:
    """``[K+1, B]``: one number an image."""
    sigmas = mixture().system.sigmas
    system = schemes.ddim(
        torch.randn(5, generator=torch.Generator().manual_seed(0)) * sigmas[0], torch.cat([sigmas, sigmas.new_zeros(1)])
    )
    for solver in ("quasi-newton", "collocation"):
        sketch = solve(system, lambda x, s: 0.9 * x.tanh(), Options(solver, window=4, max_rounds=3))
        done = solve(system, lambda x, s: 0.9 * x.tanh(), Options(solver, window=4), warm=sketch.trajectory)
        assert done.status == "converged" and "of the same run" in done.report.warm


@pytest.mark.parametrize("wrong", [{"rounds": -1}, {"nfe": 2}, {"rounds": 0}, {"nfe": 1.5}])
def test_what_a_sketch_cost_is_checked(mixture: Make, wrong: dict[str, Any]) -> None:
    given = mixture(dtype=torch.float32)
    sketch = solve(given.system, given.denoise, Options("collocation", window=4, max_rounds=4)).trajectory
    with pytest.raises(ValueError, match=f"trajectory {next(iter(wrong))} is"):
        replace(sketch.part, **wrong)


def test_false_is_no_row(mixture: Make) -> None:
    given = mixture(dtype=torch.float32)
    part = solve(given.system, given.denoise, Options("collocation", window=4, max_rounds=4)).trajectory.part
    with pytest.raises(ValueError, match="trajectory rows are"):
        replace(part, rows=(False, *part.rows[1:]))


def test_auto_goes_on_from_a_collocation_sketch(mixture: Make) -> None:
    given = mixture(dtype=torch.float32)
    sketch = solve(
        given.system, given.denoise, Options("collocation", preset="sketch", window=2, max_rounds=3)
    ).trajectory
    report = solve(given.system, given.denoise, Options("auto", preset="sketch"), warm=sketch).report
    assert report.status == "converged" and report.plan
    assert report.predicted_seconds is None or report.predicted_seconds > 0


def test_a_sketch_of_another_solver_is_a_warm_start_for_collocation(mixture: Make) -> None:
    given = mixture(dtype=torch.float32)
    sketch = solve(given.system, given.denoise, Options(max_rounds=5)).trajectory
    report = solve(given.system, given.denoise, Options("collocation"), warm=sketch).report
    assert report.warm == "same noise levels; nothing of the sketch is taken over, as it is of solver quasi-newton"


def test_the_speed_of_a_run_that_goes_on_is_that_of_its_own_rows():
    """A call for one row takes a second: eight rows in five seconds, where twelve were final before."""
    report = Report("ddim", 20, "quasi-newton", "balanced", 3e-3, 20)
    report.status, report.rows_per_round, report.frozen_per_round = "converged", [1, 4, 4], [13, 17, 20]
    report.seconds_per_round, report.rounds = [1.0, 2.0, 2.0], 3
    predict_speedup(report)
    assert report.predicted_speedup == pytest.approx(20 / 5)
    report.warm = "continued behind 12 final rows of the same run"
    predict_speedup(report)
    assert report.predicted_speedup == pytest.approx(8 / 5)


@pytest.mark.parametrize(("window", "rows"), [(1, 16), (4, 24)])
def test_what_a_collocation_sketch_is_checked_by_is_the_models_time(mixture: Make, window: int, rows: int) -> None:
    """The rounds hold it, and a run that finishes a sketch is no slower than its rows."""
    given, took = mixture("ddim"), []

    def slow(x: Tensor, sigma: Tensor) -> Tensor:
        began = time.perf_counter()
        time.sleep(0.01)
        D = given.denoise(x, sigma)
        took.append(time.perf_counter() - began)
        return D

    options = Options("collocation", window=window, rows=rows)
    sketch = solve(given.system, slow, replace(options, max_rounds=5)).trajectory
    took.clear()
    report = solve(given.system, slow, options, warm=sketch).report
    assert report.spent >= report.model_seconds >= 0.99 * sum(took)
    assert report.seconds_per_round[0] >= took[0]
    # two rows that were evaluated one by one are no call of two
    assert len(report.calls()) == report.rounds - (window > 1)
    other = replace(given, denoise=lambda x, sigma: 0.5 * slow(x, sigma))
    took.clear()
    refused = solve(given.system, other.denoise, options, warm=sketch).report
    assert "do not hold here" in refused.warm and refused.model_seconds >= 0.99 * sum(took)
