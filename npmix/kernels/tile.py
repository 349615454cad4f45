"""Inner loops of the matrix products: R row blocks (or rows) by h tokens, accumulators in registers.

One hard fact: the summation law stands here and nowhere else, and does not know R or h, so one token
alone (decode), six of a tile (prefill) and any split over threads give the same bits:

    packed   y = 0; for each group g in order:  y = fma(float(int_g), w_scale[g] * x_scale[g], y)
             int_g is the exact integer dot of the group, in any order
    dense    16 lanes, lane k % 16, k ascending by fma; then lanes added by halves (8, 4, 2, 1);
             the last cols % 16 inputs enter as one more vector that ends at the row's end

Each tile is an operation with its NumPy twin; loops are emitted as IR because as many accumulators
as 24 must stay in registers, which a Python body cannot promise.

Activations of a tile of h tokens ("acts") lie together, `act_bytes` per token:
    packed   codes int8 [cols_padded / 4][h][4], x_scale float32 [groups][h], sums int32 [groups][h]
    dense    float32 [h][cols_padded], padding zero
"""

import functools

import numpy as np
from numba.core import cgutils

from ..formats import PACKED, span_bytes
from . import cpu
from .dot import NARROW_DOTS, emit_dot4, emit_dot_narrow, emit_dot_start, emit_splat4, emit_widen, has_narrow
from .simd import (
    const_i64,
    const_vector,
    emit_fma,
    emit_load_bf16,
    emit_load_f16,
    emit_reduce_add,
    i64,
    load,
    op,
    peek,
    poke,
    prefetch,
    scalar,
    splat,
    store,
    twin_bf16,
    twin_fma,
    twin_reduce_add,
    vector,
    void,
)

# The tallest tile: 2 row blocks x 6 tokens are 12 integer and 12 float accumulators of AVX-512's 32 registers;
# where 16 lanes take several registers, 1 x 4 keeps the integer ones from spilling.
BLOCKS, HEIGHT = (2, 6) if cpu.wide_registers() else (1, 4)
AHEAD = 4096  # bytes a single token's tile fetches ahead: hardware stops at the end of a 4 KiB page


# ---- packed ------------------------------------------------------------------------------------


def _unpack_line(builder, name, line):
    """The vectors of codes in one 64-byte line, in the order of their inputs."""
    if name == "q8":
        return [line]
    wide = builder.bitcast(line, vector("i16", 32))
    high = builder.bitcast(builder.lshr(wide, const_vector("i16", 32, 4)), vector("i8", 64))
    mask = const_vector("i8", 64, 15)
    return [builder.and_(line, mask), builder.and_(high, mask)]


