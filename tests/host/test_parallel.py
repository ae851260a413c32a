"""A parallel SAMPLER gives the picture of the SAMPLER it was made of."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from paratafusion_pack.nodes.reports import ConvergenceReport
from test_capture import SAMPLERS
from tiny import conditioning, latent, relative, sample, sigmas_of

EXACT = Settings(preset="exact", window=6)


def compare(model: Any, name: str, steps: int = 10, settings: Settings = EXACT, **asked: Any) -> tuple[float, Outcome]:
    """Relative difference between the parallel and the host's own run."""
    inner = comfy.samplers.sampler_object(name)
    sigmas = asked.pop("sigmas", None)
    sigmas = sigmas_of(model, name, steps) if sigmas is None else sigmas
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(model), **asked}
    reference = sample(model, inner, sigmas.clone(), **asked)
    outcome = Outcome()
    result = sample(model, parallel(inner, settings, outcome), sigmas.clone(), **asked)
    assert torch.isfinite(reference).all()
    return relative(result, reference), outcome


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("kind", "within"), [("flow_model", 1e-4), ("eps_model", 1e-4), ("ztsnr_model", 1e-3)], ids=["flow", "eps", "ztsnr"]
)
def test_exact_is_the_hosts_own_picture(name, kind, within, request, record_property):
    error, outcome = compare(request.getfixturevalue(kind), name)
    record_property("relative_error", error)
    assert outcome.report.fallback is None
    assert error < within
    assert outcome.report.rounds <= outcome.report.sequential_nfe


@pytest.mark.parametrize(
    "settings", [EXACT, Settings(preset="standard"), Settings("parataa", "strict", window=8)], ids=str
)
@pytest.mark.parametrize(
    ("name", "levels"), [("euler", [1.0, 1.0, 0.9, 0.7, 0.5]), ("dpmpp_2m", [1.0, 0.6, 0.3, 1.0, 0.6, 0.3])]
)
def test_a_flow_that_begins_with_its_largest_level_twice(flow_model, name, levels, settings):
    """Noise is left over, so that rows are told apart by their levels."""
    error, outcome = compare(flow_model, name, settings=settings, sigmas=torch.tensor(levels))
    assert outcome.report.fallback is None and outcome.report.solver != "collocation"
    assert error < (1e-4 if settings is EXACT else 1e-2)


@pytest.mark.parametrize("settings", [EXACT, Settings(preset="standard")], ids=str)
@pytest.mark.parametrize("name", ["euler", "heun", "uni_pc", "lcm"])
def test_a_level_below_zero_falls_back(flow_model, fresh, name, settings):
    inner, levels = comfy.samplers.sampler_object(name), torch.tensor([1.0, 0.5, -0.1, 0.0])
    asked = {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent(flow_model)}
    torch.manual_seed(0)
    reference = sample(flow_model, inner, levels.clone(), **asked)
    outcome = Outcome()
    torch.manual_seed(0)
    result = sample(flow_model, parallel(inner, settings, outcome), levels.clone(), **asked)
    assert outcome.report.fallback
    if name != "uni_pc":  # which takes its logarithm
        assert "sigmas holds -0.1" in outcome.report.fallback
    assert torch.equal(result.nan_to_num(7.0), reference.nan_to_num(7.0))


def test_a_model_of_no_size_falls_back_and_a_setting_out_of_range_does_not(flow_model, fresh, monkeypatch):
    with pytest.raises(ValueError, match="window"):
        compare(flow_model, "euler", settings=Settings(window=-3))
    monkeypatch.setattr(flow_model.get_model_object("model_sampling"), "data_rms", -1.0, raising=False)
    error, outcome = compare(flow_model, "euler")
    assert "data_rms is -1.0" in outcome.report.fallback and error == 0
    with pytest.raises(ValueError, match="window"):
        compare(flow_model, "euler", settings=Settings(window=-3))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sampler", ("euler", EXACT, Outcome())),
        ("options", (comfy.samplers.sampler_object("euler"), "strict", Outcome())),
        ("trajectory", (comfy.samplers.sampler_object("euler"), EXACT, Outcome(), {"D": 1})),
    ],
)
def test_what_other_nodes_give_is_refused_in_a_sentence(name, given):
    with pytest.raises(ValueError, match=rf"^{name} is a \w+; .* is allowed$"):
        parallel(*given)


def test_a_report_that_is_none_is_refused_in_a_sentence():
    for report, found in ((None, "empty"), (5, "a int")):
        with pytest.raises(ValueError, match=f"report is {found}; "):
            ConvergenceReport.execute(report)
