"""The automatic plan carried out: measure, choose, run, tell."""

from __future__ import annotations

from dataclasses import replace

from .collocation import by_collocation, refusal
from .collocation.again import obstacle as not_its_nodes
from .iterate import iterate
from .job import Job, Progress, Solution, predict_speedup
from .opening import Replan, Shared
from .options import TARGETS, Options
from .plan import Machine, Plan, Question, leaves_out
from .report import Report
from .resume import obstacle
from .timing import Timing
from .trajectory import Part
from .window import Pilot, Timed, row_by_row


def automatic(job: Job, machine: Machine) -> Solution:
    """Run ``job`` by the plan that its measurements suggest; its window is the most rows evaluated together.

    A run that finishes a capped one goes on by that one's plan.
    """
    options, job = job.options, _rising(job)
    if isinstance(options.window, int):
        machine = replace(machine, most=min(options.window, machine.most or options.window))
    question, why = _question(job)
    part = _sketch(job, question)
    if part is not None and part.solver == "collocation" and part.timing == Timing():
        # it stopped before there was a plan: to begin anew costs its row, as looking at it again would
        job, question, part = replace(job, warm=None), replace(question, warm=False), None
    shared = Shared(job.denoise, question, machine)
    plan = shared.opening() if part is None else _plan_of(part, question, machine)
    if part is not None and plan.solver == "collocation":
        shared.go_on(plan.window)
    while plan.solver == "collocation":
        chosen = replace(options, solver="collocation", window=plan.window)
        try:
            done = by_collocation(replace(job, denoise=shared, options=chosen), lambda: shared.window, machine.clock)
        except Replan as other:
            plan = other.plan
        else:
            _tell_calls(done.report, shared)
            if shared.plan is not None:
                _tell_plan(done.report, shared.plan, why, shared.used)
            elif part is not None:
                done.report.plan = f"{plan}, as the sketch had it; took {done.report.spent:.3g} s"
            return _leaving(done, shared.timing())
    return _by_window(job, question, shared, why)


def _question(job: Job) -> tuple[Question, str | None]:
    """What a plan is asked for, and why collocation is no candidate although a target or rows are given, or None."""
    system, options = job.system, job.options
    K = system.evaluations
    asks = options.target_db is not None or options.preset in TARGETS
    why = None if not asks else "tolerance 0 is asked for" if options.tolerance == 0 else refusal(system)
    target = (options.target or 0.0) if asks and why is None else None
    if options.rows is not None and not asks:
        why = "no target in dB is asked for, without which rows are of no use"
    question = Question(K, options.tolerance, target, options.rows, job.warm is not None, len(system.breaks))
    if target is not None and not leaves_out(question):
        question, why = replace(question, target=None), f"it takes as many rows as the run has, {K}"
    return question, why


def _sketch(job: Job, question: Question) -> Part | None:
    """What a capped run of this system left, if it chose its window itself and can be taken over; else None."""
    part = None if job.warm is None else job.warm.part
    if part is None or part.timing is None:
        return None
    if part.solver == "collocation":
        return part if question.target is not None and not_its_nodes(job.system, part) is None else None
    return part if _goes_on(job) else None


def _goes_on(job: Job) -> bool:
    """Whether the quasi-Newton run takes over the final rows of a capped one."""
    part = None if job.warm is None else job.warm.part
    return part is not None and obstacle(job.system, _windowed(job.options), part) is None


def _plan_of(part: Part, question: Question, machine: Machine) -> Plan:
    """The plan of the capped run that left ``part``."""
    if part.solver != "collocation" or part.timing is None:
        return Plan("sequential", 1, None, 0.0, 0.0)
    window = part.timing.window
    return Plan("collocation", min(window, machine.most or window, question.total), question.rows, 0.0, 0.0)


def _windowed(options: Options, alone: bool = False) -> Options:
    """Options of the quasi-Newton run; with each row evaluated ``alone`` it is the plain sampler to the bit."""
    tol = options.tol if options.target_db is None else options.tolerance
    window = 1 if alone else "auto"
    return replace(options, solver="quasi-newton", window=window, rows=None, target_db=None, tol=tol)


def _rising(job: Job) -> Job:
    """``job`` whose callback is told of a round once, though a change of plan begins anew."""
    callback, told = job.callback, 0
    if callback is None:
        return job

    def tell(progress: Progress) -> None:
        nonlocal told
        if progress.round > told:
            told = progress.round
            callback(progress)

    return replace(job, callback=tell)


def _by_window(job: Job, question: Question, shared: Shared, why: str | None) -> Solution:
    """The run by the quasi-Newton solver or, at window 1, one row after the other."""
    timed = Timed(shared, shared.machine.clock, accelerator=job.system.S.device.type != "cpu")
    machine, asked = shared.machine, job.options.window if isinstance(job.options.window, int) else None
    pilot = Pilot(question, machine, timed, shared, asked)
    # the rows of a capped run, in half precision, are none of the plain sampler's
    alone = machine.most == 1 or (row_by_row(question, machine) is not None and not _goes_on(job))
    done = iterate(replace(job, denoise=timed, options=_windowed(job.options, alone)), pilot, machine.clock)
    if max(done.report.window_per_round) == 1:
        done.report.solver, done.report.predicted_speedup = "sequential", None
    _tell_calls(done.report, shared)
    if pilot.plan is not None:
        _tell_plan(done.report, pilot.plan, why, _widest(done.report))
    else:
        done.report.plan = _without_collocation(done.report.window_reason, why)
    if job.options.tol is None and job.options.target_db is not None:
        done.report.preset = job.options.preset
        if done.report.solver != "sequential" and done.report.tolerance > 0:
            how = f"; towards {job.options.target_db:g} dB by a tolerance of {done.report.tolerance:.2g}"
            done.report.plan = f"{done.report.plan}{how}"
    return done


def _leaving(done: Solution, timing: Timing) -> Solution:
    """``done``, which tells a run that finishes it the plan."""
    kept = done.trajectory
    if kept is None or kept.part is None:
        return done
    return replace(done, trajectory=replace(kept, part=replace(kept.part, timing=timing)))


def _tell_calls(report: Report, shared: Shared) -> None:
    """What was evaluated and measured before the plan, and which rounds tell nothing."""
    report.probe_nfe += shared.lost
    if shared.recalled:
        report.opening, report.recalled = shared.calls, shared.recalled
        before = sum(seconds for _, seconds in shared.calls)
        report.seconds += before
        report.model_seconds += before
        predict_speedup(report)


def _widest(report: Report) -> int:
    """The widest window of a run's second half."""
    return max(report.window_per_round[len(report.window_per_round) // 2 :])


def _tell_plan(report: Report, plan: Plan, why: str | None, later: int) -> None:
    """The automatic plan, its prediction and its outcome, in words; ``later`` is the window that the run came to."""
    report.predicted_seconds = plan.seconds
    begun = "row by row at first" if plan.solver == "sequential" and later > 1 else plan
    words = f"{begun}: predicted {plan.seconds:.3g} s, the plain sampler {plan.plain:.3g} s"
    if later != plan.window and (later > 1 or plan.solver == "collocation"):
        words += f"; later window {later}"
    words += f"; took {report.spent:.3g} s"
    report.plan = _without_collocation(words, why)


def _without_collocation(words: str, why: str | None) -> str:
    """``words`` and why collocation was no candidate although a target was asked for, if there is a reason."""
    return words if why is None else f"{words}; no collocation, as {why}"
