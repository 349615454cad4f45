"""The KV cache: two preallocated arrays, laid out for the attention kernel.

One hard fact: the memory is zeroed pages the system commits as they are written, so a large context
costs nothing until it is used, and a lane that was never written is 0, not NaN.
"""

import numpy as np

from ..config import Config
from ..kernels.attention import BLOCK, STRIP

DTYPES = {"f16": np.float16, "f32": np.float32}


def capacity(config: Config, context: int, chunk: int) -> int:
    """Positions held: the context, or for a sliding window a ring of window + chunk - 1, in whole blocks."""
    needed = context
    if config.sliding_window:
        needed = min(context, config.sliding_window + chunk - 1)
    return -(-needed // BLOCK) * BLOCK


class KVCache:
    """keys: (L, K, S / 64, d, 64); values: (L, K, S, d padded to 16); position p lies at p % S."""

    def __init__(self, config: Config, context: int, chunk: int, kv: str):
        self.kv = kv
        self.capacity = capacity(config, context, chunk)
        self.width = -(-config.head_dim // 16) * 16
        heads = (config.n_layers, config.n_kv_heads)
        self.keys = np.zeros((*heads, self.capacity // STRIP, config.head_dim, STRIP), DTYPES[kv])
        self.values = np.zeros((*heads, self.capacity, self.width), DTYPES[kv])

    def erase(self, position: int, count: int) -> None:
        """Zero the values of positions position.. + count: a NaN there would outlive its sequence, since 0 * NaN is NaN."""
        self.values[:, :, np.arange(position, position + count) % self.capacity] = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
