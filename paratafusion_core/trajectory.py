"""A run's denoised pictures, kept for warm starts: half precision, on the CPU, in safetensors files."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import check_count, check_real
from .files import write_tensors
from .timing import Timing, timing_of

FORMAT = "paratafusion-trajectory"
VERSION = 1
MAX_BYTES = 900 << 20
#: More than a file's header needs beside the facts.
_HEADER = 1024
_MAX_HEADER = 1 << 20
_LONGEST = 200
_NOTHING = type(None)
#: What a file says of a trajectory beside its tensors, and of its part, with the types that are allowed.
_FACTS: dict[str, tuple[type, ...]] = {
    "sampler": (str,),
    "seed": (int, _NOTHING),
    "flow": (bool,),
    "noisy": (bool, _NOTHING),
    "latent": (str, _NOTHING),
    "problem": (str, _NOTHING),
}
_PART: dict[str, tuple[type, ...]] = {
    "final": (int,),
    "tolerance": (float, int),
    "solver": (str,),
    "system": (str,),
    "slope": (float, int),
    "slope_sigma": (float, int),
    "surprise": (float, int),
    "rows": (list,),
    "rounds": (int,),
    "nfe": (int,),
    "timing": (dict, _NOTHING),
}


@dataclass(frozen=True)
class Part:
    """How far a capped run came, and which one it was: what a second run needs to go on from there.

    Raises ValueError where a number is out of its bounds.

    Attributes:
        final: leading rows that were final, at least 1.
        tolerance: of their freeze rule, 0 for exact ones. solver: whose rule it was.
        system: fingerprint of the run's :class:`System`.
        slope, slope_sigma, surprise: for the report's ``doubt``: the steepest slope measured and its noise level; how
            far collocation's D was from what was foreseen.
        changes: ``[2m, k, B, ...]`` float16 of k rows, those behind the final ones or ``rows``, as the solver
            remembered them: what leads from a row's last evaluation to where it stands (x, then D), then the changes
            between its evaluations (x, D, x, ..), newest first; 0 where a row has none. None where it has no memory.
            ParaTAA has its residuals in place of D, and before all that what leads from where D leads to where a row
            stands, and 0.
        rows, rounds, nfe: of collocation, the rows that were evaluated, ascending, and what they cost.
        timing: what an automatic window has gone by; None where the window was fixed, and in older files.
    """

    final: int
    tolerance: float
    solver: str
    system: str
    slope: float = 0.0
    slope_sigma: float = 0.0
    surprise: float = 0.0
    changes: Tensor | None = field(default=None, compare=False, repr=False)
    rows: tuple[int, ...] = ()
    rounds: int = 0
    nfe: int = 0
    timing: Timing | None = None

    def __post_init__(self) -> None:
        rows = (-1, *self.rows)
        if not all(type(row) is int for row in rows) or any(a >= b for a, b in pairwise(rows)):
            raise ValueError(f"trajectory rows are {list(self.rows)!r:.80}; whole numbers that rise from 0 are allowed")
        changes = self.changes
        if changes is not None and (changes.ndim < 3 or len(changes) % 2 or 0 in changes.shape):
            raise ValueError(f"trajectory changes have shape {list(changes.shape)}; [2m, k, B, ...] is allowed")
        real = changes is None or (changes.is_floating_point() and changes.dtype.itemsize >= 2)
        if changes is not None and not (real and all(bool(row.isfinite().all()) for row in changes)):
            raise ValueError("trajectory changes hold NaN, infinity or no floats; finite floats are allowed")
        check_count("trajectory final", self.final)
        for name, least in (("rounds", min(len(self.rows), 1)), ("nfe", len(self.rows))):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"trajectory {name} is {value!r}; a whole number of at least {least} is allowed")
        for name in ("tolerance", "slope", "slope_sigma", "surprise"):
            check_real(f"trajectory {name}", getattr(self, name), low=0.0)


@dataclass(frozen=True)
class Trajectory:
    """D of every evaluation of a run. States follow from it: ``x = S + C D``.

    Attributes:
        D: ``[K, B, ...]`` float16 on the CPU.
        sigmas: ``[K]`` float64: D belongs to a noise level, not to a step.
        sampler: the sampler's name.
        seed: of the run, None when not known.
        flow: the sigmas are flow-matching times.
        latent: what the latent's channels mean, in the words of the program that made it; None when not known.
        problem: tells apart what the system does not: the model, the prompts, their strength; None when not known.
        part: of a run that was capped before all rows were final, else None.
        noisy: the sampler added noise of its own in every step, so that D jumps from row to row; False in files that
            do not say it.

    Raises:
        ValueError: no tensors, or shapes that do not fit together.
    """

    D: Tensor
    sigmas: Tensor
    sampler: str = "custom"
    seed: int | None = None
    flow: bool = False
    latent: str | None = None
    problem: str | None = None
    part: Part | None = None
    noisy: bool = False

    def __post_init__(self) -> None:
        for name in ("flow", "noisy"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        if self.seed is not None:
            object.__setattr__(self, "seed", check_count("trajectory seed", self.seed, low=-(1 << 63)))
        for name in ("D", "sigmas"):
            if not isinstance(getattr(self, name), Tensor):
                raise ValueError(f"trajectory {name} is a {type(getattr(self, name)).__name__}; a tensor is allowed")
        if self.D.ndim < 2 or 0 in self.D.shape or not self.D.is_floating_point() or self.D.dtype.itemsize < 2:
            raise ValueError(
                f"trajectory D is {self.D.dtype} of shape {list(self.D.shape)}; floats [K, B, ...] are allowed"
            )
        if not all(bool(row.isfinite().all()) for row in self.D):  # row by row: a mask of all of it is large
            raise ValueError("trajectory D holds NaN or infinity; finite numbers are allowed")
        real = self.sigmas.is_floating_point() and self.sigmas.dtype.itemsize >= 4
        fits = real and self.sigmas.shape == self.D.shape[:1]
        if not fits or not self.sigmas.isfinite().all() or (self.sigmas < 0).any():
            shape = list(self.sigmas.shape)
            raise ValueError(
                f"trajectory sigmas has shape {shape}; {len(self.D)} finite numbers of at least 0 are allowed"
            )
        if self.part is not None and not 0 < self.part.final < len(self.D):
            raise ValueError(
                f"trajectory part has {self.part.final} final rows; fewer than its {len(self.D)} rows are allowed"
            )
        if self.part is not None:
            self._check_fits(self.part)

    def _check_fits(self, part: Part) -> None:
        rows, changes, K = part.rows, part.changes, len(self.D)
        if rows and rows[-1] >= K:
            raise ValueError(f"trajectory rows reach {rows[-1]}; at most {K - 1}, the last of its rows, is allowed")
        if changes is None:
            return
        left = len(rows) if rows else K - part.final
        if changes.shape[2:] != self.D.shape[1:] or changes.shape[1] > left or (rows and changes.shape[1] < left):
            raise ValueError(
                f"trajectory changes have shape {list(changes.shape)}; {'' if rows else 'at most '}{left} rows of "
                f"shape {list(self.D.shape[1:])} are allowed"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``[B, ...]``, the latent's shape."""
        return tuple(self.D.shape[1:])

    @property
    def nbytes(self) -> int:
        """Memory that its pictures take."""
        changes = None if self.part is None else self.part.changes
        return self.D.nbytes + (0 if changes is None else changes.nbytes)

    def has_levels(self, sigmas: Tensor, flow: bool) -> bool:
        """Whether these are its own noise levels, to rounding: a host may compute them on the CPU, then on the GPU."""
        same = flow == self.flow and sigmas.shape == self.sigmas.shape
        return same and torch.allclose(sigmas.double(), self.sigmas.double(), rtol=1e-5, atol=0.0)

    def onto(self, sigmas: Tensor, flow: bool) -> Trajectory:
        """This trajectory at other noise levels: D linear in lambda = log(alpha / sigma), held beyond the ends.

        ``flow`` tells what the new sigmas are; VE-scaled and flow levels meet in lambda. Of levels that repeat (two
        evaluations of a step) the last one counts. The same levels give back the same trajectory.
        """
        if self.has_levels(sigmas, flow):
            return self
        have, order = torch.unique(_log_snr(self.sigmas, self.flow), return_inverse=True)
        last = torch.zeros_like(have, dtype=torch.long).scatter_reduce(
            0, order, torch.arange(len(order), device=order.device), "amax", include_self=False
        )
        want = _log_snr(sigmas, flow).clamp(have[0], have[-1])
        if len(have) == 1:
            mixed = self.D[last[torch.zeros_like(want, dtype=torch.long)]]
        else:
            high = torch.searchsorted(have, want).clamp(1, len(have) - 1)
            part = ((want - have[high - 1]) / (have[high] - have[high - 1])).float()
            low_D, high_D = self.D[last[high - 1]].float(), self.D[last[high]].float()
            mixed = torch.lerp(low_D, high_D, part.reshape(-1, *[1] * (self.D.ndim - 1))).to(self.D.dtype)
        return replace(self, D=mixed, sigmas=sigmas.double(), flow=flow, part=None)


