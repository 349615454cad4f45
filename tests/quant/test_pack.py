"""Packing: the byte order of `formats`, and its inverse."""

import numpy as np
import pytest

from npmix.formats import PACKED, packed_bytes, span_bytes, spans
from npmix.quant.pack import dequantize, pack, unpack
from npmix.quant.tensor import Tensor

SHAPES = [(16, 64), (1, 1), (17, 129), (40, 256), (15, 300)]


def random_codes(format, rows, cols, group, seed=0):
    rng = np.random.default_rng(seed)
    low = 1 if format == "q8" else 0
    codes = rng.integers(low, 1 << PACKED[format].bits, (rows, cols), dtype=np.uint8)
    scales = rng.standard_normal((rows, -(-cols // group))).astype(np.float16)
    return codes, scales


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_is_the_inverse_of_pack(format, group, shape):
    """unpack(pack(codes, scales)) gives back both, whatever the padding."""
    codes, scales = random_codes(format, *shape, group)
    data = pack(codes, scales, format, group)
    assert data.dtype == np.uint8 and data.size == packed_bytes(format, *shape, group)
    back, back_scales = unpack(data, format, shape, group)
    assert (back == codes).all() and (back_scales.view(np.uint16) == scales.view(np.uint16)).all()


@pytest.mark.parametrize("format", PACKED)
def test_bytes_lie_where_the_format_says(format):
    """Weight (n, k): 16 scales of a group side by side, then lines of 16 rows x 4 inputs, low nibbles before high ones."""
    group, shape = 32, (20, 150)
    codes, scales = random_codes(format, *shape, group)
    data = pack(codes, scales, format, group).reshape(2, spans(shape[1], group), span_bytes(format, group))
    step = PACKED[format].step
    for n in range(shape[0]):
        for k in range(shape[1]):
            span = data[n // 16, k // (2 * group)]
            at = 32 * (k // group % 2) + 2 * (n % 16)
            assert span[at : at + 2].tobytes() == scales[n, k // group].tobytes()
            inside = k % (2 * group)
            byte = span[64 + inside // step * 64 + 4 * (n % 16) + k % 4]
            if step == 8:
                byte = byte >> 4 if inside % 8 >= 4 else byte & 15
            assert byte == codes[n, k]


@pytest.mark.parametrize("format", PACKED)
def test_padding_is_zero_weights(format):
    """Rows and inputs beyond the matrix hold the code for 0 and scale 0, so kernels may run over them."""
    codes, scales = random_codes(format, 3, 5, 32)
    data = pack(codes, scales, format, 32)
    all_codes, all_scales = unpack(data, format, (16, 64), 32)
    assert (all_codes[3:] == PACKED[format].zero).all() and (all_codes[:, 5:] == PACKED[format].zero).all()
    assert (all_scales[3:] == 0).all() and (all_scales[:, 1:] == 0).all()


@pytest.mark.parametrize("format", PACKED)
def test_dequantize_is_code_minus_zero_times_scale(format):
    """A weight is (code - zero) * scale in float32, exactly."""
    codes, scales = random_codes(format, 18, 100, 32)
    tensor = Tensor(pack(codes, scales, format, 32), format, (18, 100), 32)
    expected = (codes.astype(np.float32) - PACKED[format].zero) * np.repeat(scales.astype(np.float32), 32, axis=1)[:, :100]
    assert (dequantize(tensor) == expected).all()


def test_dequantize_of_dense_tensors():
    """bf16 bits, float16 and float32 become the float32 they mean."""
    x = np.array([[1.5, -2.0], [0.0, 3.25]], np.float32)
    bf16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    for data, format in ((x, "f32"), (x.astype(np.float16), "f16"), (bf16, "bf16")):
        assert (dequantize(Tensor(data, format, x.shape)) == x).all()


def test_unpack_refuses_a_wrong_size():
    """A buffer that is not exactly the packed size is refused before it is read."""
    with pytest.raises(ValueError):
        unpack(np.zeros(64, np.uint8), "q4", (16, 64), 32)
