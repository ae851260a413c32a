"""The host's own sampler as the plan: on a machine that nothing is known of it is timed, and left where that pays."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.host import sampler
from paratafusion_pack.nodes.host.capture import CaptureError
from paratafusion_pack.nodes.host.choice import NothingWins, plain_if_best
from paratafusion_pack.nodes.host.latency import Known
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.paratafusion_core import Report
from tiny import conditioning, latent, relative, sample, sigmas_of

DEFAULTS = Settings()


def given(model):
    return {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model)}


def run(model, steps, name="euler", settings=DEFAULTS):
    outcome = Outcome()
    inner = parallel(comfy.samplers.sampler_object(name), settings, outcome)
    return sample(model, inner, sigmas_of(model, name, steps), **given(model)), outcome.report


def theirs(model, steps, name="euler"):
    return sample(model, comfy.samplers.sampler_object(name), sigmas_of(model, name, steps), **given(model))


def full(pictures):
    return 0.1 * pictures


def with_room(pictures):
    return 0.1


def mixing(model):
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(lambda a: a["denoised"] - 0.2 * a["denoised"].mean(0, keepdim=True))
    return clone


def test_a_first_run_is_timed_and_not_read_off(flow_model, fresh, machine, monkeypatch):
    machine(flow_model, full)
    monkeypatch.setattr(sampler, "capture", lambda *_: pytest.fail("captured"))
    result, report = run(flow_model, 20)
    assert relative(result, theirs(flow_model, 20)) < 1e-5
    assert report.solver == "sequential" and report.fallback is None
    assert report.nfe == sum(report.rows_per_round) == 21 and report.rounds == report.sequential_nfe == 20
    assert "measured for the next run (1 row 0.2 s, 2 rows 0.4 s)" in report.plan
    result, report = run(flow_model, 20)  # the size's second call
    assert report.rows_per_round[0] == 2 and report.nfe == 21
    result, report = run(flow_model, 20)
    assert torch.equal(result, theirs(flow_model, 20))
    assert report.nfe == 20 and "nothing is predicted to be faster: predicted 4 s" in report.plan


def test_calls_that_are_late_at_first_are_outvoted(flow_model, fresh, machine):
    """The first two for one row take as long as two rows, which looks like a machine with room."""
    cold = [0.0, 0.1, 0.1]
    machine(flow_model, lambda pictures: 0.05 * pictures + (cold.pop() if cold else 0.0))
    run(flow_model, 20)
    (entry,) = fresh._known.values()
    assert sum(map(len, entry.calls.values())) == 9 and entry.seconds == {1: pytest.approx(0.1)}
    run(flow_model, 20)
    assert run(flow_model, 20)[1].solver == "sequential"


def test_a_short_run_is_not_left_and_the_next_one_is_parallel(flow_model, fresh, machine):
    """Where two rows cost no more than one they are looked at twice at once."""
    machine(flow_model, with_room)
    _, report = run(flow_model, 20)
    assert report.solver == "sequential" and report.rows_per_round[:7] == [1, 1, 1, 1, 2, 2, 1]
    _, report = run(flow_model, 20)
    assert report.solver == "quasi-newton" and report.rounds < 0.8 * 20 and report.probe_nfe == 0


@pytest.mark.parametrize("name", ["euler", "heun", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_long_run_leaves_it_on_a_machine_with_room(flow_model, fresh, machine, name):
    machine(flow_model, with_room)
    torch.manual_seed(3)
    result, report = run(flow_model, 50, name)
    assert report.solver == "quasi-newton" and max(report.window_per_round) > 1
    assert report.rounds < 0.8 * report.sequential_nfe
    assert report.probe_nfe == 8  # four calls for one row, two for two
    torch.manual_seed(3)
    assert relative(result, theirs(flow_model, 50, name)) < 0.05


def test_the_timed_run_is_left_without_a_trace(flow_model, fresh, machine):
    """The parallel one is what it is on a machine that is known."""
    machine(flow_model, with_room)
    first, _ = run(flow_model, 50, "euler_ancestral_cfg_pp")
    (entry,) = fresh._known.values()
    entry.calls, entry.steps = {1: [0.1] * 2, 2: [0.1] * 2}, []
    second, report = run(flow_model, 50, "euler_ancestral_cfg_pp")
    assert report.solver == "quasi-newton" and report.probe_nfe == 0
    assert torch.equal(first, second)


def careless(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler with noise from torch's own generator, which writes into everything that it is given."""
    sigmas[:-1] *= 1.01
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(x.shape[0]), **extra_args)
        x += (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        x += 0.02 * sigmas[i + 1] * torch.randn_like(x)
        extra_args["seed"] = i
    return x


def test_a_left_run_gives_back_what_it_wrote_into(flow_model, fresh, machine):
    machine(flow_model, with_room)
    found = []
    for settings in (DEFAULTS, Settings(solver="sequential")):
        outcome, sigmas = Outcome(), sigmas_of(flow_model, "euler", 50)
        inner = comfy.samplers.KSAMPLER(careless)
        torch.manual_seed(5)
        result = sample(flow_model, parallel(inner, settings, outcome), sigmas, **given(flow_model))
        found.append((result, outcome.report, sigmas))
    (ours, report, levels), (plain, _, written) = found
    assert report.solver == "quasi-newton" and report.probe_nfe == 8
    assert relative(ours, plain) < 0.01 and torch.equal(levels, written)


def test_what_the_look_has_cost_counts_before_a_run_is_left(flow_model, fresh, machine):
    """Window 2 is predicted to take 0.80 of the plain sampler's time, 0.92 with the rows that were looked at."""
    machine(flow_model, lambda pictures: 0.1 if pictures == 2 else 0.145)
    _, report = run(flow_model, 50)
    assert report.solver == "sequential"
    _, report = run(flow_model, 50)
    assert report.solver == "quasi-newton"


def test_two_rows_that_are_late_are_looked_at_again(flow_model, fresh, machine):
    late = [2.0]
    machine(flow_model, lambda pictures: 0.05 * pictures + (late.pop() if pictures == 4 and late else 0.0))
    _, report = run(flow_model, 20)
    assert report.rows_per_round[:7] == [1, 1, 1, 1, 2, 2, 1]
    (entry,) = fresh._known.values()
    assert entry.seconds == {1: pytest.approx(0.1), 2: pytest.approx(0.2)}


def test_a_sampler_that_cannot_be_read_off_goes_on_as_it_is(flow_model, fresh, machine):
    machine(flow_model, with_room)
    result, report = run(flow_model, 50, "dpm_adaptive")
    assert report.fallback.startswith("dpm_adaptive chooses its steps") and report.probe_nfe == 0
    assert torch.equal(result, theirs(flow_model, 50, "dpm_adaptive"))


def test_a_patch_that_may_mix_rows_is_timed_when_the_run_is_over_and_probed_in_the_next(flow_model, fresh, machine):
    machine(flow_model, with_room)
    model = mixing(flow_model)
    result, report = run(model, 50)
    assert torch.equal(result, theirs(model, 50))
    assert report.solver == "sequential" and report.probe_nfe == 4 and report.seconds > 0.1 * (50 + 2) - 1e-6
    result, report = run(model, 50)
    assert "influence each other" in report.fallback and torch.equal(result, theirs(model, 50))


def test_rows_that_were_looked_at_are_told_where_the_parallel_run_fails(flow_model, fresh, machine, monkeypatch):
    machine(flow_model, with_room)

    def refused(*_):
        raise CaptureError("it is a Tuesday")

    monkeypatch.setattr(sampler, "capture", refused)
    result, report = run(flow_model, 50)
    assert "it is a Tuesday" in report.fallback and report.probe_nfe == 8
    assert torch.equal(result, theirs(flow_model, 50))
    assert report.seconds > 0.1 * (50 + 6) - 1e-6


def every_second_call(model):
    """A step cache that the pack does not know: it answers each second call of a run from the one before."""
    clone, kept = model.clone(), {}

    def cached(apply_model, args):
        first = args["c"]["transformer_options"]["sample_sigmas"][0]
        kept["n"] = 0 if torch.isclose(args["timestep"][0], first) else kept["n"] + 1
        if kept["n"] % 2 == 0:
            kept["D"] = apply_model(args["input"], args["timestep"], **args["c"])
        return kept["D"]

    clone.set_model_unet_function_wrapper(cached)
    return clone


def with_momentum(model):
    clone, kept = model.clone(), {}

    def guided(args):
        g = args["cond_denoised"] - args["uncond_denoised"]
        old = kept.get("g")
        begins = old is None or old.shape != g.shape or float(args["sigma"][0]) >= 0.999
        kept["g"] = g if begins else g + 0.6 * old
        return args["denoised"] + 0.5 * kept["g"]

    clone.set_model_sampler_post_cfg_function(guided)
    return clone


@pytest.mark.parametrize("patch", [every_second_call, with_momentum])
@pytest.mark.parametrize("steps", [20, 50])
def test_what_remembers_the_call_before_runs_as_it_is(flow_model, fresh, machine, patch, steps):
    machine(flow_model, with_room)
    reference = theirs(patch(flow_model), steps)
    model = patch(flow_model)
    for _ in range(3):
        result, _ = run(model, steps)
        assert torch.equal(result, reference)


def test_memory_that_is_short_for_any_pictures_while_two_rows_are_timed(flow_model, fresh, machine, monkeypatch):
    """The look's call does not fit in parts either; the sampler's own call after it does."""
    machine(flow_model, with_room)
    network, calls = flow_model.model.diffusion_model, []
    forward = network.forward

    def sometimes(x, *args, **kwargs):
        calls.append(None)
        if len(calls) in (5, 6):
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(network, "forward", sometimes)
    run(flow_model, 20)
    run(flow_model, 20)
    assert run(flow_model, 20)[1].solver == "quasi-newton"


def test_a_patch_that_refuses_two_rows_is_known_for_it_and_another_is_not(flow_model, fresh, machine):
    machine(flow_model, with_room)

    def patched(most):
        clone = flow_model.clone()

        def picky(args):
            if len(args["denoised"]) > most:
                raise RuntimeError("one picture at a time")
            return args["denoised"]

        clone.set_model_sampler_post_cfg_function(picky)
        return clone

    model = patched(1)
    run(model, 20)
    assert "one picture at a time" in run(model, 20)[1].plan
    other = patched(64)
    found = [run(other, 50)[1] for _ in range(3)]
    assert found[-1].solver == "quasi-newton"


def test_memory_that_was_short_once_is_tried_again(flow_model, fresh, machine, monkeypatch):
    machine(flow_model, with_room)
    network = flow_model.model.diffusion_model
    forward, short = network.forward, [True]

    def full_up(x, *args, **kwargs):
        if short and x.shape[0] > 2:  # two prompts
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(network, "forward", full_up)
    assert run(flow_model, 20)[1].solver == "sequential"
    short.clear()
    run(flow_model, 20)
    assert run(flow_model, 20)[1].solver == "quasi-newton"


def test_a_patch_that_draws_random_numbers_draws_what_it_would_have_drawn(flow_model, fresh, machine):
    machine(flow_model, full)
    model = flow_model.clone()
    model.set_model_sampler_post_cfg_function(lambda a: a["denoised"] + 0.01 * torch.randn_like(a["denoised"]))
    torch.manual_seed(6)
    result, report = run(model, 20)
    numbers = torch.get_rng_state()
    torch.manual_seed(6)
    assert report.probe_nfe == 2 and torch.equal(result, theirs(model, 20))
    assert torch.equal(numbers, torch.get_rng_state())


@pytest.mark.parametrize(("steps", "seconds"), [(20, full), (50, with_room)])
def test_nothing_of_a_run_waits_for_the_garbage_collector(flow_model, fresh, machine, monkeypatch, steps, seconds):
    machine(flow_model, seconds)
    guiders, make = [], comfy.samplers.KSamplerX0Inpaint.__init__

    def watched(self, model, sigmas):
        guiders.append(weakref.ref(self))
        make(self, model, sigmas)

    monkeypatch.setattr(comfy.samplers.KSamplerX0Inpaint, "__init__", watched)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            run(flow_model, steps)
        assert len(guiders) == 3 and all(guider() is None for guider in guiders)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["euler", "euler_cfg_pp"])
