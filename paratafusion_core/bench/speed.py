"""Suite ``speed``: sequential against parallel in seconds, on networks of SD 1.5 and DiT-XL/2 size.

It is a replay. The networks have random weights and make no picture, so the rounds are those which the trained demo
network needed: its run, embedded into a latent of the large network's shape, is recorded on the same device, and the
same engine then goes through the same rounds, its ``denoise`` calling the large network on the states of the round and
returning what the demo network returned. Model calls, batch sizes and the engine's work are real, all in one process.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..cli.sample import Task
from ..denoisers import Denoise
from ..devices import check_device, send
from ..errors import check_count
from ..files import check_folder, write_text
from ..options import Options
from ..plan import Latency, Work, fit
from ..report import fidelity
from ..solve import solve
from ..system import System
from . import hardware, speed_table
from .journal import Journal, Row
from .networks import LARGE, SMALL, Network, Spec, build, require_diffusers, stream
from .overhead import measure_overhead
from .predict import Plan, Run, best_plans
from .problems import Setting, make_task

SETTING = Setting("demo", "ddim", "normal", 50, 4.0)
#: Plans that are replayed.
PLANS = (
    *(Plan("quasi-newton", window) for window in (4, 8, 16, "full")),
    *(Plan(solver, window) for solver in ("parataa", "picard") for window in (8, 16)),
    *(Plan("collocation", 1, rows) for rows in (12, 20)),
    Plan("collocation", 4),
)
#: Plans that only the prediction weighs besides.
MORE = (
    *(Plan("quasi-newton", window) for window in (2, 6, 12)),
    *(Plan("collocation", 1, rows) for rows in (8, 10, 14, 16)),
    Plan("collocation", 2),
)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        sizes: batches of the latency curve.
        repeats, warmup, budget: of :func:`hardware.clock`.
    """

    sizes: tuple[int, ...]
    repeats: int
    warmup: int
    budget: float


FULL = Effort((1, 2, 4, 8, 16, 32, 64), repeats=5, warmup=2, budget=5.0)
BRIEF = Effort((1, 2, 4, 8, 16), repeats=3, warmup=1, budget=3.0)


class Strayed(Exception):
    """A replay asked for other rows than its recording holds."""


@dataclass(frozen=True)
class Recording:
    """A run of the demo network: the embedded ``system``, its options, and the D of each round ``[n, 1, *latent]``."""

    system: System
    options: Options
    rounds: tuple[Tensor, ...]

    @property
    def rows_per_round(self) -> tuple[int, ...]:
        return tuple(len(D) for D in self.rounds)


def widen(x: Tensor, latent: Sequence[int]) -> Tensor:
    """States ``[n, B, ...]`` repeated as often as ``[n, B, *latent]`` has room for, the rest 0."""
    flat = x.flatten(2)
    times, size = math.prod(latent) // flat.shape[2], math.prod(latent)
    wide = flat.new_zeros(*flat.shape[:2], size)
    wide[..., : times * flat.shape[2]] = flat.repeat(1, 1, times)
    return wide.reshape(*flat.shape[:2], *latent)


