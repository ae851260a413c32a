"""A graph in which a number was changed, as artists do all day: it begins with what was measured before the change."""

from __future__ import annotations

from dataclasses import replace

import comfy.controlnet
import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.host import fitting, guards, latency
from paratafusion_pack.nodes.host.guards import Parts, parts_of
from paratafusion_pack.nodes.host.latency import Known
from paratafusion_pack.nodes.host.probing import PROBED
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from test_mixed import control_net, unet_conds
from test_plan import Guider
from tiny import conditioning, latent, load, sample, sigmas_of

WEIGHT = "diffusion_model.joint_blocks.0.x_block.attn.proj.weight"


def run(model, steps=20, settings=Settings(), **conds):
    outcome = Outcome()
    inner = parallel(comfy.samplers.sampler_object("euler"), settings, outcome)
    given = conds or {"positive": conditioning(1), "negative": conditioning(2)}
    sample(model, inner, sigmas_of(model, "euler", steps), latent_image=latent(model), **given)
    return outcome.report


def with_room(pictures):
    return 0.1


def full(pictures):
    return 0.1 * pictures


def with_lora(model, strength, names=(WEIGHT,)):
    """As a LoRA loader leaves it."""
    clone = model.clone()
    shapes = {name: model.model.state_dict()[name].shape for name in names}
    clone.add_patches({name: ("diff", (torch.ones(shape) * 1e-3,)) for name, shape in shapes.items()}, strength)
    return clone


def with_patch(model, scale, mixing=0.0):
    """As a node with a number leaves it: a function made anew."""
    clone = model.clone()

    def rescaled(args):
        D = args["denoised"]
        return D * scale - mixing * D.mean(0, keepdim=True)

    clone.set_model_sampler_post_cfg_function(rescaled)
    return clone


def test_another_strength_of_a_lora_is_planned_at_once(flow_model, fresh, machine):
    machine(flow_model, with_room)
    assert run(with_lora(flow_model, 0.5)).solver == "sequential"
    for strength in (0.6, 0.7, 0.8):
        report = run(with_lora(flow_model, strength))
        assert report.solver == "quasi-newton" and report.rounds < 0.8 * 20 and report.probe_nfe == 0
    assert len(fresh) == 4


def test_other_patched_weights_are_measured_anew(flow_model, fresh, machine):
    other = WEIGHT.replace("blocks.0", "blocks.1")
    machine(flow_model, with_room)
    run(with_lora(flow_model, 0.5))
    assert run(flow_model).solver == "sequential"
    assert run(with_lora(flow_model, 0.5, (WEIGHT, other))).solver == "sequential"
    assert run(with_lora(with_lora(flow_model, 0.5), 0.2)).solver == "sequential"


def test_a_patch_with_another_number_is_probed_again(flow_model, fresh, machine):
    machine(flow_model, with_room)
    run(with_patch(flow_model, 1.0), 50)
    report = run(with_patch(flow_model, 0.99), 50)
    assert report.solver == "quasi-newton" and report.probe_nfe == PROBED
    assert "influence each other" in run(with_patch(flow_model, 1.0, mixing=0.2), 50).fallback


def test_trouble_is_found_again_with_another_number(flow_model, fresh, machine):
    """A number may be what mixed the pictures."""
    machine(flow_model, with_room)
    settings = Settings(window=4)
    assert "influence each other" in run(with_patch(flow_model, 1.0, mixing=0.2), settings=settings).fallback
    assert run(with_patch(flow_model, 1.0), settings=settings).fallback is None


def test_what_was_probed_holds_for_other_weights(flow_model, fresh, monkeypatch):
    settings = Settings(window=4)
    model = with_patch(flow_model, 1.0)
    found = [run(with_lora(model, strength), settings=settings).probe_nfe for strength in (0.5, 0.6)]
    assert found == [PROBED, 0]
    mixed = with_patch(flow_model, 1.0, mixing=0.2)
    assert "influence each other" in run(with_lora(mixed, 0.5), settings=settings).fallback
    monkeypatch.setattr(fitting, "probe", lambda *_: pytest.fail("probed again"))
    assert "influence each other" in run(with_lora(mixed, 0.6), settings=settings).fallback


def test_the_probe_counts_before_a_short_run_is_parallel(flow_model, fresh, machine):
    """Its calls would take a quarter of 20 evaluations, and of 50 a tenth."""
    machine(flow_model, lambda pictures: 0.1 + 0.01 * pictures)
    run(with_patch(flow_model, 1.0))
    costly = run(with_patch(flow_model, 0.99))
    assert costly.solver == "sequential" and costly.fallback is None
    assert run(with_patch(flow_model, 0.99), 50).solver == "quasi-newton"


def test_a_new_schedule_is_charged_for_its_probe(flow_model, fresh, machine):
    """What was found of one schedule's levels says nothing of another's."""
    machine(flow_model, lambda pictures: 0.1 + 0.01 * pictures)
    model = with_patch(flow_model, 1.0)
    found = [run(model, steps) for steps in (50, 50, 50, 20, 21)]
    assert [report.solver for report in found[1:]] == ["quasi-newton"] * 2 + ["sequential"] * 2
    assert [report.probe_nfe for report in found[1:3]] == [PROBED, 0]


def test_a_probe_that_met_nan_has_passed_nothing(flow_model, fresh):
    run(with_patch(flow_model, torch.nan), settings=Settings(window=4))
    (entry,) = fresh._known.values()
    assert entry.passed == [] and entry.apart == []
    run(with_patch(flow_model, 1.0), settings=Settings(window=4))
    assert len(list(fresh._known.values())[-1].passed) == 1


