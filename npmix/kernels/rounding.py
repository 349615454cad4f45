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
)
from .simd import F32, call, const_i64, const_vector, i64, load, op, peek, poke, scalar, shuffle, store, vector, void

_ZERO, _ONE = np.float32(0), np.float32(1)
_LARGEST_HALF, _SMALLEST_HALF = np.float32(65504.0), np.float32(2.0**-24)
_Q8_TOP, _Q8_EDGE = np.float32(127), np.float32(127.5)

# Scratch memory in 64-byte vectors of 16 rows: the group's weights, its codes, its selectors, then the places named here
_WEIGHTS, _CODES, _SELECTORS = 0, 64 * 128, 64 * 256
(
    _LARGEST, _SCALE, _TRY, _HALF,
    _ERROR, _PRODUCT, _NORM,
    _BEST_ERROR, _BEST_PRODUCT, _BEST_NORM,
    _SUB_ERROR, _SUB_PRODUCT, _SUB_NORM,
) = range(_SELECTORS + 64 * 16, _SELECTORS + 64 * 29, 64)  # fmt: skip
_SCRATCH_BYTES = _SELECTORS + 64 * 29


# ---- operations that only rounding needs ---------------------------------------------------------


@op(F32, (F32, F32), np.copysign)
def copysign(b, size, sign):
    """`size` with the sign of `sign`."""
    return call(b, "llvm.copysign.v16f32", size.type, size, sign)


@op(F32, (F32, F32, F32, F32), lambda a, c, x, y: np.where(a > c, x, y))
def where_greater(b, a, c, x, y):
    """x where a > c, else y."""
    return b.select(b.fcmp_ordered(">", a, c), x, y)


@op(F32, (F32,), np.sqrt)
def root(b, x):
    return call(b, "llvm.sqrt.v16f32", x.type, x)


@op(void, (i64, F32), lambda p, v: poke(p, v.astype(np.float16)))
def store_f16(b, p, v):
    """16 float16, rounded half to even."""
    store(b, b.fptrunc(v, vector("f16", 16)), p)


@functools.lru_cache(maxsize=None)
def nearest_of(name, codes):
    """op(z): the value of a format's table nearest to each z (codes: its place in the table), the lower one in the middle."""
    values = np.array(PACKED[name].values, np.float32)
    middles = (values[1:] + values[:-1]) * np.float32(0.5)
    results = np.arange(len(values), dtype=np.float32) if codes else values

    def emit(b, z):
        found = const_vector("f32", 16, float(results[0]))
        for middle, step in zip(middles, np.diff(results)):  # sums of small integers are exact
            above = b.fcmp_ordered(">", z, const_vector("f32", 16, float(middle)))
            found = b.fadd(found, b.select(above, const_vector("f32", 16, float(step)), const_vector("f32", 16, 0.0)))
        return found

    return op(F32, (F32,), lambda z: results[(z > middles[:, None]).sum(0)])(emit)


