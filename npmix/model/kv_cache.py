"""The KV cache: two preallocated arrays, laid out for the attention kernel.

Of each layer and kv head, S positions, a multiple of BLOCK; position p lies at p % S, in blocks of

    keys    numbers [BLOCK / 64][head_dim][64]   64 positions side by side
            scales  [BLOCK]                      float32, of "q8" alone: a key is its codes times its position's scale
    values  numbers [BLOCK][V_WIDTH]             head_dim padded to 16
            scales  [BLOCK]                      the same

Numbers are float16 ("f16"), float32 ("f32") or int8 codes -127..127 ("q8", scale = max|x| / 127: 52 % of float16's bytes at
head_dim 128). A "q8" row that is not finite has a NaN for a scale.

One hard fact: the memory is zeroed pages the system commits as they are written, so a large context
costs nothing until it is used, and a lane that was never written is 0, not NaN.
"""

import numpy as np

from ..config import Config
from ..kernels.cache import BLOCK, KINDS, STRIP, row_bytes

DTYPES = {"f16": np.float16, "f32": np.float32, "q8": np.int8}


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


class KVCache:
    """keys, values: blocks (L, K, S / BLOCK)."""

    def __init__(self, config: Config, context: int, chunk: int, kv: str):
        self.kv = kv
        self.capacity = capacity(config, context, chunk)
        self.width = -(-config.head_dim // 16) * 16
        shape = (config.n_layers, config.n_kv_heads, self.capacity // BLOCK)
        self.keys = np.zeros(shape, block(kv, BLOCK // STRIP, config.head_dim, STRIP))
        self.values = np.zeros(shape, block(kv, BLOCK, self.width))

    def erase(self, position: int, count: int) -> None:
        """Zero the values of positions position.. + count: a NaN there would outlive its sequence, since 0 * NaN is NaN."""
        slots = np.arange(position, position + count) % self.capacity
        for field in self.values.dtype.names:
            self.values[field][:, :, slots // BLOCK, slots % BLOCK] = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
