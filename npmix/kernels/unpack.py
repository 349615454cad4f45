"""From packed codes to the bytes that the dot takes: int8 + 128, sixteen rows side by side.

One hard fact: this is all that tells one packed format from another; whatever comes after sees the same
integers. A table costs a lookup a vector, which serves every token of a tile: on AVX-512 VBMI one instruction finds
the integer of any code and selector in a table of up to 128 bytes; elsewhere tables are read 16 bytes at a time (even steps are
added), and a format with multipliers reads one row of values and multiplies.
"""

import functools

import numpy as np
from numba.core import cgutils

from ..formats import CHUNK, PACKED, codes_at, span_bytes
from . import cpu
from .dot import multiplies_sums
from .outline import outlined
from .simd import call, const_i32, const_i64, const_vector, i64, join, load, op, peek, poke, scalar, shuffle, splat, store, vector, void

MANY_DOTS = 4  # of each vector, from which on ports count more than instructions


@functools.lru_cache(maxsize=None)
def table(name: str) -> np.ndarray:
    """int8 (selectors, codes): what each pair of selector and code means."""
    spec = PACKED[name]
    return np.array([[v * m for v in spec.row(s)] for s, m in enumerate(spec.multipliers)], np.int8)


class Unpacker:
    """The chunks of one row block of a packed matrix, being read in a function that is written.

    dots: how many take each vector, so which of the processor's ports are free.
    """

    def __init__(self, builder, name, group, dots=0):
        self.builder, self.name, self.spec, self.group = builder, name, PACKED[name], group
        self._spare_dots = dots >= MANY_DOTS and cpu.multishift_takes_dots_ports()
        self.chunk_bytes = CHUNK * 2 * self.spec.bits
        self._lines = {}
        self._vbmi = bool(self.spec.values) and cpu.looks_up_bytes()
        self.by_sub_blocks = multiplies_sums() and self.spec.selector_bits > 0 and len(self.spec.values) == 1

    def places(self, half):
        """Offsets in a span of the first chunk's codes and selectors of group `half` (i64, 0 or 1)."""
        builder, spec = self.builder, self.spec
        codes = builder.add(const_i64(codes_at(self.name, self.group)), builder.mul(half, const_i64(self.group * 2 * spec.bits)))
        return codes, builder.add(const_i64(64), builder.mul(half, const_i64(16 * spec.selector_bytes(self.group))))

    def open(self, codes, selectors, index):
        """Chunk `index` of the group whose codes and selectors lie there: vector i of it comes from `vector`."""
        codes = self.builder.add(codes, self.builder.mul(index, const_i64(self.chunk_bytes)))
        return codes, self._load_selectors(selectors, index) if self.spec.selector_bits else None

    def vector(self, chunk, i):
        """Inputs 4i..4i+3 of the chunk's 16 rows: <64 x i8>, int8 + 128."""
        codes, selectors = chunk
        if not self.spec.values:
            return load(self.builder, self.builder.add(codes, const_i64(64 * i)), vector("i8", 64))
        index = self._index(codes, i)
        return self._lookup_all(index, selectors, i) if self._vbmi else self._lookup_parts(index, selectors, i)

    @property
    def lowest(self):
        """The least value of a format with multipliers."""
        return self.spec.values[0][0]

    def sub_block(self, chunk, i, more=0):
        """Sub-block i of a format with multipliers, apart: its vectors of values <64 x i8>, and each lane's multiplier twice <32 x i16>.

        more: what is added to each value.
        """
        builder, spec, (codes, selectors) = self.builder, self.spec, chunk
        mask = const_vector("i8", 64, (1 << spec.bits) - 1)
        places = range(spec.per // 4 * i, spec.per // 4 * (i + 1))
        entries = [value + more for value in spec.values[0]]
        values = [self._lookup(entries, builder.and_(self._index(codes, place), mask)) for place in places]
        lanes = builder.lshr(selectors, const_vector("i32", 16, spec.selector_bits * i))
        eight = [spec.multipliers[s % len(spec.multipliers)] for s in range(8)]  # repeated: permd reads 3 bits
        doubled = const_vector("i32", 8, [m % 65536 * 65537 for m in eight])
        halves = [call(builder, "llvm.x86.avx2.permd", doubled.type, doubled, shuffle(builder, lanes, range(at, at + 8))) for at in (0, 8)]
        return values, builder.bitcast(join(builder, halves), vector("i16", 32))

    def _load_selectors(self, at, index):
        """Each row's selectors of the chunk in the low bits of a 32-bit lane."""
        builder, spec = self.builder, self.spec
        size, chunks = spec.selector_bytes(spec.word), spec.word // CHUNK
        at = builder.add(at, builder.mul(builder.udiv(index, const_i64(chunks)), const_i64(16 * size)))
        if size in (1, 2):
            lanes = builder.zext(load(builder, at, vector("i8" if size == 1 else "i16", 16)), vector("i32", 16))
        elif size == 4:
            lanes = load(builder, at, vector("i32", 16))
        else:
            data = load(builder, at, vector("i8", 64))  # 48 bytes and 16 of what follows them
            lanes = builder.bitcast(shuffle(builder, data, [3 * r + min(b, 2) for r in range(16) for b in range(4)]), vector("i32", 16))
        if chunks == 1:
            return lanes
        used = builder.mul(builder.urem(index, const_i64(chunks)), const_i64(CHUNK // spec.per * spec.selector_bits))
        return builder.lshr(lanes, splat(builder, builder.trunc(used, scalar("i32"))))

    def _index(self, codes, i):
        """The codes of vector i in the low bits of each byte; what stands above them is not cleared."""
        index, low, at = None, 0, 0
        for p in self.spec.planes:
            part = self._shift_bits(self._line(codes, at + i // (8 // p) * 64), p * (i % (8 // p)) - low)
            index = part if index is None else self._select(low, index, part)
            low, at = low + p, at + CHUNK * 2 * p
        return index

    def _line(self, codes, at):
        """A line of codes, loaded once for all its vectors: LLVM would load it again after each prefetch, and loads are what is short."""
        if (codes, at) not in self._lines:
            self._lines[codes, at] = load(self.builder, self.builder.add(codes, const_i64(at)), vector("i8", 64))
        return self._lines[codes, at]

    def _shift_bits(self, value, count):
        """Bytes shifted right (left if negative); bits that come from a neighbour land where nobody looks."""
        if not count:
            return value
        builder, kind = self.builder, vector("i16", 32)
        wide, by = builder.bitcast(value, kind), const_vector("i16", 32, abs(count))
        return builder.bitcast(builder.lshr(wide, by) if count > 0 else builder.shl(wide, by), value.type)

    def _select(self, low, a, b):
        """The low bits of each byte from a, the others from b."""
        builder, mask = self.builder, (1 << low) - 1
        if self._vbmi:  # named outright: LLVM makes two or three instructions of some of these
            kind = vector("i64", 8)
            given = [builder.bitcast(v, kind) for v in (const_vector("i8", 64, mask), a, b)]
            return builder.bitcast(call(builder, "llvm.x86.avx512.pternlog.q.512", kind, *given, const_i32(0xCA)), a.type)
        a = builder.and_(a, const_vector("i8", 64, mask))
        return builder.or_(a, builder.and_(b, const_vector("i8", 64, 255 - mask)))

    def _lookup_all(self, index, selectors, i):
        """AVX-512 VBMI: the selector joins the code, and one permutation of bytes reads the whole table."""
        builder, spec, kind = self.builder, self.spec, vector("i8", 64)
        first = spec.selector_bits * (4 * i // spec.per) - spec.bits  # which bits of each lane become bits 0..7 of its bytes
        if self._spare_dots:
            by = const_vector("i32", 16, abs(first))
            moved = builder.lshr(selectors, by) if first > 0 else builder.shl(selectors, by)
            lowest = const_vector("i8", 64, [b // 4 * 4 for b in range(16)] * 4)
            picked = call(builder, "llvm.x86.avx512.pshuf.b.512", kind, builder.bitcast(moved, kind), lowest)
        else:
            control = const_vector("i8", 64, [(first + 32 * (b // 4)) % 64 for b in range(8)] * 8)
            picked = call(builder, "llvm.x86.avx512.pmultishift.qb.512", kind, control, builder.bitcast(selectors, kind))
        index = self._select(spec.bits, index, picked)
        whole = (table(self.name).view(np.uint8) ^ 128).ravel().tolist()  # 64 or 128: bits above the index do not matter
        if len(whole) == 64:
            return call(builder, "llvm.x86.avx512.permvar.qi.512", kind, const_vector("i8", 64, whole), index)
        low, high = (const_vector("i8", 64, part) for part in (whole[:64], whole[64:]))
        return call(builder, "llvm.x86.avx512.vpermi2var.qi.512", kind, low, index, high)

    def _lookup_parts(self, index, selectors, i):
        """Code and selector apart, or joined where each selector has a row of its own."""
        builder, spec = self.builder, self.spec
        code = builder.and_(index, const_vector("i8", 64, (1 << spec.bits) - 1))
        lane = builder.lshr(selectors, const_vector("i32", 16, spec.selector_bits * (4 * i // spec.per)))
        which = builder.and_(builder.bitcast(lane, vector("i8", 64)), const_vector("i8", 64, (1 << spec.selector_bits) - 1))
        which = shuffle(builder, which, [b // 4 * 4 for b in range(64)])
        if len(spec.values) > 1:
            joined = builder.or_(code, builder.shl(which, const_vector("i8", 64, spec.bits)))
            value = self._lookup(table(self.name).ravel().tolist(), joined)
        else:
            value = builder.mul(self._lookup(spec.values[0], code), self._lookup(spec.multipliers, which))
        return builder.xor(value, const_vector("i8", 64, 128))

    def _lookup(self, entries, index):
        """entries[index] of up to 128 entries, 16 at a time; even steps need no table."""
        builder, found = self.builder, None
        if tuple(entries) == tuple(range(entries[0], entries[0] + len(entries))):
            return builder.add(index, const_vector("i8", 64, entries[0]))
        for first in range(0, len(entries), 16):
            part = _lookup_16(builder, list(entries[first : first + 16]), index)
            if found is None:
                found = part
            else:
                found = builder.select(builder.icmp_unsigned("<", index, const_vector("i8", 64, first)), found, part)
        return found


def _lookup_16(builder, entries, index):
    """entries[index % 16]: index below 128."""
    entries = [e % 256 for e in entries + [0] * (16 - len(entries))]
    form = cpu.form()
    if form == "avx512vnni":
        return call(builder, "llvm.x86.avx512.pshuf.b.512", index.type, const_vector("i8", 64, entries * 4), index)
    if form in ("avxvnni", "avx2"):
        return _by_parts(
            builder, index, 32, lambda part: call(builder, "llvm.x86.avx2.pshuf.b", part.type, const_vector("i8", 32, entries * 2), part)
        )
    if form == "neon":
        low = builder.and_(index, const_vector("i8", 64, 15))
        name = "llvm.aarch64.neon.tbl1.v16i8"
        return _by_parts(builder, low, 16, lambda part: call(builder, name, part.type, const_vector("i8", 16, entries), part))
    low, found = builder.and_(index, const_vector("i8", 64, 15)), const_vector("i8", 64, entries[0])
    for i in range(1, 16):
        same = builder.icmp_unsigned("==", low, const_vector("i8", 64, i))
        found = builder.select(same, const_vector("i8", 64, entries[i]), found)
    return found


def _by_parts(builder, value, lanes, part):
    """Apply an operation of narrower registers to each slice of a vector of 64 bytes."""
    return join(builder, [part(shuffle(builder, value, range(at, at + lanes))) for at in range(0, 64, lanes)])


# ---- whole row blocks --------------------------------------------------------------------------


@outlined
def unpack_block(name, group, offset=128):
    """op(w, n_groups, out): a row block as a row block of q8 of the same group, for work that comes over it many times.

    offset: what its codes are more than the integers, 128 as in q8 or `dot.offset_for` them.
    """

    def emit(builder, w, n_groups, out):
        source, whole, plain = Unpacker(builder, name, group), span_bytes(name, group), span_bytes("q8", group)
        with cgutils.for_range(builder, n_groups, intp=scalar("i64")) as groups:
            span, half = builder.lshr(groups.index, const_i64(1)), builder.and_(groups.index, const_i64(1))
            at, to = builder.add(w, builder.mul(span, const_i64(whole))), builder.add(out, builder.mul(span, const_i64(plain)))
            scales = builder.mul(half, const_i64(32))
            store(builder, load(builder, builder.add(at, scales), vector("i8", 32)), builder.add(to, scales))
            first, selectors = (builder.add(at, place) for place in source.places(half))
            to = builder.add(to, builder.add(const_i64(64), builder.mul(half, const_i64(16 * group))))
            with cgutils.for_range(builder, const_i64(group // CHUNK), intp=scalar("i64")) as chunks:
                chunk = source.open(first, selectors, chunks.index)
                line = builder.add(to, builder.mul(chunks.index, const_i64(16 * CHUNK)))
                for i in range(CHUNK // 4):
                    codes = source.vector(chunk, i)
                    codes = builder.sub(codes, const_vector("i8", 64, 128 - offset)) if offset < 128 else codes
                    store(builder, codes, builder.add(line, const_i64(64 * i)))

    def twin(w, n_groups, out):
        integers, _ = twin_row_block(name, group, w, n_groups)
        spans = peek(w, np.uint8, n_groups // 2 * span_bytes(name, group)).reshape(n_groups // 2, -1)
        lines = integers.reshape(16, n_groups // 2, -1, 4).transpose(1, 2, 0, 3) + offset
        poke(out, np.concatenate([spans[:, :64], lines.reshape(n_groups // 2, -1).astype(np.uint8)], axis=1))

    return op(void, (i64,) * 3, twin)(emit)


def twin_row_block(name, group, address, n_groups):
    """One row block's integers (16, n_groups, group) as int32 and its scales (16, n_groups) as float32."""
    spec, count = PACKED[name], n_groups // 2
    data = peek(address, np.uint8, count * span_bytes(name, group)).reshape(count, -1)
    scales = data[:, :64].copy().view(np.float16).reshape(n_groups, 16).T.astype(np.float32)
    chunks = data[:, codes_at(name, group) :].reshape(n_groups * group // CHUNK, -1)
    codes = np.zeros((len(chunks), CHUNK // 4, 16, 4), np.int32)
    low, at = 0, 0
    for p in spec.planes:
        for i in range(CHUNK // 4):
            line = chunks[:, at + i // (8 // p) * 64 :][:, :64].reshape(-1, 16, 4)
            codes[:, i] |= (line.astype(np.int32) >> p * (i % (8 // p)) & (1 << p) - 1) << low
        low, at = low + p, at + CHUNK * 2 * p
    if not spec.values:
        codes -= 128
    else:
        size = spec.selector_bytes(spec.word)
        words = data[:, 64 : codes_at(name, group)].reshape(-1, 16, size).astype(np.int64)
        words = (words << 8 * np.arange(size)).sum(2)
        codes = codes.reshape(len(words), spec.word // 4, 16, 4)
        for i in range(spec.word // 4):
            chosen = words >> spec.selector_bits * (4 * i // spec.per) & (1 << spec.selector_bits) - 1
            codes[:, i] = table(name).astype(np.int32)[chosen[:, :, None], codes[:, i]]
    return codes.reshape(-1, CHUNK // 4, 16, 4).transpose(2, 0, 1, 3).reshape(16, n_groups, group), scales
