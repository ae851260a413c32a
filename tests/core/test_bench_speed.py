"""The speed suite: replayed rounds, streamed weights, fits and predictions, its tables, and refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paratafusion_core import cli
from paratafusion_core.bench import hardware, speed, speed_table
from paratafusion_core.bench.journal import Journal
from paratafusion_core.bench.networks import LARGE, SMALL, Network, build, stream
from paratafusion_core.bench.predict import Plan, Run, best_plans, speedup
from paratafusion_core.bench.problems import make_task
from paratafusion_core.denoisers import Denoise
from paratafusion_core.options import Options
from paratafusion_core.plan import Latency, fit
from paratafusion_core.solve import solve

CPU = torch.device("cpu")
QUASI = Plan("quasi-newton", 8)
LATENT = (4, 32, 32)


class Tiny(nn.Module):
    """Two layers and a norm, to be streamed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3, padding=1))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def watched(seen: list[int]) -> Denoise:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.shape[1:] == (1, *LATENT) and sigma.shape == (len(x),)
        seen.append(len(x))
        return x / 2

    return denoise


@pytest.fixture(scope="module")
def recording() -> speed.Recording:
    return speed.record(make_task(speed.SETTING, 0), QUASI, LATENT)


def test_replay_feeds_the_rows_that_the_demo_network_needed(recording: speed.Recording) -> None:
    task, seen = make_task(speed.SETTING, 0), list[int]()
    own = solve(task.system, task.denoise, QUASI.options(task.data_rms), keep_trajectory=False).report
    speed.replay(recording, watched(seen))
    assert tuple(seen) == recording.rows_per_round
    # the embedding moves roundings, which may freeze a row a round earlier or later
    assert abs(len(seen) - own.rounds) <= 1 and sum(seen) == pytest.approx(own.nfe, rel=0.05)
    assert recording.system.S.shape[1:] == (1, *LATENT)


def test_replay_that_strays_is_told(recording: speed.Recording) -> None:
    short = speed.Recording(recording.system, recording.options, recording.rounds[:-1])
    other = speed.Recording(recording.system, recording.options, (recording.rounds[0][:3], *recording.rounds[1:]))
    long = speed.Recording(recording.system, recording.options, (*recording.rounds, recording.rounds[-1]))
    for wrong in (short, other, long):
        with pytest.raises(speed.Strayed):
            speed.replay(wrong, None)


def test_embedding_repeats_and_pads() -> None:
    x = torch.randn(2, 1, 3, 32, 32)
    wide = speed.widen(x, (4, 64, 64)).flatten(2)
    assert torch.equal(wide[..., : 5 * 3072], x.flatten(2).repeat(1, 1, 5)) and not wide[..., 5 * 3072 :].any()
    with pytest.raises(ValueError, match=r"latent is \[4, 16, 16\]"):
        speed.record(make_task(speed.SETTING, 0), QUASI, (4, 16, 16))


def test_plain_loop_is_the_sampler() -> None:
    task, seen = make_task(speed.SETTING, 1), list[int]()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(len(x))
        return task.denoise(x, sigma)

    sequential = solve(task.system, task.denoise, Options("sequential"), keep_trajectory=False).x
    torch.testing.assert_close(speed.plain(task.system, denoise), sequential, rtol=1e-4, atol=1e-4)
    assert seen == [1] * 50


def test_streamed_weights_are_dropped_after_each_layer() -> None:
    module, x = Tiny(), torch.randn(2, 4, 8, 8)
    expected = module(x)
    during: list[set[int]] = []
    stream(module, CPU)
    kept = {p.data_ptr() for p in module.parameters()}
    for layer in module.layers:
        layer.register_forward_pre_hook(lambda *_: during.append({p.data_ptr() for p in module.parameters()} & kept))
    assert torch.equal(module(x), expected)
    # while a layer runs, its own weight and bias are copies and the other layers' are the host's
    assert [len(others) for others in during] == [4, 4, 4]
    assert {p.data_ptr() for p in module.parameters()} == kept


def test_streamed_weights_are_dropped_after_an_error() -> None:
    module = Tiny()
    stream(module, CPU)
    kept = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 5, 8, 8))
    assert [p.data_ptr() for p in module.parameters()] == kept


