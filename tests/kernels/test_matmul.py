"""Matrix products: what they mean, which rows they write, and that no way of cutting the work changes a bit."""

import numpy as np
import pytest
from kernel_tools import Memory, memory, same_bits

from npmix.formats import DENSE, GROUPS, PACKED, span_bytes
from npmix.kernels._jit import njit
from npmix.kernels.matmul import FEW, act_bytes, matmul, n_tiles, panel_bytes, row_block_at
from npmix.kernels.phases import matmul_by_slot
from npmix.kernels.rows import TOPS, put_in_tile, quantise_row
from npmix.kernels.tile import BLOCKS, HEIGHT, TALLEST, singles
from npmix.quant.pack import dequantize, pack
from npmix.quant.round import quantise
from npmix.quant.tensor import Tensor

F = np.float32
FORMATS = [*((name, group) for name, spec in PACKED.items() for group in spec.groups), *((name, 0) for name in DENSE)]
WIDE = max(2, *map(singles, PACKED))  # row blocks of the widest tile of one token, but enough to cut
TOKENS = sorted({*range(1, 20), FEW, FEW + 1, FEW + 5, FEW + 13})  # tiles of every height in registers, then panels


@njit
def _fill(x, x_bytes, cols, group, tokens, row, acts):
    """Activations of all tokens in tiles, as prefill makes them."""
    token_bytes, tiles = act_bytes(cols, group), n_tiles(tokens)
    for i in range(tiles):
        start, end = i * tokens // tiles, (i + 1) * tokens // tiles
        for t in range(start, end):
            quantise_row(x + x_bytes * t, cols, group, row)
            put_in_tile(row, cols, group, acts + start * token_bytes, end - start, t - start)


