"""What the tests of the kernels share: memory with guards, distances in units of the last place, child processes.

One hard fact: kernels take addresses and check nothing, so every buffer here stands between guard bytes, at an odd address.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
GUARD = 192
FILL = 0xA5


class Memory:
    """An array of its own between guard bytes; `.array` to fill and read, `.at` its address, `.intact()` whether the guards are whole."""

    def __init__(self, shape, dtype=np.float32, offset=4, fill=None):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._raw = np.full(2 * GUARD + count, FILL, np.uint8)
        self._begin, self._end = GUARD + offset, GUARD + offset + count
        self.array = self._raw[self._begin : self._end].view(dtype).reshape(shape)
        if fill is not None:
            self.array[...] = fill
        self.at = self._raw.__array_interface__["data"][0] + self._begin

    def intact(self) -> bool:
        return bool((self._raw[: self._begin] == FILL).all() and (self._raw[self._end :] == FILL).all())


def memory(values, dtype=None) -> Memory:
    """A copy of an array between guards."""
    values = np.asarray(values, dtype)
    return Memory(values.shape, values.dtype, fill=values)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def ulps(a, b) -> int:
    """The largest distance of two float32 arrays in units of the last place; NaN equals NaN, and -0 is next to 0."""
    a, b = np.asarray(a, np.float32).ravel(), np.asarray(b, np.float32).ravel()
    assert a.shape == b.shape
    both = np.isnan(a) & np.isnan(b)
    order = [np.where(x.view(np.int32) < 0, -(x.view(np.int32).astype(np.int64) & 0x7FFFFFFF), x.view(np.int32)) for x in (a, b)]
    distance = np.where(both, 0, np.abs(order[0] - order[1]))
    return int(distance.max()) if distance.size else 0


def same_bits(a, b) -> bool:
    """Whether two arrays are byte for byte equal."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def environment(cache, **changes) -> dict:
    """This process' environment with an own kernel cache and some changes; a change to None takes the variable away."""
    env = {**os.environ, "NPMIX_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    env.pop("NUMBA_DISABLE_JIT", None)
    for name, value in changes.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env


def child(code: str, cache, *args, timeout=300, **changes) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own; its failure is ours."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=environment(cache, **changes), capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
