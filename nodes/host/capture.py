"""Any SAMPLER as data: ComfyUI's own sampler function is run with a stand-in for the model and read off.

A fixed-step sampler is affine in the model's outputs, ``x_k = S_k + sum_{i<k} C[k,i] D_i + U[k,i] u_i``, with D_i the
denoised picture and u_i the unconditional one (only the CFG++ family looks at it). Outputs of 0 on the real start give
S with the sampler's own noise; unit outputs on a tiny probe give C and U; random ones show whether it is affine at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from .batched import is_oom

SamplerFunction = Callable[..., Tensor]
#: ``(evaluation, x) -> (D, u)``, what the stand-in answers.
Answer = Callable[[int, Tensor], tuple[Tensor, Tensor]]

_POST_CFG, _NO_CFG1 = "sampler_post_cfg_function", "disable_cfg1_optimization"
#: Samplers known to be no fixed system; the checks below would find them too, more slowly.
_REFUSED = {
    "dpm_adaptive_function": "dpm_adaptive chooses its steps from the picture, so they are not known beforehand",
    "sample_dpm_adaptive": "dpm_adaptive chooses its steps from the picture, so they are not known beforehand",
    "sample_ar_video": "ar_video carries a key-value cache from step to step",
}
#: By how much noise levels may differ, relatively, between two answers of the stand-in, and from the run itself, whose
#: float32 cancels where sigma_down is the small difference of two large numbers: 0.15 % after a zero terminal SNR's
#: first level of 4518, on some processors.
_LEVELS_WITHIN, _LEVELS_ROUNDED = 1e-6, 1e-2
#: Sizes of the outputs by which linearity is tried: what clamps them leaves small ones as they are.
_SIZES = (1.0, 100.0)
#: Largest deviation from linearity, relative to the largest coefficient.
_AFFINE_WITHIN = {torch.float64: 1e-9, torch.float32: 1e-3}
#: Weights, and states of outputs of 0, that differ by less are equal but for rounding: ddpm's last state by up to 2e-5,
#: where uni_pc, the nearest of those that end in another picture than they show, differs by 3e-3.
_EQUAL_WITHIN = 1e-4
#: A schedule that ends at this noise level, or above it, leaves noise that can be seen.
_VISIBLE = 1e-2


class CaptureError(ValueError):
    """The sampler cannot be written as a system; the message is the reason, one clause for the artist."""


@dataclass(frozen=True)
class Captured:
    """A sampler's run as data.

    Attributes:
        S: ``[K+1, B, ...]`` the states with every output at 0, on the device and in the dtype of the start.
        C: ``[K+1, K]`` float64 on the CPU, the weights of the denoised pictures.
        U: ``[K+1, K]`` the weights of the unconditional pictures, or None where the sampler does not look at them.
        sigmas: ``[K]`` float64 on the CPU, the noise level of each evaluation.
        schedule: ``[steps + 1]`` the sampler's sigmas after its run: uni_pc writes into them, and the host reads the
            last one again.
        keep_uncond: the sampler asks for the unconditional picture even at cfg 1.
        shown: the evaluation whose denoised picture the sampler shows last.
        ends_elsewhere: that picture is known, and is not the final state.
    """

    S: Tensor
    C: Tensor
    U: Tensor | None
    sigmas: Tensor
    schedule: Tensor
    keep_uncond: bool = False
    shown: int = 0
    ends_elsewhere: bool = False

    @property
    def evaluations(self) -> int:
        """K."""
        return len(self.sigmas)

    @property
    def noise_left(self) -> bool:
        """Noise is left over, so that the denoised picture is what an artist can look at."""
        return float(self.schedule[-1]) >= _VISIBLE

    @property
    def shows_another(self) -> bool:
        """A denoised picture is to be shown in place of the final state."""
        return self.noise_left or self.ends_elsewhere


class _PostCfg(dict):
    """What a sampler's own post-CFG function may look at; anything else cannot be affine in D and u."""

    def __missing__(self, key: str) -> Any:
        raise CaptureError(f"it looks at {key!r} of the guidance, which is no fixed combination of the model's outputs")


class _GuiderView:
    """The guider's attributes without its model calls: a capture never evaluates the network."""

    _HIDDEN = frozenset({"predict_noise", "outer_predict_noise", "sample", "inner_sample", "outer_sample"})

    def __init__(self, guider: Any) -> None:
        self._guider = guider

    def __getattr__(self, name: str) -> Any:
        if name in self._HIDDEN:
            raise CaptureError(f"it calls the guider's {name} itself")
        return getattr(self._guider, name)


