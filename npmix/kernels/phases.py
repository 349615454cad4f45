"""Pieces of work that decode and prefill share: splitting, matrix dispatch, heads, experts' units.

One hard fact: `mm` is the model's own dispatch over its formats and comes as an argument, so a phase is
written once and compiled for what a model really holds.
"""

import functools

import numpy as np
from numpy import float32 as F

from ..formats import EXPERT_UNIT
from ._jit import njit
from .matmul import absent, matmul, row_block_at
from .ops import add, fma, get_f32, get_i64, load_f32, put_f32, put_i64, splat_f32, store_f32, sum_f32, ticks
from .router import choose
from .rows import quantise_group, quantise_row, rms_norm, rope, swiglu
from .tables import *  # noqa: F403  (the columns)
from .team import barrier

# Numba compiles a callee anew for each literal argument, so the common ones are typed
NONE, ONE = np.int64(0), np.int64(1)


@functools.lru_cache(maxsize=None)
def matmul_by_slot(slots):
    """A kernel mm(slot, w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow) over a model's slots: `matmul` of each."""
    mm0, mm1, mm2, mm3 = [matmul(*slot) for slot in slots] + [absent] * (SLOTS - len(slots))

    @njit
    def mm(slot, w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow):
        if slot == 0:
            mm0(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow)
        elif slot == 1:
            mm1(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow)
        elif slot == 2:
            mm2(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow)
        else:
            mm3(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow)

    return mm


@njit
def blocks_of(rows):
    return (rows + 15) // 16


@njit
def scratch(m, column, index):
    """A member's own buffer."""
    return m[SCRATCH] + index * m[SCRATCH_BYTES] + m[column]


