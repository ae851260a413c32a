"""How many rows the next round evaluates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .denoisers import Denoise
from .plan import Latency, Machine, Plan, Question, choose, choose_window, fit, typical
from .timing import Timing

_SETTLE = 2  # rounds at a size before its rate is believed
#: What rounds of two rows before the choice may cost, as a share of the run, if none of their second rows is final; the
#: factor to which one of them tells the time, and what the first of them may take too long.
_MOST_DOUBTS, _JITTER, _FIRST = 0.05, 1.15, 2.0
#: Two rounds in a row that are off by this factor are a change of the machine.
_SURPRISE = 1.4
#: So many in one run.
_CHANGES = 1
#: More than jitter makes of one row against two.
_LATE = 1.25
#: Where two rows cost twice one, measuring them once costs a row: 5 % of so many.
_FEW = 20


def next_window(asked: int | str, total: int, rounds: Sequence[tuple[int, int, float]]) -> tuple[int, str]:
    """The window of the next round and why.

    Args:
        asked: a number of rows (clamped to ``total``), ``full`` or ``auto``.
        total: K, the run's rows.
        rounds: of each round so far the window asked for, the rows it froze, and its seconds.

    ``auto`` climbs 1, 2, 4, .. while rows frozen per measured second rise, and falls back to the best size seen.
    """
    if asked == "full":
        return total, "full"
    if isinstance(asked, int):
        return min(asked, total), f"asked for {asked}" if asked <= total else f"asked for {asked}, the run has {total}"
    sizes = sorted({size for size, _, _ in rounds})
    if not sizes:
        return 1, "auto: measuring"
    rates = {}
    for size in sizes:
        seen = [(frozen, seconds) for s, frozen, seconds in rounds if s == size]
        if len(seen) < _SETTLE:
            return size, "auto: measuring"
        late = seen[1:]  # the first call at a size pays for kernel selection
        rates[size] = sum(f for f, _ in late) / max(sum(s for _, s in late), 1e-9)
    best = max(rates, key=lambda size: rates[size])
    if best == sizes[-1] and best < total:
        return min(2 * best, total), "auto: measuring"
    return best, "auto: most rows frozen per second"


class Asked:
    """The window as :func:`next_window` has it, behind the face that :class:`Pilot` has too."""

    def __init__(self, asked: int | str, total: int) -> None:
        self._asked, self._total = asked, total
        self._rounds: list[tuple[int, int, float]] = []
        self._told: list[tuple[int, int, float, float]] = []
        self._last = 1

    def resume(self, timing: Timing) -> None:
        """Stand where a capped run of the same system stopped."""
        for frozen, rows, seconds, _ in timing.rounds:
            self.next(0)
            self.record(frozen, rows, seconds)

    def timing(self) -> Timing | None:
        """What a run that goes on from here needs to know; None where the window is fixed."""
        return Timing(rounds=tuple(self._told)) if self._asked == "auto" else None

    def next(self, frozen: int) -> tuple[int, str]:
        """The next round's window and why; ``frozen`` rows are final."""
        self._last, reason = next_window(self._asked, self._total, self._rounds)
        return self._last, reason

    def record(self, frozen: int, rows: int, seconds: float) -> None:
        """A round froze so many rows, evaluated so many, and took so long."""
        self._rounds.append((self._last, frozen, seconds))
        self._told.append((frozen, rows, seconds, 0.0))


class Timed:
    """A ``denoise`` that adds up the seconds spent in it.

    Attributes:
        spent: them. tells: whether they are the model's. An accelerator works behind the program's back: there each
            call is waited for until :meth:`let_go`, after which they tell nothing.
    """

    def __init__(self, denoise: Denoise, clock: Callable[[], float], accelerator: bool = False) -> None:
        self._denoise, self._clock, self._accelerator = denoise, clock, accelerator
        self.spent, self.tells = 0.0, True

    def let_go(self) -> None:
        """From now on an accelerator's calls are not waited for."""
        self.tells = not self._accelerator

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        begin = self._clock()
        D = self._denoise(x, sigma)
        if self._accelerator and self.tells:
            float(D.flatten()[0])
        self.spent += self._clock() - begin
        return D


