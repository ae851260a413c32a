"""One model call for many noise levels: ``denoise(x [W, B, ...], sigma [W]) -> [W, B, ...]`` over the host's guider.

The host's samplers call the model with one noise level for all B pictures, and parts of the host lean on that. What is
laid out, tiled or grouped here makes a call of W*B rows ([w, b], b fastest) equal W calls of B rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from .reach import remembered

#: The host's own margin between what it estimates and what it finds free.
_MARGIN = 1.5
#: Noise levels are the same that differ by this share.
_SAME = 1e-5


def cond_lists(guider: Any) -> dict[str, list[dict[str, Any]]]:
    """Every list of prepared conds that the guider holds: its ``conds``, and attributes of the same form."""
    found = {f"conds.{name}": conds for name, conds in guider.conds.items() if conds}
    for name, value in vars(guider).items():
        if isinstance(value, list) and value and all(isinstance(c, dict) and "model_conds" in c for c in value):
            found[name] = value
    return found


def controls_of(cond: dict[str, Any]) -> Iterator[Any]:
    """The chain of ControlNets of a cond."""
    control = cond.get("control")
    while control is not None:
        yield control
        control = getattr(control, "previous_controlnet", None)


def foreign_controls(guider: Any) -> list[dict[str, Any]]:
    """The conds with a ControlNet that is another pack's."""
    conds = [cond for conds in cond_lists(guider).values() for cond in conds]
    return [c for c in conds if any(type(own).__module__ != "comfy.controlnet" for own in controls_of(c))]


def _single(value: Any) -> float:
    """``value`` rounded to float32, in which the host compares bounds with its noise levels."""
    return float(np.float32(float(value)))


def active_parts(guider: Any, sigma: float) -> tuple[bool, ...]:
    """Which conds and ControlNets are active at ``sigma``; the host reads this off a batch's first row only."""
    sigma = _single(sigma)
    active: list[bool] = []
    for _, conds in sorted(cond_lists(guider).items()):
        for cond in conds:
            start, end = cond.get("timestep_start"), cond.get("timestep_end")
            if start is not None or end is not None:
                active.append((start is None or sigma <= _single(start)) and (end is None or sigma >= _single(end)))
            for control in controls_of(cond):
                window = getattr(control, "timestep_range", None)
                if window is not None:
                    active.append(_single(window[1]) <= sigma <= _single(window[0]))
    return tuple(active)


def _sized(cond: dict[str, Any], batch: int) -> dict[str, Any]:
    """``cond`` with exactly ``batch`` rows, as the host would cut or repeat it for one noise level."""
    sized = dict(cond)
    sized["model_conds"] = {k: v.process_cond(batch_size=batch, area=None) for k, v in cond["model_conds"].items()}
    if "mask" in cond:
        sized["mask"] = cond["mask"][:batch]
    return sized


def sized_guider(guider: Any, batch: int) -> Any:
    """A shallow copy of ``guider`` whose conds have exactly ``batch`` rows, so that tiling keeps (w, b) -> b."""
    twin = copy.copy(guider)
    twin.conds = {name: [_sized(c, batch) for c in conds] if conds else conds for name, conds in guider.conds.items()}
    for name, conds in cond_lists(guider).items():
        if not name.startswith("conds."):
            setattr(twin, name, [_sized(c, batch) for c in conds])
    return twin


def is_oom(error: BaseException) -> bool:
    """Whether ``error`` says that memory has run out."""
    if isinstance(error, comfy.model_management.InterruptProcessingException):
        return False  # where torch has no exception of its own for this, the host takes any for one
    asks = getattr(comfy.model_management, "is_oom", None)
    return bool(asks(error)) if asks else isinstance(error, comfy.model_management.OOM_EXCEPTION)


def _with_tap(options: dict[str, Any], taken: list[Tensor], keep_uncond: bool) -> dict[str, Any]:
    """``options`` that also append each call's unconditional picture to ``taken``."""

    def tap(args: dict[str, Any]) -> Tensor:
        taken.append(args["uncond_denoised"])
        return args["denoised"]

    return comfy.model_patcher.set_model_options_post_cfg_function(dict(options), tap, keep_uncond)


