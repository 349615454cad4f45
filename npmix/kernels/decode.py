"""Decode: one token through the layers, every member of the team on its share of each phase.

One hard fact: decode reads each weight once and does little with it, so a share is a long run of memory.
What is cheap (norms, router, quantisation of the input) every member does for itself rather than wait for
another; what is dear is taken in turns from a counter, because two cores of a shared machine are seldom
equally fast.
"""

from numpy import float32 as F

from ..formats import EXPERT_UNIT
from ._jit import njit
from .attention import BLOCK, TALLEST, clear, finish, merge
from .matmul import act_bytes
from .ops import add, atomic_add, fma, get_f32, get_i32, load_f32, splat_f32, store_f32
from .phases import (
    NONE,
    ONE,
    add_rows,
    blocks_of,
    check_logits,
    end_phase,
    expert_units,
    guess,
    head_row,
    keys_of,
    long_runs,
    norm_and_check,
    norm_and_quantise,
    qkv_blocks,
    route,
    scratch,
    source_of,
    stretch,
    unit_to_acts,
    values_of,
)
from .rows import quantise_row
from .tables import *  # noqa: F403  (the columns)

RUN = 4  # units a member takes at a time, until a quarter of them is left: two members in turns disturb each other's fetching
UNIT = 8  # row blocks of w_down
HEAD_UNIT = 32  # row blocks of the output matrix


@njit
def take(m, counter, items, round, members):
    """The next item of a phase that is gone through once a layer, `items` or more when there is none left.

    Each round takes items + members off the counter: every member finds the end once.
    """
    return atomic_add(m[COUNTERS] + counter, 1) - round * (items + members)


@njit
def runs_of(units):
    """(runs of RUN units, items in all) of a phase of `units`: each jump to another place costs a microsecond, uneven ends cost more."""
    runs = units * 3 // 4 // RUN
    return runs, units - runs * (RUN - 1)


