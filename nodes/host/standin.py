"""What takes the model's place while a sampler is read off: it records calls and answers them without the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from .randomness import moved, same_random_numbers
from .reach import remembered

SamplerFunction = Callable[..., Tensor]
#: ``(evaluation, x) -> (D, u)``, what the stand-in answers.
Answer = Callable[[int, Tensor], tuple[Tensor, Tensor]]

_POST_CFG, _NO_CFG1 = "sampler_post_cfg_function", "disable_cfg1_optimization"
_OPTIONS, _TRANSFORMER = "model_options", "transformer_options"
#: What a sampler may write into the transformer's options: the host fills it anew for each call.
_LEVELS_OF_THE_RUN = "sample_sigmas"


class CaptureError(ValueError):
    """The sampler cannot be written as a system; the message is the reason, one clause for the artist."""


class _PostCfg(dict):
    """What a sampler's own post-CFG function may look at; anything else cannot be affine in D and u."""

    def __missing__(self, key: str) -> Any:
        if key == "cond_denoised":  # some keep it and make no use of it; whoever does gets no number
            return torch.full_like(self["denoised"], torch.nan)
        raise CaptureError(f"it looks at {key!r} of the guidance, which is no fixed combination of the model's outputs")


class _GuiderView:
    """The guider's attributes without its model calls: a capture never evaluates the network."""

    _HIDDEN = frozenset({"predict_noise", "outer_predict_noise", "sample", "inner_sample", "outer_sample"})

    def __init__(self, guider: Any) -> None:
        object.__setattr__(self, "_guider", guider)

    def __getattr__(self, name: str) -> Any:
        if name in self._HIDDEN:
            raise CaptureError(f"it calls the guider's {name} itself")
        return getattr(self._guider, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise CaptureError(f"it changes the guider's {name}")


class _StandIn:
    """Takes the place of ``KSamplerX0Inpaint``: records each call and answers from ``answer``.

    Attributes:
        states, levels, outputs: of each call so far, x, the noise level, and D and u; outputs where ``keep`` is set.
        reads_uncond, keep_uncond: the sampler has post-CFG functions of its own; and asks for u even at cfg 1.
        shown: the denoised picture that the sampler showed last.
        handed_on: keys of its own in the transformer's options.
        drawn: once the run is over, puts torch's generators where it has left them.
    """

    def __init__(self, real: Any, extra_args: dict[str, Any], answer: Answer, limit: int, keep: bool = False) -> None:
        self.inner_model = _GuiderView(real.inner_model)
        self.sigmas, self.noise, self.latent_image = real.sigmas, real.noise, real.latent_image
        self._real, self._given, self._answer, self._limit, self._keep = real, extra_args, answer, limit, keep
        self.states: list[Tensor] = []
        self.levels: list[float] = []
        self.outputs: list[tuple[Tensor, Tensor]] = []
        self.reads_uncond = self.keep_uncond = False
        self.shown: Any = None
        self.drawn: Callable[[], None] = lambda: None
        self.handed_on: set[str] = set()

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
        if x.requires_grad:
            raise CaptureError("it takes the model's derivative")
        self._check(kwargs)
        self.states.append(x.clone())
        self.levels.append(float(level[0]))
        D, u = self._answer(index, x)
        if self._keep:
            self.outputs.append((D.clone(), u.clone()))
        return self._after_cfg(D, u, x, sigma, kwargs.get(_OPTIONS) or {})

    def _check(self, kwargs: dict[str, Any]) -> None:
        """Raises CaptureError: the sampler changes what the model is called with, beside the state and its level."""
        for name in {*kwargs, *self._given} - {_OPTIONS, "seed"}:
            if kwargs.get(name) is not self._given.get(name):
                raise CaptureError(f"it changes the model's {name}")
        for name in ("noise", "latent_image"):
            if getattr(self, name) is not getattr(self._real, name):
                raise CaptureError(f"it changes the model's {name}")

    def _after_cfg(self, D: Tensor, u: Tensor, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> Tensor:
        """Run the post-CFG functions that the sampler itself has set."""
        given = self._given.get(_OPTIONS) or {}
        free = {_POST_CFG, _NO_CFG1, _TRANSFORMER}
        changed = sorted(k for k in {*options, *given} - free if _differ(options.get(k), given.get(k)))
        changed += self._changed(options.get(_TRANSFORMER) or {}, given.get(_TRANSFORMER) or {})
        if changed:
            raise CaptureError(f"it changes {changed[0]!r} of the model's options")
        self.keep_uncond |= bool(options.get(_NO_CFG1))
        for function in options.get(_POST_CFG, ()):
            self.reads_uncond = True
            D = function(_PostCfg(denoised=D, uncond_denoised=u, input=x, sigma=sigma, model_options=options))
        return D

    def _changed(self, options: dict[str, Any], given: dict[str, Any]) -> list[str]:
        """Keys of the transformer's options that a sampler has given another value, or brings functions in by.

        Others of its own are ``handed_on``: only a patch that knows them reads them.
        """
        others = [k for k in {*options, *given} - {_LEVELS_OF_THE_RUN} if _differ(options.get(k), given.get(k))]
        found = {str(k) for k in others if k in given or _has_functions(options[k])}
        self.handed_on |= {*map(str, others)} - found
        return sorted(found)


def _differ(value: Any, given: Any) -> bool:
    """Whether a value is another than the one given, of which containers were copied."""
    if isinstance(value, dict) and isinstance(given, dict):
        return value.keys() != given.keys() or any(_differ(value[key], given[key]) for key in given)
    if isinstance(value, list) and isinstance(given, list):
        return len(value) != len(given) or any(map(_differ, value, given))
    return value is not given


def _has_functions(value: Any, inside: bool = False) -> bool:
    """Whether this is a function, or holds anything that can be called."""
    if isinstance(value, (dict, list, tuple)):
        return any(_has_functions(item, True) for item in (value.values() if isinstance(value, dict) else value))
    return callable(value) if inside else inspect.isroutine(value)


@dataclass(frozen=True)
class Recipe:
    """One sampler call, but for the model and the start."""

    function: SamplerFunction
    settings: dict[str, Any]
    real: Any
    extra_args: dict[str, Any]
    limit: int
    start: Tensor

    def drive(self, x: Tensor, sigmas: Tensor, answer: Answer, keep: bool = False) -> tuple[_StandIn, Tensor]:
        """Run the sampler from ``x`` with the stand-in; returns it and the result. It may write into ``sigmas``.

        What it draws and keeps is put back.
        """
        options = {k: v for k, v in self.extra_args.get(_OPTIONS, {}).items() if k not in (_POST_CFG, _NO_CFG1)}
        model = _StandIn(self.real, dict(self.extra_args, model_options=options), answer, self.limit, keep)
        # a copy: samplers of the CFG++ family write their options into the dictionary they are given, others deeper
        args = dict(self.extra_args, model_options=comfy.model_patcher.create_model_options_clone(options))
        holders = self.function, self.settings
        put_back = remembered(*holders)
        try:
            with same_random_numbers(self.start, *holders) as before, torch.no_grad():
                result = self.function(
                    model, x.clone(), sigmas, extra_args=args, callback=model.show, disable=True, **self.settings
                )
                model.drawn = moved(before, self.start, *holders)
        finally:
            put_back()
        for state in (*model.states, result):
            if state.shape != x.shape:
                raise CaptureError(f"it changes the latent's shape from {list(x.shape)} to {list(state.shape)}")
        return model, result
