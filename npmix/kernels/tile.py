"""Inner loops of the matrix products: R row blocks (or rows) by h tokens, accumulators in registers.

One hard fact: the summation law stands here and nowhere else, and does not know R or h, so one token
alone (decode), six of a tile (prefill) and any split over threads give the same bits:

    packed   y = 0; for each group g in order:  y = fma(float(int_g) * w_scale[g], x_scale[g], y)
             int_g is the exact integer dot of the group, in any order
    dense    16 lanes, lane k % 16, k ascending by fma; then lanes added by halves (8, 4, 2, 1);
             the last cols % 16 inputs enter as one more vector that ends at the row's end

Each tile is an operation with its NumPy twin; loops are emitted as IR because as many accumulators
as 24 must stay in registers, which a Python body cannot promise.

Activations of a tile of h tokens ("acts") lie together, `act_bytes` per token:
    packed   codes int8 [cols_padded / 4][h][4], x_scale float32 [groups][h], starts int32 [groups][h] (`dot.emit_dot_start`)
    dense    float32 [h][cols_padded], padding zero
"""

import contextlib
import functools

import numpy as np
from numba.core import cgutils

from ..formats import CHUNK, span_bytes
from . import cpu
from .dot import emit_dot4, emit_dot_multiplied, emit_dot_start, emit_excess, emit_less, emit_scaled, emit_splat4
from .outline import outlined
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
    share,
    splat,
    store,
    twin_bf16,
    twin_fma,
    twin_reduce_add,
    vector,
    void,
)
from .unpack import Unpacker, twin_row_block

# The tallest tile over a panel: 2 row blocks x 6 tokens are 12 integer and 12 float accumulators of AVX-512's 32 registers (the float ones
# are touched once a group and may lie on the stack); where 16 lanes take several registers, 1 x 4 keeps
# the integer ones from spilling.
BLOCKS, HEIGHT = (2, 6) if cpu.wide_registers() else (1, 4)
# The tallest tile straight from memory: the more tokens, the fewer times a row block is unpacked, and while one passes a second time, memory
# rests: 9 to 12 tokens at once take a fifth less time than in two tiles, though from the cache those are as fast.
TALLEST = 12 if cpu.wide_registers() else 4
# Lines that a tile over a panel asks for in each group: so many that few tiles, too, ask for nearly all that comes next. Not all at once: what
# finds no place in its queue Zen 5 forgets.
FETCHES = 8 if cpu.wide_registers() else 16
UNROLLED = 128  # dots that are written out rather than looped over, if a chunk of inputs has no more


# ---- packed ------------------------------------------------------------------------------------


def singles(name):
    """Row blocks that one token takes at a time.

    Four of q8 and q4: each broadcast of inputs feeds 4 dots, and fewer instructions a byte keep more bytes in flight. Where a
    vector costs more instructions than that saves, one stream of weights is read 14-31 % faster than four; so it is where
    software fetches it from afar.
    """
    return 4 if cpu.is_x86() and cpu.prefetching() != "far" and name in ("q8", "q4") else 1


def in_panel(blocks, height):
    """Whether a tile's weights lie in a panel."""
    return height > 1 and (blocks > 1 or not cpu.wide_registers())


def ahead_of(blocks, height):
    """What a tile asks for beside each chunk, nothing of a panel: (bytes ahead, into which caches, how many lines) each.

    Caches are as in `simd.prefetch`; None lines are all of a chunk's.
    Sums of several tokens fill the window in which a processor looks ahead for what it must load: with one stream of weights and
    8 KiB ahead prompts of 16 to 64 tokens take a fifth less time; with two streams, or 1 KiB ahead, more than without. Zen 5
    gains with one token too, from fetching into the first cache; a single line of each chunk still further ahead sets off the
    processor's own fetching there. Distances that are good while its memory is slow and while it is fast differ: these are both's.
    """
    if in_panel(blocks, height):
        return ()
    if cpu.prefetching() == "far":
        if height == 1:
            return (6144, 3, None), (10240, 3, 1)
        return (8192 if height == 2 else 12288, 3, None), (65536, 2, 1) if height < 5 else (16384, 3, 1)
    if height > 1:
        return ((8192, 2, None),)
    return ((4096, 3, None),) if cpu.prefetching() == "near" else ()


