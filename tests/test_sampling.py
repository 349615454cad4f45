"""Laws of sampling: pure functions, checked on random logits and against the definitions written out plainly."""

import math

import numpy as np
import pytest

from npmix.errors import InputError, NumericsError
from npmix.sampling import Sampling, penalise, probabilities, sample


def random_logits(seed: int, size: int = 50) -> np.ndarray:
    """float32 with ties on purpose."""
    return (np.random.default_rng(seed).standard_normal(size) * 2).round(1).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def plain(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The definitions, one after the other, in loops."""
    p = softmax(logits.astype(np.float64) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        order = order[:top_k]
    total = sum(p[i] for i in order)
    kept, weight = [], 0.0
    for i in order:
        if top_p < 1 and weight >= top_p * total:
            break
        kept.append(i)
        weight += p[i]
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    out = np.zeros(len(p))
    out[kept] = p[kept]
    return out / out.sum()


def test_greedy():
    """Temperature 0 takes the largest logit, of equal ones the lowest id, whatever the random number."""
    logits = np.array([0, 3, -1, 3, 2], np.float32)
    assert {sample(logits, Sampling(), u) for u in (0.0, 0.5, 1 - 2**-53)} == {1}
    assert probabilities(logits, Sampling()).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_filters_follow_their_definitions(seed):
    """Any mix of temperature, top-k, top-p and min-p gives the distribution of the definitions."""
    rng = np.random.default_rng(seed)
    logits = random_logits(seed)
    for _ in range(20):
        settings = {
            "temperature": float(rng.uniform(0.2, 2)),
            "top_k": int(rng.choice([0, 1, 5, 49, 50, 200])),
            "top_p": float(rng.choice([1.0, 0.999, 0.9, 0.5, 0.01])),
            "min_p": float(rng.choice([0.0, 0.02, 0.3, 1.0])),
        }
        np.testing.assert_allclose(probabilities(logits, Sampling(**settings)), plain(logits, **settings), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 8.0])
def test_a_large_vocabulary(scale):
    """32,000 tokens, flat to peaked, many equal ones among them: the definitions still."""
    logits = np.round(np.random.default_rng(3).standard_normal(32000) * scale, 2).astype(np.float32)
    for settings in ({"top_p": 0.95003}, {"top_p": 0.30001, "temperature": 0.7}, {"top_p": 0.99901}, {"top_k": 300, "top_p": 0.901}):
        np.testing.assert_allclose(
            probabilities(logits, Sampling(**{"temperature": 1.0, **settings})), plain(logits, **settings), rtol=1e-12
        )


def test_inverse_of_the_cumulative_distribution():
    """u picks the id in whose share of [0, 1) it lies: over a fine grid of u, ids come as often as their probability."""
    logits, settings = random_logits(1, 12), Sampling(temperature=0.8, top_p=0.9)
    p = probabilities(logits, settings)
    n = 20000
    counts = np.bincount([sample(logits, settings, (i + 0.5) / n) for i in range(n)], minlength=12)
    assert np.all(np.abs(counts / n - p) <= 1 / n)
    assert np.all(counts[p == 0] == 0)


def test_ends_of_the_unit_interval():
    """Ids without weight are never drawn, not even at u = 0 or just below 1."""
    logits = np.array([-np.inf, 1, 2, -np.inf], np.float32)
    assert sample(logits, Sampling(temperature=1.0), 0.0) == 1
    assert sample(logits, Sampling(temperature=1.0), math.nextafter(1, 0)) == 2


def test_top_k_and_top_p_borders():
    """top_k 1, and top_p below the best probability, leave the best id; ties at the border keep the lowest ids."""
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    assert np.flatnonzero(probabilities(logits, Sampling(temperature=1.0, top_k=1))).tolist() == [1]
    assert np.flatnonzero(probabilities(logits, Sampling(temperature=1.0, top_p=1e-6))).tolist() == [1]
    assert np.flatnonzero(probabilities(logits, Sampling(temperature=1.0, top_k=2))).tolist() == [1, 2]
    assert np.flatnonzero(probabilities(logits, Sampling(temperature=1.0, min_p=1.0))).tolist() == [1, 2, 3]


def test_repetition_penalty():
    """Positive logits of seen ids are divided, negative ones multiplied; others stay."""
    seen = np.array([True, True, False, False])
    logits = np.array([2, -2, 2, -2], np.float32)
    assert penalise(logits, seen, 2.0).tolist() == [1, -4, 2, -2]
    assert logits.tolist() == [2, -2, 2, -2]
    assert sample(logits, Sampling(repetition_penalty=2.0), 0.0, seen) == 2


def test_extreme_values():
    """Very small temperatures and very large logits neither warn nor overflow."""
    logits = np.array([3e38, -3e38, 0], np.float32)
    for temperature in (1e-300, 1e-3, 100.0):
        assert sample(logits, Sampling(temperature=temperature), 0.999) == 0


def test_not_finite():
    """A NaN or an infinite best logit is an error, never a token."""
    for bad in (np.nan, np.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(NumericsError, match="token 1"):
                sample(np.array([0, bad, 1], np.float32), Sampling(temperature=temperature), 0.5)
    with pytest.raises(NumericsError):
        sample(np.full(3, -np.inf, np.float32), Sampling(), 0.5)


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, 101, math.nan, math.inf, "1", None, True]),
        ("top_k", [-1, 1.5, None]),
        ("top_p", [0, 1.1, -1, math.nan]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, 1000]),
    ],
)
def test_ranges(name, values):
    """A setting out of range is an error that names it, what was found and the range."""
    for value in values:
        with pytest.raises(InputError, match=f"^{name} is .*expected a .*number from"):
            Sampling(**{name: value})


@pytest.mark.transformers
@pytest.mark.parametrize("seed", range(10))
def test_as_in_transformers(seed):
    """The same filters in the same order as transformers' generate (logits without ties)."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    logits, prompt = (rng.standard_normal(80) * 3).astype(np.float32), rng.integers(0, 80, 9)
    settings = Sampling(temperature=0.7, top_k=40, top_p=0.93, min_p=0.02, repetition_penalty=1.3)
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    for step in (
        processors.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        processors.TemperatureLogitsWarper(settings.temperature),
        processors.TopKLogitsWarper(settings.top_k),
        processors.TopPLogitsWarper(settings.top_p),
        processors.MinPLogitsWarper(settings.min_p),
    ):
        scores = step(torch.tensor(prompt)[None], scores)
    seen = np.zeros(80, bool)
    seen[prompt] = True
    np.testing.assert_allclose(probabilities(logits, settings, seen), scores.softmax(-1)[0].numpy(), rtol=1e-9, atol=1e-300)
