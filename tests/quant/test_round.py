"""Rounding: the plain law, and the kernel that must give the same bytes."""

import numpy as np
import pytest

from npmix.errors import ConversionError
from npmix.formats import PACKED, packed_bytes
from npmix.kernels.rounding import round_rows
from npmix.quant.pack import dequantize, pack
from npmix.quant.round import LARGEST, quantise, status
from npmix.quant.tensor import Tensor

LIMITS = {"q8": 4.3e-5, "q4": 0.0096}  # relative squared error on Gaussian weights, group 128 being the worst


def fast(w, format, group):
    out = np.full(packed_bytes(format, *w.shape, group), 0xA5, np.uint8)
    assert round_rows(w, format, group, out) == 0
    return out


def edge_weights(rows, cols, seed):
    """Gaussian rows of many sizes with zero groups, single spikes, ties, exact grids, subnormals and the largest allowed."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols))
    w *= 10.0 ** rng.integers(-9, 5, (rows, 1))
    w[0] = 0
    if rows > 5:
        w[1, : cols // 2] = 0
        w[2] = 0
        w[2, cols // 3] = -3e-5
        w[3] = np.where(np.arange(cols) % 2, 0.25, -0.25)
        w[4] = rng.integers(-8, 8, cols) * 0.5
        w[5] = rng.standard_normal(cols) * 1e-40
    return w.astype(np.float32)


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_kernel_equals_twin(format, group):
    """The kernel's packed bytes equal the twin's, on random and edge input and every kind of padding."""
    for seed, shape in enumerate([(16, 2 * group), (7, 65), (33, 3 * group + 5), (1, 1), (16, 7)]):
        w = edge_weights(*shape, seed)
        assert (fast(w, format, group) == pack(*quantise(w, format, group), format, group)).all()


@pytest.mark.compiled
@pytest.mark.parametrize("format", PACKED)
def test_kernel_equals_twin_on_many_weights(format):
    """The same on a million weights, half of them of a heavy-tailed distribution."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((512, 2048)).astype(np.float32) * np.float32(0.02)
    w[256:] *= rng.standard_t(2, (256, 2048)).astype(np.float32)
    assert (fast(w, format, 64) == pack(*quantise(w, format, 64), format, 64)).all()


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_error_is_small_and_bounded(format, group):
    """Relative squared error on Gaussian weights stays below its known value; no weight is off by more than one step."""
    w = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    codes, scales = quantise(w, format, group)
    back = dequantize(Tensor(pack(codes, scales, format, group), format, w.shape, group))
    assert ((back - w) ** 2).sum() / (w**2).sum() < LIMITS[format]
    if format == "q8":
        step = np.repeat(scales.astype(np.float32), group, axis=1)
        assert (np.abs(back - w) <= 0.5001 * step).all()


def test_weights_on_a_grid_come_back_exactly():
    """Weights that are code * scale for a float16 scale and use the whole range are reproduced exactly."""
    rng = np.random.default_rng(2)
    q4 = rng.integers(-8, 8, (16, 64)).astype(np.float32)
    q4[:, 0] = -8
    q8 = rng.integers(-127, 128, (16, 64)).astype(np.float32)
    q8[:, 0] = 127
    for format, codes in (("q4", q4), ("q8", q8)):
        for scale in (0.25, -0.25, 3.0, 2.0**-24, 0.1003418) if format == "q4" else (0.25, 2.0**-24, 0.1003418):
            w = codes * np.float32(np.float16(scale))
            back = dequantize(Tensor(pack(*quantise(w, format, 64), format, 64), format, w.shape, 64))
            assert (back == w).all(), (format, scale)


@pytest.mark.parametrize("format", PACKED)
def test_zero_groups_have_scale_zero(format):
    """A group of zeros (also of -0.0) gets scale +0 and the code that means 0."""
    w = np.zeros((16, 128), np.float32)
    w[3] = -0.0
    w[5, 100] = 1.0
    codes, scales = quantise(w, format, 64)
    assert (scales[:, 0].view(np.uint16) == 0).all() and (codes[:, :64] == PACKED[format].zero).all()
    assert scales[5, 1] != 0


@pytest.mark.parametrize("format", PACKED)
def test_tiny_weights_do_not_vanish_early(format):
    """Below float16's normal range the scale stays nonzero, and the error stays below its step of 2^-24."""
    w = (np.random.default_rng(3).standard_normal((16, 64)) * 1e-7).astype(np.float32)
    codes, scales = quantise(w, format, 64)
    assert (scales != 0).all()
    back = dequantize(Tensor(pack(codes, scales, format, 64), format, w.shape, 64))
    assert (np.abs(back - w) <= 2.0**-25 + 1e-12).all()


@pytest.mark.parametrize("format", PACKED)
def test_bad_weights_are_refused(format):
    """NaN and infinity are status 1, weights whose scale would overflow float16 status 2, in the twin and the kernel."""
    out = np.empty(packed_bytes(format, 20, 100, 32), np.uint8)
    largest = np.float32(LARGEST[format])
    for bad, expected in ((np.nan, 1), (np.inf, 1), (-np.inf, 1), (largest * np.float32(1.01), 2), (-largest * np.float32(1.01), 2)):
        for place in ((0, 0), (19, 99), (16, 31)):
            w = np.ones((20, 100), np.float32)
            w[place] = bad
            with np.errstate(invalid="ignore"):  # without the JIT, NumPy computes infinity - infinity
                assert status(w, format) == expected == round_rows(w, format, 32, out)
            with pytest.raises(ConversionError):
                quantise(w, format, 32)
    w = np.full((20, 100), largest, np.float32)
    assert status(w, format) == 0 == round_rows(w, format, 32, out)
    back = dequantize(Tensor(out, format, w.shape, 32))
    assert (np.abs(back / w - 1) < 0.01).all()


def test_kernel_refuses_a_wrong_buffer():
    """A buffer of the wrong size never reaches the kernel, which has no bounds checks."""
    with pytest.raises(ValueError):
        round_rows(np.zeros((16, 64), np.float32), "q4", 32, np.empty(10, np.uint8))
