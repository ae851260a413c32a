"""Bad input: a ValueError of one sentence that names the input, its value and what is allowed."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paratafusion_core import Machine, Options, System, Trajectory, load_trajectory, schemes, solve
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.denoisers import from_network, guided
from paratafusion_core.noise import draw
from paratafusion_core.options import PRESETS, SOLVERS
from paratafusion_core.schedules import SCHEDULES, flow, normal

modest = settings(deadline=None, max_examples=40)
few = settings(deadline=None, max_examples=10)  # each example solves
K, BATCH, SHAPE = 10, 2, (2, 3, 3)
MIXTURE = Mixture.make(modes=8, classes=4, shape=SHAPE)
SIGMAS = normal(K)

NOT_REAL = st.sampled_from([math.nan, math.inf, -math.inf, "much", True, [1.0]])
NOT_COUNTS = st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.binary(), st.just([8]))
DENOISE = MIXTURE.denoiser(1, 4.0)
CONSTRUCTORS: dict[str, Callable[..., System]] = {
    "ddim": schemes.ddim,
    "ddpm": lambda x0, sigmas, **more: schemes.ddpm(x0, sigmas, noise=noise_for(x0, sigmas), **more),
    "euler": schemes.euler,
    "dpmpp_2m": schemes.dpmpp_2m,
    "dpmpp_2m_sde": lambda x0, sigmas, **more: schemes.dpmpp_2m_sde(x0, sigmas, noise=noise_for(x0, sigmas), **more),
}


def noise_for(x0: Tensor, sigmas: Tensor) -> Tensor:
    return torch.zeros(max(sigmas.numel() - 1, 0), *x0.shape)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(0, BATCH, SHAPE)[0].to(dtype) * float(SIGMAS[0])


def system() -> System:
    return schemes.ddim(start(), SIGMAS)


def refused(name: str, value: str | None, call: Callable[[], Any]) -> str:
    """``call`` raises the sentence; ``value`` None where the value is too large to print."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert re.search(rf"\b{name}\b", text), text
    assert value is None or value in text
    assert re.search("allowed|needed|may|leave it out", text), text
    assert "\n" not in text and ". " not in text, "one sentence"
    return text


@modest
@given(st.sampled_from(["window", "history", "order", "max_rounds"]), NOT_COUNTS)
def test_options_refuse_what_is_no_count(name: str, value: Any) -> None:
    refused(name, repr(value), lambda: Options(**{name: value}))


@modest
@given(st.text().filter(lambda t: t not in ("full", "auto")) | st.none())
def test_window_in_words(word: str | None) -> None:
    text = refused("window", repr(word), lambda: Options(window=word))  # type: ignore[arg-type]
    assert "at least 1" in text


@modest
@given(st.floats(max_value=0, exclude_max=True) | NOT_REAL)
def test_tolerance(value: Any) -> None:
    refused("tol", repr(value), lambda: Options(tol=value))


@modest
@given(st.floats(max_value=0) | NOT_REAL)
def test_data_rms(value: Any) -> None:
    refused("data_rms", repr(value), lambda: Options(data_rms=value))


@modest
@given(st.floats(max_value=0) | NOT_REAL)
def test_peak(value: Any) -> None:
    refused("peak", repr(value), lambda: Options(peak=value))


@modest
@given(st.sampled_from(["solver", "preset"]), st.text() | st.none() | st.integers())
def test_choices(name: str, value: Any) -> None:
    assume(value not in (*SOLVERS, *PRESETS))
    text = refused(name, repr(value), lambda: Options(**{name: value}))
    assert ("quasi-newton" if name == "solver" else "balanced") in text


@pytest.mark.parametrize(("name", "value"), [("rows", 12), ("target_db", 42.0)])
def test_options_of_a_solver_that_is_not_there(name: str, value: float) -> None:
    refused(name, repr(value), lambda: Options(**{name: value}))  # type: ignore[arg-type]


@st.composite
def broken_sigmas(draw: Callable[..., Any]) -> tuple[list[float], str]:
    """Falling noise levels with one fault, and the number that the message has to show."""
    levels = draw(st.lists(st.floats(0.01, 1000), min_size=2, max_size=8, unique=True))
    levels = sorted(levels, reverse=True)
    at = draw(st.integers(0, len(levels) - 2))
    fault = draw(st.sampled_from(["nan", "inf", "repeats", "rises", "negative"]))
    if fault in ("nan", "inf"):
        levels[at] = float(fault)
        return levels, fault
    if fault == "negative":
        return [*levels, -levels[-1]], repr(-levels[-1])
    levels[at + 1] = levels[at] if fault == "repeats" else levels[at] * 2
    return levels, ""


