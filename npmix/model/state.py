"""The run state: every scratch buffer of the forward pass, allocated once, and the table that names them to kernels.

One hard fact: kernels have no bounds checks; the shapes here are what they rely on. Rows that are
quantised are padded with zeros to 256 numbers, the widest pair of groups.
"""

import numpy as np

from ..config import Config
from ..formats import EXPERT_UNIT
from ..kernels import tables as t
from ..kernels.attention import BLOCK, TALLEST, scores_bytes
from ..kernels.decode import RUN
from ..kernels.matmul import panel_bytes
from ..kernels.prefill import QUERY_ROWS
from .kv_cache import KVCache, aligned_zeros
from .reference import rope_angles
from .weights import Weights


def _pad(n: int, to: int) -> int:
    return -(-n // to) * to


def _act_bytes(cols: int, group: int) -> int:
    """Bytes of one token's activations, as kernels count them (`kernels.matmul.act_bytes`)."""
    if group == 0:
        return 4 * _pad(cols, 16)
    cols = _pad(cols, 2 * group)
    return cols + 8 * (cols // group)


class RunState:
    """Buffers for chunks of up to `chunk` tokens and `members` threads; `m` is the machine table (int64)."""

    def __init__(self, weights: Weights, cache: KVCache, context: int, chunk: int, members: int):
        config = weights.config
        self.m = np.zeros(t.MACHINE_COLUMNS, np.int64)
        self._arrays: dict[int, np.ndarray] = {}
        self._sizes(config, weights, cache, chunk)
        self._weights(weights)
        self._buffers(config, weights, cache, chunk)
        self._scratch(config, weights, chunk, members)
        self.m[t.KEYS] = cache.keys.__array_interface__["data"][0]
        self.m[t.VALUES] = cache.values.__array_interface__["data"][0]
        self._constants(config, context)

    def _sizes(self, c: Config, weights: Weights, cache: KVCache, chunk: int) -> None:
        m = self.m
        m[t.DIM], m[t.N_LAYERS], m[t.N_HEADS], m[t.N_KV_HEADS] = c.dim, c.n_layers, c.n_heads, c.n_kv_heads
        m[t.HEAD_DIM], m[t.HIDDEN_DIM], m[t.N_EXPERTS], m[t.N_ACTIVE] = c.head_dim, c.hidden_dim, c.n_experts, c.n_active
        m[t.VOCAB], m[t.WINDOW] = c.vocab_size, c.sliding_window or 1 << 40
        m[t.X_WIDTH], m[t.ATT_WIDTH] = _pad(c.dim, 256), _pad(c.n_heads * c.head_dim, 256)
        m[t.Q_WIDTH], m[t.KV_WIDTH] = _pad(c.n_heads * c.head_dim, 16), _pad(c.n_kv_heads * c.head_dim, 16)
        m[t.V_WIDTH] = cache.width
        for slot in range(t.SLOTS):
            m[t.GROUP_0 + slot], m[t.SPAN_0 + slot] = weights.group(slot), weights.span(slot)
        m[t.CAPACITY], m[t.CHUNK] = cache.capacity, chunk
        m[t.KEYS_HEAD_BYTES], m[t.VALUES_HEAD_BYTES] = cache.keys.strides[1], cache.values.strides[1]

    def _weights(self, weights: Weights) -> None:
        m = self.m
        m[t.EMBEDDINGS], m[t.NORM], m[t.OUTPUT], m[t.OUTPUT_SLOT] = weights.embeddings, weights.norm, weights.output, weights.output_slot

    def _buffers(self, c: Config, weights: Weights, cache: KVCache, chunk: int) -> None:
        m, width, pairs = self.m, int(self.m[t.X_WIDTH]), chunk * c.n_active
        groups = {slot.group for slot in weights.slots}
        act = max(_act_bytes(c.dim, g) for g in groups)
        att = max(_act_bytes(c.n_heads * c.head_dim, g) for g in groups)
        hidden = max(_act_bytes(c.hidden_dim, g) for g in groups)
        self._new(t.X, (chunk, width), np.float32)
        self._new(t.QKV, (chunk, int(m[t.Q_WIDTH] + 2 * m[t.KV_WIDTH])), np.float32)
        self._new(t.Q, (c.n_kv_heads, chunk, c.n_heads // c.n_kv_heads, c.head_dim), np.float32)
        self._new(t.ATT, (chunk, int(m[t.ATT_WIDTH])), np.float32)
        self._new(t.ROWS, (chunk, act), np.uint8)
        self._new(t.ACTS, (max((pairs + 1) * act, (chunk + 1) * act, chunk * att),), np.uint8)
        self._new(t.H_ACTS, (pairs, hidden), np.uint8)
        self._new(t.Y, (pairs, width), np.float32)
        self._new(t.PARTS, (cache.capacity // BLOCK + 1, c.n_heads, 16 + cache.width), np.float32)
        self._new(t.TOKENS, (chunk,), np.int32)
        self._new(t.CHOICE, (pairs,), np.int32)
        self._new(t.CHOICE_WEIGHT, (pairs,), np.float32)
        self._new(t.ORDER, (pairs,), np.int32)
        self._new(t.RANK, (pairs,), np.int32)
        self._new(t.STARTS, (c.n_experts + 1,), np.int32)
        self._new(t.COUNTERS, (t.COUNTERS_BYTES,), np.uint8)
        self._new(t.CLOCKS, (1 + len(t.PHASES),), np.int64)
        self._new(t.STATUS, (2,), np.int64)
        self._new(t.SELECTED, (c.n_experts,), np.int32)[:] = np.arange(c.n_experts)
        self._new(t.GUESS, (2, chunk + t.LAYERS_AHEAD, c.n_active), np.int32)

    def _scratch(self, c: Config, weights: Weights, chunk: int, members: int) -> None:
        """Each member's own buffers, one after the other, each starting on a cache line."""
        part = 4 * (16 + int(self.m[t.V_WIDTH]))
        groups = {slot.group for slot in weights.slots}
        packed = (groups | {weights.embeddings_kind[1]}) - {0}
        sizes = {
            t.S_ROW: 4 * int(self.m[t.X_WIDTH]),
            t.S_ACT: max(_act_bytes(n, g) for n in (c.dim, c.n_heads * c.head_dim) for g in groups),
            t.S_GATE: 4 * EXPERT_UNIT * max(chunk, RUN),
            t.S_UP: 4 * EXPERT_UNIT * max(chunk, RUN),
            t.S_LOGITS: 4 * _pad(c.n_experts, 16),
            t.S_CHOICE: 8 * c.n_active,
            t.S_SCORES: scores_bytes(c.head_dim),
            t.S_PARTS: TALLEST * part,
            t.S_RUNNING: max(QUERY_ROWS, c.n_heads // c.n_kv_heads) * part,
            t.S_PANEL: max(panel_bytes(n, g) for n in (c.dim, c.n_heads * c.head_dim, c.hidden_dim) for g in packed) if packed else 0,
        }
        at = 0
        for column, size in sizes.items():
            self.m[column] = at
            at += _pad(size, 64)
        self.m[t.SCRATCH_BYTES] = _pad(at, 4096) + 64  # members' buffers must not fall on the same cache sets
        self._new(t.SCRATCH, (members, int(self.m[t.SCRATCH_BYTES])), np.uint8)

    def _constants(self, c: Config, context: int) -> None:
        numbers = self._new(t.NUMBERS, (2,), np.float32)
        numbers[:] = c.norm_eps, np.log2(np.e) / np.sqrt(c.head_dim)  # queries carry the scale: scores are in base 2
        table = self._new(t.ROPE, (context, 2, c.head_dim // 2), np.float32)
        for start in range(0, context, 4096):
            angles = rope_angles(c, np.arange(start, min(start + 4096, context))).astype(np.float64)
            table[start : start + len(angles), 0] = np.cos(angles)
            table[start : start + len(angles), 1] = np.sin(angles)

    def _new(self, column: int, shape: tuple[int, ...], dtype) -> np.ndarray:
        """A zeroed array whose address goes into the table."""
        array = aligned_zeros(shape, dtype)
        self._arrays[column] = array
        self.m[column] = array.__array_interface__["data"][0]
        return array

    def observe(self, c: Config) -> None:
        """From now on prefill keeps the inputs of a layer's matrices as float32 rows (`kernels/observe.py`)."""
        chunk, width = int(self.m[t.CHUNK]), int(self.m[t.X_WIDTH])
        self._new(t.OBSERVED_NORMED, (chunk, width), np.float32)
        self._new(t.OBSERVED_ROWS, (chunk, width), np.float32)
        self._new(t.OBSERVED_HIDDEN, (chunk * c.n_active, _pad(c.hidden_dim, EXPERT_UNIT)), np.float32)

    def array(self, column: int) -> np.ndarray:
        """The buffer behind a column of the table."""
        return self._arrays[column]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())
