"""Every operation against its NumPy twin: moves and integers exactly, floats within 2 units of the last place."""

import inspect

import numpy as np
import pytest
from kernel_tools import Memory, memory, same_bits, ulps

from npmix.kernels import ops, packing
from npmix.kernels._jit import DISABLED, njit
from npmix.kernels.simd import I32, i64, op, poke, store, twin_fma, void

F = np.float32
EDGES = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -2.5, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1e-40]
    + [65504.0, 65520.0, -7e4, 6e-8, 2.98e-8, -6.1e-5, 127.0, -126.0, 8388609.0, 1 + 2**-23, 0.1, 1 / 3, 1e30, -1e-30, 2.0**24, np.pi],
    F,
)  # fmt: skip


def twin(operation):
    """The NumPy side of an operation; it is the operation itself where the JIT is disabled."""
    return operation if DISABLED else operation.twin


def vectors(seed, count=40):
    """float32 (count, 16): edge values in many pairings, then random numbers of all sizes."""
    rng = np.random.default_rng(seed)
    edge = rng.choice(EDGES, (count // 2, 16))
    wide = rng.standard_normal((count - count // 2, 16)) * 10.0 ** rng.integers(-30, 30, (count - count // 2, 16))
    return np.concatenate([edge, wide]).astype(F)


def agree(got, expected):
    assert ulps(got, expected) <= 2


@op(void, (i64, I32), poke)
def store_i32(b, p, v):
    """Integers as they are, for these tests to see; kernels only store their low bytes."""
    store(b, v, p)


# One compiled loop a shape of operation: `n` vectors at x (and y, z), the result of each operation in its own plane.


@njit
def _unary(n, plane, x, out):
    for i in range(n):
        v, to = ops.load_f32(x + 64 * i), out + 64 * i
        ops.store_f32(to, ops.absolute(v))
        ops.store_f32(to + plane, ops.nearest(v))
        ops.store_f32(to + 2 * plane, ops.exp2(v))
        ops.store_f32(to + 3 * plane, ops.load_f32(x + 64 * i))
        ops.store_f32(to + 4 * plane, ops.splat_f32(ops.sum_f32(v)))
        ops.store_f32(to + 5 * plane, ops.splat_f32(ops.first(v)))
        ops.store_f32(to + 6 * plane, ops.splat_f32(ops.sqrt1(ops.first(v))))
        ops.store_f32(to + 7 * plane, ops.splat_f32(ops.get_f32(x + 64 * i + 4)))
        ops.store_f32(to + 8 * plane, packing.root(v))


@njit
def _binary(n, plane, x, y, z, out):
    for i in range(n):
        a, b, c, to = ops.load_f32(x + 64 * i), ops.load_f32(y + 64 * i), ops.load_f32(z + 64 * i), out + 64 * i
        ops.store_f32(to, ops.add(a, b))
        ops.store_f32(to + plane, ops.sub(a, b))
        ops.store_f32(to + 2 * plane, ops.mul(a, b))
        ops.store_f32(to + 3 * plane, ops.div(a, b))
        ops.store_f32(to + 4 * plane, ops.maximum(a, b))
        ops.store_f32(to + 5 * plane, ops.minimum(a, b))
        ops.store_f32(to + 6 * plane, ops.fma(a, b, c))
        ops.store_f32(to + 7 * plane, ops.splat_f32(ops.fma1(ops.first(a), ops.first(b), ops.first(c))))
        ops.store_f32(to + 8 * plane, ops.copysign(a, b))
        ops.store_f32(to + 9 * plane, ops.where_greater(a, b, b, c))


@njit
def _whole(n, plane, x, y, out):
    """x, y: whole numbers as float32; integer results as 64 bytes."""
    for i in range(n):
        a, b, to = ops.to_i32(ops.load_f32(x + 64 * i)), ops.to_i32(ops.load_f32(y + 64 * i)), out + 64 * i
        store_i32(to, a)
        store_i32(to + plane, ops.add_i32(a, b))
        store_i32(to + 2 * plane, ops.splat_i32(ops.sum_i32(a)))
        ops.store_f32(to + 3 * plane, ops.to_f32(a))
        ops.store_i8(to + 4 * plane, a)
        ops.store_i8_words(to + 5 * plane, a, 16)
        store_i32(to + 6 * plane, ops.load_u8_words(to + 5 * plane, 16))


@njit
def _halves(n, p, out, to_half):
    """Every 16-bit pattern as float16 and bf16; float32 numbers at to_half rounded to float16 in place."""
    for i in range(0, n, 16):
        ops.store_f32(out + 4 * i, ops.load_f16(p + 2 * i))
        ops.store_f32(out + 4 * (n + i), ops.load_bf16(p + 2 * i))
    for i in range(n):
        ops.put_f32(out + 4 * (2 * n + i), ops.get_f16(p + 2 * i))
        ops.put_f32(out + 4 * (3 * n + i), ops.get_bf16(p + 2 * i))
    for i in range(0, n, 16):
        ops.store_f16(out + 16 * n + 2 * i, ops.load_f32(to_half + 4 * i), 2)
    for i in range(n):
        ops.put_f16(out + 18 * n + 2 * i, ops.get_f32(to_half + 4 * i))


@njit
def _numbers(p, out):
    ops.put_i64(out, ops.get_i64(p))
    ops.put_i64(out + 8, ops.get_i32(p))
    ops.put_i64(out + 16, ops.get_u8(p))
    ops.put_i32(out + 24, ops.get_i64(p))
    ops.put_i8(out + 28, ops.get_i64(p))


@njit
def _lanes(x, out):
    at = out
    for low in range(-2, 19):
        for high in range(-2, 19):
            ops.store_f32(at, ops.keep_lanes(ops.load_f32(x), low, high))
            at += 64


@njit
def _atomics(cell, out):
    ops.put_i64(out, ops.atomic_add(cell, 5))
    ops.put_i64(out + 8, ops.atomic_get(cell))
    ops.atomic_put(cell, -3)
    ops.put_i64(out + 16, ops.atomic_get(cell))
    ops.put_i64(out + 24, ops.atomic_add(cell, -4))
    ops.put_i64(out + 32, ops.atomic_get(cell))
    ops.spin_hint()
    ops.give_way()


@njit
def _largest(n, x, out):
    for i in range(n):
        ops.put_f32(out + 4 * i, ops.max_f32(ops.load_f32(x + 64 * i)))


@njit
def _exp2_all(n, x, out):
    for i in range(0, n, 16):
        ops.store_f32(out + 4 * i, ops.exp2(ops.load_f32(x + 4 * i)))


def exp2(values):
    values = np.asarray(values, F)
    padded = memory(np.resize(values, -(-values.size // 16) * 16))
    out = Memory(padded.array.shape, F)
    _exp2_all(padded.array.size, padded.at, out.at)
    assert out.intact()
    return out.array[: values.size]


def test_every_operation_is_tested():
    """No operation of ops.py or packing.py is without a test here (but for the clock, which has no right answer)."""
    used = inspect.getsource(inspect.getmodule(exp2))
    for module in (ops, packing):
        for node in inspect.getsource(module).split("\n@op(")[1:]:
            name = node.split("\ndef ")[1].split("(")[0]
            assert name == "ticks" or f"{module.__name__.rsplit('.', 1)[1]}.{name}(" in used, name


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operations_on_one_vector():
    """One operand: equal to the twin, NaN, infinities, subnormals and ties included."""
    x = memory(vectors(1))
    out = Memory((9, *x.array.shape), F)
    _unary(len(x.array), x.array.nbytes, x.at, out.at)
    expected = (ops.absolute, ops.nearest, ops.exp2, None, None, None, None, None, packing.root)
    for plane, operation in zip(out.array, expected):
        if operation is not None:
            agree(plane, [twin(operation)(v) for v in x.array])
    assert same_bits(out.array[3], x.array)
    agree(out.array[4], [np.full(16, twin(ops.sum_f32)(v)) for v in x.array])
    agree(out.array[5], [np.full(16, v[0]) for v in x.array])
    agree(out.array[6], [np.full(16, twin(ops.sqrt1)(v[0])) for v in x.array])
    assert same_bits(out.array[7], np.repeat(x.array[:, 1:2], 16, axis=1))
    assert out.intact() and x.intact()


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operations_on_two_and_three_vectors():
    """Two and three operands: equal to the twin; the fma rounds once."""
    x, y, z = (memory(vectors(seed)) for seed in (2, 3, 4))
    out = Memory((10, *x.array.shape), F)
    _binary(len(x.array), x.array.nbytes, x.at, y.at, z.at, out.at)
    rows = list(zip(x.array, y.array, z.array))
    for plane, operation in zip(out.array, (ops.add, ops.sub, ops.mul, ops.div, ops.maximum, ops.minimum)):
        agree(plane, [twin(operation)(a, b) for a, b, _ in rows])
    agree(out.array[6], [twin_fma(a, b, c) for a, b, c in rows])
    agree(out.array[7], [np.full(16, twin(ops.fma1)(a[0], b[0], c[0])) for a, b, c in rows])
    agree(out.array[8], [twin(ops.copysign)(a, b) for a, b, _ in rows])
    agree(out.array[9], [twin(ops.where_greater)(a, b, b, c) for a, b, c in rows])
    assert out.intact()


def test_fma_rounds_once():
    """(1 + 2**-12)**2 - (1 + 2**-11) is 2**-24 with one rounding and 0 with two."""
    x, y = F(1 + 2**-12), F(1 + 2**-11)
    a, b, c = (memory(np.full((1, 16), v, F)) for v in (x, x, -y))
    out = Memory((10, 1, 16), F)
    _binary(1, 64, a.at, b.at, c.at, out.at)
    assert (out.array[6] == F(2**-24)).all() and (out.array[7] == F(2**-24)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operations_on_whole_numbers():
    """Integers are exact: conversions, sums that wrap, low bytes, and words of four bytes."""
    rng = np.random.default_rng(5)
    x, y = (memory(rng.integers(-(2**24), 2**24, (24, 16)).astype(F)) for _ in range(2))
    x.array[0], x.array[1], x.array[2] = -(2.0**31), 2.0**30, np.arange(-8, 8) * 32
    out = Memory((7, *x.array.shape), np.int32, fill=0)
    _whole(len(x.array), x.array.nbytes, x.at, y.at, out.at)
    a, b = x.array.astype(np.int32), y.array.astype(np.int32)
    wide = a.astype(np.int64)
    assert (out.array[0] == a).all() and (out.array[1] == (wide + b).astype(np.int32)).all()
    assert (out.array[2] == wide.sum(1, keepdims=True).astype(np.int32)).all()
    assert same_bits(out.array[3].view(F), a.astype(F))
    low = a.astype(np.int8)
    assert (out.array[4].view(np.int8)[:, :16] == low).all() and (out.array[4][:, 4:] == 0).all()
    assert (out.array[5].view(np.int8).reshape(-1, 4, 16)[:, :, :4] == low.reshape(-1, 4, 4)).all()
    assert (out.array[5].reshape(-1, 4, 4)[:, :, 1:] == 0).all() and (out.array[6] == low.view(np.uint8)).all()
    assert out.intact()


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_precision():
    """All 65,536 float16 and bf16 patterns become the float32 they mean; float32 is rounded to float16 half to even."""
    bits = memory(np.arange(1 << 16, dtype=np.uint16))
    n, rng = bits.array.size, np.random.default_rng(6)
    values = rng.standard_normal(n).astype(F) * F(10) ** rng.integers(-9, 6, n).astype(F)
    values[: n // 2] = np.arange(n // 2, dtype=np.uint16).view(np.float16).astype(F) * F(1 + 2**-11)  # beside and on ties
    values[: EDGES.size] = EDGES
    given = memory(values)
    out = Memory(20 * n, np.uint8)
    _halves(n, bits.at, out.at, given.at)
    wide, halves = out.array[: 16 * n].view(F).reshape(4, n), out.array[16 * n :].view(np.float16).reshape(2, n)
    f16, bf16 = bits.array.view(np.float16).astype(F), (bits.array.astype(np.uint32) << 16).view(F)
    for got, expected in ((wide[0], f16), (wide[2], f16), (wide[1], bf16), (wide[3], bf16)):
        number = ~np.isnan(expected)
        assert same_bits(got[number], expected[number]) and np.isnan(got[~number]).all()
    expected = values.astype(np.float16)
    number = ~np.isnan(expected)
    for got in halves:
        assert same_bits(got[number], expected[number]) and np.isnan(got[~number]).all()
    assert out.intact()


def test_single_numbers():
    """int64, int32 and bytes keep their sign or its absence, and narrow stores take the low bytes."""
    for value in (0, 1, -1, 255, 128, -(2**63), 2**63 - 1, 0x0123456789ABCDEF, -2):
        x, out = memory([value], np.int64), Memory(29, np.uint8)
        _numbers(x.at, out.at)
        raw = np.int64(value).tobytes()
        assert out.array[:24].view(np.int64).tolist() == [value, int.from_bytes(raw[:4], "little", signed=True), raw[0]]
        assert out.array[24:28].tobytes() == raw[:4] and out.array[28] == raw[0]
        assert out.intact()


def test_kept_lanes():
    """Lanes low <= i < high stay as they are, the others are -inf, for any low and high."""
    x = memory(np.arange(16, dtype=F) - 8)
    out = Memory((21, 21, 16), F)
    _lanes(x.at, out.at)
    for low in range(-2, 19):
        for high in range(-2, 19):
            kept = [max(low, 0) <= i < high for i in range(16)]
            assert (out.array[low + 2, high + 2] == np.where(kept, x.array, -np.inf)).all()


def test_atomics():
    """An atomic addition returns what was there before; a store is seen by the next load."""
    cell, out = np.array([7], np.int64), Memory(5, np.int64)
    _atomics(cell.__array_interface__["data"][0], out.at)
    assert out.array.tolist() == [7, 12, -3, -3, -7]


def test_largest_lane():
    """The largest lane wherever it stands, among negative numbers and infinities too."""
    x = np.random.default_rng(7).standard_normal((32, 16)).astype(F)
    x[np.arange(16), np.arange(16)] = 9
    x[16:] -= 100
    x[30], x[31] = -np.inf, np.inf
    given, out = memory(x), Memory(32, F)
    _largest(32, given.at, out.at)
    assert (out.array == x.max(1)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sum_follows_its_tree():
    """Lanes are added by halves: 8, 4, 2, 1, each addition rounded."""
    x = vectors(8)[20:]
    given = memory(x)
    out = Memory((9, *x.shape), F)
    _unary(len(x), x.nbytes, given.at, out.at)
    for half in (8, 4, 2, 1):
        x = x[:, :half] + x[:, half : 2 * half]
    assert same_bits(out.array[4], np.repeat(x, 16, axis=1))


def test_exp2_is_exact_where_it_must_be():
    """Exactly 1 at 0, exactly a power of two at whole numbers, exactly 0 below -126 and for -inf, at most 2**127; NaN stays NaN."""
    assert (exp2([0.0, -0.0]) == 1).all()
    whole = np.arange(-126, 128, dtype=F)
    assert (exp2(whole) == np.ldexp(F(1), whole.astype(np.int32))).all()
    below = exp2([np.nextafter(F(-126), F(-127)), -126.5, -127, -200, -3e38, -np.inf])
    assert same_bits(below, np.zeros(6, F))
    assert (exp2([127.5, 128, 3e38, np.inf]) == F(2.0**127)).all()
    assert np.isnan(exp2([np.nan])).all()


def test_exp2_is_near_everywhere():
    """Relative error below 1e-6 (and in fact 2e-7) from -126 to 127, and never falling on a fine grid."""
    x = np.concatenate([np.linspace(-126, 127, 20_011), np.linspace(-1, 1, 20_011), [1e-40, -1e-40, 1e-7, -1e-7, 0.5, -0.5]]).astype(F)
    got = exp2(x)
    error = np.abs(got / np.exp2(x.astype(np.float64)) - 1)
    assert error.max() < 2e-7
    assert (np.diff(exp2(np.linspace(-3, 3, 5_000, dtype=F))) > 0).all()
