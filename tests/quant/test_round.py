"""Rounding: the plain law, and the kernel that must give the same bytes."""

import numpy as np
import pytest
from test_pack import PAIRS, meanings

from npmix.errors import ConversionError
from npmix.formats import PACKED, packed_bytes
from npmix.kernels._jit import DISABLED
from npmix.kernels.rounding import round_rows
from npmix.quant.pack import dequantize, integers, pack
from npmix.quant.round import FINE, NOT_FINITE, TOO_LARGE, largest, quantise, status
from npmix.quant.tensor import Tensor

# Relative squared error on Gaussian weights in the format's own group. A better table may lower a budget; nothing may raise one.
BUDGETS = {"q8": 4.0e-5, "q6": 3.2e-4, "q5": 0.00113, "q4": 0.00402, "q3": 0.0180, "q2": 0.0545}
HALF = 2.0**-11  # a float16 scale is off by this share at most


def fast(w, name, group, importance=None):
    out = np.full(packed_bytes(name, *w.shape, group), 0xA5, np.uint8)
    assert round_rows(w, name, group, out, importance) == FINE
    return out


def plain(w, name, group, importance=None):
    return pack(*quantise(w, name, group, importance), name, group)


def rounded(w, name, group, importance=None):
    """What the weights are after rounding, float32 (N, K)."""
    return dequantize(Tensor(plain(w, name, group, importance), name, w.shape, group))


def edge_weights(rows, cols, seed):
    """Gaussian rows of many sizes with zero groups, single spikes, ties, exact grids, outliers, subnormals and one repeated value."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols))
    w *= 10.0 ** rng.integers(-9, 5, (rows, 1))
    w[0] = 0
    if rows > 8:
        w[1, : cols // 2] = 0
        w[2] = 0
        w[2, cols // 3] = -3e-5
        w[3] = np.where(np.arange(cols) % 2, 0.25, -0.25)
        w[4] = rng.integers(-8, 8, cols) * 0.5
        w[5] = rng.standard_normal(cols) * 1e-40
        w[6, cols // 2] = 1e4
        w[7] = -0.3
        w[8] = rng.standard_normal(cols) * 2e5
    return w.astype(np.float32)


def importances(cols, seed):
    """float32 (K,): none; of many sizes; with inputs, and whole groups, that never mattered."""
    rng = np.random.default_rng(seed)
    wide = rng.lognormal(0, 2, cols).astype(np.float32)
    return None, wide, np.where(np.arange(cols) % 300 < 150, 0, wide).astype(np.float32), wide * np.float32(1e-8)


@pytest.mark.parametrize("name, group", PAIRS)
def test_kernel_equals_twin(name, group):
    """The kernel's packed bytes equal the twin's, on random and edge input, every kind of padding, with and without importances."""
    shapes = [(1, 1), (17, group + 5)] if DISABLED else [(1, 1), (16, 2 * group), (7, 65), (33, 3 * group + 5), (16, 7)]
    for seed, shape in enumerate(shapes):
        w = edge_weights(*shape, seed)
        for importance in importances(shape[1], seed)[: 2 if DISABLED else None]:
            assert (fast(w, name, group, importance) == plain(w, name, group, importance)).all()


@pytest.mark.compiled
@pytest.mark.parametrize("name", PACKED)
def test_kernel_equals_twin_on_many_weights(name):
    """The same on a quarter of a million weights, half of them of a heavy-tailed distribution, under importances like a model's."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((256, 1024)).astype(np.float32) * np.float32(0.02)
    w[128:] *= rng.standard_t(2, (128, 1024)).astype(np.float32)
    for importance in importances(1024, 6)[:2]:
        assert (fast(w, name, PACKED[name].group, importance) == plain(w, name, PACKED[name].group, importance)).all()


@pytest.mark.parametrize("name", PACKED)
def test_error_keeps_its_budget(name):
    """Relative squared error on Gaussian weights stays below the format's budget, in its own group and in any finer one."""
    w = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    for group in PACKED[name].groups:
        if group <= PACKED[name].group:
            assert ((rounded(w, name, group) - w) ** 2).sum() / (w**2).sum() < BUDGETS[name]


