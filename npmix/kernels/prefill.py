"""Prefill: a chunk of tokens through one layer, every member of the team on its share of each phase.

One hard fact: prefill does much with each weight, so work is handed out in units by a shared counter
(experts get unequal numbers of tokens), tokens are sorted by expert, and activations are packed by tile
once per input. The order of additions is decode's, so the bits are too.

`skip` tokens at the start of the chunk only fill the cache: in the last layer, when only the last
position's logits are wanted, everything after the keys and values is computed for that position alone.
"""

from numpy import float32 as F

from ..formats import EXPERT_UNIT
from ._jit import njit
from .attention import BLOCK, TALLEST, clear, finish, merge
from .cache import STRIP
from .matmul import act_bytes, n_tiles
from .observe import keep_row, keep_units
from .ops import add, atomic_add, fma, get_f32, get_i32, load_f32, put_i32, put_i64, splat_f32, store_f32
from .phases import (
    NONE,
    ONE,
    add_rows,
    blocks_of,
    check_logits,
    end_phase,
    expert_units,
    gate_at,
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
    weights_at,
)
from .rows import put_in_tile, quantise_row
from .tables import *  # noqa: F403  (the columns)

UNIT = 8  # row blocks a member takes at a time
QUERY_ROWS = 64  # query rows (tokens x heads of one kv head) a member takes at a time


@njit
def next_unit(m, counter, total, unit, end, members):
    """The unit of a phase that a member takes after `unit`, and the end of its run (`long_runs`); `total` or more when none is left."""
    if unit + 1 < end:
        return unit + 1, end
    runs, length = long_runs(total, members)
    return stretch(atomic_add(m[COUNTERS] + counter, 1), runs, length)


@njit(inline=True)
def head(mm, m, first, tokens, logits, logits_bytes, index, members):
    """Final norm and output matrix for the chunk's tokens first..first + tokens."""
    slot = m[OUTPUT_SLOT]
    norm_tiles(m, m[NORM], m[N_LAYERS], m[GROUP_0 + slot], first, tokens, m[ACTS], index, members)
    end_phase(m, T_NORM, index, members)
    count = blocks_of(m[VOCAB])
    units = (count + UNIT - 1) // UNIT
    unit, end = next_unit(m, COUNT_LOGITS, units, NONE, NONE, members)
    while unit < units:
        first, last = unit * UNIT, min(unit * UNIT + UNIT, count)
        unit, end = next_unit(m, COUNT_LOGITS, units, unit, end, members)
        follow = weights_at(m, slot, m[OUTPUT], m[DIM], min(unit * UNIT, count))
        mm(slot, m[OUTPUT], m[VOCAB], m[DIM], first, last, m[ACTS], tokens, logits, logits_bytes, scratch(m, S_PANEL, index), follow)
        for t in range(tokens):
            check_logits(m, logits + t * logits_bytes, first, last)
    end_phase(m, T_HEAD, index, members)


@njit
def norm_tiles(m, weight, source, group, first, tokens, acts, index, members):
    """Norm and quantise the chunk's tokens first..first + tokens into tiles at `acts`."""
    row, act = scratch(m, S_ROW, index), scratch(m, S_ACT, index)
    token_bytes, tiles = act_bytes(m[DIM], group), n_tiles(tokens)
    for i in range(index, tiles, members):
        start, end = i * tokens // tiles, (i + 1) * tokens // tiles
        for t in range(start, end):
            norm_and_quantise(m, m[X] + 4 * m[X_WIDTH] * (first + t), weight, source, group, row, act)
            if m[OBSERVED_NORMED]:
                keep_row(row, m[DIM], m[OBSERVED_NORMED] + 4 * m[X_WIDTH] * t)
            put_in_tile(act, m[DIM], group, acts + start * token_bytes, end - start, t - start)


@njit
def qkv_unit(item, q_units, kv_units):
    """(0 for q, 1 for k or 2 for v, first row block) of unit number `item` of the three."""
    which = (item - q_units) // kv_units + 1 if item >= q_units else 0
    return which, (item - q_units) % kv_units * UNIT if which else item * UNIT


