"""The KV cache as kernels know it: kinds of numbers, bytes, and how a token's row gets in. Layout: `model/kv_cache.py`.

One hard fact: nothing but this file turns a position into an address; a row of a kind takes `row_bytes`, its block BLOCK
times as much.
"""

import functools

from numpy import float32 as F
from numpy import inf
from numpy import int32 as I32

from ._jit import njit
from .ops import (
    absolute,
    add_i32,
    copysign,
    div,
    first,
    fma,
    get_f32,
    get_u8,
    load_f32,
    max_f32,
    maximum,
    nearest,
    put_f16,
    put_f32,
    put_i8,
    splat_f32,
    splat_i32,
    store_f16,
    store_i8,
    sum_f32,
    to_i32,
    where_greater,
)

BLOCK = 256  # positions of a block: its merge costs one part in 128 of its work at head_dim 128
STRIP = 64  # positions that lie side by side in the keys
COLUMN = 64  # lanes of the values that lie side by side: what a tile takes at once, so that it reads memory in order
F16_MAX = 65504.0
CELL = 32  # lanes of 4 codes that lie side by side in 8-bit keys and values: what a tile takes at once
ZERO = 128  # the 8-bit code that means 0: codes are the unsigned operand of the int8 dot

# kind: bytes a number, bytes of the float32 scale that the numbers of one head and position share,
# and of how many numbers a row of keys, of values is a multiple
KINDS = {"f16": (2, 0, 1, 16), "f32": (4, 0, 1, 16), "q8": (1, 4, 4, CELL)}


def row_bytes(kv: str, count: int) -> int:
    """Bytes of one head's keys or values at one position, `count` numbers, with their scale."""
    size, scale = KINDS[kv][:2]
    return count * size + scale


@njit
def fit_f16(x):
    """Finite numbers cut to what float16 holds; infinities stay, so that nothing hides them."""
    size, most = absolute(x), splat_f32(F(F16_MAX))
    return where_greater(size, most, where_greater(splat_f32(F(inf)), size, copysign(most, x), x), x)


@njit
def put_numbers_f16(row, count, to, apart):
    """float32 numbers into the KV cache, `apart` bytes from one to the next; returns 1 if one did not fit float16 and was saturated."""
    whole, one, lost = count // 16 * 16, splat_f32(F(1.0)), splat_f32(F(0.0))
    for i in range(0, whole, 16):
        x = load_f32(row + 4 * i)
        cut = fit_f16(x)
        lost = where_greater(absolute(x), absolute(cut), one, lost)
        store_f16(to + apart * i, cut, apart)
    saturated = 1 if max_f32(lost) > F(0.0) else 0
    for i in range(whole, count):
        number = get_f32(row + 4 * i)
        fitting = first(fit_f16(splat_f32(number)))
        if fitting != number == number:
            saturated = 1
        put_f16(to + apart * i, fitting)
    return saturated


@njit
def put_numbers_f32(row, count, to, apart):
    for i in range(count):
        put_f32(to + apart * i, get_f32(row + 4 * i))
    return 0


@functools.lru_cache(maxsize=None)
def cache_rows(kv):
    """Kernels put_key(row, dim, keys, slot, temp) and put_value(row, dim, width, values, slot, temp): one head's `dim` float32 numbers
    into place `slot` of that head's keys or values. temp: 4 bytes a number, dim rounded up to 16; may be the row.

    Both return whether a number did not fit float16 and was saturated; only the kind "f16" knows that.
    """
    return (put_key_codes, put_value_codes) if kv == "q8" else _plain_rows(kv)


def _plain_rows(kv):
    size, put_numbers = KINDS[kv][0], put_numbers_f16 if kv == "f16" else put_numbers_f32

    @njit
    def put_key(row, dim, keys, slot, temp):
        return put_numbers(row, dim, keys + size * (slot // STRIP * STRIP * dim + slot % STRIP), size * STRIP)

    @njit
    def put_value(row, dim, width, values, slot, temp):
        saturated, within = 0, slot % BLOCK
        for lane in range(0, dim, COLUMN):
            lanes = min(COLUMN, width - lane)
            to = values + size * ((slot - within) * width + lane * BLOCK + within * lanes)
            saturated |= put_numbers(row + 4 * lane, min(lanes, dim - lane), to, size)
        return saturated

    return put_key, put_value


@njit
def put_key_codes(row, dim, keys, slot, temp):
    """Dims i..i + 3 of a position side by side, then those of the next position, CELL of them."""
    padded, within = (dim + 3) // 4 * 4, slot % BLOCK
    block = keys + (slot - within) * (padded + 4)
    put_f32(block + BLOCK * padded + 4 * within, to_codes(row, dim, temp))
    to = block + within // CELL * CELL * padded + within % CELL * 4
    for i in range(dim):
        put_i8(to + i // 4 * CELL * 4 + i % 4, get_u8(temp + i))
    return 0


@njit
def put_value_codes(row, dim, width, values, slot, temp):
    """Positions s..s + 3 of a lane side by side, then those of the next lane, CELL of them."""
    within = slot % BLOCK
    block = values + (slot - within) * (width + 4)
    put_f32(block + BLOCK * width + 4 * within, to_codes(row, dim, temp))
    to = block + within // 4 * CELL * 4 + within % 4
    for i in range(dim):
        put_i8(to + i // CELL * CELL * BLOCK + i % CELL * 4, get_u8(temp + i))
    return 0


@njit
def to_codes(row, count, temp):
    """Codes nearest(x / scale) + ZERO, bytes at temp, of `count` numbers; returns scale = max|x| / 127.

    A row that is not finite has codes ZERO and a NaN for a scale, so that nothing hides it.
    """
    width = (count + 15) // 16 * 16
    for i in range(count):
        put_f32(temp + 4 * i, get_f32(row + 4 * i))
    for i in range(count, width):
        put_f32(temp + 4 * i, F(0.0))
    top, taint = splat_f32(F(0.0)), splat_f32(F(0.0))
    for k in range(0, 4 * width, 64):
        v = load_f32(temp + k)
        top = maximum(absolute(v), top)
        taint = fma(v, splat_f32(F(0.0)), taint)
    largest, bad, zero = max_f32(top), sum_f32(taint), splat_i32(I32(ZERO))
    if bad != F(0.0) or largest < F(1e-30):  # so small a scale would lose its bits
        for k in range(0, width, 16):
            store_i8(temp + k, zero)
        return bad
    scale = largest / F(127.0)
    for k in range(0, width, 16):  # in place: codes never reach a number that is still to be read
        code = to_i32(nearest(div(load_f32(temp + 4 * k), splat_f32(scale))))
        store_i8(temp + k, add_i32(code, zero))
    return scale
