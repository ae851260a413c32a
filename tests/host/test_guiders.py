"""Guiders beside the plain one, and strengths that guiders and patches read elsewhere than in what they are made of."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_perpneg
from paratafusion_pack.nodes.host import fitting, guards, sampling
from paratafusion_pack.nodes.host.guards import parts_of
from paratafusion_pack.nodes.host.probing import PROBED
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from test_mixed import control_net, unet_conds, with_values
from test_nudges import Seen, with_lora, with_room
from tiny import conditioning, latent, load, relative, sigmas_of
from torch import Tensor

YES, NO, OTHER = conditioning(1), conditioning(2), conditioning(5)
WINDOW = Settings(preset="strict", window=4)


def made(node: str, *given: Any) -> Any:
    """The guider that a node of the host makes."""
    kind = getattr(nodes_custom_sampler, node, None) or getattr(nodes_perpneg, node, None)
    if kind is None:
        pytest.skip(f"this version of the host has no {node}")
    return (kind.execute if hasattr(kind, "execute") else kind().get_guider)(*given)[0]


def draw(guider: Any, inner: Any, steps: int = 12, batch: int = 1, seed: int = 3) -> Tensor:
    model = guider.model_patcher
    empty = latent(model, batch)
    noise = comfy.sample.prepare_noise(empty, seed)
    return guider.sample(noise, empty, inner, sigmas_of(model, "euler", steps), disable_pbar=True, seed=seed)


def run(guider: Any, settings: Settings = WINDOW, **asked: Any) -> tuple[Tensor, Any]:
    outcome = Outcome()
    inner = parallel(comfy.samplers.sampler_object("euler"), settings, outcome)
    return draw(guider, inner, **asked), outcome.report


def plain(guider: Any, **asked: Any) -> Tensor:
    return draw(guider, comfy.samplers.sampler_object("euler"), **asked)


def guided(model: Any, cfg: float = 4.0, positive: Any = YES, kind: type = comfy.samplers.CFGGuider, **own: Any) -> Any:
    guider = kind(model)
    guider.set_conds(positive, NO)
    guider.set_cfg(cfg)
    vars(guider).update(own)
    return guider


@pytest.fixture
def probes(monkeypatch):
    """One entry for every probe."""
    made: list[int] = []
    own = fitting.probe
    monkeypatch.setattr(fitting, "probe", lambda *given: made.append(1) or own(*given))
    return made


class Stranger(nodes_perpneg.Guider_PerpNeg):
    """Of a pack that builds upon it."""


@pytest.mark.parametrize("kind", [nodes_perpneg.Guider_PerpNeg, Stranger])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_perp_neg_is_refused_before_any_probe(eps_model, fresh, probes, scale, kind):
    """Its coupling may be too weak to be seen in one call: at 0.1 the probe lets it pass, 4e-3 off."""

    def guider() -> Any:
        guider = made("PerpNegGuider", eps_model, YES, NO, OTHER, 4.0, scale)
        guider.__class__ = kind
        return guider

    result, report = run(guider())
    assert "projection" in report.fallback and not probes
    assert torch.equal(result, plain(guider()))


@pytest.fixture(scope="module")
def second():
    return load("sd3")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("which", ["basic", "regular", "nested", "two models"])
def test_other_guiders_of_the_host_keep_pictures_apart(flow_model, second, fresh, which, batch):
    def guider() -> Any:
        if which == "basic":
            return made("BasicGuider", flow_model, YES)
        if which == "two models":
            return made("DualModelGuider", flow_model, YES, 4.0, second, NO)
        return made("DualCFGGuider", flow_model, YES, OTHER, NO, 4.0, 2.0, which)

    result, report = run(guider(), Settings(preset="exact", window=6), batch=batch)
    assert report.fallback is None and max(report.window_per_round) > 1
    assert relative(result, plain(guider(), batch=batch)) < 1e-5


class Blend(comfy.samplers.CFGGuider):
    """A guider of another pack with a number of its own."""

    k = 0.0

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
        D = super().predict_noise(x, timestep, model_options, seed)
        return D + self.k * (D.mean(0, keepdim=True) - D)


def mix(apply: Any, args: dict[str, Any]) -> Tensor:
    """A patch that lives as long as its module, and finds its strength in the options."""
    out, own = apply(args["input"], args["timestep"], **args["c"]), args["c"]["transformer_options"].get("mix", {})
    parts = out.reshape(len(args["cond_or_uncond"]), -1, *out.shape[1:])
    by = float(own.get("by", [0.0])[0])
    return (parts + by * (parts.mean(1, keepdim=True) - parts)).reshape(out.shape)


class Node:
    """The host keeps a node between runs, and this one gives its own method; it counts its calls."""

    k = 0.0
    calls = 0

    def mixed(self, args: dict[str, Any]) -> Tensor:
        D = args["denoised"]
        self.calls += 1
        return D + self.k * (D.mean(0, keepdim=True) - D)


class Nested(Node):
    """Another place for its strength."""

    @property
    def k(self) -> float:
        return self.settings["by"][0]

    @k.setter
    def k(self, value: float) -> None:
        self.settings = {"by": [value]}


class Module(Node, torch.nn.Module):
    """With weights, it could be."""


NODES = {"node": Node(), "nested": Nested(), "module": Module()}
#: What a strength in the options may be.
HELD = {"options": float, "tensor": torch.tensor, "array": np.array}


def with_strength(model: Any, where: str, k: float) -> Any:
    """A guider in whose graph only ``k`` changes."""
    if where == "guider":
        return guided(model, kind=Blend, k=k)
    clone = model.clone()
    if where in HELD:
        clone.model_options["transformer_options"]["mix"] = {"by": [HELD[where](k)]}
        clone.set_model_unet_function_wrapper(mix)
    elif where in NODES:
        NODES[where].k = k
        clone.set_model_sampler_post_cfg_function(NODES[where].mixed)
    else:
        return guided(with_cfg_read(clone), 1.0 + k)
    return guided(clone)


def with_cfg_read(model: Any) -> Any:
    model.set_model_sampler_post_cfg_function(by_cfg, disable_cfg1_optimization=True)
    return model


def by_cfg(args: dict[str, Any]) -> Tensor:
    """A patch that mixes as far as cfg is above 1."""
    D, k = args["denoised"], args["cond_scale"] - 1.0
    return D + k * (D.mean(0, keepdim=True) - D)


PLACES = ["guider", *HELD, *NODES, "cfg"]


@pytest.mark.parametrize("where", PLACES)
def test_a_strength_that_is_only_read_is_probed_again(flow_model, fresh, probes, where):
    """In both directions; what was found once is not asked for again."""
    off, on = 1e-4, 0.5
    for k, trouble in ((off, False), (on, True), (off, False), (on, True)):
        result, report = run(with_strength(flow_model, where, k))
        assert (report.fallback is not None) == trouble
        assert relative(result, plain(with_strength(flow_model, where, k))) < (1e-9 if trouble else 1e-2)
    assert len(probes) == 2


@pytest.mark.parametrize("where", PLACES)
def test_another_strength_keeps_the_times(flow_model, fresh, machine, where):
    machine(flow_model, with_room)
    first, then = (run(with_strength(flow_model, where, k), Settings(), steps=50)[1] for k in (1e-4, 2e-4))
    assert first.solver == "sequential"
    assert then.solver == "quasi-newton" and then.probe_nfe == PROBED


def test_the_second_model_of_a_guider_is_probed_too(flow_model, second, fresh, monkeypatch):
    """And a patch that replaces a part of it."""
    assert run(made("DualModelGuider", flow_model, YES, 4.0, second, NO))[1].fallback is None
    third = load("sd3")
    forward = third.model.diffusion_model.forward
    monkeypatch.setattr(
        third.model.diffusion_model,
        "forward",
        lambda *a, **more: (lambda D: D + 0.5 * D.mean(0, keepdim=True))(forward(*a, **more)),
    )
    assert "influence" in run(made("DualModelGuider", flow_model, YES, 4.0, third, NO))[1].fallback
    replaced = second.clone()
    before = parts_of_two(flow_model, second).key
    replaced.add_object_patch("extra", mix)
    assert parts_of_two(flow_model, replaced).key != before == parts_of_two(flow_model, second).key


def parts_of_two(model: Any, other: Any) -> Any:
    seen = Seen(model)
    seen.uncond_model_patcher = other
    return parts_of(seen, {})


@pytest.fixture(scope="module")
def unet():
    return load("sd15")


def asked(model: Any, steps: int = 8, seed: int = 3, cfg: float = 4.0, prompt: int = 1, **conds: Any) -> None:
    """A run of KSampler (Parallel)."""
    given = {"positive": conditioning(prompt), "negative": NO, **conds}
    request = sampling.Request(model, seed, steps, cfg, "euler", "normal", *given.values(), {"samples": latent(model)})
    outcome = Outcome()
    sampling.run(request, WINDOW, outcome)
    assert outcome.report.fallback is None


NUDGES = [{}, {}, {"seed": 4}, {"prompt": 5}]


def test_graphs_that_are_known_are_never_probed(flow_model, fresh, probes):
    """Another cfg included, and all of them are one kind of run."""
    for nudge in (*NUDGES, {"cfg": 5.0}):
        asked(flow_model, **nudge)
    assert not probes and len(fresh) == 1
    for strength in (0.5, 0.5, 0.6):
        asked(with_lora(flow_model, strength), cfg=5.0 + strength)
    assert not probes


def test_a_control_net_is_probed_once(unet, fresh, probes):
    """Whatever the cfg: nothing reads it there but the sum that it is for."""
    net = control_net(unet, 1)
    for i, nudge in enumerate((*NUDGES, {"cfg": 5.0})):
        copied = net.copy().set_cond_hint(torch.rand(1, 3, 64, 64), 0.8 - 0.1 * i, (0.2, 0.7))
        conds = {name: with_values(cond, control=copied) for name, cond in unet_conds().items()}
        asked(unet, **nudge, **conds)
    assert len(probes) == 1 and len(fresh) == 1


def test_a_patch_is_probed_once_for_a_cfg(flow_model, fresh, probes):
    """It may read it, and what it mixes grows with it; little from nudge to nudge."""
    patched = with_strength(flow_model, "options", 0.0).model_patcher
    for nudge in NUDGES:
        asked(patched, **nudge)
    assert len(probes) == 1
    for cfg in (4.5, 5.0, 4.0, 5.0, 6.5, 12.0):
        asked(patched, cfg=cfg)
    assert len(probes) == 2
    asked(patched, cfg=1.0)
    assert len(probes) == 3


def test_numbers_of_odd_graphs_are_looked_at(flow_model):
    """What holds itself, huge lists, keys that hold objects, attributes that are no functions of Python's."""
    seen, options = Seen(flow_model), {"mine": {}, "many": [0.5] * 100_000}
    options["mine"] |= {name: options["mine"] for name in "ab"}
    options["mine"][("a", object())] = 1.0
    seen.apply, seen.cfg = np.add, 10**400
    key = parts_of(seen, options).key
    del options["mine"][next(name for name in options["mine"] if isinstance(name, tuple))]
    options["mine"][("a", object())] = 1.0
    assert parts_of(seen, options).key == key and hash(key) is not None


