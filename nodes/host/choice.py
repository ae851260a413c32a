"""Whether the host's own sampler is the plan: by what is known of the machine, or after a look at it.

A run on a machine that nothing is known of begins as the host's own. Its first evaluations are timed, one or two with
the same row twice, and it goes on as it is unless a parallel run is then predicted to be clearly faster: only in that
case is the sampler read off and the run begun anew. So a run that is not worth solving in parallel costs a row or two
more, no capture and no engine. A model that may not keep rows or calls apart goes on to the end in any case, and only
then evaluates two rows (up to four in all): a step cache or a momentum would take them for steps of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import comfy.model_management
from torch import Tensor

from ...paratafusion_core import Report
from ...paratafusion_core.plan import WORTH, Latency, Plan, Question, choose, fit, typical
from .batched import BatchedModel, is_oom
from .latency import SURE, Known
from .probing import PROBED, PROBES
from .randomness import same_random_numbers
from .settings import Settings

#: A parallel run that has never been tried must be predicted to take less than this share of the plain sampler's time:
#: what it needs is known of one small network only, and what it costs beside the model not at all.
_UNTRIED = 0.85
#: Share of a run's time that a look may add.
_SHARE = 0.05
#: Two rows that take more than twice one by this factor were late, as the first call at a size may be.
_LATE = 1.25
#: Times that two rows are evaluated at most; calls for one row that must be known before, as the first ones of a
#: session are late, on a CPU, too; and how many are timed in a run.
_PAIRS, _FIRST, _SINGLES = 2, 4, 8
#: Evaluations from which a run is left for a parallel one: shorter ones have too little left to win.
_LONG = 40


class NothingWins(Exception):
    """The plain sampler is the plan; the message says why.

    Attributes:
        known: of runs of this kind.
        question: for which the machine is to be looked at meanwhile, None where that is not wanted.
    """

    def __init__(self, why: str, known: Known, question: Question | None = None) -> None:
        super().__init__(why)
        self.known, self.question = known, question


class Leap(Exception):
    """A parallel run is predicted to be clearly faster than the rest of the plain sampler's."""


def plain_if_best(known: Known, name: str, steps: int, settings: Settings, doubted: bool = False) -> Hashable | None:
    """Leave before the capture where what is known of the machine says that no parallel plan wins.

    Returns what tells the plan of a parallel run from others, None where the engine measures for itself: towards a
    target most machines gain, and its first evaluations serve every plan.

    Args:
        doubted: a parallel run would begin with the probe.

    Raises:
        NothingWins: the host's own sampler is to run.
    """
    options = settings.options(False, 1.0)
    if options.tolerance == 0:
        raise NothingWins("plain sampler, as no parallel run that is exact is faster", known)
    target = (options.target or 0.0) if settings.asks_target else None
    evaluations = round(steps * known.evaluations.get(name, 1.0))
    question = Question(evaluations, options.tolerance, target, options.rows)
    latency = fit(known.seconds)
    if latency is None and (target is not None or name in known.untimed):
        return None
    if latency is None and known.single:
        raise NothingWins("plain sampler, as the model takes one picture at a time", known)
    if latency is None:
        few = int(1 / _SHARE)
        if evaluations < few:
            why = f"plain sampler, as measuring would cost more than it can win in fewer than {few} evaluations"
            raise NothingWins(why, known)
        raise NothingWins("plain sampler", known, question)
    lost = _probing(latency, doubted)
    plan = choose(question, latency, engine=known.engine, lost=lost)
    if plan.solver == "sequential":
        why = f"{plan}, as nothing is predicted to be faster: predicted {plan.plain:.3g} s"
        raise NothingWins(why, known)
    key = name, question, plan.solver, plan.window
    _by_outcome(plan, known.outcomes.get(key, []), known, lost(plan.solver, plan.window))
    return key


def _probing(latency: Latency, wanted: bool) -> Callable[[str, int], float]:
    """Seconds that the probe adds to a plan."""
    seconds = PROBES * latency(PROBED / PROBES) if wanted else 0.0
    return lambda solver, window: 0.0 if solver == "sequential" else seconds


def _by_outcome(plan: Plan, took: list[float], known: Known, lost: float = 0.0) -> None:
    """Hold a parallel plan against what runs by it ``took``, or, untried, against more than its prediction.

    ``lost``: seconds of the probe, which the outcomes lack.

    Raises:
        NothingWins: it does not do.
    """
    tried = len(took) >= SURE
    seconds, words = (typical(took) + lost, "known to take") if tried else (plan.seconds, "predicted to take")
    if seconds >= (WORTH if tried else _UNTRIED) * plan.plain:
        why = f"plain sampler, as {plan} is {words} {seconds:.3g} s, too near to its {plan.plain:.3g} s"
        raise NothingWins(why, known)


