"""What runs have measured of a model, kept for the next run of the same kind: in memory, bounded, and only as long as
its weights stay where they were."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...paratafusion_core import Report
from ...paratafusion_core.plan import SURPRISE, Machine, fit, typical
from .batched import cond_lists
from .guards import Parts

#: Kinds of runs that are remembered, and calls of each number of rows.
_ENTRIES, _CALLS = 64, 16
#: Schedules of a kind of run that are remembered to have been tried.
_SCHEDULES = 16
#: Plans whose outcomes are remembered, and of how many runs.
_PLANS, _OUTCOMES = 16, 4
#: As many calls at a size tell its time: the first one may be late, as kernels are loaded and memory is taken.
SURE = 2
#: Runs of the host's own sampler that differ by this factor are of a machine that is busy, or no longer.
_CHANGED = 1.5


@dataclass
class Known:
    """Of one kind of run.

    Attributes:
        model: whose latencies these are. residency: how its weights lay. parts: what is patched into it.
        apart: noise levels of runs that were tried several levels at once, and may be. steady: of runs whose calls do
            not depend on each other. passed: what tells such of ``apart`` before they are read off.
        mixes: what speaks against several levels at once, trouble: against any parallel run; None for nothing.
        calls: {rows: seconds of the last rounds of so many}.
        steps: seconds of an evaluation in the host's own sampler, of the last runs that it made.
        beside: of a round, what is not the model's. evaluations: {sampler: of a step}.
        single: whether it refused two rows in a call. untimed: samplers whose evaluations could not be timed.
        outcomes: {plan: seconds of the last whole runs in parallel that were begun by it}.
        akin: the same of kinds that differ in numbers only, as the strength of a LoRA.
    """

    model: weakref.ref[Any]
    residency: Hashable
    parts: Parts
    apart: list[tuple[float, ...]] = field(default_factory=list)
    steady: list[tuple[float, ...]] = field(default_factory=list)
    passed: list[Hashable] = field(default_factory=list)
    mixes: str | None = None
    trouble: str | None = None
    calls: dict[int, list[float]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    beside: float = 0.0
    evaluations: dict[str, float] = field(default_factory=dict)
    outcomes: dict[Hashable, list[float]] = field(default_factory=dict)
    single: bool = False
    untimed: set[str] = field(default_factory=set)
    akin: Hashable = None

    def holds(self, model: Any, residency: Hashable) -> bool:
        """Whether this is of ``model``, with its weights where they are now."""
        return self.model() is model and self.residency == residency

    def after_a_nudge(self, parts: Parts) -> Known:
        """What this foretells of a graph in which numbers were changed: few times, so that measured ones soon count.

        What was found of rows and calls holds where the functions and their numbers are the same, as weights do not mix
        pictures.
        """
        same = parts.key == self.parts.key and not self.parts.gone
        return replace(
            self,
            parts=parts,
            apart=list(self.apart) if same else [],
            steady=list(self.steady) if same else [],
            passed=list(self.passed) if same else [],
            mixes=self.mixes if same else None,
            trouble=self.trouble if same else None,
            single=self.single and same,
            calls={rows: calls[-SURE:] for rows, calls in self.calls.items()},
            steps=self.steps[-1:],
            evaluations=dict(self.evaluations),
            outcomes={plan: list(took) for plan, took in self.outcomes.items()},
            untimed=set(self.untimed),
        )

    @staticmethod
    def remember(schedules: list[Any], schedule: Hashable) -> None:
        """Add ``schedule`` to ``apart``, ``steady`` or ``passed``."""
        if schedule not in schedules:
            schedules.append(schedule)
            del schedules[:-_SCHEDULES]

    @property
    def seconds(self) -> dict[int, float]:
        """{rows: seconds of a round} of sizes with enough rounds; none where all are neighbours, such as 3 and 4 rows.

        These do not tell what one row takes.
        """
        found = {rows: typical(calls) for rows, calls in self.calls.items() if len(calls) >= SURE}
        apart = 1 in found or max(found, default=0) >= 2 * min(found, default=1)
        return found if apart else {}

    @property
    def engine(self) -> float:
        """Seconds of a round that the host's own sampler does not spend."""
        latency = fit(self.seconds)
        if latency is None or not self.steps:
            return self.beside
        return max(latency(1) - typical(self.steps), 0.0)

    def machine(self, most: int | None = None) -> Machine:
        """For the engine; ``most`` rows fit into memory."""
        return Machine(self.seconds, self.engine, most)

    def learn(self, report: Report) -> None:
        """Take up what a run has measured."""
        self.evaluations[report.sampler] = report.sequential_nfe / max(report.steps, 1)
        for rows, seconds in report.calls():
            self.learn_call(rows, seconds)
        if report.rounds and report.seconds_per_round:
            extra = report.spent - report.model_seconds
            self.beside = max(extra / report.rounds, 0.0)

    def learn_call(self, rows: int, seconds: float) -> None:
        """Take up what a call of so many rows took."""
        self.calls[rows] = [*self.calls.get(rows, ()), seconds][-_CALLS:]

    def learn_outcome(self, plan: Hashable, report: Report, seconds: float) -> None:
        """Take up that a whole run in parallel, begun by ``plan`` and learnt from, took so many seconds.

        By how much single calls were late, as first ones at a size are, does not count.
        """
        for rows, spent in report.calls():
            usual = typical(self.calls[rows])
            seconds -= spent - usual if spent > SURPRISE * usual else 0.0
        kept = self.outcomes.pop(plan, [])
        self.outcomes[plan] = [*kept, seconds][-_OUTCOMES:]
        while len(self.outcomes) > _PLANS:
            del self.outcomes[next(iter(self.outcomes))]

    def learn_plain(self, sampler: str, steps: int, seconds: float) -> None:
        """Take up what a run of the host's own sampler took, if it is known how often that evaluates the model.

        Where it is far from what was to be expected, the machine has changed: then the next run measures anew.
        """
        if sampler not in self.evaluations or steps <= 0:
            return
        one, single = seconds / (steps * self.evaluations[sampler]), self.seconds.get(1)
        expected = typical(self.steps) if self.steps else None if single is None else single - self.beside
        if expected is not None and not expected / _CHANGED < one < expected * _CHANGED:
            self.calls, self.steps, self.outcomes = {}, [], {}
        self.steps = [*self.steps, one][-_CALLS:]


