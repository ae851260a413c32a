"""The automatic plan in the host: what is remembered of a model, the plain sampler, memory, and cancelling."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.host import fitting, latency
from paratafusion_pack.nodes.host.guards import Parts
from paratafusion_pack.nodes.host.latency import Known, Latencies
from paratafusion_pack.nodes.host.probing import PROBED
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.paratafusion_core import Report
from paratafusion_pack.paratafusion_core.plan import Machine
from tiny import as_prediction, conditioning, latent, load, relative, sample, sigmas_of

STEPS = 20
#: Of a model without patches.
PLAIN = Parts((), ())


class Guider:
    """What a cache sees of a guider."""

    def __init__(self, model, cfg=4.0):
        self.model_patcher, self.cfg, self.conds = model, cfg, {"positive": [{"model_conds": {}}]}


def run(model, settings=Settings(), name="euler", want_trajectory=False, **asked):
    outcome = Outcome(want_trajectory)
    inner = comfy.samplers.sampler_object(name)
    given = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model), **asked}
    result = sample(model, parallel(inner, settings, outcome), sigmas_of(model, name, STEPS), **given)
    return result, outcome.report, outcome


def known(cache, model, seconds):
    """Make ``cache`` believe ``seconds`` of every run seen so far."""
    assert len(cache) > 0
    for entry in cache._known.values():
        entry.calls, entry.beside = {rows: [spent] * 2 for rows, spent in seconds.items()}, 0.0


def test_a_run_measures_and_the_next_one_knows(flow_model, fresh):
    _, first, _ = run(flow_model)
    assert first.fallback is None and first.plan is not None
    assert {1, 2} <= set(first.rows_per_round)
    (entry,) = fresh._known.values()
    assert {1, 2} <= set(entry.calls) and all(s > 0 for calls in entry.calls.values() for s in calls)


def test_a_size_is_known_by_its_second_call(flow_model, fresh):
    """Its first one may have been late: the next run measures it again."""
    run(flow_model)
    (entry,) = fresh._known.values()
    entry.calls = {1: [0.01] * 19, 2: [5.0]}
    assert entry.seconds == {1: 0.01}
    entry.calls = {1: [0.01], 3: [0.03] * 2, 4: [0.031] * 2}  # neighbours tell nothing of one row
    assert entry.seconds == {}
    entry.calls = {1: [0.01] * 19, 2: [5.0]}
    _, report, _ = run(flow_model)
    assert report.window_per_round[0] == 2 and 2 in entry.seconds


def test_runs_of_the_hosts_own_sampler_tell_its_time(flow_model, fresh):
    """What a round costs beside the model is the difference."""
    run(flow_model)
    known(fresh, flow_model, {1: 1.0, 2: 2.0, 4: 4.0})
    (entry,) = fresh._known.values()
    assert entry.engine == 0.0
    run(flow_model)
    assert len(entry.steps) == 1 and 0 < entry.steps[0] < 0.5
    assert not entry.calls  # what was believed of rounds is of another machine than that
    entry.calls = {1: [1.1 * entry.steps[0]] * 2, 2: [2.2 * entry.steps[0]] * 2}
    assert entry.engine == pytest.approx(0.1 * entry.steps[0])
    run(flow_model, name="heun")  # how many evaluations that makes is not known yet
    assert len(entry.steps) == 1


def test_a_machine_that_is_no_longer_busy_is_measured_anew(flow_model, fresh):
    run(flow_model)
    (entry,) = fresh._known.values()
    entry.calls, entry.beside, entry.steps = {1: [2.0] * 3, 2: [4.0] * 3}, 0.1, [1.9]
    entry.learn_plain("euler", STEPS, 1.8 * STEPS)
    assert entry.calls and entry.steps == [1.9, 1.8]
    entry.learn_plain("euler", STEPS, 0.5 * STEPS)
    assert not entry.calls and entry.steps == [0.5] and entry.seconds == {}


def test_a_sampler_of_two_evaluations_a_step_is_timed_by_evaluation(flow_model, fresh):
    run(flow_model, name="heun")
    known(fresh, flow_model, {1: 1.0, 2: 2.0, 4: 4.0})
    (entry,) = fresh._known.values()
    assert entry.evaluations == {"heun": (2 * STEPS - 1) / STEPS}
    _, report, _ = run(flow_model, name="heun")
    assert "predicted 39 s" in report.plan


def test_the_plain_sampler_runs_itself_where_nothing_wins(flow_model, fresh):
    run(flow_model)
    known(fresh, flow_model, {1: 1.0, 2: 2.0, 4: 4.0})
    result, report, _ = run(flow_model)
    inner = comfy.samplers.sampler_object("euler")
    theirs = sample(flow_model, inner, sigmas_of(flow_model, "euler", STEPS), positive=conditioning(1),
                    negative=conditioning(2), latent_image=latent(flow_model))  # fmt: skip
    assert torch.equal(result, theirs)
    assert report.solver == "sequential" and report.fallback is None
    assert "plain sampler" in report.plan and "took" in report.plan


def test_a_trajectory_is_kept_even_where_nothing_wins(flow_model, fresh, monkeypatch):
    """On a machine whose clock the network alone moves, a second a row of two conds."""
    network, now = flow_model.model.diffusion_model, [0.0]
    forward = network.forward

    def ticking(x, *args, **kwargs):
        now[0] += x.shape[0] / 2
        return forward(x, *args, **kwargs)

    full = Machine({1: 1.0, 2: 2.0, 4: 4.0}, clock=lambda: now[0])
    monkeypatch.setattr(network, "forward", ticking)
    monkeypatch.setattr(Known, "machine", lambda self, most=None: full)
    _, report, outcome = run(flow_model, want_trajectory=True)
    assert outcome.trajectory is not None and len(outcome.trajectory.D) == STEPS
    assert report.rounds == STEPS and report.plan.startswith("plain sampler")


def test_a_machine_with_room_gets_a_window(flow_model, fresh):
    run(flow_model)
    known(fresh, flow_model, {1: 9.0, 2: 10.0, 4: 12.0, 8: 16.0})
    reference, _, _ = run(flow_model, Settings(solver="sequential"))
    result, report, _ = run(flow_model)
    # how long the window stays is this machine's matter: real rounds soon contradict these latencies
    assert report.window_per_round[0] > 1
    assert relative(result, reference) < 0.05
    assert report.predicted_seconds > 0


def test_a_machine_whose_first_calls_are_late_gets_a_window(flow_model, fresh, monkeypatch):
    """As a GPU with room: a call takes 0.15 s whatever its batch, and the first one of each size 0.8 s.

    The network alone moves the clock, so that nothing else on this machine counts.
    """
    network, sizes, now = flow_model.model.diffusion_model, set(), [0.0]
    forward, machine = network.forward, Known.machine

    def late(x, *args, **kwargs):
        now[0] += 0.15 if x.shape[0] in sizes else 0.8
        sizes.add(x.shape[0])
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(network, "forward", late)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Known, "machine", lambda self, most=None: replace(machine(self, most), clock=lambda: now[0]))
    reports = [run(flow_model)[1] for _ in range(3)]
    assert reports[1].window_per_round  # not the host's own sampler, whatever the first run had measured
    assert max(reports[2].window_per_round) >= 4 and reports[2].rounds < 0.8 * STEPS


def test_a_window_or_rounds_of_ones_own_leave_nothing_to_plan(flow_model, fresh):
    _, report, _ = run(flow_model, Settings(window=4))
    assert report.solver == "quasi-newton" and report.window_per_round[0] == 4
    _, report, _ = run(flow_model, Settings(max_rounds=3))
    assert report.rounds == 3 and report.status == "max_rounds"


def test_memory_bounds_the_window(flow_model, fresh, monkeypatch):
    run(flow_model)
    known(fresh, flow_model, {1: 9.0, 2: 10.0, 4: 12.0, 8: 16.0})
    base = flow_model.model
    monkeypatch.setattr(
        type(base), "memory_required", lambda self, shape, cond_shapes=None: float(shape[0]), raising=True
    )
    monkeypatch.setattr(type(flow_model), "get_free_memory", lambda self, device: 10.0, raising=False)
    _, report, _ = run(flow_model)  # two conds a row: three rows are 6 of them, times 1.5
    assert max(report.rows_per_round) <= 3


def test_cancelling_a_measured_run(flow_model, fresh):
    def cancel(*_):
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(flow_model, callback=cancel)
    _, report, _ = run(flow_model)
    assert report.fallback is None


def report_of(seconds):
    report = Report("euler", 2, "quasi-newton", "balanced", 3e-3, 2)
    report.rounds, report.nfe, report.rows_per_round = 4, 6, [1, 1, 2, 2]
    report.seconds_per_round = [s for s in seconds for _ in (1, 2)]
    return report


def test_what_is_remembered_is_of_one_model_shape_and_residency(flow_model, monkeypatch):
    cache = Latencies()
    x = torch.zeros(1, 16, 8, 8)
    entry = cache.of(Guider(flow_model), x, PLAIN)
    entry.learn(report_of([1.0, 1.5]))
    assert entry.seconds == {1: 1.0, 2: 1.5}
    assert cache.of(Guider(flow_model), x, PLAIN) is entry
    assert cache.of(Guider(flow_model.clone()), x, PLAIN).seconds == entry.seconds  # a clone is the same model
    assert not cache.of(Guider(as_prediction(flow_model, "eps")), x[:, :, :4], PLAIN).seconds
    assert not cache.of(Guider(flow_model), x.repeat(2, 1, 1, 1), PLAIN).seconds
    assert not cache.of(Guider(flow_model), x.half(), PLAIN).seconds
    assert not cache.of(Guider(flow_model, 1.0), x, PLAIN).seconds
    monkeypatch.setattr(latency, "residency_of", lambda patcher: "elsewhere")
    assert not cache.of(Guider(flow_model), x, PLAIN).seconds


def slowed(model, seconds=0.0):
    """``model`` behind a wrapper of its calls, as packs put one there, that takes time of its own."""
    clone = model.clone()

    def wrapper(apply_model, args):
        time.sleep(seconds)
        return apply_model(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def test_what_is_remembered_is_of_the_wrappers_around_the_model(flow_model, fresh):
    wrapped = slowed(flow_model)
    for model, kinds in ((flow_model, 1), (wrapped, 2), (flow_model, 2), (wrapped, 2), (slowed(flow_model), 3)):
        run(model, Settings(window=4))
        assert len(fresh) == kinds


def test_a_wrapper_that_is_gone_is_not_taken_for_another(flow_model):
    """Another function may come to lie where it was."""
    cache, x = Latencies(), torch.zeros(1, 16, 8, 8)
    wrapper = slowed(flow_model).model_options["model_function_wrapper"]
    parts = Parts((id(wrapper),), (weakref.ref(wrapper),))
    cache.of(Guider(flow_model), x, parts).learn(report_of([1.0, 1.5]))
    assert cache.of(Guider(flow_model), x, parts).seconds
    del wrapper
    gc.collect()
    assert not cache.of(Guider(flow_model), x, replace(parts, alive=(lambda: parts,))).seconds


def test_a_patched_model_is_probed_once(flow_model, fresh):
    model = slowed(flow_model)
    settings = Settings(window=4)
    assert [run(model, settings)[1].probe_nfe for _ in range(2)] == [PROBED, 0]
    assert run(slowed(flow_model), settings)[1].probe_nfe == PROBED


@pytest.mark.parametrize("first", [slice(0, 11), slice(10, None)])
def test_a_part_of_the_schedule_vouches_for_no_other(flow_model, fresh, first):
    """A patch may act on a part of it only."""
    model = flow_model.clone()

    def mixing(args):
        acts = args["sigma"].reshape(-1, 1, 1, 1) < 0.5
        return torch.where(acts, args["denoised"] - 0.2 * args["denoised"].mean(0, keepdim=True), args["denoised"])

    model.set_model_sampler_post_cfg_function(mixing)
    sigmas, inner, found = sigmas_of(model, "euler", STEPS), comfy.samplers.sampler_object("euler"), []
    given = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model)}
    for part in (first, slice(0, 11), slice(10, None), first):
        outcome = Outcome()
        sample(model, parallel(inner, Settings(window=4), outcome), sigmas[part], **given)
        found.append((part == slice(0, 11), outcome.report.fallback))
    assert any(fallback is not None for early, fallback in found if not early)
    assert all(fallback is not None for early, fallback in found[1:] if not early)


def test_a_probe_that_met_nan_vouches_for_nothing(flow_model, fresh):
    broken = [True]
    model = flow_model.clone()

    def mixing(args):
        mixed = args["denoised"] - 0.2 * args["denoised"].mean(0, keepdim=True)
        return mixed * torch.nan if broken[0] else mixed

    model.set_model_sampler_post_cfg_function(mixing)
    assert "NaN" in run(model, Settings(window=4))[1].fallback
    broken[0] = False
    assert "influence each other" in run(model, Settings(window=4))[1].fallback


def test_a_patch_that_cannot_be_watched_is_neither_kept_nor_taken_for_another(flow_model, fresh):
    class Slotted:
        __slots__ = ("payload",)

        def __call__(self, args):
            return args["denoised"]

    class Payload:
        pass

    model, patch = flow_model.clone(), Slotted()
    patch.payload = Payload()
    kept = weakref.ref(patch.payload)
    model.set_model_sampler_post_cfg_function(patch)
    assert [run(model, Settings(window=4))[1].probe_nfe for _ in range(2)] == [PROBED, PROBED]
    del model, patch
    gc.collect()
    assert kept() is None


def test_what_the_probe_has_found_is_remembered(flow_model, fresh, monkeypatch):
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(lambda a: a["denoised"] - 0.2 * a["denoised"].mean(0, keepdim=True))
    found = run(model, Settings(window=4))[1].fallback
    monkeypatch.setattr(fitting, "probe", lambda *_: pytest.fail("probed again"))
    assert found is not None and run(model, Settings(window=4))[1].fallback == found


def test_the_cache_is_bounded_and_keeps_no_model_alive():
    cache = Latencies(entries=2)
    model = load("sd3")
    for size in (1, 2, 3):
        cache.of(Guider(model), torch.zeros(size, 16, 8, 8), PLAIN).learn(report_of([1.0, 1.5]))
    assert len(cache) == 2
    entry = cache.of(Guider(model), torch.zeros(3, 16, 8, 8), PLAIN)
    assert entry.seconds
    del model
    gc.collect()
    assert entry.model() is None


@pytest.mark.parametrize(("solver", "window"), [("auto", None), ("auto", 8), ("collocation", None)])
def test_a_target_holds_where_collocation_cannot_serve(solver, window):
    asked = Settings(solver=solver, preset="fast", window=window, target_db=66.0)
    options = asked.options(False, 1.0, refusal="it cannot")
    assert options.target is None and options.tolerance == pytest.approx(9.5e-4, rel=0.01)
    assert replace(asked, target_db=42.0).options(False, 1.0, refusal="it cannot").tol is None
    assert replace(asked, tol=0.02).options(False, 1.0, refusal="it cannot").tolerance == 0.02


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "picard"])
def test_solvers_asked_for_by_name_ignore_a_target(solver):
    asked = Settings(solver=solver, target_db=66.0)
    assert asked.options(False, 1.0) == replace(asked, target_db=None).options(False, 1.0)
