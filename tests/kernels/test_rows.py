"""A token's row between the matrix products: each step against its formula, equal where the formula fixes the bits."""

import numpy as np
import pytest
from kernel_tools import Memory, memory, same_bits, ulps
from test_matmul import bytes_of

from npmix.formats import DENSE, GROUPS, PACKED, packed_bytes
from npmix.kernels.cache import put_numbers_f16, put_numbers_f32
from npmix.kernels.dot import FLOAT, START
from npmix.kernels.rows import FINE, TOPS, embedder, put_in_tile, quantise_group, quantise_row, rms_norm, rope, swiglu
from npmix.kernels.simd import twin_fma, twin_reduce_add
from npmix.quant.pack import dequantize, pack
from npmix.quant.round import quantise
from npmix.quant.tensor import Tensor

F = np.float32


def edge_groups(group, seed):
    """float32 (n, group): Gaussian ones of many sizes, zeros, one spike, ties, the largest and the smallest numbers."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((40, group)) * 10.0 ** rng.integers(-20, 20, (40, 1))).astype(F)
    x[0] = 0
    x[1], x[1, 3] = 0, -2.5
    x[2] = np.where(np.arange(group) % 2, 127.0, -127.0)
    x[3] = rng.integers(-254, 255, group) * F(0.5)
    x[3, 0] = 127  # so halves are ties
    x[4] = 3.4e38
    x[5] = 1e-40
    x[6] = 9e-31
    x[7] = 1.1e-30
    x[8] = -0.0
    return x


def quantised(x):
    """What `quantise_group` says inputs that share a scale are: codes, scale, start."""
    largest = np.abs(x).max()
    if largest < F(1e-30):
        return np.zeros(x.size, np.int8), F(0), FLOAT
    errors = []
    for top in TOPS if x.size == FINE else TOPS[:1]:
        z, lanes = (x * (F(top) * (F(1) / largest))).reshape(-1, 16), np.zeros(16, F)
        for miss in z - np.rint(z):
            lanes = twin_fma(miss, miss, lanes)
        errors.append(twin_reduce_add(lanes) * F(1 / top**2))
    top = F(TOPS[np.argmin(errors)])
    codes = np.rint(x * (top / largest)).astype(np.int8)
    return codes, largest / top, FLOAT + START * codes.sum(dtype=np.int32)


@pytest.mark.parametrize("group", GROUPS)
def test_quantised_inputs(group):
    """codes = nearest even(x * (top / max|x|)) within -127..127, scale = max|x| / top, top the best of TOPS in groups
    of FINE, else 127, the start FLOAT + START * the sum of the codes: exactly; inputs below 1e-30 are 0. Words of four codes land their
    distance apart and nothing else is written."""
    for x in edge_groups(group, group):
        given = memory(x)
        for word_bytes in (4, 24):
            codes, scale, start = Memory((group // 4, word_bytes), np.int8, fill=99), Memory(1, F), Memory(1, np.int32)
            quantise_group(given.at, group, codes.at, word_bytes, scale.at, start.at)
            expected = quantised(x)
            assert (codes.array[:, :4].ravel() == expected[0]).all() and (codes.array[:, 4:] == 99).all()
            assert same_bits(scale.array[0], expected[1]) and start.array[0] == expected[2]
            assert np.abs(codes.array[:, :4].astype(int)).max() <= 127
            assert codes.intact() and scale.intact() and start.intact()
            assert np.abs(x - codes.array[:, :4].ravel() * scale.array.astype(np.float64)).max() <= 0.5001 * scale.array[0] + 1e-30


def test_fine_groups_look_for_their_scale():
    """In groups of FINE the squared error of Gaussian inputs is less than nine tenths of that of scales max|x| / 127."""
    x = np.random.default_rng(3).standard_normal((300, FINE)).astype(F)
    largest, codes, scale, start = np.abs(x).max(1, keepdims=True), Memory(FINE, np.int8), Memory(1, F), Memory(1, np.int32)
    before = ((np.rint(x * 127 / largest) * largest / 127 - x) ** 2).sum()
    after = 0.0
    for row in x:
        given = memory(row)
        quantise_group(given.at, FINE, codes.at, 4, scale.at, start.at)
        after += ((codes.array * scale.array[0] - row) ** 2).sum()
    assert after < 0.9 * before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_inputs_that_are_not_finite_show():
    """One NaN or infinity anywhere gives a NaN for a scale, among large numbers and among zeros."""
    for bad in (np.nan, np.inf, -np.inf):
        for base in (0.0, 1.0, 1e-35):
            for at in (0, 5, 31, 127):
                x = np.full(128, base, F)
                x[at] = bad
                given, codes, scale, start = memory(x), Memory(128, np.int8), Memory(1, F), Memory(1, np.int32)
                quantise_group(given.at, 128, codes.at, 4, scale.at, start.at)
                assert np.isnan(scale.array[0]) and codes.intact() and start.intact()


@pytest.mark.parametrize("group", GROUPS)
def test_quantised_row(group):
    """A row is its groups: all codes, then all scales, then all starts; inputs past the row are zeros of the padded row."""
    for cols in (1, 32, 100, 2 * group, 4 * group + 1):
        width = -(-cols // (2 * group)) * 2 * group
        x = np.zeros(-(-width // 256) * 256, F)
        x[:cols] = np.random.default_rng(cols).standard_normal(cols)
        given, out = memory(x), Memory(bytes_of(cols, group), np.uint8)
        quantise_row(given.at, cols, group, out.at)
        expected = [quantised(x[k : k + group]) for k in range(0, width, group)]
        codes, scales, starts = zip(*expected)
        parts = [np.concatenate(codes), np.array(scales, F), np.array(starts, np.int32)]
        assert out.array.tobytes() == b"".join(p.tobytes() for p in parts) and out.intact()


def test_a_dense_row_is_copied():
    """With group 0 activations are the row itself, whole vectors of it."""
    x = memory(np.arange(48, dtype=F))
    out = Memory(48, F)
    quantise_row(x.at, 37, 0, out.at)
    assert same_bits(out.array, x.array) and out.intact()


@pytest.mark.parametrize("group", [0, 32, 64])
def test_place_in_a_tile(group):
    """Token t of a tile of h: words of four bytes side by side, [word][token], for a packed matrix; whole rows for a dense one."""
    cols, height = 70, 3
    words = 80 if group == 0 else bytes_of(cols, group) // 4  # 80: 70 padded to whole vectors
    rows = np.random.default_rng(1).integers(0, 2**31, (height, words), dtype=np.int32)
    tile = Memory(height * words, np.int32)
    for t in range(height):
        row = memory(rows[t])
        put_in_tile(row.at, cols, group, tile.at, height, t)
    assert same_bits(tile.array, (rows if group == 0 else rows.T).ravel()) and tile.intact()


@pytest.mark.parametrize("dim", [16, 24, 64, 100, 4096])
def test_rms_norm(dim):
    """x / sqrt(mean(x**2) + eps) * weight; squares are summed in 16 lanes by fma, then by halves; the padding stays zero and the
    sum of squares is returned."""
    rng, width, eps = np.random.default_rng(dim), -(-dim // 16) * 16, F(1e-5)
    for size in (1.0, 1e-4, 1e3):
        x, weight = np.zeros(width, F), np.zeros(width, F)
        x[:dim], weight[:dim] = rng.standard_normal(dim) * size, rng.standard_normal(dim)
        given, w, out = memory(x), memory(weight), Memory(width, F)
        squares = rms_norm(given.at, w.at, dim, width, eps, out.at)
        lanes = np.zeros(16, F)
        for v in x.reshape(-1, 16):
            lanes = twin_fma(v, v, lanes)
        assert ulps(squares, twin_reduce_add(lanes)) <= 2
        exact = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).sum() / dim + eps) * weight
        assert np.abs(out.array - exact).max() <= 1e-6 * np.abs(exact).max()
        assert (out.array[dim:] == 0).all() and out.intact()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_sum_of_squares_tells_of_bad_rows():
    """The sum of squares is not finite when an element is not."""
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones(32, F)
        x[17] = bad
        given, w, out = memory(x), memory(np.ones(32, F)), Memory(32, F)
        assert not rms_norm(given.at, w.at, 32, 32, F(1e-5), out.at) < np.inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_swiglu():
    """gate / (1 + exp(-gate)) * up for gates of any size, within float32's rounding of exp's argument; a NaN stays one."""
    rng = np.random.default_rng(2)
    gate = np.concatenate([rng.standard_normal(64) * 4, [0, -0.0, 80, -80, 200, -200, 1e4, -1e4], np.linspace(-30, 30, 88)]).astype(F)
    up = (rng.standard_normal(gate.size) * 3).astype(F)
    g, u, out = memory(gate), memory(up), Memory(gate.size, F)
    swiglu(g.at, u.at, gate.size, out.at)
    wide = gate.astype(np.float64)
    exact = wide * np.exp2(np.minimum(-np.logaddexp(0, -wide) / np.log(2), 0)) * up
    bound = (5e-7 + 1e-7 * np.maximum(-wide, 0)) * np.abs(exact) + 1e-25
    assert (np.abs(out.array - exact) <= bound).all() and out.intact()
    g.array[5], u.array[9] = np.nan, np.nan
    swiglu(g.at, u.at, gate.size, g.at)  # in place, as the phases do
    assert np.isnan(g.array[[5, 9]]).all() and same_bits(np.delete(g.array, [5, 9]), np.delete(out.array, [5, 9]))


@pytest.mark.parametrize("half", [8, 9, 41, 64])
def test_rope(half):
    """Pairs (x[i], x[i + half]) turn by the angle: lengths are kept, and the scale multiplies; a rounding of a * c, one of the fma."""
    rng = np.random.default_rng(half)
    x, angle, scale = rng.standard_normal(2 * half).astype(F), rng.uniform(0, 6, half), F(0.18)
    table = np.concatenate([np.cos(angle), np.sin(angle)]).astype(F)
    given, t, out = memory(x), memory(table), Memory(2 * half, F)
    rope(given.at, t.at, half, scale, out.at)
    c, s, a, b = table[:half], table[half:], x[:half], x[half:]
    law = np.concatenate([twin_fma(-b, s, a * c) * scale, twin_fma(b, c, a * s) * scale])
    assert same_bits(out.array, law) and out.intact()
    z = (a + 1j * b.astype(np.complex128)) * np.exp(1j * angle) * scale
    assert np.abs(out.array - np.concatenate([z.real, z.imag])).max() < 1e-6


FORMATS = [*((name, 0) for name in DENSE), *((name, group) for name, spec in PACKED.items() for group in spec.groups)]


@pytest.mark.parametrize("name, group", FORMATS)
def test_embedding(name, group):
    """A token's row is the dequantised row, exactly, whatever the format; then zeros up to a multiple of 16, and no further."""
    embed = embedder(name, group)
    for rows, dim in ((19, 70), (33, 256)):
        w = np.random.default_rng(dim).standard_normal((rows, dim)).astype(F)
        if group:
            data = pack(*quantise(w, name, group), name, group)
        else:
            data = (w.view(np.uint32) >> 16).astype(np.uint16) if name == "bf16" else w.astype(np.float16 if name == "f16" else F)
        table = Memory(data.shape, data.dtype, fill=data)
        expected, width = dequantize(Tensor(data, name, (rows, dim), group)), -(-dim // 16) * 16
        for token in (0, 1, 15, 16, rows - 1):
            out = Memory(width + 16, F, fill=-7)
            panel = Memory(packed_bytes("q8", 16, dim, group) if group else 0, np.uint8)
            embed(table.at, token, dim, out.at, panel.at)
            assert same_bits(out.array[:dim], expected[token])
            assert (out.array[dim:width] == 0).all() and (out.array[width:] == -7).all() and out.intact() and panel.intact()


@pytest.mark.parametrize("count, apart", [(1, 2), (16, 2), (16, 128), (35, 6)])
def test_cache_writes(count, apart):
    """A float16 cache takes 65,504 for what is larger and says so; infinities and NaN stay what they are; float32 keeps all."""
    for value, stored, saturated in (
        (1.5, 1.5, 0), (65504.0, 65504.0, 0), (65505.0, 65504.0, 1), (-7e4, -65504.0, 1), (3e38, 65504.0, 1),
        (np.inf, np.inf, 0), (-np.inf, -np.inf, 0), (np.nan, np.nan, 0), (0.1, np.float16(0.1), 0), (-0.0, -0.0, 0),
        (1e-8, 0.0, 0), (6e-8, np.float16(6e-8), 0),
    ):  # fmt: skip
        for place in {0, count // 2, count - 1}:
            row = memory(np.where(np.arange(count) == place, value, np.arange(count)).astype(F))
            half, whole = Memory(count * apart // 2, np.float16, offset=2, fill=7), Memory(count * apart // 2, F, fill=7)
            assert put_numbers_f16(row.at, count, half.at, apart) == saturated
            assert put_numbers_f32(row.at, count, whole.at, 2 * apart) == 0
            expected = np.where(np.arange(count) == place, stored, np.arange(count))
            assert same_bits(half.array[:: apart // 2], expected.astype(np.float16)) and same_bits(whole.array[:: apart // 2], row.array)
            for between in range(1, apart // 2):
                assert (half.array[between :: apart // 2] == 7).all() and (whole.array[between :: apart // 2] == 7).all()
            assert half.intact() and whole.intact()