def test_timing_two_rows_does_not_touch_the_picture(flow_model, fresh, machine, name):
    """Neither where pictures influence each other nor where the sampler keeps something of every call."""
    machine(flow_model, full)
    model = mixing(flow_model) if name == "euler" else flow_model
    result, report = run(model, 20, name)
    assert torch.equal(result, theirs(model, 20, name))
    assert report.solver == "sequential" and report.nfe == 20 and report.probe_nfe == 2
    (entry,) = fresh._known.values()
    assert set(entry.calls) == {1, 2}


def test_a_model_that_refuses_two_rows_goes_on(flow_model, fresh, monkeypatch):
    network = flow_model.model.diffusion_model
    forward = network.forward

    def single(x, *args, **kwargs):
        if x.shape[0] > 2:  # two prompts
            raise RuntimeError("one picture at a time")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(network, "forward", single)
    result, report = run(flow_model, 20)
    assert torch.equal(result, theirs(flow_model, 20))
    assert report.fallback is None and report.nfe == 20 and "could not be timed" in report.plan
    _, report = run(flow_model, 20)
    assert "one picture at a time" in report.plan


def test_a_sampler_that_goes_around_the_wrapper_is_left_to_the_engine(flow_model, fresh):
    def around(model, x, sigmas, extra_args=None, callback=None, disable=None):
        call = model if type(model).__name__ == "_StandIn" else comfy.samplers.KSamplerX0Inpaint.__call__.__get__(model)
        for i in range(len(sigmas) - 1):
            denoised = call(x, sigmas[i] * x.new_ones(x.shape[0]), **extra_args)
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    plans = []
    for _ in range(2):
        outcome = Outcome()
        inner = parallel(comfy.samplers.KSAMPLER(around), DEFAULTS, outcome)
        sample(flow_model, inner, sigmas_of(flow_model, "euler", 20), **given(flow_model))
        plans.append(outcome.report)
    assert "could not be timed" in plans[0].plan and plans[0].nfe == 20
    assert {1, 2} <= set(plans[1].rows_per_round)


