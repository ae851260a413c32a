"""What a run did, and how near it is to the sequential picture."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..paratafusion_core import Report
from ..paratafusion_core.plots import convergence, headline, remarks
from ..paratafusion_core.report import fidelity
from .types import CATEGORY, ReportType, schema

#: What the node says for an infinite PSNR, of equal pictures, and with a minus for a reference without a range.
_MOST_DB = 999.0


def _as_image(picture: Image.Image) -> Tensor:
    """An IMAGE ``[1, H, W, 3]`` in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]


def _in_words(report: Report) -> str:
    return "\n".join([headline(report), *(f"{name}: {text}" for name, text in remarks(report))])


def _as_json(report: Report) -> str:
    """The report as JSON to be read by people as well: a line for each value, and for each list in a list."""
    lines = []
    for name, value in report.to_dict().items():
        text = json.dumps(value)
        if isinstance(value, list) and any(isinstance(entry, list) for entry in value):
            text = "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


class ConvergenceReport(io.ComfyNode):
    """A report as a picture and as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_Report",
            display_name="Convergence Report",
            category=CATEGORY,
            description="How a parallel run converged: a map of rounds and steps, and the numbers as text and JSON.",
            search_aliases=["convergence", "heat map", "residual", "rounds", "sampler statistics"],
            inputs=[ReportType.Input("report", tooltip="From a parallel sampler.")],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="Rounds downwards, steps across; green steps are final."),
                io.String.Output(display_name="STRING", tooltip="The report in words, then as JSON."),
            ],
        )

    @classmethod
    def execute(cls, report: Report | None) -> io.NodeOutput:
        if not isinstance(report, Report):
            found = "empty" if report is None else f"a {type(report).__name__}"
            raise ValueError(f"report is {found}; the report of a parallel sampler that has run is allowed")
        text = _in_words(report) + "\n\n" + _as_json(report)
        return io.NodeOutput(_as_image(convergence(report)), text)


def _samples(value: Any, name: str) -> tuple[Tensor, bool]:
    """``[B, ...]`` with the batch first, and whether it is an IMAGE.

    Raises:
        ValueError: it is neither LATENT nor IMAGE.
    """
    if isinstance(value, dict) and "samples" in value:
        samples = value["samples"]
        if samples.is_nested:
            samples = torch.cat([t.flatten(1) for t in samples.unbind()], dim=1)[:, None]
        return samples.float().cpu(), False
    if torch.is_tensor(value):
        return value.float().cpu(), True
    raise ValueError(f"{name} is a {type(value).__name__}; a LATENT or an IMAGE is allowed")


def _difference(a: Tensor, b: Tensor, image: bool) -> Tensor:
    """IMAGE of |a - b|, brightest where it is largest."""
    gap = (a - b).abs()
    if image and gap.shape[-1] not in (1, 3):  # alpha has no colour
        gap = gap.amax(-1, keepdim=True)
    if not image:
        while gap.ndim > 4:  # of a video its frames' largest difference
            gap = gap.amax(2)
        gap = gap.reshape(gap.shape[0], -1, *gap.shape[-2:]).mean(1)[..., None]
    known = gap.isfinite()
    most = torch.where(known, gap, 0.0).max().clamp(min=1e-12)
    return torch.where(known, gap / most, 1.0).expand(*gap.shape[:-1], 3).contiguous()


class CompareWithSequential(io.ComfyNode):
    """Two results, compared in numbers and in a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        either = [io.Latent, io.Image]
        return schema(
            node_id="ParaTAF_Compare",
            display_name="Compare with Sequential",
            category=CATEGORY,
            description="How near a result is to its reference: PSNR, largest difference, and where they differ.",
            search_aliases=["psnr", "difference", "image diff", "latent diff", "fidelity"],
            inputs=[
                io.MultiType.Input("result", types=either, tooltip="A LATENT or an IMAGE of the parallel run."),
                io.MultiType.Input("reference", types=either, tooltip="The same of the sequential run."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="psnr_db",
                    tooltip="Of the worst picture; 999 where they are equal, -999 where the reference has no range.",
                ),
                io.Float.Output(display_name="max_error", tooltip="The largest difference of a value."),
                io.Image.Output(display_name="difference", tooltip="White where they differ most."),
                io.String.Output(display_name="STRING", tooltip="The numbers in a line."),
            ],
        )

    @classmethod
    def execute(cls, result: Any, reference: Any) -> io.NodeOutput:
        (a, image), (b, other) = _samples(result, "result"), _samples(reference, "reference")
        if image != other or a.shape != b.shape:
            kinds = ["LATENT", "IMAGE"]
            raise ValueError(
                f"result is {kinds[image]} {list(a.shape)}; {kinds[other]} {list(b.shape)}, as reference, is allowed"
            )
        figures = fidelity(a, b, 1.0 if image else None)
        psnr = min(max(figures.psnr_db, -_MOST_DB), _MOST_DB)
        peak = "the range of an image" if image else "the reference's range"
        text = f"PSNR {psnr:.1f} dB (of {peak}, {figures.psnr_peak:.3g}), largest difference {figures.max_abs:.3g}"
        if not math.isfinite(figures.max_abs):
            text += ": there are values that are no numbers"
        else:
            text += " (brightest in the picture)" if figures.max_abs > 0 else ": equal"
        return io.NodeOutput(psnr, figures.max_abs, _difference(a, b, image), text)
