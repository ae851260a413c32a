"""The first rounds of a run whose plan is still to be made: measured, and their rows handed to the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .denoisers import Denoise
from .plan import Machine, Plan, Question, choose, fit

#: More than jitter makes of one row against two, or of two against twice one: such a call was late.
_LATE = 1.25


class Replan(Exception):
    """Another plan is better than the one that runs."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(str(plan))
        self.plan = plan


class Shared:
    """A ``denoise`` that measures the first rounds of collocation and hands their rows to the plan that is chosen.

    Collocation opens with row 0, which every plan needs, and at window 2 with two rows after that; then L(1) and L(2)
    are known. A call that was clearly late, as first ones may be on a GPU, is made once more. What another plan asks
    for again is not evaluated again.

    Attributes:
        calls: (rows, seconds) of those that were measured.
        plan: made after that, None before. lost: rows evaluated that no plan used.
        watching: the latencies are still to be measured.
        recalled: numbers of the calls, from the plan on, whose rows had been evaluated before, all or some: what these
            took tells nothing.
    """

    def __init__(self, denoise: Denoise, question: Question, machine: Machine) -> None:
        self._denoise, self._question, self.machine = denoise, question, machine
        self._kept: list[tuple[float, Tensor, Tensor]] = []
        self.calls: list[tuple[int, float]] = []
        self.recalled: list[int] = []
        self._since = 0
        self.watching = False
        self.plan: Plan | None = None
        self.lost = 0

    def opening(self) -> Plan:
        """The plan to begin with."""
        question, machine = self._question, self.machine
        latency = fit(machine.latencies)
        if question.target is None or question.total < 3:
            return Plan("sequential", 1, None, 0.0, 0.0)
        if latency is not None:
            self.plan = choose(question, latency, engine=machine.engine, most=machine.most)
            return self.plan
        if machine.most == 1:
            return Plan("collocation", 1, question.rows, 0.0, 0.0)
        self.watching = True
        return Plan("collocation", 2, question.rows, 0.0, 0.0)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if not self.watching:
            D = self._recalled(x, sigma) if self._kept else self._denoise(x, sigma)
            self._since += 1
            return D
        given = x.clone()
        D = self._timed(x, sigma)
        self._kept += [(float(s), a, d) for s, a, d in zip(sigma, given, D, strict=True)]
        if len(self._measured()) > 1:
            self.watching = False
            self._repeat_late(given, sigma)
            self._decide(self._measured())
        return D

    def _timed(self, x: Tensor, sigma: Tensor) -> Tensor:
        begin = self.machine.clock()
        D = self._denoise(x, sigma)
        float(D.flatten()[0])  # waits for the device
        self.calls.append((len(x), self.machine.clock() - begin))
        return D

    def _measured(self) -> dict[int, float]:
        """{rows: seconds}; what was known before counts first."""
        found: dict[int, float] = {}
        for rows, seconds in self.calls:
            found[rows] = min(seconds, found.get(rows, seconds))
        return {**found, **self.machine.latencies}

    def _repeat_late(self, x: Tensor, sigma: Tensor) -> None:
        """Measure one row again where it took clearly more than two, or two where they took more than twice one.

        ``x``, ``sigma`` are those of the last call.
        """
        for _ in range(2):  # both may be late
            found = self._measured()
            if 1 not in found or 2 not in found:
                return
            rows = 1 if found[1] > _LATE * found[2] else 2 if found[2] > _LATE * 2 * found[1] else 0
            if not 0 < rows <= len(x) or rows in self.machine.latencies:
                return
            self._timed(x[:rows].clone(), sigma[:rows])
            self.lost += rows

    def _decide(self, latencies: Mapping[int, float]) -> None:
        """Go on with window 2, or not; other plans pay for what of the round of two rows is in vain.

        Window 1 begins with one of its rows; window 4 mostly with both, so that only the round was too many.
        """
        latency = fit(latencies)
        assert latency is not None
        best = choose(self._question, latency, engine=self.machine.engine, most=self.machine.most)
        if best.solver == "collocation" and best.window == 2:
            self.plan, self._kept = best, []
            return
        lost = latency(2)
        if best.solver == "collocation":
            lost = latency.c if best.window == 1 else latency.w
        self.lost += len(self._kept)
        self.plan = replace(best, seconds=best.seconds + lost)
        raise Replan(self.plan)

    def _recalled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``denoise`` without the rows that were evaluated before the change of plan; used once each."""
        rows = [self._find(a, float(s)) for a, s in zip(x, sigma, strict=True)]
        left = [i for i, found in enumerate(rows) if found is None]
        if len(left) < len(rows):
            self.recalled.append(self._since)
        fresh = iter(self._denoise(x[left], sigma[left]) if left else ())
        self.lost -= len(rows) - len(left)
        return torch.stack([next(fresh) if found is None else found for found in rows])

    def _find(self, x: Tensor, sigma: float) -> Tensor | None:
        for place, (level, state, D) in enumerate(self._kept):
            if level == sigma and torch.equal(state, x):
                del self._kept[place]
                return D
        return None