def test_other_guiders_are_probed_once(flow_model, second, fresh, probes):
    for prompt, seed in ((1, 3), (1, 3), (6, 4)):
        run(made("DualCFGGuider", flow_model, conditioning(prompt), OTHER, NO, 4.0, 2.0, "nested"), seed=seed)
        run(made("DualModelGuider", flow_model, conditioning(prompt), 4.0, second, NO), seed=seed)
    assert len(probes) == 2


def test_a_guider_whose_method_was_replaced_is_told_by_the_function(flow_model, fresh, probes):
    """It is bound to a guider that is made anew for every prompt."""

    def predict(self: Any, *given: Any, **more: Any) -> Tensor:
        return nodes_custom_sampler.Guider_DualCFG.predict_noise(self, *given, **more)

    for prompt in (1, 6):
        guider = made("DualCFGGuider", flow_model, conditioning(prompt), OTHER, NO, 4.0, 2.0, "regular")
        guider.predict_noise = predict.__get__(guider)
        run(guider)
    assert len(probes) == 1


def test_the_numbers_of_a_graph():
    """Places count; a run's own values do not, nor where objects lie."""

    def leaves(value: Any) -> frozenset:
        return frozenset(guards._leaves(value, (), set()))

    assert leaves({"a": float("nan")}) == leaves({"a": float("nan")})
    assert leaves({"a": -1}) != leaves({"a": -2}) and leaves([1, None]) != leaves([None, 1])
    assert leaves({3, 1}) == leaves({1, 3}) != leaves({1})
    assert leaves({"blocks": {"x": (1, "y", True)}}) != leaves({"blocks": {"x": (1, "y", False)}})
    assert leaves({object(): 1}) == leaves({object(): 1})
    for name in ("seed", "noise_seed", "sample_sigmas", "cond_or_uncond", "uuids"):
        assert not leaves({name: [1, 2]})
    assert leaves([torch.ones(2)]) != leaves([torch.zeros(2)]) and leaves([np.ones(2)]) != leaves([np.zeros(2)])
    assert not leaves([torch.ones(17), np.ones((3, 6)), object(), None, "a prompt that is longer than a choice's name"])
