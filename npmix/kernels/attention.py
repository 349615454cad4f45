"""Attention over the KV cache: absolute blocks of positions, each by itself, merged in position order.

One hard fact: a block's result (max, sum, weighted values) depends on the query and the block alone,
and one function merges blocks, so decode, prefill and every way to cut a prompt give the same bits.
Positions a query must not see get weight exactly 0 and add exactly nothing.

Scores are in base 2 (the query carries log2(e) / sqrt(head_dim)): softmax by the running maximum of
Milakov & Gimelshein 2018 (arXiv 1805.02867).

In the cache (layout: `model/kv_cache.py`) 64 positions' keys lie side by side, so a score is a chain over head_dim in each lane;
a position's values are rows of 64 lanes, so the output is a chain over positions in each lane. Of 8-bit numbers both are exact integers
(`digits.py`): a key's scale multiplies its score, a value's scale its weight.
"""

import functools

import numpy as np
from numba.core import cgutils
from numpy import float32 as F

from . import cpu
from ._jit import njit
from .cache import BLOCK, CELL, COLUMN, KINDS, STRIP
from .digits import digit_tile, to_digits
from .outline import outlined
from .ops import (
    add,
    exp2,
    first,
    fma,
    fma1,
    get_f32,
    keep_lanes,
    load_f32,
    max_f32,
    maximum,
    mul,
    put_f32,
    splat_f32,
    store_f32,
    sub,
    sum_f32,
)
from .simd import (
    const_i64,
    const_vector,
    emit_fma,
    emit_load_f16,
    i64,
    load,
    op,
    peek,
    poke,
    prefetch,
    scalar,
    share,
    splat,
    store,
    twin_fma,
    vector,
    void,
)

TALLEST = 6  # query rows of the tallest tile: 6 x 4 accumulators of 32 registers

# kind: how 16 numbers become float32, and their NumPy type
_LOAD = {
    "f16": (emit_load_f16, np.float16),
    "f32": (lambda b, p: load(b, p, vector("f32", 16)), np.float32),
}


def fetching(rows):
    """Into which caches (`simd.prefetch`) a tile of `rows` queries also fetches what comes next, or None.

    Zen 5: with one row or two it takes in 4-14 % more so, and two threads 5 % more when it is fetched as what is not read again.
    Zen 4: with one row 33 GB/s fell to 24.
    """
    if cpu.prefetching() == "far":
        return 0
    return 3 if rows >= 4 else None


@outlined
def score_tile(kv, rows):
    """op(q, q_bytes, keys, dim, out, out_bytes, ahead): scores of `rows` queries against one strip of 64 positions.

    ahead: what to fetch meanwhile, as many bytes as the strip has.
    """
    (size, *_), (emit_load, dtype), keep = KINDS[kv], _LOAD[kv], fetching(rows)

    def emit(builder, q, q_bytes, keys, dim, out, out_bytes, ahead):
        zero = const_vector("f32", 16, 0.0)
        cells = {(r, p): cgutils.alloca_once_value(builder, zero) for r in range(rows) for p in range(4)}
        q_rows = [builder.add(q, builder.mul(q_bytes, const_i64(r))) for r in range(rows)]
        with cgutils.for_range(builder, dim, intp=scalar("i64")) as loop:
            at = builder.add(keys, builder.mul(loop.index, const_i64(STRIP * size)))
            lines = () if keep is None else range(0, STRIP * size, 64)
            next_at = builder.add(ahead, builder.mul(loop.index, const_i64(STRIP * size)))
            k = [emit_load(builder, builder.add(at, const_i64(16 * size * p))) for p in range(4)]
            for r in range(rows):
                x = load(builder, builder.add(q_rows[r], builder.mul(loop.index, const_i64(4))), scalar("f32"))
                x = splat(builder, x)
                for p in range(4):
                    builder.store(emit_fma(builder, x, k[p], builder.load(cells[r, p])), cells[r, p])
                for line in share(lines, r, rows):
                    prefetch(builder, builder.add(next_at, const_i64(line)), keep)
        for (r, p), cell in cells.items():
            store(builder, builder.load(cell), builder.add(builder.add(out, builder.mul(out_bytes, const_i64(r))), const_i64(64 * p)))

    def twin(q, q_bytes, keys, dim, out, out_bytes, ahead):
        k = peek(keys, dtype, dim * STRIP).reshape(dim, STRIP).astype(np.float32)
        x = np.stack([peek(q + r * q_bytes, np.float32, dim) for r in range(rows)])
        y = np.zeros((rows, STRIP), np.float32)
        for d in range(dim):
            y = twin_fma(x[:, d, None], k[None, d], y)
        for r in range(rows):
            poke(out + r * out_bytes, y[r])

    return op(void, (i64,) * 7, twin)(emit)


