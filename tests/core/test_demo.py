"""The embedded problems: prompts, rendered pictures, the closed-form mixture, the network."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from paratafusion_core.demo import gate, model
from paratafusion_core.demo.mixture import Mixture
from paratafusion_core.demo.network import DemoNet
from paratafusion_core.demo.prompt import _SYNONYMS, COLOURS, SHAPES, SIZES, VOCABULARY, encode, words_of
from paratafusion_core.demo.shapes import SIDE, render
from paratafusion_core.schedules import timestep_of

modest = settings(deadline=None, max_examples=30)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@modest
@given(
    st.permutations(["large", "red", "ring", "top", "left", "dark"]),
    st.lists(st.sampled_from(["a", "the", "on", "in", "corner", ",", "!"]), max_size=4),
    st.booleans(),
)
def test_words_in_any_order(words: list[str], fillers: list[str], shout: bool) -> None:
    text = " ".join([*words[:3], *fillers, *words[3:]])
    got = encode(text.upper() if shout else text)
    assert {VOCABULARY[i] for i in got.nonzero()[:, 0].tolist()} == set(words)
    assert got.dtype == torch.float32 and set(got.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("said", "meant"), _SYNONYMS.items())
def test_synonyms(said: str, meant: str) -> None:
    assert torch.equal(encode(said), encode(meant))
    assert words_of(f"{said}, {meant}") == [meant]


def test_the_vocabulary_asked_for() -> None:
    asked = "small large red green blue yellow magenta white circle square triangle cross ring diamond"
    assert set(asked.split()) <= set(VOCABULARY)
    every = [encode(" ".join(words)) for words in itertools.product(SIZES, COLOURS, SHAPES)]
    assert len(torch.stack(every).unique(dim=0)) == len(every) == 72


@pytest.mark.parametrize("empty", ["", "  ", "a picture of the", "..."])
def test_nothing_said_is_unconditional(empty: str) -> None:
    assert not encode(empty).any()


@pytest.mark.parametrize(("wrong", "hint"), [("rde", "red"), ("circel", "circle"), ("purpel", "purple"), ("q", None)])
def test_unknown_words(wrong: str, hint: str | None) -> None:
    with pytest.raises(ValueError, match=f"prompt: unknown word '{wrong}'") as caught:
        encode(f"large {wrong}")
    text = str(caught.value)
    assert ("did you mean" in text) == (hint is not None)
    assert hint is None or f"did you mean '{hint}'?" in text
    assert all(word in text for word in VOCABULARY)
    with pytest.raises(ValueError, match=f"^text: unknown word '{wrong}'"):
        encode(wrong, "text")


@modest
@given(st.text(alphabet=st.characters(categories=["L"]), min_size=1))
def test_any_other_word_is_named(word: str) -> None:
    known = {*VOCABULARY, *_SYNONYMS}
    try:
        assert set(words_of(word)) <= known
    except ValueError as error:
        assert repr(word.lower()) in str(error)


@pytest.mark.parametrize(
    ("prompt", "group"),
    [
        ("red blue ring", "colour"),
        ("pink and red", "colour"),
        ("ring square", "shape"),
        ("large tiny dot", "size"),
        ("left right", "column"),
        ("top center", "row"),
        ("dark gray", "background"),
    ],
)
def test_two_of_a_kind(prompt: str, group: str) -> None:
    with pytest.raises(ValueError, match=rf"prompt: names more than one {group} \("):
        encode(prompt)


def test_pictures_depend_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = render(40, generator(3))
    torch.manual_seed(2)
    again, other = render(40, generator(3)), render(40, generator(4))
    for field in ("images", "context", "shape", "colour"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert not torch.equal(first.images, other.images)


def test_classes_are_balanced_and_named() -> None:
    count = 6000
    batch = render(count, generator())
    for classes, names in ((batch.shape, SHAPES), (batch.colour, COLOURS)):
        p = 1 / len(names)
        expected, spread = count * p, math.sqrt(count * p * (1 - p))
        assert (classes.bincount(minlength=len(names)) - expected).abs().max() < 5 * spread
        columns = torch.tensor([VOCABULARY.index(name) for name in names])
        said = batch.context[:, columns]
        assert ((said == 0) | (columns == columns[classes][:, None])).all(), "what is said is true"
        assert abs(float(said.sum()) - 0.85 * count) < 5 * math.sqrt(count * 0.85 * 0.15)


def test_pictures_are_in_range_and_their_rms_is_as_stated() -> None:
    images = render(2048, generator(1)).images
    assert images.shape == (2048, 3, SIDE, SIDE) and images.abs().max() <= 1
    assert float((images**2).mean().sqrt()) == pytest.approx(model.DATA_RMS, rel=0.03)


def test_every_context_can_be_said() -> None:
    for context in render(200, generator(2)).context:
        words = [VOCABULARY[i] for i in context.nonzero()[:, 0].tolist()]
        random.Random(0).shuffle(words)
        assert torch.equal(encode(" ".join(words)), context)


MIXTURE = Mixture.make(modes=12, classes=3, shape=(2, 3, 2))
CASES = [(label, cfg) for label in (0, 2) for cfg in (0.0, 1.0, 4.0)]
levels = st.floats(-3, 8.5).map(math.exp)  # up to a zero-terminal-SNR schedule's 4518


def states(sigma: float, seed: int, count: int = 1) -> Tensor:
    noise = torch.randn(count, *MIXTURE.shape, generator=generator(seed), dtype=torch.float64)
    return noise * math.sqrt(sigma**2 + 1)


@modest
@given(levels, st.integers(0, 99), st.sampled_from(CASES))
def test_mixture_against_a_plain_implementation(sigma: float, seed: int, case: tuple[int, float]) -> None:
    """Full covariance matrices, one mode after the other, in numpy."""
    label, cfg = case
    x = states(sigma, seed)[0]
    prior = np.diag(MIXTURE.variances.numpy())
    total = prior + sigma**2 * np.eye(len(prior))
    logs, posteriors = [], []
    for mode in MIXTURE.means.numpy():
        away = x.flatten().numpy() - mode
        logs.append(-0.5 * away @ np.linalg.solve(total, away))
        posteriors.append(mode + prior @ np.linalg.solve(total, away))

    def mean(chosen: list[int]) -> np.ndarray:
        weights = np.exp(np.array([logs[j] for j in chosen]) - max(logs[j] for j in chosen))
        return sum(w * posteriors[j] for w, j in zip(weights / weights.sum(), chosen, strict=True))

    own = [j for j, of in enumerate(MIXTURE.labels.tolist()) if of == label]
    whole = mean(list(range(len(logs))))
    expected = torch.from_numpy(whole + cfg * (mean(own) - whole)).reshape(x.shape)
    D = MIXTURE.denoiser(label, cfg)(x[None, None], torch.tensor([sigma], dtype=torch.float64))[0, 0]
    torch.testing.assert_close(D, expected, atol=1e-8, rtol=1e-8)


@modest
@given(levels, st.integers(0, 99), st.sampled_from(CASES))
def test_mixture_is_its_own_score(sigma: float, seed: int, case: tuple[int, float]) -> None:
    """Tweedie: D = x + sigma^2 grad log p_sigma(x), the density by torch.distributions."""
    label, cfg = case
    x = states(sigma, seed)[0].flatten().requires_grad_()
    deviation = (MIXTURE.variances + sigma**2).sqrt()

    def tweedie(means: Tensor) -> Tensor:
        log = torch.distributions.Normal(means, deviation).log_prob(x).sum(1).logsumexp(0)
        return x.detach() + sigma**2 * torch.autograd.grad(log, x)[0]

    whole = tweedie(MIXTURE.means)
    expected = whole + cfg * (tweedie(MIXTURE.means[MIXTURE.labels == label]) - whole)
    shown = x.detach().reshape(1, 1, *MIXTURE.shape)
    D = MIXTURE.denoiser(label, cfg)(shown, torch.tensor([sigma], dtype=torch.float64))
    # the sum cancels to the order of sigma^2 grad, about sigma
    torch.testing.assert_close(D.flatten(), expected, atol=1e-10 * max(sigma, 1), rtol=1e-9)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_mixture_rms_is_that_of_its_samples(power: float) -> None:
    mixture = Mixture.make(modes=256, classes=2, shape=(40,), power=power)
    count = 40_000
    mode = torch.randint(256, (count,), generator=generator(5))
    noise = torch.randn(count, 40, generator=generator(6), dtype=torch.float64)
    square = ((mixture.means[mode] + noise * mixture.variances.sqrt()) ** 2).mean(1)
    error = float(square.std()) / math.sqrt(count)
    assert abs(mixture.data_rms**2 - float(square.mean())) < 5 * error
    spectrum = mixture.variances
    assert float(spectrum[0] / spectrum[9]) == pytest.approx(10**power)
    assert float(spectrum.mean()) == pytest.approx(0.25)
    # the modes are a draw from a distribution of which the data's rms is 1
    spread = 3 * float((spectrum**2).sum().sqrt()) * math.sqrt(2 / 256) / 40
    assert abs(mixture.data_rms**2 - 1) < 5 * spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@modest
@given(W=st.integers(1, 5), B=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_mixture_row_is_the_same_in_any_batch(dtype: torch.dtype, W: int, B: int, seed: int) -> None:
    denoise = MIXTURE.denoiser(1, 4.0)
    x = torch.randn(W, B, *MIXTURE.shape, generator=generator(seed), dtype=torch.float64).to(dtype)
    sigma = torch.rand(W, generator=generator(seed), dtype=torch.float64).to(dtype) * 5
    D = denoise(x, sigma)
    assert D.dtype == dtype
    for w, b in itertools.product(range(W), range(B)):
        assert torch.equal(denoise(x[w : w + 1, b : b + 1], sigma[w : w + 1])[0, 0], D[w, b])


def test_any_text_picks_a_class() -> None:
    mixture = Mixture.make()
    labels = {mixture.label_of(f"{i} ünlikely ❄ words") for i in range(50)}
    assert labels == set(range(mixture.classes))
    assert mixture.label_of(" A Cat ") == mixture.label_of("a cat")


@pytest.fixture(scope="module")
def network() -> DemoNet:
    """Random weights everywhere (training starts from zeros in places) in float64, where rounding is no excuse."""
    torch.manual_seed(0)
    net = DemoNet().double().eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return net


def test_the_network_treats_pictures_by_themselves(network: DemoNet) -> None:
    x = torch.randn(5, 3, SIDE, SIDE, generator=generator(), dtype=torch.float64)
    time, context = torch.tensor([999.0, 3.5, 500.0, 0.0, 70.0]), render(5, generator()).context
    out = network(x, time, context)
    assert out.std() > 1e-3
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(x[order], time[order], context[order]), out[order], atol=1e-10, rtol=0)
    other = x.clone()
    other[0] = 100.0
    torch.testing.assert_close(network(other, time, context)[1:], out[1:], atol=1e-10, rtol=0)
    assert not torch.allclose(network(x, time.flip(0), context)[0], out[0], atol=1e-6), "the time counts"
    assert not torch.allclose(network(x, time, context.flip(0))[0], out[0], atol=1e-6), "the prompt counts"


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_flow_and_ve_forms_agree_with_the_definition_of_v(network: DemoNet, cfg: float) -> None:
    """In VP terms, x = a x0 + s eps and v = a eps - s x0 give x0 = a x - s v."""
    sigma = torch.tensor([9.0, 1.3, 0.08], dtype=torch.float64)
    alpha = (1 + sigma**2).rsqrt()
    vp = torch.randn(3, 2, 3, SIDE, SIDE, generator=generator(1), dtype=torch.float64)

    def scaled(value: Tensor) -> Tensor:
        return value.reshape(-1, 1, 1, 1, 1)

    time = timestep_of(sigma).repeat_interleave(2).float()
    said = encode("large red ring").expand(6, -1)
    flat = vp.flatten(0, 1)
    v = network(flat, time, torch.zeros_like(said))
    v = (v + cfg * (network(flat, time, said) - v)).reshape(vp.shape)
    expected = scaled(alpha) * vp - scaled(alpha * sigma) * v

    ve = model.denoiser(network, "large red ring", cfg, batch=2)
    torch.testing.assert_close(ve(vp / scaled(alpha), sigma), expected, atol=1e-9, rtol=1e-9)
    t = sigma / (1 + sigma)  # of the same signal-to-noise ratio
    flow = model.denoiser(network, "large red ring", cfg, batch=2, flow=True)
    torch.testing.assert_close(flow(vp / scaled(alpha) * scaled(1 - t), t), expected, atol=1e-9, rtol=1e-9)


def test_the_gate_counts_what_is_wrong() -> None:
    """A reader that knows the answers but for every eighth shape, and the sixteenth's colour too."""
    count = 2 * len(gate.COMBINATIONS)
    assert {gate.prompt(i) for i in range(72)} == {
        " ".join(words) for words in itertools.product(SIZES, COLOURS, SHAPES)
    }
    truth = torch.tensor([gate.asked(i) for i in range(count)])
    shape, colour = truth[:, 2].clone(), truth[:, 1].clone()
    shape[::8] = (shape[::8] + 1) % 6
    colour[::16] = (colour[::16] + 1) % 6
    answers: Any = lambda _: (one_hot(shape, 6), one_hot(colour, 6))  # noqa: E731
    both, text = gate.summary(torch.zeros(count, 3, SIDE, SIDE), answers)
    assert both == pytest.approx(7 / 8)
    assert "87.5%" in text and f"{15 / 16:.1%}" in text


def test_the_gate_sees_doubled_shapes() -> None:
    batch = render(300, generator(9))
    assert (gate.pieces(batch.images, batch.colour) == 1).float().mean() > 0.99
    doubled = torch.full((1, 3, SIDE, SIDE), -0.8)
    doubled[..., 2:8, 2:8] = doubled[..., 20:26, 9:15] = 0.9
    assert gate.pieces(doubled, torch.tensor([COLOURS.index("white")])).tolist() == [2]
