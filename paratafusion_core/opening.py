"""The first rounds of a run whose plan is still to be made: measured, and their rows handed to the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .denoisers import Denoise, answer
from .plan import (
    CHANGE,
    TRIED,
    Machine,
    Plan,
    Question,
    choose,
    collocation_windows,
    collocation_work,
    fit,
    typical,
    without_late,
)
from .timing import Timing

#: More than jitter makes of one row against two, or of two against twice one: such a call was late.
_LATE = 1.25


class Replan(Exception):
    """Another plan is better than the one that runs."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(str(plan))
        self.plan = plan


class Shared:
    """A ``denoise`` that measures the first rounds of collocation, from which the plan follows.

    Collocation opens with row 0, which every plan needs, and at window 2 with two rows after that; then L(1) and L(2)
    are known. Where two rows took no longer than one, as on a machine with room or where both calls were late, as first
    ones may be on a GPU, another round is measured first; a call that was clearly late is made once more. Towards a
    target collocation goes on at the window that is chosen, and at another one where later rounds show that to be
    faster; to other plans the rows are handed, which are not evaluated again.

    Attributes:
        calls: (rows, seconds) of those that were measured.
        window: of collocation from now on. used: of its last round. plan: made after the measurements, None before.
        lost: rows evaluated that no plan used.
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
        self.window = self.used = 1
        self.watching = self._steering = False
        self.plan: Plan | None = None
        self.lost = 0

    def opening(self) -> Plan:
        """The plan to begin with."""
        question, machine = self._question, self.machine
        latency = fit(machine.latencies)
        if question.target is None or question.total < 3:
            plan = Plan("sequential", 1, None, 0.0, 0.0)
        elif latency is not None:
            plan = self.plan = choose(question, latency, engine=machine.engine, most=machine.most)
        else:
            window = collocation_windows(question, machine.most)[:2][-1]
            self.watching = window > 1
            plan = Plan("collocation", window, question.rows, 0.0, 0.0)
        self.window = plan.window
        return plan

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.used = self.window
        if not self.watching:
            if self._steering:
                D = self._timed(x, sigma)
                self._steer()
            else:
                D = self._recalled(x, sigma) if self._kept else self._denoise(x, sigma)
            self._since += 1
            return D
        D = self._timed(x, sigma)
        self._kept += [(float(s), a, d) for s, a, d in zip(sigma, x, D, strict=True)]
        if len(self._measured()) > 1 and not self._both_late():
            self.watching = False
            self._repeat_late(x, sigma)
            self._decide(self._measured())
        return D

    def _both_late(self) -> bool:
        """Whether one row and two may have been late alike, as each was measured once and two took no longer."""
        sizes = [rows for rows, _ in self.calls]
        found = self._measured()
        if not self._question.target or self.machine.latencies or sorted(sizes) != [1, 2]:
            return False
        return found[2] < _LATE * found[1]

    def _timed(self, x: Tensor, sigma: Tensor) -> Tensor:
        begin = self.machine.clock()
        D = answer(self._denoise, x, sigma)
        float(D.flatten()[0])  # waits for the device
        self.calls.append((len(x), max(self.machine.clock() - begin, 0.0)))
        return D

    def _measured(self) -> dict[int, float]:
        """{rows: seconds}; what was known before counts first."""
        found: dict[int, list[float]] = {}
        for rows, seconds in self.calls:
            found.setdefault(rows, []).append(seconds)
        return {**{rows: typical(seconds) for rows, seconds in found.items()}, **self.machine.latencies}

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
        """Go on with collocation, or not.

        Towards a target its wider windows make use of all that was evaluated, window 1 of one row a round, and other
        plans of row 0. With a number of rows instead, windows are near equals in time but not in quality: what is lost
        counts in the prediction only.
        """
        latency = fit(latencies)
        assert latency is not None
        wide = [rows for rows, _ in self.calls if rows > 1]

        def lost(solver: str, window: int) -> float:
            if solver != "collocation":
                return sum(latency(rows) for rows in wide)
            return latency.c * sum(rows - 1 for rows in wide) if window == 1 else 0.0

        question, machine, before = self._question, self.machine, self.window
        if question.target:
            plan = choose(question, latency, engine=machine.engine, most=machine.most, now=before, lost=lost)
        else:
            plan = choose(question, latency, engine=machine.engine, most=machine.most)
            again = latency.w * len(wide) if plan.solver == "collocation" and plan.window > 2 else 0.0
            plan = replace(plan, seconds=plan.seconds + lost(plan.solver, plan.window) + again)
        self.plan, self.window = plan, plan.window
        if plan.solver == "collocation" and (question.target or plan.window == before):
            self._kept, self._steering = [], bool(question.target)
            return
        self.lost += len(self._kept)
        raise Replan(plan)

    def go_on(self, window: int) -> None:
        """Collocation is under way."""
        self.window, self._steering = window, bool(self._question.target)

    def timing(self) -> Timing:
        """What a run that goes on from here needs to know, once one row and two were measured."""
        return Timing() if self.watching and len(self.calls) < 2 else Timing(self.window)

    def _steer(self) -> None:
        """Another window of collocation, if it is clearly faster than this one by the rounds so far.

        Of what was called once, one row counts only where too little is known without it, as the first call of all may
        be late, and wide windows look better then than they are; larger batches only where they were not late.
        """
        measured, once = self._measured(), {rows for rows, _ in self.calls} - self.machine.latencies.keys()
        once = {rows for rows in once if [size for size, _ in self.calls].count(rows) == 1}
        if len(measured) > 2 and 1 in once:
            del measured[1]
        latency = fit(without_late(measured, once - {1, 2}))
        if latency is None:
            return
        able = collocation_windows(self._question, self.machine.most)
        able = [self.window, *(window for window in able if window <= TRIED * latency.known)]
        seconds = {window: latency.total(collocation_work(self._question, window)) for window in able}
        best = min(seconds, key=lambda window: seconds[window])
        if seconds[best] < CHANGE * seconds[self.window]:
            self.window = best

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
