"""Proof of the machine's own instructions before they are trusted: against plain integers, once per cache folder.

One hard fact: a wrong form of the int8 dot, or a wrong lookup, would not crash, it would print plausible nonsense. So a
form that fails on random or edge values is dropped for the plain one with a warning; a pass is noted beside the
compiled kernels and not repeated at each start.
"""

import functools
import warnings

import numpy as np

from ..formats import PACKED, span_bytes
from . import cpu
from ._jit import DISABLED, cache_dir, njit
from .dot import FLOAT, START, emit_dot4, emit_dot_start
from .simd import i64, load, op, peek, poke, store, vector, void
from .unpack import twin_row_block, unpack_block


def _twin_dot(codes, inputs, total, out):
    products = peek(codes, np.uint8, 64).astype(np.int32) * peek(inputs, np.int8, 64)
    poke(out, products.reshape(16, 4).sum(1, dtype=np.int32) + peek(total, np.int32, 1))


@op(void, (i64,) * 4, _twin_dot)
def dot_once(builder, codes, inputs, total, out):
    """16 dots of 4 with their start, codes meaning `code - 128`, as int32 at out."""
    a, b = load(builder, codes, vector("i8", 64)), load(builder, inputs, vector("i8", 64))
    store(builder, emit_dot4(builder, emit_dot_start(builder, total), a, b), out)


@functools.lru_cache(maxsize=None)
def dot_kernel(form):
    """An entry (codes, inputs, totals, out, count): `count` dots of 64 bytes each, in the form now chosen."""

    @njit(entry=form)
    def run_dots(codes, inputs, totals, out, count):
        for i in range(count):
            dot_once(codes + 64 * i, inputs + 64 * i, totals + 4 * i, out + 64 * i)

    return run_dots


@functools.lru_cache(maxsize=None)
def unpack_kernel(form, name):
    """An entry (w, n_groups, out): a row block unpacked in the form now chosen."""
    unpack = unpack_block(name, PACKED[name].group)

    @njit(entry=f"{form} {name}")
    def run_unpack(w, n_groups, out):
        unpack(w, n_groups, out)

    return run_unpack


def dots_agree() -> bool:
    """Whether the form now chosen gives the exact integers; inputs of all lanes are equal, as in a product of rows."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (512, 64)).astype(np.uint8)
    inputs = rng.integers(-127, 128, (512, 4)).astype(np.int8)
    codes[:64] = rng.choice([0, 128, 255], (64, 64))
    inputs[:32], inputs[32:64] = rng.choice([-127, 0, 127], (32, 4)), 127
    codes[32:40], inputs[40:48] = 255, -127
    wide = np.tile(inputs, (1, 16))
    totals = FLOAT + START * inputs.sum(1, dtype=np.int32)
    out = np.zeros((512, 16), np.int32)
    dot_kernel(cpu.form())(*(a.__array_interface__["data"][0] for a in (codes, wide, totals, out)), 512)
    exact = (codes.astype(np.int32) - 128) * wide
    return np.array_equal(out - FLOAT, exact.reshape(512, 16, 4).sum(2))


def unpacks(name: str) -> bool:
    """Whether the form now chosen reads a row block of random bytes, hence all codes and selectors, as the twin does."""
    group, spans = PACKED[name].group, 2048 // PACKED[name].group
    data = np.random.default_rng(2).integers(0, 256, spans * span_bytes(name, group), dtype=np.uint8)
    plain = np.zeros(spans * span_bytes("q8", group), np.uint8)
    source, out = (a.__array_interface__["data"][0] for a in (data, plain))
    unpack_kernel(cpu.form(), name)(source, 2 * spans, out)
    return np.array_equal(twin_row_block(name, group, source, 2 * spans)[0], twin_row_block("q8", group, out, 2 * spans)[0])


def _holds(what: str, check) -> bool:
    """Whether a check passes, or has passed before in this cache folder."""
    folder = cache_dir()
    note = folder / f"proved-{what}" if folder else None
    if note and note.exists():
        return True
    if not check():
        return False
    if note:
        note.touch(mode=0o600)
    return True


@functools.lru_cache(maxsize=None)
def prove(names: tuple[str, ...] = ()) -> str:
    """Settle the form of the int8 dot and of reading the packed formats `names`, and return it."""
    form = cpu.form()
    if DISABLED or form == "plain":
        return form
    if _holds(form, dots_agree) and all(_holds(f"{form}-{name}", functools.partial(unpacks, name)) for name in names):
        return form
    warnings.warn(f"the {form} form of the int8 kernels is wrong on this machine; npmix uses the plain one, which is slow", stacklevel=2)
    cpu.distrust(form)
    cache_dir.cache_clear()
    return cpu.form()