@functools.lru_cache(maxsize=None)
def pack_chunk(name):
    """op(codes, out): a chunk's codes, float32 in vectors of 16 rows, as the planes' lines."""
    spec = PACKED[name]

    def emit(b, codes, out):
        lanes = []
        for i in range(CHUNK // 4):  # 4 inputs a lane, a byte each
            four = [b.fptosi(load(b, b.add(codes, const_i64(64 * (4 * i + j))), vector("f32", 16)), vector("i32", 16)) for j in range(4)]
            for j in (1, 2, 3):
                four[0] = b.or_(four[0], b.shl(four[j], const_vector("i32", 16, 8 * j)))
            lanes.append(four[0])
        low, at = 0, 0
        for p in spec.planes:
            mask = const_vector("i32", 16, ((1 << p) - 1) * 0x01010101)
            for first in range(0, len(lanes), 8 // p):
                line = const_vector("i32", 16, 0)
                for j in range(8 // p):
                    part = b.and_(b.lshr(lanes[first + j], const_vector("i32", 16, low)), mask)
                    line = b.or_(line, b.shl(part, const_vector("i32", 16, p * j)))
                store(b, line, b.add(out, const_i64(at)))
                at += 64
            low += p

    def twin(codes, out):
        given = peek(codes, np.float32, 16 * CHUNK).astype(np.uint8).reshape(-1, 4, 16).transpose(0, 2, 1)
        low, lines = 0, []
        for p in spec.planes:
            part = (given >> low & (1 << p) - 1).reshape(-1, 8 // p, 64)
            lines.append((part << p * np.arange(8 // p, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8))
            low += p
        poke(out, np.concatenate(lines))

    return op(void, (i64, i64), twin)(emit)


@functools.lru_cache(maxsize=None)
def pack_selectors(name):
    """op(selectors, out): a word's selectors, float32 in vectors of 16 rows, as one number a row."""
    spec = PACKED[name]
    count, size = spec.word // spec.per, spec.selector_bytes(spec.word)

    def emit(b, selectors, out):
        lane = const_vector("i32", 16, 0)
        for i in range(count):
            one = b.fptosi(load(b, b.add(selectors, const_i64(64 * i)), vector("f32", 16)), vector("i32", 16))
            lane = b.or_(lane, b.shl(one, const_vector("i32", 16, spec.selector_bits * i)))
        data = shuffle(b, b.bitcast(lane, vector("i8", 64)), [4 * r + byte for r in range(16) for byte in range(size)])
        store(b, data, out)

    def twin(selectors, out):
        given = peek(selectors, np.float32, 16 * count).astype(np.uint32).reshape(count, 16)
        lane = (given << spec.selector_bits * np.arange(count, dtype=np.uint32)[:, None]).sum(0, dtype=np.uint32)
        poke(out, lane.view(np.uint8).reshape(16, 4)[:, :size].copy())

    return op(void, (i64, i64), twin)(emit)


# ---- one group of 16 rows ------------------------------------------------------------------------


@njit
def _half(scale, scratch):
    """`scale` rounded to float16s that are neither 0 nor infinite."""
    size = minimum(maximum(absolute(scale), splat_f32(_SMALLEST_HALF)), splat_f32(_LARGEST_HALF))
    store_f16(scratch + _HALF, copysign(size, scale))
    return load_f16(scratch + _HALF)


@njit
def _load(w, rows, cols, row, col, group, scratch):
    """w's 16 rows x group inputs, zeros outside, and the largest |w| of each row. Returns 0 if all are finite, else 1."""
    x = scratch + _WEIGHTS
    for r in range(16):
        n = max(min(group, cols - col), 0) if row + r < rows else 0
        at = w + 4 * ((row + r) * cols + col)
        for k in range(n):
            put_f32(x + 64 * k + 4 * r, get_f32(at + 4 * k))
        for k in range(n, group):
            put_f32(x + 64 * k + 4 * r, _ZERO)
    largest = splat_f32(_ZERO)
    none = splat_f32(_ZERO)
    for k in range(group):
        v = load_f32(x + 64 * k)
        none = add(none, sub(v, v))  # 0, or NaN once an infinity or a NaN was seen
        largest = maximum(absolute(v), largest)
    store_f32(scratch + _LARGEST, largest)
    return 0 if sum_f32(none) == _ZERO else 1


@njit
def _round_q8(group, scratch):
    """The scale, one float16 step up where rounding would clip the largest weight, and the codes."""
    largest = load_f32(scratch + _LARGEST)
    scale = _half(div(largest, splat_f32(_Q8_TOP)), scratch)
    edge = mul(scale, splat_f32(_Q8_EDGE))  # below `largest` only for a subnormal float16, whose step is 2^-24
    scale = where_greater(largest, edge, add(scale, splat_f32(_SMALLEST_HALF)), scale)
    store_f32(scratch + _SCALE, scale)
    inverse, low, high, zero = div(splat_f32(_ONE), scale), splat_f32(-_Q8_TOP), splat_f32(_Q8_TOP), splat_f32(np.float32(128))
    for k in range(group):
        q = nearest(minimum(maximum(mul(load_f32(scratch + _WEIGHTS + 64 * k), inverse), low), high))
        store_f32(scratch + _CODES + 64 * k, add(q, zero))


@functools.lru_cache(maxsize=None)
def _rounder(name):
    """A kernel (group, importance, scratch): scale, selectors and codes of the group in scratch."""
    spec = PACKED[name]
    if not spec.values:

        @njit
        def plain(group, importance, scratch):
            _round_q8(group, scratch)

        return plain
    value, code = nearest_of(name, False), nearest_of(name, True)
    multipliers = np.array(spec.multipliers or (1,), np.float32)
    count, per, unit = len(multipliers), spec.per, np.float32(spec.unit)
    ratios = np.array([unit * np.float32(ratio) for ratio in RATIOS], np.float32)
    least = np.float32(1 / spec.top)

    @njit
    def sub_block(x, v, inputs, m, scale, scratch):
        """Error, sum(v w q) and sum(v q q) of one sub-block under one multiplier."""
        factor = mul(scale, splat_f32(m))
        inverse = div(splat_f32(_ONE), factor)
        error, product, norm = splat_f32(_ZERO), splat_f32(_ZERO), splat_f32(_ZERO)
        for k in range(inputs):
            w, weight = load_f32(x + 64 * k), splat_f32(get_f32(v + 4 * k))
            z = mul(w, inverse)
            q = value(z)
            miss = sub(z, q)
            error = add(error, mul(mul(miss, miss), weight))
            product = add(product, mul(mul(q, w), weight))
            norm = add(norm, mul(mul(q, q), weight))
        store_f32(scratch + _SUB_ERROR, mul(error, mul(factor, factor)))
        store_f32(scratch + _SUB_PRODUCT, mul(product, splat_f32(m)))
        store_f32(scratch + _SUB_NORM, mul(norm, splat_f32(m * m)))

    @njit
    def measure(group, importance, scratch):
        """Error and sums under the scale at _TRY, the best selector of each sub-block at _SELECTORS."""
        scale, inputs = load_f32(scratch + _TRY), per if per else group
        total, products, norms = splat_f32(_ZERO), splat_f32(_ZERO), splat_f32(_ZERO)
        for i in range(group // inputs):
            x, v = scratch + _WEIGHTS + 64 * inputs * i, importance + 4 * inputs * i
            error, product, norm = splat_f32(np.float32(np.inf)), splat_f32(_ZERO), splat_f32(_ZERO)
            selector = splat_f32(_ZERO)
            for s in range(count):
                sub_block(x, v, inputs, multipliers[s], scale, scratch)
                found = load_f32(scratch + _SUB_ERROR)
                selector = where_greater(error, found, splat_f32(np.float32(s)), selector)
                product = where_greater(error, found, load_f32(scratch + _SUB_PRODUCT), product)
                norm = where_greater(error, found, load_f32(scratch + _SUB_NORM), norm)
                error = minimum(found, error)
            store_f32(scratch + _SELECTORS + 64 * i, selector)
            total, products, norms = add(total, error), add(products, product), add(norms, norm)
        store_f32(scratch + _ERROR, total)
        store_f32(scratch + _PRODUCT, products)
        store_f32(scratch + _NORM, norms)

    @njit
    def consider(scale, group, importance, scratch):
        """Measure a scale and keep it if it is better than the best so far."""
        store_f32(scratch + _TRY, scale)
        measure(group, importance, scratch)
        old, new = load_f32(scratch + _BEST_ERROR), load_f32(scratch + _ERROR)
        for kept, found in ((_SCALE, _TRY), (_BEST_PRODUCT, _PRODUCT), (_BEST_NORM, _NORM)):
            store_f32(scratch + kept, where_greater(old, new, load_f32(scratch + found), load_f32(scratch + kept)))
        store_f32(scratch + _BEST_ERROR, minimum(new, old))

    @njit
    def search(group, importance, scratch):
        squares = splat_f32(_ZERO)
        for k in range(group):
            w = load_f32(scratch + _WEIGHTS + 64 * k)
            squares = add(squares, mul(w, w))
        mean = root(mul(squares, splat_f32(_ONE / np.float32(group))))
        store_f32(scratch + _BEST_ERROR, splat_f32(np.float32(np.inf)))
        store_f32(scratch + _SCALE, splat_f32(_ONE))  # what stays if every error is infinite
        store_f32(scratch + _BEST_PRODUCT, splat_f32(_ZERO))
        store_f32(scratch + _BEST_NORM, splat_f32(_ZERO))
        for i in range(len(ratios)):
            consider(_half(mul(mean, splat_f32(ratios[i])), scratch), group, importance, scratch)
        consider(_half(mul(load_f32(scratch + _LARGEST), splat_f32(least)), scratch), group, importance, scratch)
        for _ in range(REFITS):
            norm = load_f32(scratch + _BEST_NORM)
            fitted = div(load_f32(scratch + _BEST_PRODUCT), where_greater(norm, splat_f32(_ZERO), norm, splat_f32(_ONE)))
            consider(_half(fitted, scratch), group, importance, scratch)
        store_f32(scratch + _TRY, load_f32(scratch + _SCALE))
        measure(group, importance, scratch)
        scale, inputs = load_f32(scratch + _SCALE), per if per else group
        for i in range(group // inputs):
            m = splat_f32(_ZERO)
            for s in range(count):
                chosen = absolute(sub(load_f32(scratch + _SELECTORS + 64 * i), splat_f32(np.float32(s))))
                m = where_greater(splat_f32(np.float32(0.5)), chosen, splat_f32(multipliers[s]), m)
            inverse = div(splat_f32(_ONE), mul(scale, m))
            selector = load_f32(scratch + _SELECTORS + 64 * i)  # 0 in a group of zeros, as in the padding
            store_f32(
                scratch + _SELECTORS + 64 * i, where_greater(load_f32(scratch + _LARGEST), splat_f32(_ZERO), selector, splat_f32(_ZERO))
            )
            for k in range(inputs * i, inputs * i + inputs):
                store_f32(scratch + _CODES + 64 * k, code(mul(load_f32(scratch + _WEIGHTS + 64 * k), inverse)))

    return search


@functools.lru_cache(maxsize=None)
def _row_blocks_kernel(name):
    """An entry (w, rows, cols, group, importance, limit, out, scratch): 0, 1 (not finite) or 2 (too large)."""
    spec, round_group, write_codes = PACKED[name], _rounder(name), pack_chunk(name)
    write_selectors = pack_selectors(name) if spec.per else write_codes
    per, bits, word, selector_bytes = spec.per, spec.bits, spec.word, 16 * spec.selector_bytes(spec.word)

    @njit
    def write(group, which, first_codes, span, scratch):
        scale = load_f32(scratch + _SCALE)
        store_f16(span + 32 * which, where_greater(load_f32(scratch + _LARGEST), splat_f32(_ZERO), scale, splat_f32(_ZERO)))
        for i in range(group // CHUNK):
            write_codes(scratch + _CODES + 64 * CHUNK * i, span + first_codes + (which * group + CHUNK * i) * 2 * bits)
        if per:
            for i in range(group // word):
                write_selectors(scratch + _SELECTORS + 64 * (word // per) * i, span + 64 + (which * (group // word) + i) * selector_bytes)

    @njit(entry=name)
    def round_row_blocks(w, rows, cols, group, importance, limit, first_codes, span_size, out, scratch):
        per_row = (cols + 2 * group - 1) // (2 * group)
        for block in range((rows + 15) // 16):
            for s in range(per_row):
                span = out + (block * per_row + s) * span_size
                for which in range(2):
                    col = (2 * s + which) * group
                    if _load(w, rows, cols, block * 16, col, group, scratch) != 0:
                        return 1
                    if max_f32(load_f32(scratch + _LARGEST)) > limit:
                        return 2
                    round_group(group, importance + 4 * col, scratch)
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
    w, scratch = np.ascontiguousarray(w), np.zeros(_SCRATCH_BYTES, np.uint8)
    addresses = [a.__array_interface__["data"][0] for a in (w, counts, out, scratch)]
    return _row_blocks_kernel(format)(
        addresses[0], rows, cols, group, addresses[1], np.float32(65504.0 * spec.top), codes_at(format, group), span_size, *addresses[2:]
    )