def test_evaluations_are_counted_and_not_steps(flow_model, fresh, machine):
    """Heun's 12 steps are 23 evaluations, which is known from the second run on."""
    machine(flow_model, full)
    assert "fewer than 20" in run(flow_model, 12, "heun")[1].plan
    assert "measured for the next run" in run(flow_model, 12, "heun")[1].plan


def test_a_short_run_is_not_timed(flow_model, fresh):
    result, report = run(flow_model, 19)
    assert torch.equal(result, theirs(flow_model, 19))
    assert report.nfe == 19 and "fewer than 20 evaluations" in report.plan
    (entry,) = fresh._known.values()
    assert not entry.calls


def known_of(calls):
    return Known(lambda: None, None, None, calls={rows: [seconds] * 2 for rows, seconds in calls.items()})


def report_of(*calls):
    report = Report("euler", 50, "quasi-newton", "balanced", 3e-3, 50)
    report.rows_per_round, report.seconds_per_round = [rows for rows, _ in calls], [seconds for _, seconds in calls]
    return report


def test_late_calls_do_not_speak_against_a_plan():
    """As the first ones at a size are, while kernels are loaded."""
    known = known_of({1: 1.0, 2: 1.2, 4: 1.3})
    plan = plain_if_best(known, "euler", 50, DEFAULTS)
    known.learn_outcome(plan, report_of((4, 21.3), (4, 1.3), (4, 1.5)), 44.0)
    assert known.outcomes[plan] == [pytest.approx(24.0)]