def _log_snr(sigmas: Tensor, flow: bool) -> Tensor:
    alpha = 1 - sigmas.double() if flow else torch.ones_like(sigmas, dtype=torch.float64)
    return (alpha.clamp(min=1e-6) / sigmas.double().clamp(min=1e-6)).log()


def half(values: Tensor) -> Tensor:
    """float16 without infinities."""
    return values.clamp(-65504, 65504).half()


def save_trajectory(path: str | Path, trajectory: Trajectory) -> None:
    """Write ``trajectory`` to a safetensors file, atomically.

    Raises:
        OSError: the folder is missing or not writable.
        ValueError: its sampler's name, or another of its texts, is none that a file takes, or the file would be larger
            than :func:`load_trajectory` takes by default.
    """
    facts = {name: getattr(trajectory, name) for name in _FACTS}
    _check_facts("trajectory", facts, _FACTS)
    part, tensors = trajectory.part, {"D": half(trajectory.D), "sigmas": trajectory.sigmas}
    facts["part"] = None if part is None else _facts_of(part)
    if part is not None and part.changes is not None:
        tensors["changes"] = half(part.changes)
    metadata = {"format": FORMAT, "version": str(VERSION), "facts": json.dumps(facts)}
    size = sum(tensor.nbytes for tensor in tensors.values()) + sum(map(len, metadata.values())) + _HEADER
    if size > MAX_BYTES:
        raise ValueError(f"trajectory has {size} bytes; a file of at most {MAX_BYTES} is allowed, which can be loaded")
    write_tensors(Path(path), tensors, metadata)