@functools.lru_cache(maxsize=None)
def packed_tile(name, group, blocks, height):
    """op(w, block_bytes, n_groups, acts, out, out_bytes, next_block): `blocks` row blocks by `height` tokens of a packed matrix.

    w: address of the first row block, block_bytes apart. out: float32, token t's 16 rows of block r at
    out + t * out_bytes + r * next_block (bytes). With block_bytes and next_block 0 one block is done twice.
    """
    zero, step = PACKED[name].zero, PACKED[name].step
    whole, lines = span_bytes(name, group), group // PACKED[name].step
    cells = [(r, t) for r in range(blocks) for t in range(height)]
    chains = 1 if has_narrow(zero) else max(1, min(4, 8 // len(cells)))  # few cells: split each sum, or the dot's latency shows
    unroll = lines if lines * len(cells) * step // 4 <= 96 else min(lines, 4)
    unroll = NARROW_DOTS * 4 // step if has_narrow(zero) else unroll

    def emit(builder, w, block_bytes, n_groups, acts, out, out_bytes, next_block):
        f32x16, i32x16 = vector("f32", 16), vector("i32", 16)
        count = builder.mul(n_groups, const_i64(group * height))
        scales = builder.add(acts, count)
        sums = builder.add(scales, builder.mul(n_groups, const_i64(4 * height)))
        total = {c: cgutils.alloca_once_value(builder, const_vector("f32", 16, 0.0)) for c in cells}
        part = {(c, k): cgutils.alloca_once(builder, i32x16) for c in cells for k in range(chains)}
        narrow = {c: cgutils.alloca_once(builder, vector("i16", 32)) for c in cells} if has_narrow(zero) else {}
        bases = [builder.add(w, builder.mul(block_bytes, const_i64(r))) for r in range(blocks)]

        def dot_line(at, line_index, inputs):
            """One line of each row block against its inputs of every token; `inputs` is their address."""
            if len(cells) == 1:
                for b in bases:
                    prefetch(builder, builder.add(builder.add(b, at), const_i64(AHEAD)))
            codes = [_unpack_line(builder, name, load(builder, builder.add(b, at), vector("i8", 64))) for b in bases]
            for j in range(step // 4):
                for t in range(height):
                    x = emit_splat4(builder, builder.add(inputs, const_i64(4 * (j * height + t))))
                    for r in range(blocks):
                        if narrow:
                            cell = narrow[r, t]
                            builder.store(emit_dot_narrow(builder, builder.load(cell), codes[r][j], x), cell)
                        else:
                            cell = part[(r, t), (line_index * (step // 4) + j) % chains]
                            builder.store(emit_dot4(builder, builder.load(cell), codes[r][j], x, zero), cell)

        def group_of(g, span, half):
            """One group: exact integers by lines, then scaled into the totals. half: 0 or 1, which group of the span."""
            codes_at = builder.add(span, builder.add(const_i64(64), builder.mul(half, const_i64(lines * 64))))
            inputs = builder.add(acts, builder.mul(g, const_i64(group * height)))
            per_token = builder.mul(g, const_i64(4 * height))
            for t in range(height):
                at = builder.add(sums, builder.add(per_token, const_i64(4 * t)))
                start = emit_dot_start(builder, load(builder, at, scalar("i32")), zero)
                for r in range(blocks):
                    for k in range(chains):
                        builder.store(start if k == 0 else const_vector("i32", 16, 0), part[(r, t), k])
            with cgutils.for_range(builder, const_i64(lines // unroll), intp=scalar("i64")) as inner:
                first = builder.mul(inner.index, const_i64(unroll))
                for cell in narrow.values():
                    builder.store(const_vector("i16", 32, 0), cell)
                for i in range(unroll):
                    line = builder.add(first, const_i64(i))
                    at = builder.add(codes_at, builder.mul(line, const_i64(64)))
                    dot_line(at, i, builder.add(inputs, builder.mul(line, const_i64(step * height))))
                for c, cell in narrow.items():
                    builder.store(emit_widen(builder, builder.load(part[c, 0]), builder.load(cell)), part[c, 0])
            scale_at = builder.add(span, builder.mul(half, const_i64(32)))
            w_scale = [emit_load_f16(builder, builder.add(b, scale_at)) for b in bases]
            for t in range(height):
                at = builder.add(scales, builder.add(per_token, const_i64(4 * t)))
                x_scale = splat(builder, load(builder, at, scalar("f32")))
                for r in range(blocks):
                    exact = builder.load(part[(r, t), 0])
                    for k in range(1, chains):
                        exact = builder.add(exact, builder.load(part[(r, t), k]))
                    cell = total[r, t]
                    scale = builder.fmul(w_scale[r], x_scale)
                    builder.store(emit_fma(builder, builder.sitofp(exact, f32x16), scale, builder.load(cell)), cell)

        with cgutils.for_range(builder, builder.lshr(n_groups, const_i64(1)), intp=scalar("i64")) as loop:
            span, g = builder.mul(loop.index, const_i64(whole)), builder.shl(loop.index, const_i64(1))
            if len(cells) <= 2:  # little work a byte: without the inner loop more bytes are in flight
                for i in range(2):
                    group_of(builder.add(g, const_i64(i)), span, const_i64(i))
            else:
                with cgutils.for_range(builder, const_i64(2), intp=scalar("i64")) as inner:
                    group_of(builder.add(g, inner.index), span, inner.index)
        for r, t in cells:
            at = builder.add(builder.mul(out_bytes, const_i64(t)), builder.mul(next_block, const_i64(r)))
            store(builder, builder.load(total[r, t]), builder.add(out, at))

    return op(void, (i64,) * 7, _packed_twin(name, group, blocks, height))(emit)


def _packed_twin(name, group, blocks, height):
    def twin(w, block_bytes, n_groups, acts, out, out_bytes, next_block):
        codes, w_scale = zip(*(twin_row_block(name, group, w + r * block_bytes, n_groups) for r in range(blocks)))
        codes, w_scale = np.concatenate(codes), np.concatenate(w_scale)
        cols = n_groups * group
        x = peek(acts, np.int8, height * cols).reshape(-1, height, 4).transpose(1, 0, 2).reshape(height, n_groups, group)
        x_scale = peek(acts + height * cols, np.float32, n_groups * height).reshape(n_groups, height)
        y = np.zeros((height, 16 * blocks), np.float32)
        for g in range(n_groups):
            exact = x[:, g].astype(np.int32) @ codes[:, g].T
            y = twin_fma(exact.astype(np.float32), w_scale[None, :, g] * x_scale[g][:, None], y)
        for t in range(height):
            for r in range(blocks):
                poke(out + t * out_bytes + r * next_block, y[t, 16 * r : 16 * r + 16])

    return twin


def twin_row_block(name, group, address, n_groups):
    """One row block's int8 values (16, n_groups, group) as int32 and its scales (16, n_groups) as float32."""
    spans = n_groups // 2
    data = peek(address, np.uint8, spans * span_bytes(name, group)).reshape(spans, -1)
    scales = data[:, :64].copy().view(np.float16).reshape(n_groups, 16).T.astype(np.float32)
    lines = data[:, 64:].reshape(n_groups, -1, 16, 4)
    if name == "q4":
        lines = np.stack([lines & 15, lines >> 4], axis=2).reshape(n_groups, -1, 16, 4)
    codes = lines.transpose(2, 0, 1, 3).reshape(16, n_groups, group)
    return codes.astype(np.int32) - PACKED[name].zero, scales


# ---- dense -------------------------------------------------------------------------------------

_DENSE_LOAD = {
    "f32": (4, lambda b, p: load(b, p, vector("f32", 16)), lambda p, n: peek(p, np.float32, n)),
    "f16": (2, emit_load_f16, lambda p, n: peek(p, np.float16, n).astype(np.float32)),
    "bf16": (2, emit_load_bf16, lambda p, n: twin_bf16(peek(p, np.uint16, n))),
}


@functools.lru_cache(maxsize=None)
def dense_tile(name, rows, height):
    """op(w, row_bytes, cols, acts, act_bytes, out, out_bytes, next_row): `rows` rows by `height` tokens, cols >= 16.

    Row r lies at w + r * row_bytes; its result goes to out + t * out_bytes + r * next_row. Both 0: one row, done over.
    """
    size, emit_load, twin_load = _DENSE_LOAD[name]
    cells = [(r, t) for r in range(rows) for t in range(height)]

    def emit(builder, w, row_bytes, cols, acts, act_bytes, out, out_bytes, next_row):
        total = {c: cgutils.alloca_once_value(builder, const_vector("f32", 16, 0.0)) for c in cells}
        w_rows = [builder.add(w, builder.mul(row_bytes, const_i64(r))) for r in range(rows)]
        x_rows = [builder.add(acts, builder.mul(act_bytes, const_i64(t))) for t in range(height)]

        def accumulate(k, keep):
            at = builder.mul(k, const_i64(size))
            ws = [keep(emit_load(builder, builder.add(p, at))) for p in w_rows]
            for t in range(height):
                x = load(builder, builder.add(x_rows[t], builder.mul(k, const_i64(4))), vector("f32", 16))
                x = keep(x)
                for r in range(rows):
                    builder.store(emit_fma(builder, ws[r], x, builder.load(total[r, t])), total[r, t])

        with cgutils.for_range(builder, builder.lshr(cols, const_i64(4)), intp=scalar("i64")) as loop:
            accumulate(builder.mul(loop.index, const_i64(16)), lambda v: v)
        tail = builder.and_(cols, const_i64(15))
        with builder.if_then(builder.icmp_signed("!=", tail, const_i64(0))):
            new = builder.icmp_signed(">=", const_vector("i64", 16, list(range(16))), splat(builder, builder.sub(const_i64(16), tail)))
            zero = const_vector("f32", 16, 0.0)
            accumulate(builder.sub(cols, const_i64(16)), lambda v: builder.select(new, v, zero))
        for r, t in cells:
            at = builder.add(builder.mul(out_bytes, const_i64(t)), builder.mul(next_row, const_i64(r)))
            store(builder, emit_reduce_add(builder, builder.load(total[r, t])), builder.add(out, at))

    def twin(w, row_bytes, cols, acts, act_bytes, out, out_bytes, next_row):
        m = np.stack([twin_load(w + r * row_bytes, cols) for r in range(rows)])
        x = np.stack([peek(acts + t * act_bytes, np.float32, cols) for t in range(height)])
        y = np.zeros((height, rows, 16), np.float32)
        for k in range(0, cols - 15, 16):
            y = twin_fma(x[:, None, k : k + 16], m[None, :, k : k + 16], y)
        if cols % 16:
            new = np.arange(16) >= 16 - cols % 16
            y = twin_fma(np.where(new, x[:, None, -16:], 0), np.where(new, m[None, :, -16:], 0), y)
        y = twin_reduce_add(y)
        for t in range(height):
            for r in range(rows):
                poke(out + t * out_bytes + r * next_row, y[t, r : r + 1])

    return op(void, (i64,) * 8, twin)(emit)
