"""Error-compensating rounding: the factors, the plain law, and the kernel that must give the same bytes."""

import numpy as np
import pytest

from npmix.errors import CalibrationError
from npmix.formats import DAMPING, MOMENTS, PACKED, packed_bytes
from npmix.kernels.compensate import round_rows_compensated
from npmix.quant.compensate import factors, quantise_compensated
from npmix.quant.pack import dequantize, pack
from npmix.quant.round import largest, quantise
from npmix.quant.tensor import Tensor

COMPENSATED = [name for name, spec in PACKED.items() if spec.values and spec.group == MOMENTS]


def moments(cols, seed=0, rank=24, noise=0.5):
    """Second moments of inputs that `rank` hidden causes move together: float32 (blocks, 128, 128), zeros past the last input."""
    rng = np.random.default_rng(seed)
    blocks = -(-cols // 128)
    x = rng.standard_normal((1000, rank)) @ rng.standard_normal((rank, blocks * 128)) * rank**-0.5
    x = (x + noise * rng.standard_normal(x.shape)) * np.exp(0.5 * rng.standard_normal(x.shape[1]))
    x[:, cols:] = 0
    x = x.reshape(len(x), blocks, 128).transpose(1, 0, 2)
    return (x.transpose(0, 2, 1) @ x / x.shape[1]).astype(np.float32)


def diagonal(h, cols):
    """Column weights with a mean of 1."""
    squares = np.maximum(np.diagonal(h, axis1=1, axis2=2).reshape(-1)[:cols], 1e-6)
    return (squares / squares.mean()).astype(np.float32)


def in_blocks(e, h):
    """Rows of weights as float64 (rows, blocks, 128)."""
    out = np.zeros((len(e), len(h) * 128))
    out[:, : e.shape[1]] = e
    return out.reshape(len(e), -1, 128)


def product(a, h, b):
    """a' H b of each row and block."""
    return np.einsum("rbi,bij,rbj->rb", in_blocks(a, h), h.astype(np.float64), in_blocks(b, h), optimize=True)


def restored(rounded, format, shape):
    return dequantize(Tensor(pack(*rounded, format, 128), format, shape, 128))


def fast(w, format, v, factored):
    out = np.full(packed_bytes(format, *w.shape, 128), 0xA5, np.uint8)
    assert round_rows_compensated(w, format, 128, out, v, factored) == 0
    return out


def edge_weights(rows, cols):
    """Gaussian rows, with a row of zeros, a group of zeros, single spikes, an outlier, a grid, subnormals, tiny and very large ones."""
    w = np.random.default_rng(1).standard_normal((rows, cols)) * 0.02
    w[0] = 0
    w[1, :128] = 0
    w[2], w[2, cols // 3] = 0, -3e-5
    w[3, 5] = 300
    w[4] = np.where(np.arange(cols) % 2, 0.25, -0.25)
    w[5] *= 1e-37
    w[6] *= 1e-6
    w[7] *= 1e6
    return w.astype(np.float32)


@pytest.mark.parametrize("format", COMPENSATED)
def test_kernel_equals_twin(format):
    """The kernel's packed bytes are the twin's on edge rows and padding; a block of moments is correlated, one singular, one of zeros."""
    w, h = edge_weights(11, 300), moments(300)
    h[1] = moments(128, rank=2, noise=0)
    h[2] = 0
    v, factored = diagonal(h, 300), factors(h, 300)
    assert (fast(w, format, v, factored) == pack(*quantise_compensated(w, format, 128, v, factored), format, 128)).all()


@pytest.mark.compiled
@pytest.mark.parametrize("format", COMPENSATED)
def test_kernel_equals_twin_on_many_weights(format):
    """The same on a hundred thousand weights, half of them of a heavy-tailed distribution."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((160, 640)).astype(np.float32) * np.float32(0.02)
    w[80:] *= rng.standard_t(2, (80, 640)).astype(np.float32)
    h = moments(640, 2)
    v, factored = diagonal(h, 640), factors(h, 640)
    assert (fast(w, format, v, factored) == pack(*quantise_compensated(w, format, 128, v, factored), format, 128)).all()


@pytest.mark.parametrize("format", COMPENSATED)
def test_errors_of_correlated_inputs_are_made_up_for(format):
    """The squared error of the outputs, e' H e, is less than half of plain weighted rounding's."""
    w = (np.random.default_rng(3).standard_normal((48, 300)) * 0.02).astype(np.float32)
    h = moments(300)
    v = diagonal(h, 300)
    plain = restored(quantise(w, format, 128, v), format, w.shape) - w
    ours = restored(quantise_compensated(w, format, 128, v, factors(h, 300)), format, w.shape) - w
    assert product(ours, h, ours).sum() < 0.5 * product(plain, h, plain).sum()


@pytest.mark.parametrize("format", COMPENSATED)
def test_without_correlation_it_is_plain_rounding(format):
    """Under the identity, or a block of zeros, nothing is made up for: the error is plain rounding's within a few per cent."""
    w = (np.random.default_rng(4).standard_normal((48, 256)) * 0.02).astype(np.float32)
    h, ones = np.stack([np.eye(128, dtype=np.float32), np.zeros((128, 128), np.float32)]), np.ones(256, np.float32)
    factored = factors(h, 256)
    assert not factored[0].any() and np.ptp(factored[1]) == 0
    plain, ours = (
        restored(found, format, w.shape) - w for found in (quantise(w, format, 128), quantise_compensated(w, format, 128, ones, factored))
    )
    for half in (slice(0, 128), slice(128, 256)):
        assert abs((ours[:, half] ** 2).sum() / (plain[:, half] ** 2).sum() - 1) < 0.04


@pytest.mark.parametrize("format", ["q2", "q3"])
def test_the_scale_does_not_shrink_the_outputs(format):
    """After the last step w' H value equals w' H w in each group up to the scale's float16 (H with its damping)."""
    w = (np.random.default_rng(6).standard_normal((32, 256)) * 0.02).astype(np.float32)
    h = moments(256)
    back = restored(quantise_compensated(w, format, 128, diagonal(h, 256), factors(h, 256)), format, w.shape)
    damped = h + DAMPING * h.diagonal(axis1=1, axis2=2).mean(1)[:, None, None] * np.eye(128, dtype=np.float32)
    assert np.abs(product(w, damped, back) / product(w, damped, w) - 1).max() < 1e-3


def test_factors_are_those_of_the_moments():
    """sum of D (e + F' e)^2 is e' H e of the damped moments over their mean; F looks back only; inputs that do not exist count 0."""
    h, e = moments(200, 7), np.random.default_rng(8).standard_normal((4, 200)).astype(np.float32)
    feedback, weights = factors(h, 200)
    assert not feedback[:, np.tri(128, dtype=bool)].any() and not weights[1, 72:].any() and (weights[0] > 0).all()
    blocks = in_blocks(e, h)
    found = (weights * (blocks + np.einsum("rbi,bik->rbk", blocks, feedback)) ** 2).sum(2)
    mean = h.astype(np.float64).diagonal(axis1=1, axis2=2).mean(1)
    expected = product(e, h / mean[:, None, None].astype(np.float32) + DAMPING * np.eye(128, dtype=np.float32), e)
    assert np.abs(found / expected - 1).max() < 1e-4


def test_moments_that_cannot_be_are_refused():
    """A symmetric matrix with a negative square, which no inputs give, is an error and no NaN."""
    h = np.stack([np.eye(128, dtype=np.float32)] * 2)
    h[1, 3, 4] = h[1, 4, 3] = 5
    with pytest.raises(CalibrationError, match="negative square"):
        factors(h, 256)


def test_the_size_of_moments_does_not_matter():
    """Moments that are a power of two larger or smaller give the same factors to the bit."""
    h = moments(128)
    for scale in (2.0**-60, 2.0**60):
        for a, b in zip(factors(h, 128), factors(h * np.float32(scale), 128)):
            assert (a == b).all()


def test_bad_weights_and_wrong_shapes_are_refused():
    """Status 1 for NaN and infinity, 2 for weights whose scale would overflow; ValueError before a kernel sees arrays of other sizes."""
    factored, v = factors(moments(140), 140), np.ones(140, np.float32)
    out = np.empty(packed_bytes("q4", 16, 140, 128), np.uint8)
    for bad, expected in ((np.nan, 1), (np.inf, 1), (np.float32(largest("q4")) * np.float32(1.01), 2)):
        w = np.ones((16, 140), np.float32)
        w[15, 139] = bad
        with np.errstate(invalid="ignore"):  # without the JIT, NumPy computes infinity - infinity
            assert round_rows_compensated(w, "q4", 128, out, v, factored) == expected
    w = np.ones((16, 140), np.float32)
    for change in ({"out": out[1:]}, {"importance": v[1:]}, {"factored": (factored[0][:1], factored[1])}, {"format": "q8"}, {"group": 64}):
        given = {"format": "q4", "group": 128, "out": out, "importance": v, "factored": factored} | change
        with pytest.raises(ValueError):
            round_rows_compensated(w, **given)