def bytes_of(cols, group):
    width = -(-cols // (2 * group)) * 2 * group if group else 0
    return width + 8 * (width // group) if group else -(-cols // 16) * 64


def activations(x, group):
    """(T, K) float32 as the tiles' bytes, in memory with guards."""
    tokens, cols = x.shape
    rows = np.zeros((tokens, -(-cols // 256) * 256), F)
    rows[:, :cols] = x
    given, row = memory(rows), Memory(bytes_of(cols, group), np.uint8)
    acts = Memory(tokens * bytes_of(cols, group), np.uint8)
    _fill(given.at, rows.strides[0], cols, group, tokens, row.at, acts.at)
    assert given.intact() and row.intact() and acts.intact()
    return acts


def weights(name, group, rows, cols, seed):
    """A Tensor of Gaussian weights in a format, at an odd address, and its memory."""
    w = np.random.default_rng(seed).standard_normal((rows, cols)).astype(F)
    if group:
        data = pack(*quantise(w, name, group), name, group)
    elif name == "bf16":
        data = (w.view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = w.astype(np.float16 if name == "f16" else F)
    place = Memory(data.shape, data.dtype, offset=max(2, data.itemsize), fill=data)
    return Tensor(place.array, name, (rows, cols), group), place


def product(kernel, tensor, x, first, last, follow=0):
    """Row blocks first..last of tensor @ x, (T, all rows); what was not written is -7. follow: what the kernel is told comes next."""
    rows, cols = tensor.shape
    width = -(-rows // 16) * 16 + (tensor.group > 0) * 16
    out = Memory((len(x), width), F, fill=-7)
    acts = activations(x, tensor.group)
    panel = Memory(panel_bytes(cols, tensor.group) if tensor.group else 0, np.uint8)
    kernel(tensor.address, rows, cols, first, last, acts.at, len(x), out.at, 4 * width, panel.at, follow)
    assert out.intact() and acts.intact() and panel.intact()
    return out.array


@pytest.mark.parametrize("name, group", FORMATS)
def test_matmul_is_weights_times_inputs(name, group):
    """w @ x of the dequantised weights and inputs within float32 rounding, for every number of tokens; packed inputs are the
    int8 codes times their scale, so they are off the float inputs by at most half a step each. Each token has the same bits
    alone and among others. Rows and inputs are multiples of nothing."""
    rows, cols = (41, 200) if group else (37, 91)
    tensor, place = weights(name, group, rows, cols, 3)
    x = np.random.default_rng(4).standard_normal((max(TOKENS), cols)).astype(F)
    w, kernel = dequantize(tensor).astype(np.float64), matmul(name, group)
    alone = np.concatenate([product(kernel, tensor, x[t : t + 1], 0, -(-rows // 16))[:, :rows] for t in range(len(x))])
    step = 0.0
    if group:
        padded = np.zeros((len(x), -(-cols // group) * group))
        padded[:, :cols] = x
        scale = np.abs(padded.reshape(len(x), -1, group)).max(2) / TOPS[-1]
        step = (np.repeat(scale, group, axis=1)[:, None, :cols] * np.abs(w)[None]).sum(2) / 2
    bound = step + 1e-6 * (np.abs(x) @ np.abs(w).T) + 1e-6
    assert (np.abs(alone - x @ w.T) <= bound).all()
    if group:  # and far better than the worst case: errors of rounding are independent
        assert np.abs(alone - x @ w.T).mean() < 0.2 * step.mean()
    for tokens in TOKENS:
        assert same_bits(product(kernel, tensor, x[:tokens], 0, -(-rows // 16))[:, :rows], alone[:tokens])
    assert place.intact()


@pytest.mark.parametrize("name, group", [*((name, spec.group) for name, spec in PACKED.items()), ("bf16", 0)])
def test_row_blocks_by_range(name, group):
    """Row blocks first..last alone are written, whole ones of a packed matrix and existing rows of a dense one; any cut of the
    range, odd ones and empty ones included, gives the whole's bits."""
    rows, cols = 16 * (2 * WIDE + 1) - 5, 130  # a number of row blocks that neither the tile of one token nor BLOCKS divides
    tensor, _ = weights(name, group, rows, cols, 5)
    kernel, blocks = matmul(name, group), -(-rows // 16)
    for tokens in (1, 2, 3, 5, FEW + 1):
        x = np.random.default_rng(tokens).standard_normal((tokens, cols)).astype(F)
        whole = product(kernel, tensor, x, 0, blocks)
        assert (whole[:, rows : 16 * blocks] == (0 if group else -7)).all() and (whole[:, 16 * blocks :] == -7).all()
        for first, last in (
            (0, 1),
            (1, 2),
            (0, 2),
            (1, 4),
            (4, 5),
            (2, 5),
            (0, 3),
            (3, 3),
            (blocks, blocks),
            (1, blocks),
            (0, WIDE),
            (2, WIDE + 1),
        ):
            part = product(kernel, tensor, x, first, last)
            written = slice(16 * first, 16 * last)
            assert same_bits(part[:, written], whole[:, written])
            assert (part[:, : 16 * first] == -7).all() and (part[:, 16 * last :] == -7).all()


@pytest.mark.parametrize("follow", [64, 2**47, -(2**40)])
def test_what_follows_changes_no_bits(follow):
    """Wherever the next row block lies, also where there is no memory: it is only fetched."""
    tensor, _ = weights("q4", 128, 16 * WIDE, 600, 3)
    for tokens in (1, 2, TALLEST, TALLEST + 1, FEW + 1):
        x = np.random.default_rng(tokens).standard_normal((tokens, 600)).astype(F)
        whole, told = (product(matmul("q4", 128), tensor, x, 0, WIDE, at) for at in (0, follow))
        assert same_bits(told, whole)


@pytest.mark.parametrize("name, group", FORMATS)
def test_row_blocks_lie_where_they_are_looked_for(name, group):
    """`row_block_at` is where packing puts a row block; a dense matrix has none."""
    rows, cols = 16 * 5, 300
    tensor, _ = weights(name, group, rows, cols, 1)
    span = span_bytes(name, group) if group else 0
    for block in range(5):
        expected = tensor.address + block * (tensor.nbytes // 5) if group else 0
        assert row_block_at(tensor.address, span, cols, group, block) == expected


def test_slots_choose_the_format():
    """`mm` by slot gives what the format's own kernel gives; an unused slot writes nothing."""
    formats = (("q4", 128), ("q8", 64), ("bf16", 0))
    mm = matmul_by_slot(formats)
    x = np.random.default_rng(1).standard_normal((3, 70)).astype(F)
    for slot, (name, group) in enumerate(formats):
        tensor, _ = weights(name, group, 20, 70, slot)
        chosen = product(lambda *args, slot=slot: mm(slot, *args), tensor, x, 0, 2)
        assert same_bits(chosen, product(matmul(name, group), tensor, x, 0, 2))
    assert (product(lambda *args: mm(3, *args), tensor, x, 0, 2) == -7).all()


def test_bytes_of_activations():
    """A packed token is its codes, padded to whole pairs of groups, a scale and a start per group; a dense one float32."""
    for cols in (1, 16, 63, 64, 65, 256, 300, 14336):
        for group in (0, *GROUPS):
            assert act_bytes(cols, group) == bytes_of(cols, group)


def test_a_panel_is_a_tile_of_8_bits():
    """The panel holds BLOCKS row blocks of q8 in the matrix' own group, as many inputs as the matrix has when padded."""
    for cols, group, padded in ((64, 32, 64), (65, 32, 128), (70, 128, 256), (4096, 128, 4096), (14336, 64, 14336)):
        assert panel_bytes(cols, group) == BLOCKS * (16 * padded + padded // group * 32)


def test_tiles_are_even():
    """Tokens are cut into as few tiles of at most TALLEST, over a panel HEIGHT, as can be, whose heights differ by at most one."""

    for tokens in range(1, 60):
        tiles = tile_count(tokens)
        heights = [(i + 1) * tokens // tiles - i * tokens // tiles for i in range(tiles)]
        assert tiles == -(-tokens // (TALLEST if tokens <= FEW else HEIGHT)) and max(heights) - min(heights) <= 1 and sum(heights) == tokens


@njit
def tile_count(tokens):
    return n_tiles(tokens)
