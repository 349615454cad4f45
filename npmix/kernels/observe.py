"""What the matrices of a layer take in, for calibration: rows that prefill keeps, and sums over them.

One hard fact: each channel is summed by one member over the tokens in their order, in float64, so the sums have
the same bits for any number of threads and any length of chunk.

Off, it costs prefill a branch a row: the addresses OBSERVED_* of the table are 0. On, a layer leaves behind
    OBSERVED_NORMED  float32 (chunk, X_WIDTH): the inputs of wq, wk, wv, or of the output matrix
    ATT              float32 (chunk, ATT_WIDTH): the inputs of wo (kept in any case)
    OBSERVED_ROWS    float32 (chunk, X_WIDTH): the inputs of the router, w_gate and w_up by token; ORDER and STARTS tell whose
    OBSERVED_HIDDEN  float32 (pairs, hidden_dim padded to EXPERT_UNIT): the inputs of w_down in the order of ORDER
"""

import functools

import numpy as np
from numpy import float32 as F

from ..formats import EXPERT_UNIT
from ._jit import njit
from .ops import fma, get_f32, get_i32, load_f32, splat_f32, store_f32
from .phases import norm_and_check
from .simd import F32, i64, load, op, peek, poke, store, vector, void
from .tables import *  # noqa: F403  (the columns)

SQUARES, MOMENTS, NORM_ROWS = range(3)
MOMENT_BLOCK = 128  # channels whose products among each other are summed
AT_ONCE = 4  # tokens a sum of products is loaded and stored for


def _twin_add_products(p, a, b):
    poke(p, peek(p, np.float64, 16) + a.astype(np.float64) * b.astype(np.float64))


@op(void, (i64, F32, F32), _twin_add_products)
def add_products(b, p, x, y):
    """16 float64 at p += x * y; the products are exact in float64."""
    wide = vector("f64", 16)
    store(b, b.fadd(load(b, p, wide), b.fmul(b.fpext(x, wide), b.fpext(y, wide))), p)


@njit
def keep_row(row, count, to):
    """Copy a float32 row, whole vectors of 16."""
    for k in range(0, count, 16):
        store_f32(to + 4 * k, load_f32(row + 4 * k))


@njit
def keep_units(h, tokens, unit, hidden, to, place):
    """Copy an expert's unit of w_down's inputs, (tokens, EXPERT_UNIT) at `h`, into its columns of the rows at place.."""
    width = (hidden + EXPERT_UNIT - 1) // EXPERT_UNIT * EXPERT_UNIT
    for t in range(tokens):
        keep_row(h + 4 * EXPERT_UNIT * t, EXPERT_UNIT, to + 4 * (width * (place + t) + unit * EXPERT_UNIT))


@njit
def row_of(rows, row_bytes, order, t):
    """The address of the t-th row, counted through the int32 numbers at `order` unless that is 0."""
    return rows + row_bytes * (get_i32(order + 4 * t) if order else t)


@njit
def sum_squares(rows, row_bytes, order, count, width, out, index, members):
    """out[k] += sum over `count` rows of row[k]**2; out: float64 (width padded to 16)."""
    vectors = (width + 15) // 16
    first, last = 16 * (vectors * index // members), 16 * (vectors * (index + 1) // members)
    for t in range(count):
        row = row_of(rows, row_bytes, order, t)
        for k in range(first, last, 16):
            v = load_f32(row + 4 * k)
            add_products(out + 8 * k, v, v)


@njit
def sum_moments(rows, row_bytes, order, count, width, out, index, members):
    """out[b][i][j] += sum over rows of row[128 b + i] * row[128 b + j], where j // 16 >= i // 16; the rest stays.

    out: float64 (blocks, 128, 128). A call's tokens are summed in float32 in the buffer behind the blocks, a member's each.
    """
    n = MOMENT_BLOCK
    blocks = (width + n - 1) // n
    local, zero, one = out + 8 * blocks * n * n + 4 * index * n * n, splat_f32(F(0.0)), splat_f32(F(1.0))
    for block in range(index, blocks, members):
        for k in range(0, n * n, 16):
            store_f32(local + 4 * k, zero)
        for t in range(0, count - count % AT_ONCE, AT_ONCE):
            a = row_of(rows, row_bytes, order, t) + 4 * n * block
            b = row_of(rows, row_bytes, order, t + 1) + 4 * n * block
            c = row_of(rows, row_bytes, order, t + 2) + 4 * n * block
            d = row_of(rows, row_bytes, order, t + 3) + 4 * n * block
            for i in range(n):
                u, v = splat_f32(get_f32(a + 4 * i)), splat_f32(get_f32(b + 4 * i))
                x, y = splat_f32(get_f32(c + 4 * i)), splat_f32(get_f32(d + 4 * i))
                for j in range(i // 16 * 16, n, 16):
                    at = local + 4 * (n * i + j)
                    total = fma(v, load_f32(b + 4 * j), fma(u, load_f32(a + 4 * j), load_f32(at)))
                    store_f32(at, fma(y, load_f32(d + 4 * j), fma(x, load_f32(c + 4 * j), total)))
        for t in range(count - count % AT_ONCE, count):
            a = row_of(rows, row_bytes, order, t) + 4 * n * block
            for i in range(n):
                u = splat_f32(get_f32(a + 4 * i))
                for j in range(i // 16 * 16, n, 16):
                    at = local + 4 * (n * i + j)
                    store_f32(at, fma(u, load_f32(a + 4 * j), load_f32(at)))
        for i in range(n):
            for j in range(i // 16 * 16, n, 16):
                add_products(out + 8 * (n * n * block + n * i + j), load_f32(local + 4 * (n * i + j)), one)


@functools.lru_cache(maxsize=None)
def observer():
    """The kernel (work, m, rows, row_bytes, order, count, width, out, index, members).

    work SQUARES, MOMENTS: as `sum_squares` and `sum_moments`. NORM_ROWS: the final norm of `count` rows of X into OBSERVED_NORMED.
    """

    @njit(entry="observe")
    def run(work, m, rows, row_bytes, order, count, width, out, index, members):
        if work == SQUARES:
            sum_squares(rows, row_bytes, order, count, width, out, index, members)
        elif work == MOMENTS:
            sum_moments(rows, row_bytes, order, count, width, out, index, members)
        else:
            for t in range(index, count, members):
                at = 4 * m[X_WIDTH] * t
                norm_and_check(m, m[X] + at, m[NORM], m[N_LAYERS], m[OBSERVED_NORMED] + at)

    return run
