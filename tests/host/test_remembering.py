"""Which graphs are tried for what a call keeps of those before it, and what that costs."""

from __future__ import annotations

import functools
import importlib
from types import FunctionType, SimpleNamespace
from typing import Any

import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.demo import DemoModel
from paratafusion_pack.nodes.host.guards import may_remember
from paratafusion_pack.nodes.host.probing import PROBED_ALONE
from paratafusion_pack.nodes.host.settings import Settings
from test_mixed import patched
from test_one_level import COLLOCATION, STANDARD, draw, ranged
from torch import Tensor


@pytest.fixture(scope="module")
def demo():
    return DemoModel.execute(1).args[0]


def test_auto_weighs_the_rows_of_the_probe(demo, fresh):
    """Thirteen of sixteen rows, and ten to try whether calls are apart: asked for by name it is tried, and known."""
    model = ranged(demo, 4.0, 0.7)
    reference, _ = draw(model, Settings(solver="sequential"), steps=16)
    result, report = draw(model, STANDARD, steps=16)
    assert "influence each other" in report.fallback and torch.equal(result, reference)
    assert draw(model, COLLOCATION, steps=16)[1].probe_nfe == PROBED_ALONE
    report = draw(model, STANDARD, steps=16)[1]
    assert report.solver == "collocation" and report.probe_nfe == 0
    report = draw(model, STANDARD, steps=20)[1]  # six rows less a run: paid off with the second
    assert report.solver == "collocation" and report.probe_nfe == PROBED_ALONE


def test_what_is_listed_is_not_tried(demo, fresh):
    """Beside what is not, and wrapped in it, it is."""
    listed = patched(demo, "nodes_mahiro", "Mahiro")
    for settings in (STANDARD, COLLOCATION):
        report = draw(listed, settings, steps=20)[1]
        assert report.solver == "collocation" and report.probe_nfe == 0
    (own,) = listed.model_options["sampler_post_cfg_function"]
    beside, wrapping = listed.clone(), demo.clone()
    beside.set_model_sampler_post_cfg_function(lambda args: 1.01 * args["denoised"])
    wrapping.set_model_sampler_post_cfg_function(functools.wraps(own)(lambda args: own(args)))
    for model in (beside, wrapping):
        assert draw(model, COLLOCATION, steps=20)[1].probe_nfe == PROBED_ALONE
        assert "Mahiro" in draw(model, COLLOCATION, steps=20)[1].plan


def test_which_graphs_may_remember(demo):
    """The host names the modules of its node files by their path."""

    def remember(model: Any, guider: Any = comfy.samplers.CFGGuider) -> bool:
        return may_remember(SimpleNamespace(inner_model=with_model(guider(model))), model.model_options)

    def with_model(guider: Any) -> Any:
        guider.inner_model, guider.conds = guider.model_patcher.model, {}
        return guider

    def own(args: dict[str, Any]) -> Tensor:
        return args["denoised"]

    def of(module: str) -> Any:
        function = FunctionType(own.__code__, {"__name__": module}, own.__name__)
        model = demo.clone()
        model.set_model_sampler_post_cfg_function(function)
        return model

    def replaced(model: Any) -> Any:
        model.add_object_patch("diffusion_model.extra", torch.nn.Identity())
        return model

    listed = ["comfy_extras.nodes_mahiro", "/a.b/comfy_extras/nodes_slg", r"C:\comfy_extras\nodes_perpneg"]
    others = ["custom_nodes.nodes_mahiro", "/custom_nodes/nodes_slg", "comfy_extras.nodes_eps", "nodes_mahiro"]
    assert not remember(demo) and not any(remember(of(name)) for name in listed)
    assert all(remember(of(name)) for name in others) and remember(replaced(of(listed[0])))
    guiders = importlib.import_module("comfy_extras.nodes_perpneg")
    assert not remember(demo, guiders.Guider_PerpNeg)
    assert remember(
        demo, type("Guider_PerpNeg", (guiders.Guider_PerpNeg,), {"__module__": "custom_nodes.nodes_perpneg"})
    )
