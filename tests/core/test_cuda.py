"""The engine and the speed suite on a CUDA device; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from paratafusion_core.bench import speed
from paratafusion_core.bench.journal import Journal
from paratafusion_core.bench.networks import SMALL, build, stream
from paratafusion_core.bench.predict import Plan
from paratafusion_core.bench.problems import make_task, prompt_of
from paratafusion_core.cli.sample import Task
from paratafusion_core.demo import model
from paratafusion_core.options import Options
from paratafusion_core.report import fidelity
from paratafusion_core.solve import solve

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def task(seed: int = 0) -> Task:
    return make_task(speed.SETTING, seed, str(DEVICE))


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "picard"])
def test_the_sequential_picture(solver: str) -> None:
    one = task()
    reference = solve(one.system, one.denoise, Options("sequential")).x
    done = solve(one.system, one.denoise, Options(solver, window=16, data_rms=one.data_rms))
    assert done.x.device.type == DEVICE.type and done.trajectory is not None
    assert done.report.rounds < 25 and fidelity(done.x, reference, one.peak).psnr_db > 45
    assert done.trajectory.D.device.type == "cpu"
    again = solve(one.system, one.denoise, Options(solver, window=16, data_rms=one.data_rms), warm=done.trajectory)
    assert again.report.rounds <= done.report.rounds


def test_same_rounds_as_on_a_cpu() -> None:
    here, there = task(1), make_task(speed.SETTING, 1)
    options = Options(window=8, data_rms=here.data_rms)
    runs = [solve(t.system, t.denoise, options, keep_trajectory=False) for t in (here, there)]
    assert abs(runs[0].report.rounds - runs[1].report.rounds) <= 1
    assert fidelity(runs[0].x, runs[1].x, here.peak).psnr_db > 30


def test_window_1_is_the_plain_sampler() -> None:
    one = task()
    plain = solve(one.system, one.denoise, Options("sequential")).x
    assert torch.equal(solve(one.system, one.denoise, Options(window=1)).x, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_network_under_float32_states(dtype: torch.dtype) -> None:
    network = model.load(dtype=dtype, device=DEVICE)
    one = replace(task(), denoise=model.denoiser(network, prompt_of(0)))
    reference = solve(one.system, one.denoise, Options("sequential")).x
    done = solve(one.system, one.denoise, Options(window=8, data_rms=one.data_rms))
    assert done.x.dtype == torch.float32 and done.report.repairs == 0
    assert fidelity(done.x, reference, one.peak).psnr_db > 25


def test_streamed_weights_leave_the_device() -> None:
    layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(DEVICE).requires_grad_(False)
    x = torch.randn(4, 1024, device=DEVICE)
    expected = layers(x)
    stream(layers, DEVICE)
    assert all(p.device.type == "cpu" and p.is_pinned() for p in layers.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.testing.assert_close(layers(x), expected)
    # one layer of eight at a time, 4 MiB each; the result is gone again
    assert torch.cuda.max_memory_allocated() - before < 3 * 4 * 2**20
    assert torch.cuda.memory_allocated() == before
    assert all(p.device.type == "cpu" for p in layers.parameters())


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.kind)
def test_speed_suite(spec: speed.Spec, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs the extra bench")
    network = build(spec, DEVICE)
    x, sigma = torch.randn(3, 1, *spec.latent, device=DEVICE), torch.tensor([0.5, 2.0, 9.0], device=DEVICE)
    assert network.dtype != torch.float32
    together = network.denoise(x, sigma)
    assert together.dtype == torch.float32 and together.isfinite().all()
    stream(network.module, DEVICE)
    torch.testing.assert_close(network.denoise(x, sigma), together, rtol=1e-2, atol=1e-2)

    effort = speed.Effort((1, 2, 4), repeats=2, warmup=1, budget=5.0)
    plans = [Plan("quasi-newton", 8), Plan("picard", 8)]
    rows = speed.measure(DEVICE, [spec], effort, 2, Journal(tmp_path / "speed.jsonl", ("kind",)), plans)
    assert [row["failed"] for row in rows if row["kind"] == "replay"] == [None] * 4
    resident, streamed = (row["held_bytes"] for row in rows if row["kind"] == "latency")
    assert resident - streamed > network.bytes / 2