class BatchedModel:
    """The model of a running sampler, callable with many noise levels at once.

    Args:
        model: the ``KSamplerX0Inpaint`` of this run.
        extra_args: what the sampler passes to it.
        batch: B, the pictures of the latent.
        keep_uncond: compute the unconditional picture even at cfg 1.
        bounds: noise levels at which patches begin or end; those on either side of one do not share a call.

    Attributes:
        calls: model calls made so far, of so many rows. largest: most noise levels in one of them.
        output: ``[W, B, ...]`` the denoised pictures of the last call, for previews and for a look at what went wrong.
        failed: whether the model has raised an error; the error itself would keep the call's tensors.
    """

    def __init__(
        self,
        model: Any,
        extra_args: dict[str, Any],
        batch: int,
        keep_uncond: bool = False,
        bounds: Sequence[float] = (),
    ) -> None:
        self._keep_uncond = keep_uncond
        # a patch may keep something in the options, of another size than the plain sampler's
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        self._args = dict(extra_args, model_options=options)
        self._model, self._batch, self.bounds = model, batch, tuple(bounds)
        self._guider = sized_guider(model.inner_model, batch)
        self._most: int | None = None  # rows that a call may hold, once memory has run out
        self.calls = self.rows = self.largest = 0
        self.output: Tensor | None = None
        self.failed = False

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``D [W, B, ...]`` of ``x`` ``[W, B, ...]`` at ``sigma`` ``[W]``.

        Raises:
            InterruptProcessingException: the user has cancelled.
            Exception: whatever the model raises; out of memory only when a single row does not fit.
        """
        out = torch.empty_like(x)
        self._evaluate(x, sigma, out, None)
        return out

    def with_uncond(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(D, u)``, the denoised and the unconditional pictures, each ``[W, B, ...]``."""
        out, uncond = torch.empty_like(x), torch.empty_like(x)
        self._evaluate(x, sigma, out, uncond)
        return out, uncond

    @property
    def patches(self) -> tuple[Any, ...]:
        """What holds the patches of this run."""
        return self._args["model_options"], getattr(self._guider, "model_options", {})

    def remembered(self) -> Callable[[], None]:
        """What the patches keep now; the returned function puts it back, and begins ControlNets of other packs anew."""
        put_back = remembered(*self.patches)
        theirs = foreign_controls(self._guider)

        def begin_anew() -> None:
            put_back()
            comfy.samplers.pre_run_control(self._guider.inner_model, theirs)

        return begin_anew

    def breaks(self, sigmas: Tensor) -> tuple[int, ...]:
        """Rows of the levels ``sigmas`` ``[K]`` from which other prompts, ControlNets or patches count."""
        kinds = [self._kind(level) for level in sigmas.tolist()]
        return tuple(row for row in range(1, len(kinds)) if kinds[row] != kinds[row - 1])

    def most(self, x: Tensor) -> int:
        """How many of the rows of ``x`` ``[W, B, ...]`` one call may hold by the host's own estimate of memory."""
        return self._fitting(x, len(x))

    def _evaluate(self, x: Tensor, sigma: Tensor, out: Tensor, uncond: Tensor | None) -> None:
        """Fill ``out``, and ``uncond`` where it is asked for, in calls of as many rows as fit."""
        levels = sigma.to(x.device, torch.float32)
        for pending in self.groups(sigma):
            while pending:
                comfy.model_management.throw_exception_if_processing_interrupted()
                chosen = pending[: self._fitting(x, len(pending))]
                if self._attempt(x, levels, chosen, out, uncond):
                    del pending[: len(chosen)]
                else:
                    # here, outside the handler, the failed call's tensors are no longer referenced
                    self._most = len(chosen) // 2
                    comfy.model_management.soft_empty_cache()
        self.output = out

    def groups(self, sigmas: Tensor) -> list[list[int]]:
        """The rows that may share a call."""
        groups: dict[Hashable, list[int]] = {}
        for row, level in enumerate(sigmas.tolist()):
            groups.setdefault(self._kind(level), []).append(row)
        return list(groups.values())

    def _kind(self, sigma: float) -> Hashable:
        """Equal for noise levels at which the same prompts, ControlNets and patches count.

        Whether a patch counts that begins or ends right there is not known.
        """
        above = sum(sigma > bound * (1 + _SAME) for bound in self.bounds)
        on = sum(sigma >= bound * (1 - _SAME) for bound in self.bounds)
        return active_parts(self._guider, sigma), above, on

    def _attempt(self, x: Tensor, levels: Tensor, rows: list[int], out: Tensor, uncond: Tensor | None) -> bool:
        """One call; False where several rows ran out of memory."""
        options = self._args["model_options"]
        taken: list[Tensor] = []
        if uncond is not None:
            options = _with_tap(options, taken, self._keep_uncond)
        try:
            part, level = (x, levels) if len(rows) == len(x) else (x[rows], levels[rows])
            out[rows] = self._call(part, level, options).to(out.dtype)
            if uncond is not None:
                uncond[rows] = taken[-1].reshape(part.shape).to(out.dtype)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            if len(rows) == 1 or not is_oom(error):
                self.failed = True
                raise
            return False
        self.calls, self.rows, self.largest = self.calls + 1, self.rows + len(rows), max(self.largest, len(rows))
        return True

    def _call(self, x: Tensor, levels: Tensor, options: dict[str, Any]) -> Tensor:
        """The model on all of ``x`` ``[w, B, ...]`` in one batch."""
        w = len(x)
        model, args = copy.copy(self._model), dict(self._args, model_options=options)
        model.inner_model = self._guider
        mask = args.get("denoise_mask")
        if mask is not None:
            args["denoise_mask"], args["model_options"] = self._masks(x, levels, mask, options)
            model.noise, model.latent_image = self._tiled(model.noise, w), self._tiled(model.latent_image, w)
        flat = model(x.flatten(0, 1), levels.repeat_interleave(self._batch), **args)
        return flat.unflatten(0, (w, self._batch))

    def _masks(self, x: Tensor, levels: Tensor, mask: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Every row's inpainting mask, and ``options`` without the function that made it (DifferentialDiffusion)."""
        function = options.get("denoise_mask_function")
        if function is None:
            return self._tiled(mask, len(x)), options
        context = {"model": self._model.inner_model, "sigmas": self._model.sigmas}
        masks = [function(level.expand(self._batch), mask, extra_options=context) for level in levels]
        rest = {k: v for k, v in options.items() if k != "denoise_mask_function"}
        return torch.cat([m.expand(self._batch, *m.shape[1:]) for m in masks]), rest

    def _tiled(self, value: Any, w: int) -> Any:
        """A ``[B, ...]`` tensor for w rows; one with a single picture broadcasts by itself."""
        if not torch.is_tensor(value) or value.shape[0] == 1 or w == 1:
            return value
        return value.repeat(w, *[1] * (value.ndim - 1))

    def _fitting(self, x: Tensor, wanted: int) -> int:
        """How many of ``wanted`` rows one call may hold by the host's own estimate of memory."""
        most = min(wanted, self._most or wanted)
        if most == 1:
            return 1
        free = self._free(x.device)
        while most > 1 and self._needed(x, most) * _MARGIN >= free:
            most = max(1, min(most - 1, int(most * 0.75)))
        return most

    def _needed(self, x: Tensor, w: int) -> float:
        conds = [c for conds in cond_lists(self._guider).values() for c in conds]
        shapes: dict[str, list[list[int]]] = {}
        for cond in conds:
            for name, value in cond["model_conds"].items():
                size = list(value.size())
                shapes.setdefault(name, []).append([size[0] * w, *size[1:]] if len(size) > 1 else size)
        rows = w * self._batch * max(len(conds), 1)
        return float(self._guider.inner_model.memory_required([rows, *x.shape[2:]], cond_shapes=shapes))

    def _free(self, device: torch.device) -> float:
        asks = getattr(self._guider.model_patcher, "get_free_memory", None)
        return float(asks(device) if asks else comfy.model_management.get_free_memory(device))