class Pilot:
    """Chooses the window of every round of the quasi-Newton solver, measuring as it goes.

    The first two rounds evaluate one row, the next two: all is exact work but the last row. Two rows are measured again
    while another 15 % of their time, or half of it where they were measured once, would change the choice between the
    plain sampler and a parallel plan, at a cost of at most 5 % of the run. Each round is a measurement too, so that a
    wrong choice is left again.

    The first call of all, and the first at a size, may be late: kernels are loaded and chosen, memory is taken. So one
    row is measured twice, two rows again where they took clearly more than two calls of one, and a larger batch that
    took clearly more than the others let expect is not believed before its second call.

    Args:
        question: what is run. machine: what is known. timed: its ``spent`` are the model's seconds, as far as it tells.
    """

    def __init__(self, question: Question, machine: Machine, timed: Timed) -> None:
        self._timed = timed
        self._begin(question, machine)

    def _begin(self, question: Question, machine: Machine) -> None:
        self._question, self._machine = question, machine
        # as two calls: what is known is no first one
        self._seconds: dict[int, list[float]] = {b: [s, s] for b, s in machine.latencies.items()}
        self._given = len(machine.latencies) > 1
        self._engine = [machine.engine] if machine.latencies else []
        self._spent, self._window, self._doubts, self._chosen = 0.0, 1, 0, False
        self._elapsed, self._surprises, self._changes = 0.0, 0, 0
        self._told: list[tuple[int, int, float, float]] = []
        self.plan: Plan | None = None

    def resume(self, timing: Timing) -> None:
        """Stand where a capped run of the same system stopped; what the machine was known for counts no more."""
        machine = replace(self._machine, latencies=dict(timing.given), engine=timing.engine)
        self._begin(replace(self._question, warm=timing.warm), machine)
        final = 0
        for frozen, rows, seconds, engine in timing.rounds:
            self.next(final)
            self._take(frozen, rows, seconds, engine or None)
            final += frozen
        self.plan, self._elapsed = None, 0.0  # what it predicts is of this run

    def timing(self) -> Timing:
        """What a run that goes on from here needs to know."""
        given = tuple(self._machine.latencies.items())
        return Timing(0, self._question.warm, given, self._machine.engine, tuple(self._told))

    def next(self, frozen: int) -> tuple[int, str]:
        """The next round's window and why; ``frozen`` rows are final."""
        self._spent = self._timed.spent
        left = self._question.total - frozen
        most = self._machine.most
        if self._question.tolerance == 0:
            return 1, "auto: at tolerance 0 no window saves a round"
        if not self._given and self._question.total < _FEW:
            return 1, f"auto: measuring would cost more than it can win in fewer than {_FEW} evaluations"
        if most is not None and most < 2:
            return 1, "auto: memory for one row"
        if left < 2:
            return 1, "auto: one row left"
        if 1 not in self._seconds or self._late_start():
            return 1, "auto: measuring"
        if len(self._seconds) < 2 or self._late_pair() or self._doubtful(left):
            self._doubts += 1
            self._window = 2
            return 2, "auto: measuring"
        plan = self._choose(left, self._latency(), self._window if self._chosen else None)
        if self.plan is None:
            self.plan = replace(plan, seconds=self._elapsed + plan.seconds, plain=self._elapsed + plan.plain)
        self._window, self._chosen = plan.window, True
        self._timed.let_go()
        return plan.window, f"auto: {plan}"

    def record(self, frozen: int, rows: int, seconds: float) -> None:
        """A round froze so many rows, evaluated so many, and took so long."""
        beside = max(seconds - self._timed.spent + self._spent, 0.0) if self._timed.tells else None
        self._take(frozen, rows, seconds, beside)

    def _take(self, frozen: int, rows: int, seconds: float, engine: float | None) -> None:
        self._told.append((frozen, rows, seconds, engine or 0.0))
        self._surprises = self._surprises + 1 if self._surprised(rows, seconds) else 0
        self._seconds.setdefault(rows, []).append(seconds)
        if self._surprises == 2 and self._changes < _CHANGES:  # what was measured before is of another machine
            self._seconds, self._surprises, self._changes = {rows: self._seconds[rows][-2:]}, 0, self._changes + 1
        self._elapsed += seconds
        if engine is not None:
            self._engine.append(engine)

    def _surprised(self, rows: int, seconds: float) -> bool:
        """Whether a round took much more or less than was to be expected."""
        if len(self._seconds) < 2 or rows not in self._seconds:
            return False
        expected = self._latency()(rows)
        return not expected / _SURPRISE < seconds < expected * _SURPRISE

    def measured(self) -> dict[int, float]:
        """{rows: seconds of a round} so far."""
        return {rows: typical(seconds) for rows, seconds in self._seconds.items()}

    def _late_start(self) -> bool:
        """Whether one row was measured by the first call of all alone."""
        return not self._given and len(self._seconds[1]) == 1

    def _late_pair(self) -> bool:
        """Whether the first call of two rows took clearly more than two calls of one."""
        two = self._seconds.get(2, ())
        return not self._chosen and len(two) == 1 and two[0] > _LATE * 2 * self.measured()[1]

    def _latency(self, factor: float = 1.0) -> Latency:
        found = self.measured()
        if 2 in found:
            found[2] *= factor
        for rows in [rows for rows, seconds in self._seconds.items() if rows > 2 and len(seconds) == 1]:
            rest = fit({size: seconds for size, seconds in found.items() if size != rows})
            if rest is not None and found[rows] > _SURPRISE * rest(rows):
                del found[rows]
        latency = fit(found)
        assert latency is not None
        return latency

    def _doubtful(self, left: int) -> bool:
        """Whether the time of two rows is known too roughly to decide by."""
        if self._given or self._chosen:
            return False
        found = self.measured()
        if 1 not in found or 2 not in found:
            return False
        lost = (self._doubts + 1) * max(found[2] / max(found[1], 1e-12) - 1, 0.1)
        if lost > _MOST_DOUBTS * self._question.total:
            return False
        early = _FIRST if len(self._seconds[2]) == 1 else _JITTER
        low, high = (self._choose(left, self._latency(f), None).window > 1 for f in (1 / early, _JITTER))
        return low != high

    def _choose(self, left: int, latency: Latency, now: int | None) -> Plan:
        engine = typical(self._engine) if self._engine else 0.0
        question = replace(self._question, target=None)
        return choose_window(question, left, latency, now=now, engine=engine, most=self._machine.most)