@njit(inline=True)
def attention(mm, attend_block, put_key, put_value, m, layers, layer, round, position, index, members):
    row, act = scratch(m, S_ROW, index), scratch(m, S_ACT, index)
    norm_and_quantise(m, m[X], layers[layer, ATTENTION_NORM], source_of(layer), m[GROUP_0 + layers[layer, WQ_SLOT]], row, act)
    q, kv = m[Q_WIDTH] // 16, m[KV_WIDTH] // 16
    begin, end = (q + 2 * kv) * index // members, (q + 2 * kv) * (index + 1) // members
    for which in range(3):
        base = 0 if which == 0 else q + (which - 1) * kv
        low, high = max(begin - base, 0), min(end - base, q if which == 0 else kv)
        if low < high:
            qkv_blocks(mm, m, layers, layer, which, low, high, act, ONE, m[QKV], NONE, NONE, NONE)
    end_phase(m, T_QKV, index, members)
    for item in range(index, m[N_HEADS] + 2 * m[N_KV_HEADS], members):
        head_row(m, put_key, put_value, layer, item, m[QKV], NONE, position, scratch(m, S_SCORES, index))
    end_phase(m, T_ROPE, index, members)
    blocks(attend_block, m, layer, round, position, index, members)
    end_phase(m, T_ATTENTION, index, members)
    oldest = max(0, position - m[WINDOW] + 1) // BLOCK
    running, part_bytes = scratch(m, S_RUNNING, index), 4 * (16 + m[V_WIDTH])
    for head in range(m[N_HEADS] * index // members, m[N_HEADS] * (index + 1) // members):
        clear(running, m[V_WIDTH])
        for b in range(position // BLOCK - oldest + 1):
            merge(running, m[PARTS] + (b * m[N_HEADS] + head) * part_bytes, m[V_WIDTH])
        finish(running, m[HEAD_DIM], m[ATT] + 4 * m[HEAD_DIM] * head)
    end_phase(m, T_MERGE, index, members)
    width, slot = m[N_HEADS] * m[HEAD_DIM], layers[layer, WO_SLOT]
    quantise_row(m[ATT], width, m[GROUP_0 + slot], act)
    begin, end = blocks_of(m[DIM]) * index // members, blocks_of(m[DIM]) * (index + 1) // members
    mm(slot, layers[layer, WO], m[DIM], width, begin, end, act, ONE, m[Y], NONE, NONE, NONE)
    add_rows(m[X], m[Y], begin, end)
    end_phase(m, T_WO, index, members)


@njit(inline=True)
def blocks(attend_block, m, layer, round, position, index, members):
    """Attention's blocks of positions by kv head, each result in its own place of PARTS; runs of blocks until a sixteenth of them is left."""
    dim, width, capacity = m[HEAD_DIM], m[V_WIDTH], m[CAPACITY]
    shared = m[N_HEADS] // m[N_KV_HEADS]
    oldest = max(0, position - m[WINDOW] + 1) // BLOCK
    count = position // BLOCK - oldest + 1
    part_bytes, units = 4 * (16 + width), m[N_KV_HEADS] * count
    runs, length = long_runs(units, members)  # a block fetches the next one, so that should be the same member's
    items = units - runs * (length - 1)
    item = take(m, COUNT_ATTENTION, items, round, members)
    while item < items:
        first, end = stretch(item, runs, length)
        for unit in range(first, end):
            head, b = unit // count, unit % count
            keys, values = keys_of(m, layer, head), values_of(m, layer, head)
            q = m[Q] + 4 * dim * head * m[CHUNK] * shared
            for r in range(0, shared, TALLEST):
                rows = min(TALLEST, shared - r)
                parts = m[PARTS] + (b * m[N_HEADS] + head * shared + r) * part_bytes
                start = (oldest + b) * BLOCK
                scores = scratch(m, S_SCORES, index)
                at = q + 4 * dim * r
                attend_block(at, 4 * dim, rows, r, position, shared, m[WINDOW], start, capacity, keys, values, dim, width, scores, parts)
        item = take(m, COUNT_ATTENTION, items, round, members)


@njit(inline=True)
def choose_experts(mm, m, layers, layer, part, index, members):
    """Norm, router, quantised row; every member has its own."""
    row, act, experts = scratch(m, S_ROW, index), scratch(m, S_ACT, index), scratch(m, S_CHOICE, index)
    norm_and_check(m, m[X], layers[layer, FFN_NORM], layer + 1, row)
    route(mm, m, layers, layer, row, scratch(m, S_LOGITS, index), experts, experts + 4 * m[N_ACTIVE])
    quantise_row(row, m[DIM], m[GROUP_0 + layers[layer, GATE_SLOT]], act)
    if part == ROUTE and index == 0:
        for ahead in range(LAYERS_AHEAD):
            at = m[GUESS] + 4 * m[N_ACTIVE] * ahead
            guess(mm, m, layers, layer + 1 + ahead, m[X], row, scratch(m, S_LOGITS, index), at)


@njit(inline=True)
def experts(mm, m, layers, layer, round, part, index, members):
    """The chosen experts: gate and up with SwiGLU in units, down in row blocks, summed in expert order."""
    act, active, experts = scratch(m, S_ACT, index), m[N_ACTIVE], scratch(m, S_CHOICE, index)
    weights = experts + 4 * active
    todo = part // PART if part else active
    gate_todo, down_todo = todo if part == 0 or part & GATE_UP else 0, todo if part == 0 or part & DOWN else 0
    hidden, down = m[HIDDEN_DIM], layers[layer, DOWN_SLOT]
    units = (hidden + EXPERT_UNIT - 1) // EXPERT_UNIT
    group = m[GROUP_0 + down]
    h_bytes = act_bytes(hidden, group)
    gate, up = scratch(m, S_GATE, index), scratch(m, S_UP, index)
    runs, items = runs_of(gate_todo * units)
    item = take(m, COUNT_GATE, items, round, members)
    while item < items:
        unit, end = stretch(item, runs, RUN)
        while unit < end:
            a, first = get_i32(m[SELECTED] + 4 * (unit // units)), unit % units
            count = min(end - unit, units - first)
            expert_units(mm, m, layers, layer, get_i32(experts + 4 * a), first, count, act, ONE, gate, up, NONE, NONE)
            for i in range(count):
                unit_to_acts(gate + 4 * EXPERT_UNIT * i, first + i, hidden, group, m[H_ACTS] + a * h_bytes, ONE, NONE)
            unit += count
        item = take(m, COUNT_GATE, items, round, members)
    end_phase(m, T_GATE_UP, index, members)
    y_bytes, units = 4 * m[X_WIDTH], (blocks_of(m[DIM]) + UNIT - 1) // UNIT if down_todo else 0
    runs, items = runs_of(units)
    item = take(m, COUNT_DOWN, items, round, members)
    while item < items:
        first, last = stretch(item, runs, RUN)
        begin, end = first * UNIT, min(last * UNIT, blocks_of(m[DIM]))
        for i in range(down_todo):
            a = get_i32(m[SELECTED] + 4 * i)
            w = layers[layer, EXPERTS + 3 * get_i32(experts + 4 * a) + 2]
            mm(down, w, m[DIM], hidden, begin, end, m[H_ACTS] + a * h_bytes, ONE, m[Y] + a * y_bytes, NONE, NONE, NONE)
        for k in range(64 * begin, 64 * end if part == 0 or part & SUM else 0, 64):
            total = splat_f32(F(0.0))
            for a in range(active):
                total = fma(splat_f32(get_f32(weights + 4 * a)), load_f32(m[Y] + a * y_bytes + k), total)
            store_f32(m[X] + k, add(load_f32(m[X] + k), total))
        item = take(m, COUNT_DOWN, items, round, members)
    end_phase(m, T_DOWN, index, members)


@njit(inline=True)
def head(mm, m, logits, index, members):
    """The final norm and the output matrix."""
    row, act, slot = scratch(m, S_ROW, index), scratch(m, S_ACT, index), m[OUTPUT_SLOT]
    norm_and_quantise(m, m[X], m[NORM], m[N_LAYERS], m[GROUP_0 + slot], row, act)
    count = blocks_of(m[VOCAB])
    units = (count + HEAD_UNIT - 1) // HEAD_UNIT
    runs, items = runs_of(units)
    item = take(m, COUNT_LOGITS, items, NONE, members)
    while item < items:
        first, last = stretch(item, runs, RUN)
        begin, end = first * HEAD_UNIT, min(last * HEAD_UNIT, count)
        mm(slot, m[OUTPUT], m[VOCAB], m[DIM], begin, end, act, ONE, logits, NONE, NONE, NONE)
        check_logits(m, logits, begin, end)
        item = take(m, COUNT_LOGITS, items, NONE, members)
    end_phase(m, T_HEAD, index, members)
