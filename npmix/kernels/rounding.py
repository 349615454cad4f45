"""Fast rounding of weights, straight into the packed bytes: the twin of `quant/round.py` (the law stands there).

One hard fact: 16 rows are rounded side by side, each row in its own lane and in the order of its
inputs, so no sum is ever reordered: equal bits on every machine. Kernels release the GIL; a
conversion runs them on row ranges from plain threads.
"""

import numpy as np

from ..formats import PACKED, row_blocks, span_bytes, spans
from ._jit import njit
from .ops import (
    absolute,
    add,
    div,
    get_f32,
    load_f16,
    load_f32,
    max_f32,
    maximum,
    minimum,
    mul,
    nearest,
    put_f32,
    splat_f32,
    store_f32,
    sub,
    sum_f32,
    to_i32,
)
from .simd import F32, I32, call, const_vector, i64, op, poke, store, vector, void

_ZERO, _ONE = np.float32(0), np.float32(1)
_LARGEST_HALF, _SMALLEST_HALF = np.float32(65504.0), np.float32(2.0**-24)
_Q8_LIMIT, _Q4_LIMIT = np.float32(65504.0 * 127), np.float32(65504.0 * 8)
_Q8_TOP, _Q8_EDGE, _Q4_LOW, _Q4_HIGH = np.float32(127), np.float32(127.5), np.float32(-8), np.float32(7)
_D0, _D1, _D2, _D3, _D4, _D5 = (np.float32(d) for d in (-8.0, -7.5, -8.5, -9.0, -9.5, 7.0))  # DIVISORS of the twin


# ---- operations that only rounding needs ---------------------------------------------------------


@op(F32, (F32, F32), np.copysign)
def copysign(b, size, sign):
    """`size` with the sign of `sign`."""
    return call(b, "llvm.copysign.v16f32", size.type, size, sign)


@op(F32, (F32, F32, F32, F32), lambda a, c, x, y: np.where(a > c, x, y))
def where_greater(b, a, c, x, y):
    """x where a > c, else y."""
    return b.select(b.fcmp_ordered(">", a, c), x, y)


@op(void, (i64, F32), lambda p, v: poke(p, v.astype(np.float16)))
def store_f16(b, p, v):
    """16 float16, rounded half to even."""
    store(b, b.fptrunc(v, vector("f16", 16)), p)


@op(I32, (I32, I32, I32, I32), lambda w, x, y, z: w | x << 8 | y << 16 | z << 24)
def join_bytes(b, w, x, y, z):
    """Four numbers of a byte each, side by side in 32 bits."""
    for value, shift in ((x, 8), (y, 16), (z, 24)):
        w = b.or_(w, b.shl(value, const_vector("i32", 16, shift)))
    return w


@op(I32, (I32, I32), lambda low, high: low | high << 4)
def join_nibbles(b, low, high):
    """Two numbers below 16 in one byte."""
    return b.or_(low, b.shl(high, const_vector("i32", 16, 4)))


@op(void, (i64, I32), lambda p, v: poke(p, v.astype(np.int32)))
def store_i32(b, p, v):
    """64 bytes, 4 for each row."""
    store(b, v, p)


# ---- one group of 16 rows ------------------------------------------------------------------------
# Scratch memory, in 64-byte vectors of 16 rows: x (group), then error, product, norm, best scale, least error, a place for float16.


@njit
def _half(scale, scratch):
    """`scale` rounded to float16s that are neither 0 nor infinite."""
    size = minimum(maximum(absolute(scale), splat_f32(_SMALLEST_HALF)), splat_f32(_LARGEST_HALF))
    store_f16(scratch, copysign(size, scale))
    return load_f16(scratch)


@njit
def _load(w, rows, cols, row, col, group, x, best):
    """w's 16 rows x group inputs into x, zeros outside; largest |w| and its signed value by row to best, best + 64.

    Returns 0 if all are finite, else 1.
    """
    for r in range(16):
        n = max(min(group, cols - col), 0) if row + r < rows else 0
        at = w + 4 * ((row + r) * cols + col)
        for k in range(n):
            put_f32(x + 64 * k + 4 * r, get_f32(at + 4 * k))
        for k in range(n, group):
            put_f32(x + 64 * k + 4 * r, _ZERO)
    largest = splat_f32(_ZERO)
    extreme = splat_f32(_ZERO)
    none = splat_f32(_ZERO)
    for k in range(group):
        v = load_f32(x + 64 * k)
        size = absolute(v)
        none = add(none, sub(v, v))  # 0, or NaN once an infinity or a NaN was seen
        extreme = where_greater(size, largest, v, extreme)
        largest = maximum(size, largest)
    store_f32(best, largest)
    store_f32(best + 64, extreme)
    return 0 if sum_f32(none) == _ZERO else 1


@njit
def _try_scale(x, group, scale_at, sums, least_at):
    """Measure a scale at scale_at: sums of w q and q q to sums, sums + 64; kept at least_at (scale, then error) if it is better."""
    scale = load_f32(scale_at)
    inverse = div(splat_f32(_ONE), scale)
    low, high = splat_f32(_Q4_LOW), splat_f32(_Q4_HIGH)
    error = splat_f32(_ZERO)
    product = splat_f32(_ZERO)
    norm = splat_f32(_ZERO)
    for k in range(group):
        v = load_f32(x + 64 * k)
        q = nearest(minimum(maximum(mul(v, inverse), low), high))
        miss = sub(v, mul(q, scale))
        error = add(error, mul(miss, miss))
        product = add(product, mul(v, q))
        norm = add(norm, mul(q, q))
    store_f32(sums, product)
    store_f32(sums + 64, norm)
    least = load_f32(least_at + 64)
    store_f32(least_at, where_greater(least, error, scale, load_f32(least_at)))
    store_f32(least_at + 64, minimum(error, least))


