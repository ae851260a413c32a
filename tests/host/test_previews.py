"""Previews: in every round the host's own previewer is given a whole picture, of the form its own samplers give it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import pytest
import tiny
import torch
from comfy.taesd.taesd import Decoder
from comfy_extras import nodes_advanced_samplers, nodes_custom_sampler
from paratafusion_pack.nodes.host.capture import Captured
from paratafusion_pack.nodes.host.problem import LastStep
from paratafusion_pack.nodes.host.sampler import parallel
from paratafusion_pack.nodes.host.settings import Outcome, Settings
from PIL import Image
from safetensors.torch import save_file
from tiny import conditioning, relative, sample, sigmas_of

STEPS = 10


@pytest.fixture(autouse=True)
def latent2rgb() -> Iterator[None]:
    """The host's preview setting, as ``--preview-method latent2rgb`` sets it."""
    before, comfy.cli_args.args.preview_method = (
        comfy.cli_args.args.preview_method,
        comfy.cli_args.LatentPreviewMethod.Latent2RGB,
    )
    yield
    comfy.cli_args.args.preview_method = before
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    flow = tiny.load("sd3")
    return {
        "flow": flow,
        "eps": tiny.as_prediction(flow, "eps"),
        "ztsnr": tiny.as_prediction(flow, "v_prediction", zsnr=True),
        "wan": tiny.load("wan"),
    }


def previews(model: Any, sampler: Any, sigmas: torch.Tensor, latent: torch.Tensor, mask: Any = None) -> tuple:
    """The pictures that the host's progress bar is given, and what its sampling hands to its callback."""
    shown: list[np.ndarray] = []
    given: list[tuple] = []

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        if preview is not None:
            kind, picture, limit = preview
            assert kind == "JPEG" and isinstance(picture, Image.Image) and limit > 0
            shown.append(np.asarray(picture, dtype=np.int16))

    comfy.utils.set_progress_bar_global_hook(hook)
    draw = latent_preview.prepare_callback(model, len(sigmas) - 1)

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        given.append((x0.shape, x0.dtype, x0.device, x.shape, x.dtype, x.device, total))
        draw(step, x0, x, total)

    sample(model, sampler, sigmas.clone(), positive=conditioning(1), negative=conditioning(2), latent_image=latent,
           mask=mask, callback=callback)  # fmt: skip
    return shown, given


def both(model: Any, name: str, sigmas: torch.Tensor, latent: torch.Tensor, mask: Any = None) -> tuple:
    theirs = previews(model, comfy.samplers.sampler_object(name), sigmas, latent, mask)
    outcome = Outcome()
    inner = comfy.samplers.sampler_object(name)
    ours = previews(model, parallel(inner, Settings(preset="strict", window=4), outcome), sigmas, latent, mask)
    assert outcome.report is not None and outcome.report.fallback is None
    assert len(ours[0]) == outcome.report.rounds <= STEPS
    return ours, theirs


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "euler_ancestral", "euler_cfg_pp"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("flow", (1, 16, 8, 12)),
        ("flow", (3, 16, 8, 8)),
        ("eps", (2, 16, 8, 8)),
        ("ztsnr", (1, 16, 8, 8)),
        ("wan", (1, 16, 3, 8, 12)),
        ("wan", (2, 16, 2, 8, 8)),
    ],
    ids=str,
)
def test_the_previewer_gets_what_the_hosts_own_samplers_give_it(models, kind, shape, name):
    latent = torch.zeros(shape)
    ours, theirs = both(models[kind], name, sigmas_of(models[kind], name, STEPS), latent)
    assert set(ours[1]) == set(theirs[1])  # shapes, dtypes, devices and the number of steps
    assert {p.shape for p in ours[0]} == {p.shape for p in theirs[0]} == {(*shape[-2:], 3)}
    assert np.abs(ours[0][-1] - theirs[0][-1]).max() <= 2


@pytest.mark.parametrize("kind", ["flow", "eps", "wan"])
def test_the_whole_picture_sharpens_from_round_to_round(models, kind):
    shape = (1, 16, 2, 8, 8) if kind == "wan" else (1, 16, 8, 8)
    ours, _ = both(models[kind], "euler", sigmas_of(models[kind], "euler", STEPS), torch.zeros(shape))
    far = [gap(picture, ours[0][-1]) for picture in ours[0]]
    assert far[0] > far[len(far) // 2] > far[-1] == 0


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_where_noise_is_left_over_the_preview_is_the_clean_picture(models, kind):
    sigmas = sigmas_of(models[kind], "euler", STEPS * 2)[: STEPS + 1]
    ours, theirs = both(models[kind], "euler", sigmas, torch.zeros(1, 16, 8, 8))
    assert np.abs(ours[0][-1] - theirs[0][-1]).max() <= 2


def outputs(model: Any, sampler: Any, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The host's SamplerCustomAdvanced: its output and its denoised output."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(1), conditioning(2))
    guider.set_cfg(4.0)
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    noise = nodes_custom_sampler.Noise_RandomNoise(3)
    out = nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas.clone(), latent)
    return out.args[0]["samples"], out.args[1]["samples"]


def denoised_output(model: Any, sampler: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """The second output of the host's SamplerCustomAdvanced."""
    return outputs(model, sampler, sigmas)[1]


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        *itertools.product(("euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde"), ["high"], ["flow", "eps"]),
        *itertools.product(("seeds_2", "euler_cfg_pp", "sa_solver_pece"), ["high"], ["flow", "eps"]),
        *itertools.product(["dpmpp_2s_ancestral_cfg_pp"], ["high"], ["flow", "eps"]),
        ("euler", "rising", "flow"),
        ("euler", "rising", "eps"),
        ("dpmpp_2m", "rising", "eps"),  # of a flow it divides by zero
    ],
)
def test_where_noise_is_left_over_the_denoised_output_is_the_hosts(models, name, part, kind):
    sigmas = sigmas_of(models[kind], name, 12)
    sigmas = sigmas[:8] if part == "high" else sigmas.flip(0).clamp(min=0.01)
    inner, outcome = comfy.samplers.sampler_object(name), Outcome()
    theirs = denoised_output(models[kind], inner, sigmas)
    ours = denoised_output(models[kind], parallel(inner, Settings(preset="exact", window=6), outcome), sigmas)
    assert outcome.report.fallback is None and outcome.report.solver != "sequential"
    assert relative(ours, theirs) < 1e-4


