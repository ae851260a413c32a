"""What a running sampler tells the live widget: in the process, and through a real server to the client that queued."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_server import ANSWER, Server
from paratafusion_pack.nodes.host.live import BEGUN, EVENT, Live, levels
from paratafusion_pack.nodes.host.notify import Place, current_place
from paratafusion_pack.nodes.host.pace import PERIOD, Pace, pace_of
from paratafusion_pack.paratafusion_core import Options, Progress, Report, schedules, schemes, solve
from test_api import demo


class Socket:
    """A client's end of the channel: keeps what is sent to it."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []

    def send_sync(self, event: str, data: dict[str, Any], client: str) -> None:
        assert (event, client) == (EVENT, "client")
        self.got.append(json.loads(json.dumps(data, allow_nan=False)))


def live(period: float, shown: str | None = "12:5") -> tuple[Live, list[dict[str, Any]]]:
    """A channel whose clock moves by ``period`` a look, and what comes out of it."""
    socket, looks = Socket(), iter(range(10**6))
    place = Place(socket, "client", "prompt", shown, "workflow")
    return Live(place, 20, Pace(clock=lambda: next(looks) * period)), socket.got


def gentle(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A smooth denoiser, ``[W, B, ...]``."""
    level = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + level**2))


def run(told: Live, **options: Any) -> Report:
    """Twenty steps, told round by round."""
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    system = schemes.ddim(noise * schedules.SIGMA_MAX, schedules.normal(20))
    chosen = Options(window=6, **options)
    report = solve(system, gentle, chosen, callback=lambda p: told.round(p, chosen.tolerance)).report
    told.end(report)
    return report


def test_each_message_is_whole():
    told, got = live(2 * PERIOD)
    report = run(told)
    assert len(got) == report.rounds + 1
    for number, message in enumerate(got[:-1], start=1):
        assert (message["node"], message["workflow"], message["state"]) == ("12:5", "workflow", "running")
        assert (message["round"], message["rows"], message["steps"]) == (number, 20, 20)
        assert message["frozen"] == report.frozen_per_round[number - 1]
        assert message["jumps"] == report.frozen_per_round[:number]
        assert message["nfe"] == sum(report.rows_per_round[:number])
        assert message["first"] + len(message["levels"]) <= 20
    last = got[-1]
    assert (last["state"], last["plain"], last["frozen"], last["nfe"]) == ("done", False, 20, report.nfe)
    assert last["jumps"] == report.frozen_per_round


def test_at_most_ten_messages_a_second_and_always_the_last():
    told, got = live(PERIOD / 3.9)
    report = run(told, preset="exact")
    assert report.rounds > 8
    assert [m["round"] for m in got[:-1]] == list(range(1, report.rounds + 1, 4))
    assert got[-1]["state"] == "done"
    told, got = live(0.0)
    run(told)
    assert [m["state"] for m in got] == ["running", "done"]


class Time:
    """Seconds that pass when they are told to, and what is to happen then."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, call: Callable[[], None]) -> Any:
        entry = (self.now + seconds, call)
        self._due.append(entry)
        return type("Timer", (), {"cancel": lambda _: self._due.remove(entry) if entry in self._due else None})()

    def pass_by(self, seconds: float) -> None:
        end = self.now + seconds
        while ready := sorted((e for e in self._due if e[0] <= end), key=lambda e: e[0]):
            self._due.remove(ready[0])
            self.now = ready[0][0]
            ready[0][1]()
        self.now = end


class Stamped(Socket):
    """Notes when each message came."""

    def __init__(self, time: Time) -> None:
        super().__init__()
        self._time, self.times = time, []

    def send_sync(self, event: str, data: dict[str, Any], client: str) -> None:
        super().send_sync(event, data, client)
        self.times.append(self._time.now)


def moved(number: int, frozen: int, nfe: int, rows: int = 20) -> Progress:
    return Progress(number, frozen, rows, nfe, frozen, [0.1], torch.zeros(1))


def report_of(rounds: int, rows: int = 20) -> Report:
    report = Report("euler", rows, "quasi-newton", "balanced", 3e-3, rows, rounds=rounds, nfe=rows)
    report.frozen_per_round = [rows]
    return report


def test_many_short_runs_keep_to_ten_messages_a_second_together():
    """A list of latents, a run each, parallel and plain in turn; the last end comes however soon it follows."""
    for gap in (0.001, 0.012, 0.05, 0.3):
        time = Time()
        socket, pace = Stamped(time), Pace(clock=lambda: time.now, later=time.later)  # noqa: B023
        for number in range(64):
            told = Live(Place(socket, "client", "prompt", "5", None), number + 1, pace)
            if number % 2:
                told.sequential("because", None)
            else:
                told.round(moved(1, 9, 9), 1.0)
            time.pass_by(gap)
            told.end(report_of(2))
            time.pass_by(gap / 2)
        time.pass_by(1)
        times = socket.times
        assert max(sum(t <= u < t + 1 for u in times) for t in times) <= 10, gap
        assert (socket.got[-1]["state"], socket.got[-1]["steps"]) == ("done", 64)
        assert socket.got[-1] not in socket.got[:-1]
        assert len({m["steps"] for m in socket.got}) >= min(64 * gap * 1.5 / PERIOD / 2, 64)


def test_an_end_need_not_wait_for_the_round_before_it():
    time = Time()
    socket, pace = Stamped(time), Pace(clock=lambda: time.now, later=time.later)
    told = Live(Place(socket, "client", "prompt", "5", None), 20, pace)
    told.round(moved(1, 9, 9), 1.0)
    time.pass_by(0.001)
    told.end(report_of(2))
    assert [m["state"] for m in socket.got] == ["running", "done"]


def test_the_pace_is_that_of_a_client_and_a_node():
    assert pace_of("a", "1") is pace_of("a", "1")
    assert pace_of("a", "1") is not pace_of("b", "1") and pace_of("a", "1") is not pace_of("a", "2")


def test_another_plan_starts_the_strip_anew():
    told, got = live(2 * PERIOD)
    for progress in (moved(1, 1, 1), moved(2, 12, 3), moved(1, 5, 3), moved(2, 9, 11)):
        told.round(progress, 1.0)
    assert [m["jumps"] for m in got] == [[1], [1, 12], [5], [5, 9]]
    assert [m["start"] for m in got] == [0, 0, 2, 2]


def test_the_speed_so_far_is_told_once_a_row_is_timed():
    """Looks are two seconds apart: with half a second a row, six rows in the first two are worth three."""

    def speeds(row_seconds: float | None) -> list[float | None]:
        told, got = live(2.0)
        told.begin(row_seconds)
        for progress in (moved(1, 6, 6), moved(2, 8, 14), moved(3, 9, 15), moved(4, 17, 23)):
            told.round(progress, 1.0)
        return [m["speedup"] for m in got]

    assert speeds(None) == [None, None, 9 * 2 / 6, 17 * 2 / 8]  # the third round has one row
    assert speeds(0.5) == [6 * 0.5 / 2, 8 * 0.5 / 4, 9 * 0.5 / 6, round(17 * 0.5 / 8, 3)]
    told, got = live(2.0)
    told.begin(None)
    told.round(moved(1, 1, 1), 1.0)  # a first round is no measure
    told.round(moved(2, 4, 9), 1.0)
    assert [m["speedup"] for m in got] == [None, None]


def test_a_run_that_measured_no_single_row_keeps_the_speed_of_earlier_ones():
    told, got = live(2.0)
    told.begin(0.5)
    told.round(moved(1, 20, 20), 1.0)
    report = report_of(1)
    report.status, report.solver = "converged", "quasi-newton"
    told.end(report)
    assert [m["speedup"] for m in got] == [20 * 0.5 / 2, 20 * 0.5 / 4]


@pytest.mark.parametrize(("status", "solver"), [("max_rounds", "quasi-newton"), ("converged", "sequential")])
def test_sketches_and_plain_runs_have_no_speed(status, solver):
    told, got = live(2.0)
    told.begin(0.5)
    report = report_of(1)
    report.status, report.solver = status, solver
    told.end(report)
    assert got[-1]["speedup"] is None


def test_without_a_place_nothing_is_told():
    assert current_place() is None  # no server runs in this process
    told, got = live(PERIOD, shown=None)
    run(told)
    assert not told.shown and got == []
    run(Live(None, 20))


def test_a_sketch_an_interruption_and_a_doubt_are_told():
    told, got = live(2 * PERIOD)
    report = run(told, max_rounds=2)
    assert (got[-1]["state"], got[-1]["frozen"]) == ("sketch", report.frozen_per_round[-1])
    assert got[-1]["frozen"] < 20
    told, got = live(2 * PERIOD)
    run(told)
    told.end(None)
    assert (got[-1]["state"], got[-1]["frozen"], got[-1]["node"]) == ("stopped", 20, "12:5")
    report.doubt, report.status, report.predicted_speedup = "two pictures are near", "converged", 1.5
    told.end(report)
    assert (got[-1]["doubt"], got[-1]["speedup"]) == (report.doubt, 1.5)
    report.predicted_speedup = math.inf
    told.end(report)
    assert got[-1]["speedup"] is None


def test_rows_of_an_earlier_run_are_told_apart():
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    system = schemes.ddim(noise * schedules.SIGMA_MAX, schedules.normal(20))
    told, got = live(2 * PERIOD)
    sketch = solve(system, gentle, Options(window=6, max_rounds=3))
    rest = solve(system, gentle, Options(window=6), warm=sketch.trajectory, callback=lambda p: told.round(p, 3e-3))
    told.end(rest.report)
    assert [m["start"] for m in got] == [max(rest.report.frozen_per_round[0] - rest.report.rows_per_round[0], 0)] * len(
        got
    )
    assert got[-1]["start"] > 0 and got[-1]["warm"] == rest.report.warm is not None


def test_a_plain_run_tells_each_step_and_keeps_the_callback():
    told, got = live(2 * PERIOD)
    steps: list[int] = []
    callback = told.sequential("because", lambda step: steps.append(step["i"]))
    for i in range(20):
        callback({"i": i})
    assert steps == list(range(20))
    assert [m["frozen"] for m in got] == list(range(21))
    assert {m["reason"] for m in got} == {"because"} and {m["state"] for m in got} == {"sequential"}
    assert told.sequential("because", None) is None


def test_levels_are_logarithmic_and_bounded():
    assert levels([0.0, 1e-3, 1e-1, 1.0, 1e9, math.nan, math.inf], 1e-3) == [0, 0, 0.67, 1, 1, 1, 1]
    assert levels([0.0, 1e-6], 0.0) == [0, 0]


def connect(server: Server, client: str) -> Any:
    import websocket

    return websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={client}", timeout=ANSWER)


def heard(server: Server, graph: dict[str, Any], **extra: Any) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The progress messages of a run, and the lines of text shown on nodes."""
    import websocket

    socket, told, lines = connect(server, server.client), [], []
    try:
        body = {"prompt": graph, "client_id": server.client, "extra_data": extra}
        prompt = server.post("/prompt", body)["prompt_id"]
        while True:
            frame = socket.recv()
            if isinstance(frame, bytes):
                if frame[:4] == b"\x00\x00\x00\x03":
                    lines.append(frame[4:])
                continue
            message = json.loads(frame)
            if message["type"] == EVENT:
                told.append(message["data"])
            ended = message["type"] == "executing" and message["data"]["node"] is None
            if ended and message["data"]["prompt_id"] == prompt:
                socket.settimeout(0.5)  # the last message may have been held back
    except websocket.WebSocketTimeoutException:
        return told, lines
    finally:
        socket.close()


def test_the_client_that_queued_is_told_and_no_other(server):
    other = connect(server, "somebody-else")
    workflow = {"extra_pnginfo": {"workflow": {"id": "w-1", "nodes": []}}}
    told, lines = heard(server, demo(steps=60, seed=51, preset="strict"), **workflow)
    assert {m["node"] for m in told} == {"sampler"} and {m["workflow"] for m in told} == {"w-1"}
    assert (told[-1]["state"], told[-1]["frozen"], told[-1]["rows"]) == ("done", 60, 60)
    assert told[-1]["round"] < 60 and told[-1]["nfe"] >= 60
    assert lines == []  # the widget says it all
    other.settimeout(1)
    kinds = []
    try:
        while True:
            frame = other.recv()
            kinds += [json.loads(frame)["type"]] if isinstance(frame, str) else []
    except Exception as error:
        assert "timed out" in str(error)
    finally:
        other.close()
    assert "status" in kinds and EVENT not in kinds


def test_a_fallback_and_its_reason(server):
    told, _ = heard(server, demo("dpm_adaptive", preset="strict", seed=52, steps=4))
    assert told[0]["state"] == "sequential" and "dpm_adaptive" in told[0]["reason"]
    assert (told[-1]["state"], told[-1]["plain"]) == ("done", True)
    assert "dpm_adaptive" in told[-1]["reason"] and told[-1]["speedup"] is None


def test_the_sequential_solver_is_no_fallback(server):
    told, _ = heard(server, demo(solver="sequential", seed=53, steps=30))
    assert told[0]["state"] == "sequential"
    assert (told[-1]["state"], told[-1]["plain"], told[-1]["reason"]) == ("done", True, None)


def custom(seed: int, sampler: str) -> dict[str, Any]:
    """SamplerCustom on a Parallel Sampler, directly or behind a node that hands its SAMPLER on."""
    graph = demo(seed=seed, solver="quasi-newton", window=8)
    given = graph["sampler"]["inputs"]
    graph |= {
        "select": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "parallel": {"class_type": "ParaTAF_Sampler", "inputs": {
            "sampler": ["select", 0], "options": ["options", 0]}},
        "sigmas": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["model", 0], "scheduler": "normal", "steps": 16, "denoise": 1.0},
        },
        "sampler": {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": ["model", 0], "add_noise": True, "noise_seed": seed, "cfg": 3.0, "positive": ["yes", 0],
                "negative": ["no", 0], "sampler": [sampler, 0], "sigmas": ["sigmas", 0],
                "latent_image": given["latent_image"],
            },
        },
    }  # fmt: skip
    return graph


def test_a_parallel_sampler_shows_the_run_of_the_node_it_is_linked_to(server):
    told, lines = heard(server, custom(54, "parallel"))
    assert {m["node"] for m in told} == {"parallel"} and told[-1]["state"] == "done"
    assert lines == []


def test_where_no_node_can_be_told_a_line_of_text_is_left(server):
    graph = custom(55, "indirect")
    graph["indirect"] = {"class_type": "ComfySwitchNode", "inputs": {
        "switch": True, "on_false": ["select", 0], "on_true": ["parallel", 0]}}  # fmt: skip
    told, lines = heard(server, graph)
    assert told == []
    assert len(lines) == 1 and b"sampler" in lines[0] and b"rounds" in lines[0]


def test_the_first_round_is_announced(server):
    socket, kinds = connect(server, server.client), []
    try:
        prompt = server.queue(demo(seed=57, steps=24, preset="strict"))
        socket.settimeout(2)
        while True:
            frame = socket.recv()
            if isinstance(frame, str):
                message = json.loads(frame)
                kinds += [message["type"]] if message["type"] in (BEGUN, EVENT) else []
                if message["type"] == BEGUN:
                    assert message["data"]["node"] == "sampler" and message["data"]["steps"] == 24
    except Exception as error:
        assert "timed out" in str(error)
    finally:
        socket.close()
    server.wait(prompt)
    assert kinds.count(BEGUN) == 1 and EVENT in kinds


def test_an_interrupted_run_says_so(server):
    graph = demo(seed=56, steps=1000, preset="exact")
    socket = connect(server, server.client)
    told: list[dict[str, Any]] = []
    try:
        prompt = server.queue(graph)
        while not told or told[-1]["state"] == "running":
            frame = socket.recv()
            message = json.loads(frame) if isinstance(frame, str) else {"type": ""}
            if message["type"] == EVENT:
                told.append(message["data"])
                server.post("/interrupt", {})
    finally:
        socket.close()
    server.wait(prompt)
    assert told[-1]["state"] == "stopped" and 0 < told[-1]["frozen"] < 1000