@outlined
def value_tile(kv, rows, vectors):
    """op(p, p_bytes, values, width, begin, end, out, out_bytes, ahead): weighted sums of values begin..end, 16 * vectors lanes.

    ahead: what to fetch meanwhile, laid out like the values.
    """
    (size, *_), (emit_load, dtype), keep = KINDS[kv], _LOAD[kv], fetching(rows)

    def emit(builder, p, p_bytes, values, width, begin, end, out, out_bytes, ahead):
        zero = const_vector("f32", 16, 0.0)
        cells = {(r, v): cgutils.alloca_once_value(builder, zero) for r in range(rows) for v in range(vectors)}
        p_rows = [builder.add(p, builder.mul(p_bytes, const_i64(r))) for r in range(rows)]
        with cgutils.for_range(builder, end, start=begin, intp=scalar("i64")) as loop:
            at = builder.add(values, builder.mul(loop.index, builder.mul(width, const_i64(size))))
            lines = () if keep is None else range(0, 16 * size * vectors, 64)
            next_at = builder.add(ahead, builder.mul(loop.index, builder.mul(width, const_i64(size))))
            row = [emit_load(builder, builder.add(at, const_i64(16 * size * v))) for v in range(vectors)]
            for r in range(rows):
                x = load(builder, builder.add(p_rows[r], builder.mul(loop.index, const_i64(4))), scalar("f32"))
                x = splat(builder, x)
                for v in range(vectors):
                    builder.store(emit_fma(builder, x, row[v], builder.load(cells[r, v])), cells[r, v])
                for line in share(lines, r, rows):
                    prefetch(builder, builder.add(next_at, const_i64(line)), keep)
        for (r, v), cell in cells.items():
            store(builder, builder.load(cell), builder.add(builder.add(out, builder.mul(out_bytes, const_i64(r))), const_i64(64 * v)))

    def twin(p, p_bytes, values, width, begin, end, out, out_bytes, ahead):
        y = np.zeros((rows, 16 * vectors), np.float32)
        for s in range(begin, end):
            row = peek(values + s * width * size, dtype, 16 * vectors).astype(np.float32)
            x = np.array([peek(p + r * p_bytes + 4 * s, np.float32, 1)[0] for r in range(rows)])
            y = twin_fma(x[:, None], row[None], y)
        for r in range(rows):
            poke(out + r * out_bytes, y[r])

    return op(void, (i64,) * 9, twin)(emit)


@njit
def softmax_row(scores, begin, end, low, high, out):
    """Turn scores begin..end (multiples of 16) into weights 2**(s - max), 0 outside low..high; out: max, then their sum."""
    top = splat_f32(F(-np.inf))
    for s in range(begin, end, 16):
        v = keep_lanes(load_f32(scores + 4 * s), low - s, high - s)
        store_f32(scores + 4 * s, v)
        top = maximum(v, top)
    largest = max_f32(top)
    put_f32(out, largest)
    total = splat_f32(F(0.0))
    if largest > F(-np.inf):
        shift = splat_f32(largest)
        for s in range(begin, end, 16):
            v = exp2(sub(load_f32(scores + 4 * s), shift))
            store_f32(scores + 4 * s, v)
            total = add(total, v)
    else:
        for s in range(max(low, begin), min(high, end)):  # nothing to see here, or nothing but NaN: that must show
            if get_f32(scores + 4 * s) != get_f32(scores + 4 * s):
                put_f32(out, F(np.nan))
        for s in range(begin, end, 16):
            store_f32(scores + 4 * s, total)
    put_f32(out + 4, sum_f32(total))


@njit
def merge(running, part, width):
    """Merge one block's (max, sum, -, values) into the running one; both are 16 numbers of head and `width` values."""
    top = get_f32(part)
    if top == F(-np.inf):
        return
    old = get_f32(running)
    new = max(old, top)
    a = exp2(splat_f32(old - new))
    b = exp2(splat_f32(top - new))
    put_f32(running, new)
    put_f32(running + 4, fma1(get_f32(running + 4), first(a), get_f32(part + 4) * first(b)))
    for k in range(64, 64 + 4 * width, 64):
        store_f32(running + k, fma(load_f32(running + k), a, mul(load_f32(part + k), b)))


