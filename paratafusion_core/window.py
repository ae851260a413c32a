"""How many rows the next round evaluates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from .denoisers import Denoise
from .opening import Shared
from .plan import SURPRISE, Latency, Machine, Plan, Question, choose_window, fit, typical, without_late
from .timing import Timing

_SETTLE = 2  # rounds at a size before its rate is believed
#: What rounds of two rows before the choice may cost, as a share of the run, if none of their second rows is final; and
#: the factor to which two of them tell the time.
_MOST_DOUBTS, _JITTER = 0.05, 1.15
#: Two rounds in a row that are off by ``SURPRISE`` are a change of the machine: so many in one run.
_CHANGES = 1
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


def row_by_row(question: Question, machine: Machine, asked: int | None = None) -> str | None:
    """Why an automatic run evaluates one row a round, whatever it measures; None where it may evaluate more.

    Args:
        question: what is run. machine: what is known of it.
        asked: the most rows that were asked for, None for no limit.
    """
    if asked == 1:
        return "auto: asked for one row"
    if question.tolerance == 0:
        return "auto: at tolerance 0 no window saves a round"
    if len(machine.latencies) < 2 and question.total < _FEW:
        return f"auto: measuring would cost more than it can win in fewer than {_FEW} evaluations"
    return "auto: memory for one row" if machine.most is not None and machine.most < 2 else None


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
        if self._accelerator and self.tells and isinstance(D, Tensor) and D.numel():
            float(D.flatten()[0])
        self.spent += max(self._clock() - begin, 0.0)
        return D


class Pilot:
    """Chooses the window of every round of the quasi-Newton solver, measuring as it goes.

    The first two rounds evaluate one row, the next two: all is exact work but the last row. Two rows are measured again
    while that could change the choice between the plain sampler and a parallel plan, as far as it costs at most 5 % of
    the run: their first call may be as late as one likes, of two calls the earlier is believed to 15 %. Each round is a
    measurement too, so that a wrong choice is left again.

    Late are the first call of all and the first at a size: kernels are loaded and chosen, memory is taken. That is why
    one row is measured twice, and why a larger batch that took clearly more than the others let expect is not believed
    before its second call.

    Args:
        question: what is run. machine: what is known of it, by more than one call. timed: its ``spent`` are the model's
            seconds, as far as it tells. opened: what was measured and evaluated before, by one call each. asked: the
            most rows that were asked for, None for no limit.
    """

    def __init__(
        self,
        question: Question,
        machine: Machine,
        timed: Timed,
        opened: Shared | None = None,
        asked: int | None = None,
    ) -> None:
        self._timed, self._opened, self._asked = timed, opened, asked
        given = [(rows, seconds) for rows, seconds in machine.latencies.items() for _ in range(2)]
        self._begin(question, machine, [*given, *(() if opened is None else opened.calls)])

    def _begin(self, question: Question, machine: Machine, calls: Sequence[tuple[int, float]]) -> None:
        self._question, self._machine, self._calls = question, machine, tuple(calls)
        self._seconds: dict[int, list[float]] = {}
        for rows, seconds in calls:
            self._seconds.setdefault(rows, []).append(seconds)
        self._recalls = 0
        self._given = len(machine.latencies) > 1
        self._engine = [machine.engine] if machine.latencies else []
        self._spent, self._window, self._doubts, self._chosen = 0.0, 1, 0, False
        self._elapsed, self._surprises, self._changes = 0.0, 0, 0
        self._told: list[tuple[int, int, float, float]] = []
        self.plan: Plan | None = None

    def resume(self, timing: Timing) -> None:
        """Stand where a capped run of the same system stopped; what the machine was known for counts no more."""
        known = {rows: seconds for rows, seconds in timing.given if timing.given.count((rows, seconds)) > 1}
        machine = replace(self._machine, latencies=known, engine=timing.engine)
        self._begin(replace(self._question, warm=timing.warm), machine, timing.given)
        final = 0
        for frozen, rows, seconds, engine in timing.rounds:
            self.next(final)
            self._take(frozen, rows, seconds, engine or None)
            final += frozen
        self.plan, self._elapsed = None, 0.0  # what it predicts is of this run

    def timing(self) -> Timing:
        """What a run that goes on from here needs to know."""
        return Timing(0, self._question.warm, self._calls, self._machine.engine, tuple(self._told))

    def next(self, frozen: int) -> tuple[int, str]:
        """The next round's window and why; ``frozen`` rows are final."""
        self._spent, self._recalls = self._timed.spent, self._recalled()
        left = self._question.total - frozen
        why = row_by_row(self._question, self._machine, self._asked)
        if why is not None:
            return 1, why
        if left < 2:
            return 1, "auto: one row left"
        if 1 not in self._seconds or self._late_start():
            return 1, "auto: measuring"
        if len(self._seconds) < 2 or self._doubtful(left):
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
        if self._recalled() > self._recalls:  # not all of its rows were evaluated: it tells nothing
            self._take(frozen, rows, 0.0, None)
            return
        beside = max(seconds - self._timed.spent + self._spent, 0.0) if self._timed.tells else None
        self._take(frozen, rows, seconds, beside)

    def _recalled(self) -> int:
        return 0 if self._opened is None else len(self._opened.recalled)

    def _take(self, frozen: int, rows: int, seconds: float, engine: float | None) -> None:
        self._told.append((frozen, rows, seconds, engine or 0.0))
        if seconds == 0:
            return
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
        return not expected / SURPRISE < seconds < expected * SURPRISE

    def measured(self) -> dict[int, float]:
        """{rows: seconds of a round} so far."""
        return {rows: typical(seconds) for rows, seconds in self._seconds.items()}

    def _late_start(self) -> bool:
        """Whether one row was measured by a single call, the first of all."""
        return not self._given and not self._chosen and len(self._seconds[1]) == 1

    def _latency(self, two: float | None = None) -> Latency:
        """Of the rounds so far, with other seconds of two rows if they are given."""
        found = self.measured()
        if two is not None:
            found[2] = two
        now = self._window
        if now > 2 and len(self._seconds.get(now, ())) == 1:
            found = without_late(found, [now])
        latency = fit(found)
        assert latency is not None
        return latency

    def _doubtful(self, left: int) -> bool:
        """Whether the time of two rows is known too roughly to decide by."""
        found = self.measured()
        if self._given or self._chosen or 1 not in found or 2 not in found:
            return False
        one, two = found[1], found[2]
        excess = min(max(two / max(one, 1e-12) - 1, 0.1), 1.0)  # more was late
        if (self._doubts + 1) * excess > _MOST_DOUBTS * self._question.total:
            return False
        least = min(one, two) if len(self._seconds[2]) == 1 else two / _JITTER
        low, high = (self._choose(left, self._latency(s), None).window > 1 for s in (least, two * _JITTER))
        return low != high

    def _choose(self, left: int, latency: Latency, now: int | None) -> Plan:
        engine = typical(self._engine) if self._engine else 0.0
        question = replace(self._question, target=None)
        return choose_window(question, left, latency, now=now, engine=engine, most=self._machine.most)