def test_out_of_memory_is_a_result_and_other_errors_are_not() -> None:
    def full() -> int:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def broken() -> int:
        raise RuntimeError("shapes do not fit")

    assert hardware.attempt(lambda: 3, CPU) == 3 and hardware.attempt(full, CPU) is None
    with pytest.raises(RuntimeError, match="shapes"):
        hardware.attempt(broken, CPU)


@pytest.mark.parametrize(("budget", "calls"), [(1e9, 5), (0.0, 2)])
def test_clock_counts_its_calls(budget: float, calls: int) -> None:
    seen: list[int] = []
    assert hardware.clock(lambda: seen.append(1), CPU, 3, 2, budget) >= 0
    assert len(seen) == calls


def test_fit_finds_w_and_c_and_keeps_them_positive() -> None:
    found = fit({b: 0.03 + 0.002 * b for b in (1, 2, 4, 8, 16)})
    assert found is not None and found.w == pytest.approx(0.03) and found.c == pytest.approx(0.002)
    steep, falling = fit({1: 1.0, 2: 2.4, 4: 5.6}), fit({1: 2.0, 2: 1.5})
    assert steep is not None and steep.w == 0 and 1 < steep.c < 1.4
    assert falling is not None and falling.c == 0 and 1.5 < falling.w < 2
    assert fit({1: 2.0}) is None


def test_predicted_speedup_and_best_plans() -> None:
    wide, narrow, poor = Plan("quasi-newton", "full"), Plan("quasi-newton", 4), Plan("picard", 2)
    runs = [
        Run(wide, 0, 50, (30, 30, 30, 10), math.inf),
        Run(narrow, 0, 50, (4,) * 15, 45.0),
        Run(narrow, 1, 50, (4,) * 15, 41.0),
        Run(poor, 0, 50, (1,), 41.9),
    ]
    assert speedup(runs[:1], Latency(2.0, 1.0)) == pytest.approx(150 / 108)
    assert speedup(runs[1:3], Latency(2.0, 1.0)) == pytest.approx(150 / 90)
    none, some, much = best_plans(runs, (0.0, 2.0, 100.0))
    assert none.plan is None and none.speedup == 1  # 60 rows for 50
    assert some.plan == narrow and (some.psnr_mean, some.psnr_worst) == (43.0, 41.0)
    assert (some.rounds, some.nfe) == (15, 60)
    assert much.plan == wide and much.speedup == pytest.approx(50 * 101 / 500)


def replay_row(plan: str, measured: float | None, failed: str | None = None) -> dict[str, object]:
    numbers = {"rounds": 9, "nfe": 60, "sequential_seconds": 2.0, "engine_seconds": 0.01, "predicted_speedup": 1.5}
    seconds = 2.0 / measured if measured else None
    return {"kind": "replay", "network": "N", "weights": "resident", "plan": plan, "measured_speedup": measured} | {
        "seconds": seconds, "failed": failed, **numbers
    }  # fmt: skip


def test_table_says_first_what_lost() -> None:
    rows = [
        {"kind": "hardware", **hardware.describe(CPU)},
        replay_row("fast", 2.0),
        replay_row("slow", 0.5),
        replay_row("huge", None, "out of memory"),
        {"kind": "drift", "network": "N", "weights": "resident", "before": 2.0, "after": 2.1},
        {"kind": "drift", "network": "M", "weights": "streamed", "before": 2.0, "after": 3.0},
    ]
    text = speed_table.markdown([*rows, *predicted_rows()])
    assert text.index("Slower than the plain sampler") < text.index("| network")
    assert "1 of 2 plans (slow)" in text and "replay" in text
    lines = [line for line in text.splitlines() if line.startswith("| N |")]
    assert [line.split(" | ")[2] for line in lines] == ["slow", "fast", "huge"]
    assert "**0.50**" in lines[0] and "out of memory" in lines[2]
    assert text.count("Rough:") == 1 and "Rough: M, weights streamed" in text
    assert "No replay was slower" in speed_table.markdown([*rows[:2], *predicted_rows()])


