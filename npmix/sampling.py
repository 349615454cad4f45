"""One token id from logits: pure functions of (logits, settings, a number in [0, 1)).

One hard fact: randomness is an argument and all arithmetic is float64 in a fixed order, so equal logits, settings
and numbers give equal ids on any number of threads.

Order, as in Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p. llama.cpp applies the
temperature last; with temperature 1 the two agree.
"""

import math
from dataclasses import dataclass

import numpy as np

from .errors import InputError, NumericsError

# name: (low, high), both allowed
RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 31),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def check_number(name: str, value, low, high) -> None:
    """InputError unless value is a number (whole if `low` is an int) from low to high."""
    whole = isinstance(low, int)
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:  # a NaN fails the comparison
        raise InputError(f"{name} is {value!r}, expected a {'whole ' if whole else ''}number from {low} to {high}")


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises InputError for a value out of range.

    temperature: 0 takes the most probable token (ties: the lowest id); else logits are divided by it.
    top_k: keep the k most probable tokens (0: all). top_p: keep the smallest set of most probable tokens
    whose probabilities sum to top_p or more (Holtzman et al. 2019, arXiv 1904.09751). min_p: drop tokens less
    probable than min_p times the most probable one. Ties at the border of top-k and top-p: the lowest ids stay.
    repetition_penalty: divides positive and multiplies negative logits of ids seen before, the prompt's
    included (CTRL, Keskar et al. 2019, arXiv 1909.05858); 1 is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            check_number(name, getattr(self, name), low, high)


def penalise(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits (V,) with the repetition penalty on the ids where seen (V,) is true; float64."""
    scores = logits.astype(np.float64)
    hit = scores[seen]
    scores[seen] = np.where(hit > 0, hit / penalty, hit * penalty)
    return scores


def _fewest(p: np.ndarray, mass: float) -> tuple[float, int]:
    """(the least, the number) of the fewest largest of p that sum to `mass` or more; all of p if none do. p > 0.

    A histogram finds the few values near the border, and only they are sorted: sorting a vocabulary took most of a token's sampling.
    """
    bins = p.view(np.int64) >> 45  # exponent and 7 bits of the fraction: 128 bins an octave, in the order of the values
    bins -= bins.min()
    sums = np.cumsum(np.bincount(bins, weights=p)[::-1])
    at = min(int(np.searchsorted(sums, mass, side="left")), len(sums) - 1)
    border = len(sums) - 1 - at
    inside = np.sort(p[bins == border])[::-1]
    above = sums[at - 1] if at else 0.0
    last = min(int(np.searchsorted(above + np.cumsum(inside), mass, side="left")), len(inside) - 1)
    return inside[last], int(np.count_nonzero(bins > border)) + last + 1


def _most_probable(p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Ids that top-k and then top-p keep, in no order. p (V,): probabilities."""
    size = len(p)
    if 0 < top_k < size:
        kept = np.sort(np.partition(p, size - top_k)[size - top_k :])  # sorted, so that every machine sums in one order
        mass = top_p * kept.sum()  # top-p looks at what top-k left
    else:
        kept, mass = p[p >= (1.0 - top_p) / size], top_p  # what is below weighs less than 1 - top_p together
    kept = kept[kept > 0]
    least, count = _fewest(kept, mass) if top_p < 1.0 else (kept.min(), len(kept))
    above = np.flatnonzero(p > least)
    return np.concatenate([above, np.flatnonzero(p == least)[: count - len(above)]])


def probabilities(logits: np.ndarray, settings: Sampling, seen: np.ndarray | None = None) -> np.ndarray:
    """The distribution that `sample` draws from: float64 (V,), zero where a filter struck.

    logits (V,): only the ids that may be chosen. seen (V,): bool, ids that the repetition penalty strikes.
    With temperature 0 all the weight is on one id. Raises NumericsError if the largest logit is not finite.
    """
    scores = logits.astype(np.float64) if seen is None else penalise(logits, seen, settings.repetition_penalty)
    best = int(np.argmax(scores))  # a NaN, if any; else the lowest id among equals
    if not math.isfinite(scores[best]):
        raise NumericsError(f"the logit of token {best} is {scores[best]}: the weights or activations are damaged (npmix verify)")
    if settings.temperature == 0:
        p = np.zeros(len(scores))
        p[best] = 1.0
        return p
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature: exp(-inf) = 0 is meant
        p = np.exp((scores - scores[best]) / settings.temperature)
    p /= p.sum()
    if 0 < settings.top_k < len(p) or settings.top_p < 1.0:
        kept = np.zeros(len(p))
        ids = _most_probable(p, settings.top_k, settings.top_p)
        kept[ids] = p[ids]
        p = kept
    if settings.min_p > 0:
        p[p < settings.min_p * p.max()] = 0.0
    return p / p.sum()


def sample(logits: np.ndarray, settings: Sampling, u: float, seen: np.ndarray | None = None) -> int:
    """An id by the inverse of the cumulative distribution over ids, at u in [0, 1). Arguments as `probabilities`."""
    if settings.temperature == 0 and (seen is None or settings.repetition_penalty == 1):
        best = int(np.argmax(logits))
        if math.isfinite(logits[best]):
            return best
    p = probabilities(logits, settings, seen)
    cdf = np.cumsum(p)
    id = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
    return min(id, int(np.flatnonzero(p)[-1]))  # u * cdf[-1] may round up to cdf[-1]