@modest
@given(st.sampled_from(list(CONSTRUCTORS)), broken_sigmas())
def test_sigmas_must_fall(scheme: str, case: tuple[list[float], str]) -> None:
    levels, shown = case
    x0 = torch.ones(1, 3)
    refused("sigmas", shown, lambda: CONSTRUCTORS[scheme](x0, torch.tensor(levels, dtype=torch.float64)))


@pytest.mark.parametrize("scheme", CONSTRUCTORS)
@pytest.mark.parametrize("sigmas", [torch.ones(1), torch.ones(0), torch.ones(2, 2), torch.tensor(3.0)])
def test_sigmas_of_a_wrong_shape(scheme: str, sigmas: Tensor) -> None:
    shape = str(list(sigmas.shape))
    refused("sigmas", shape, lambda: CONSTRUCTORS[scheme](torch.ones(1, 3), sigmas))


@pytest.mark.parametrize("scheme", CONSTRUCTORS)
def test_flow_sigmas_above_one(scheme: str) -> None:
    refused("sigmas", "1.5", lambda: CONSTRUCTORS[scheme](torch.ones(1, 3), torch.tensor([1.5, 0.5, 0.0]), flow=True))


@pytest.mark.parametrize("scheme", [schemes.ddim, schemes.dpmpp_2m_sde])
@pytest.mark.parametrize("eta", [math.nan, math.inf, -0.1, 1.1])
def test_eta(scheme: Callable[..., System], eta: float) -> None:
    noise = noise_for(start(), SIGMAS)
    refused("eta", repr(eta), lambda: scheme(start(), SIGMAS, eta=eta, noise=noise))


@pytest.mark.parametrize("scheme", [schemes.ddpm, schemes.dpmpp_2m_sde])
@pytest.mark.parametrize(
    ("noise", "shown"),
    [
        (None, "None"),
        (torch.zeros(K - 1, BATCH, *SHAPE), str([K - 1, BATCH, *SHAPE])),
        (torch.zeros(K, 1, *SHAPE), str([K, 1, *SHAPE])),
        (torch.full((K, BATCH, *SHAPE), math.nan), "NaN"),
    ],
)
def test_noise(scheme: Callable[..., System], noise: Tensor | None, shown: str) -> None:
    refused("noise", shown, lambda: scheme(start(), SIGMAS, noise=noise))


@pytest.mark.parametrize(
    ("x0", "shown"),
    [
        (torch.ones(1, 3, dtype=torch.float16), "torch.float16"),
        (torch.ones(1, 3, dtype=torch.int64), "torch.int64"),
        (torch.ones(0, 3), "[0, 3]"),
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, math.inf]]), "infinity"),
    ],
)
@pytest.mark.parametrize("scheme", CONSTRUCTORS)
def test_start(scheme: str, x0: Tensor, shown: str) -> None:
    refused("x0", shown, lambda: CONSTRUCTORS[scheme](x0, SIGMAS))


def parts(**changes: Tensor) -> dict[str, Tensor]:
    return {"S": torch.ones(4, 1, 2), "C": torch.ones(4, 3).tril(-1), "sigmas": torch.tensor([3.0, 2.0, 1.0])} | changes


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("S", torch.ones(4), "[4]"),
        ("S", torch.ones(1, 1, 2), "[1, 1, 2]"),
        ("S", torch.ones(4, 0, 2), "[4, 0, 2]"),
        ("S", torch.ones(4, 1, 2, dtype=torch.float16), "torch.float16"),
        ("S", torch.full((4, 1, 2), math.nan), "nan"),
        ("C", torch.ones(3, 3).tril(-1), "[3, 3]"),
        ("C", torch.full((4, 3), math.nan).tril(-1), "nan"),
        ("C", torch.ones(4, 3).tril(), "1.0"),
        ("sigmas", torch.ones(4), "[4]"),
        ("sigmas", torch.tensor([3.0, math.inf, 1.0]), "inf"),
        ("sigmas", torch.tensor([3.0, 2.0, -1.0]), "-1.0"),
    ],
)
def test_system(name: str, value: Tensor, shown: str) -> None:
    text = refused(name, None, lambda: System(**parts(**{name: value})))
    assert shown.lower() in text.lower()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_steps(schedule: str, steps: Any) -> None:
    refused("steps", repr(steps), lambda: SCHEDULES[schedule](steps))


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("batch", 0), ("steps", -1), ("seed", 0.5)])
def test_random_numbers(name: str, value: Any) -> None:
    refused(name, repr(value), lambda: draw(**({"seed": 0, "batch": 1, "shape": (2,)} | {name: value})))