def test_budgets_fall_with_bits():
    """Each bit more costs less error."""
    worst = [BUDGETS[name] for name in sorted(PACKED, key=lambda name: PACKED[name].bits)]
    assert worst == sorted(worst, reverse=True) and len(set(worst)) == len(worst)


@pytest.mark.parametrize("group, share", [(32, 0.87), (64, 0.92), (128, 0.95)])
def test_8_bits_are_closer_than_the_largest_weight_at_127(group, share):
    """The squared error of q8 is clearly less than that of scales max|w| / 127, few groups have more, and no
    weight is off by two steps."""
    w = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32)
    groups = w.reshape(256, -1, group)
    simple = (np.abs(groups).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
    before = ((np.rint(groups / simple) * simple - groups) ** 2).sum(-1)
    missed = (rounded(w, "q8", group) - w).reshape(groups.shape)
    after = (missed**2).sum(-1)
    assert after.sum() < share * before.sum() and (after > before).mean() < 0.08
    assert (np.abs(missed) < 2 * simple).all()


@pytest.mark.parametrize("name", PACKED)
def test_importance_lowers_the_error_that_counts(name):
    """With an importance of each input the squared error under these weights falls, clearly where they differ a lot; equal importances
    of any power of two change nothing."""
    rng, group = np.random.default_rng(2), PACKED[name].group
    w, v = rng.standard_normal((32, 512)).astype(np.float32), rng.lognormal(0, 1.5, 512).astype(np.float32)
    without, with_it = (float((((rounded(w, name, group, given) - w) ** 2) * v).sum()) for given in (None, v))
    assert with_it < 0.9 * without
    assert (plain(w, name, group, np.full(512, 0.25, np.float32)) == plain(w, name, group)).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_weights_on_a_grid_come_back_exactly(name, group):
    """Weights that are integer * scale for a float16 scale, and reach the format's largest integer, are reproduced exactly."""
    spec, rng, shape = PACKED[name], np.random.default_rng(2), (16, 2 * group)
    codes = rng.integers(0, 1 << spec.bits, shape, dtype=np.uint8)
    selectors = rng.integers(0, len(spec.multipliers), (16, 2 * group // spec.per), dtype=np.uint8)
    selector, code = np.unravel_index(np.abs(meanings(name)).argmax(), np.shape(meanings(name)))
    codes[:, ::group] = code
    selectors[:, :: group // spec.per] = selector
    whole = integers(codes, selectors, name)
    assert (np.abs(whole[:, ::group]) == spec.top).all()
    for scale in (0.25, 2.0**-24, 0.1003418):
        w = whole.astype(np.float32) * np.float32(np.float16(scale))
        assert (rounded(w, name, group) == w).all(), scale


@pytest.mark.parametrize("name, group", PAIRS)
def test_zero_groups_have_scale_zero(name, group):
    """A group of zeros (also of -0.0) gets scale +0, selectors 0 and the code that pads: the bytes of what lies outside the matrix."""
    w = np.zeros((16, 2 * group), np.float32)
    w[3] = -0.0
    w[5, group + 9] = 1.0
    codes, scales, selectors = quantise(w, name, group)
    assert (scales[:, 0].view(np.uint16) == 0).all() and (codes[:, :group] == PACKED[name].pad).all()
    assert (selectors[:5] == 0).all() and scales[5, 1] != 0
    assert (fast(w[:5], name, group) == fast(np.zeros((5, 1), np.float32), name, group)).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_one_repeated_value(name, group):
    """A group of one value, of either sign, has no error but that of its float16 scale."""
    for value in (1.0, -0.3, 777.7):
        w = np.full((3, group + 5), value, np.float32)
        assert (np.abs(rounded(w, name, group) / w - 1) <= 2 * HALF).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_an_outlier_costs_its_group_alone(name, group):
    """One weight of 1e4 among Gaussian ones: its group's squared error is at most that of the scale which makes it the largest integer,
    where all others take the integer of least size that their selector offers; other groups have the bytes they had without it."""
    spec = PACKED[name]
    w = np.random.default_rng(3).standard_normal((16, 2 * group)).astype(np.float32)
    rows = np.array(meanings(name))
    least, step = np.abs(rows).min(1), 1e4 / spec.top  # by selector
    for outlier in (1e4, -1e4):
        x = w.copy()
        x[:, 7] = outlier
        back, rest = rounded(x, name, group), (w[:, :group] ** 2).sum(1)
        reach = (rows * np.sign(outlier)).max(1)  # the outlier's own sub-block takes a selector that comes nearest to it
        if not spec.selector_bits:  # or the scale takes its sign
            reach = np.abs(rows).max(1)
        short = 1 - reach.max() / spec.top
        beside = (spec.per - 1) * (least[reach == reach.max()].min() * step) ** 2
        apart = (group - spec.per) * (least.min() * step) ** 2
        bound = beside + apart + (1e4 * (HALF + short)) ** 2
        assert (((back - x)[:, :group] ** 2).sum(1) < 1.1 * bound + 4 * rest).all()
        assert (back[:, group:] == rounded(w, name, group)[:, group:]).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_tiny_weights_do_not_vanish_early(name, group):
    """Below float16's normal range the scale stays nonzero; in no group is the error more than if all took the least integer times the least
    scale, 2^-24: nothing that small is blown up."""
    least = min(abs(x) for row in meanings(name) for x in row)
    for size in (1e-9, 1e-8, 3e-8, 1e-7, 3e-7):
        w = (np.random.default_rng(3).standard_normal((64, group)) * size).astype(np.float32)
        assert (quantise(w, name, group)[1] != 0).all()
        error, own = (np.sqrt((a.astype(np.float64) ** 2).mean(1)) for a in (rounded(w, name, group) - w, w))
        assert (error <= 1.0001 * (own + least * 2.0**-24)).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_bad_weights_are_refused(name, group):
    """NaN and infinity are status 1, weights whose scale would overflow float16 status 2, in the twin and the kernel; the largest pass."""
    out = np.empty(packed_bytes(name, 20, 100, group), np.uint8)
    top = np.float32(largest(name))
    cases = [(np.nan, NOT_FINITE), (np.inf, NOT_FINITE), (-np.inf, NOT_FINITE)]
    cases += [(top * np.float32(1.01), TOO_LARGE), (-top * np.float32(1.01), TOO_LARGE)]
    for bad, expected in cases:
        for place in ((0, 0), (15, 99), (19, 99), (16, 31))[: 1 if DISABLED else None]:
            w = np.ones((20, 100), np.float32)
            w[place] = bad
            with np.errstate(invalid="ignore"):  # without the JIT, NumPy computes infinity - infinity
                assert status(w, name) == expected == round_rows(w, name, group, out)
            with pytest.raises(ConversionError):
                quantise(w, name, group)
    w = np.full((20, 100), top, np.float32)
    assert status(w, name) == FINE == round_rows(w, name, group, out)
    reach = PACKED[name].top  # scales without selectors have any sign, multipliers of selectors not that of the largest integer
    if PACKED[name].selector_bits:
        reach = max(x for row in meanings(name) for x in row)
    assert (np.abs(dequantize(Tensor(out, name, w.shape, group)) / w - 1) < 1.01 - reach / PACKED[name].top).all()


@pytest.mark.parametrize("name, group", PAIRS)
def test_kernel_refuses_a_wrong_buffer(name, group):
    """A buffer of the wrong size or stride, other weights than float32 or a group the format has not never reach the kernel, which has
    no bounds checks."""
    w, size = np.zeros((16, 64), np.float32), packed_bytes(name, 16, 64, group)
    for arguments in (
        (w, name, group, np.empty(size - 1, np.uint8)),
        (w, name, group, np.empty(size, np.int8)),
        (w, name, group, np.empty(2 * size, np.uint8)[::2]),
        (w.astype(np.float64), name, group, np.empty(size, np.uint8)),
        (w, name, 16, np.empty(packed_bytes(name, 16, 64, 16), np.uint8)),
    ):
        with pytest.raises(ValueError):
            round_rows(*arguments)
