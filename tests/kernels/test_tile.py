"""The tiles: the summation law of packed and dense products, compiled against the twin and against the law in plain words."""

import itertools

import numpy as np
import pytest
from kernel_tools import Memory, address, memory, same_bits, ulps

from npmix.formats import PACKED
from npmix.kernels import cpu
from npmix.kernels._jit import DISABLED, njit
from npmix.kernels.dot import FLOAT, SMALL, START
from npmix.kernels.simd import twin_bf16, twin_fma
from npmix.kernels.tile import BLOCKS, HEIGHT, TALLEST, dense_tile, packed_tile, singles
from npmix.quant.pack import integers, pack

F = np.float32
PAIRS = [(name, group) for name, spec in PACKED.items() for group in spec.groups]
WIDE = max(BLOCKS, *map(singles, PACKED))  # row blocks of the widest tile


def compiled(tile, count):
    """A tile as a function that Python can call."""
    if count == 9:
        return njit(lambda a, b, c, d, e, f, g, h, i: tile(a, b, c, d, e, f, g, h, i))
    return njit(lambda a, b, c, d, e, f, g, h: tile(a, b, c, d, e, f, g, h))


def ends(name):
    """The lowest and the tallest tiles of a format; those of a panel are q8's."""
    return sorted({(singles(name), 1), (1, TALLEST), *([(BLOCKS, HEIGHT)] if name == "q8" else [])})


def shapes(name):
    """All that are used."""
    return sorted({*ends(name), *((1, h) for h in range(2, TALLEST)), *([(BLOCKS, HEIGHT - 1)] if name == "q8" else [])})


def twin(tile):
    return tile if DISABLED else tile.twin


