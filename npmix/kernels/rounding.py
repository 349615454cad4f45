"""Fast rounding of weights, straight into the packed bytes: the twin of `quant/round.py` (the law stands there).

One hard fact: 16 rows are rounded side by side, each row in its own lane and in the order of its
inputs, so no sum is ever reordered: equal bits on every machine. Kernels release the GIL; a
conversion runs them on row ranges from plain threads.
"""

import functools

import numpy as np

from ..formats import CHUNK, PACKED, RATIOS, REFITS, codes_at, row_blocks, span_bytes, spans
from ._jit import njit
from .ops import (
    absolute,
    add,
    copysign,
    div,
    get_f32,
    load_f16,
    load_f32,
    max_f32,
    maximum,
    minimum,
    mul,
    put_f32,
    splat_f32,
    store_f16,
    store_f32,
    sub,
    sum_f32,
    where_greater,
)
from .packing import nearest_of, pack_chunk, pack_selectors, root, rows_table

_ZERO, _ONE = np.float32(0), np.float32(1)
_LARGEST_HALF, _SMALLEST_HALF = np.float32(65504.0), np.float32(2.0**-24)

# Scratch memory in 64-byte vectors of 16 rows: the group's weights, its codes, its selectors, then the places named here
WEIGHTS, CODES, SELECTORS = 0, 64 * 128, 64 * 256
(
    LARGEST, EXTREME, SCALE, _TRY, _HALF,
    _ERROR, _PRODUCT, _NORM,
    _BEST_ERROR, _BEST_PRODUCT, _BEST_NORM,
    _SUB_ERROR, _SUB_PRODUCT, _SUB_NORM,
) = range(SELECTORS + 64 * 32, SELECTORS + 64 * 46, 64)  # fmt: skip
SCRATCH_BYTES = SELECTORS + 64 * 46


# ---- one group of 16 rows ------------------------------------------------------------------------


@njit
def half(scale, scratch):
    """`scale` rounded to float16s that are neither 0 nor infinite."""
    size = minimum(maximum(absolute(scale), splat_f32(_SMALLEST_HALF)), splat_f32(_LARGEST_HALF))
    store_f16(scratch + _HALF, copysign(size, scale), 2)
    return load_f16(scratch + _HALF)


@njit
def load_group(w, rows, cols, row, col, group, scratch):
    """w's 16 rows x group inputs, zeros outside, the largest |w| of each row, and that weight. Returns 0 if all are finite, else 1."""
    x = scratch + WEIGHTS
    for r in range(16):
        n = max(min(group, cols - col), 0) if row + r < rows else 0
        at = w + 4 * ((row + r) * cols + col)
        for k in range(n):
            put_f32(x + 64 * k + 4 * r, get_f32(at + 4 * k))
        for k in range(n, group):
            put_f32(x + 64 * k + 4 * r, _ZERO)
    largest, extreme = splat_f32(_ZERO), splat_f32(_ZERO)
    none = splat_f32(_ZERO)
    for k in range(group):
        v = load_f32(x + 64 * k)
        none = add(none, sub(v, v))  # 0, or NaN once an infinity or a NaN was seen
        extreme = where_greater(absolute(v), largest, v, extreme)
        largest = maximum(absolute(v), largest)
    store_f32(scratch + LARGEST, largest)
    store_f32(scratch + EXTREME, extreme)
    return 0 if sum_f32(none) == _ZERO else 1