@njit
def long_runs(units, members):
    """(runs, units in each): neighbours for a sixteenth of a member's share at a time, until a sixteenth of all is left for single ones."""
    length = max(1, units // (16 * members))
    return units * 15 // 16 // length, length


@njit
def stretch(item, runs, length):
    """(first, end) of what item number `item` stands for: `runs` items of `length` each, then single ones."""
    if item < runs:
        return item * length, item * length + length
    first = item + runs * (length - 1)
    return first, first + 1


@njit
def start_clock(m, index):
    if index == 0:
        put_i64(m[CLOCKS], ticks())


@njit
def end_phase(m, phase, index, members):
    """Wait for all members; member 0 adds the ticks since the last phase ended to this one's."""
    barrier(m[TEAM], members)
    if index == 0:
        now = ticks()
        put_i64(m[CLOCKS] + 8 * phase, get_i64(m[CLOCKS] + 8 * phase) + now - get_i64(m[CLOCKS]))
        put_i64(m[CLOCKS], now)


@njit
def norm_and_check(m, x, weight, source, out):
    """RMSNorm of one row; when the row is not finite, its `source` is noted: a layer from 1, or -1 for the embeddings."""
    squares = rms_norm(x, weight, m[DIM], blocks_of(m[DIM]) * 16, get_f32(m[NUMBERS]), out)
    if not squares < F(np.inf) and get_i64(m[STATUS] + BAD_LAYER) == 0:
        put_i64(m[STATUS] + BAD_LAYER, source)


@njit
def check_logits(m, logits, first, last):
    """Note it when logits of row blocks first..last of one token are not finite: the source is then one past the last layer's."""
    taint = splat_f32(F(0.0))
    for k in range(64 * first, 64 * last, 64):
        taint = fma(load_f32(logits + k), splat_f32(F(0.0)), taint)
    if not sum_f32(taint) == F(0.0) and get_i64(m[STATUS] + BAD_LAYER) == 0:
        put_i64(m[STATUS] + BAD_LAYER, m[N_LAYERS] + 1)


@njit(inline=True)
def norm_and_quantise(m, x, weight, source, group, row, out):
    norm_and_check(m, x, weight, source, row)
    quantise_row(row, m[DIM], group, out)


@njit
def qkv_blocks(mm, m, layers, layer, which, first, last, acts, tokens, out, out_bytes, panel, follow):
    """Row blocks first..last of q (which 0), k (1) or v (2); a token's q, k, v stand side by side at `out`."""
    rows = m[N_KV_HEADS] * m[HEAD_DIM]
    if which == 0:
        rows = m[N_HEADS] * m[HEAD_DIM]
        mm(layers[layer, WQ_SLOT], layers[layer, WQ], rows, m[DIM], first, last, acts, tokens, out, out_bytes, panel, follow)
    elif which == 1:
        at = out + 4 * m[Q_WIDTH]
        mm(layers[layer, WK_SLOT], layers[layer, WK], rows, m[DIM], first, last, acts, tokens, at, out_bytes, panel, follow)
    else:
        at = out + 4 * (m[Q_WIDTH] + m[KV_WIDTH])
        mm(layers[layer, WV_SLOT], layers[layer, WV], rows, m[DIM], first, last, acts, tokens, at, out_bytes, panel, follow)


@njit(inline=True)
def keys_of(m, layer, head):
    """Where the cached keys of one layer and kv head lie."""
    return m[KEYS] + (layer * m[N_KV_HEADS] + head) * m[KEYS_HEAD_BYTES]


@njit(inline=True)
def values_of(m, layer, head):
    return m[VALUES] + (layer * m[N_KV_HEADS] + head) * m[VALUES_HEAD_BYTES]


@njit
def head_row(m, put_key, put_value, layer, item, qkv, t, position, temp):
    """RoPE and placement of one head of one token: items are the query heads, then the value heads, then the key heads."""
    dim, heads, kv_heads = m[HEAD_DIM], m[N_HEADS], m[N_KV_HEADS]
    half = dim // 2
    cos_sin = m[ROPE] + 8 * half * position
    slot = position % m[CAPACITY]
    if item < heads:
        shared = heads // kv_heads
        to = m[Q] + 4 * dim * ((item // shared * m[CHUNK] + t) * shared + item % shared)
        rope(qkv + 4 * dim * item, cos_sin, half, get_f32(m[NUMBERS] + 4), to)
        return
    if item < heads + kv_heads:
        head = item - heads
        row = qkv + 4 * (m[Q_WIDTH] + m[KV_WIDTH] + dim * head)
        saturated = put_value(row, dim, m[V_WIDTH], values_of(m, layer, head), slot, temp)
    else:
        head = item - heads - kv_heads
        rope(qkv + 4 * (m[Q_WIDTH] + dim * head), cos_sin, half, F(1.0), temp)
        saturated = put_key(temp, dim, keys_of(m, layer, head), slot, temp)
    if saturated:
        put_i64(m[STATUS] + SATURATED, 1)


@njit
def source_of(layer):
    """Who made the input of a layer's first norm, as `norm_and_check` notes it."""
    return layer if layer else -1


@njit
def route(mm, m, layers, layer, row, logits, experts, weights):
    """Router logits of one row and the choice; without a router the one expert has weight 1."""
    if layers[layer, ROUTER]:
        mm(
            layers[layer, ROUTER_SLOT],
            layers[layer, ROUTER],
            m[N_EXPERTS],
            m[DIM],
            NONE,
            blocks_of(m[N_EXPERTS]),
            row,
            ONE,
            logits,
            NONE,
            NONE,
            NONE,
        )
    choose(logits, m[N_EXPERTS], m[N_ACTIVE], experts, weights)


@njit
def guess(mm, m, layers, layer, x, row, logits, experts):
    """The experts of a later layer by its router on this layer's hidden state (Eliseev & Mazur 2023, arXiv 2312.17238)."""
    if layer < m[N_LAYERS]:
        rms_norm(x, layers[layer, FFN_NORM], m[DIM], blocks_of(m[DIM]) * 16, get_f32(m[NUMBERS]), row)
        route(mm, m, layers, layer, row, logits, experts, experts + 4 * (m[CHUNK] + LAYERS_AHEAD) * m[N_ACTIVE])


@njit
def weights_at(m, slot, w, cols, block):
    """The address of row block `block` of the matrix at w, for `follow` of `matmul.matmul`."""
    return row_block_at(w, m[SPAN_0 + slot], cols, m[GROUP_0 + slot], block)


@njit
def gate_at(m, layers, layer, expert, unit):
    """Where a unit of EXPERT_UNIT rows of one expert's w_gate lies."""
    return weights_at(m, layers[layer, GATE_SLOT], layers[layer, EXPERTS + 3 * expert], m[DIM], unit * (EXPERT_UNIT // 16))


@njit
def expert_units(mm, m, layers, layer, expert, unit, count, acts, tokens, gate, up, panel, follow):
    """`count` units of EXPERT_UNIT rows of one expert's w_gate and w_up with SwiGLU: float32 (tokens, count * EXPERT_UNIT) at `gate`,
    zero past hidden_dim. follow: as in `matmul.matmul`."""
    hidden, slot = m[HIDDEN_DIM], layers[layer, GATE_SLOT]
    first = unit * (EXPERT_UNIT // 16)
    width = count * EXPERT_UNIT
    last = min(first + width // 16, blocks_of(hidden))
    at = EXPERTS + 3 * expert
    up_at = weights_at(m, slot, layers[layer, at + 1], m[DIM], first)
    mm(slot, layers[layer, at], hidden, m[DIM], first, last, acts, tokens, gate - 64 * first, 4 * width, panel, up_at)
    mm(slot, layers[layer, at + 1], hidden, m[DIM], first, last, acts, tokens, up - 64 * first, 4 * width, panel, follow)
    valid = min(width, hidden - 16 * first)
    for t in range(tokens):
        row = 4 * width * t
        for k in range(valid, width):
            put_f32(gate + row + 4 * k, F(0.0))
            put_f32(up + row + 4 * k, F(0.0))
        swiglu(gate + row, up + row, width, gate + row)


@njit
def unit_to_acts(h, unit, hidden, group, tile, height, t):
    """One token's EXPERT_UNIT values of `unit` as part of w_down's activations, at place t of a tile of `height` tokens."""
    start = unit * EXPERT_UNIT
    if group == 0:
        width = blocks_of(hidden) * 16
        for k in range(0, min(EXPERT_UNIT, width - start), 16):
            store_f32(tile + 4 * (t * width + start + k), load_f32(h + 4 * k))
        return
    width = (hidden + 2 * group - 1) // (2 * group) * 2 * group
    scales = tile + height * width
    starts = scales + width // group * 4 * height
    for k in range(start, min(start + EXPERT_UNIT, width), group):
        place = 4 * (k // group * height + t)
        quantise_group(h + 4 * (k - start), group, tile + height * k + 4 * t, 4 * height, scales + place, starts + place)


@njit
def add_rows(x, y, first, last):
    """x += y over row blocks first..last."""
    for k in range(64 * first, 64 * last, 64):
        store_f32(x + k, add(load_f32(x + k), load_f32(y + k)))