@njit
def _search_q4(x, group, best, work):
    """The q4 scale of least squared error of each row, to best (its extreme value stands at best + 64)."""
    extreme = load_f32(best + 64)
    least_at = work + 192
    store_f32(least_at, splat_f32(_ONE))
    store_f32(least_at + 64, splat_f32(np.float32(np.inf)))
    zero, one = splat_f32(_ZERO), splat_f32(_ONE)
    for divisor in (_D0, _D1, _D2, _D3, _D4, _D5):
        store_f32(work, _half(div(extreme, splat_f32(divisor)), work + 320))
        _try_scale(x, group, work, work + 64, least_at)
        norm = load_f32(work + 128)
        fitted = div(load_f32(work + 64), where_greater(norm, zero, norm, one))
        store_f32(work, _half(fitted, work + 320))
        _try_scale(x, group, work, work + 64, least_at)
    store_f32(best + 64, load_f32(least_at))


@njit
def _scale_q8(best, work):
    """The q8 scale of each row to best + 64: one float16 step up where rounding would clip the largest weight."""
    largest = load_f32(best)
    scale = _half(div(largest, splat_f32(_Q8_TOP)), work)
    edge = mul(scale, splat_f32(_Q8_EDGE))  # below `largest` only for a subnormal float16, whose step is 2^-24
    store_f32(best + 64, where_greater(largest, edge, add(scale, splat_f32(_SMALLEST_HALF)), scale))


@njit
def _code(x, inverse, low, high, zero):
    return to_i32(add(nearest(minimum(maximum(mul(load_f32(x), inverse), low), high)), zero))


@njit
def _write(x, group, best, bits, which, span):
    """Codes and scales (0 for a group of zeros) of group `which` (0 or 1) into the span's bytes."""
    scale = load_f32(best + 64)
    store_f16(span + 32 * which, where_greater(load_f32(best), splat_f32(_ZERO), scale, splat_f32(_ZERO)))
    inverse = div(splat_f32(_ONE), scale)
    if bits == 4:
        low, high, zero = splat_f32(_Q4_LOW), splat_f32(_Q4_HIGH), splat_f32(np.float32(8))
        at = span + 64 + which * group * 8
        for i in range(group // 8):
            p = x + 512 * i
            a = join_nibbles(_code(p, inverse, low, high, zero), _code(p + 256, inverse, low, high, zero))
            b = join_nibbles(_code(p + 64, inverse, low, high, zero), _code(p + 320, inverse, low, high, zero))
            c = join_nibbles(_code(p + 128, inverse, low, high, zero), _code(p + 384, inverse, low, high, zero))
            d = join_nibbles(_code(p + 192, inverse, low, high, zero), _code(p + 448, inverse, low, high, zero))
            store_i32(at + 64 * i, join_bytes(a, b, c, d))
    else:
        low, high, zero = splat_f32(-_Q8_TOP), splat_f32(_Q8_TOP), splat_f32(np.float32(128))
        at = span + 64 + which * group * 16
        for i in range(group // 4):
            p = x + 256 * i
            a = _code(p, inverse, low, high, zero)
            b = _code(p + 64, inverse, low, high, zero)
            c = _code(p + 128, inverse, low, high, zero)
            d = _code(p + 192, inverse, low, high, zero)
            store_i32(at + 64 * i, join_bytes(a, b, c, d))


@njit(entry="")
def _round_rows(w, rows, cols, bits, group, blocks, per_row, span_size, out, x):
    """w: float32 (rows, cols). out: (blocks, per_row, span_size) bytes. x: scratch. Returns 0, 1 (not finite) or 2 (too large)."""
    best = x + 64 * group
    work = best + 128
    limit = _Q4_LIMIT if bits == 4 else _Q8_LIMIT
    for block in range(blocks):
        for s in range(per_row):
            span = out + (block * per_row + s) * span_size
            for which in range(2):
                if _load(w, rows, cols, block * 16, (2 * s + which) * group, group, x, best) != 0:
                    return 1
                if max_f32(load_f32(best)) > limit:
                    return 2
                if bits == 4:
                    _search_q4(x, group, best, work)
                else:
                    _scale_q8(best, work)
                _write(x, group, best, bits, which, span)
    return 0


def round_rows(w: np.ndarray, format: str, group: int, out: np.ndarray) -> int:
    """Round float32 (N, K) into `out`, uint8 of packed size. Returns 0, or 1 for NaN/infinity, 2 for weights too large for a float16 scale.

    N must be a multiple of 16 unless these are the matrix's last rows.
    """
    rows, cols = w.shape
    blocks, per_row, span_size = row_blocks(rows), spans(cols, group), span_bytes(format, group)
    if w.dtype != np.float32 or out.dtype != np.uint8 or out.size != blocks * per_row * span_size or not out.flags.c_contiguous:
        raise ValueError(f"{w.dtype} {w.shape} into {out.size} bytes of {format}")
    w = np.ascontiguousarray(w)
    scratch = np.zeros(64 * group + 640, np.uint8)
    addresses = w.ctypes.data, out.ctypes.data, scratch.ctypes.data
    return _round_rows(addresses[0], rows, cols, PACKED[format].bits, group, blocks, per_row, span_size, addresses[1], addresses[2])