@functools.lru_cache(maxsize=None)
def _measurer(name):
    """A kernel (group, importance, rows, scratch): error and sums under the scale at _TRY, each sub-block's best selector at SELECTORS."""
    spec, value = PACKED[name], nearest_of(name, False)
    multipliers, per, row_bytes = np.array(spec.multipliers, np.float32), spec.per, 4 * rows_table(name).shape[1]

    @njit
    def sub_block(x, v, m, row, scale, scratch):
        """Error, sum(v w q) and sum(v q q) of one sub-block under one selector."""
        factor = mul(scale, splat_f32(m))
        inverse = div(splat_f32(_ONE), factor)
        error, product, norm = splat_f32(_ZERO), splat_f32(_ZERO), splat_f32(_ZERO)
        for k in range(per):
            w, weight = load_f32(x + 64 * k), splat_f32(get_f32(v + 4 * k))
            z = mul(w, inverse)
            q = value(z, row)
            miss = sub(z, q)
            error = add(error, mul(mul(miss, miss), weight))
            product = add(product, mul(mul(q, w), weight))
            norm = add(norm, mul(mul(q, q), weight))
        store_f32(scratch + _SUB_ERROR, mul(error, mul(factor, factor)))
        store_f32(scratch + _SUB_PRODUCT, mul(product, splat_f32(m)))
        store_f32(scratch + _SUB_NORM, mul(norm, splat_f32(m * m)))

    @njit
    def measure(group, importance, rows, scratch):
        scale = load_f32(scratch + _TRY)
        total, products, norms = splat_f32(_ZERO), splat_f32(_ZERO), splat_f32(_ZERO)
        for i in range(group // per):
            x, v = scratch + WEIGHTS + 64 * per * i, importance + 4 * per * i
            error, product, norm = splat_f32(np.float32(np.inf)), splat_f32(_ZERO), splat_f32(_ZERO)
            selector = splat_f32(_ZERO)
            for s in range(len(multipliers)):
                sub_block(x, v, multipliers[s], rows + row_bytes * s, scale, scratch)
                found = load_f32(scratch + _SUB_ERROR)
                selector = where_greater(error, found, splat_f32(np.float32(s)), selector)
                product = where_greater(error, found, load_f32(scratch + _SUB_PRODUCT), product)
                norm = where_greater(error, found, load_f32(scratch + _SUB_NORM), norm)
                error = minimum(found, error)
            store_f32(scratch + SELECTORS + 64 * i, selector)
            total, products, norms = add(total, error), add(products, product), add(norms, norm)
        store_f32(scratch + _ERROR, total)
        store_f32(scratch + _PRODUCT, products)
        store_f32(scratch + _NORM, norms)

    return measure


@functools.lru_cache(maxsize=None)
def scale_finder(name):
    """A kernel (group, importance, rows, scratch): the scale of least squares at SCALE, its sum(v w q) at _BEST_PRODUCT."""
    spec, measure = PACKED[name], _measurer(name)
    by_mean, least = spec.selector_bits > 0, np.float32(1 / spec.top)
    tries = np.array([np.float32(spec.unit) * np.float32(ratio) for ratio in RATIOS] if by_mean else spec.extremes, np.float32)

    @njit
    def consider(scale, group, importance, rows, scratch):
        """Measure a scale and keep it if it is better than the best so far."""
        store_f32(scratch + _TRY, scale)
        measure(group, importance, rows, scratch)
        old, new = load_f32(scratch + _BEST_ERROR), load_f32(scratch + _ERROR)
        for kept, found in ((SCALE, _TRY), (_BEST_PRODUCT, _PRODUCT), (_BEST_NORM, _NORM)):
            store_f32(scratch + kept, where_greater(old, new, load_f32(scratch + found), load_f32(scratch + kept)))
        store_f32(scratch + _BEST_ERROR, minimum(new, old))

    @njit
    def find(group, importance, rows, scratch):
        squares = splat_f32(_ZERO)
        for k in range(group):
            w = load_f32(scratch + WEIGHTS + 64 * k)
            squares = add(squares, mul(w, w))
        mean = root(mul(squares, splat_f32(_ONE / np.float32(group))))
        store_f32(scratch + _BEST_ERROR, splat_f32(np.float32(np.inf)))
        store_f32(scratch + SCALE, splat_f32(_ONE))  # what stays if every error is infinite
        store_f32(scratch + _BEST_PRODUCT, splat_f32(_ZERO))
        store_f32(scratch + _BEST_NORM, splat_f32(_ZERO))
        for i in range(len(tries)):
            tried = mul(mean, splat_f32(tries[i])) if by_mean else div(load_f32(scratch + EXTREME), splat_f32(tries[i]))
            consider(half(tried, scratch), group, importance, rows, scratch)
        if by_mean:
            consider(half(mul(load_f32(scratch + LARGEST), splat_f32(least)), scratch), group, importance, rows, scratch)
        for _ in range(REFITS):
            norm = load_f32(scratch + _BEST_NORM)
            fitted = div(load_f32(scratch + _BEST_PRODUCT), where_greater(norm, splat_f32(_ZERO), norm, splat_f32(_ONE)))
            consider(half(fitted, scratch), group, importance, rows, scratch)

    return find


@functools.lru_cache(maxsize=None)
def _rounder(name):
    """A kernel (group, valid, importance, rows, scratch): scale, selectors and codes of the group in scratch, `valid` inputs of it real."""
    spec = PACKED[name]
    measure, find, code, per, pad = _measurer(name), scale_finder(name), nearest_of(name, True), spec.per, np.float32(spec.pad)
    multipliers, row_bytes = np.array(spec.multipliers, np.float32), 4 * rows_table(name).shape[1]

    @njit
    def write_codes(group, valid, rows, scratch):
        """Codes under the scale and the selectors in scratch; zeros have the padding's selector, inputs that do not exist its code."""
        scale, zero = load_f32(scratch + SCALE), splat_f32(_ZERO)
        for i in range(group // per):
            chosen = where_greater(load_f32(scratch + LARGEST), zero, load_f32(scratch + SELECTORS + 64 * i), zero)
            store_f32(scratch + SELECTORS + 64 * i, chosen)
            for k in range(per * i, per * i + per):
                store_f32(scratch + CODES + 64 * k, splat_f32(pad))
            for s in range(len(multipliers)):
                other = absolute(sub(chosen, splat_f32(np.float32(s))))
                inverse = div(splat_f32(_ONE), mul(scale, splat_f32(multipliers[s])))
                for k in range(per * i, min(per * i + per, valid)):
                    found = code(mul(load_f32(scratch + WEIGHTS + 64 * k), inverse), rows + row_bytes * s)
                    at = scratch + CODES + 64 * k
                    store_f32(at, where_greater(other, zero, load_f32(at), found))

    @njit
    def fair_scale(group, importance, scratch):
        """sum(v w w) / sum(v w q) for the scale of least squares, where it is less than double that."""
        total, zero, product = splat_f32(_ZERO), splat_f32(_ZERO), load_f32(scratch + _BEST_PRODUCT)
        for k in range(group):
            w = load_f32(scratch + WEIGHTS + 64 * k)
            total = add(total, mul(mul(splat_f32(get_f32(importance + 4 * k)), w), w))
        fair = half(div(total, where_greater(absolute(product), zero, product, splat_f32(_ONE))), scratch)
        scale = load_f32(scratch + SCALE)
        fair = where_greater(mul(splat_f32(np.float32(2)), absolute(scale)), absolute(fair), fair, scale)
        store_f32(scratch + SCALE, where_greater(mul(product, scale), zero, fair, scale))

    @njit
    def search(group, valid, importance, rows, scratch):
        find(group, importance, rows, scratch)
        store_f32(scratch + _TRY, load_f32(scratch + SCALE))
        measure(group, importance, rows, scratch)
        write_codes(group, valid, rows, scratch)
        fair_scale(group, importance, scratch)

    return search


@functools.lru_cache(maxsize=None)
def group_writer(name):
    """A kernel (group, which, first_codes, span, scratch): the group's scales, codes and selectors from scratch into half a span."""
    spec, write_codes = PACKED[name], pack_chunk(name)
    write_selectors = pack_selectors(name) if spec.selector_bits else write_codes
    per, bits, word, selector_bytes = spec.per if spec.selector_bits else 0, spec.bits, spec.word, 16 * spec.selector_bytes(spec.word)

    @njit
    def write(group, which, first_codes, span, scratch):
        scale = load_f32(scratch + SCALE)
        store_f16(span + 32 * which, where_greater(load_f32(scratch + LARGEST), splat_f32(_ZERO), scale, splat_f32(_ZERO)), 2)
        for i in range(group // CHUNK):
            write_codes(scratch + CODES + 64 * CHUNK * i, span + first_codes + (which * group + CHUNK * i) * 2 * bits)
        if per:
            for i in range(group // word):
                write_selectors(scratch + SELECTORS + 64 * (word // per) * i, span + 64 + (which * (group // word) + i) * selector_bytes)

    return write


@functools.lru_cache(maxsize=None)
def _row_blocks_kernel(name):
    """An entry (w, rows, cols, group, importance, table, limit, first_codes, span_size, out, scratch): 0, 1 (not finite) or 2 (too large)."""
    round_group, write = _rounder(name), group_writer(name)

    @njit(entry=name)
    def round_row_blocks(w, rows, cols, group, importance, table, limit, first_codes, span_size, out, scratch):
        per_row = (cols + 2 * group - 1) // (2 * group)
        for block in range((rows + 15) // 16):
            for s in range(per_row):
                span = out + (block * per_row + s) * span_size
                for which in range(2):
                    col = (2 * s + which) * group
                    if load_group(w, rows, cols, block * 16, col, group, scratch) != 0:
                        return 1
                    if max_f32(load_f32(scratch + LARGEST)) > limit:
                        return 2
                    round_group(group, max(0, min(group, cols - col)), importance + 4 * col, table, scratch)
                    write(group, which, first_codes, span, scratch)
        return 0

    return round_row_blocks


def round_rows(w: np.ndarray, format: str, group: int, out: np.ndarray, importance: np.ndarray | None = None) -> int:
    """Round float32 (N, K) into `out`, uint8 of packed size. Returns 0, or 1 for NaN/infinity, 2 for weights too large for a float16 scale.

    N must be a multiple of 16 unless these are the matrix's last rows. importance: float32 (K,), or None: all inputs count the same.
    """
    rows, cols = w.shape
    width, span_size, spec = 2 * group * spans(cols, group), span_bytes(format, group), PACKED[format]
    if w.dtype != np.float32 or out.dtype != np.uint8 or out.size != row_blocks(rows) * spans(cols, group) * span_size:
        raise ValueError(f"{w.dtype} {w.shape} into {out.size} bytes of {format}")
    if not out.flags.c_contiguous or group not in spec.groups:
        raise ValueError(f"{format} of group {group}, or bytes that do not lie in a row")
    counts = np.zeros(width, np.float32)
    counts[:cols] = 1 if importance is None else importance
    w, scratch = np.ascontiguousarray(w), np.zeros(SCRATCH_BYTES, np.uint8)
    addresses = [a.__array_interface__["data"][0] for a in (w, counts, rows_table(format), out, scratch)]
    largest = np.float32(65504.0 * spec.top)
    first, last = addresses[:3], addresses[3:]
    return _row_blocks_kernel(format)(first[0], rows, cols, group, *first[1:], largest, codes_at(format, group), span_size, *last)
