"""The KV cache: two preallocated arrays, laid out for the attention kernel.

Of each layer and kv head, S positions, a multiple of BLOCK; position p lies at p % S. As float16 ("f16") and float32 ("f32"):

    keys    [S / 64][head_dim][64]   64 positions side by side
    values  by blocks of BLOCK positions, columns of 64 lanes of V_WIDTH, which is head_dim padded to 16: [BLOCK][64];
            what is left of a width that is no multiple of 64 is a narrower column

In 8 bits ("q8"): codes 1..255 that mean code - 128 times a scale of the head and position, max|x| / 127 in float32, so
head_dim + 4 bytes a row (at 128 52 % of float16's). A row that is not finite has a NaN for a scale. By blocks of BLOCK positions:

    keys    codes  [BLOCK / 32][head_dim padded to 4 / 4][32][4]   lanes are positions, words four dims
            scales [BLOCK]
    values  codes  [V_WIDTH / 32][BLOCK / 4][32][4]                lanes are dims (padded to 32), words four positions
            scales [BLOCK]

One hard fact: the memory is zeroed pages the system commits as they are written, so a large context
costs nothing until it is used, and a lane that was never written is 0, not NaN.
"""

import numpy as np

from ..config import Config
from ..kernels.cache import BLOCK, CELL, COLUMN, KINDS, STRIP, row_bytes

DTYPES = {"f16": np.float16, "f32": np.float32, "q8": np.uint8}
PAGE = 4096  # a block of keys or values that starts on a page is read 8 % faster than one that starts on any line (Zen 5, from memory)


def capacity(config: Config, context: int, chunk: int) -> int:
    """Positions held: the context, or for a sliding window a ring of window + chunk - 1, in whole blocks."""
    needed = context
    if config.sliding_window:
        needed = min(context, config.sliding_window + chunk - 1)
    return -(-needed // BLOCK) * BLOCK


def block(kv: str, *shape: int) -> np.dtype:
    """A block of BLOCK positions of one head: its numbers in `shape`, then their scales if there are any."""
    scales = [("scales", np.float32, (BLOCK,))] if KINDS[kv][1] else []
    return np.dtype([("numbers", DTYPES[kv], shape), *scales])


def position_bytes(config: Config, kv: str) -> int:
    """Bytes of one position's keys and values in all layers, scales counted, padding not."""
    return config.n_layers * config.n_kv_heads * 2 * row_bytes(kv, config.head_dim)


def aligned_zeros(shape: tuple[int, ...], dtype, to: int = 64) -> np.ndarray:
    """Zeros that start at a multiple of `to` bytes: NumPy promises 16, and vectors that straddle cache lines are read slowly."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(count + to, np.uint8)
    skip = -raw.__array_interface__["data"][0] % to
    return raw[skip : skip + count].view(dtype).reshape(shape)


class KVCache:
    """keys, values: blocks (L, K, S / BLOCK), each "numbers" and, in 8 bits, "scales"; width: V_WIDTH."""

    def __init__(self, config: Config, context: int, chunk: int, kv: str):
        self.kv = kv
        self.capacity = capacity(config, context, chunk)
        dim, self.width = (-(-config.head_dim // to) * to for to in KINDS[kv][2:])
        shape = (config.n_layers, config.n_kv_heads, self.capacity // BLOCK)
        if kv == "q8":
            keys, values = block(kv, BLOCK // CELL, dim // 4, CELL, 4), block(kv, self.width // CELL, BLOCK // 4, CELL, 4)
        else:
            keys, values = block(kv, BLOCK // STRIP, dim, STRIP), block(kv, BLOCK * self.width)
        self.keys, self.values = aligned_zeros(shape, keys, PAGE), aligned_zeros(shape, values, PAGE)

    def erase(self, position: int, count: int) -> None:
        """Zero the values of positions position.. + count: a NaN there would outlive its sequence, since 0 * NaN is NaN.

        In 8 bits only a scale can be NaN.
        """
        slots = np.arange(position, position + count) % self.capacity
        if self.kv == "q8":
            self.values["scales"][:, :, slots // BLOCK, slots % BLOCK] = 0
            return
        numbers = self.values["numbers"]
        for first in range(0, self.width, COLUMN):
            lanes = min(COLUMN, self.width - first)
            column = numbers[..., first * BLOCK : (first + lanes) * BLOCK].reshape(*numbers.shape[:-1], BLOCK, lanes)
            column[:, :, slots // BLOCK, slots % BLOCK] = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