def predicted_rows() -> list[dict[str, object]]:
    return [{"kind": "predicted", "plan": None, "ratio": 0.0, "seeds": 1, "speedup": 1.0}]


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main(["bench", "--suite", "speed", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "warp"), "device is 'warp'"),
        (("--device", "meta"), "device is 'meta'"),
        (("--seeds", "0"), "seeds is 0"),
        (("--resume", "old.jsonl"), "resume is 'old.jsonl'"),
        (("--model", "demo"), "model is ['demo']"),
    ],
)
def test_bad_input(suite: Callable[..., int], capsys: pytest.CaptureFixture[str], words: tuple, said: str) -> None:
    assert suite(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(Path().iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_missing_device(suite: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert suite("--device", "cuda") == 2 and "device is 'cuda'" in capsys.readouterr().err


def test_missing_diffusers(
    suite: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert suite() == 2
    error = capsys.readouterr().err
    assert "paratafusion[bench]" in error and error.count("\n") == 1 and not list(Path().iterdir())
    assert "pip install -e '.[bench]'" in error  # the package is in no index


def test_out_of_memory_in_a_batch_ends_the_curve(recording: speed.Recording, tmp_path: Path) -> None:
    module = Tiny()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return module(x.flatten(0, 1)).reshape(x.shape)

    runs = [Run(QUASI, 0, 50, (8,) * 11, 60.0)]
    bench = speed.Bench(CPU, speed.Effort((1, 4, 8), 1, 0, 1.0), runs, Journal(tmp_path / "a.jsonl", ("kind",)))
    tapes = {QUASI: speed.Tape(recording, 0, 0.1)}
    with speed.tqdm(disable=True) as bar:
        bench.weights(SMALL[0], Network(module, denoise, torch.float32), tapes, "resident", bar)
    latency, replay, drift = bench.journal.rows
    assert [size for size, _ in latency["curve"]] == [1, 4] and latency["failed"] == "out of memory"
    assert replay["seconds"] is None and replay["failed"] == "out of memory" and replay["predicted_speedup"] > 0
    assert drift["before"] > 0 and drift["after"] > 0
    told = speed_table.markdown(
        [{"kind": "hardware", **hardware.describe(CPU)}, latency, replay, drift, *predicted_rows()]
    )
    assert told.count("out of memory") == 2  # a cell of the curve, a line of the replays


@pytest.mark.parametrize(("spec", "millions"), [(LARGE[0], 859.5), (LARGE[1], 749.8)])
def test_large_networks_have_their_size(spec: speed.Spec, millions: float) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the extra bench")
    with torch.device("meta"):
        module = getattr(diffusers, spec.kind)(**spec.config)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.kind)
def test_networks_treat_rows_independently_and_stream(spec: speed.Spec) -> None:
    pytest.importorskip("diffusers", reason="needs the extra bench")
    network = build(spec, CPU)
    x, sigma = torch.randn(3, 1, *spec.latent), torch.tensor([0.5, 2.0, 9.0])
    together = network.denoise(x, sigma)
    assert together.shape == x.shape and together.isfinite().all()
    alone = torch.cat([network.denoise(x[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)  # sigma 9 enlarges the kernels' roundings
    stream(network.module, CPU)
    torch.testing.assert_close(network.denoise(x, sigma), together)


def test_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers", reason="needs the extra bench")
    journal = Journal(tmp_path / "speed.jsonl", ("kind",))
    effort = speed.Effort((1, 2), repeats=1, warmup=0, budget=0.0)
    rows = speed.measure(CPU, SMALL[1:], effort, 1, journal, [QUASI, Plan("picard", 4)])
    written = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in written]
    assert len(rows) == len(written) and kinds.count("demo") == 2 and kinds.count("predicted") == 5
    assert [(r["weights"], r["failed"]) for r in written if r["kind"] == "latency"] == [
        ("resident", None), ("streamed", None)
    ]  # fmt: skip
    replays = [row for row in written if row["kind"] == "replay"]
    assert len(replays) == 2  # picard with window 4 is predicted only
    for row in replays:
        assert row["failed"] is None and sum(row["rows_per_round"]) == row["nfe"] > row["rounds"]
        assert min(row["seconds"], row["sequential_seconds"], row["measured_speedup"]) > 0
    assert hardware.line(written[0]) in speed_table.markdown(rows)
