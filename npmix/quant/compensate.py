"""Error-compensating rounding: the plain twin of `kernels/compensate.py`.

Where the inputs of a matrix are correlated, the error of one weight can be made up for by those rounded after it. H: the mean of
x[i] * x[j] over tokens, in blocks of 128 inputs, the groups that share a scale; the squared error of a block's outputs is e' H e.

    factors     H / mean(diagonal) + DAMPING * identity = R R', R upper triangular. So e' H e = sum over k of D[k] (e[k] + sum over i < k of
                F[i, k] e[i])^2 with F[i, k] = R[i, k] / R[k, k] and D[k] = R[k, k]^2: input k is rounded to its target w[k] + sum of
                F[i, k] e[i], whose error counts D[k]. A block of zeros counts every error the same. Inputs that do not exist count 0.
    a scale     inputs in order, a sub-block at a time. Each selector rounds the sub-block from the errors so far, every weight to the
                value nearest to its target; the one of least D-weighted error stays. e[k] = w[k] - value, so errors add up with F once.
    scales      that of `round.py`'s search by least squares, times each of STEPS; the least error stays, the first of equals.
    the end     codes and selectors are kept and the scale is multiplied by w' H w / w' H value, within SCALE_BOUNDS: as in `round.py`,
                least squares shrinks weights, all in the same direction.

The method: GPTQ (Frantar et al., 2022, arXiv 2210.17323), with the factor of H itself in place of that of its inverse, and within blocks.

One hard fact: all sums run in the order of the inputs in float32 without fma, a target's over the errors before it as they
come; the factors are made once, in float64 by elementwise operations only, and handed to twin and kernel alike as float32.
"""

import numpy as np

from ..errors import CalibrationError
from ..formats import DAMPING, PACKED, SCALE_BOUNDS, MOMENTS, STEPS
from .round import find_scale, half, lesser, nearest, quantise

F = np.float32
_PIECE = 8  # blocks factored at a time: they stay in the cache


def factors(moments: np.ndarray, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Second moments float32 (blocks, 128, 128) of `cols` inputs -> F float32 (blocks, 128, 128), 0 where i >= k; D float32 (blocks, 128).

    Raises CalibrationError for a block that has negative squares, as no moments have.
    """
    feedback = np.empty(moments.shape, F)
    for at in range(0, len(moments), _PIECE):
        feedback[at : at + _PIECE] = _upper(moments[at : at + _PIECE])
    diagonal = np.diagonal(feedback, axis1=1, axis2=2).astype(np.float64)
    if not (diagonal > 0).all():
        raise CalibrationError("second moments that no inputs can have (a negative square): calibrate again")
    weights = (diagonal * diagonal).astype(F)
    weights.reshape(-1)[cols:] = 0
    feedback /= diagonal.astype(F)[:, None, :]
    feedback[:, np.tri(MOMENTS, dtype=bool)] = 0
    return feedback, weights


def _upper(moments: np.ndarray) -> np.ndarray:
    """R of each block, float64; NaN or numbers not above 0 on the diagonal of a block that has none."""
    h = moments.astype(np.float64)
    mean = np.zeros(len(h))
    for k in range(MOMENTS):
        mean += h[:, k, k] / MOMENTS
    h[mean == 0] = np.eye(MOMENTS)
    h /= np.where(mean > 0, mean, 1)[:, None, None]
    for k in range(MOMENTS):
        h[:, k, k] += DAMPING
    with np.errstate(invalid="ignore", divide="ignore"):
        for k in range(MOMENTS - 1, -1, -1):  # columns from the last: Cholesky's method, the reverse way
            h[:, : k + 1, k] /= np.sqrt(h[:, k, k])[:, None]
            column = h[:, :k, k]
            h[:, :k, :k] -= column[:, :, None] * column[:, None, :]
    return h


def _round(spec, scale, w, feedback, weights):
    """One scale, float32 (rows, groups) -> error (rows, groups), codes and targets' errors like w, selectors (rows, groups, sub-blocks)."""
    target, codes, missed = w.copy(), np.zeros(w.shape, np.uint8), np.zeros_like(w)
    selectors, total = np.zeros((*scale.shape, MOMENTS // spec.per), np.uint8), np.zeros_like(scale)
    for block in range(MOMENTS // spec.per):
        inputs = slice(block * spec.per, (block + 1) * spec.per)
        least = None
        for s, m in enumerate(spec.multipliers):
            found = _sub_block(spec, s, scale * F(m), target, w, feedback, weights, inputs)
            found.append(np.full(scale.shape, s, np.uint8))
            least = lesser(found, least)
        error, codes[..., inputs], values, factor, selectors[..., block] = least
        total += error
        for k in range(inputs.start, inputs.stop):
            value = values[..., k - inputs.start] * factor
            missed[..., k] = target[..., k] - value
            target[..., k + 1 :] += feedback[:, k, k + 1 :] * (w[..., k] - value)[..., None]
    return [total, codes, missed, selectors]


def _sub_block(spec, selector, factor, target, w, feedback, weights, inputs):
    """The sub-block under one selector: [error, codes, values, factor]."""
    target, row, inverse = target[..., inputs].copy(), np.array(spec.row(selector), F), F(1) / factor
    codes, error = np.zeros(target.shape, np.uint8), np.zeros_like(factor)
    for k in range(spec.per):
        at = inputs.start + k
        z = target[..., k] * inverse
        codes[..., k] = nearest(z, spec.row(selector))
        value = row[codes[..., k]]
        miss = z - value
        error += miss * miss * weights[:, at]
        target[..., k + 1 :] += feedback[:, at, at + 1 : inputs.stop] * (w[..., at] - value * factor)[..., None]
    return [error * (factor * factor), codes, row[codes], factor]


def _fair(scale, w, missed, feedback, weights):
    """The scale times w' H w / w' H value."""
    target, square, product = w.copy(), np.zeros_like(scale), np.zeros_like(scale)
    for k in range(MOMENTS):
        target[..., k + 1 :] += feedback[:, k, k + 1 :] * w[..., k, None]
        square += target[..., k] * target[..., k] * weights[:, k]
        product += target[..., k] * (target[..., k] - missed[..., k]) * weights[:, k]
    low, high = (F(bound) for bound in SCALE_BOUNDS)
    ratio = np.clip(square / np.where(product > 0, product, F(1)), low, high)
    return half(scale * np.where(product > 0, ratio, F(1)))


def quantise_compensated(
    w: np.ndarray, format: str, group: int, importance: np.ndarray, factored: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `round.quantise`, for a format with a table; factored: what `factors` gave for the matrix's inputs."""
    feedback, weights = factored

    def search(spec, grouped, counts):
        start, best = find_scale(spec, grouped, counts)[0], None
        for step in STEPS:
            scale = half(start * F(step))
            best = lesser([*_round(spec, scale, grouped, feedback, weights), scale], best)
        _, codes, missed, selectors, scale = best
        something = (np.abs(grouped).max(-1) > 0)[..., None]  # else as in the padding
        codes, selectors = np.where(something, codes, np.uint8(spec.pad)), np.where(something, selectors, np.uint8(0))
        return _fair(scale, grouped, missed, feedback, weights), selectors, codes

    if not PACKED[format].values or not group == PACKED[format].group == MOMENTS:
        raise ValueError(f"{format} of group {group}")
    return quantise(w, format, group, importance, search)
