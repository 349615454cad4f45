"""The operations that only rounding needs: the nearest value of a table, and codes and selectors into their places.

One hard fact: codes and selectors are small integers held in float32 until they are packed: sums of them are exact.
"""

import functools

import numpy as np

from ..formats import CHUNK, PACKED
from .simd import F32, call, const_i64, const_vector, i64, load, op, peek, poke, scalar, shuffle, splat, store, vector, void


@op(F32, (F32,), np.sqrt)
def root(b, x):
    return call(b, "llvm.sqrt.v16f32", x.type, x)


@functools.lru_cache(maxsize=None)
def rows_table(name):
    """float32 (selectors, 2 * codes): of each selector's row the middles between its values, then the first value and the steps to the next."""
    rows = np.array([PACKED[name].row(s) for s in range(len(PACKED[name].multipliers))], np.float32)
    return np.concatenate([(rows[:, 1:] + rows[:, :-1]) * np.float32(0.5), rows[:, :1], np.diff(rows), rows[:, :1]], axis=1)


@functools.lru_cache(maxsize=None)
def nearest_of(name, codes):
    """op(z, row): the value nearest to each z in the row of `rows_table` at an address (codes: its place there)."""
    values = PACKED[name].row(0)
    count, even = len(values), values[-1] - values[0] == len(values) - 1 and len(PACKED[name].values) < 2

    def emit(b, z, row):
        if even:
            low, high = (const_vector("f32", 16, float(end)) for end in (values[0], values[-1]))
            z = b.select(b.fcmp_ordered(">", z, low), z, low)
            z = call(b, "llvm.rint.v16f32", z.type, b.select(b.fcmp_ordered("<", z, high), z, high))
            return b.fsub(z, low) if codes else z
        number = lambda i: splat(b, load(b, b.add(row, const_i64(4 * i)), scalar("f32")))
        found = const_vector("f32", 16, 0.0) if codes else number(count - 1)
        for i in range(count - 1):  # sums of small integers are exact
            above = b.fcmp_ordered(">", z, number(i))
            step = const_vector("f32", 16, 1.0) if codes else number(count + i)
            found = b.fadd(found, b.select(above, step, const_vector("f32", 16, 0.0)))
        return found

    def twin(z, row):
        if even:
            z = np.rint(np.clip(z, np.float32(values[0]), np.float32(values[-1])))
            return z - np.float32(values[0]) if codes else z
        numbers = peek(row, np.float32, 2 * count - 1)
        place = (z > numbers[: count - 1, None]).sum(0)
        return place.astype(np.float32) if codes else np.cumsum(numbers[count - 1 :], dtype=np.float32)[place]

    return op(F32, (F32, i64), twin)(emit)


@functools.lru_cache(maxsize=None)
def add_products(count):
    """op(sums, errors, factors): adds to each of `count` vectors each of `count` errors times factors[error, sum] (rows of 128 float32)."""

    def emit(b, sums, errors, factors):
        vector_at = lambda base, i: b.add(base, const_i64(64 * i))
        total = [load(b, vector_at(sums, k), vector("f32", 16)) for k in range(count)]
        for i in range(count):
            e = load(b, vector_at(errors, i), vector("f32", 16))
            for k in range(count):
                factor = splat(b, load(b, b.add(factors, const_i64(4 * (128 * i + k))), scalar("f32")))
                total[k] = b.fadd(total[k], b.fmul(factor, e))
        for k in range(count):
            store(b, total[k], vector_at(sums, k))

    def twin(sums, errors, factors):
        total = peek(sums, np.float32, 16 * count).reshape(count, 16)
        given = peek(errors, np.float32, 16 * count).reshape(count, 16)
        table = peek(factors, np.float32, 128 * (count - 1) + count)
        for i in range(count):
            total += table[128 * i : 128 * i + count, None] * given[i]

    return op(void, (i64, i64, i64), twin)(emit)


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
