"""Attention blocks against softmax in float64; what a query must not see adds exactly nothing."""

import numpy as np
import pytest
from kernel_tools import Memory, memory, same_bits

from npmix.kernels.attention import BLOCK, STRIP, TALLEST, attend, clear, finish, merge, scores_bytes, softmax_row
from npmix.kernels.cache import CELL, COLUMN
from npmix.model import kv_cache

F = np.float32
NO_WINDOW = 1 << 40
KINDS = {"f16": np.float16, "f32": F, "q8": np.uint8}


class Cache:
    """Keys and values of one kv head in the kernel's layout; position p lies at p % capacity. k, v: what the numbers there mean."""

    def __init__(self, kv, dim, capacity, stale=0.0):
        self.kv, self.dim, self.capacity, self.k, self.v = kv, dim, capacity, {}, {}
        if kv == "q8":
            self.width = -(-dim // CELL) * CELL
            self.keys = Memory(capacity // BLOCK, kv_cache.block(kv, BLOCK // CELL, -(-dim // 4), CELL, 4))
            self.values = Memory(capacity // BLOCK, kv_cache.block(kv, self.width // CELL, BLOCK // 4, CELL, 4))
            for memory in (self.keys, self.values):
                memory.array["numbers"], memory.array["scales"] = 0 if stale == 0 else 200, stale
            return
        self.width = -(-dim // 16) * 16
        self.keys = Memory((capacity // STRIP, dim, STRIP), KINDS[kv], fill=stale)
        self.values = Memory((capacity // BLOCK, BLOCK * self.width), KINDS[kv], fill=0)
        for slot in range(capacity):
            self.values.array[self.places(slot)] = stale

    def put(self, position, k, v):
        slot = position % self.capacity
        if self.kv == "q8":
            self.k[position], self.v[position] = self.put_codes(slot, np.asarray(k, F), np.asarray(v, F))
            return
        self.keys.array[slot // STRIP, :, slot % STRIP] = k
        self.values.array[self.places(slot)] = v
        self.k[position] = self.keys.array[slot // STRIP, :, slot % STRIP].astype(np.float64)
        self.v[position] = self.values.array[self.places(slot)].astype(np.float64)

    def places(self, slot):
        """Index of a position's values: 64 lanes of all positions of a block, then the next 64, or as many as are left."""
        i = np.arange(self.dim)
        first = i // COLUMN * COLUMN
        return slot // BLOCK, first * BLOCK + slot % BLOCK * np.minimum(COLUMN, self.width - first) + i - first

    def put_codes(self, slot, k, v):
        keys, values, s, i = self.keys.array[slot // BLOCK], self.values.array[slot // BLOCK], slot % BLOCK, np.arange(self.dim)
        keys["numbers"][s // CELL, i // 4, s % CELL, i % 4], keys["scales"][s], meant_k = codes(k)
        values["numbers"][i // CELL, s // 4, i % CELL, s % 4], values["scales"][s], meant_v = codes(v)
        return meant_k, meant_v

    def fill(self, positions, seed=0, size=1.0):
        for p in positions:
            rng = np.random.default_rng((seed, p))
            self.put(p, rng.standard_normal(self.dim) * size, rng.standard_normal(self.dim))
        return self

    def attend(self, q, position, offset=0, heads=1, window=NO_WINDOW):
        """Outputs (rows, dim) of queries whose row r is of the token at position + (offset + r) // heads."""
        rows, part = len(q), 16 + self.width
        queries, scores = memory(q), Memory(scores_bytes(self.dim) // 4, F, fill=np.nan)
        parts, running = Memory((rows, part), F, fill=np.nan), Memory((rows, part), F, fill=np.nan)
        for r in range(rows):
            clear(running.at + 4 * part * r, self.width)
        first, last = position + offset // heads, position + (offset + rows - 1) // heads
        for block in range(max(0, first - window + 1) // BLOCK, last // BLOCK + 1):
            attend(self.kv)(
                queries.at, q.strides[0], rows, offset, position, heads, window, block * BLOCK, self.capacity,
                self.keys.at, self.values.at, self.dim, self.width, scores.at, parts.at,
            )  # fmt: skip
            for r in range(rows):
                merge(running.at + 4 * part * r, parts.at + 4 * part * r, self.width)
        out = Memory((rows, self.dim), F)
        for r in range(rows):
            finish(running.at + 4 * part * r, self.dim, out.at + 4 * self.dim * r)
        assert all(m.intact() for m in (queries, scores, parts, running, out, self.keys, self.values))
        return out.array

    def formula(self, q, position, offset=0, heads=1, window=NO_WINDOW):
        """softmax2(q k) v in float64 over the positions that each row sees."""
        out = []
        for r, row in enumerate(np.asarray(q, np.float64)):
            own = position + (offset + r) // heads
            seen = range(max(0, own - window + 1), own + 1)
            s = np.array([row @ self.k[p] for p in seen])
            w = np.exp2(s - s.max())
            out.append((w / w.sum()) @ np.array([self.v[p] for p in seen]))
        return np.array(out)


def codes(x):
    """(codes, scale, what they mean in float64) of one row in 8 bits."""
    scale = np.abs(x).max() / F(127)
    if not np.isfinite(scale):
        return 128, np.nan, x.astype(np.float64)
    found = np.rint(x / scale) if scale else np.zeros_like(x)
    return found + 128, scale, found.astype(np.float64) * scale


def queries(rows, dim, seed=1):
    return (np.random.default_rng(seed).standard_normal((rows, dim)) / np.sqrt(dim) * 3).astype(F)


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("dim", [16, 18, 64, 80, 128])
def test_attention_is_softmax(kv, dim):
    """For head_dims of whole tiles and others, at positions within, at and beyond a block's end: the float64 formula within 1e-5,
    or 1e-3 where rows meet 8-bit codes in 15 bits."""
    cache = Cache(kv, dim, 3 * BLOCK).fill(range(2 * BLOCK + 40))
    for position in (0, 1, 15, 16, 63, 64, 255, 256, 257, 550):
        q = queries(4, dim, position)
        got = cache.attend(q, position, heads=4)
        assert np.abs(got - cache.formula(q, position, heads=4)).max() < (1e-3 if kv == "q8" else 1e-5)


@pytest.mark.parametrize("kv", KINDS)
def test_a_row_does_not_know_its_tile(kv):
    """A query's result has the same bits alone and among up to six rows, of its own token or of others, before or behind it."""
    heads, position, dim = 2, 250, 80
    cache = Cache(kv, dim, 2 * BLOCK).fill(range(260))
    q = queries(16, dim)
    alone = np.concatenate([cache.attend(q[r : r + 1], position + r // heads) for r in range(16)])
    for rows in range(1, TALLEST + 1):
        for offset in range(0, 16 - rows + 1):
            assert same_bits(cache.attend(q[offset : offset + rows], position, offset, heads), alone[offset : offset + rows])


@pytest.mark.parametrize("stale", [6e4, -6e4, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_stale_positions_add_nothing(kv, stale):
    """What an earlier sequence left behind in the cache, however large, infinite or NaN, changes no bit."""
    for position in (0, 5, 62, 63, 70, 300):
        clean, dirty = Cache(kv, 64, 2 * BLOCK), Cache(kv, 64, 2 * BLOCK, stale)
        for cache in (clean, dirty):
            cache.fill(range(position + 1))
        q = queries(2, 64, position)
        assert same_bits(dirty.attend(q, position, heads=2), clean.attend(q, position, heads=2))


@pytest.mark.parametrize("kv", KINDS)
def test_later_tokens_of_a_chunk_add_nothing(kv):
    """A row sees no position behind its own, though prefill has written the whole chunk: large keys and values there change no bit."""
    small, large = Cache(kv, 64, BLOCK).fill(range(30)), Cache(kv, 64, BLOCK).fill(range(30))
    for p in range(24, 30):
        large.put(p, np.full(64, 100.0), np.full(64, -6e4))
    q = queries(6, 64)
    a, b = small.attend(q, 20), large.attend(q, 20)  # positions 20..25
    assert same_bits(a[:4], b[:4]) and not same_bits(a[4:], b[4:])


@pytest.mark.parametrize("kv", ["f32", "q8"])
@pytest.mark.parametrize("window", [1, 16, 17, 100, 256, 300])
def test_sliding_window(window, kv):
    """A window sees positions own - window + 1 .. own, through a ring that is no longer than it must be, far beyond its length."""
    chunk, dim = 20, 16
    capacity = -(-(window + chunk - 1) // BLOCK) * BLOCK
    cache = Cache(kv, dim, capacity)
    for start in (0, 20, 40, 480, 500, 520, 1000, 1020, 1040):
        known = max(0, start - capacity + 1)
        cache.fill(range(max(known, max(cache.k, default=-1) + 1), start + chunk))  # as prefill writes a chunk, then reads
        q = queries(2 * chunk, dim, start)
        for offset in range(0, 2 * chunk, TALLEST):
            rows = q[offset : offset + TALLEST]
            got = cache.attend(rows, start, offset, 2, window)
            assert np.abs(got - cache.formula(rows, start, offset, 2, window)).max() < (1e-3 if kv == "q8" else 1e-5)
            first = start + offset // 2
            assert same_bits(got[:1], cache.attend(rows[:1], first, offset % 2, 2, window))


def test_large_scores():
    """Scores far apart, far above and far below zero: softmax by the running maximum neither overflows nor loses the largest."""
    cache = Cache("f32", 16, 2 * BLOCK).fill(range(400), size=30.0)
    q = queries(6, 16) * F(20)
    for position in (3, 399):
        got = cache.attend(q, position, heads=6)
        assert np.isfinite(got).all() and np.abs(got - cache.formula(q, position, heads=6)).max() < 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kv", ["f32", "q8"])
def test_what_is_not_finite_shows(kv):
    """A NaN or infinite key, value or query that is seen gives an output that is not finite."""
    for bad in (np.nan, np.inf):
        for which in ("key", "value", "query"):
            cache, q = Cache(kv, 16, BLOCK).fill(range(40)), np.abs(queries(1, 16))
            k, v = cache.k[20].copy(), cache.v[20].copy()
            (k if which == "key" else v)[3] = bad if which != "query" else 0
            cache.put(20, k, v)
            q[0, 3] = bad if which == "query" else q[0, 3]
            assert not np.isfinite(cache.attend(q, 39)).all(), (bad, which)


@pytest.mark.parametrize("low, high", [(0, 64), (3, 64), (0, 17), (16, 48), (33, 34), (-5, 90), (40, 40)])
def test_softmax_row(low, high):
    """Weights 2**(s - max) inside low..high and exactly 0 outside, even where scores are huge; max, then the sum."""
    scores = np.random.default_rng(3).standard_normal(64).astype(F) * 5
    inside = (np.arange(64) >= low) & (np.arange(64) < high)
    scores[~inside] = 1e30
    given, out = memory(scores), Memory(2, F)
    softmax_row(given.at, 0, 64, low, high, out.at)
    assert given.intact() and out.intact() and (given.array[~inside] == 0).all()
    if not inside.any():
        assert out.array.tolist() == [-np.inf, 0]
        return
    assert out.array[0] == scores[inside].max()
    exact = np.exp2(scores[inside].astype(np.float64) - out.array[0])
    assert np.abs(given.array[inside] - exact).max() < 1e-6 and given.array.max() == 1
    assert abs(out.array[1] - exact.sum()) < 1e-5


def test_merge_of_an_empty_block():
    """A block in which a row sees nothing changes no bit of the running result; the first block is taken as it is."""
    width = 32
    running, part = Memory(16 + width, F, fill=np.nan), Memory(16 + width, F, fill=0)
    part.array[:] = np.random.default_rng(1).standard_normal(16 + width)
    part.array[1] = 3
    clear(running.at, width)
    merge(running.at, part.at, width)
    assert same_bits(running.array[[0, 1]], part.array[[0, 1]]) and same_bits(running.array[16:], part.array[16:])
    before, empty = running.array.copy(), Memory(16 + width, F, fill=0)
    empty.array[0], empty.array[16:] = -np.inf, 5
    merge(running.at, empty.at, width)
    assert same_bits(running.array, before) and running.intact()