@outlined
def packed_tile(name, group, blocks, height, offset=128):
    """op(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step): `blocks` row blocks by `height` tokens.

    w: address of the first row block, block_bytes apart. out: float32, token t's 16 rows of block r at
    out + t * out_bytes + r * next_block (bytes). With block_bytes and next_block 0 one block is done twice.
    ahead: what a tile over a panel fetches meanwhile: FETCHES lines a group, ahead_step bytes from one to the next. Other tiles of
    several tokens fetch their own stream (`ahead_of`), so many bytes further, and what lies past their row block's end ahead_step bytes
    from there; those of one token ignore both.
    offset: of the codes of a panel (`unpack.unpack_block`); 128 elsewhere.
    """

    def emit(builder, *args):
        _PackedLoops(builder, name, group, blocks, height, offset, *args).emit()

    return op(void, (i64,) * 9, _packed_twin(name, group, blocks, height, offset))(emit)


class _PackedLoops:
    """The loops of one packed tile, being written into a function: groups, their chunks, the vectors of a chunk."""

    def __init__(
        self, builder, name, group, blocks, height, offset, w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step
    ):
        self.builder, self.name, self.group, self.height, self.offset = builder, name, group, height, offset
        self.n_groups, self.acts, self.in_panel = n_groups, acts, in_panel(blocks, height)
        self.out, self.out_bytes, self.next_block = out, out_bytes, next_block
        self.cells = [(r, t) for r in range(blocks) for t in range(height)]
        self.ahead = ahead_of(blocks, height)
        self.next = (ahead, ahead_step)  # a tile's own stream, or what comes after a panel: never both
        self.whole = builder.mul(n_groups, const_i64(span_bytes(name, group) // 2))
        self.source = Unpacker(builder, name, group, height)
        self.chains = 4 if len(self.cells) < 3 else 2 if len(self.cells) < 8 else 1  # few cells: split sums, or the dot's latency shows
        if cpu.form() == "avx2":
            self.chains = 1  # its dots end in an addition, and it has half the registers
        self.chunks = group // CHUNK
        self.unroll = self.chunks  # chunks written out one after the other
        written = UNROLLED if self.in_panel else max(UNROLLED, 2 * (CHUNK // 4) * len(self.cells))  # from memory no fewer than two
        while self.unroll > 1 and self.unroll * (CHUNK // 4) * len(self.cells) > written:
            self.unroll //= 2

        # few registers and much work: LLVM would order a long run of code by tokens, with every vector on the stack meanwhile
        self.by_vectors = not (self.source.spec.values or cpu.wide_registers() or height == 1)

        self.scales = builder.add(acts, builder.mul(n_groups, const_i64(group * height)))
        self.starts = builder.add(self.scales, builder.mul(n_groups, const_i64(4 * height)))
        self.rows = [builder.add(w, builder.mul(block_bytes, const_i64(r))) for r in range(blocks)]
        self.total = {c: cgutils.alloca_once_value(builder, const_vector("f32", 16, 0.0)) for c in self.cells}
        self.excess = None  # of each sub-block of a group's inputs
        if self.source.by_sub_blocks and height == 1 and self.source.spec.per <= 8:
            self.excess = builder.ptrtoint(cgutils.alloca_once(builder, scalar("i8"), size=group), scalar("i64"))
        self.part = {(c, k): cgutils.alloca_once(builder, vector("i32", 16)) for c in self.cells for k in range(self.chains)}

    def emit(self):
        builder = self.builder
        with self.loop(self.n_groups) as g:
            self.group_of(g)
        for r, t in self.cells:
            at = builder.add(builder.mul(self.out_bytes, const_i64(t)), builder.mul(self.next_block, const_i64(r)))
            store(builder, builder.load(self.total[r, t]), builder.add(self.out, at))

    @contextlib.contextmanager
    def loop(self, count):
        with cgutils.for_range(self.builder, count, intp=scalar("i64")) as loop:
            yield loop.index

    def group_of(self, g):
        """One group: exact integers chunk by chunk, then scaled and added."""
        builder, half = self.builder, self.builder.and_(g, const_i64(1))
        span = builder.mul(builder.lshr(g, const_i64(1)), const_i64(span_bytes(self.name, self.group)))
        self.group_at = builder.mul(g, const_i64(span_bytes(self.name, self.group) // 2))
        places = [builder.add(span, place) for place in self.source.places(half)]
        inputs = builder.add(self.acts, builder.mul(g, const_i64(self.group * self.height)))
        self.g = g
        start_at = builder.add(self.starts, builder.mul(g, const_i64(4 * self.height)))
        for r, t in self.cells:
            start = emit_dot_start(builder, builder.add(start_at, const_i64(4 * t)), self.offset)
            for k in range(self.chains):
                builder.store(start if k == 0 else const_vector("i32", 16, 0), self.part[(r, t), k])
        if self.excess:
            for at in range(0, self.group, 32):
                x = load(builder, builder.add(inputs, const_i64(at)), vector("i8", 32))
                sums = emit_excess(builder, x, -self.source.lowest, self.source.spec.per // 4)
                store(builder, sums, builder.add(self.excess, const_i64(at)))
        if self.by_vectors:
            self.fetch(self.lines_of_panel(const_i64(0), FETCHES))
            with self.loop(const_i64(self.group // 4)) as index:
                self.vector(places, inputs, index)
        elif self.unroll == self.chunks:
            for i in range(self.chunks):
                self.chunk(places, inputs, const_i64(i))
        else:
            with self.loop(const_i64(self.chunks // self.unroll)) as index:
                for i in range(self.unroll):
                    self.chunk(places, inputs, builder.add(builder.mul(index, const_i64(self.unroll)), const_i64(i)))
        scale_at = builder.add(span, builder.mul(half, const_i64(32)))
        w_scale = [emit_load_f16(builder, builder.add(b, scale_at)) for b in self.rows]
        less = [emit_less(builder, scale) if self.group > CHUNK else None for scale in w_scale]
        x_at = builder.add(self.scales, builder.mul(g, const_i64(4 * self.height)))
        for r, t in self.cells:
            exact = functools.reduce(builder.add, [builder.load(self.part[(r, t), k]) for k in range(self.chains)])
            x_scale = splat(builder, load(builder, builder.add(x_at, const_i64(4 * t)), scalar("f32")))
            scaled = emit_scaled(builder, exact, w_scale[r], less[r])
            builder.store(emit_fma(builder, scaled, x_scale, builder.load(self.total[r, t])), self.total[r, t])

    def vector(self, places, inputs, index):
        """One vector of each row block of q8 against its inputs of every token."""
        builder = self.builder
        at = builder.add(places[0], builder.mul(index, const_i64(64)))
        inputs = builder.add(inputs, builder.mul(index, const_i64(4 * self.height)))
        vectors = [load(builder, builder.add(b, at), vector("i8", 64)) for b in self.rows]
        for t in range(self.height):
            x = emit_splat4(builder, builder.add(inputs, const_i64(4 * t)))
            for r, w in enumerate(vectors):
                cell = self.part[(r, t), 0]
                builder.store(emit_dot4(builder, builder.load(cell), w, x, self.offset), cell)

    def lines_ahead(self, index):
        """What to fetch within chunk `index`: (address, into which caches) of each line."""
        builder, each = self.builder, span_bytes(self.name, self.group) // 2 // self.chunks
        lines, (further, jump) = [], self.next
        here = builder.add(self.group_at, builder.mul(index, const_i64(each)))
        for bytes_ahead, keep, count in self.ahead:
            if self.height == 1:
                at = builder.add(here, const_i64(bytes_ahead))
            else:  # whole chunks ahead, so that each of them lies before or past the end
                at = builder.add(builder.add(here, further), const_i64(bytes_ahead // each * each))
                at = builder.add(at, builder.select(builder.icmp_signed("<", at, self.whole), const_i64(0), jump))
            for b in self.rows:
                lines += [(builder.add(builder.add(b, at), const_i64(line)), keep) for line in range(0, each, 64)[:count]]
        return lines

    def lines_of_panel(self, index, count):
        """The same of a tile over a panel, for `count` chunks' share of what follows."""
        builder, (ahead, step) = self.builder, self.next
        first = builder.add(builder.mul(self.g, const_i64(FETCHES)), builder.mul(index, const_i64(count)))
        return [(builder.add(ahead, builder.mul(builder.add(first, const_i64(i)), step)), 2) for i in range(count)]

    def fetch(self, lines):
        for address, keep in lines:
            prefetch(self.builder, address, keep)

    def chunk(self, places, inputs, index):
        """One chunk of each row block against its inputs of every token."""
        builder, source = self.builder, self.source
        inputs = builder.add(inputs, builder.mul(index, const_i64(CHUNK * self.height)))
        lines = self.lines_of_panel(index, max(1, FETCHES // self.chunks)) if self.in_panel else self.lines_ahead(index)
        chunks = [source.open(builder.add(b, places[0]), builder.add(b, places[1]), index) for b in self.rows]
        if source.by_sub_blocks:
            self.sub_blocks(chunks, inputs, index, lines)
            return
        for i in range(CHUNK // 4):
            self.fetch(share(lines, i, CHUNK // 4))
            vectors = [source.vector(chunk, i) for chunk in chunks]
            for t in range(self.height):
                x = emit_splat4(builder, builder.add(inputs, const_i64(4 * (i * self.height + t))))
                for r, w in enumerate(vectors):
                    cell = self.part[(r, t), i % self.chains]
                    builder.store(emit_dot4(builder, builder.load(cell), w, x), cell)

    def sub_blocks(self, chunks, inputs, index, lines):
        """The same, by sub-blocks whose sums are multiplied once.

        One token: values are made unsigned, as AVX2's products want them, and what that adds is taken off each sub-block's sum, which
        costs less than to move every value's sign to its input. Several tokens: what it adds would be another broadcast each.
        """
        builder, step = self.builder, self.source.spec.per // 4
        more = -self.source.lowest if self.excess else 0
        places = self.excess and builder.add(self.excess, builder.mul(index, const_i64(CHUNK)))
        for i in range(CHUNK // 4 // step):
            self.fetch(share(lines, i, CHUNK // 4 // step))
            blocks = [self.source.sub_block(chunk, i, more) for chunk in chunks]
            excess = self.excess and builder.bitcast(emit_splat4(builder, builder.add(places, const_i64(4 * step * i))), vector("i16", 32))
            for t in range(self.height):
                at = [builder.add(inputs, const_i64(4 * ((i * step + j) * self.height + t))) for j in range(step)]
                x = [emit_splat4(builder, place) for place in at]
                for r, (values, multipliers) in enumerate(blocks):
                    cell = self.part[(r, t), i % self.chains]
                    builder.store(emit_dot_multiplied(builder, builder.load(cell), values, x, multipliers, excess), cell)


def _packed_twin(name, group, blocks, height, offset):
    def twin(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step):
        codes, w_scale = zip(*(twin_row_block(name, group, w + r * block_bytes, n_groups) for r in range(blocks)))
        codes, w_scale = np.concatenate(codes) + (128 - offset), np.concatenate(w_scale)
        cols = n_groups * group
        x = peek(acts, np.int8, height * cols).reshape(-1, height, 4).transpose(1, 0, 2).reshape(height, n_groups, group)
        x_scale = peek(acts + height * cols, np.float32, n_groups * height).reshape(-1, height)
        y = np.zeros((height, 16 * blocks), np.float32)
        for g in range(n_groups):
            exact = x[:, g].astype(np.int32) @ codes[:, g].T
            y = twin_fma(exact.astype(np.float32) * w_scale[None, :, g], x_scale[g][:, None], y)
        for t in range(height):
            for r in range(blocks):
                poke(out + t * out_bytes + r * next_block, y[t, 16 * r : 16 * r + 16])

    return twin


# ---- dense -------------------------------------------------------------------------------------

_DENSE_LOAD = {
    "f32": (4, lambda b, p: load(b, p, vector("f32", 16)), lambda p, n: peek(p, np.float32, n)),
    "f16": (2, emit_load_f16, lambda p, n: peek(p, np.float16, n).astype(np.float32)),
    "bf16": (2, emit_load_bf16, lambda p, n: twin_bf16(peek(p, np.uint16, n))),
}


@outlined
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
