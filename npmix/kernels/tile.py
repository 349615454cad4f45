"""Inner loops of the matrix products: R row blocks (or rows) by h tokens, accumulators in registers.

One hard fact: the summation law stands here and nowhere else, and does not know R or h, so one token
alone (decode), six of a tile (prefill) and any split over threads give the same bits:

    packed   y = 0; for each run of SHARED inputs in order:  s = 0; for each of its groups g in order:
             s = fma(float(int_g), w_scale[g], s); then  y = fma(s, x_scale of the run, y)
             int_g is the exact integer dot of the group, in any order
    dense    16 lanes, lane k % 16, k ascending by fma; then lanes added by halves (8, 4, 2, 1);
             the last cols % 16 inputs enter as one more vector that ends at the row's end

Each tile is an operation with its NumPy twin; loops are emitted as IR because as many accumulators
as 24 must stay in registers, which a Python body cannot promise.

Activations of a tile of h tokens ("acts") lie together, `act_bytes` per token:
    packed   codes int8 [cols_padded / 4][h][4], x_scale float32 [runs][h], starts int32 [groups][h] (START * sum of the group's codes)
    dense    float32 [h][cols_padded], padding zero
"""

import contextlib
import functools

import numpy as np
from numba.core import cgutils

from ..formats import PACKED, SHARED, span_bytes
from . import cpu
from .dot import NARROW_DOTS, emit_dot4, emit_dot_narrow, emit_dot_start, emit_splat4, emit_widen, has_narrow, takes_high_nibbles
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

# The tallest tile: 2 row blocks x 6 tokens are 12 integer and 12 float accumulators of AVX-512's 32 registers (the totals of
# earlier runs are touched once in SHARED inputs and may lie on the stack); where 16 lanes take several registers, 1 x 4 keeps
# the integer ones from spilling.
BLOCKS, HEIGHT = (2, 6) if cpu.wide_registers() else (1, 4)
# Up to FEW tokens take SINGLE row blocks: each broadcast of inputs feeds 4 dots, and fewer instructions a byte keep more bytes in flight.
SINGLE, FEW = 4 if cpu.is_x86() else 1, 3 if cpu.wide_registers() else 1
AHEAD = 4096 if cpu.fetches_ahead() else 0  # bytes a single token's tile fetches ahead


# ---- packed ------------------------------------------------------------------------------------


def _unpack_line(builder, name, line, raw):
    """The vectors of codes in one 64-byte line, in the order of their inputs. raw: leave high nibbles where they are, times 16."""
    if name == "q8":
        return [line]
    if raw:
        return [builder.and_(line, const_vector("i8", 64, 15)), builder.and_(line, const_vector("i8", 64, -16))]
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

    def emit(builder, *args):
        _PackedLoops(builder, name, group, blocks, height, *args).emit()

    return op(void, (i64,) * 7, _packed_twin(name, group, blocks, height))(emit)