ENDS_ELSEWHERE = {
    **{name: comfy.samplers.sampler_object(name) for name in ("dpm_fast", "sa_solver_pece", "uni_pc", "uni_pc_bh2")},
    "alternative": comfy.samplers.KSAMPLER(nodes_advanced_samplers.sample_euler_pp),
}


@pytest.mark.parametrize(
    ("kind", "schedule", "first"),
    [("flow", "uni_pc", 0), ("flow", "uni_pc", 6), ("eps", "uni_pc", 6), ("flow", "euler", 6)],  # one ends lower
)
@pytest.mark.parametrize("name", ENDS_ELSEWHERE)
def test_where_the_last_state_is_no_denoised_picture_the_denoised_output_is_the_hosts(
    models, name, kind, schedule, first
):
    inner, outcome = ENDS_ELSEWHERE[name], Outcome()
    sigmas = sigmas_of(models[kind], schedule, 12)[first:]
    theirs = outputs(models[kind], inner, sigmas)
    ours = outputs(models[kind], parallel(inner, Settings(preset="exact", window=6), outcome), sigmas)
    assert outcome.report.fallback is None and outcome.report.solver != "sequential"
    assert relative(theirs[1], theirs[0]) > 5e-4  # so that one cannot pass for the other
    assert relative(ours[0], theirs[0]) < 1e-4 and relative(ours[1], theirs[1]) < 1e-4


@pytest.mark.parametrize("name", ["dpm_fast", "uni_pc"])
def test_where_the_last_state_is_no_denoised_picture_the_last_preview_is_whole(models, name):
    ours, theirs = both(models["flow"], name, sigmas_of(models["flow"], name, STEPS), torch.zeros(1, 16, 8, 8))
    assert np.abs(ours[0][-1] - theirs[0][-1]).max() <= 2


def test_a_row_is_shown_from_its_own_evaluation_or_its_neighbours():
    """Where no noise is left over; else the nearest one's is better than a noisy state."""
    levels = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    S, C = torch.zeros(5, 1, 1), torch.zeros(5, 4, dtype=torch.float64)
    for end, told in ((0.0, [None, 1.0, 2.0, 2.0]), (0.5, [0.0, 1.0, 2.0, 2.0])):
        schedule = torch.tensor([4.0, 3.0, 2.0, 1.0, end])
        captured = Captured(S, C, None, levels, schedule, shown=2, ends_elsewhere=True)
        batched = SimpleNamespace(output=None)
        last = LastStep(lambda x, sigma: x, batched, levels, captured)
        seen = []
        for row, level in enumerate(levels):
            batched.output = torch.full((1, 1), float(row))
            last(batched.output, level[None])
            seen.append(None if last.picture is None else float(last.picture))
        assert seen == told


def test_inpainting_shows_the_kept_part_as_it_is(models):
    model = models["flow"]
    latent = torch.randn((2, 16, 8, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    ours, theirs = both(model, "euler", sigmas_of(model, "euler", STEPS), latent, mask)
    assert np.abs(ours[0][-1] - theirs[0][-1]).max() <= 2
    kept = [picture[:, :4] for picture in ours[0]]
    assert all(np.abs(part - kept[-1]).max() <= 2 for part in kept)


def test_a_small_decoder_is_used_where_there_is_one(models, tmp_path, monkeypatch):
    weights = tiny.randomise(Decoder(latent_channels=16), 3)
    save_file(weights, str(tmp_path / "taesd3_decoder.safetensors"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.TAESD
    ours, theirs = both(models["flow"], "euler", sigmas_of(models["flow"], "euler", STEPS), torch.zeros(2, 16, 4, 6))
    assert {p.shape for p in ours[0]} == {p.shape for p in theirs[0]} == {(32, 48, 3)}
    assert gap(ours[0][-1], theirs[0][-1]) < 0.05 * gap(ours[0][-1], np.roll(ours[0][-1], 1))


def test_a_preview_setting_of_none_decodes_nothing(models):
    comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.NoPreviews
    inner = comfy.samplers.sampler_object("euler")
    latent = torch.zeros(1, 16, 8, 8)
    sigmas = sigmas_of(models["flow"], "euler", STEPS)
    shown, given = previews(models["flow"], parallel(inner, Settings(window=4), Outcome()), sigmas, latent)
    assert shown == [] and given
