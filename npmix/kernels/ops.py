"""The operations kernels are written with, each beside its NumPy twin.

One hard fact: no operation depends on the machine's register width or on a compiler's freedom, so
the bits of a kernel are fixed by the order of its operations alone.
"""

import math
import time

import numpy as np

from . import cpu
from .simd import (
    F32,
    I32,
    call,
    const_i32,
    const_vector,
    emit_fma,
    emit_load_bf16,
    emit_load_f16,
    emit_reduce_add,
    f32,
    i32,
    i64,
    load,
    op,
    peek,
    poke,
    scalar,
    shuffle,
    splat,
    store,
    twin_bf16,
    twin_fma,
    twin_reduce_add,
    vector,
    void,
)

# ---- vectors ----------------------------------------------------------------------------


@op(F32, (i64,), lambda p: peek(p, np.float32, 16).copy())
def load_f32(b, p):
    return load(b, p, vector("f32", 16))


@op(F32, (i64,), lambda p: peek(p, np.float16, 16).astype(np.float32))
def load_f16(b, p):
    return emit_load_f16(b, p)


@op(F32, (i64,), lambda p: twin_bf16(peek(p, np.uint16, 16)))
def load_bf16(b, p):
    return emit_load_bf16(b, p)


@op(void, (i64, F32), lambda p, v: poke(p, np.asarray(v, np.float32)))
def store_f32(b, p, v):
    store(b, v, p)


def _twin_store_f16(p, v, apart):
    for i, x in enumerate(v.astype(np.float16)):
        poke(p + i * apart, np.array([x]))


@op(void, (i64, F32, i64), _twin_store_f16)
def store_f16(b, p, v, apart):
    """16 float16, rounded half to even, `apart` bytes from one to the next."""
    narrow = b.fptrunc(v, vector("f16", 16))
    for i in range(16):
        store(b, b.extract_element(narrow, const_i32(i)), b.add(p, b.mul(apart, scalar("i64")(i))))


@op(void, (i64, I32), lambda p, v: poke(p, v.astype(np.int8)))
def store_i8(b, p, v):
    """The low bytes of 16 lanes."""
    store(b, b.trunc(v, vector("i8", 16)), p)


@op(F32, (f32,), lambda x: np.full(16, x, np.float32))
def splat_f32(b, x):
    return splat(b, x)


@op(F32, (F32, F32), lambda x, y: x + y)
def add(b, x, y):
    return b.fadd(x, y)


@op(F32, (F32, F32), lambda x, y: x - y)
def sub(b, x, y):
    return b.fsub(x, y)


@op(F32, (F32, F32), lambda x, y: x * y)
def mul(b, x, y):
    return b.fmul(x, y)


@op(F32, (F32, F32), lambda x, y: x / y)
def div(b, x, y):
    return b.fdiv(x, y)


@op(F32, (F32, F32, F32), twin_fma)
def fma(b, x, y, z):
    return emit_fma(b, x, y, z)


