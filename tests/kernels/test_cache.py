"""A token's row on its way into the KV cache: where each number goes, and what 8 bits make of it."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
from kernel_tools import Memory, memory, same_bits
from test_attention import Cache

from npmix.kernels._jit import njit
from npmix.kernels.cache import BLOCK, CELL, KINDS, ZERO, cache_rows, to_codes
from npmix.kernels.digits import LARGEST, digit_tile, to_digits
from npmix.model.kv_cache import KVCache

F = np.float32


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("dim", [2, 18, 80, 128])
def test_every_number_in_its_place(kv, dim):
    """Rows at the ends of strips and blocks: byte for byte the cache that the attention tests fill by NumPy, and nothing else is touched."""
    put_key, put_value = cache_rows(kv)
    by_numpy, by_kernel = Cache(kv, dim, 2 * BLOCK), Cache(kv, dim, 2 * BLOCK)
    rng, temp = np.random.default_rng(dim), Memory(-(-dim // 16) * 16, F)
    for slot in (0, 1, 31, 32, 63, 64, 255, 256, 300, 511):
        k, v = (rng.standard_normal((2, dim)) * 10.0 ** rng.integers(-3, 4)).astype(F)
        by_numpy.put(slot, k, v)
        key, value = memory(k), memory(v)
        temp.array[:dim] = k  # as after RoPE: the row is its own scratch
        assert put_key(temp.at, dim, by_kernel.keys.at, slot, temp.at) == 0
        assert put_value(value.at, dim, by_kernel.width, by_kernel.values.at, slot, temp.at) == 0
        assert same_bits(value.array, v) and all(m.intact() for m in (key, value, temp))
    assert same_bits(by_kernel.keys.array, by_numpy.keys.array) and same_bits(by_kernel.values.array, by_numpy.values.array)
    assert by_kernel.keys.intact() and by_kernel.values.intact()


def test_saturation():
    """A number beyond float16 is told by that kind alone."""
    for kv in KINDS:
        cache, row, temp = Cache(kv, 16, BLOCK), memory(np.full(16, 1e5, F)), Memory(16, F)
        put_key, put_value = cache_rows(kv)
        assert put_key(row.at, 16, cache.keys.at, 3, temp.at) == (kv == "f16")
        assert put_value(row.at, 16, cache.width, cache.values.at, 3, temp.at) == (kv == "f16")


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("dim", [18, 64, 80, 128])
def test_erasing_takes_the_values_of_those_positions_alone(kv, dim):
    """NaN rows put in by the kernel are gone after their positions are erased, across a block's end; every other byte stays."""
    config = SimpleNamespace(head_dim=dim, n_layers=2, n_kv_heads=2, sliding_window=None)
    cache, untouched = (KVCache(config, 2 * BLOCK, 1, kv) for _ in range(2))
    _, put_value = cache_rows(kv)
    width, head_bytes = cache.width, cache.values.strides[1]
    rng, temp = np.random.default_rng(dim), Memory(-(-dim // 16) * 16, F)
    for slot in (0, BLOCK - 3, BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1):
        erased = BLOCK - 2 <= slot <= BLOCK
        for number in range(4):
            row = rng.standard_normal(dim).astype(F)
            good, bad = memory(row), memory(np.where(np.arange(dim) == number, np.nan, row).astype(F))
            for target in (cache, untouched):
                at = target.values.__array_interface__["data"][0] + number * head_bytes
                if target is cache or not erased:
                    put_value((bad if erased else good).at, dim, width, at, slot, temp.at)
    assert cache.values.tobytes() != untouched.values.tobytes()
    cache.erase(BLOCK - 2, 3)
    if kv == "q8":  # codes without a scale mean nothing
        assert (cache.values["scales"] == untouched.values["scales"]).all()
    else:
        assert cache.values.tobytes() == untouched.values.tobytes()


def code_row(x):
    """(codes as bytes, scale)."""
    row, temp = memory(np.asarray(x, F)), Memory(-(-len(x) // 16) * 16, F)
    scale = to_codes(row.at, len(x), temp.at)
    assert temp.intact() and same_bits(row.array, np.asarray(x, F))
    return temp.array.view(np.uint8)[: len(x)].astype(int), scale


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e38])
@pytest.mark.parametrize("count", [1, 16, 90, 128])
def test_codes(size, count):
    """The largest number is 127 steps from 0 and every other within half a step of its own; halves go to the even code."""
    x = (np.random.default_rng(count).uniform(-1, 1, count) * size).astype(F)
    codes, scale = code_row(x)
    assert np.abs(codes - 128).max() == 127 and scale == F(np.abs(x).max()) / F(127)
    assert (np.abs((codes - 128) * np.float64(scale) - x) <= np.float64(scale) * 0.500001).all()
    halves, scale = code_row([127, 0.5, 1.5, -0.5, -1.5, -2.5])
    assert scale == 1 and (halves - 128).tolist() == [127, 0, 2, 0, -2, -2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_codes_of_odd_rows():
    """Zeros and what is next to nothing become 0 with scale 0; a NaN or an infinity, wherever it stands, a NaN for a scale."""
    for x in (np.zeros(20), np.full(20, 1e-40), np.full(20, -9e-31)):
        codes, scale = code_row(x)
        assert scale == 0 and (codes == 128).all()
    for bad in (np.nan, np.inf, -np.inf):
        for at in (0, 15, 16, 19):
            x = np.ones(20)
            x[at] = bad
            codes, scale = code_row(x)
            assert np.isnan(scale) and (codes == 128).all()


def digits_of(x):
    """(Memory of digits with their tail, bytes of the digits)."""
    row, out = memory(np.asarray(x, F)), Memory(2 * len(x) + 8, np.uint8)
    to_digits(row.at, len(x), out.at, out.at + 2 * len(x))
    assert row.intact() and out.intact()
    return out, 2 * len(x)


@pytest.mark.parametrize("count", [16, 128, 256])
def test_digits(count):
    """128 * high + low times the scale is the number within half a scale, which is 1 / 16,256 of the largest; the sum is that of all."""
    x = np.random.default_rng(count).standard_normal(count).astype(F)
    x[:4] = np.abs(x).max() * np.array([1, -1, 64 / LARGEST, -192 / LARGEST], F)
    out, size = digits_of(x)
    digits = out.array[:size].view(np.int8).reshape(-1, 2, 4).astype(int)
    whole = (128 * digits[:, 0] + digits[:, 1]).ravel()
    total, scale = out.array[size:].view(np.int32)[0], out.array[size:].view(F)[1]
    assert np.abs(whole).max() == LARGEST and np.abs(digits[:, 1]).max() <= 64 and np.abs(digits[:, 0]).max() == 127
    assert total == whole.sum() and (np.abs(whole * np.float64(scale) - x) <= scale * 0.501).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_digits_of_odd_rows():
    """Zeros are zeros with scale 0; what is not finite has a NaN for a scale."""
    for value, scale in ((0.0, 0.0), (1e-35, 0.0), (np.nan, np.nan), (np.inf, np.nan)):
        x = np.zeros(32, F)
        x[20] = value
        out, size = digits_of(x)
        assert (out.array[:size] == 0).all() and np.array_equal(out.array[size:].view(F)[1], F(scale), equal_nan=True)


@functools.lru_cache(maxsize=None)
def tile_kernel(rows):
    """The tile as a function that Python can call."""
    tile = digit_tile(rows, 3 if rows >= 4 else None)
    return njit(lambda a, b, c, d, e, f, g, h, i: tile(a, b, c, d, e, f, g, h, i))


def check_products(x, codes, begin):
    """The tile against exact integers: float32 of the sum, times the row's scale, bit for bit."""
    rows, count = x.shape
    made, codes = memory(np.stack([digits_of(row)[0].array for row in x])), memory(codes, np.uint8)
    out = Memory((rows, CELL), F)
    size = made.array.shape[1]
    tile_kernel(rows)(made.at, size, made.at + 2 * count, codes.at, begin, count // 4, out.at, 4 * CELL, codes.at)
    assert out.intact() and made.intact() and codes.intact()
    digits = made.array[:, : 2 * count].view(np.int8).reshape(rows, -1, 2, 4).astype(np.int64)
    exact = np.einsum("rgj,gij->ri", 128 * digits[:, :, 0] + digits[:, :, 1], codes.array.astype(np.int64) - ZERO)
    scales = np.ascontiguousarray(made.array[:, 2 * count + 4 :]).view(F)
    assert same_bits(out.array, exact.astype(F) * scales)
    return exact


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_products_are_exact(rows):
    """Random rows and codes, over all words or from the first that is not 0 on; and the largest sum there can be, of 1,024 numbers."""
    rng = np.random.default_rng(rows)
    for begin in (0, 1):
        x = rng.standard_normal((rows, 128)).astype(F)
        x[:, : 4 * begin] = 0
        check_products(x, rng.integers(0, 256, (32, CELL, 4)), begin)
    codes = rng.choice([1, 255], (256, CELL, 4))
    codes[:, 3], codes[:, 4] = 1, 255
    assert np.abs(check_products(np.full((rows, 1024), -1, F), codes, 0)).max() == 1024 * LARGEST * 127