class _PackedLoops:
    """The loops of one packed tile, being written into a function: runs of SHARED inputs, their groups, the lines of a group."""

    def __init__(self, builder, name, group, blocks, height, w, block_bytes, n_groups, acts, out, out_bytes, next_block):
        self.builder, self.name, self.group, self.height = builder, name, group, height
        self.n_groups, self.acts = n_groups, acts
        self.out, self.out_bytes, self.next_block = out, out_bytes, next_block
        self.cells = [(r, t) for r in range(blocks) for t in range(height)]
        self.zero, self.step = PACKED[name].zero, PACKED[name].step
        self.lines, self.run_groups = group // self.step, SHARED // group
        self.raw = name == "q4" and height == 1 and takes_high_nibbles()  # a shift a group instead of one a line
        narrow = has_narrow(self.zero)
        # few cells: split sums, or the dot's latency shows
        self.chains = 1 if narrow else 2 if self.raw else max(1, min(4, 8 // len(self.cells)))
        dots = self.lines * len(self.cells) * self.step // 4
        self.unroll = NARROW_DOTS * 4 // self.step if narrow else self.lines if dots <= 96 else min(self.lines, 4)

        self.scales = builder.add(acts, builder.mul(n_groups, const_i64(group * height)))
        self.runs = builder.udiv(builder.add(n_groups, const_i64(self.run_groups - 1)), const_i64(self.run_groups))
        self.starts = builder.add(self.scales, builder.mul(self.runs, const_i64(4 * height)))
        self.rows = [builder.add(w, builder.mul(block_bytes, const_i64(r))) for r in range(blocks)]
        self.total = {c: cgutils.alloca_once_value(builder, const_vector("f32", 16, 0.0)) for c in self.cells}
        self.scaled = {c: cgutils.alloca_once(builder, vector("f32", 16)) for c in self.cells}
        self.part = {(c, k): cgutils.alloca_once(builder, vector("i32", 16)) for c in self.cells for k in range(self.chains)}
        self.narrow = {c: cgutils.alloca_once(builder, vector("i16", 32)) for c in self.cells} if narrow else {}

    def emit(self):
        builder, full = self.builder, const_i64(self.run_groups)
        if self.height == 1 and len(self.rows) == SINGLE:  # little work a byte: without inner loops more bytes are in flight
            with self.loop(builder.udiv(self.n_groups, full)) as index:
                self.run(index, builder.mul(index, full), self.run_groups)
            if self.run_groups > 2:  # a last run of half the length
                with builder.if_then(builder.trunc(builder.lshr(self.n_groups, const_i64(1)), scalar("i1"))):
                    self.run(builder.sub(self.runs, const_i64(1)), builder.sub(self.n_groups, const_i64(2)), 2)
        else:
            with self.loop(self.runs) as index:
                first = builder.mul(index, full)
                left = builder.sub(self.n_groups, first)
                self.run(index, first, builder.select(builder.icmp_signed("<", left, full), left, full))
        for r, t in self.cells:
            at = builder.add(builder.mul(self.out_bytes, const_i64(t)), builder.mul(self.next_block, const_i64(r)))
            store(builder, builder.load(self.total[r, t]), builder.add(self.out, at))

    @contextlib.contextmanager
    def loop(self, count):
        with cgutils.for_range(self.builder, count, intp=scalar("i64")) as loop:
            yield loop.index

    def run(self, index, first, count):
        """One run of inputs that share an activation scale: `count` groups (a number, or an i64) from group `first`."""
        builder = self.builder
        for cell in self.scaled.values():
            builder.store(const_vector("f32", 16, 0.0), cell)
        if isinstance(count, int):
            for i in range(count):
                self.group_of(builder.add(first, const_i64(i)))
        else:
            with self.loop(count) as i:
                self.group_of(builder.add(first, i))
        at = builder.add(self.scales, builder.mul(index, const_i64(4 * self.height)))
        for r, t in self.cells:
            x_scale = splat(builder, load(builder, builder.add(at, const_i64(4 * t)), scalar("f32")))
            value = emit_fma(builder, builder.load(self.scaled[r, t]), x_scale, builder.load(self.total[r, t]))
            builder.store(value, self.total[r, t])

    def group_of(self, g):
        """One group: exact integers by lines, then scaled and added."""
        builder, half = self.builder, self.builder.and_(g, const_i64(1))
        span = builder.mul(builder.lshr(g, const_i64(1)), const_i64(span_bytes(self.name, self.group)))
        codes_at = builder.add(span, builder.add(const_i64(64), builder.mul(half, const_i64(self.lines * 64))))
        inputs = builder.add(self.acts, builder.mul(g, const_i64(self.group * self.height)))
        start_at = builder.add(self.starts, builder.mul(g, const_i64(4 * self.height)))
        for r, t in self.cells:
            start = emit_dot_start(builder, builder.add(start_at, const_i64(4 * t)), self.zero)
            for k in range(self.chains):
                builder.store(start if k == 0 else const_vector("i32", 16, 0), self.part[(r, t), k])
        with self.loop(const_i64(self.lines // self.unroll)) as index:
            first = builder.mul(index, const_i64(self.unroll))
            for cell in self.narrow.values():
                builder.store(const_vector("i16", 32, 0), cell)
            for i in range(self.unroll):
                line = builder.add(first, const_i64(i))
                at = builder.add(codes_at, builder.mul(line, const_i64(64)))
                self.line(at, i, builder.add(inputs, builder.mul(line, const_i64(self.step * self.height))))
            for c, cell in self.narrow.items():
                builder.store(emit_widen(builder, builder.load(self.part[c, 0]), builder.load(cell)), self.part[c, 0])
        scale_at = builder.add(span, builder.mul(half, const_i64(32)))
        w_scale = [emit_load_f16(builder, builder.add(b, scale_at)) for b in self.rows]
        for c in self.cells:
            exact = builder.sitofp(self.exact(c), vector("f32", 16))
            builder.store(emit_fma(builder, exact, w_scale[c[0]], builder.load(self.scaled[c])), self.scaled[c])

    def line(self, at, index, inputs):
        """One line of each row block against its inputs of every token; `inputs` is their address."""
        builder, dots = self.builder, self.step // 4
        if self.height == 1 and AHEAD:
            for b in self.rows:
                prefetch(builder, builder.add(builder.add(b, at), const_i64(AHEAD)))
        codes = [_unpack_line(builder, self.name, load(builder, builder.add(b, at), vector("i8", 64)), self.raw) for b in self.rows]
        for j in range(dots):
            for t in range(self.height):
                x = emit_splat4(builder, builder.add(inputs, const_i64(4 * (j * self.height + t))))
                for r in range(len(self.rows)):
                    if self.narrow:
                        cell = self.narrow[r, t]
                        builder.store(emit_dot_narrow(builder, builder.load(cell), codes[r][j], x), cell)
                    else:
                        cell = self.part[(r, t), (index * dots + j) % self.chains]
                        builder.store(emit_dot4(builder, builder.load(cell), codes[r][j], x, self.zero), cell)

    def exact(self, cell):
        """The integer of the group, from its chains."""
        sums = [self.builder.load(self.part[cell, k]) for k in range(self.chains)]
        if self.raw:  # the second chain took the high nibbles, times 16
            sums[1] = self.builder.ashr(sums[1], const_vector("i32", 16, 4))
        return functools.reduce(self.builder.add, sums)


def _packed_twin(name, group, blocks, height):
    def twin(w, block_bytes, n_groups, acts, out, out_bytes, next_block):
        codes, w_scale = zip(*(twin_row_block(name, group, w + r * block_bytes, n_groups) for r in range(blocks)))
        codes, w_scale = np.concatenate(codes), np.concatenate(w_scale)
        cols = n_groups * group
        x = peek(acts, np.int8, height * cols).reshape(-1, height, 4).transpose(1, 0, 2).reshape(height, n_groups, group)
        x_scale = peek(acts + height * cols, np.float32, -(-cols // SHARED) * height).reshape(-1, height)
        y = np.zeros((height, 16 * blocks), np.float32)
        for run, first in enumerate(range(0, n_groups, SHARED // group)):
            scaled = np.zeros_like(y)
            for g in range(first, min(first + SHARED // group, n_groups)):
                exact = x[:, g].astype(np.int32) @ codes[:, g].T
                scaled = twin_fma(exact.astype(np.float32), w_scale[None, :, g], scaled)
            y = twin_fma(scaled, x_scale[run][:, None], y)
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