@op(F32, (F32, F32), lambda x, y: np.where(x > y, x, y))
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@op(F32, (F32, F32), lambda x, y: np.where(x < y, x, y))
def minimum(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@op(F32, (F32,), np.abs)
def absolute(b, x):
    return call(b, "llvm.fabs.v16f32", x.type, x)


@op(F32, (F32, F32), np.copysign)
def copysign(b, size, sign):
    """`size` with the sign of `sign`."""
    return call(b, "llvm.copysign.v16f32", size.type, size, sign)


@op(F32, (F32, F32, F32, F32), lambda a, c, x, y: np.where(a > c, x, y))
def where_greater(b, a, c, x, y):
    """x where a > c, else y."""
    return b.select(b.fcmp_ordered(">", a, c), x, y)


@op(F32, (F32,), np.rint)
def nearest(b, x):
    """The nearest whole number, halves to even."""
    return call(b, "llvm.nearbyint.v16f32", x.type, x)


@op(I32, (F32,), lambda x: x.astype(np.int32))
def to_i32(b, x):
    """Whole numbers inside int32 only."""
    return b.fptosi(x, vector("i32", 16))


@op(F32, (I32,), lambda x: x.astype(np.float32))
def to_f32(b, x):
    return b.sitofp(x, vector("f32", 16))


@op(I32, (I32, I32), lambda x, y: x + y)
def add_i32(b, x, y):
    return b.add(x, y)


@op(I32, (i32,), lambda x: np.full(16, x, np.int32))
def splat_i32(b, x):
    return splat(b, x)


@op(i32, (I32,), lambda x: np.int32(x.sum(dtype=np.int64)))
def sum_i32(b, x):
    return call(b, "llvm.vector.reduce.add.v16i32", scalar("i32"), x)


@op(f32, (F32,), lambda x: twin_reduce_add(x))
def sum_f32(b, x):
    """The sum of 16 lanes, by halves."""
    return emit_reduce_add(b, x)


@op(f32, (F32,), lambda x: x.max())
def max_f32(b, x):
    """The largest lane (no lane is NaN where this is used)."""
    for half in (8, 4, 2, 1):
        low, high = shuffle(b, x, range(half)), shuffle(b, x, range(half, 2 * half))
        x = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(x, const_i32(0))


@op(f32, (F32,), lambda x: x[0])
def first(b, x):
    return b.extract_element(x, const_i32(0))


@op(F32, (F32, i64, i64), lambda x, low, high: np.where((np.arange(16) >= low) & (np.arange(16) < high), x, np.float32(-np.inf)))
def keep_lanes(b, x, low, high):
    """Lanes low <= i < high; the others become -inf."""
    lane = const_vector("i64", 16, list(range(16)))
    inside = b.and_(b.icmp_signed(">=", lane, splat(b, low)), b.icmp_signed("<", lane, splat(b, high)))
    return b.select(inside, x, const_vector("f32", 16, float("-inf")))


@op(f32, (f32, f32, f32), lambda x, y, z: np.float32(np.float64(x) * np.float64(y) + np.float64(z)))
def fma1(b, x, y, z):
    return emit_fma(b, x, y, z)


@op(f32, (f32,), lambda x: np.sqrt(np.float32(x)))
def sqrt1(b, x):
    return call(b, "llvm.sqrt.f32", scalar("f32"), x)


# ---- single numbers in memory -------------------------------------------------------------------


@op(f32, (i64,), lambda p: peek(p, np.float32, 1)[0])
def get_f32(b, p):
    return load(b, p, scalar("f32"))


@op(f32, (i64,), lambda p: np.float32(peek(p, np.float16, 1)[0]))
def get_f16(b, p):
    return b.fpext(load(b, p, scalar("f16")), scalar("f32"))


@op(f32, (i64,), lambda p: twin_bf16(peek(p, np.uint16, 1))[0])
def get_bf16(b, p):
    return b.bitcast(b.shl(b.zext(load(b, p, scalar("i16")), scalar("i32")), const_i32(16)), scalar("f32"))


@op(i64, (i64,), lambda p: int(peek(p, np.int64, 1)[0]))
def get_i64(b, p):
    return load(b, p, scalar("i64"))


@op(i64, (i64,), lambda p: int(peek(p, np.int32, 1)[0]))
def get_i32(b, p):
    return b.sext(load(b, p, scalar("i32")), scalar("i64"))


@op(i64, (i64,), lambda p: int(peek(p, np.uint8, 1)[0]))
def get_u8(b, p):
    return b.zext(load(b, p, scalar("i8")), scalar("i64"))


@op(void, (i64, f32), lambda p, x: poke(p, np.array([x], np.float32)))
def put_f32(b, p, x):
    store(b, x, p)


@op(void, (i64, f32), lambda p, x: poke(p, np.array([x], np.float32).astype(np.float16)))
def put_f16(b, p, x):
    store(b, b.fptrunc(x, scalar("f16")), p)


@op(void, (i64, i64), lambda p, x: poke(p, np.array([x], np.int64)))
def put_i64(b, p, x):
    store(b, x, p)


@op(void, (i64, i64), lambda p, x: poke(p, np.array([x], np.int64).astype(np.int32)))
def put_i32(b, p, x):
    store(b, b.trunc(x, scalar("i32")), p)


@op(void, (i64, i64), lambda p, x: poke(p, np.array([x], np.int64).astype(np.int8)))
def put_i8(b, p, x):
    store(b, b.trunc(x, scalar("i8")), p)


# ---- threads -------------------------------------------------------------------------------------


def _twin_atomic_add(p, x):
    old = int(peek(p, np.int64, 1)[0])
    poke(p, np.array([old + x], np.int64))
    return old


@op(i64, (i64, i64), _twin_atomic_add)
def atomic_add(b, p, x):
    """Add to an int64 all threads share; returns what was there before."""
    return b.atomic_rmw("add", b.inttoptr(p, scalar("i64").as_pointer()), x, "seq_cst")


@op(i64, (i64,), lambda p: int(peek(p, np.int64, 1)[0]))
def atomic_get(b, p):
    return b.load_atomic(b.inttoptr(p, scalar("i64").as_pointer()), "seq_cst", 8)


@op(void, (i64, i64), lambda p, x: poke(p, np.array([x], np.int64)))
def atomic_put(b, p, x):
    b.store_atomic(x, b.inttoptr(p, scalar("i64").as_pointer()), "seq_cst", 8)


@op(i64, (), time.perf_counter_ns)
def ticks(b):
    """The processor's own clock."""
    return call(b, "llvm.readcyclecounter", scalar("i64"))


@op(void, (), lambda: None)
def spin_hint(b):
    """Tell the core that this loop only waits."""
    if cpu.is_x86():
        call(b, "llvm.x86.sse2.pause", scalar("void"))


@op(void, (), lambda: None)
def give_way(b):
    """Let another thread of this core run."""
    call(b, "SwitchToThread" if cpu.is_windows() else "sched_yield", scalar("i32"))


# ---- composites -----------------------------------------------------------------------------------

# 2**f on [-0.5, 0.5]: ln(2)**k / k!, the first term left out is below 5e-9
_EXP2 = [float(np.float32(np.log(2.0) ** k / math.factorial(k))) for k in range(8)]


def _twin_exp2(x):
    x = np.asarray(x, np.float32)
    clamped = np.fmax(np.fmin(x, np.float32(127)), np.float32(-126))
    whole = np.rint(clamped)
    part = clamped - whole
    y = np.full_like(part, _EXP2[7])
    for c in _EXP2[6::-1]:
        y = twin_fma(y, part, np.float32(c))
    y = y * ((whole.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(x < -126, np.float32(0), np.where(np.isnan(x), x, y))


@op(F32, (F32,), _twin_exp2)
def exp2(b, x):
    """2**x, exactly 1 at 0 and exactly 0 below -126 (so -inf masks a lane); at most 2**127; NaN stays NaN."""
    kind = x.type
    top, low = const_vector("f32", 16, 127.0), const_vector("f32", 16, -126.0)
    clamped = b.select(b.fcmp_ordered("<", x, top), x, top)
    clamped = b.select(b.fcmp_ordered(">", clamped, low), clamped, low)
    whole = call(b, "llvm.nearbyint.v16f32", kind, clamped)
    part = b.fsub(clamped, whole)
    y = const_vector("f32", 16, _EXP2[7])
    for c in _EXP2[6::-1]:
        y = emit_fma(b, y, part, const_vector("f32", 16, c))
    power = b.add(b.fptosi(whole, vector("i32", 16)), const_vector("i32", 16, 127))
    y = b.fmul(y, b.bitcast(b.shl(power, const_vector("i32", 16, 23)), kind))
    y = b.select(b.fcmp_unordered("uno", x, x), x, y)
    return b.select(b.fcmp_ordered("<", x, low), const_vector("f32", 16, 0.0), y)


def _twin_store_words(p, v, stride):
    for i, word in enumerate(v.astype(np.int8).view(np.int32)):
        poke(p + i * stride, np.array([word], np.int32))


@op(void, (i64, I32, i64), _twin_store_words)
def store_i8_words(b, p, v, stride):
    """The low bytes of 16 lanes as four words of four bytes, `stride` bytes apart."""
    words = b.bitcast(b.trunc(v, vector("i8", 16)), vector("i32", 4))
    for i in range(4):
        store(b, b.extract_element(words, const_i32(i)), b.add(p, b.mul(stride, scalar("i64")(i))))


@op(I32, (i64, i64), lambda p, stride: np.concatenate([peek(p + i * stride, np.uint8, 4) for i in range(4)]).astype(np.int32))
def load_u8_words(b, p, stride):
    """16 lanes of the bytes of four words of four, `stride` bytes apart."""
    words = const_vector("i32", 4, 0)
    for i in range(4):
        word = load(b, b.add(p, b.mul(stride, scalar("i64")(i))), scalar("i32"))
        words = b.insert_element(words, word, const_i32(i))
    return b.zext(b.bitcast(words, vector("i8", 16)), vector("i32", 16))
