"""The router's choice: top-k of the raw logits, softmax over those, experts in ascending order."""

import numpy as np
import pytest
from kernel_tools import Memory, memory

from npmix.kernels.router import choose

F = np.float32


def choice(logits, active):
    logits = np.asarray(logits, F)
    given, experts, weights = memory(logits), Memory(active, np.int32), Memory(active, F)
    choose(given.at, logits.size, active, experts.at, weights.at)
    assert given.intact() and experts.intact() and weights.intact()
    return experts.array.tolist(), weights.array


@pytest.mark.parametrize("n", [1, 2, 8, 13])
def test_top_k_then_softmax(n):
    """For any k: the k largest logits, ascending by index, with the softmax over those k within 1e-6; weights add up to 1."""
    rng = np.random.default_rng(n)
    for size in (0.1, 3.0, 50.0):
        logits = (rng.standard_normal(n) * size).astype(F)
        for active in range(1, n + 1):
            experts, weights = choice(logits, active)
            assert experts == sorted(np.argsort(-logits, kind="stable")[:active].tolist())
            chosen = logits[experts].astype(np.float64)
            exact = np.exp(chosen - chosen.max())
            exact /= exact.sum()
            assert np.abs(weights - exact).max() < 1e-6 and abs(weights.sum() - 1) < 1e-6


def test_ties_go_to_the_lower_index():
    """Equal logits: the lower index is chosen, and equal weights are equal."""
    assert choice([1, 1, 1, 1], 2)[0] == [0, 1]
    assert choice([0, 2, 1, 2, 2], 2)[0] == [1, 3]
    assert choice([5, 1, 3, 1, 3], 4)[0] == [0, 1, 2, 4]
    assert choice([0.0, -0.0, -1], 2)[0] == [0, 1]
    experts, weights = choice([7] * 8, 3)
    assert experts == [0, 1, 2] and (weights == weights[0]).all()


def test_one_expert_has_weight_one():
    """k = 1 gives weight exactly 1, also for a single expert and for a logit of any size."""
    for logits in ([0.0], [-3e38, 3e38], [1e-30, 0, 0]):
        assert choice(logits, 1)[1].tolist() == [1.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_far_apart_logits():
    """A logit far below the largest gets weight 0, not an underflow's remainder."""
    experts, weights = choice([0, 500, -3e38], 3)
    assert experts == [0, 1, 2] and weights.tolist() == [0, 1, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_logit_shows():
    """A NaN is chosen before any number, wherever it stands, and makes the weights NaN: nothing hides it."""
    for at in range(4):
        logits = [3, 2, 1, 0]
        logits[at] = np.nan
        experts, weights = choice(logits, 2)
        assert at in experts and len(set(experts)) == 2 and np.isnan(weights).all()
    assert np.isnan(choice([np.nan] * 4, 2)[1]).all()
