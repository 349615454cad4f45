"""Packing: the byte order of `formats`, its inverse, and the integers that codes and selectors mean."""

import numpy as np
import pytest

from npmix.formats import CHUNK, DENSE, GROUPS, PACKED, ROW_BLOCK, codes_at, packed_bytes, span_bytes, spans
from npmix.quant.pack import dequantize, integers, pack, unpack
from npmix.quant.tensor import Tensor

PAIRS = [(name, group) for name, spec in PACKED.items() for group in spec.groups]
SHAPES = [(16, 64), (1, 1), (17, 129), (40, 256), (15, 300)]


def meanings(name):
    """Integers [selector][code] of a format."""
    spec = PACKED[name]
    return [[m * value for value in spec.row(s)] for s, m in enumerate(spec.multipliers)]


def random_parts(name, rows, cols, group, seed=0):
    """Codes, scales of both signs and selectors of a matrix."""
    spec, rng = PACKED[name], np.random.default_rng(seed)
    codes = rng.integers(0, 1 << spec.bits, (rows, cols), dtype=np.uint8)
    scales = rng.standard_normal((rows, -(-cols // group))).astype(np.float16)
    selectors = rng.integers(0, len(spec.multipliers), (rows, -(-cols // spec.per)), dtype=np.uint8)
    return codes, scales, selectors


def bits_at(data, first, count):
    """`count` bits of bytes, taken as one little-endian number, from bit `first`."""
    return int.from_bytes(data.tobytes(), "little") >> first & (1 << count) - 1


@pytest.mark.parametrize("name", PACKED)
def test_a_format_is_sound(name):
    """What the kernels rely on: every product of value and multiplier is an int8, as many values as
    codes and multipliers as selectors, values ascending, planes that fill lines and selectors that fill bytes."""
    spec = PACKED[name]
    assert set(spec.groups) <= set(GROUPS) and spec.group in spec.groups and name not in DENSE
    assert all(p in (1, 2, 4, 8) for p in spec.planes) and spec.bits <= 8
    if not spec.values:
        assert spec.bits == 8 and spec.pad == 128 and spec.top == 128 and meanings(name) == [list(range(-128, 128))]
        return
    rows = meanings(name)
    assert all(len(set(row)) == len(row) == 1 << spec.bits and list(row) in (sorted(row), sorted(row, reverse=True)) for row in rows)
    assert max(abs(x) for row in rows for x in row) == spec.top <= 127
    assert len(rows) << spec.bits <= 128  # of one instruction
    assert len(rows) == 1 << spec.selector_bits and spec.group % spec.per == 0 and spec.per % 4 == 0 and CHUNK % spec.per == 0
    if not spec.selector_bits:  # scales of least squares alone: any group, and none of the sizes that selectors need
        assert spec.groups == GROUPS and spec.selector_bytes(spec.word) == 0 and codes_at(name, spec.group) == 64
    else:
        assert spec.groups == (spec.group,) and spec.unit > 0
        assert spec.group % spec.word == 0 and spec.word // spec.per * spec.selector_bits in (8, 16, 24, 32)
        assert span_bytes(name, spec.group) * 8 == 16 * (32 + 2 * spec.group * spec.bits + 2 * spec.group // spec.per * spec.selector_bits)


@pytest.mark.parametrize("name, group", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_is_the_inverse_of_pack(name, group, shape):
    """unpack(pack(codes, scales, selectors)) gives back all three, whatever the padding."""
    given = random_parts(name, *shape, group)
    data = pack(*given, name, group)
    assert data.dtype == np.uint8 and data.size == packed_bytes(name, *shape, group)
    for part, back in zip(given, unpack(data, name, shape, group), strict=True):
        assert part.dtype == back.dtype and part.shape == back.shape and part.tobytes() == back.tobytes()


@pytest.mark.parametrize("name, group", PAIRS)
def test_bytes_lie_where_the_format_says(name, group):
    """Weight (n, k), bit by bit: 16 scales of a group side by side; then each row's selectors of a word as one number, lowest bits first;
    then a chunk's planes, each of lines of 16 rows x 4 bytes that hold 8 / p vectors of 4 inputs, lowest bits first."""
    spec, (rows, cols) = PACKED[name], (20, 2 * group + 21)
    codes, scales, selectors = random_parts(name, rows, cols, group)
    data = pack(codes, scales, selectors, name, group).reshape(2, spans(cols, group), span_bytes(name, group))
    for n in range(rows):
        for k in range(cols):
            span, inside, lane = data[n // ROW_BLOCK, k // (2 * group)], k % (2 * group), n % ROW_BLOCK
            at = 32 * (inside // group) + 2 * lane
            assert span[at : at + 2].tobytes() == scales[n, k // group].tobytes()
            if spec.selector_bits:
                size = spec.word // spec.per * spec.selector_bits // 8
                at = 64 + (inside // spec.word * ROW_BLOCK + lane) * size
                first = inside % spec.word // spec.per * spec.selector_bits
                assert bits_at(span[at : at + size], first, spec.selector_bits) == selectors[n, k // spec.per]
            at, code, low = codes_at(name, group) + inside // CHUNK * CHUNK * 2 * spec.bits, 0, 0
            for p in spec.planes:
                vector = inside % CHUNK // 4
                byte = at + vector // (8 // p) * 64 + 4 * lane + k % 4
                code |= bits_at(span[byte : byte + 1], p * (vector % (8 // p)), p) << low
                at, low = at + CHUNK * 2 * p, low + p
            assert code == codes[n, k]


@pytest.mark.parametrize("name, group", PAIRS)
def test_padding_is_zero_weights(name, group):
    """Rows and inputs beyond the matrix hold the format's pad, selector 0 and scale 0, so kernels may run over them."""
    spec = PACKED[name]
    data = pack(*random_parts(name, 3, 5, group), name, group)
    codes, scales, selectors = unpack(data, name, (16, 2 * group), group)
    assert (codes[3:] == spec.pad).all() and (codes[:, 5:] == spec.pad).all()
    assert (scales[3:] == 0).all() and (scales[:, 1:] == 0).all()
    assert (selectors[3:] == 0).all() and (selectors[:, -(-5 // spec.per) :] == 0).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_dequantize_is_integer_times_scale(name, group):
    """A weight is (code - 128) * scale, or what selector and code mean * scale: the exact product rounded once to float32."""
    spec, (rows, cols) = PACKED[name], (18, 100)
    codes, scales, selectors = random_parts(name, rows, cols, group)
    back = dequantize(Tensor(pack(codes, scales, selectors, name, group), name, (rows, cols), group))
    whole = integers(codes, selectors, name)
    for n in range(rows):
        for k in range(cols):
            exact = meanings(name)[selectors[n, k // spec.per]][codes[n, k]]
            assert whole[n, k] == exact
            assert back[n, k] == np.float32(float(exact) * float(scales[n, k // group]))


def test_dequantize_of_dense_tensors():
    """bf16 bits, float16 and float32 become the float32 they mean."""
    x = np.array([[1.5, -2.0], [0.0, 3.25]], np.float32)
    bf16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    for data, name in ((x, "f32"), (x.astype(np.float16), "f16"), (bf16, "bf16")):
        assert (dequantize(Tensor(data, name, x.shape)) == x).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_unpack_refuses_a_wrong_size(name, group):
    """A buffer that is not exactly the packed size is refused before it is read."""
    size = packed_bytes(name, 16, 64, group)
    for wrong in (64, size - 1, size + 1):
        with pytest.raises(ValueError):
            unpack(np.zeros(wrong, np.uint8), name, (16, 64), group)
