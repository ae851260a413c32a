"""``paratafusion sample``: one run with every option, also the ground that demo and bench stand on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import schemes
from ..demo import model
from ..demo.mixture import Mixture
from ..denoisers import Denoise
from ..errors import check_count, check_real
from ..files import check_folder, write_json, write_tensors
from ..noise import draw
from ..options import Options
from ..plots import picture, save_png
from ..report import in_decibels
from ..schedules import SCHEDULES
from ..solve import Progress, Solution, Status, solve
from ..system import System

#: Each from (x0, sigmas, noise [K, B, ...], flow).
SAMPLERS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], System]] = {
    "ddim": lambda x, s, n, flow: schemes.ddim(x, s, flow=flow),
    "ddpm": lambda x, s, n, flow: schemes.ddpm(x, s, noise=n, flow=flow),
    "euler": lambda x, s, n, flow: schemes.euler(x, s, flow=flow),
    "dpmpp_2m": lambda x, s, n, flow: schemes.dpmpp_2m(x, s, flow=flow),
    "dpmpp_2m_sde": lambda x, s, n, flow: schemes.dpmpp_2m_sde(x, s, noise=n, flow=flow),
}


@dataclass(frozen=True)
class Task:
    """A picture to draw: ``system`` and ``denoise`` for the engine, and what its figures refer to.

    Attributes:
        peak: of PSNR; None for the reference's own range. data_rms: of clean data. flow: kind of states.
    """

    system: System
    denoise: Denoise
    peak: float | None
    data_rms: float
    flow: bool


def make_task(
    prompt: str,
    sampler: str = "ddim",
    schedule: str = "normal",
    steps: int = 50,
    cfg: float = 4.0,
    seed: int = 0,
    kind: str = "demo",
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    network: model.DemoNet | None = None,
) -> Task:
    """Set a run up; the demo network is loaded unless ``network`` is given.

    Raises:
        ValueError: an input is out of bounds.
    """
    sigmas, flow = SCHEDULES[schedule](steps), schedule == "flow"
    check_count("batch", batch)
    if kind == "mixture":
        mixture = Mixture.make()
        if flow:
            raise ValueError("schedule is 'flow'; normal, karras or uniform is allowed for model mixture")
        denoise, shape, peak, rms = (
            mixture.denoiser(mixture.label_of(prompt), cfg),
            mixture.shape,
            None,
            mixture.data_rms,
        )
    else:
        network = network or model.load(dtype=dtype)
        denoise, shape, peak, rms = model.denoiser(network, prompt, cfg, batch, flow), model.SHAPE, 2.0, model.DATA_RMS
    start, noise = draw(seed, batch, shape, steps)
    x0 = start.to(dtype) * (1.0 if flow else float(sigmas[0]))
    return Task(SAMPLERS[sampler](x0, sigmas, noise.to(dtype), flow), denoise, peak, rms, flow)


def play(task: Task, options: Options, label: str, quiet: bool = False, **more: Any) -> Solution:
    """Solve with a progress bar (on standard error) that counts final rows."""
    options = replace(options, flow=task.flow, data_rms=task.data_rms, peak=task.peak)
    inner = more.pop("callback", None)
    with tqdm(total=task.system.evaluations, desc=label, unit="row", disable=quiet, leave=False) as bar:

        def tick(progress: Progress) -> None:
            bar.set_postfix(rounds=progress.round, nfe=progress.nfe, refresh=False)
            bar.update(progress.frozen - bar.n)
            if inner is not None:
                inner(progress)

        return solve(task.system, task.denoise, options, callback=tick, **more)


def kernel_floor(task: Task, reference: Tensor, rows: int) -> float:
    """What the model's kernels alone change: sequential, each row evaluated within a batch of ``rows`` copies.

    The largest difference from ``reference``, which evaluated one row a call.
    """

    def padded(x: Tensor, sigma: Tensor) -> Tensor:
        return task.denoise(x.expand(rows, *x.shape[1:]).contiguous(), sigma.expand(rows))[:1]

    options = Options(solver="sequential", flow=task.flow)
    result = solve(task.system, padded, options, keep_trajectory=False).x
    return float((result - reference).abs().max())


def run(arguments: argparse.Namespace) -> None:
    """The command. Raises ValueError on bad input, before anything is written."""
    out = check_folder(arguments.out)
    if arguments.target is not None:
        check_real("target", arguments.target, above=0.0)
    options = Options(
        solver=arguments.solver,
        preset=arguments.preset,
        tol=arguments.tol,
        window=8 if arguments.window is None else arguments.window,
        history=arguments.history,
        order=arguments.order,
        max_rounds=arguments.max_rounds,
        rows=arguments.rows,
        target_db=arguments.target,
    )
    if arguments.window is None and options.solver == "collocation":
        options = replace(options, window=1)  # where few rows do most, and the estimate is surest
    task = make_task(
        arguments.prompt,
        arguments.sampler,
        arguments.schedule,
        arguments.steps,
        arguments.cfg,
        arguments.seed,
        arguments.model,
        getattr(torch, arguments.dtype),
        arguments.batch,
    )
    if arguments.compare:  # the first call of all is late, whatever runs first
        x = task.system.S[:1]
        task.denoise(x.clone(), task.system.sigmas[:1].to(x))
    solution = play(task, options, arguments.solver)
    report = solution.report
    if arguments.compare:
        reference = play(task, Options(solver="sequential"), "sequential")
        report.compare(solution.x, reference.x, task.peak)
        if solution.status is Status.CONVERGED:  # a sketch is fast, and no such picture
            report.measured_speedup = reference.report.seconds / max(report.seconds, 1e-9)
        widest = max(report.window_per_round)
        report.kernel_floor = kernel_floor(task, reference.x, widest)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / "result.safetensors", {"samples": solution.x}, {"sampler": report.sampler})
    save_png(out / "result.png", picture(solution.x))
    write_json(out / "report.json", report.to_dict())
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        _tell(solution, arguments.out)


def _tell(solution: Solution, out: str) -> None:
    report = solution.report
    line = f"{report.sampler}: {report.rounds} rounds, {report.nfe} rows evaluated ({report.sequential_nfe} one by one)"
    print(f"{line}, {report.seconds:.2f} s, {report.status}")
    if report.estimated_db is not None:
        asked = "" if report.target_db is None else f", of {report.target_db:g} dB asked for"
        print(f"estimated fidelity: {report.estimated_db:.1f} dB{asked}")
    if report.doubt is not None:
        print(f"doubt: {report.doubt}")
    if report.plan is not None:
        print(f"plan: {report.plan}")
    if report.measured_speedup is not None:
        print(f"{report.measured_speedup:.2f} times as fast as one by one (measured, this run)")
    if report.max_abs is not None and report.psnr_db is not None:
        near = ("" if report.max_abs == 0 else "PSNR ") + in_decibels(report.psnr_db)
        kernels = f"kernels alone {report.kernel_floor:.2e}"
        print(f"against sequential: {near}, largest difference {report.max_abs:.2e} ({kernels})")
    print(f"written to {out}: result.png, result.safetensors, report.json")