class Latencies:
    """Known runs by model, shape, dtype, device and conds; the least recently used are dropped first."""

    def __init__(self, entries: int = _ENTRIES) -> None:
        self._entries = entries
        self._known: OrderedDict[Hashable, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, guider: Any, x: Tensor, parts: Parts) -> Known:
        """What is known of runs from ``x`` with this guider's model and conds; forgotten where its weights have moved.

        Clones of a model share what is known as long as they carry the same patches, of the weights and ``parts``.
        Where these are new, but of a kind that ran before, as after a LoRA's or a ControlNet's strength was changed, it
        begins with what that run has measured.
        """
        patcher = guider.model_patcher
        conds = tuple(sorted((name, len(conds)) for name, conds in cond_lists(guider).items()))
        of_run = tuple(x.shape), x.dtype, x.device, conds, getattr(guider, "cfg", None) == 1.0
        key = id(patcher.model), getattr(patcher, "patches_uuid", None), parts.key, of_run
        akin = None if parts.kind is None else (_weights_of(patcher), parts.kind, of_run)
        residency = residency_of(patcher)
        known = self._known.pop(key, None)
        if known is None or not known.holds(patcher.model, residency) or known.parts.gone:
            # the one that was found may be of a patch that is gone, in whose place the new one lies
            before = [*self._known.values(), *([] if known is None else [known])]
            like = (old for old in reversed(before) if akin is not None and old.akin == akin)
            latest = next((old for old in like if old.holds(patcher.model, residency)), None)
            if latest is None:
                known = Known(weakref.ref(patcher.model), residency, parts, akin=akin)
            else:
                known = latest.after_a_nudge(parts)
        self._known[key] = known
        while len(self._known) > self._entries:
            self._known.popitem(last=False)
        return known


def _weights_of(patcher: Any) -> Hashable:
    """How the weights are patched, but for the numbers: which of them, how often, and by which kind of patch."""
    patches, wrappers = (getattr(patcher, name, {}) for name in ("patches", "weight_wrapper_patches"))
    kinds = ((key, tuple(type(patch[1]).__name__ for patch in some)) for key, some in patches.items())
    # a hash: the names of a large model's weights would be kept for every graph
    return hash((frozenset(kinds), frozenset((key, len(some)) for key, some in wrappers.items())))


def residency_of(patcher: Any) -> Hashable:
    """Where the model's weights are: how much is loaded, in sixteenths, and whether the rest is copied in for calls."""
    loaded = patcher.loaded_size() if hasattr(patcher, "loaded_size") else None
    size = patcher.model_size() if hasattr(patcher, "model_size") else None
    model = patcher.model
    return (
        round(16 * loaded / size) if loaded is not None and size else loaded,
        getattr(model, "model_lowvram", None),
        getattr(model, "lowvram_patch_counter", None),
        str(getattr(model, "device", None)),
    )


#: Of this process.
KNOWN = Latencies()
