"""Float rows times 8-bit codes by the int8 dot: each number of the row as two digits, 128 * high + low.

One hard fact: float32 products of 16 codes cost a conversion and a multiplication and are no faster than memory brings
float16; 15 bits of the row in two int8 digits are exact integers at half the price, and 128 times finer than the codes.

A row of n numbers (n a multiple of 16) is n / 4 pairs of words, four high digits and four low ones; `tail` is where
its sum (int32) and its scale (float32) lie.
"""

import functools

import numpy as np
from numba.core import cgutils
from numpy import float32 as F
from numpy import int32 as I32
from numpy import int64 as I64

from ._jit import njit
from .cache import CELL, ZERO
from .dot import emit_dot4, emit_splat4, takes_signed
from .ops import (
    absolute,
    add_i32,
    fma,
    load_f32,
    max_f32,
    maximum,
    mul,
    nearest,
    put_f32,
    put_i32,
    splat_f32,
    splat_i32,
    store_i8_words,
    sub,
    sum_f32,
    sum_i32,
    to_i32,
)
from .simd import const_i64, const_vector, i64, load, op, peek, poke, prefetch, scalar, share, splat, store, vector, void

LARGEST = 16256  # 127 * 128


@njit
def to_digits(x, count, out, tail):
    """x = scale * (128 * high + low) within scale / 2, scale = max|x| / LARGEST; high in -127..127, low in -64..64.

    x: float32, `count` a multiple of 16; out may be x. A row that is not finite has digits 0 and a NaN for a scale.
    """
    top, taint = splat_f32(F(0.0)), splat_f32(F(0.0))
    for k in range(0, count, 16):
        v = load_f32(x + 4 * k)
        top = maximum(absolute(v), top)
        taint = fma(v, splat_f32(F(0.0)), taint)
    largest, bad = max_f32(top), sum_f32(taint)
    fine = bad == F(0.0) and largest >= F(1e-30)  # LARGEST / largest must not overflow
    inverse = splat_f32(F(LARGEST) / largest if fine else F(0.0))
    total = splat_i32(I32(0))
    for k in range(0, count, 16):
        v = nearest(mul(load_f32(x + 4 * k), inverse)) if fine else splat_f32(F(0.0))
        high = nearest(mul(v, splat_f32(F(1 / 128))))
        total = add_i32(total, to_i32(v))
        store_i8_words(out + 2 * k, to_i32(high), I64(8))
        store_i8_words(out + 2 * k + 4, to_i32(sub(v, mul(high, splat_f32(F(128.0))))), I64(8))
    put_i32(tail, I64(sum_i32(total)))
    put_f32(tail + 4, largest / F(LARGEST) if fine else bad)


@functools.lru_cache(maxsize=None)
def digit_tile(rows, keep=None):
    """op(x, x_bytes, tail, codes, begin, end, out, out_bytes, ahead): `rows` rows of digits times CELL lanes of codes, float32.

    Over words begin..end of the rows; word g of lane i at codes + 4 * (CELL * g + i). x, tail: x_bytes from one row to the next.
    ahead: what to fetch meanwhile, laid out like the codes, into the caches that `keep` names (`simd.prefetch`), or nothing.
    """

    def emit(builder, x, x_bytes, tail, codes, begin, end, out, out_bytes, ahead):
        zero = const_vector("i32", 16, 0)
        cells = {(r, d, p): cgutils.alloca_once_value(builder, zero) for r in range(rows) for d in range(2) for p in range(2)}
        offsets = [builder.mul(x_bytes, const_i64(r)) for r in range(rows)]
        with cgutils.for_range(builder, end, start=begin, intp=scalar("i64")) as loop:
            word, pair = builder.mul(loop.index, const_i64(4 * CELL)), builder.mul(loop.index, const_i64(8))
            lines = () if keep is None else [builder.add(ahead, builder.add(word, const_i64(64 * p))) for p in range(2)]
            k = [load(builder, builder.add(codes, builder.add(word, const_i64(64 * p))), vector("i8", 64)) for p in range(2)]
            for r, d in [(r, d) for r in range(rows) for d in range(2)]:
                at = builder.add(builder.add(x, offsets[r]), builder.add(pair, const_i64(4 * d)))
                digits = emit_splat4(builder, at)
                for p in range(2):
                    builder.store(emit_dot4(builder, builder.load(cells[r, d, p]), k[p], digits), cells[r, d, p])
                for line in share(lines, 2 * r + d, 2 * rows):
                    prefetch(builder, line, keep)
        for r in range(rows):
            at = builder.add(tail, offsets[r])
            scale = splat(builder, load(builder, builder.add(at, const_i64(4)), scalar("f32")))
            start = builder.mul(splat(builder, load(builder, at, scalar("i32"))), const_vector("i32", 16, -ZERO))
            to = builder.add(out, builder.mul(out_bytes, const_i64(r)))
            for p in range(2):
                high, low = (builder.load(cells[r, d, p]) for d in range(2))
                total = builder.add(builder.shl(high, const_vector("i32", 16, 7)), low)
                total = total if takes_signed() else builder.add(total, start)  # wraps; the whole fits
                store(builder, builder.fmul(builder.sitofp(total, vector("f32", 16)), scale), builder.add(to, const_i64(64 * p)))

    def twin(x, x_bytes, tail, codes, begin, end, out, out_bytes, ahead):
        k = peek(codes + 4 * CELL * begin, np.uint8, 4 * CELL * (end - begin)).reshape(-1, CELL, 4).astype(np.int64) - ZERO
        for r in range(rows):
            digits = peek(x + r * x_bytes + 8 * begin, np.int8, 8 * (end - begin)).reshape(-1, 2, 4).astype(np.int64)
            total = np.einsum("gj,gij->i", 128 * digits[:, 0] + digits[:, 1], k).astype(np.int32)
            poke(out + r * out_bytes, total.astype(np.float32) * peek(tail + r * x_bytes + 4, np.float32, 1))

    return op(void, (i64,) * 9, twin)(emit)
