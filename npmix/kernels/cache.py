"""The KV cache as kernels know it: kinds of numbers, bytes, and how a token's row gets in. Layout: `model/kv_cache.py`.

One hard fact: a kind is two sizes, bytes a number and bytes of the scale that a row of them shares; every address
follows from these two, and with no scale the addresses are those of plain arrays.
"""

import functools

from numpy import float32 as F

from ._jit import njit
from .ops import (
    absolute,
    div,
    fma,
    get_f32,
    get_u8,
    load_f32,
    max_f32,
    maximum,
    mul,
    nearest,
    put_f32,
    put_i8,
    splat_f32,
    store_f32,
    store_i8,
    sum_f32,
    to_i32,
)
from .rows import cache_write

BLOCK = 256  # positions of a block: its merge costs one part in 128 of its work at head_dim 128
STRIP = 64  # positions that lie side by side in the keys

# kind: bytes a number, bytes of the float32 scale that the numbers of one head and position share
KINDS = {"f16": (2, 0), "f32": (4, 0), "q8": (1, 4)}


def row_bytes(kv: str, count: int) -> int:
    """Bytes of one head's keys or values at one position, `count` numbers, with their scale."""
    size, scale = KINDS[kv]
    return count * size + scale


@njit
def scale_row(row, scales, begin, end):
    """row[s] *= scales[s] for begin <= s < end, multiples of 16, float32."""
    for s in range(4 * begin, 4 * end, 64):
        store_f32(row + s, mul(load_f32(row + s), load_f32(scales + s)))


@njit
def quantise_head(row, count, to, stride, scale_at, temp):
    """int8 codes = nearest(x / scale), scale = max|x| / 127 in float32, of `count` numbers; code i at to + stride * i.

    A row that is not finite has codes 0 and a NaN for a scale, so that nothing hides it. temp: 4 bytes a number, the count rounded up
    to 16; may be the row.
    """
    width = (count + 15) // 16 * 16
    for i in range(count):
        put_f32(temp + 4 * i, get_f32(row + 4 * i))
    for i in range(count, width):
        put_f32(temp + 4 * i, F(0.0))
    top, taint = splat_f32(F(0.0)), splat_f32(F(0.0))
    for k in range(0, width, 16):
        v = load_f32(temp + 4 * k)
        top = maximum(absolute(v), top)
        taint = fma(v, splat_f32(F(0.0)), taint)
    largest, bad = max_f32(top), sum_f32(taint)
    scale = largest / F(127.0)
    if bad != F(0.0) or largest < F(1e-30):  # below, the scale would lose its bits
        scale = bad
        for i in range(count):
            put_i8(to + stride * i, 0)
    else:
        for k in range(0, width, 16):  # codes in place: they never reach a number that is still to be read
            store_i8(temp + k, to_i32(nearest(div(load_f32(temp + 4 * k), splat_f32(scale)))))
        for i in range(count):
            put_i8(to + stride * i, get_u8(temp + i))
    put_f32(scale_at, scale)


@functools.lru_cache(maxsize=None)
def cache_rows(kv):
    """Kernels put_key(row, dim, keys, slot, temp) and put_value(row, dim, width, values, slot, temp): one head's `dim` float32 numbers
    into place `slot` of that head's keys or values. temp: scratch of dim numbers, rounded up to 16; may be the row.

    Both return whether a number did not fit float16 and was saturated; only the kind "f16" knows that.
    """
    size, scale = KINDS[kv]
    write = None if scale else cache_write(kv)

    @njit
    def put_dense(row, count, to, stride, scale_at, temp):
        saturated = 0
        for i in range(count):
            saturated |= write(get_f32(row + 4 * i), to + stride * i)
        return saturated

    @njit
    def put_codes(row, count, to, stride, scale_at, temp):
        quantise_head(row, count, to, stride, scale_at, temp)
        return 0

    put_row = put_codes if scale else put_dense

    @njit
    def put_key(row, dim, keys, slot, temp):
        within = slot % BLOCK
        block = keys + (slot - within) * (dim * size + scale)
        to = block + size * (within // STRIP * STRIP * dim + within % STRIP)
        return put_row(row, dim, to, size * STRIP, block + BLOCK * dim * size + scale * within, temp)

    @njit
    def put_value(row, dim, width, values, slot, temp):
        within = slot % BLOCK
        block = values + (slot - within) * (width * size + scale)
        return put_row(row, dim, block + within * width * size, size, block + BLOCK * width * size + scale * within, temp)

    return put_key, put_value
