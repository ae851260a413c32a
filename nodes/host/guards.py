"""What cannot be evaluated at several noise levels in one batch, and so runs on the plain sampler, with the reason.

A list of what is known to mix the rows of a batch or to remember the step before, found by the name of the function
that does it. What is not known is probed (``probing.py``), which needs no names.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import re
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from numbers import Number
from types import FunctionType
from typing import Any

import comfy.model_patcher
import numpy as np
import torch

from .batched import cond_lists, controls_of, foreign_controls
from .reach import closure, patches_in

#: module (its last name) -> (functions, or any; why). Modules are the host's own node files and patches. In a call for
#: one noise level these do what they do in the host's own sampler.
_ONE_LEVEL: dict[str, tuple[tuple[str, ...], str]] = {
    "nodes_perpneg": ((), "Perp-Neg takes its projection over the whole batch"),
    "nodes_mahiro": ((), "Mahiro (Positive-Biased Guidance) averages over the whole batch"),
    "nodes_video_model": (("linear_cfg",), "Video Linear/Triangle CFG scales a picture by its place in the batch"),
    "nodes_lumina2": (("renorm_cfg_func",), "RenormCFG handles one picture at one noise level"),
    "nodes_eps": (("temporal_score_rescaling",), "Temporal Score Rescaling handles one noise level at a time"),
    "nodes_slg": ((), "Skip Layer Guidance reads its range off the first picture"),
    "nodes_model_downscale": ((), "PatchModelAddDownscale reads its range off the first picture"),
    "nodes_custom_sampler": (("predict_noise_wrapper",), "CFG Override reads its range off the first picture"),
    "nodes_hidream_o1": (("smoothing_wrapper",), "patch seam smoothing reads its range off the first picture"),
    "nodes_model_patch": (("restore_cfg_function",), "SUPIR's restore guidance reads its range off the first picture"),
    "supir_patch": ((), "SUPIR reads its range off the first picture"),
    "lllite": ((), "LLLite reads its range off the whole batch"),
}
#: The same for what follows the steps, or draws random numbers.
_EVERY_STEP: dict[str, tuple[tuple[str, ...], str]] = {
    "nodes_easycache": ((), "EasyCache and LazyCache reuse the step before"),
    "nodes_context_windows": ((), "context windows advance with the steps"),
    "context_windows": ((), "context windows advance with the steps"),
    "nodes_tomesd": ((), "ToMe merges tokens by random numbers drawn for the whole batch"),
}
#: Parts of the names of other packs' modules that reuse the step before.
_CACHES = ("teacache", "magcache", "fbcache", "wavespeed", "deepcache", "cache_dit", "cache-dit", "easycache")
#: Attributes of patches in nodes_model_patch whose range is read off the first picture.
_RANGED_ATTRIBUTES = ("sigma_start", "sigma_end")
#: Model classes that mix rows.
_MODELS = {"LTXAV": "LTX-2 shares the largest noise level of a batch between its pictures"}


#: Model classes of the host whose networks treat the pictures of a batch one by one; each is in the tests, but for
#: SDXL, which is SD 1.5's network with one more vector a picture.
_ONE_BY_ONE = frozenset({"BaseModel", "SDXL", "SD3", "Flux", "WAN21"})
_PLAIN_GUIDERS = frozenset({"CFGGuider", "Guider_Basic"})
#: Attributes of a guider that are walked elsewhere, or are the prompts.
_NOT_OF_THE_GUIDER = frozenset({"model_options", "conds", "original_conds"})
#: Attributes of the host's guiders that are guidance scales.
_SCALES = frozenset({"cfg", "cfg1", "cfg2"})
#: Numbers of a graph that are looked at, of a tensor, and letters of a word: a strength is none of longer ones.
_MOST_NUMBERS, _FEW_NUMBERS, _SHORT = 4096, 16, 32
#: What the host puts into the options for a run or a call, beside seeds: no strengths, and new each time.
_PASSING = frozenset({"sample_sigmas", "sigmas", "uuids", "cond_or_uncond"})


@dataclass(frozen=True)
class Trouble:
    """Why a graph cannot be evaluated at several noise levels in one call.

    Attributes:
        why: in words. alone: whether calls for one level each, of which some are left out, are as good as the host's.
    """

    why: str
    alone: bool = False


def _known_trouble(function: Any) -> Trouble | None:
    """Why this function cannot see several noise levels at once, or None."""
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    tail = module.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[-1]
    name = getattr(function, "__name__", type(function).__name__)
    for table, alone in ((_EVERY_STEP, False), (_ONE_LEVEL, True)):
        listed = table.get(tail)
        if listed is not None and (not listed[0] or name in listed[0]):
            return Trouble(listed[1], alone)
    if any(part in module.lower() for part in _CACHES):
        return Trouble(f"{name} reuses the step before, as step caches do")
    if tail == "nodes_apg" and closure(function).get("momentum"):
        return Trouble("APG's momentum carries the guidance of the step before")
    if tail == "nodes_hypertile" and (closure(function).get("swap_size") or 0) > 2:  # of two it always takes the first
        return Trouble("HyperTile draws its tiles anew in each model call")
    if tail == "nodes_model_patch" and all(hasattr(function, a) for a in _RANGED_ATTRIBUTES):
        return Trouble(f"{name} reads its range off the first picture", alone=True)
    return None


def _cond_troubles(guider: Any, batch: int) -> Iterator[Trouble]:
    for conds in cond_lists(guider).values():
        for cond in conds:
            for hook in getattr(cond.get("hooks"), "hooks", ()):
                if getattr(getattr(hook, "hook_keyframe", None), "keyframes", None):
                    yield Trouble("hooks with keyframes change the weights with the noise level")
            for control in controls_of(cond):
                if len(getattr(getattr(control, "timestep_keyframes", None), "keyframes", None) or ()) > 1:
                    yield Trouble("a ControlNet's keyframes advance with the steps")
                hint = getattr(control, "cond_hint_original", None)
                count = hint.shape[0] if torch.is_tensor(hint) and hint.ndim >= 3 else 1
                if count > 1 and batch % count:
                    yield Trouble(f"a ControlNet has {count} images for a batch of {batch}", alone=True)
                if count > 1 and hasattr(control, "control_input"):
                    why = "a T2I-Adapter with several images keeps what its first call has made of them"
                    yield Trouble(why, alone=True)


def known_trouble(model: Any, options: dict[str, Any], batch: int) -> Trouble | None:
    """What speaks against batching this graph, or None when nothing is known to; the worst is told.

    Args:
        model: the ``KSamplerX0Inpaint`` of the run. options: its ``model_options``. batch: pictures of the latent.
    """
    found = list(_troubles(model, options, batch))
    return next((trouble for trouble in found if not trouble.alone), found[0] if found else None)


def _troubles(model: Any, options: dict[str, Any], batch: int) -> Iterator[Trouble]:
    guider = model.inner_model
    network = guider.inner_model
    if options.get("context_handler") is not None:
        yield Trouble("context windows advance with the steps")
    for kind in type(network).__mro__:
        if kind.__name__ in _MODELS:
            yield Trouble(_MODELS[kind.__name__], alone=True)
    if getattr(getattr(getattr(network, "diffusion_model", None), "params", None), "meanflow", False):
        yield Trouble("MeanFlow models read the next noise level of the schedule")
    for function in (*type(guider).__mro__, *patches_in([options, getattr(guider, "model_options", {})])):
        known = _known_trouble(function)
        if known is not None:
            yield known
    yield from _cond_troubles(guider, batch)


def needs_probe(model: Any, options: dict[str, Any]) -> bool:
    """Whether anything in this graph is not known to keep the pictures of a batch apart.

    A plain checkpoint with plain prompts is known to, and saves the evaluations of the probe.
    """
    guider = model.inner_model
    network = guider.inner_model
    plain_network = type(network).__module__ == "comfy.model_base" and type(network).__name__ in _ONE_BY_ONE
    plain_network &= _is_hosts(network)
    extras = any(
        k in cond for conds in cond_lists(guider).values() for cond in conds for k in ("hooks", "control", "gligen")
    )
    return not plain_network or extras or _patched(guider, options)


def has_readers(model: Any, options: dict[str, Any]) -> bool:
    """Whether something beside the host's own network may read what a sampler adds to the transformer's options."""
    guider = model.inner_model
    return not _is_hosts(guider.inner_model) or _patched(guider, options)


def may_remember(model: Any, options: dict[str, Any]) -> bool:
    """Whether a call may depend on those before it.

    The host's own networks, ControlNets and hooks keep nothing, nor do its functions and guiders of ``_ONE_LEVEL``.
    """
    guider = model.inner_model
    kind = type(guider)
    known_guider = kind.__name__ in _PLAIN_GUIDERS or _keeps_nothing(kind)
    if foreign_controls(guider) or not _is_hosts(guider.inner_model) or not known_guider or _rebuilt(guider):
        return True
    return not all(map(_keeps_nothing, patches_in([options, getattr(guider, "model_options", {})])))


def _keeps_nothing(part: Any) -> bool:
    """Whether this is a function or a class of the host's node files that ``_ONE_LEVEL`` lists; an object may keep
    something."""
    if not isinstance(part, (FunctionType, type)):
        return False
    # another pack's function may bear the name of the one that it wraps, functools.wraps does that
    module = part.__module__ if isinstance(part, type) else part.__globals__.get("__name__")
    trouble = _known_trouble(part)
    return re.split(r"[./\\]", str(module))[-2:-1] == ["comfy_extras"] and trouble is not None and trouble.alone


def _is_hosts(network: Any) -> bool:
    """Whether what it evaluates is a network of the host's, or the pack's own."""
    inside = type(getattr(network, "diffusion_model", None)).__module__
    return inside.startswith(("comfy.ldm.", f"{__package__}."))


def _patched(guider: Any, options: dict[str, Any]) -> bool:
    """Whether functions are patched in, or the guider is not known to combine pictures one by one."""
    patched = any(True for _ in patches_in([options, getattr(guider, "model_options", {})]))
    return type(guider).__name__ not in _PLAIN_GUIDERS or patched or _rebuilt(guider)


def _rebuilt(guider: Any) -> bool:
    """Whether parts of the model were replaced, or code was injected into it."""
    replaced = set(getattr(guider.model_patcher, "object_patches", {})) - {"model_sampling"}
    return bool(replaced) or bool(getattr(guider.model_patcher, "injections", None))


@dataclass(frozen=True)
class Parts:
    """The functions and patch objects of a graph, by identity, and the numbers that they may read.

    Attributes:
        key: of what a call of the model goes through, with its numbers, of which one may be how far pictures mix.
        alive: give the objects back while they live; where one has gone, another may have taken its identity.
        kind: what they are by name, the same after a number was changed in the graph, so that a call takes about as
            long; None where that is not known.
    """

    key: Hashable
    alive: tuple[Callable[[], Any], ...]
    kind: Hashable = None

    @property
    def gone(self) -> bool:
        """Whether one of them lives no more."""
        return any(own() is None for own in self.alive)


def parts_of(model: Any, options: dict[str, Any]) -> Parts:
    """What is patched into this graph, beside the weights."""
    guider = model.inner_model
    found = [*patches_in([options, getattr(guider, "model_options", {})])]
    numbers = _numbers(guider, options, found)
    for name, value in vars(guider).items():
        # a function of its own, or the network of a second model
        if name != "inner_model" and callable(value) and _reference(value) is not None:
            found.append(value)
        if isinstance(value, comfy.model_patcher.ModelPatcher):
            found += getattr(value, "object_patches", {}).values()
            found += [part for some in getattr(value, "injections", {}).values() for part in some]
    ranges: list[tuple[float | None, ...]] = []
    controls: list[Any] = []
    for conds in cond_lists(guider).values():
        for cond in conds:
            bounds = (cond.get("timestep_start"), cond.get("timestep_end"))
            ranges.append(tuple(None if bound is None else float(bound) for bound in bounds))
            controls += controls_of(cond)
            # the host clones hooks for every run, with what they refer to
            found += [getattr(hook, "hook_ref", hook) for hook in getattr(cond.get("hooks"), "hooks", ())]
            found += cond.get("gligen", ())[1:2]
    found += map(_network_of, controls)
    objects = {id(own): own for part in found for own in _objects(part)}
    objects.pop(id(guider), None)  # methods of its own are bound to it, and it is made anew for every prompt
    alive = tuple(_reference(own) for own in objects.values())
    # of an object that cannot be watched nobody can tell whether another has taken its place
    watched: Hashable = tuple(sorted(objects)) if None not in alive else object()
    names = tuple(sorted(_name(own) for own in objects.values()))
    rest = type(guider), tuple(ranges)
    # each copy of a network is evaluated, in its own range
    chain = tuple((id(_network_of(c)), str(getattr(c, "timestep_range", None))) for c in controls)
    key, kind = (*rest, watched, chain, numbers), (*rest, names, tuple(_name(_network_of(c)) for c in controls))
    return Parts(key, tuple(own for own in alive if own is not None), kind)


def _numbers(guider: Any, options: dict[str, Any], patches: list[Any]) -> Hashable:
    """What the guider and the patches may take a strength from: plain values, each with its place."""
    aside = _NOT_OF_THE_GUIDER.union(cond_lists(guider))
    own = {name: value for name, value in vars(guider).items() if name not in aside}
    # cfg alone mixes nothing; but a patch may read it, and what a patch mixes grows with it: it is changed all day,
    # and counts by its power of four above 1
    patched = _patched(guider, options)
    for name, value in own.items():
        if name in _SCALES and isinstance(value, (int, float)):
            own[name] = None if not patched else "one" if value == 1 else _power_of_four(value - 1)
    held = [(_name(part), _attributes(part)) for patch in patches for part in _objects(patch)]
    whole = [own, options, getattr(guider, "model_options", {}), held]
    leaves = sorted(itertools.islice(_leaves(whole, (), set()), _MOST_NUMBERS))
    return hashlib.sha256(repr(leaves).encode()).digest()


def _power_of_four(value: float) -> int:
    """The least n with ``|value|`` below 4^n."""
    exponent = math.frexp(min(abs(value), 1e9))[1]  # the least one of two
    return (exponent + 1) // 2


def _attributes(part: Any) -> dict[str, Any]:
    """What a patch object may keep a strength in: where a node gives its methods, nothing else tells of a change.

    Whole numbers are left out, as a patch that counts its calls would be probed in every run.
    """
    if isinstance(part, type):
        return {}
    held = getattr(part, "__dict__", {})
    return {k: v for k, v in held.items() if type(v) is not int and k not in ("_parameters", "_buffers", "_modules")}


def _leaves(value: Any, place: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], str]]:
    """``(place, value)`` of numbers and short words anywhere inside, written out: NaN does not equal itself."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if math.prod(value.shape) <= _FEW_NUMBERS:
            yield place, repr(value.tolist())
    elif isinstance(value, Number) or (isinstance(value, str) and len(value) <= _SHORT):
        yield place, repr(value)
    elif len(place) > 8 or not isinstance(value, (dict, list, tuple, set, frozenset)) or id(value) in seen:
        return
    elif isinstance(value, dict):
        seen.add(id(value))
        for name, item in value.items():
            label = _label(name)
            if label not in _PASSING and not label.endswith("seed"):
                yield from _leaves(item, (*place, label), seen)
    else:
        seen.add(id(value))
        for i, item in enumerate(value):
            yield from _leaves(item, (*place, "" if isinstance(value, (set, frozenset)) else str(i)), seen)


def _label(name: Any) -> str:
    """A key in words; an object's own would tell where it lies."""
    if isinstance(name, tuple):
        return "/".join(map(_label, name))
    return str(name) if isinstance(name, (str, int)) else type(name).__name__


def _network_of(control: Any) -> Any:
    """What a ControlNet of the host evaluates, which the copies that are made for every prompt and strength share."""
    if type(control).__module__ != "comfy.controlnet" or hasattr(control, "control_weights"):
        return control  # a control LoRA makes its network anew in every run
    return getattr(control, "control_model", None) or getattr(control, "t2i_model", None) or control


def _name(own: Any) -> tuple[str, str]:
    kind = own if hasattr(own, "__qualname__") else type(own)
    return str(getattr(kind, "__module__", None)), kind.__qualname__


def _objects(part: Any) -> tuple[Any, ...]:
    """A bound method is made anew by every look at it; what it is bound to is not."""
    return (part.__self__, part.__func__) if inspect.ismethod(part) else (part,)


def _reference(own: Any) -> Callable[[], Any] | None:
    try:
        return weakref.ref(own)
    except TypeError:
        return None