class _StandIn:
    """Takes the place of ``KSamplerX0Inpaint``: records each call and answers from ``answer``."""

    def __init__(self, real: Any, options: dict[str, Any], answer: Answer, limit: int) -> None:
        self.inner_model = _GuiderView(real.inner_model)
        self.sigmas, self.noise, self.latent_image = real.sigmas, real.noise, real.latent_image
        self._options, self._answer, self._limit = options, answer, limit
        self.states: list[Tensor] = []
        self.levels: list[float] = []
        self.reads_uncond = self.keep_uncond = False
        self.shown: Any = None  # the denoised picture that the sampler showed last

    def show(self, step: dict[str, Any]) -> None:
        """The sampler's callback."""
        self.shown = step.get("denoised")

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        index = len(self.states)
        if index >= self._limit:
            raise CaptureError(f"it evaluates the model more than {self._limit} times")
        level = torch.as_tensor(sigma).flatten()
        if len(level) not in (1, x.shape[0]) or not bool((level == level[0]).all()):
            raise CaptureError("it evaluates pictures of one batch at different noise levels")
        self.states.append(x.clone())
        self.levels.append(float(level[0]))
        D, u = self._answer(index, x)
        return self._after_cfg(D, u, x, sigma, kwargs.get("model_options") or {})

    def _after_cfg(self, D: Tensor, u: Tensor, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> Tensor:
        """Run the post-CFG functions that the sampler itself has set."""
        changed = {k for k in {*options, *self._options} if options.get(k) is not self._options.get(k)}
        if changed - {_POST_CFG, _NO_CFG1}:
            raise CaptureError(f"it changes {sorted(changed - {_POST_CFG, _NO_CFG1})[0]!r} of the model's options")
        self.keep_uncond |= bool(options.get(_NO_CFG1))
        for function in options.get(_POST_CFG, ()):
            self.reads_uncond = True
            D = function(_PostCfg(denoised=D, uncond_denoised=u, input=x, sigma=sigma, model_options=options))
        return D


def random_numbers(x: Tensor) -> Callable[[], None]:
    """Where torch's generators stand now; the returned function puts them back there."""
    cpu = torch.get_rng_state()
    kind = x.device.type
    backend: Any = None if kind == "cpu" else getattr(torch, kind, None)  # torch.cuda, torch.mps, torch.xpu ..
    which = () if kind == "mps" else (x.device,)  # of which there is one
    device = backend.get_rng_state(*which) if hasattr(backend, "get_rng_state") else None

    def put_back() -> None:
        torch.set_rng_state(cpu)
        if device is not None:
            backend.set_rng_state(device, *which)

    return put_back


@contextmanager
def same_random_numbers(x: Tensor) -> Iterator[None]:
    """Leave torch's generators as they were, so that the sampler draws what it would have drawn."""
    put_back = random_numbers(x)
    try:
        yield
    finally:
        put_back()


@dataclass(frozen=True)
class _Recipe:
    """One sampler call, but for the model and the start."""

    function: SamplerFunction
    settings: dict[str, Any]
    real: Any
    extra_args: dict[str, Any]
    limit: int

    def drive(self, x: Tensor, sigmas: Tensor, answer: Answer) -> tuple[_StandIn, Tensor]:
        """Run the sampler from ``x`` with the stand-in; returns it and the result. It may write into ``sigmas``."""
        options = {k: v for k, v in self.extra_args.get("model_options", {}).items() if k not in (_POST_CFG, _NO_CFG1)}
        model = _StandIn(self.real, options, answer, self.limit)
        # a copy: samplers of the CFG++ family write their options into the dictionary they are given
        args = dict(self.extra_args, model_options=dict(options))
        with same_random_numbers(x), torch.no_grad():
            result = self.function(
                model, x.clone(), sigmas, extra_args=args, callback=model.show, disable=True, **self.settings
            )
        for state in (*model.states, result):
            if state.shape != x.shape:
                raise CaptureError(f"it changes the latent's shape from {list(x.shape)} to {list(state.shape)}")
        return model, result


def _zeros(_: int, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.zeros_like(x)


def _weighted(weights: Tensor) -> Answer:
    """Evaluation k answers D in channel k and u in channel K + k, scaled by ``weights`` ``[2K]``."""
    count = len(weights) // 2

    def answer(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if k >= count:
            raise CaptureError("the number of its evaluations depends on the picture")
        D, u = torch.zeros_like(x), torch.zeros_like(x)
        D[:, k], u[:, count + k] = weights[k], weights[count + k]
        return D, u

    return answer


def _same(levels: list[float], others: list[float], within: float) -> bool:
    return torch.allclose(torch.tensor(levels).double(), torch.tensor(others).double(), rtol=within, atol=1e-6)


def _coefficients(
    recipe: _Recipe, levels: list[float], sigmas: Tensor, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """``[K+1, 2K]`` weights of every D and u in every state, and those of the picture shown last (:func:`_shown`).

    Raises:
        CaptureError: the sampler is not affine in them, or its steps depend on them.
    """
    count = len(levels)
    start = torch.zeros((1, 2 * count, *[1] * (like.ndim - 2)), dtype=dtype, device="cpu")
    steps = sigmas.to("cpu", dtype)

    seen: list[list[float]] = []
    pictures: list[Any] = []

    def response(answer: Answer) -> Tensor:
        model, result = recipe.drive(start, steps.clone(), answer)
        pictures.append(model.shown)
        if len(model.levels) != count:
            raise CaptureError("the number of its evaluations depends on the picture")
        seen.append(model.levels)
        if not (_same(model.levels, seen[0], _LEVELS_WITHIN) and _same(model.levels, levels, _LEVELS_ROUNDED)):
            raise CaptureError("the noise levels of its evaluations depend on the picture")
        return torch.stack([*model.states, result]).reshape(count + 1, 2 * count).double()

    still = response(_zeros)
    weights = response(_weighted(torch.ones(2 * count, dtype=dtype))) - still
    shown = _shown(*pictures, count)
    scale = max(float(weights.abs().max()), 1.0)
    random = torch.randn(2 * count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in _SIZES:
        amplitudes = (size * random).to(dtype)
        bent = response(_weighted(amplitudes)) - still - weights * amplitudes.double()
        if not weights.isfinite().all() or not float(bent.abs().max()) <= _AFFINE_WITHIN[dtype] * scale * 10 * size:
            raise CaptureError("its steps are no fixed combination of the model's outputs")
    return weights, shown


def _shown(still: Any, unit: Any, count: int) -> Tensor | None:
    """``[2K]`` weights of a picture ``[1, 2K, ...]`` from what is shown for outputs of 0 and of 1; None: none of D."""
    if not all(torch.is_tensor(picture) and picture.numel() == 2 * count for picture in (still, unit)):
        return None
    weights = (unit - still).flatten().double()
    return weights if weights[:count].any() else None


def _row_shown(picture: Tensor | None, levels: list[float], end: float) -> int:
    """The evaluation that a ``picture`` of these weights shows, else the first one nearest to ``end``."""
    rows = range(len(levels))
    if picture is None:
        return min(rows, key=lambda row: abs(levels[row] - end))
    return int(picture[: len(levels)].abs().argmax())


def _ends_elsewhere(picture: Tensor | None, row: int, last: Tensor, S: Tensor) -> bool:
    """Whether what is shown, a ``picture`` of these weights, is D of ``row`` and not the state of weights ``last``.

    uni_pc's is D but for rounding, which grows as the noise level falls: clearly nearer is enough.
    """
    if picture is None:
        return False
    apart, still = float((last - picture).abs().max()), float(S[-1].abs().max())
    if apart <= _EQUAL_WITHIN and still <= _EQUAL_WITHIN * max(float(S[-2].abs().max()), 1.0):
        return False
    off = picture.clone()
    off[row] -= 1
    return 2 * float(off.abs().max()) < max(apart, still)


def _probe(recipe: _Recipe, levels: list[float], sigmas: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """:func:`_coefficients` in float64, or in float32 where the sampler insists on it (uni_pc)."""
    try:
        return _coefficients(recipe, levels, sigmas, like, torch.float64)
    except RuntimeError:  # mixed dtypes inside the sampler
        return _coefficients(recipe, levels, sigmas, like, torch.float32)


def check_name(function: SamplerFunction) -> None:
    """Raises CaptureError: ``function`` is known to be no system."""
    name = getattr(function, "__name__", "")
    if name in _REFUSED:
        raise CaptureError(_REFUSED[name])


def capture(
    function: SamplerFunction,
    settings: dict[str, Any],
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
) -> Captured:
    """Write down what ``function(model, x, sigmas, extra_args=..., **settings)`` would do.

    Args:
        function: a sampler in k-diffusion's form, as ``KSAMPLER.sampler_function``.
        settings: its own options, as ``KSAMPLER.extra_options``.
        model: the host's ``KSamplerX0Inpaint`` of this run; never called.
        x: the noisy start ``[B, ...]``.
        sigmas: ``[steps + 1]`` the schedule.
        extra_args: what the sampler passes to the model.

    Raises:
        CaptureError: the sampler cannot be written as a system.
        Exception: memory has run out.
    """
    check_name(function)
    recipe = _Recipe(function, settings, model, extra_args, limit=8 * len(sigmas) + 64)
    try:
        return _capture(recipe, x, sigmas)
    except (CaptureError, comfy.model_management.InterruptProcessingException):
        raise
    except Exception as error:  # another pack's sampler may fail on the stand-in in any way at all
        if is_oom(error):
            raise
        raise CaptureError(f"it could not be read off ({type(error).__name__}: {error})") from error


def _capture(recipe: _Recipe, x: Tensor, sigmas: Tensor) -> Captured:
    schedule = sigmas.clone()
    run, result = recipe.drive(x, schedule, _zeros)
    if not run.states:
        raise CaptureError("it does not evaluate the model")
    weights, picture = _probe(recipe, run.levels, sigmas, x)
    count = len(run.levels)
    C, U = weights[:, :count], weights[:, count:]
    later = torch.ones(count + 1, count, dtype=torch.bool).triu()
    if weights[torch.cat([later, later], 1)].any():
        raise CaptureError("a state depends on a later evaluation")
    S = torch.stack([*run.states, result])
    if not S.isfinite().all():
        raise CaptureError("its states are not finite when the model answers 0")
    levels = torch.tensor(run.levels, dtype=torch.float64)
    shown = _row_shown(picture, run.levels, float(sigmas[-2]))
    elsewhere = _ends_elsewhere(picture, shown, weights[-1], S)
    used = U if run.reads_uncond and U.any() else None
    return Captured(S, C, used, levels, schedule, run.keep_uncond, shown, elsewhere)
