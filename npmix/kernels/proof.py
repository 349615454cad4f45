"""Proof of the int8 dot before it is trusted: the machine's form against plain integers, once per cache folder.

One hard fact: a wrong form would not crash, it would print plausible nonsense. So a form that fails on
random or edge values is dropped for the plain one with a warning; a pass is noted beside the compiled
kernels and not repeated at each start.
"""

import functools
import warnings

import numpy as np

from . import cpu
from ._jit import DISABLED, cache_dir, njit
from .dot import START, emit_dot4, emit_dot_start
from .simd import i64, load, op, peek, poke, store, vector, void


def _dot_once(zero):
    """op(codes, inputs, total, out): 16 dots of 4 with their start, codes meaning `code - zero`, as int32 at out."""

    def emit(builder, codes, inputs, total, out):
        start = emit_dot_start(builder, total, zero)
        a, b = load(builder, codes, vector("i8", 64)), load(builder, inputs, vector("i8", 64))
        store(builder, emit_dot4(builder, start, a, b, zero), out)

    def twin(codes, inputs, total, out):
        products = peek(codes, np.uint8, 64).astype(np.int32) * peek(inputs, np.int8, 64)
        poke(out, products.reshape(16, 4).sum(1, dtype=np.int32) + np.int32(zero // -START) * peek(total, np.int32, 1))

    return op(void, (i64,) * 4, twin)(emit)


@functools.lru_cache(maxsize=None)
def dot_kernel(form, zero):
    """An entry (codes, inputs, totals, out, count): `count` dots of 64 bytes each, in the form now chosen."""
    dot = _dot_once(zero)

    @njit(entry=f"{form} {zero}")
    def run_dots(codes, inputs, totals, out, count):
        for i in range(count):
            dot(codes + 64 * i, inputs + 64 * i, totals + 4 * i, out + 64 * i)

    return run_dots


def agrees(zero: int) -> bool:
    """Whether the form now chosen gives the exact integers; inputs of all lanes are equal, as in a product of rows."""
    rng = np.random.default_rng(1)
    top = 15 if zero == 8 else 255
    codes = rng.integers(0, top + 1, (512, 64)).astype(np.uint8)
    inputs = rng.integers(-127, 128, (512, 4)).astype(np.int8)
    codes[:64] = rng.choice([0, zero, top], (64, 64))
    inputs[:32], inputs[32:64] = rng.choice([-127, 0, 127], (32, 4)), 127
    codes[32:40], inputs[40:48] = top, -127
    wide = np.tile(inputs, (1, 16))
    totals = START * inputs.sum(1, dtype=np.int32)
    out = np.zeros((512, 16), np.int32)
    dot_kernel(cpu.form(), zero)(*(a.__array_interface__["data"][0] for a in (codes, wide, totals, out)), 512)
    exact = (codes.astype(np.int32) - zero) * wide
    return np.array_equal(out, exact.reshape(512, 16, 4).sum(2))


@functools.lru_cache(maxsize=None)
def prove() -> str:
    """Settle the form of the int8 dot, and return it."""
    form = cpu.form()
    if DISABLED or form == "plain":
        return form
    folder = cache_dir()
    note = folder / f"proved-{form}" if folder else None
    if note and note.exists():
        return form
    if all(agrees(zero) for zero in (8, 128)):
        if note:
            note.touch(mode=0o600)
        return form
    warnings.warn(f"the {form} form of the int8 dot is wrong on this machine; npmix uses the plain one, which is slow", stacklevel=2)
    cpu.distrust(form)
    cache_dir.cache_clear()
    return cpu.form()
