"""Rounding weights to codes, selectors and scales: the plain twin of `kernels/rounding.py`.

Per group of G inputs of a row: w ~ integer(code, selector) * scale, the scale a float16, rounded before anything else is.

The scale is that of least weighted squares, sum(v (w - integer * scale)^2) with an importance v of each input (1 where none is known),
of a few: root mean square * unit * each of RATIOS, and the scale at which the largest weight is the largest integer; without
selectors those that make of the weight of largest magnitude each of the format's `extremes`, most of them about its lowest value, so
scales may be negative. Under a scale each sub-block takes the selector of least error, each weight the nearest value. The best
scale is then refitted twice, s' = sum(v w q) / sum(v q q), as long as that helps. The first wins ties, selectors and scales alike.
Least squares shrinks weights, all of a model in the same direction, which costs more than it gains: codes and selectors
are kept, and the scale becomes sum(v w w) / sum(v w q), which does not, unless that doubles it: then (weights below
float16's least scale) next to nothing is left to keep the size of.

One hard fact: every sum runs over a sub-block's inputs in order, then over the sub-blocks in order, in float32,
without fma, so that the kernel, which runs 16 rows side by side, gives the same bits.
"""

import numpy as np

from ..errors import ConversionError
from ..formats import PACKED, RATIOS, REFITS

LARGEST_HALF = 65504.0
SMALLEST_HALF = 2.0**-24
FINE, NOT_FINITE, TOO_LARGE = 0, 1, 2
F = np.float32


def largest(format: str) -> float:
    """The largest |w| whose scale a float16 can hold."""
    return LARGEST_HALF * PACKED[format].top


def status(w: np.ndarray, format: str) -> int:
    """FINE, NOT_FINITE (a NaN or infinity) or TOO_LARGE (its scale would overflow float16)."""
    if not np.isfinite(w).all():
        return NOT_FINITE
    return TOO_LARGE if w.size and np.abs(w).max() > largest(format) else FINE


def half(x: np.ndarray) -> np.ndarray:
    """float32 rounded to a float16 that is neither zero nor infinite, as float32."""
    size = np.clip(np.abs(x), F(SMALLEST_HALF), F(LARGEST_HALF))
    return np.copysign(size, x).astype(np.float16).astype(F)


def _sum(terms: np.ndarray) -> np.ndarray:
    """Sum over the last axis in order."""
    total = np.zeros(terms.shape[:-1], F)
    for k in range(terms.shape[-1]):
        total += terms[..., k]
    return total


def nearest(z: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """The place in a row of ascending integers of the one nearest to each z; half-way the lower, or where they are even steps the even one."""
    if row[-1] - row[0] == len(row) - 1:
        return np.rint(np.clip(z, F(row[0]), F(row[-1]))).astype(np.int64) - row[0]
    values = np.array(row, F)
    middles = (values[1:] + values[:-1]) * F(0.5)
    return (z > middles.reshape(-1, *(1,) * z.ndim)).sum(0)


def lesser(found: list[np.ndarray], best: list[np.ndarray] | None) -> list[np.ndarray]:
    """Of two lists of arrays, an error first in each, the entries of the lesser error, the old ones on ties. Arrays may have one axis more."""
    if best is None:
        return found
    less = found[0] < best[0]
    return [np.where(less if new.ndim == less.ndim else less[..., None], new, old) for new, old in zip(found, best)]


def _measure(spec, scale: np.ndarray, x: np.ndarray, v: np.ndarray):
    """scale (rows, groups), x and v (rows, groups, sub-blocks, inputs) -> error, sum(v w q), sum(v q q) by group, selectors by sub-block."""
    least = None
    for s, m in enumerate(spec.multipliers):
        m, row = F(m), spec.row(s)
        factor = scale[..., None] * m
        z = x * (F(1) / factor)[..., None]
        q = np.array(row, F)[nearest(z, row)]
        miss = z - q
        found = [_sum(miss * miss * v) * (factor * factor), _sum(q * x * v) * m, _sum(q * q * v) * (m * m)]
        found.append(np.full(x.shape[:3], s, np.uint8))
        least = lesser(found, least)
    return [_sum(part) for part in least[:3]] + [least[3]]


def find_scale(spec, w: np.ndarray, v: np.ndarray):
    """w, v (rows, groups, G) -> scales of least squares and their sum(v w q) (rows, groups), selectors (rows, groups, sub-blocks)."""
    x, importance = (a.reshape(*a.shape[:2], -1, spec.per) for a in (w, v))
    mean, largest = np.sqrt(_sum(w * w) * (F(1) / F(w.shape[2]))), np.abs(w).max(-1)
    if spec.selector_bits:
        tries = [half(mean * (F(spec.unit) * F(ratio))) for ratio in RATIOS]
        tries.append(half(largest * F(1 / spec.top)))
    else:
        extreme = np.take_along_axis(w, np.abs(w).argmax(-1)[..., None], -1)[..., 0]
        tries = [half(extreme / F(becomes)) for becomes in spec.extremes]
    best = None
    for at in range(len(tries) + REFITS):
        scale = tries[at] if at < len(tries) else half(best[1] / np.where(best[2] > 0, best[2], F(1)))
        best = lesser([*_measure(spec, scale, x, importance), scale], best)
    _, product, _, selectors, scale = best
    return scale, product, selectors


def _search(spec, w: np.ndarray, v: np.ndarray):
    """w, v (rows, groups, G) -> scales (rows, groups), selectors (rows, groups, sub-blocks), codes like w."""
    scale, product, selectors = find_scale(spec, w, v)
    x = w.reshape(*selectors.shape, spec.per)
    selectors = np.where(np.abs(w).max(-1)[..., None] > 0, selectors, np.uint8(0))  # as in the padding
    codes = np.zeros(x.shape, np.uint8)
    for s, m in enumerate(spec.multipliers):
        chosen = nearest(x * (F(1) / (scale * F(m)))[..., None, None], spec.row(s))
        codes = np.where((selectors == s)[..., None], chosen, codes)
    fair = half(_sum(v * w * w) / np.where(product != 0, product, F(1)))
    return np.where((product * scale > 0) & (np.abs(fair) < F(2) * np.abs(scale)), fair, scale), selectors, codes.reshape(w.shape)


def quantise(
    w: np.ndarray, format: str, group: int, importance: np.ndarray | None = None, search=_search
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 (N, K) -> codes uint8 (N, K), scales float16 (N, ceil(K / group)), selectors uint8 (N, ceil(K / per)).

    importance: float32 (K,), how much an error counts in each input; without it all count the same. search: what finds
    them. Raises ConversionError for NaN, infinity, or weights whose scale would overflow float16.
    """
    problem = status(w, format)
    if problem:
        raise ConversionError("a weight is NaN or infinite" if problem == NOT_FINITE else f"a weight is larger than {largest(format):.0f}")
    spec = PACKED[format]
    rows, cols = w.shape
    groups = -(-cols // group)
    padded = np.zeros((rows, groups * group), F)
    padded[:, :cols] = w
    grouped = padded.reshape(rows, groups, group)
    weight = np.zeros(groups * group, F)
    weight[:cols] = 1 if importance is None else importance
    scale, selectors, codes = search(spec, grouped, np.broadcast_to(weight.reshape(1, groups, group), grouped.shape))
    selectors = selectors.reshape(rows, -1)[:, : -(-cols // spec.per)].astype(np.uint8)
    scale = np.where(np.abs(grouped).max(-1) > 0, scale, F(0))
    return codes.astype(np.uint8).reshape(rows, -1)[:, :cols], scale.astype(np.float16), selectors