def packed_case(name, group, blocks, n_groups, tokens, seed):
    """Random and edge codes, selectors and scales of 16 * blocks rows; the activations of each token: codes, and a scale per group."""
    spec, rng = PACKED[name], np.random.default_rng(seed)
    rows, cols = 16 * blocks, n_groups * group
    codes = rng.integers(0, 1 << spec.bits, (rows, cols), dtype=np.uint8)
    codes[0], codes[1, ::2], codes[2] = (1 << spec.bits) - 1, 1, 0
    scales = (rng.standard_normal((rows, n_groups)) * 10.0 ** rng.integers(-5, 2, (rows, n_groups))).astype(np.float16)
    scales[3], scales[4], scales[5] = 0, 6e-8, -65504
    selectors = rng.integers(0, len(spec.multipliers), (rows, cols // spec.per), dtype=np.uint8)
    selectors[:3, : cols // spec.per // 2], selectors[:3, cols // spec.per // 2 :] = 0, len(spec.multipliers) - 1
    x = rng.integers(-127, 128, (tokens, cols), dtype=np.int8)
    x[0] = np.where(np.arange(cols) % 3, 127, -127)
    x_scale = (np.abs(rng.standard_normal((tokens, n_groups))) * 0.01).astype(F)
    return (codes, scales, selectors), x, x_scale


def acts_of(x, x_scale, group):
    """A tile of tokens as `tile.py` lays it out: codes [cols / 4][h][4], scales [groups][h], starts [groups][h]."""
    h, cols = x.shape
    codes = np.ascontiguousarray(x.reshape(h, -1, 4).transpose(1, 0, 2)).view(np.uint8).ravel()
    starts = FLOAT + START * x.astype(np.int32).reshape(h, -1, group).sum(2, dtype=np.int32)
    return np.concatenate([codes, *(np.ascontiguousarray(a.T).view(np.uint8).ravel() for a in (x_scale, starts))])


def packed_law(parts, name, group, x, x_scale):
    """Groups in order: y = fma(exact integer of the group * w_scale, x_scale, y), the product rounded to float32 once."""
    codes, scales, selectors = parts
    whole = integers(codes, selectors, name).astype(np.int64)
    y = np.zeros((len(x), len(codes)), F)
    for g in range(scales.shape[1]):
        at = slice(g * group, (g + 1) * group)
        exact = x[:, at].astype(np.int64) @ whole[:, at].T
        y = twin_fma(exact.astype(F) * scales[None, :, g].astype(F), x_scale[:, g, None], y)
    return y


def run_packed(function, packed, blocks, block_bytes, n_groups, acts, tokens, next_block=64, ahead=(0, 64)):
    """Results (tokens, 16 * blocks) with rows of results 32 bytes apart from each other, the gaps untouched."""
    width = 16 * blocks + 8
    out = Memory((tokens, width), F, fill=-7)
    function(address(packed), block_bytes, n_groups, address(acts), out.at, 4 * width, next_block, *ahead)
    assert out.intact() and (out.array[:, 16 * blocks :] == -7).all()
    return out.array[:, : 16 * blocks]


@pytest.mark.parametrize("name, group", PAIRS)
def test_packed_tile_obeys_the_law(name, group):
    """The compiled tile, its twin and the law in plain words agree within 2 units of the last place, and any two heights give a
    token equal bits. Codes and inputs cover the edges; scales are of any size and sign. Every shape that is used for q8, whose tiles
    run over all panels, and q4, which has selectors; the lowest and the tallest for the rest: formats differ in how a vector is
    unpacked alone, which no height sees, and `test_unpack.py` has that."""
    n_groups = 6
    parts, x, x_scale = packed_case(name, group, WIDE, n_groups, TALLEST, 10 * group + PACKED[name].bits)
    packed = pack(*parts, name, group)
    block = packed.size // WIDE
    law = packed_law(parts, name, group, x, x_scale)
    known = np.full((TALLEST, 16 * WIDE), np.nan, F)
    for blocks, height in shapes(name) if (name, group) in (("q8", 128), ("q4", 128)) else ends(name):
        tile = packed_tile(name, group, blocks, height)
        run = compiled(tile, 9)
        for first in range(0, TALLEST + 1 - height, height):
            tokens = slice(first, first + height)
            acts = acts_of(x[tokens], x_scale[tokens], group)
            got = run_packed(run, packed, blocks, block, n_groups, acts, height)
            assert ulps(got, law[tokens, : 16 * blocks]) <= 2
            if first == 0:
                assert ulps(got, run_packed(twin(tile), packed, blocks, block, n_groups, acts, height)) <= 2
            before = known[tokens, : 16 * blocks]
            before[np.isnan(before)] = got[np.isnan(before)]
            assert same_bits(got, before)


def bursts_of(assembly):
    """How many prefetches there are in a row each time."""
    words = [line.split()[0] for line in assembly.splitlines() if line.startswith("\t") and line.strip()[:1] not in ("", ".", "#")]
    return [len(list(run)) for asks, run in itertools.groupby(words, lambda word: word.startswith("prefetch")) if asks]


@pytest.mark.compiled
@pytest.mark.skipif(not cpu.is_x86(), reason="prefetches are named as x86 names them")
@pytest.mark.parametrize("policy", ["none", "near", "far"])
def test_what_is_fetched_ahead_changes_no_bits(policy, monkeypatch):
    """Each host's way to fetch weights gives this host's bits, though it asks for lines far behind the matrix, and is in the machine code. A
    tall tile always asks for something: straight from memory, or over a panel where registers are narrow."""
    parts, x, x_scale = packed_case("q4", 128, 1, 4, HEIGHT, 11)
    packed = pack(*parts, "q4", 128)
    acts = {height: acts_of(x[:height], x_scale[:height], 128) for height in (1, HEIGHT)}
    # before the host is another one: these go to the disk cache
    here = {height: run_packed(compiled(packed_tile("q4", 128, 1, height), 9), packed, 1, 0, 4, acts[height], height) for height in acts}
    monkeypatch.setattr(cpu, "prefetching", lambda: policy)
    for height, asks in ((1, policy != "none"), (HEIGHT, True)):
        run = compiled(packed_tile("q4", 128, 1, height).inner, 9)  # emitted anew
        assert same_bits(run_packed(run, packed, 1, 0, 4, acts[height], height), here[height])
        bursts = bursts_of("".join(run.inspect_asm().values()))
        assert bool(bursts) == asks and max(bursts, default=0) <= 2  # a processor forgets some of many


@pytest.mark.compiled
@pytest.mark.parametrize("ahead", [(0, 0), (2**47, 2**40), (-1, -64)])
@pytest.mark.parametrize("blocks", [1, BLOCKS])
def test_what_comes_next_may_lie_anywhere(blocks, ahead):
    """What a tile fetches for the next one is asked for and never read: there need not be any memory."""
    parts, x, x_scale = packed_case("q8", 128, blocks, 4, HEIGHT, 9)
    packed, acts = pack(*parts, "q8", 128), acts_of(x, x_scale, 128)
    run = compiled(packed_tile("q8", 128, blocks, HEIGHT), 9)
    known, got = (
        run_packed(run, packed, blocks, packed.size // blocks, 4, acts, HEIGHT, ahead=to) for to in ((address(packed), 64), ahead)
    )
    assert same_bits(got, known)


def test_a_panel_of_smaller_codes_gives_the_same_bits():
    """A tile over q8 codes moved below 128, with the offset that says so, and its twin: the bits of the codes where they were."""
    parts, x, x_scale = packed_case("q8", 128, BLOCKS, 4, HEIGHT, 9)
    codes, scales, selectors = (parts[0] % 2**7 + 64).astype(np.uint8), *parts[1:]  # int8s of -64..63
    acts, found = acts_of(x, x_scale, 128), []
    for offset in (128, SMALL):
        tile = packed_tile("q8", 128, BLOCKS, HEIGHT, offset)
        packed = pack((codes - (128 - offset)).astype(np.uint8), scales, selectors, "q8", 128)
        for function in (compiled(tile, 9), twin(tile)):
            found.append(run_packed(function, packed, BLOCKS, packed.size // BLOCKS, 4, acts, HEIGHT))
    assert all(ulps(found[0], other) <= 2 for other in found) and same_bits(found[0], found[2])


@pytest.mark.parametrize("name", PACKED)
def test_one_block_done_several_times(name):
    """With both distances 0 a tile is one row block done over and over, written to the same place, with the same bits: a pair's, and
    that of one token."""
    group = PACKED[name].group
    for blocks, height in ends(name):
        parts, x, x_scale = packed_case(name, group, blocks, 2, height, 5)
        packed, acts = pack(*parts, name, group), acts_of(x, x_scale, group)
        run = compiled(packed_tile(name, group, blocks, height), 9)
        together = run_packed(run, packed, blocks, packed.size // blocks, 2, acts, height)
        out = Memory((height, 16), F)
        for r in range(blocks):
            run(address(packed) + r * packed.size // blocks, 0, 2, address(acts), out.at, 64, 0, address(packed), 64)
            assert out.intact() and same_bits(out.array, together[:, 16 * r : 16 * r + 16])


@pytest.mark.parametrize("name, group", PAIRS)
def test_integers_are_exact_at_the_edges(name, group):
    """A group at its largest magnitude: codes, selectors and inputs all at their ends, scales 1; the sum is the exact integer."""
    spec = PACKED[name]
    ends = sorted({0, spec.pad, (1 << spec.bits) - 1})
    codes = np.repeat(np.resize(np.array(ends, np.uint8), (16, 1)), 2 * group, axis=1)
    x = np.repeat(np.array([[127], [-127]], np.int8), 2 * group, axis=1)
    run = compiled(packed_tile(name, group, singles(name), 1), 9)
    for selector in sorted({0, len(spec.multipliers) - 1}):
        selectors = np.full((16, 2 * group // spec.per), selector, np.uint8)
        packed = pack(codes, np.ones((16, 2), np.float16), selectors, name, group)
        exact = integers(codes, selectors, name)[:, 0].astype(np.int64) * 2 * group
        for t in range(2):
            got = run_packed(run, packed, 1, 0, 2, acts_of(x[t : t + 1], np.ones((1, 2), F), group), 1, 0)
            assert (got[0] == exact * x[t, 0]).all()


# ---- dense -------------------------------------------------------------------------------------

SIZES = {"f32": 4, "f16": 2, "bf16": 2}


def dense_case(name, rows, cols, tokens, seed):
    """Random weights in the format, as bytes and as the float32 they mean; activations padded with zeros to 16."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-3, 3, (rows, 1))).astype(F)
    if name == "bf16":
        raw = (w.view(np.uint32) >> 16).astype(np.uint16)
        w = twin_bf16(raw)
    else:
        raw = w.astype(np.float16 if name == "f16" else F)
        w = raw.astype(F)
    x = np.zeros((tokens, -(-cols // 16) * 16), F)
    x[:, :cols] = rng.standard_normal((tokens, cols))
    return raw, w, x


def dense_law(w, x):
    """16 lanes, k ascending by fma, the last cols % 16 inputs in the top lanes; then lanes added by halves."""
    cols = w.shape[1]
    y = np.zeros((len(x), len(w), 16), F)
    for k in range(cols // 16 * 16):
        y[:, :, k % 16] = twin_fma(x[:, None, k], w[None, :, k], y[:, :, k % 16])
    tail = cols % 16
    for i in range(tail):
        k = cols - tail + i
        y[:, :, 16 - tail + i] = twin_fma(x[:, None, k], w[None, :, k], y[:, :, 16 - tail + i])
    for half in (8, 4, 2, 1):
        y = y[..., :half] + y[..., half : 2 * half]
    return y[..., 0]


@pytest.mark.parametrize("name", SIZES)
def test_dense_tile_obeys_the_law(name):
    """Every height, any number of inputs from 16 on: compiled tile, twin and law within 2 units of the last place, heights bit for bit
    equal, nothing written beside the results."""
    tiles = {h: dense_tile(name, 4, h) for h in range(1, HEIGHT + 1)}
    runs = {h: compiled(tile, 8) for h, tile in tiles.items()}
    for cols in (16, 17, 31, 64, 100):
        raw, w, x = dense_case(name, 4, cols, HEIGHT, cols)
        given, acts, law = memory(raw), memory(x), dense_law(w, x)
        whole = None
        for h in range(HEIGHT, 0, -1):
            for function in (runs[h], twin(tiles[h])):
                out = Memory((h, 6), F, fill=-7)
                function(given.at, cols * SIZES[name], cols, acts.at, x.strides[0], out.at, 24, 4)
                assert out.intact() and (out.array[:, 4:] == -7).all()
                assert ulps(out.array[:, :4], law[:h]) <= 2
                whole = out.array[:, :4].copy() if whole is None else whole
                assert same_bits(out.array[:, :4], whole[:h]) or function is not runs[h]


@pytest.mark.parametrize("name", SIZES)
def test_one_row_done_four_times(name):
    """With both distances 0 a tile is one row done over, bit for bit what it is among four."""
    raw, _, x = dense_case(name, 4, 45, 2, 1)
    given, acts, run = memory(raw), memory(x), compiled(dense_tile(name, 4, 2), 8)
    four, one = Memory((2, 4), F), Memory((2, 1), F)
    run(given.at, 45 * SIZES[name], 45, acts.at, x.strides[0], four.at, 16, 4)
    for r in range(4):
        run(given.at + r * 45 * SIZES[name], 0, 45, acts.at, x.strides[0], one.at, 4, 0)
        assert same_bits(one.array[:, 0], four.array[:, r]) and one.intact()