def test_a_plan_that_was_never_tried_must_promise_more():
    """Window 2 is predicted to take 0.89 of the plain sampler's time, then 0.80."""
    with pytest.raises(NothingWins, match="predicted to take"):
        plain_if_best(known_of({1: 1.0, 2: 1.65}), "euler", 50, DEFAULTS)
    near = known_of({1: 1.0, 2: 1.45})
    assert plain_if_best(near, "euler", 50, DEFAULTS) is not None


@pytest.mark.parametrize(("took", "pays"), [([60.0, 30.0], True), ([60.0, 49.0], False), ([60.0], True)])
def test_a_plan_is_judged_by_what_such_runs_took(took, pays):
    known = known_of({1: 1.0, 2: 1.2})
    plan = plain_if_best(known, "euler", 50, DEFAULTS)
    for seconds in took:
        known.learn_outcome(plan, report_of(), seconds)
    if pays:
        assert plain_if_best(known, "euler", 50, DEFAULTS) == plan
    else:
        with pytest.raises(NothingWins, match="known to take 49 s"):
            plain_if_best(known, "euler", 50, DEFAULTS)
    assert plain_if_best(known, "ddim", 50, DEFAULTS) not in (plan, None)  # of another sampler nothing is said
    known.calls[4] = [1.3] * 2  # nor of a wider window, once that is known
    assert plain_if_best(known, "euler", 50, DEFAULTS) not in (plan, None)


def test_outcomes_are_bounded_and_forgotten_with_the_machine():
    known = known_of({1: 1.0, 2: 1.2})
    for steps in range(40, 90):
        for _ in range(9):
            known.learn_outcome(plain_if_best(known, "euler", steps, DEFAULTS), report_of(), 1.0)
    assert len(known.outcomes) <= 16 and max(map(len, known.outcomes.values())) <= 4
    known.evaluations["euler"] = 1.0
    known.learn_plain("euler", 50, 500.0)
    assert not known.outcomes


def test_a_run_that_was_planned_leaves_its_outcome(flow_model, fresh, machine):
    machine(flow_model, with_room)
    run(flow_model, 50)
    (entry,) = fresh._known.values()
    before = sum(map(len, entry.outcomes.values()))
    _, report = run(flow_model, 50)
    assert sum(map(len, entry.outcomes.values())) == before + 1 == 2
    assert report.probe_nfe == 0 and report.predicted_seconds > 0
