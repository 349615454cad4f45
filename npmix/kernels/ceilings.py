"""What this machine can do at most: read bandwidth and the peaks of the int8 and float32 units.

One hard fact: these are ceilings only for the moment they are measured; shared machines halve and double,
so a share of a ceiling needs both figures from the same minute.
"""

import functools
import time

import numpy as np
from numba.core import cgutils

from ._jit import njit
from .dot import emit_dot4
from .simd import const_i64, const_vector, emit_fma, i64, load, op, scalar, store, vector, void
from .team import Team, barrier

CHAINS = 12  # accumulators of the register-only loops: more than latency x units on any core


def _emit_read(streams):
    """op(address, bytes, out): read `bytes` (a multiple of streams * 512) in `streams` runs side by side."""

    def emit(builder, address, size, out):
        kind = vector("i32", 16)
        cells = [cgutils.alloca_once_value(builder, const_vector("i32", 16, 0)) for _ in range(8)]
        run = builder.udiv(size, const_i64(streams))
        starts = [builder.add(address, builder.mul(run, const_i64(s))) for s in range(streams)]
        with cgutils.for_range(builder, builder.udiv(run, const_i64(512)), intp=scalar("i64")) as loop:
            at = builder.mul(loop.index, const_i64(512))
            for start in starts:
                for i, cell in enumerate(cells):
                    line = load(builder, builder.add(builder.add(start, at), const_i64(64 * i)), kind, 64)
                    builder.store(builder.add(builder.load(cell), line), cell)
        for i, cell in enumerate(cells):
            store(builder, builder.load(cell), builder.add(out, const_i64(64 * i)))

    return op(void, (i64,) * 3, lambda address, size, out: None)(emit)


def _emit_peak(kind):
    """op(rounds, out): rounds x CHAINS int8 dots or float32 fmas that never leave registers."""

    def emit(builder, rounds, out):
        whole = kind == "int8"
        start = const_vector("i32" if whole else "f32", 16, 1 if whole else 1.0)
        cells = [cgutils.alloca_once_value(builder, start) for _ in range(CHAINS)]
        x = load(builder, out, vector("i8", 64) if whole else vector("f32", 16))
        with cgutils.for_range(builder, rounds, intp=scalar("i64")):
            for cell in cells:
                value = builder.load(cell)
                builder.store(emit_dot4(builder, value, x, x) if whole else emit_fma(builder, value, x, x), cell)
        for i, cell in enumerate(cells):
            store(builder, builder.load(cell), builder.add(out, const_i64(64 * i)))

    return op(void, (i64,) * 2, lambda rounds, out: None)(emit)


@functools.lru_cache(maxsize=None)
def _read_kernel(streams):
    read = _emit_read(streams)

    @njit(entry=f"{streams} streams")
    def run_read(address, size, out, cell, index, members):
        barrier(cell, members)
        read(address + size // members * index, size // members, out + 4096 * index)
        barrier(cell, members)

    return run_read


@functools.lru_cache(maxsize=None)
def _peak_kernel(kind):
    peak = _emit_peak(kind)

    @njit(entry=kind)
    def run_peak(rounds, out, cell, index, members):
        barrier(cell, members)
        peak(rounds, out + 4096 * index)
        barrier(cell, members)

    return run_peak


class Ceilings:
    """Measures on `threads` threads, as often as asked; holds `nbytes` of anonymous memory meanwhile. Use with `with`."""

    def __init__(self, threads: int, nbytes: int = 2 << 30):
        self.team = Team(threads)
        self.nbytes = nbytes // (threads * 2048) * threads * 2048
        self._memory = np.ones(self.nbytes + 64, np.uint8)  # written, so that pages are real
        self._out = np.ones(4096 * threads + 64, np.uint8)
        self._cell = np.zeros(256, np.uint8)

    def _address(self, array):
        return -(-array.__array_interface__["data"][0] // 64) * 64

    def read_bandwidth(self) -> float:
        """Bytes a second of vector reads, the best of 1, 2 and 4 runs side by side in each thread."""
        best = 0.0
        for streams in (1, 2, 4):
            best = max(best, self.nbytes / self._seconds(_read_kernel(streams), self._address(self._memory), self.nbytes))
        return best

    def int8_peak(self) -> float:
        """Operations a second (a multiplication and an addition are two) of register-only int8 dots."""
        return self._peak("int8", 128)

    def float32_peak(self) -> float:
        """Operations a second of register-only float32 fmas on 16 lanes."""
        return self._peak("float32", 32)

    def _peak(self, kind, operations) -> float:
        rounds = 2_000_000
        return max(rounds * CHAINS * operations * self.team.size / self._seconds(_peak_kernel(kind), rounds) for _ in range(2))

    def _seconds(self, kernel, *args) -> float:
        out, cell = self._address(self._out), self._address(self._cell)
        self.team.run(kernel, *(1 if i == len(args) - 1 else a for i, a in enumerate(args)), out, cell)  # compiled, threads awake
        begin = time.perf_counter()
        self.team.run(kernel, *args, out, cell)
        return time.perf_counter() - begin

    def close(self) -> None:
        self.team.close()
        self._memory = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_bandwidth(threads: int) -> float:
    """Measured read bandwidth of `threads` threads in GB/s."""
    with Ceilings(threads) as ceilings:
        return ceilings.read_bandwidth() / 1e9


def int8_peak(threads: int) -> float:
    """Measured peak of the int8 units of `threads` threads in GOP/s."""
    with Ceilings(threads, 1 << 20) as ceilings:
        return ceilings.int8_peak() / 1e9
