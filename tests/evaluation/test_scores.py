"""The arithmetic against sums written out, in higher precision where that matters."""

import math

import numpy as np
import pytest

from npmix.evaluation.scores import Scores, divergences, mean, score


def rows(count, vocab, seed=0, scale=4.0):
    return (np.random.default_rng(seed).standard_normal((count, vocab)) * scale).astype(np.float32)


def test_score():
    """Log-probabilities are those of the softmax, the loss is the target's, the top is the first largest."""
    logits = rows(5, 40) + np.float32(300)  # far from where exp can be taken
    logits[3, [7, 9]] = 400
    block = score(logits, [1, 2, 3, 4, 5])
    for row, logs, loss, top, target in zip(logits, block.logs, block.nll, block.top, (1, 2, 3, 4, 5)):
        whole = math.fsum(math.exp(float(x) - 300) for x in row)
        expected = [float(x) - 300 - math.log(whole) for x in row]
        assert np.allclose(logs, expected, rtol=0, atol=1e-11)
        assert math.isclose(loss, -expected[target], rel_tol=1e-11) and top == row.tolist().index(max(row))


def test_no_divergence_from_itself():
    """A model against itself: exactly 0 everywhere, and every first choice the same."""
    logits = rows(20, 300)
    scores, block = Scores(), score(logits, [0] * 20)
    scores.add(1.0, block, score(logits, [0] * 20))
    found = scores.figures(strided=False)
    assert found["kl"]["mean"] == {"value": 0.0, "standard_error": 0.0} and found["kl"]["largest"] == 0
    assert found["same_top"]["value"] == 1 and found["perplexity_ratio"] == {"value": 1.0, "standard_error": 0.0}


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6])
def test_small_divergences(step):
    """For a small change e of the logits KL is half the variance of e under p: held at 1e-13 too, where float32 would be noise."""
    base = rows(50, 500, scale=2.0).astype(np.float64)
    change = np.random.default_rng(1).standard_normal(base.shape) * step
    a, b = score(base, [0] * 50), score(base + change, [0] * 50)
    p = np.exp(a.logs)
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    kl = divergences(a, b)
    assert np.allclose(kl, variance / 2, rtol=10 * step + 1e-2, atol=1e-15) and (kl > 0).all()


def test_direction():
    """KL(base || model): the base's probabilities are the weights."""
    base, model = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert np.allclose(divergences(score(base, [0]), score(model, [0])), expected, rtol=1e-14)


def test_mean_and_error():
    """The standard error is that of llama.cpp: sqrt((<x^2> - <x>^2) / (n - 1)); none for one value."""
    x = np.array([1.0, 2.0, 4.0, 9.0])
    middle, error = mean(x)
    assert middle == 4 and math.isclose(error, math.sqrt(((x**2).mean() - 16) / 3))
    assert mean(np.array([3.0])) == (3.0, None)


def test_figures_are_llamacpps():
    """All figures from sums as llama.cpp forms them: uncertainties, covariance, percentiles between neighbours, median of an even number."""
    scores = Scores()
    targets = np.random.default_rng(5).integers(0, 60, 40)
    base, model = score(rows(40, 60, 1), targets), score(rows(40, 60, 1) + rows(40, 60, 2, 0.5), targets)
    for part in (slice(0, 7), slice(7, 40)):  # in blocks of any size
        scores.add(1.0, *(type(b)(b.logs[part], b.nll[part], b.top[part]) for b in (model, base)))
    found, n = scores.figures(strided=False), 40

    def uncertainty(x):
        return math.sqrt(((x * x).sum() / n - (x.sum() / n) ** 2) / (n - 1))

    a, b = model.nll, base.nll
    covariance = ((a * b).sum() / n - a.sum() / n * b.sum() / n) / (n - 1)
    ratio = math.exp(a.mean() - b.mean())
    kl = np.sort((np.exp(base.logs) * (base.logs - model.logs)).sum(-1))
    same = (model.logs.argmax(-1) == base.logs.argmax(-1)).mean()
    place = 0.99 * (n - 1)
    expected = {
        "perplexity": (math.exp(a.mean()), math.exp(a.mean()) * uncertainty(a)),
        "log_perplexity": (a.mean(), uncertainty(a)),
        "perplexity_ratio": (ratio, ratio * math.sqrt(uncertainty(a) ** 2 + uncertainty(b) ** 2 - 2 * covariance)),
        "same_top": (same, math.sqrt(same * (1 - same) / (n - 1))),
    }
    for name, (value, error) in expected.items():
        assert math.isclose(found[name]["value"], value, rel_tol=1e-12)
        assert math.isclose(found[name]["standard_error"], error, rel_tol=1e-9), name
    assert math.isclose(found["base"]["perplexity"]["value"], math.exp(b.mean()))
    assert np.allclose(list(found["kl"]["mean"].values()), [kl.mean(), uncertainty(kl)])
    assert math.isclose(found["kl"]["median"], (kl[19] + kl[20]) / 2)
    assert math.isclose(found["kl"]["percentile_99"], kl[38] + (place - 38) * (kl[39] - kl[38]))
    assert found["kl"]["largest"] == kl[39] and 0 < same < 1


def test_hopeless_models():
    """A loss whose exponential is beyond float64: no perplexity rather than an infinity, which JSON lacks."""
    logits = np.array([[0.0, 5000.0]], np.float32)
    scores = Scores()
    scores.add(1.0, score(logits, [0]), None)
    found = scores.figures(strided=False)
    assert found["perplexity"]["value"] is None and found["log_perplexity"] == {"value": 5000.0, "standard_error": None}
