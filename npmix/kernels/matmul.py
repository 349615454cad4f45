"""Matrix products over row blocks and token tiles, one compiled function per (format, group).

One hard fact: weights are the larger operand, so row blocks are the outer loop: a pair of them stays
in the cache while every token tile passes over it, and memory is read once. Where several tiles pass, the
pair is unpacked once, into a panel of plain int8 that stays in the cache; a single tile unpacks in registers.
"""

import functools

from ..formats import DENSE, PACKED, SHARED, packed_bytes, span_bytes
from ._jit import njit
from .tile import BLOCKS, FEW, HEIGHT, SINGLE, dense_tile, packed_tile
from .unpack import unpack_block


@njit
def act_bytes(cols, group):
    """Bytes of one token's activations (see `tile.py`): quantised for a packed matrix, float32 for a dense one."""
    if group == 0:
        return (cols + 15) // 16 * 64
    n_groups = (cols + 2 * group - 1) // (2 * group) * 2
    return n_groups * (group + 4) + (n_groups * group + SHARED - 1) // SHARED * 4


@functools.lru_cache(maxsize=None)
def matmul(name, group, several=True):
    """A kernel (w, rows, cols, first, last, acts, tokens, out, out_bytes, panel) for row blocks first..last of one matrix.

    w: address of the matrix (rows, cols); acts: address of the activations of `tokens` tokens, cut into `n_tiles`
    tiles of which tile i starts at token i * tokens // n_tiles; out: float32, row r of token t at
    out + t * out_bytes + 4 * r. A packed matrix writes whole row blocks. panel: scratch of `panel_bytes`. several=False: a dense
    matrix that only ever meets one token (a router): tall tiles would be compiled for nothing.
    """
    return _packed(name, group) if group else _dense(name) if several else _dense_rows(name)


@njit(inline=True)
def n_tiles(tokens):
    """Tiles of at most HEIGHT tokens, as even as can be: 7 tokens are 4 + 3, not 6 + 1."""
    return (tokens + HEIGHT - 1) // HEIGHT


def panel_bytes(cols, group):
    """Bytes of the panel that a packed matrix of `cols` inputs is unpacked into."""
    return packed_bytes("q8", 16 * BLOCKS, cols, group)


@functools.lru_cache(maxsize=None)
def _tall(name, group, least):
    """A kernel for one tile of `least` to HEIGHT tokens, 2 or more."""
    t2, t3, t4, t5, t6 = [packed_tile(name, group, BLOCKS, min(max(h, least), HEIGHT)) for h in range(2, 7)]

    @njit
    def tall(h, w, block_bytes, n_groups, acts, out, out_bytes, next_block):
        if h == 2:
            t2(w, block_bytes, n_groups, acts, out, out_bytes, next_block)
        elif h == 3:
            t3(w, block_bytes, n_groups, acts, out, out_bytes, next_block)
        elif h == 4:
            t4(w, block_bytes, n_groups, acts, out, out_bytes, next_block)
        elif h == 5:
            t5(w, block_bytes, n_groups, acts, out, out_bytes, next_block)
        else:
            t6(w, block_bytes, n_groups, acts, out, out_bytes, next_block)

    return tall


def _few(name, group, most):
    """A kernel for SINGLE row blocks and 1 to `most` tokens."""
    f1, f2, f3 = [packed_tile(name, group, SINGLE, min(h, most)) for h in range(1, 4)]

    @njit
    def few(h, w, block_bytes, n_groups, acts, out, out_bytes, next_block):
        if h == 1:
            f1(w, block_bytes, n_groups, acts, out, out_bytes, next_block)
        elif h == 2:
            f2(w, block_bytes, n_groups, acts, out, out_bytes, next_block)
        else:
            f3(w, block_bytes, n_groups, acts, out, out_bytes, next_block)

    @njit
    def only_one(h, w, block_bytes, n_groups, acts, out, out_bytes, next_block):
        f1(w, block_bytes, n_groups, acts, out, out_bytes, next_block)

    return few if most > 1 else only_one


def _packed(name, group):
    most = FEW if PACKED[name].bits < 8 else 1  # 8 bits are held by memory before it pays, and every tile takes time to compile
    few, tall = _few(name, group, most), _tall(name, group, 3 if most == 3 else 2)  # 7 tokens are 3 + 4
    tall_plain, unpack = _tall("q8", group, 2), unpack_block(name, group)
    whole, plain, panels = span_bytes(name, group), span_bytes("q8", group), name != "q8"

    @njit
    def tiles_over(tall, w, block_bytes, n_groups, acts, token_bytes, tokens, out, out_bytes, next_block):
        tiles = n_tiles(tokens)
        for i in range(tiles):
            start = i * tokens // tiles
            height = (i + 1) * tokens // tiles - start
            tall(height, w, block_bytes, n_groups, acts + start * token_bytes, out + start * out_bytes, out_bytes, next_block)

    @njit
    def packed_matmul(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel):
        n_groups = (cols + 2 * group - 1) // (2 * group) * 2
        block_bytes = n_groups // 2 * whole
        if 0 < tokens <= most:
            rest = last - (last - first) % SINGLE
            for block in range(first, rest, SINGLE):
                few(tokens, w + block * block_bytes, block_bytes, n_groups, acts, out + 64 * block, out_bytes, 64)
            for block in range(rest, last):  # the last few one by one, each done SINGLE times
                few(tokens, w + block * block_bytes, 0, n_groups, acts, out + 64 * block, out_bytes, 0)
            return
        token_bytes, plain_bytes = act_bytes(cols, group), n_groups // 2 * plain
        for block in range(first, last, BLOCKS):
            both, at, y = block + BLOCKS <= last, w + block * block_bytes, out + 64 * block  # an odd last block is paired with itself
            if panels and tokens > 2 * HEIGHT:  # fewer tiles are done before a panel would be
                for i in range(min(BLOCKS, last - block)):
                    unpack(at + i * block_bytes, n_groups, panel + i * plain_bytes)
                tiles_over(
                    tall_plain, panel, plain_bytes if both else 0, n_groups, acts, token_bytes, tokens, y, out_bytes, 64 if both else 0
                )
            else:
                tiles_over(tall, at, block_bytes if both else 0, n_groups, acts, token_bytes, tokens, y, out_bytes, 64 if both else 0)

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
    def dense_matmul(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel):
        token_bytes, row_bytes = (cols + 15) // 16 * 64, cols * size
        tiles = n_tiles(tokens)
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
    def dense_one_token(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel):
        row, end, row_bytes = first * 16, min(last * 16, rows), cols * size
        while row < end:
            whole = row + 4 <= end
            tile(w + row * row_bytes, row_bytes if whole else 0, cols, acts, 0, out + 4 * row, 0, 4 if whole else 0)
            row += 4 if whole else 1

    return dense_one_token


@njit
def absent(w, rows, cols, first, last, acts, tokens, out, out_bytes, panel):
    """Stands in a slot that a model does not use."""
