"""A model that is another one from some row on: collocation does not interpolate across that."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paratafusion_core import Options, Solution, schedules, solve
from paratafusion_core.bench.problems import Setting, make_task, prompt_of
from paratafusion_core.collocation import grid
from paratafusion_core.collocation.nodes import Ground, Nodes, missed, states, with_evaluated
from paratafusion_core.collocation.pieces import interpolation, jumps, left_out, placed, placed_surely, slopes, split
from paratafusion_core.demo import model
from paratafusion_core.plan import Question, collocation_work
from paratafusion_core.report import fidelity
from paratafusion_core.schemes import ddim

STEPS = st.integers(4, 60)


def levels(steps: int) -> Tensor:
    return grid.coordinate(schedules.normal(steps)[:-1], torch.ones(steps, dtype=torch.float64), 0.6)


@st.composite
def broken(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    steps = draw(STEPS)
    return steps, tuple(sorted(draw(st.sets(st.integers(1, steps - 1), max_size=4))))


def test_pieces_know_nothing_of_each_other() -> None:
    u, nodes = levels(20), [0, 3, 7, 8, 12, 19]
    assert split(nodes, (8,)) == [slice(0, 3), slice(3, 6)]
    assert split(nodes, (3, 12)) == [slice(0, 6)]  # what lies between 0 and 3 is not known
    leaning = slopes(u, nodes, (8,))
    M = interpolation(u, nodes, leaning, 1.0, (8,))
    assert torch.equal(M[:8, :3], grid.interpolation(u[:8], [0, 3, 7])) and not M[:8, 3:].any()
    assert torch.equal(M[8:, 3:], grid.interpolation(u[8:], [0, 4, 11])) and not M[8:, :3].any()
    assert torch.equal(interpolation(u, nodes, slopes(u, nodes, ()), 1.0, ()), grid.interpolation(u, nodes))
    assert torch.equal(left_out(u, nodes, (8,))[3:, 3:], grid.left_out(u[[8, 12, 19]]))
    assert jumps(nodes, (8,)) == [False, False, True, False, False]
    assert jumps(nodes, (5, 12)) == [False] * 5  # only what is split at counts


@settings(max_examples=60, deadline=None)
@given(broken(), st.integers(2, 40))
def test_both_sides_of_a_break_are_evaluated(kind: tuple[int, tuple[int, ...]], count: int) -> None:
    steps, breaks = kind
    u = levels(steps)
    both = {*breaks, *(b - 1 for b in breaks)}
    surely = placed_surely(u, count, breaks)
    assert both <= {*surely} and surely == sorted({*surely}) and surely[0] == 0 and surely[-1] == steps - 1
    if not breaks:
        assert surely == grid.place_surely(u, count)
    for a, b in itertools.pairwise([*breaks, steps]):
        assert sum(a <= row < b for row in surely) >= min(3, b - a)
    for place in (grid.place, grid.place_in_noise):
        rows = placed(place, u, count, breaks)
        assert rows == sorted({*rows}) and rows[0] == 0 and rows[-1] == steps - 1
        assert len(rows) <= max(min(count, steps), 2)
        if count >= 12 + 6 * len(breaks) or count >= steps >= 12:
            assert both <= {*rows}


def test_nothing_is_foreseen_behind_a_break() -> None:
    """Where another prompt begins D jumps, which is no surprise."""
    system = ddim(torch.randn(2, 3, 4, dtype=torch.float64), schedules.normal(10))
    u, ones = levels(10), torch.ones(10, dtype=torch.float64)
    ground = Ground(system.S.flatten(2), system.C, u, 0 * ones, ones, breaks=(5,))
    nodes: Nodes | None = None
    for row in (0, 3):
        nodes = with_evaluated(ground, nodes, [row], states(ground, nodes, [row]), torch.ones(1, 2, 12).double())
    far = torch.full((3, 2, 12), 9.0, dtype=torch.float64)
    assert missed(nodes, [4, 5, 7], far, ground.breaks).flatten(1).any(1).tolist() == [True, False, False]


def test_rows_of_breaks_are_planned() -> None:
    """By a count: how far they lie from other rows is not known before the run."""
    plain, broken = (collocation_work(Question(50, 1e-3, 42.0, breaks=n), 1) for n in (0, 2))
    assert broken.rows == plain.rows + 4
    assert collocation_work(Question(20, 1e-3, 42.0, breaks=9), 1).rows == 20


def changed(seed: int, breaks: bool, options: Options) -> tuple[float, Solution]:
    """Fidelity of DDIM-50 whose second prompt takes over at noise 0.7, and of the run itself."""
    task = make_task(Setting("demo", "ddim", "normal", 50, 4.0), seed)
    first, second = (model.denoiser(model.load(), text) for text in (prompt_of(seed), prompt_of(seed + 1)))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        late = sigma < 0.7
        D = torch.empty_like(x)
        for part, network in ((late, second), (~late, first)):
            if part.any():
                D[part] = network(x[part], sigma[part])
        return D

    at = int((task.system.sigmas < 0.7).nonzero()[0])
    system = replace(task.system, breaks=(at,) if breaks else ())
    more = {"data_rms": task.data_rms, "flow": task.flow}
    reference = solve(system, denoise, Options("sequential", **more), keep_trajectory=False).x
    solution = solve(system, denoise, replace(options, **more), keep_trajectory=False)
    return fidelity(solution.x, reference, 2.0).psnr_db or 0.0, solution


@pytest.mark.parametrize("window", [1, 4])
def test_a_prompt_that_ends_on_the_way(window: int) -> None:
    options = Options("collocation", window=window, target_db=42.0, peak=2.0)
    seeds = range(4)
    known = [changed(seed, True, options) for seed in seeds]
    unknown = [changed(seed, False, options) for seed in seeds]
    for found, solution in known:
        assert found > 38 and solution.report.nfe < (32 if window == 1 else 48)
    worth = [sum(found - 0.5 * solution.report.nfe for found, solution in runs) for runs in (known, unknown)]
    assert worth[0] > worth[1]  # nearer, or from fewer evaluations


def test_wide_windows_with_a_number_of_rows_lose_nothing() -> None:
    """They do not place rows at breaks; the gap that holds one is looked at as any other."""
    options = Options("collocation", window=4, rows=30, peak=2.0)
    known, unknown = (sum(changed(seed, breaks, options)[0] for seed in range(4)) for breaks in (True, False))
    assert known > unknown - 2


def test_a_capped_run_goes_on_across_a_break() -> None:
    """As the whole run does, but for the rounding of what it left."""
    task, at = make_task(Setting("demo", "ddim", "normal", 50, 4.0), 0), 20
    first, second = (model.denoiser(model.load(), prompt_of(0), cfg=cfg) for cfg in (4.0, 2.0))
    level = float(task.system.sigmas[at])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([(second if s <= level else first)(x[i : i + 1], s[None]) for i, s in enumerate(sigma)])

    system = replace(task.system, breaks=(at,))
    options = Options("collocation", window=1, target_db=42.0, data_rms=task.data_rms, peak=2.0)
    whole = solve(system, denoise, options)
    for rounds in (6, whole.report.rounds - 3):
        sketch = solve(system, denoise, replace(options, max_rounds=rounds))
        done = solve(system, denoise, options, warm=sketch.trajectory)
        assert "continued behind" in (done.report.warm or "")
        assert (fidelity(done.x, whole.x, 2.0).psnr_db or 0.0) > 50


@pytest.mark.parametrize("breaks", [(), (20,)], ids=["where nothing was", "as before"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_sketch_of_another_late_prompt_is_found_out(window: int, breaks: tuple[int, ...]) -> None:
    """The sketch reaches behind the change, which the same start hides."""
    task, at = make_task(Setting("demo", "ddim", "normal", 50, 4.0), 0), 20
    first, second = (model.denoiser(model.load(), "large red ring", cfg=cfg) for cfg in (4.0, 7.0))
    level = float(task.system.sigmas[at])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([(second if s <= level else first)(x[i : i + 1], s[None]) for i, s in enumerate(sigma)])

    options = Options("collocation", window=window, target_db=42.0, data_rms=task.data_rms, peak=2.0)
    sketch = solve(replace(task.system, breaks=breaks), first, replace(options, max_rounds=19 if window == 1 else 10))
    assert sketch.trajectory is not None and sketch.trajectory.part is not None
    assert sketch.trajectory.part.rows[-1] > at
    system = replace(task.system, breaks=(at,))
    done = solve(system, denoise, options, warm=sketch.trajectory)
    told = str(done.report.warm)
    assert ("do not hold here" if breaks else "it is of another run") in told
    reference = solve(system, denoise, Options("sequential")).x
    assert (fidelity(done.x, reference, 2.0).psnr_db or 0.0) > 40


def test_other_solvers_do_not_mind(seed: int = 3) -> None:
    options = Options("quasi-newton", preset="strict", window=8)
    assert torch.equal(changed(seed, True, options)[1].x, changed(seed, False, options)[1].x)
