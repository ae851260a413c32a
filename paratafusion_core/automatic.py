"""The automatic plan carried out: measure, choose, run, tell."""

from __future__ import annotations

from dataclasses import replace

from .collocation import by_collocation, refusal
from .iterate import iterate
from .job import Job, Solution
from .options import TARGETS
from .plan import WORTH, Machine, Plan, Question, collocation_work
from .report import Report
from .window import Asked, Pilot, Replan, Shared, Timed


def automatic(job: Job, machine: Machine) -> Solution:
    """Run ``job`` by the plan that its measurements suggest; its window is the most rows evaluated together."""
    system, options = job.system, job.options
    K = system.evaluations
    if isinstance(options.window, int):
        machine = replace(machine, most=min(options.window, machine.most or options.window))
    asks = options.target_db is not None or options.preset in TARGETS
    why = None if not asks else "tolerance 0 is asked for" if options.tolerance == 0 else refusal(system)
    target = (options.target or 0.0) if asks and why is None else None
    question = Question(K, options.tolerance, target, options.rows, job.warm is not None)
    if target is not None and collocation_work(question, 1).rows >= WORTH * K:
        question, why = replace(question, target=None), f"it takes as many rows as the run has, {K}"
    shared = Shared(job.denoise, question, machine)
    plan = shared.opening()
    while plan.solver == "collocation":
        chosen = replace(options, solver="collocation", window=plan.window)
        try:
            done = by_collocation(replace(job, denoise=shared, options=chosen))
        except Replan as other:
            plan = other.plan
        else:
            if shared.plan is not None:
                _tell_plan(done.report, shared.plan, why)
            done.report.probe_nfe = done.report.probe_nfe + shared.lost
            return done
    timed = Timed(shared, machine.clock)
    pilot = Pilot(question, shared.machine, timed if system.S.device.type == "cpu" else None)
    windows = pilot if options.max_rounds is None else Asked("auto", K)
    chosen = replace(options, solver="quasi-newton", window="auto", rows=None, target_db=None)
    done = iterate(replace(job, denoise=timed, options=chosen), windows, machine.clock)
    if max(done.report.window_per_round) == 1 < K:
        done.report.solver = "sequential"
    if pilot.plan is not None:
        _tell_plan(done.report, pilot.plan, why)
    else:
        done.report.plan = done.report.window_reason
    done.report.probe_nfe = shared.lost
    return done


def _tell_plan(report: Report, plan: Plan, why: str | None) -> None:
    """The automatic plan, its prediction and its outcome, in words."""
    report.predicted_seconds = plan.seconds
    words = f"{plan}: predicted {plan.seconds:.3g} s, the plain sampler {plan.plain:.3g} s"
    widest = max(report.window_per_round[len(report.window_per_round) // 2 :])
    if plan.solver != "collocation" and widest not in (plan.window, 1) and report.frozen_per_round:
        words += f"; later window {widest}"
    words += f"; took {sum(report.seconds_per_round):.3g} s"
    report.plan = words if why is None else f"{words}; no collocation, as {why}"
