"""The README's compatibility tables say what the tests of this folder test, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.samplers
import comfyui_version
import pytest
import test_fallbacks
import test_mixed
import test_models
import tiny
from test_capture import SAMPLERS

HERE = Path(__file__).resolve().parent
README = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")
#: name in the table -> the tiny model that stands for it.
FAMILIES = {
    "SD 1.5": "sd15", "SD 3": "sd3", "Flux": "flux", "Wan": "wan", "Z-Image": "zimage", "HunyuanVideo": "hunyuan",
    "TripoSplat": "triposplat", "LTX-2": "ltxav", "MiniMax H3": "minimax",
}  # fmt: skip
#: The weights of the tiny models that the host recognises by themselves.
RECOGNISED = {"sd15", "sd3", "flux", "wan"}


def section(title: str) -> str:
    return README.split(f"### {title}\n")[1].split("\n##")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def parametrised(function: Any) -> Iterator[Any]:
    """The values that a test is run with."""
    for mark in function.pytestmark:
        if mark.name == "parametrize":
            yield from mark.args[1]


def node_names(values: Any) -> set[str]:
    """The node in each ``(module, node, *arguments)``, which may come with the reason of a fallback."""
    patches = [v[0] if isinstance(v[0], tuple) else v for v in values]
    return {patch[1] for patch in patches}


def test_the_model_table():
    said = {FAMILIES[cells[0]]: cells[1] for cells in rows("Models")}
    assert set(said) == set(FAMILIES.values())
    assert RECOGNISED | {kind for kind in tiny.CONFIGURED if kind != "plain_hunyuan"} == set(said)
    refused = {values[0] for values in parametrised(test_models.test_models_that_cannot_be_batched) if len(values) == 3}
    # of Hunyuan only the variants with MeanFlow are refused, see test_a_meanflow_free_hunyuan_is_parallel
    assert {kind for kind, answer in said.items() if answer == "no"} == refused - {"hunyuan"}
    assert "MeanFlow" in section("Models")


def test_the_sampler_line():
    if comfyui_version.__version__.startswith("0.30."):
        assert f"{len(SAMPLERS)} of the {len(comfy.samplers.KSampler.SAMPLERS)} samplers" in section("Samplers")
    assert set(CODE.findall(section("Samplers"))) == {"dpm_adaptive", "ar_video"}


@pytest.mark.parametrize("column", [0, 1], ids=["parallel", "falls back"])
def test_the_table_of_patches(column):
    said = {name for cells in rows("Patches and conditions") for name in CODE.findall(cells[column])}
    if column == 0:
        tested = node_names([*test_mixed.ON_FLOW, *test_mixed.ON_UNET])
        source = (HERE / "test_mixed.py").read_text(encoding="utf-8")
    else:
        tested = node_names(test_fallbacks.ON_FLOW)
        tested |= node_names(parametrised(test_fallbacks.test_unet_patches_that_mix_pictures_or_steps))
        tested |= node_names(parametrised(test_models.test_skip_layer_guidance_by_any_node))
        source = "".join((HERE / f"test_{name}.py").read_text(encoding="utf-8") for name in ("fallbacks", "models"))
    assert tested <= said, tested - said
    assert not [name for name in said if not re.search(rf"\b{name}\b", source)]