@pytest.mark.parametrize(("name", "value"), [("cfg", math.nan), ("cfg", math.inf), ("cfg", "4"), ("label", 4)])
def test_guidance(name: str, value: Any) -> None:
    refused(name, repr(value), lambda: MIXTURE.denoiser(**({"label": 0, "cfg": 4.0} | {name: value})))


@pytest.mark.parametrize("scheme", CONSTRUCTORS)
@pytest.mark.parametrize("sigmas", ["karras", None, [1.0, "0"], {}])
def test_sigmas_that_are_no_numbers(scheme: str, sigmas: Any) -> None:
    constructor = getattr(schemes, scheme)
    refused("sigmas", repr(sigmas), lambda: constructor(start(), sigmas))


@pytest.mark.parametrize("given", ["x0", None, [1.0], SIGMAS.numpy()])
def test_what_is_no_tensor(given: Any) -> None:
    kind = type(given).__name__
    refused("x0", kind, lambda: schemes.dpmpp_2m(given, SIGMAS))
    if given is not None:
        refused("noise", kind, lambda: schemes.ddpm(start(), SIGMAS, noise=given))
    refused("D", kind, lambda: Trajectory(given, SIGMAS[:-1]))
    refused("sigmas", kind, lambda: Trajectory(torch.zeros(K, 1, 2).half(), given))


@pytest.mark.parametrize("value", ["no", None, 2.0, 0, torch.ones(2)])
def test_flow_is_true_or_false(value: Any) -> None:
    refused("flow", repr(value), lambda: Options(flow=value))


@pytest.mark.parametrize("value", ["a", 0, 2.5, True])
def test_steps_of_a_system(value: Any) -> None:
    refused("steps", repr(value), lambda: System(**parts(), steps=value))


@pytest.mark.parametrize("value", [3, "3", (0,), (K,), (2, 2), (3, 2), (1.5,), (True,), None])
def test_breaks_of_a_system(value: Any) -> None:
    refused("breaks", repr(value), lambda: System(**parts(), breaks=value))
    assert System(**parts(), breaks=[1, 2]).breaks == (1, 2)  # type: ignore[arg-type]


def test_a_machine_is_a_machine() -> None:
    refused("machine", "dict", lambda: solve(system(), never, Options("auto"), machine={1: 1.0}))  # type: ignore[arg-type]
    assert solve(system(), DENOISE, Options("auto"), machine=Machine({1: 1.0, 2: 1.1})).report.rounds <= K


