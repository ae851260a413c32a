"""What a run that was read off comes to: calls of several noise levels, calls of one each, or nothing but the plain
sampler. What is not known is tried on the model, with the artist's own patches."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import comfy.model_management
from torch import Tensor

from ...paratafusion_core.errors import NotFinite
from ...paratafusion_core.plan import WORTH, Question, collocation_work
from .batched import BatchedModel
from .guards import Trouble
from .latency import Known
from .probing import MIXES, PROBED_ALONE, probe, probe_alone, probe_two
from .problem import Problem
from .randomness import same_random_numbers
from .settings import Settings

#: Runs of a graph within which what was tried once must have paid off.
_RUNS = 3


class Unfit(Exception):
    """This run cannot be parallel; the message is the reason.

    Attributes:
        alone: whether it still can in calls of one noise level each.
        suspect: what is to remember the reason, if the plain sampler shows that the model itself is not at fault.
    """

    def __init__(self, why: str, alone: bool = False, suspect: Known | None = None) -> None:
        super().__init__(why)
        self.alone, self.suspect = alone, suspect


@dataclass
class Trial:
    """A run whose graph is not known to keep pictures and calls apart.

    Attributes:
        known: of runs of this kind. x: the start. sigmas: ``[K]`` of its evaluations. whole: tells runs of these levels
            before they are read off. remembers: whether calls of one level each may depend on each other.
        rows, seconds: what trying it has taken so far.
    """

    known: Known
    x: Tensor
    sigmas: Tensor
    whole: Hashable
    remembers: bool
    rows: int = 0
    seconds: float = 0.0

    @property
    def levels(self) -> tuple[float, ...]:
        """``sigmas`` as ``known`` remembers them."""
        return tuple(self.sigmas.tolist())


def fitting(
    problem_for: Callable[[Settings], Problem], settings: Settings, trouble: Trouble | None, trial: Trial | None
) -> tuple[Problem, str | None]:
    """The problem to solve, and why its calls are of one noise level each; None where they need not be.

    Args:
        problem_for: what the run comes to with these settings. trouble: what is known against several levels in a call.
        trial: None where nothing else is in doubt.

    Raises:
        Unfit: nothing serves this run, or nothing that leaves evaluations out where calls are of one level each.
        CaptureError: it cannot be stepped with one output a row. InterruptProcessingException: the user has cancelled.
    """
    why = None if trouble is None else trouble.why
    if why is None:
        problem = problem_for(settings)
        try:
            if trial is not None and problem.several:
                _probe(trial, problem.batched)
            elif trial is not None and trial.remembers and problem.collocates:
                _probe_alone(trial, problem.batched)
            return problem, None
        except Unfit as unfit:
            if not unfit.alone:
                raise
            why = str(unfit)
    alone = settings.one_by_one
    if alone is None:
        raise Unfit(why)
    problem = problem_for(alone)
    if not problem.collocates:
        raise Unfit(f"{why}; collocation, which could go one by one, does not serve it, as {problem.refusal}")
    if settings.solver == "auto" and not _leaves_out(problem, trial):
        raise Unfit(why)
    if trial is not None and trial.remembers:
        _probe_alone(trial, problem.batched)
    return problem, why


def _leaves_out(problem: Problem, trial: Trial | None) -> bool:
    """Whether so few evaluations are expected that this is worth it.

    Those of :func:`_probe_alone`, made once, must have paid off within ``_RUNS`` runs: artists draw a graph again.
    """
    system, options = problem.system, problem.options
    total, breaks = system.evaluations, len(system.breaks)
    question = Question(total, options.tolerance, options.target, options.rows, breaks=breaks)
    tried = trial is None or not trial.remembers or trial.levels in trial.known.steady
    return collocation_work(question, 1).rows + (0 if tried else PROBED_ALONE / _RUNS) < WORTH * total


def _look(trial: Trial, batched: BatchedModel, look: Callable[[], str | None], several: bool) -> str | None:
    """What ``look`` at the model has found; where no such run follows, what patches remember is put back.

    Raises:
        Unfit: the model fails. NotFinite: it returned NaN or infinity. InterruptProcessingException: the user has
            cancelled.
    """
    put_back, began, before = batched.remembered(), time.perf_counter(), batched.rows
    try:
        with same_random_numbers(trial.x, *batched.patches):
            found = look()
    except comfy.model_management.InterruptProcessingException:
        raise
    except NotFinite:
        put_back()
        raise
    except Exception as error:  # a model may refuse in any way; the plain sampler shows whether it is at fault
        put_back()
        does = "does not take several noise levels at once" if several else "fails when steps are left out"
        raise Unfit(f"the model {does} ({type(error).__name__}: {error})", alone=several) from None
    finally:
        trial.seconds += time.perf_counter() - began
        trial.rows += batched.rows - before
    if found is not None or (several and batched.largest < 2):
        put_back()
    return found


def _probe(trial: Trial, batched: BatchedModel) -> None:
    """Try the model with several noise levels at once, unless that is known.

    Raises:
        Unfit: it mixes them, or does not take them (some networks refuse more than one picture).
        InterruptProcessingException: the user has cancelled.
    """
    known, x, sigmas = trial.known, trial.x, trial.sigmas
    if max(map(len, batched.groups(sigmas))) < 2:
        raise Unfit("no two of its evaluations have the same prompts, ControlNets and patches", alone=True)
    levels = trial.levels
    if known.trouble is None and known.mixes is None and levels not in known.apart:
        try:
            found = _look(trial, batched, lambda: _together(batched, x, sigmas), several=True)
        except NotFinite:  # the solver will meet it, too; nothing is known
            return
        if found == MIXES:
            known.mixes = found
        elif found is not None:
            known.trouble = found
        elif batched.largest < 2:
            raise Unfit("two noise levels at once do not fit into memory", alone=True)
        else:
            known.remember(known.apart, levels)
    if known.trouble is not None:
        raise Unfit(known.trouble)
    if known.mixes is not None:
        raise Unfit(known.mixes, alone=True)
    known.remember(known.passed, trial.whole)


def _together(batched: BatchedModel, x: Tensor, sigmas: Tensor) -> str | None:
    """Probe the largest group of levels that may share a call; where patches have told their bounds the others, too."""
    most, *others = sorted(batched.groups(sigmas), key=len, reverse=True)
    found = probe(batched, _at(x, sigmas, most[0]), sigmas[most])
    for rows in others if batched.bounds else ():
        if found is None and len(rows) > 1:
            found = probe_two(batched, _at(x, sigmas, rows[0]), sigmas[rows])
    return found


def _at(x: Tensor, sigmas: Tensor, row: int) -> Tensor:
    """The start ``x`` with as much noise as at ``row``, or its own."""
    share = float(sigmas[row] / sigmas[0]) if sigmas[0] > 0 else 1.0
    return x * share if share < 1 else x


def _probe_alone(trial: Trial, batched: BatchedModel) -> None:
    """Try whether calls of one noise level depend on those before them, unless that is known.

    Raises:
        Unfit: they do, or the model fails. InterruptProcessingException: the user has cancelled.
    """
    known, x, sigmas, levels = trial.known, trial.x, trial.sigmas, trial.levels
    if known.trouble is None and levels not in known.steady:
        try:
            known.trouble = _look(trial, batched, lambda: probe_alone(batched, x, sigmas), several=False)
        except NotFinite:  # as above
            return
        if known.trouble is None:
            known.remember(known.steady, levels)
    if known.trouble is not None:
        raise Unfit(known.trouble)
