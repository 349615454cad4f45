"""Matrix products over row blocks and token tiles, one compiled function per (format, group).

One hard fact: weights are the larger operand, so row blocks are the outer loop: they stay in the cache while every
token tile passes over them, and memory is read once. Where few tiles pass, each unpacks in registers, one row block after
the other as they lie; where many do, a pair is unpacked once, into a panel of plain int8 that stays in the cache.
"""

import functools

import numpy as np

from ..formats import DENSE, PACKED, packed_bytes, span_bytes
from . import cpu
from ._jit import njit
from .dot import offset_for
from .tile import BLOCKS, FETCHES, HEIGHT, TALLEST, dense_tile, packed_tile, singles
from .unpack import unpack_block


# Up to so many tokens a row block is unpacked again for each tile, straight from memory. Codes, tables and sums together do not fit
# narrower registers.
FEW = 2 * TALLEST if cpu.wide_registers() else 1
NONE = np.int64(0)  # typed: Numba compiles a callee anew for each literal argument


@njit
def act_bytes(cols, group):
    """Bytes of one token's activations (see `tile.py`): quantised for a packed matrix, float32 for a dense one."""
    if group == 0:
        return (cols + 15) // 16 * 64
    n_groups = (cols + 2 * group - 1) // (2 * group) * 2
    return n_groups * (group + 8)