def record(task: Task, plan: Plan, latent: Sequence[int]) -> Recording:
    """Run ``plan`` on ``task`` embedded into ``latent`` and keep what ``denoise`` returned.

    Repeating a state keeps all ratios of lengths; the zeros lower every rms by one factor, which the tolerance takes
    up: the rounds are those of the task itself, to rounding.

    Raises:
        ValueError: ``latent`` has no room for a state.
    """
    shape = task.system.S.shape[2:]
    size, room = math.prod(shape), math.prod(latent)
    if room < size:
        raise ValueError(f"latent is {list(latent)}; shapes of at least {size} numbers are allowed")
    rounds: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        small = x.flatten(2)[..., :size].reshape(*x.shape[:2], *shape)
        rounds.append(widen(task.denoise(small, sigma), latent))
        return rounds[-1].clone()

    options = plan.options(task.data_rms)
    options = replace(options, tol=options.tolerance * math.sqrt(room // size * size / room))
    system = replace(task.system, S=widen(task.system.S, latent))
    solve(system, denoise, options, keep_trajectory=False)
    return Recording(system, options, tuple(rounds))


def replay(recording: Recording, model: Denoise | None) -> None:
    """The recorded rounds once more, ``model`` called on each round's states; None leaves the engine alone.

    Raises:
        Strayed: the engine took another way than it did in the recording.
    """
    rounds: Iterator[Tensor] = iter(recording.rounds)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        D = next(rounds, None)
        if D is None or len(D) != len(x):
            raise Strayed
        if model is not None:
            model(x, sigma)
        return D

    solve(recording.system, denoise, recording.options, keep_trajectory=False)
    if next(rounds, None) is not None:
        raise Strayed


def plain(system: System, model: Denoise) -> Tensor:
    """DDIM step by step, with nothing but the model and one blend a step: the time that parallel has to beat."""
    x, sigma = system.S[0], send(system.sigmas, system.S)
    levels = [*system.sigmas.tolist(), 0.0]
    with torch.no_grad():
        for k in range(len(sigma)):
            D = model(x[None], sigma[k : k + 1])[0]
            x = torch.lerp(D, x, levels[k + 1] / levels[k])
    return x


def demo_runs(plans: Sequence[Plan], seed: int, device: torch.device) -> Iterator[Run]:
    """Every plan on the demo network, with its PSNR against the sequential picture."""
    task = make_task(SETTING, seed, str(device))
    reference = solve(task.system, task.denoise, Options("sequential"), keep_trajectory=False).x
    for plan in plans:
        done = solve(task.system, task.denoise, plan.options(task.data_rms), keep_trajectory=False)
        psnr = fidelity(done.x, reference, task.peak).psnr_db
        yield Run(plan, seed, done.report.sequential_nfe, tuple(done.report.rows_per_round), psnr)


def typical(runs: Sequence[Run], plan: Plan) -> Run:
    """The plan's run of median nfe."""
    own = sorted((run for run in runs if run.plan == plan), key=lambda run: (run.nfe, len(run.rows_per_round)))
    return own[(len(own) - 1) // 2]


def latency_curve(spec: Spec, network: Network, device: torch.device, effort: Effort) -> list[tuple[int, float]]:
    """(b, seconds of a batch of b rows), up to the first that does not fit into memory."""
    curve: list[tuple[int, float]] = []
    for rows in effort.sizes:
        work = partial(_time_batch, spec, network, rows, device, effort)
        seconds = hardware.attempt(work, device)
        if seconds is None:
            break
        curve.append((rows, seconds))
    return curve


def _time_batch(spec: Spec, network: Network, rows: int, device: torch.device, effort: Effort) -> float:
    x, sigma = torch.randn(rows, 1, *spec.latent).to(device), torch.ones(rows, device=device)
    with torch.no_grad():
        call = partial(network.denoise, x, sigma)
        return hardware.clock(call, device, effort.repeats, effort.warmup, effort.budget)


@dataclass(frozen=True)
class Tape:
    """A recording to replay, the seed it is of, and the seconds that the engine alone takes for it."""

    recording: Recording
    seed: int
    engine_seconds: float | None


class Bench:
    """One device's measurements, written down as they are made."""

    def __init__(self, device: torch.device, effort: Effort, runs: Sequence[Run], journal: Journal) -> None:
        self.device, self.effort, self.runs, self.journal = device, effort, runs, journal
        self.plans = [plan for plan in PLANS if any(run.plan == plan for run in runs)]

    def network(self, spec: Spec, bar: tqdm) -> None:
        """A network with resident weights, then with streamed ones."""
        network = hardware.attempt(partial(build, spec, self.device), self.device)
        if network is None:
            failed = {"network": spec.name, "weights": "resident", "failed": "out of memory"}
            self.journal.add({"kind": "latency", **failed})
            return
        tapes = {plan: self.tape(spec, plan) for plan in self.plans}
        self.weights(spec, network, tapes, "resident", bar)
        stream(network.module, self.device)
        hardware.release(self.device)
        self.weights(spec, network, tapes, "streamed", bar)

    def tape(self, spec: Spec, plan: Plan) -> Tape:
        """Record the plan's run of median nfe on states of the network's shape."""
        seed = typical(self.runs, plan).seed
        recording = record(make_task(SETTING, seed, str(self.device)), plan, spec.latent)
        return Tape(recording, seed, self.clock(partial(replay, recording, None))[0])

    def weights(self, spec: Spec, network: Network, tapes: dict[Plan, Tape], weights: str, bar: tqdm) -> None:
        """Latency curve, plain sampler and replays of one network."""
        base: Row = {"network": spec.name, "weights": weights}
        held = hardware.memory(self.device)
        curve = latency_curve(spec, network, self.device, self.effort)
        latency = fit(dict(curve))
        self.journal.add(
            {"kind": "latency", **base, "parameters": network.parameters, "bytes": network.bytes}
            | {"dtype": str(network.dtype).removeprefix("torch."), "latent": list(spec.latent)}
            | {"sizes": list(self.effort.sizes), "curve": curve, "held_bytes": held}
            | {"w": latency.w if latency else None, "c": latency.c if latency else None}
            | {"failed": None if len(curve) == len(self.effort.sizes) else "out of memory"}
        )
        bar.update()
        system = next(iter(tapes.values())).recording.system
        sequential, why = self.clock(partial(plain, system, network.denoise))
        for plan, tape in tapes.items():
            seconds = None
            if sequential is not None:
                seconds, why = self.clock(partial(replay, tape.recording, network.denoise))
            row = _row(plan, tape, latency, sequential, seconds)
            self.journal.add({"kind": "replay", **base, **row, "failed": why})
            bar.update()
        again = self.clock(partial(plain, system, network.denoise))[0] if sequential is not None else None
        self.journal.add({"kind": "drift", **base, "before": sequential, "after": again})

    def clock(self, call: Callable[[], Any]) -> tuple[float | None, str | None]:
        """Seconds, or why there are none."""
        effort = self.effort
        work = partial(hardware.clock, call, self.device, min(effort.repeats, 3), 1, effort.budget)
        try:
            seconds = hardware.attempt(work, self.device)
        except Strayed:
            return None, "the rounds differ from the recording's"
        return seconds, None if seconds is not None else "out of memory"


def _row(plan: Plan, tape: Tape, latency: Latency | None, sequential: float | None, seconds: float | None) -> Row:
    rows, K = tape.recording.rows_per_round, tape.recording.system.evaluations
    return {
        "plan": str(plan),
        "seed": tape.seed,
        "rounds": len(rows),
        "nfe": sum(rows),
        "sequential_nfe": K,
        "rows_per_round": list(rows),
        "sequential_seconds": sequential,
        "seconds": seconds,
        "engine_seconds": tape.engine_seconds,
        "predicted_speedup": K * latency(1) / latency.total(Work(len(rows), sum(rows))) if latency else None,
        "measured_speedup": sequential / seconds if sequential and seconds else None,
    }


def run(arguments: argparse.Namespace) -> None:
    """The suite: networks of full size on an accelerator, small ones of the same classes on a CPU.

    Raises:
        ValueError: the device is not there, diffusers is not installed, or an option belongs to another suite.
    """
    device = torch.device(check_device(arguments.device))
    seeds = check_count("seeds", 16 if arguments.seeds is None else arguments.seeds)
    for name in ("resume", "model"):
        if getattr(arguments, name, None) is not None:
            raise ValueError(f"{name} is {getattr(arguments, name)!r}; suite speed has no use for it, leave it out")
    out = check_folder(arguments.out)
    require_diffusers()
    specs, effort = (SMALL, BRIEF) if device.type == "cpu" else (LARGE, FULL)
    rows = measure(device, specs, effort, seeds, Journal(out / "speed.jsonl", ("kind",)))
    text = speed_table.markdown(rows)
    write_text(out / "speed.md", text + "\n")
    print("\n".join(map(json.dumps, rows)) if arguments.json else text)


def measure(
    device: torch.device,
    specs: Sequence[Spec],
    effort: Effort,
    seeds: int,
    journal: Journal,
    plans: Sequence[Plan] = (),
) -> list[Row]:
    """All measurements; ``plans`` are those of this version's solvers unless given. Returns the journal's rows."""
    plans = plans or [*PLANS, *MORE]
    journal.add({"kind": "hardware", **hardware.describe(device)})
    journal.add({"kind": "overhead", **measure_overhead((4, 64, 64), 8, device=device)})
    replayed = sum(plan in PLANS for plan in plans)
    with tqdm(total=seeds + 2 * len(specs) * (1 + replayed), unit="step") as bar:
        runs = list[Run]()
        for seed in range(seeds):
            for one in demo_runs(plans, seed, device):
                runs.append(one)
                journal.add(
                    {"kind": "demo", "plan": str(one.plan), "seed": one.seed, "sequential_nfe": one.sequential_nfe}
                    | {"rows_per_round": list(one.rows_per_round), "psnr_db": one.psnr_db}
                )
            bar.update()
        for choice in best_plans(runs):
            best = {"plan": str(choice.plan) if choice.plan else None}
            journal.add({"kind": "predicted", **vars(choice), **best, "seeds": seeds})
        bench = Bench(device, effort, runs, journal)
        for spec in specs:
            bench.network(spec, bar)
            hardware.release(device)
    return journal.rows
