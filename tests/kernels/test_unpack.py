"""Codes to integers: every way a machine may look them up gives what `quant.pack` says they mean, row block by row block."""

import numpy as np
import pytest
from kernel_tools import Memory, memory, same_bits
from test_dot import FORMS

from npmix.formats import PACKED, packed_bytes
from npmix.kernels import cpu
from npmix.kernels._jit import DISABLED, njit
from npmix.kernels.dot import SMALL
from npmix.kernels.unpack import twin_row_block, unpack_block
from npmix.quant.pack import integers, pack, unpack

PAIRS = [(name, group) for name, spec in PACKED.items() for group in spec.groups]
# Form of the machine code, and whether one instruction reads a table of 128 bytes
WAYS = [(form, False) for form in FORMS] + [(form, True) for form in FORMS if form == "avx512vnni" and cpu.looks_up_bytes()]


def row_block(name, group, n_groups, seed=0):
    """A row block of random bytes, hence of all codes and selectors; scales are finite float16."""
    data = np.random.default_rng(seed).integers(0, 256, packed_bytes(name, 16, n_groups * group, group), dtype=np.uint8)
    spans = data.reshape(n_groups // 2, -1)
    spans[:, :64] = np.random.default_rng(seed + 1).standard_normal((n_groups // 2, 32)).astype(np.float16).view(np.uint8)
    return data


def as_8_bits(data, name, group, n_groups):
    """The same weights as a row block of q8, by NumPy alone."""
    codes, scales, selectors = unpack(data, name, (16, n_groups * group), group)
    return pack((integers(codes, selectors, name) + 128).astype(np.uint8), scales, np.zeros((16, 0), np.uint8), "q8", group)


@pytest.mark.parametrize("name, group", PAIRS)
def test_the_twin_reads_what_was_packed(name, group):
    """The twin's integers and scales of a row block are those of `quant.pack`, though the two share no code."""
    data = memory(row_block(name, group, 6))
    codes, scales, selectors = unpack(data.array, name, (16, 6 * group), group)
    found, found_scales = twin_row_block(name, group, data.at, 6)
    assert (found.reshape(16, -1) == integers(codes, selectors, name)).all()
    assert (found_scales == scales.astype(np.float32)).all()


@pytest.mark.compiled
@pytest.mark.parametrize("form, wide", WAYS)
@pytest.mark.parametrize("name, group", PAIRS)
def test_every_form_unpacks_alike(name, group, form, wide, monkeypatch):
    """Looked up in one table of products, or in tables of 16 and multiplied, in any register: each row block becomes the q8 row block that
    NumPy makes of it, byte for byte, scales included, and no byte beside it is written."""
    monkeypatch.setattr(cpu, "form", lambda: form)
    monkeypatch.setattr(cpu, "looks_up_bytes", lambda: wide)
    one = unpack_block(name, group).inner  # emitted in place, in this form
    run = njit(lambda w, n_groups, out: one(w, n_groups, out))
    run.compile("void(int64, int64, int64)")  # while the form is patched
    for n_groups in (2, 6, 10):
        data = memory(row_block(name, group, n_groups, n_groups))
        out = Memory(packed_bytes("q8", 16, n_groups * group, group), np.uint8)
        run(data.at, n_groups, out.at)
        assert same_bits(out.array, as_8_bits(data.array, name, group, n_groups)) and out.intact() and data.intact()


@pytest.mark.parametrize("name", [name for name, spec in PACKED.items() if spec.top < SMALL])
def test_a_smaller_offset_only_moves_the_codes(name):
    """A panel for a dot that wants its codes below 128: the q8 row block with 64 taken off each code, scales as they were."""
    group = PACKED[name].group
    one, data = unpack_block(name, group, SMALL), memory(row_block(name, group, 4))
    expected = as_8_bits(data.array, name, group, 4).reshape(2, -1)
    expected[:, 64:] -= 128 - SMALL
    assert expected[:, 64:].max() < 128
    for function in [njit(lambda w, n_groups, out: one(w, n_groups, out))] + ([] if DISABLED else [one.twin]):
        out = Memory(expected.size, np.uint8)
        function(data.at, 4, out.at)
        assert same_bits(out.array, expected.ravel()) and out.intact()


@pytest.mark.parametrize("name, group", PAIRS)
def test_this_machines_form_and_its_twin(name, group):
    """The form chosen here, or the twin where kernels are not compiled, gives the q8 row block too; the twin alone as well."""
    one = unpack_block(name, group)
    functions = [njit(lambda w, n_groups, out: one(w, n_groups, out))] + ([] if DISABLED else [one.twin])
    data = memory(row_block(name, group, 4))
    for function in functions:
        out = Memory(packed_bytes("q8", 16, 4 * group, group), np.uint8)
        function(data.at, 4, out.at)
        assert same_bits(out.array, as_8_bits(data.array, name, group, 4)) and out.intact()