@njit
def row_block_at(w, span, cols, group, block):
    """The address of a row block of a matrix at w; span: `formats.span_bytes` of its kind, 0 for a dense one, which has none (0)."""
    return w + block * ((cols + 2 * group - 1) // (2 * group) * span) if span else np.int64(0)


@functools.lru_cache(maxsize=None)
def matmul(name, group, several=True):
    """A kernel (w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow) for row blocks first..last of one matrix.

    w: address of the matrix (rows, cols); acts: address of the activations of `tokens` tokens, cut into `n_tiles`
    tiles of which tile i starts at token i * tokens // n_tiles; out: float32, row r of token t at
    out + t * out_bytes + 4 * r. A packed matrix writes whole row blocks. panel: scratch of `panel_bytes`. follow: the row block that the
    caller takes next, wherever it lies (`row_block_at`), to be fetched meanwhile; 0: what comes after `last`. several=False: a dense
    matrix that only ever meets one token (a router): tall tiles would be compiled for nothing.
    """
    return _packed(name, group) if group else _dense(name) if several else _dense_rows(name)


@njit
def n_tiles(tokens):
    """Tiles of at most TALLEST tokens, or HEIGHT over a panel, as even as can be: 13 tokens are 7 + 6, not 12 + 1."""
    tallest = TALLEST if tokens <= FEW else HEIGHT
    return (tokens + tallest - 1) // tallest


def panel_bytes(cols, group):
    """Bytes of the panel that a packed matrix of `cols` inputs is unpacked into."""
    return packed_bytes("q8", 16 * BLOCKS, cols, group)


@functools.lru_cache(maxsize=None)
def _tall(name, group, blocks, lowest, highest, offset=128):
    """A kernel for one tile of `lowest` to `highest` tokens."""
    tiles = [packed_tile(name, group, blocks, min(max(lowest, h), highest), offset) for h in range(2, 13)]
    t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12 = tiles

    @njit
    def tall(h, w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step):
        if h == 2:
            t2(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 3:
            t3(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 4:
            t4(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 5:
            t5(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 6:
            t6(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 7:
            t7(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 8:
            t8(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 9:
            t9(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 10:
            t10(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        elif h == 11:
            t11(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)
        else:
            t12(w, block_bytes, n_groups, acts, out, out_bytes, next_block, ahead, ahead_step)

    return tall


@functools.lru_cache(maxsize=None)
def _row_block(name, group):
    """A kernel for one row block and all tiles of 2 to FEW tokens."""
    tall, whole = _tall(name, group, 1, 2, TALLEST), span_bytes(name, group)

    @njit
    def row_block(w, n_groups, acts, token_bytes, tokens, out, out_bytes, jump):
        tiles, block_bytes = n_tiles(tokens), n_groups // 2 * whole
        for i in range(tiles):
            start = i * tokens // tiles
            height = (i + 1) * tokens // tiles - start
            x, y = acts + start * token_bytes, out + start * out_bytes
            further = block_bytes if 0 < i == tiles - 1 else 0  # the first tile had this row block fetched: memory would rest now
            tall(height, w, NONE, n_groups, x, y, out_bytes, NONE, further, jump)

    return row_block


@functools.lru_cache(maxsize=None)
def _pair(name, group, offset=128):
    """A kernel for BLOCKS row blocks (or, with distances of 0, one done over) and all tiles of more than FEW tokens."""
    tall = _tall(name, group, BLOCKS, HEIGHT - 1 if FEW > 1 else 2, HEIGHT, offset)

    @njit
    def pair(w, block_bytes, n_groups, acts, token_bytes, tokens, out, out_bytes, next_block, ahead, ahead_bytes):
        tiles = n_tiles(tokens)
        step = ahead_bytes // (tiles * n_groups * FETCHES)
        for i in range(tiles):
            start = i * tokens // tiles
            height, x, y = (i + 1) * tokens // tiles - start, acts + start * token_bytes, out + start * out_bytes
            tall(height, w, block_bytes, n_groups, x, y, out_bytes, next_block, ahead + i * ahead_bytes // tiles, step)

    return pair


@functools.lru_cache(maxsize=None)
def _by_panel(name, group):
    """The same as `_pair`, the row blocks being unpacked into `panel` first; q8 is its own panel.

    Meanwhile `ahead_bytes` from `ahead` on are fetched.
    """
    if name == "q8":
        pair = _pair(name, group)

        @njit
        def as_they_lie(w, block_bytes, n_groups, acts, token_bytes, tokens, out, out_bytes, next_block, ahead, ahead_bytes, panel):
            pair(w, block_bytes, n_groups, acts, token_bytes, tokens, out, out_bytes, next_block, ahead, ahead_bytes)

        return as_they_lie
    offset, plain = offset_for(PACKED[name].top), span_bytes("q8", group)
    pair, unpack = _pair("q8", group, offset), unpack_block(name, group, offset)

    @njit
    def by_panel(w, block_bytes, n_groups, acts, token_bytes, tokens, out, out_bytes, next_block, ahead, ahead_bytes, panel):
        plain_bytes = n_groups // 2 * plain if block_bytes else 0
        for i in range(BLOCKS if block_bytes else 1):
            unpack(w + i * block_bytes, n_groups, panel + i * plain_bytes)
        pair(panel, plain_bytes, n_groups, acts, token_bytes, tokens, out, out_bytes, next_block, ahead, ahead_bytes)

    return by_panel


@njit
def _never(w, n_groups, acts, token_bytes, tokens, out, out_bytes, jump):
    """Stands for `_row_block` where no tokens are few."""


def _packed(name, group):
    count, whole = singles(name), span_bytes(name, group)
    single, pair = packed_tile(name, group, count, 1), _by_panel(name, group)
    row_block = _row_block(name, group) if FEW > 1 else _never

    @njit
    def packed_matmul(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow):
        n_groups = (cols + 2 * group - 1) // (2 * group) * 2
        block_bytes, token_bytes = n_groups // 2 * whole, act_bytes(cols, group)
        after = follow if follow else w + last * block_bytes
        if tokens == 1:
            rest = last - (last - first) % count
            for block in range(first, rest, count):
                single(w + block * block_bytes, block_bytes, n_groups, acts, out + 64 * block, out_bytes, 64, NONE, NONE)
            for block in range(rest, last):  # the last few one by one, each done `count` times
                single(w + block * block_bytes, 0, n_groups, acts, out + 64 * block, out_bytes, 0, NONE, NONE)
        elif tokens <= FEW:
            for block in range(first, last):
                at = w + block * block_bytes
                jump = NONE if block + 1 < last else after - at - block_bytes
                row_block(at, n_groups, acts, token_bytes, tokens, out + 64 * block, out_bytes, jump)
        else:
            for block in range(first, last, BLOCKS):
                y, at, both = out + 64 * block, w + block * block_bytes, block + BLOCKS <= last  # an odd last block is paired with itself
                next_bytes, next_block = (block_bytes, 64) if both else (0, 0)
                ahead = at + BLOCKS * block_bytes if block + BLOCKS < last else after
                pair(at, next_bytes, n_groups, acts, token_bytes, tokens, y, out_bytes, next_block, ahead, BLOCKS * block_bytes, panel)

    return packed_matmul


def _dense(name):
    t1, t2, t3, t4, t5, t6 = [dense_tile(name, 4, min(h, HEIGHT)) for h in range(1, 7)]
    size = DENSE[name]

    @njit
    def four(h, w, row_bytes, cols, acts, token_bytes, out, out_bytes, next_row):
        if h == 1:
            t1(w, row_bytes, cols, acts, token_bytes, out, out_bytes, next_row)
        elif h == 2:
            t2(w, row_bytes, cols, acts, token_bytes, out, out_bytes, next_row)
        elif h == 3:
            t3(w, row_bytes, cols, acts, token_bytes, out, out_bytes, next_row)
        elif h == 4:
            t4(w, row_bytes, cols, acts, token_bytes, out, out_bytes, next_row)
        elif h == 5:
            t5(w, row_bytes, cols, acts, token_bytes, out, out_bytes, next_row)
        else:
            t6(w, row_bytes, cols, acts, token_bytes, out, out_bytes, next_row)

    @njit
    def dense_matmul(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow):
        token_bytes, row_bytes = (cols + 15) // 16 * 64, cols * size
        tiles = (tokens + HEIGHT - 1) // HEIGHT
        row, end = first * 16, min(last * 16, rows)
        while row < end:
            whole = row + 4 <= end  # each of the last rows % 4 is done four times over
            for i in range(tiles):
                start = i * tokens // tiles
                height = (i + 1) * tokens // tiles - start
                x, y = acts + start * token_bytes, out + start * out_bytes + 4 * row
                four(height, w + row * row_bytes, row_bytes if whole else 0, cols, x, token_bytes, y, out_bytes, 4 if whole else 0)
            row += 4 if whole else 1

    return dense_matmul


def _dense_rows(name):
    tile, size = dense_tile(name, 4, 1), DENSE[name]

    @njit
    def dense_one_token(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow):
        row, end, row_bytes = first * 16, min(last * 16, rows), cols * size
        while row < end:
            whole = row + 4 <= end
            tile(w + row * row_bytes, row_bytes if whole else 0, cols, acts, 0, out + 4 * row, 0, 4 if whole else 0)
            row += 4 if whole else 1

    return dense_one_token


@njit
def absent(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel, follow):
    """Stands in a slot that a model does not use."""