class Replan(Exception):
    """Another plan is better than the one that runs."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(str(plan))
        self.plan = plan


class Shared:
    """A ``denoise`` that measures the first rounds of collocation and hands their rows to the plan that is chosen.

    Collocation opens with row 0, which every plan needs, and at window 2 with two rows after that; then L(1) and L(2)
    are known. What another plan asks for again is not evaluated again.

    Attributes:
        machine: with what was measured. plan: made after that, None before. lost: rows evaluated that no plan used.
        watching: the latencies are still to be measured.
    """

    def __init__(self, denoise: Denoise, question: Question, machine: Machine) -> None:
        self._denoise, self._question, self.machine = denoise, question, machine
        self._kept: list[tuple[float, Tensor, Tensor]] = []
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
            return self._recalled(x, sigma) if self._kept else self._denoise(x, sigma)
        given = x.clone()
        begin = self.machine.clock()
        D = self._denoise(x, sigma)
        float(D.flatten()[0])  # waits for the device
        seconds = self.machine.clock() - begin
        latencies = {**self.machine.latencies, len(given): seconds}
        self.machine = replace(self.machine, latencies=latencies)
        self._kept += [(float(s), a, d) for s, a, d in zip(sigma, given, D, strict=True)]
        if len(latencies) > 1:
            self.watching = False
            self._decide(latencies)
        return D

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
        self.lost = len(self._kept)
        self.plan = replace(best, seconds=best.seconds + lost)
        raise Replan(self.plan)

    def _recalled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``denoise`` without the rows that were evaluated before the change of plan; used once each."""
        rows = [self._find(a, float(s)) for a, s in zip(x, sigma, strict=True)]
        left = [i for i, found in enumerate(rows) if found is None]
        fresh = iter(self._denoise(x[left], sigma[left]) if left else ())
        self.lost -= len(rows) - len(left)
        return torch.stack([next(fresh) if found is None else found for found in rows])

    def _find(self, x: Tensor, sigma: float) -> Tensor | None:
        for place, (level, state, D) in enumerate(self._kept):
            if level == sigma and torch.equal(state, x):
                del self._kept[place]
                return D
        return None