@njit
def clear(running, width):
    """An empty running result: max -inf, sum 0, values 0."""
    zero = splat_f32(F(0.0))
    for k in range(0, 64 + 4 * width, 64):
        store_f32(running + k, zero)
    put_f32(running, F(-np.inf))


@njit
def finish(running, dim, out):
    """The attention output of one head: values / sum."""
    scale = F(1.0) / get_f32(running + 4)
    for k in range(dim):
        put_f32(out + 4 * k, get_f32(running + 64 + 4 * k) * scale)


@functools.lru_cache(maxsize=None)
def attend(kv):
    """A kernel (q, q_bytes, rows, offset, position, heads, window, start, capacity, keys, values, dim, width, scores, parts).

    One block of positions start..start + BLOCK for `rows` (at most TALLEST) queries. Row r belongs to the token at
    position + (offset + r) // heads. keys, values: of this kv head, position s at s % capacity. scores: `scores_bytes` of
    scratch. parts: per row 16 + width float32: max, sum, then the weighted values.
    """
    return _attend_codes() if kv == "q8" else _attend_plain(kv)


def scores_bytes(dim: int) -> int:
    """Bytes of scratch that `attend` needs: TALLEST rows of scores, and the digits of as many queries."""
    return TALLEST * (4 * BLOCK + (dim + 15) // 16 * 32 + 64)


@functools.lru_cache(maxsize=None)
def _attend_plain(kv):
    s1, s2, s4, s6 = [score_tile(kv, r) for r in (1, 2, 4, 6)]
    v1, v2, v4, v6 = [value_tile(kv, r, 4) for r in (1, 2, 4, 6)]
    tail = value_tile(kv, 1, 1)
    size = KINDS[kv][0]

    @njit
    def scores_of(rows, q, q_bytes, keys, dim, out, ahead):
        r = 0
        while r < rows:
            at, to = q + r * q_bytes, out + 4 * BLOCK * r
            if rows - r >= 6:
                s6(at, q_bytes, keys, dim, to, 4 * BLOCK, ahead)
                r += 6
            elif rows - r >= 4:
                s4(at, q_bytes, keys, dim, to, 4 * BLOCK, ahead)
                r += 4
            elif rows - r >= 2:
                s2(at, q_bytes, keys, dim, to, 4 * BLOCK, ahead)
                r += 2
            else:
                s1(at, q_bytes, keys, dim, to, 4 * BLOCK, ahead)
                r += 1

    @njit
    def values_of(rows, p, values, width, begin, end, out, out_bytes, ahead):
        r = 0
        while r < rows:
            n = 6 if rows - r >= 6 else 4 if rows - r >= 4 else 2 if rows - r >= 2 else 1
            at, to = p + 4 * BLOCK * r, out + r * out_bytes
            for lane in range(0, width - COLUMN + 1, COLUMN):
                v, next_v = values + lane * BLOCK * size, ahead + lane * BLOCK * size
                if n == 6:
                    v6(at, 4 * BLOCK, v, COLUMN, begin, end, to + 4 * lane, out_bytes, next_v)
                elif n == 4:
                    v4(at, 4 * BLOCK, v, COLUMN, begin, end, to + 4 * lane, out_bytes, next_v)
                elif n == 2:
                    v2(at, 4 * BLOCK, v, COLUMN, begin, end, to + 4 * lane, out_bytes, next_v)
                else:
                    v1(at, 4 * BLOCK, v, COLUMN, begin, end, to + 4 * lane, out_bytes, next_v)
            whole = width // COLUMN * COLUMN
            for lane in range(whole, width, 16):  # head_dim is a multiple of 64 in all published models
                v = values + (whole * BLOCK + lane - whole) * size
                for i in range(n):
                    to_lane = to + i * out_bytes + 4 * lane
                    tail(at + 4 * BLOCK * i, 4 * BLOCK, v, width - whole, begin, end, to_lane, out_bytes, v)
            r += n

    @njit
    def attend_block(q, q_bytes, rows, offset, position, heads, window, start, capacity, keys, values, dim, width, scores, parts):
        last = position + (offset + rows - 1) // heads
        begin = max(0, position + offset // heads - window + 1 - start) // STRIP * STRIP
        end = min(BLOCK, (last + 1 - start + STRIP - 1) // STRIP * STRIP)
        slot, following = start % capacity, (start + BLOCK) % capacity
        keys_bytes, values_bytes = dim * size, width * size  # of one position
        for s in range(begin, end, STRIP):  # memory's next 64 KiB are on their way while these are worked on
            ahead = values + (slot + s) * values_bytes
            scores_of(rows, q, q_bytes, keys + (slot + s) * keys_bytes, dim, scores + 4 * s, ahead)
        for r in range(rows):
            own = position + (offset + r) // heads - start
            part = parts + r * 4 * (16 + width)
            softmax_row(scores + 4 * BLOCK * r, begin, end, own - window + 1, own + 1, part)
        end = min(BLOCK, last + 1 - start)  # no further: weight 0 times a NaN that an earlier sequence left there is NaN
        at = values + slot * values_bytes
        values_of(rows, scores, at, width, begin, end, parts + 64, 4 * (16 + width), keys + following * keys_bytes)

    return attend_block


@njit
def scale_row(row, scales, begin, end):
    """row[s] *= scales[s] for begin <= s < end, multiples of 16."""
    for s in range(4 * begin, 4 * end, 64):
        store_f32(row + s, mul(load_f32(row + s), load_f32(scales + s)))


@functools.lru_cache(maxsize=None)
def _attend_codes():
    """`attend` over 8-bit keys and values: queries and weights become digits, once a block."""
    d1, d2, d4, d6 = [digit_tile(r, fetching(r)) for r in (1, 2, 4, 6)]

    @njit
    def products(rows, x, x_bytes, tail, codes, begin, end, out, out_bytes, ahead):
        r = 0
        while r < rows:
            at, its_tail, to = x + r * x_bytes, tail + r * x_bytes, out + r * out_bytes
            if rows - r >= 6:
                d6(at, x_bytes, its_tail, codes, begin, end, to, out_bytes, ahead)
                r += 6
            elif rows - r >= 4:
                d4(at, x_bytes, its_tail, codes, begin, end, to, out_bytes, ahead)
                r += 4
            elif rows - r >= 2:
                d2(at, x_bytes, its_tail, codes, begin, end, to, out_bytes, ahead)
                r += 2
            else:
                d1(at, x_bytes, its_tail, codes, begin, end, to, out_bytes, ahead)
                r += 1

    @njit
    def attend_block(q, q_bytes, rows, offset, position, heads, window, start, capacity, keys, values, dim, width, scores, parts):
        last = position + (offset + rows - 1) // heads
        begin = max(0, position + offset // heads - window + 1 - start) // STRIP * STRIP
        end = min(BLOCK, (last + 1 - start + STRIP - 1) // STRIP * STRIP)
        limit = min(BLOCK, last + 1 - start)  # no further: weight 0 times a NaN that an earlier sequence left there is NaN
        slot, following = start % capacity, (start + BLOCK) % capacity
        words, padded = (dim + 3) // 4, (dim + 15) // 16 * 16
        keys_bytes, values_bytes = 4 * words + 4, width + 4  # of one position, with its scale
        ahead = keys + following * keys_bytes
        keys, values = keys + slot * keys_bytes, values + slot * values_bytes
        digits, digits_bytes = scores + 4 * TALLEST * BLOCK, 2 * padded + 64
        for r in range(rows):
            at, to = q + r * q_bytes, digits + r * digits_bytes
            if dim < padded:
                at = scores
                for i in range(padded):
                    put_f32(at + 4 * i, get_f32(q + r * q_bytes + 4 * i) if i < dim else F(0.0))
            to_digits(at, padded, to, to + 2 * padded)
        for s in range(begin, end, CELL):
            at, to = keys + 4 * words * s, scores + 4 * s
            products(rows, digits, digits_bytes, digits + 2 * padded, at, 0, words, to, 4 * BLOCK, values + width * s)
        part_bytes = 4 * (16 + width)
        for r in range(rows):
            own, row = position + (offset + r) // heads - start, scores + 4 * BLOCK * r
            scale_row(row, keys + 4 * words * BLOCK, begin, end)
            softmax_row(row, begin, end, own - window + 1, own + 1, parts + r * part_bytes)
            scale_row(row, values + width * BLOCK, begin, end)
            for s in range(limit, end):
                put_f32(row + 4 * s, F(0.0))
            to_digits(row + 4 * begin, end - begin, row + 2 * begin, row + 2 * BLOCK)
        for lane in range(0, width, CELL):
            at, to = values + lane * BLOCK, parts + 64 + 4 * lane
            products(rows, scores, 4 * BLOCK, scores + 2 * BLOCK, at, begin // 4, (limit + 3) // 4, to, part_bytes, ahead + lane * BLOCK)

    return attend_block