@pytest.mark.parametrize(("cond", "uncond", "name"), [(3, 3, "cond"), (1, 4, "uncond"), (2, 1, None), (1, 2, None)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_contexts_belong_to_the_images(cond: int, uncond: int, name: str | None, scale: float) -> None:
    """Of one image for all, or of each; else rows would meet other images' contexts, silently where they can."""
    shown: list[Tensor] = []

    def network(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        shown.append(context)
        return x

    contexts = [torch.arange(n).reshape(n, 1) for n in (cond, uncond)]
    denoise = from_network(guided(network, *contexts, scale), "eps")
    call = functools.partial(denoise, torch.ones(4, BATCH, *SHAPE), torch.ones(4))
    if name is None:
        call()
        assert shown[0][: 4 * BATCH, 0].tolist() == [b % cond for _ in range(4) for b in range(BATCH)]
        return
    refused(name, str(max(cond, uncond)), call)
    one = from_network(guided(network, contexts[0][:2], contexts[1][:1], scale), "eps")
    refused("cond", "1", lambda: one(torch.ones(4, 1, *SHAPE), torch.ones(4))) if cond > 1 else None
    assert not shown


@pytest.mark.parametrize(
    ("wrong", "shown"), [(lambda x: x[:1], "[1, "), (lambda x: x[:, :1], ", 1, "), (lambda x: (x,), "tuple")]
)
@pytest.mark.parametrize("scale", [None, 1.0, 4.0])
def test_networks_that_return_something_else(wrong: Any, shown: str, scale: float | None) -> None:
    network = (lambda x, time: wrong(x)) if scale is None else (lambda x, time, context: wrong(x))
    if scale is not None:
        network = guided(network, torch.ones(1, 2), torch.ones(1, 2), scale)
    refused("network", shown, lambda: solve(system(), from_network(network, "v"), Options(window=3)))


def never(x: Tensor, sigma: Tensor) -> Tensor:
    pytest.fail("the model was called on bad input")


@modest
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda s: s != [BATCH, *SHAPE]))
def test_warm_start_of_another_shape(shape: list[int]) -> None:
    warm = Trajectory(torch.zeros(K, *shape, dtype=torch.float16), SIGMAS[:-1])
    text = refused("warm", str(shape), lambda: solve(system(), never, warm=warm))
    assert str([BATCH, *SHAPE]) in text


def test_flow_option_on_other_states() -> None:
    refused("sigmas", f"{float(SIGMAS[0])!r}", lambda: solve(system(), never, Options(flow=True)))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("window", [1, 4, "full"])
@pytest.mark.parametrize("row", [0, 5, K - 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_model_that_breaks_from_a_row_on(solver: str, window: int | str, row: int, bad: float) -> None:
    """The window may look ahead at broken rows; the first exact one ends the run, named."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        D = DENOISE(x, sigma)
        D[sigma <= SIGMAS[row], 1, 0] = bad  # in one image only
        return D

    options = Options(solver=solver, window=window, tol=1e-6)
    collocation = solver == "collocation"  # which may step over the row itself
    text = refused("denoise", None if collocation else f"row {row} ", lambda: solve(system(), denoise, options))
    named = re.search(r"row (\d+) \(sigma ([^)]+)\)", text)
    assert named and int(named[1]) >= row
    assert named[2] == f"{float(SIGMAS[int(named[1])]):g}"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (lambda x, sigma: x[:, :1], f"[1, 1, {', '.join(map(str, SHAPE))}]"),
        (lambda x, sigma: x.flatten(2), f"[1, {BATCH}, {math.prod(SHAPE)}]"),
        (lambda x, sigma: x[0], str([BATCH, *SHAPE])),
        (lambda x, sigma: None, "NoneType"),
        (lambda x, sigma: x.numpy(), "ndarray"),
        (lambda x, sigma: (x,), "tuple"),
    ],
)
def test_model_that_returns_something_else(solver: str, model: Any, shown: str) -> None:
    text = refused("denoise", shown, lambda: solve(system(), model, Options(solver=solver, window=1)))
    assert str([1, BATCH, *SHAPE]) in text


@modest
@given(st.binary(max_size=64))
def test_trajectory_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "foreign.safetensors"
    path.write_bytes(content)
    refused("trajectory", path.name, lambda: load_trajectory(path))


@few
@given(st.sampled_from([s for s in SOLVERS if s != "sequential"]), st.integers(1, 1000), st.sampled_from([None, 3]))
def test_a_window_beyond_the_run_is_the_full_one(solver: str, extra: int, history: int | None) -> None:
    full, wide = (
        solve(system(), DENOISE, Options(solver=solver, window=window, history=history))
        for window in ("full", K + extra)
    )
    assert torch.equal(full.x, wide.x)
    assert full.report.rows_per_round == wide.report.rows_per_round


@few
@given(st.sampled_from([1, 3, 6, "full"]), st.integers(1, 1000))
def test_an_order_beyond_the_window_is_the_full_one(window: int | str, extra: int) -> None:
    widest = K if window == "full" else int(window)
    full, high = (
        solve(system(), DENOISE, Options(solver="parataa", window=window, order=order))
        for order in (widest, widest + extra)
    )
    assert torch.equal(full.x, high.x)
    assert full.report.rows_per_round == high.report.rows_per_round


def test_flow_systems_pass() -> None:
    """What the refusals above must not refuse: a flow run from pure noise to the picture."""
    run = schemes.euler(start() / float(SIGMAS[0]), flow(K), flow=True)
    solution = solve(run, lambda x, sigma: x * 0.5, Options(flow=True))
    assert solution.x.isfinite().all()


def test_real_numbers_of_other_kinds_are_taken() -> None:
    options = Options("collocation", data_rms=Fraction(1, 2), peak=Fraction(2))
    assert (options.data_rms, options.peak) == (0.5, 2.0) and isinstance(options.peak, float)
    assert solve(system(), DENOISE, options).x.isfinite().all()
