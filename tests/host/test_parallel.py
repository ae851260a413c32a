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