@njit(inline=True)
def project(mm, put_key, put_value, m, layers, layer, tokens, position, skip, index, members):
    """q, k, v of the chunk, RoPE, cache."""
    group = m[GROUP_0 + layers[layer, WQ_SLOT]]
    weight, source, few = layers[layer, ATTENTION_NORM], source_of(layer), m[ACTS] + tokens * act_bytes(m[DIM], group)
    norm_tiles(m, weight, source, group, NONE, tokens, m[ACTS], index, members)
    if skip:
        norm_tiles(m, weight, source, group, skip, tokens - skip, few, index, members)
    end_phase(m, T_NORM, index, members)
    q_blocks, kv_blocks = m[Q_WIDTH] // 16, m[KV_WIDTH] // 16
    q_units, kv_units = (q_blocks + UNIT - 1) // UNIT, (kv_blocks + UNIT - 1) // UNIT
    qkv_bytes = 4 * (m[Q_WIDTH] + 2 * m[KV_WIDTH])
    panel, units = scratch(m, S_PANEL, index), q_units + 2 * kv_units
    unit, end = next_unit(m, COUNT_QKV, units, NONE, NONE, members)
    while unit < units:
        which, begin = qkv_unit(unit, q_units, kv_units)
        unit, end = next_unit(m, COUNT_QKV, units, unit, end, members)
        after, at = qkv_unit(min(unit, units - 1), q_units, kv_units)
        follow = weights_at(m, layers[layer, WQ_SLOT + 2 * after], layers[layer, WQ + 2 * after], m[DIM], at)
        last = min(begin + UNIT, q_blocks if which == 0 else kv_blocks)
        first, acts = (skip, few) if which == 0 and skip else (NONE, m[ACTS])  # in the last layer few queries are wanted, but all keys
        qkv_blocks(mm, m, layers, layer, which, begin, last, acts, tokens - first, m[QKV] + first * qkv_bytes, qkv_bytes, panel, follow)
    end_phase(m, T_QKV, index, members)
    temp, others = scratch(m, S_SCORES, index), m[N_HEADS] + m[N_KV_HEADS]
    for t in range(tokens * index // members, tokens * (index + 1) // members):
        for item in range(0 if t >= skip else m[N_HEADS], others):
            head_row(m, put_key, put_value, layer, item, m[QKV] + qkv_bytes * t, t, position + t, temp)
    runs = (tokens + STRIP - 1) // STRIP
    for unit in range(index, runs * m[N_KV_HEADS], members):  # neighbours' keys share cache lines, and two members must not write one
        start = unit // m[N_KV_HEADS] * STRIP
        for t in range(start, min(start + STRIP, tokens)):
            head_row(m, put_key, put_value, layer, others + unit % m[N_KV_HEADS], m[QKV] + qkv_bytes * t, t, position + t, temp)
    end_phase(m, T_ROPE, index, members)


@njit(inline=True)
def attention(attend_block, m, layer, tokens, position, skip, index, members):
    """Units of (kv head, run of tokens), the longest first; each walks its blocks with a running result per row."""
    dim, width, capacity = m[HEAD_DIM], m[V_WIDTH], m[CAPACITY]
    shared = m[N_HEADS] // m[N_KV_HEADS]
    step = max(1, QUERY_ROWS // shared)
    runs = (tokens - skip + step - 1) // step
    part_bytes = 4 * (16 + width)
    running, parts, scores = scratch(m, S_RUNNING, index), scratch(m, S_PARTS, index), scratch(m, S_SCORES, index)
    unit = atomic_add(m[COUNTERS] + COUNT_ATTENTION, 1)
    while unit < runs * m[N_KV_HEADS]:
        head = unit % m[N_KV_HEADS]
        first = skip + (runs - 1 - unit // m[N_KV_HEADS]) * step
        rows = min(step, tokens - first) * shared
        keys, values = keys_of(m, layer, head), values_of(m, layer, head)
        q = m[Q] + 4 * dim * shared * (head * m[CHUNK] + first)
        at = position + first
        for r in range(rows):
            clear(running + r * part_bytes, width)
        for block in range(max(0, at - m[WINDOW] + 1) // BLOCK, (at + (rows - 1) // shared) // BLOCK + 1):
            start = block * BLOCK
            for r in range(0, rows, TALLEST):
                n = min(TALLEST, rows - r)
                if at + (r + n - 1) // shared >= start:
                    attend_block(
                        q + 4 * dim * r, 4 * dim, n, r, at, shared, m[WINDOW], start, capacity, keys, values, dim, width, scores, parts
                    )
                    for i in range(n):
                        merge(running + (r + i) * part_bytes, parts + i * part_bytes, width)
        for r in range(rows):
            out = m[ATT] + 4 * (m[ATT_WIDTH] * (first + r // shared) + dim * (head * shared + r % shared))
            finish(running + r * part_bytes, dim, out)
        unit = atomic_add(m[COUNTERS] + COUNT_ATTENTION, 1)
    end_phase(m, T_ATTENTION, index, members)


@njit(inline=True)
def attention_output(mm, m, layers, layer, tokens, skip, index, members):
    """x += wo @ heads."""
    slot, width, count = layers[layer, WO_SLOT], m[N_HEADS] * m[HEAD_DIM], tokens - skip
    group, act = m[GROUP_0 + slot], scratch(m, S_ACT, index)
    token_bytes, tiles = act_bytes(width, group), n_tiles(count)
    for i in range(index, tiles, members):
        start, end = i * count // tiles, (i + 1) * count // tiles
        for t in range(start, end):
            quantise_row(m[ATT] + 4 * m[ATT_WIDTH] * (skip + t), width, group, act)
            put_in_tile(act, width, group, m[ACTS] + start * token_bytes, end - start, t - start)
    end_phase(m, T_NORM, index, members)
    blocks, x_bytes = blocks_of(m[DIM]), 4 * m[X_WIDTH]
    units = (blocks + UNIT - 1) // UNIT
    unit, end = next_unit(m, COUNT_OUT, units, NONE, NONE, members)
    while unit < units:
        first, last = unit * UNIT, min(unit * UNIT + UNIT, blocks)
        unit, end = next_unit(m, COUNT_OUT, units, unit, end, members)
        follow = weights_at(m, slot, layers[layer, WO], width, min(unit * UNIT, blocks))
        mm(slot, layers[layer, WO], m[DIM], width, first, last, m[ACTS], count, m[Y], x_bytes, scratch(m, S_PANEL, index), follow)
        for t in range(count):
            add_rows(m[X] + x_bytes * (skip + t), m[Y] + x_bytes * t, first, last)
    end_phase(m, T_WO, index, members)


@njit(inline=True)
def choose_experts(mm, m, layers, layer, tokens, skip, part, index, members):
    """Norm, router, quantised rows; then a counting sort of the (token, choice) pairs by expert, and tiles by expert.

    Afterwards: ORDER, the token of each place; RANK, the place of each pair; STARTS, each expert's first place;
    ACTS, the tiles. Tokens count from `skip`.
    """
    active, group = m[N_ACTIVE], m[GROUP_0 + layers[layer, GATE_SLOT]]
    token_bytes, row = act_bytes(m[DIM], group), scratch(m, S_ROW, index)
    for t in range(skip + index, tokens, members):
        norm_and_check(m, m[X] + 4 * m[X_WIDTH] * t, layers[layer, FFN_NORM], layer + 1, row)
        choice = 4 * active * (t - skip)
        route(mm, m, layers, layer, row, scratch(m, S_LOGITS, index), m[CHOICE] + choice, m[CHOICE_WEIGHT] + choice)
        quantise_row(row, m[DIM], group, m[ROWS] + (t - skip) * token_bytes)
        if m[OBSERVED_ROWS]:
            keep_row(row, m[DIM], m[OBSERVED_ROWS] + 4 * m[X_WIDTH] * (t - skip))
        if part:
            guess(mm, m, layers, layer + 1, m[X] + 4 * m[X_WIDTH] * t, row, scratch(m, S_LOGITS, index), m[GUESS] + choice)
    end_phase(m, T_ROUTE, index, members)
    if index == 0:
        sort_by_expert(m, (tokens - skip) * active)
    end_phase(m, T_SORT, index, members)
    turn = 0
    for expert in range(m[N_EXPERTS]):
        begin, count = expert_places(m, expert)
        tiles = n_tiles(count)
        for i in range(tiles):
            turn += 1
            if turn % members == index:
                start, end = i * count // tiles, (i + 1) * count // tiles
                tile = m[ACTS] + (begin + start) * token_bytes
                for place in range(start, end):
                    token = get_i32(m[ORDER] + 4 * (begin + place))
                    put_in_tile(m[ROWS] + token * token_bytes, m[DIM], group, tile, end - start, place - start)
    end_phase(m, T_PACK, index, members)


@njit
def expert_places(m, expert):
    """An expert's first place and its number of places."""
    begin = get_i32(m[STARTS] + 4 * expert)
    return begin, get_i32(m[STARTS] + 4 * (expert + 1)) - begin


@njit(inline=True)
def sort_by_expert(m, pairs):
    """Counting sort of CHOICE; stable, so an expert's places are in token order."""
    for e in range(m[N_EXPERTS] + 1):
        put_i32(m[STARTS] + 4 * e, 0)
    for p in range(pairs):
        at = m[STARTS] + 4 * (get_i32(m[CHOICE] + 4 * p) + 1)
        put_i32(at, get_i32(at) + 1)
    for e in range(m[N_EXPERTS]):
        at = m[STARTS] + 4 * e
        put_i32(at + 4, get_i32(at + 4) + get_i32(at))
    for p in range(pairs):  # STARTS[e] runs through the expert's places, then is set back
        at = m[STARTS] + 4 * get_i32(m[CHOICE] + 4 * p)
        place = get_i32(at)
        put_i32(at, place + 1)
        put_i32(m[ORDER] + 4 * place, p // m[N_ACTIVE])
        put_i32(m[RANK] + 4 * p, place)
    for e in range(m[N_EXPERTS], 0, -1):
        put_i32(m[STARTS] + 4 * e, get_i32(m[STARTS] + 4 * (e - 1)))
    put_i32(m[STARTS], 0)


@njit
def used_expert(m, todo, place):
    """The expert at `place` among those of SELECTED's first `todo` that have tokens, -1 if there are fewer."""
    for i in range(todo):
        expert = get_i32(m[SELECTED] + 4 * i)
        if expert_places(m, expert)[1]:
            if place == 0:
                return expert
            place -= 1
    return -1


@njit(inline=True)
def experts(mm, m, layers, layer, tokens, skip, part, index, members):
    """Every expert on its tokens: gate and up with SwiGLU, down, then each token's weighted sum in expert order."""
    hidden, gate_slot, down = m[HIDDEN_DIM], layers[layer, GATE_SLOT], layers[layer, DOWN_SLOT]
    group = m[GROUP_0 + down]
    in_bytes, h_bytes, x_bytes = act_bytes(m[DIM], m[GROUP_0 + gate_slot]), act_bytes(hidden, group), 4 * m[X_WIDTH]
    gate, up, panel = scratch(m, S_GATE, index), scratch(m, S_UP, index), scratch(m, S_PANEL, index)
    units, todo, used = (hidden + EXPERT_UNIT - 1) // EXPERT_UNIT, part // PART if part else m[N_EXPERTS], 0
    while used_expert(m, todo, used) >= 0:
        used += 1
    item, end = next_unit(m, COUNT_GATE, used * units, NONE, NONE, members)
    while item < used * units:
        expert, unit = used_expert(m, todo, item // units), item % units
        item, end = next_unit(m, COUNT_GATE, used * units, item, end, members)
        after = min(item, used * units - 1)
        follow = gate_at(m, layers, layer, used_expert(m, todo, after // units), after % units)
        begin, count = expert_places(m, expert)
        expert_units(mm, m, layers, layer, expert, unit, ONE, m[ACTS] + begin * in_bytes, count, gate, up, panel, follow)
        if m[OBSERVED_HIDDEN]:
            keep_units(gate, count, unit, hidden, m[OBSERVED_HIDDEN], begin)
        tiles = n_tiles(count)
        for i in range(tiles):
            start, last = i * count // tiles, (i + 1) * count // tiles
            tile = m[H_ACTS] + (begin + start) * h_bytes
            for t in range(start, last):
                unit_to_acts(gate + 4 * EXPERT_UNIT * t, unit, hidden, group, tile, last - start, t - start)
    end_phase(m, T_GATE_UP, index, members)
    blocks = blocks_of(m[DIM])
    units = (blocks + UNIT - 1) // UNIT
    item, end = next_unit(m, COUNT_DOWN, used * units, NONE, NONE, members)
    while item < used * units:
        expert, first = used_expert(m, todo, item // units), item % units * UNIT
        item, end = next_unit(m, COUNT_DOWN, used * units, item, end, members)
        after = min(item, used * units - 1)
        follow = weights_at(m, down, layers[layer, EXPERTS + 3 * used_expert(m, todo, after // units) + 2], hidden, after % units * UNIT)
        begin, count = expert_places(m, expert)
        w, h = layers[layer, EXPERTS + 3 * expert + 2], m[H_ACTS] + begin * h_bytes
        mm(down, w, m[DIM], hidden, first, min(first + UNIT, blocks), h, count, m[Y] + begin * x_bytes, x_bytes, panel, follow)
    end_phase(m, T_DOWN, index, members)
    if index == 0:
        for at in range(0, COUNTERS_BYTES, 64):  # for the next layer; nobody counts now
            put_i64(m[COUNTERS] + at, NONE)
    for t in range(index, tokens if part == 0 or part & SUM else 0, members):
        x = m[X] + x_bytes * (skip + t)
        pair = 4 * m[N_ACTIVE] * t
        for k in range(0, 64 * blocks, 64):
            total = splat_f32(F(0.0))
            for a in range(m[N_ACTIVE]):
                y = load_f32(m[Y] + x_bytes * get_i32(m[RANK] + pair + 4 * a) + k)
                total = fma(splat_f32(get_f32(m[CHOICE_WEIGHT] + pair + 4 * a)), y, total)
            store_f32(x + k, add(load_f32(x + k), total))
    end_phase(m, T_SUM, index, members)
