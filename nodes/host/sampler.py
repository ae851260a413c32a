"""A parallel SAMPLER from any SAMPLER: capture, guards, solve; otherwise the user's own function, with the reason."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
from torch import Tensor
from tqdm import tqdm

from ...paratafusion_core import Progress, Report, Solution, Trajectory, solve
from .batched import is_oom
from .capture import CaptureError, capture, check_name
from .choice import Leap, Look, NothingWins, plain_if_best
from .fitting import Trial, Unfit, fitting
from .graph import UNKNOWN
from .guards import Trouble, has_readers, known_trouble, may_remember, needs_probe, parts_of
from .latency import KNOWN, Known
from .live import Live
from .notify import current_place
from .plain import Unwrapped, close, counted, fallback, name_of, sequential_report
from .problem import Problem, problem_of
from .randomness import random_numbers
from .settings import Outcome, Settings

_NO_MEMORY = "memory ran out in the parallel run"


def parallel(inner: Any, settings: Settings, outcome: Outcome, warm: Trajectory | None = None) -> Any:
    """``inner``, a SAMPLER, as a SAMPLER that solves its steps together.

    It keeps the host's ``KSAMPLER`` around it: noise scaling, inpainting and previews stay the host's own.

    Args:
        settings: how. outcome: is filled by each run. warm: an earlier run's trajectory to start from.

    Raises:
        ValueError: ``inner`` is no SAMPLER, or the others are not what the pack's own nodes give.
    """
    for name, value, kind, node in (
        ("options", settings, Settings, "Parallel Options"),
        ("trajectory", warm, Trajectory, "a parallel sampler or Load Trajectory"),
    ):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}; the output of {node} is allowed")
    if not hasattr(inner, "sample"):
        raise ValueError(f"sampler is a {type(inner).__name__}; a SAMPLER is allowed")
    own = type(inner).sample is not comfy.samplers.KSAMPLER.sample or "sample" in vars(inner)
    if own or not hasattr(inner, "sampler_function"):
        return Unwrapped(inner, outcome)
    function, extra = inner.sampler_function, dict(inner.extra_options)
    if isinstance(function, _Run):  # a parallel sampler made parallel again: the settings given last count
        function, extra, warm = function.function, dict(function.extra), warm or function.warm
    wrapped = copy.copy(inner)  # of its own class, which may have a max_denoise of its own
    wrapped.sampler_function, wrapped.extra_options = _Run(function, extra, settings, outcome, warm), {}
    wrapped.inpaint_options = dict(inner.inpaint_options)
    return wrapped


def _account(report: Report, started: float, probing: float) -> None:
    """Count what came before the first round: the capture as the engine's time, the probe as the model's."""
    report.seconds = time.perf_counter() - started
    report.model_seconds += probing
    report.engine_seconds = max(report.seconds - report.model_seconds, 0.0)


def _latent_format(model: Any) -> str | None:
    """What the latent's channels mean to this model, by the host's name for it; None where the model does not tell."""
    latent_format = getattr(model.inner_model.inner_model, "latent_format", None)
    return None if latent_format is None else type(latent_format).__name__.lstrip("_")


def _cold_reason(warm: Trajectory | None, x: Tensor, latent: str | None) -> str | None:
    """Why a run from ``x`` cannot start from ``warm``, None if it can or there is nothing to start from."""
    if warm is None:
        return None
    if warm.shape != tuple(x.shape):
        return f"cold: the trajectory is of latent shape {list(warm.shape)}, this run's is {list(x.shape)}"
    if None not in (warm.latent, latent) and warm.latent != latent:
        return f"cold: the trajectory is of latent format {warm.latent}, this run's is {latent}"
    return None


def _of_this(warm: Trajectory | None, problem: str | None) -> tuple[Trajectory | None, str]:
    """``warm`` as this run may use it, and what to say of that: of another picture's sketch nothing is final.

    ``problem`` is None where the caller answers for it.
    """
    if warm is None or warm.part is None or problem is None or warm.problem == problem != UNKNOWN:
        return warm, ""
    word = "may be" if UNKNOWN in (warm.problem, problem) else "was"
    return replace(warm, part=None), f"; the sketch {word} of another prompt, model, seed or setting"


@dataclass(frozen=True)
class _Given:
    """What ``KSAMPLER`` calls a sampler function with, and who is told of the run."""

    model: Any
    x: Tensor
    sigmas: Tensor
    extra_args: dict[str, Any]
    callback: Any
    disable: Any
    live: Live
    started: float

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 0)


class _Run:
    """A sampler function in k-diffusion's form, as ``KSAMPLER`` calls it."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        extra: dict[str, Any],
        settings: Settings,
        outcome: Outcome,
        warm: Trajectory | None,
    ) -> None:
        self.function, self.extra, self.warm = function, extra, warm
        self._settings, self._outcome = settings, outcome
        self.__name__ = f"parallel_{name_of(function)}"

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any = None,
        disable: Any = None,
    ) -> Tensor:
        """Sample from ``x`` along ``sigmas``; see :func:`parallel`."""
        live = Live(current_place(), max(len(sigmas) - 1, 0))
        try:
            return self._sample(_Given(model, x, sigmas, extra_args, callback, disable, live, time.perf_counter()))
        finally:
            close(live, self._outcome)

    def _sample(self, run: _Given) -> Tensor:
        self._outcome.report = self._outcome.trajectory = None
        if self._settings.sequential:
            return self._plain(run)
        looked = 0
        result, why = self._parallel(run)
        if isinstance(why, NothingWins) and why.question is not None:
            options = run.extra_args["model_options"]
            look = Look(why, run.model, run.x, run.extra_args, needs_probe(run.model, options))
            put_back, levels = random_numbers(run.x, self.function, self.extra), run.sigmas.clone()
            untouched = replace(run, x=run.x.clone(), extra_args=dict(run.extra_args))
            try:
                return self._plain(run, why, look)
            except Leap:
                put_back()
                run.sigmas.copy_(levels)
            run, looked = untouched, look.evaluated
            result, why = self._parallel(run, looked)
        if result is None:
            result = self._plain(run, why)
            self._outcome.report.probe_nfe += looked
        return result

    def _parallel(self, run: _Given, looked: int = 0) -> tuple[Tensor | None, NothingWins | Unfit | None]:
        """The parallel run's result, or None and why there is none; ``looked`` rows were evaluated before it."""
        try:
            return self._solve(run, looked), None
        except Unfit as unfit:
            return None, Unfit(str(unfit), suspect=unfit.suspect)  # the one raised would keep this run's tensors
        except NothingWins as wins:
            return None, wins.with_traceback(None)  # whose frames would keep this run's tensors
        except Exception as error:
            if not is_oom(error):
                raise
        # here, outside the handlers, the failed run's tensors are no longer referenced
        comfy.model_management.soft_empty_cache()
        return None, Unfit(_NO_MEMORY)

    def _plain(self, run: _Given, why: NothingWins | Unfit | None = None, look: Look | None = None) -> Tensor:
        """The host's own sampler: asked for, chosen, or fallen back to; ``look`` measures it.

        Raises:
            Leap: ``look`` has found a parallel run to be clearly faster.
        """
        begun, steps, name = time.perf_counter(), run.steps, name_of(self.function)
        reason = str(why) if isinstance(why, Unfit) else None
        model, evaluations = counted(run.model, steps, look)
        callback = run.live.sequential(reason, run.callback)
        result = self.function(
            model,
            run.x,
            run.sigmas,
            extra_args=run.extra_args,
            callback=callback,
            disable=run.disable,
            **self.extra,
        )
        if look is not None:
            look.finish()
        if isinstance(why, Unfit) and why.suspect is not None:
            why.suspect.trouble = reason
        if reason is not None:
            fallback(self._outcome, name, steps, evaluations(), self._settings, reason, run.started)
            return result
        if why is not None:
            float(result.flatten()[0])  # waits for the device
        report = sequential_report(self._outcome, name, steps, evaluations(), self._settings, run.started)
        if isinstance(why, NothingWins):
            if look is None:
                why.known.learn_plain(name, steps, time.perf_counter() - begun)
            else:
                look.tell(report)
            why.known.evaluations[name] = evaluations() / max(steps, 1)
            report.plan = f"{look or why}, took {report.seconds:.3g} s"
        return result

    def _solve(self, run: _Given, looked: int) -> Tensor:
        model, x, sigmas, options = run.model, run.x, run.sigmas, run.extra_args["model_options"]
        trouble = self._check(run)
        known = KNOWN.of(model.inner_model, x, parts_of(model, options))
        planned, whole = None, (name_of(self.function), tuple(sigmas.tolist()))
        try:
            check_name(self.function)
            alone = self._settings.one_by_one is not None and (trouble is not None or known.mixes is not None)
            if self._settings.plans and self.warm is None and not self._outcome.want_trajectory and not alone:
                doubted = needs_probe(model, options) and whole not in known.passed
                planned = plain_if_best(known, name_of(self.function), run.steps, self._settings, doubted)
            captured = capture(self.function, self.extra, model, x, sigmas, run.extra_args)
            if captured.handed_on and has_readers(model, options):
                raise Unfit(f"the sampler passes {captured.handed_on[0]!r} to the model's patches in every step")
            trial = None
            if needs_probe(model, options):
                trial = Trial(known, x, captured.sigmas, whole, may_remember(model, options))
            given = model, x, sigmas, run.extra_args
            problem, why = fitting(lambda s: problem_of(captured, whole[0], s, *given), self._settings, trouble, trial)
        except CaptureError as error:
            raise Unfit(str(error)) from None
        probing, spent = (0.0, 0) if trial is None else (trial.seconds, trial.rows)
        solution = self._solved(run, problem, known)
        report = solution.report
        known.learn(report)
        report.probe_nfe += spent + looked
        if why is None:
            self._tell_refusal(report, problem.refusal or self._settings.own_refusal)
        else:
            planned, report.plan = None, f"{report.solver}, one noise level a call, as {why}"
        _account(report, run.started, probing)
        if planned is not None:
            known.learn_outcome(planned, report, report.seconds - probing)
        self._outcome.report = report
        sigmas.copy_(captured.schedule)
        captured.drawn()  # nodes that draw without a seed go on as behind the plain sampler
        return solution.x

    def _check(self, run: _Given) -> Trouble | None:
        """What is known to speak against calls of several noise levels, where calls of one each may serve.

        Raises:
            Unfit: this run is known not to be fit before anything is read off.
        """
        if len(run.sigmas) < 2:
            raise Unfit("there are no steps to run")
        if not isinstance(run.model, comfy.samplers.KSamplerX0Inpaint):
            raise Unfit(f"the model comes wrapped as {type(run.model).__name__}, which is not the host's own wrapper")
        trouble = known_trouble(run.model, run.extra_args["model_options"], run.x.shape[0])
        if trouble is not None and not (trouble.alone and self._settings.one_by_one):
            raise Unfit(trouble.why)
        return trouble

    def _solved(self, run: _Given, problem: Problem, known: Known) -> Solution:
        """The engine's solution, from the trajectory given where that can be; its own is kept where it is wanted.

        Raises:
            Unfit: the model returned numbers that are not finite, or a patch does not take the calls.
        """
        latent = _latent_format(run.model)
        cold = _cold_reason(self.warm, run.x, latent)
        warm, foreign = _of_this(self.warm, self._outcome.problem)
        batched, options = problem.batched, problem.options
        put_back = batched.remembered() if needs_probe(run.model, run.extra_args["model_options"]) else None
        run.live.starting()
        run.live.begin(known.seconds.get(1))
        try:
            with tqdm(total=run.steps, disable=run.disable) as bar:
                solution = solve(
                    problem.system,
                    problem.denoise,
                    options,
                    warm=warm if cold is None else None,
                    callback=self._telling(run, problem, bar),
                    keep_trajectory=self._outcome.want_trajectory,
                    machine=known.machine(batched.most(problem.system.S)) if options.solver == "auto" else None,
                )
        except Exception as error:
            if put_back is not None:
                put_back()
            if isinstance(error, ValueError) and batched.output is not None and not batched.output.isfinite().all():
                raise Unfit("the model returned NaN or infinity") from error
            if put_back is None or not batched.failed or is_oom(error):
                raise
            words = f"({type(error).__name__}: {error})"
            if batched.largest < 2:
                raise Unfit(f"the model fails in the parallel run {words}") from None
            # a patch may keep what has the size of the call before; the plain sampler shows whether it is at fault
            raise Unfit(f"the model does not take calls of different sizes {words}", suspect=known) from None
        solution.report.warm = cold or (solution.report.warm and solution.report.warm + foreign)
        kept = solution.trajectory
        self._outcome.trajectory = None if kept is None else replace(kept, latent=latent)
        return solution

    def _tell_refusal(self, report: Report, why: str | None) -> None:
        """Say in the plan why collocation has not served a run that asked for it, if there is a reason."""
        if why is not None and self._settings.solver == "collocation":
            report.plan = f"{report.solver} instead of collocation, as {why}"
        elif why is not None and self._settings.aims and self._settings.solver == "auto":
            report.plan = f"{report.plan or report.solver}; no collocation, as {why}"

    @staticmethod
    def _telling(run: _Given, problem: Problem, bar: Any) -> Callable[[Progress], None]:
        """Each round for the live widget, for ``bar``, which shows it where the host's samplers do, and for the host's
        callback, which draws the progress bar and the picture."""
        steps, callback, sigmas, shown = run.steps, run.callback, run.sigmas, problem.shown

        def tell(progress: Progress) -> None:
            run.live.round(progress, problem.options.tolerance)
            bar.set_postfix(rounds=progress.round, refresh=False)
            bar.update(progress.frozen * steps // progress.rows - bar.n)
            if callback is None:
                return
            step = min(steps - 1, max(progress.frozen * steps // progress.rows - 1, 0))
            picture = progress.picture if shown is None or shown.picture is None else shown.picture
            level = sigmas[step]
            callback({"x": progress.picture, "denoised": picture, "i": step, "sigma": level, "sigma_hat": level})

        return tell