def _facts_of(part: Part) -> dict[str, Any]:
    facts = {name: getattr(part, name) for name in _PART}
    return {**facts, "timing": None if part.timing is None else part.timing.facts()}


def load_trajectory(path: str | Path, max_bytes: int = MAX_BYTES) -> Trajectory:
    """Read a file of :func:`save_trajectory`. Nothing of a file that is refused is kept in memory.

    Raises:
        ValueError: the file is missing, too large, truncated, of another kind or version, or holds bad numbers.
    """
    path = Path(path)
    _check_envelope(path, max_bytes)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if metadata.get("format") != FORMAT or names - {"changes"} != {"D", "sigmas"}:
                raise ValueError(f"trajectory {path.name} is another kind of file; files of {FORMAT} are allowed")
            if metadata.get("version") != str(VERSION):
                raise ValueError(f"trajectory {path.name} has version {metadata.get('version')}; {VERSION} is allowed")
            facts = json.loads(metadata.get("facts", "{}"))
            # copies: the tensors are the file's own pages, which change with it, and are gone where it is cut off
            with torch.device("cpu"):
                tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"trajectory {path.name} is damaged ({error}); a whole safetensors file is allowed") from None
    known, part = _checked(path, facts, _FACTS), facts.get("part")
    if part is not None:
        told = _checked(path, part, _PART)
        timing = None if told.get("timing") is None else timing_of(told["timing"])
        part = Part(**{**told, "rows": tuple(told["rows"]), "timing": timing}, changes=tensors.get("changes"))
    return Trajectory(tensors["D"], tensors["sigmas"], **known, part=part)


def _checked(path: Path, table: Any, kinds: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """The entries of a file's table that are known, each of an allowed type."""
    if not isinstance(table, dict):
        raise ValueError(f"trajectory {path.name} has facts of {type(table).__name__}; a table is allowed")
    _check_facts(f"trajectory {path.name}", table, kinds)
    return {name: table[name] for name in kinds if name in table}


def _check_facts(whose: str, table: dict[str, Any], kinds: dict[str, tuple[type, ...]]) -> None:
    """Raises ValueError for an entry of another type, or a text that a file does not take."""
    for name, allowed in kinds.items():
        value = table.get(name)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{whose} has {name} {value!r:.80}; {names} is allowed")
        if isinstance(value, str) and (len(value) > _LONGEST or not value.isprintable()):
            raise ValueError(f"{whose} has {name} {value!r:.80}; at most {_LONGEST} letters that print are allowed")


def _check_envelope(path: Path, max_bytes: int) -> None:
    """Refuse by size and header length, before anything is read whole."""
    if not path.is_file():
        raise ValueError(f"trajectory {path.name} is no file; the path of a saved trajectory is allowed")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"trajectory {path.name} has {size} bytes; at most {max_bytes} are allowed")
    with path.open("rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 < header <= min(size - 8, _MAX_HEADER):
        raise ValueError(f"trajectory {path.name} is truncated or no safetensors file; a whole one is allowed")
