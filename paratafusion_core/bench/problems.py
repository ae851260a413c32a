"""What the suites solve: the embedded network, the mixture and the ideal denoiser, under one name each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..cli.sample import SAMPLERS, Task
from ..demo import model
from ..demo.ideal import Ideal
from ..demo.mixture import Mixture
from ..demo.prompt import COLOURS, SHAPES, SIZES
from ..denoisers import Denoise, as_flow
from ..noise import draw
from ..schedules import SCHEDULES

MODELS = ("demo", "mixture", "ideal")


@dataclass(frozen=True)
class Setting:
    """A sampler's run on a model: what a sequential reference depends on, together with the seed."""

    model: str
    sampler: str
    schedule: str
    steps: int
    cfg: float

    @property
    def flow(self) -> bool:
        return self.schedule == "flow"


def prompts() -> Iterator[str]:
    """Prompts in an order that mixes sizes, colours and shapes, for ever; seed n takes the n-th."""
    for i in itertools.count():
        yield f"{SIZES[i % 2]} {COLOURS[i % 6]} {SHAPES[(i + i // 6) % 6]}"


def prompt_of(seed: int) -> str:
    """The prompt that a seed takes."""
    return next(itertools.islice(prompts(), seed, None))


@lru_cache(maxsize=2)
def network(device: str) -> model.DemoNet:
    return model.load(device=device)


@lru_cache(maxsize=1)
def mixture() -> Mixture:
    return Mixture.make()


@lru_cache(maxsize=1)
def ideal() -> Ideal:
    return Ideal.make()


def model_of(setting: Setting, seed: int, device: str = "cpu") -> tuple[Denoise, tuple[int, ...], float | None, float]:
    """``denoise``, a picture's shape, the peak of PSNR (None: the reference's own range), the data's rms."""
    prompt, cfg, flow = prompt_of(seed), setting.cfg, setting.flow
    if setting.model == "demo":
        denoise = model.denoiser(network(device), prompt, cfg, 1, flow)
        return denoise, model.SHAPE, 2.0, model.DATA_RMS
    if setting.model == "ideal":
        data = ideal()
        return data.denoiser(data.label_of(prompt), cfg, flow), data.shape, 2.0, data.data_rms
    modes = mixture()
    denoise = modes.denoiser(modes.label_of(prompt), cfg)
    return as_flow(denoise) if flow else denoise, modes.shape, None, modes.data_rms


def make_task(setting: Setting, seed: int, device: str = "cpu") -> Task:
    """The run of ``setting`` and ``seed``, in float32."""
    denoise, shape, peak, rms = model_of(setting, seed, device)
    sigmas = SCHEDULES[setting.schedule](setting.steps)
    start, noise = draw(seed, 1, shape, setting.steps)
    x0 = (start * (1.0 if setting.flow else float(sigmas[0]))).to(device)
    system = SAMPLERS[setting.sampler](x0, sigmas, noise.to(device), setting.flow)
    return Task(system, denoise, peak, rms, setting.flow)