class Look:
    """Times the model calls of the host's own sampler, and two rows together, to plan by.

    Args:
        choice: its ``known`` takes up the times, of its ``question``. model, x, extra_args: of the run. doubted: the
            model is not known to keep rows and calls apart, so that two rows wait for :meth:`finish`.

    Attributes:
        rows: of each call so far. evaluated: their sum.
    """

    def __init__(self, choice: NothingWins, model: Any, x: Tensor, extra_args: dict[str, Any], doubted: bool) -> None:
        assert choice.question is not None
        self._known, self._question, self._doubted = choice.known, choice.question, doubted
        self._options = extra_args.get("model_options")
        self._batched = BatchedModel(model, dict(extra_args), x.shape[0])
        self._over, self._singles, self._pairs, self._beside = False, 0, 0, 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._refused = False
        self.rows: list[int] = []

    @property
    def evaluated(self) -> int:
        return sum(self.rows) + self._beside

    def __call__(self, evaluate: Callable[[], Tensor], x: Tensor, sigma: Tensor, given: dict[str, Any]) -> Tensor:
        """What ``evaluate`` returns, the model at ``x`` ``[B, ...]``, ``sigma`` ``[B]``.

        Raises:
            Leap: the rest of the run is to be left. Exception: whatever the model raises.
        """
        self.rows.append(1)
        if self._doubted:
            self._last = x, sigma
        if self._doubted or self._over or len(self._known.calls.get(1, ())) < _FIRST:
            return self._one(evaluate, x)
        float(x.flatten()[0])  # waits for the device
        D = self._two(x, sigma)
        # a sampler's own post-CFG function expects the pictures of one level
        apart = given.get("model_options") is not self._options
        if D is None or apart:
            self._beside += 0 if D is None else 2
            D = evaluate()
        else:
            self.rows[-1] = 2
        self._known.single |= self._refused  # it takes one
        self._decide()
        return D

    def finish(self) -> None:
        """After the sampler's last call: the times of two rows that waited for it.

        Raises:
            InterruptProcessingException: the user has cancelled.
        """
        if self._last is None:
            return
        while not self._over and self._two(*self._last) is not None:
            self._beside += 2
            self._decide()
        self._known.single |= self._refused
        self._last = None

    def _one(self, evaluate: Callable[[], Tensor], x: Tensor) -> Tensor:
        """What ``evaluate`` returns, timed if it is one of the first."""
        if self._singles >= _SINGLES:
            return evaluate()
        self._singles += 1
        float(x.flatten()[0])  # waits for the device
        began = time.perf_counter()
        D = evaluate()
        float(D.flatten()[0])
        self._known.learn_call(1, time.perf_counter() - began)
        return D

    def _two(self, x: Tensor, sigma: Tensor) -> Tensor | None:
        """The model at ``x``, from a call with the same row twice; None where that fails."""
        self._pairs += 1
        began = time.perf_counter()
        try:
            with same_random_numbers(x):
                D = self._batched(x[None].expand(2, *x.shape).contiguous(), sigma.flatten()[:1].expand(2))[0]
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # a model may refuse several rows in any way
            self._over, self._refused = True, not is_oom(error)
            return None
        float(D.flatten()[0])
        self._known.learn_call(2, time.perf_counter() - began)
        return D

    def _decide(self) -> None:
        """Look again, let the sampler go on, or leave it.

        Raises:
            Leap: leave it.
        """
        if self._over:
            return
        one, two = (typical(self._known.calls[rows]) for rows in (1, 2))
        sure, late = len(self._known.calls[2]) >= SURE, two > _LATE * 2 * one
        extra = max(two - (0.0 if self._beside else one), 0.0)
        affordable = (self._pairs + 1) * extra <= _SHARE * self._question.total * one
        if not sure and self._pairs < _PAIRS and (late or affordable):
            return
        self._over = True
        if sure and not self._doubted and self._question.total >= _LONG and self._wins(one, two):
            raise Leap

    def _wins(self, one: float, two: float) -> bool:
        """Whether a parallel run from the start is predicted to be clearly faster than the rest of this one."""
        latency = fit({1: one, 2: two})
        assert latency is not None
        plan = choose(self._question, latency, engine=self._known.engine)
        spent = sum(one if rows == 1 else two for rows in self.rows) + self._beside / 2 * two
        return plan.solver != "sequential" and plan.seconds + spent < _UNTRIED * plan.plain

    def tell(self, report: Report) -> None:
        """Account in the report of a run that went to its end for what was evaluated twice."""
        if not self.rows:  # a sampler may go around the host's wrapper
            self._known.untimed.add(report.sampler)
            return
        report.rows_per_round, report.window_per_round = list(self.rows), list(self.rows)
        report.nfe, report.probe_nfe = sum(self.rows), self._beside

    def __str__(self) -> str:
        if not self.rows or self._known.single:
            return "plain sampler, which could not be timed with two rows"
        seconds = {rows: typical(self._known.calls[rows]) for rows in (1, 2) if self._known.calls.get(rows)}
        words = ", ".join(f"{rows} row{'s' * (rows > 1)} {spent:.3g} s" for rows, spent in seconds.items())
        return f"plain sampler, measured for the next run ({words})"