def test_collocation_is_charged_for_the_probe_too(flow_model, fresh, machine):
    """On a full machine fourteen rows more are no gain."""
    machine(flow_model, full)
    settings = Settings(preset="sketch")
    for scale in (1.0, 0.99, 0.98):
        report = run(with_patch(flow_model, scale), settings=settings)
    assert report.solver == "sequential" and report.probe_nfe == 0


def test_numbers_measured_after_the_change_soon_count(flow_model, fresh, machine):
    """A patch may take more time with another number."""
    machine(flow_model, with_room)
    run(with_lora(flow_model, 0.5))
    assert run(with_lora(flow_model, 0.6)).solver == "quasi-newton"
    machine(flow_model, full)
    found = [run(with_lora(flow_model, 0.6)).solver for _ in range(4)]
    assert found[-1] == "sequential"


@pytest.fixture(scope="module")
def unet():
    return load("sd15")


def test_copies_of_a_control_net_are_one(unet, fresh):
    """Every new prompt, strength or picture makes a copy of it."""
    net = control_net(unet, 1)
    found = []
    for strength in (0.8, 0.5):
        copied = net.copy().set_cond_hint(torch.rand(1, 3, 64, 64), strength, (0.2, 0.7))
        conds = {
            name: [[cross, {**more, "control": copied, "control_apply_to_uncond": False}] for cross, more in cond]
            for name, cond in unet_conds().items()
        }
        found.append(run(unet, settings=Settings(window=4), **conds).probe_nfe)
    assert found == [PROBED, 0] and len(fresh) == 1


def test_a_patch_that_lies_where_one_was_that_is_gone_begins_with_its_times(flow_model, fresh):
    """And with nothing else: whether it keeps rows apart was found of the other."""
    x = torch.zeros(1, 16, 8, 8)
    living = Parts((1,), (lambda: True,), ("patch",))
    before = fresh.of(Guider(flow_model), x, replace(living, alive=(lambda: None,)))
    before.calls, before.apart, before.trouble = {1: [0.1] * 3, 2: [0.1] * 3}, [(1.0, 0.5)], "it mixes"
    after = fresh.of(Guider(flow_model), x, living)
    assert after.seconds == {1: 0.1, 2: 0.1} and after.apart == [] and after.trouble is None
    assert fresh.of(Guider(flow_model), x, living) is after


def test_runs_after_a_change_leave_what_was_known_before_it(flow_model, fresh, machine):
    machine(flow_model, with_room)
    first = with_lora(flow_model, 0.5)
    run(first)
    (before,) = fresh._known.values()
    told = repr(before)
    for _ in range(3):
        run(with_lora(flow_model, 0.6))
    assert repr(before) == told


def test_few_of_the_old_times_are_kept_so_that_new_ones_soon_count(flow_model, fresh):
    known = Known(lambda: None, None, Parts((1,), ()), calls={1: [0.1] * 9, 2: [0.2]}, steps=[0.1] * 5, single=True)
    after = known.after_a_nudge(Parts((2,), ()))
    assert after.calls == {1: [0.1] * 2, 2: [0.2]} and after.steps == [0.1] and not after.single
    assert known.after_a_nudge(known.parts).single


def test_the_kind_of_a_graph(flow_model, unet):
    """The same but for numbers is of one kind; another number, kind or wrapper of patches is another."""

    def kinds(model):
        return latency._weights_of(model)

    assert kinds(with_lora(flow_model, 0.5)) == kinds(with_lora(flow_model, 0.6)) != kinds(flow_model)
    assert kinds(with_lora(with_lora(flow_model, 0.5), 0.5)) != kinds(with_lora(flow_model, 0.5))
    listed = flow_model.clone()
    listed.add_patches({WEIGHT: [torch.zeros(1)]}, 0.5)
    assert kinds(listed) != kinds(with_lora(flow_model, 0.5))
    wrapped = flow_model.clone()
    wrapped.add_weight_wrapper(WEIGHT, lambda weight: weight)
    assert kinds(wrapped) != kinds(flow_model)


class Seen:
    """What the pack sees of a run with these conds."""

    def __init__(self, model, *conds):
        self.inner_model = self
        self.model_patcher, self.conds, self.model_options, self.cfg = model, {"positive": list(conds)}, {}, 4.0


def test_a_graph_is_told_by_its_control_nets_and_ranges(unet):
    net = control_net(unet, 1)

    def copied(strength=0.8, after=None, span=(9.0, 1.0)):
        made = net.copy().set_cond_hint(torch.rand(1, 3, 64, 64), strength, (0.2, 0.7))
        made.timestep_range = span
        if after is not None:
            made.set_previous_controlnet(after)
        return made

    def parts(control, **bounds):
        return parts_of(Seen(unet, {"model_conds": {}, "control": control, **bounds}), {})

    one, again, two = parts(copied()), parts(copied(0.5)), parts(copied(after=copied()))
    assert one.key == again.key and one.kind == again.kind
    assert two.key != one.key and two.kind != one.kind
    short = parts(copied(span=(9.0, 8.0)))
    assert short.key != one.key and short.kind == one.kind
    assert parts(copied(), timestep_start=5.0).kind != one.kind

    class Other(type(net)):
        """Of another pack: what its copies share is not known."""

    def of_other():
        made = copied()
        made.__class__ = Other
        return made

    assert parts(of_other()).key != parts(of_other()).key


def test_t2i_adapters_are_their_networks_and_control_loras_themselves(unet):
    network = torch.nn.Linear(1, 1)
    adapters = [comfy.controlnet.T2IAdapter(network, 3, 8, "area", device=torch.device("cpu")) for _ in range(2)]
    assert guards._network_of(adapters[0]) is guards._network_of(adapters[1]) is network
    lora = comfy.controlnet.ControlLora({})
    lora.control_model = network  # made anew in every run
    assert guards._network_of(lora) is lora
