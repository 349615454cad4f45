"""Matrix products over row blocks and token tiles, one compiled function per (format, group).

One hard fact: weights are the larger operand, so row blocks are the outer loop: a pair of them stays
in the cache while every token tile passes over it, and memory is read once.
"""

import functools

from ..formats import span_bytes
from ._jit import njit
from .tile import HEIGHT, dense_tile, packed_tile


def act_bytes(cols, group):
    """Bytes of one token's activations (see `tile.py`): quantised for a packed matrix, float32 for a dense one."""
    if group == 0:
        return (cols + 15) // 16 * 64
    n_groups = (cols + 2 * group - 1) // (2 * group) * 2
    return n_groups * (group + 8)


act_bytes = njit(act_bytes)


@functools.lru_cache(maxsize=None)
def matmul(name, group):
    """A kernel (w, rows, cols, first, last, acts, tokens, out, out_bytes) for row blocks first..last of one matrix.

    w: address of the matrix (rows, cols); acts: address of the activations of `tokens` tokens in tiles as `tile_start`
    cuts them; out: float32, row r of token t at out + t * out_bytes + 4 * r. A packed matrix writes whole row blocks.
    """
    return _packed(name, group) if group else _dense(name)


@njit
def n_tiles(tokens):
    """Tiles of at most HEIGHT tokens, as even as can be: 7 tokens are 4 + 3, not 6 + 1."""
    return (tokens + HEIGHT - 1) // HEIGHT


def _packed(name, group):
    one = [packed_tile(name, group, 1, h) for h in range(1, HEIGHT + 1)]
    two = [packed_tile(name, group, 2, h) for h in range(1, HEIGHT + 1)]
    a1, a2, a3, a4, a5, a6 = one
    b1, b2, b3, b4, b5, b6 = two
    whole = span_bytes(name, group)

    @njit
    def low(pair, h, w, block_bytes, n_groups, acts, out, out_bytes):
        if pair == 1:
            if h == 1:
                a1(w, block_bytes, n_groups, acts, out, out_bytes)
            elif h == 2:
                a2(w, block_bytes, n_groups, acts, out, out_bytes)
            elif h == 3:
                a3(w, block_bytes, n_groups, acts, out, out_bytes)
            elif h == 4:
                a4(w, block_bytes, n_groups, acts, out, out_bytes)
            elif h == 5:
                a5(w, block_bytes, n_groups, acts, out, out_bytes)
            else:
                a6(w, block_bytes, n_groups, acts, out, out_bytes)
        elif h == 1:
            b1(w, block_bytes, n_groups, acts, out, out_bytes)
        elif h == 2:
            b2(w, block_bytes, n_groups, acts, out, out_bytes)
        elif h == 3:
            b3(w, block_bytes, n_groups, acts, out, out_bytes)
        elif h == 4:
            b4(w, block_bytes, n_groups, acts, out, out_bytes)
        elif h == 5:
            b5(w, block_bytes, n_groups, acts, out, out_bytes)
        else:
            b6(w, block_bytes, n_groups, acts, out, out_bytes)

    @njit
    def packed_matmul(w, rows, cols, first, last, acts, tokens, out, out_bytes):
        n_groups = (cols + 2 * group - 1) // (2 * group) * 2
        block_bytes = n_groups // 2 * whole
        token_bytes = n_groups * (group + 8)
        tiles = n_tiles(tokens)
        block = first
        while block < last:
            pair = 2 if tokens > 1 and block + 1 < last else 1
            for i in range(tiles):
                start = i * tokens // tiles
                height = (i + 1) * tokens // tiles - start
                at = out + start * out_bytes + 64 * block
                low(pair, height, w + block * block_bytes, block_bytes, n_groups, acts + start * token_bytes, at, out_bytes)
            block += pair

    return packed_matmul


def _dense(name):
    a1, a2, a3, a4, a5, a6 = [dense_tile(name, 1, h) for h in range(1, HEIGHT + 1)]
    b1, b2, b3, b4, b5, b6 = [dense_tile(name, 4, h) for h in range(1, HEIGHT + 1)]
    size = 4 if name == "f32" else 2

    @njit
    def low(four, h, w, cols, acts, token_bytes, out, out_bytes):
        if four:
            if h == 1:
                b1(w, cols, acts, token_bytes, out, out_bytes)
            elif h == 2:
                b2(w, cols, acts, token_bytes, out, out_bytes)
            elif h == 3:
                b3(w, cols, acts, token_bytes, out, out_bytes)
            elif h == 4:
                b4(w, cols, acts, token_bytes, out, out_bytes)
            elif h == 5:
                b5(w, cols, acts, token_bytes, out, out_bytes)
            else:
                b6(w, cols, acts, token_bytes, out, out_bytes)
        elif h == 1:
            a1(w, cols, acts, token_bytes, out, out_bytes)
        elif h == 2:
            a2(w, cols, acts, token_bytes, out, out_bytes)
        elif h == 3:
            a3(w, cols, acts, token_bytes, out, out_bytes)
        elif h == 4:
            a4(w, cols, acts, token_bytes, out, out_bytes)
        elif h == 5:
            a5(w, cols, acts, token_bytes, out, out_bytes)
        else:
            a6(w, cols, acts, token_bytes, out, out_bytes)

    @njit
    def dense_matmul(w, rows, cols, first, last, acts, tokens, out, out_bytes):
        token_bytes = (cols + 15) // 16 * 64
        tiles = n_tiles(tokens)
        row, end = first * 16, min(last * 16, rows)
        while row < end:
            four = row + 4 <= end
            for i in range(tiles):
                start = i * tokens // tiles
                height = (i + 1) * tokens // tiles - start
                at = out + start * out_bytes + 4 * row
                low(four, height, w + row * cols * size, cols, acts + start * token_bytes, token_bytes, at, out_bytes)
            row += 4 if four else 1

    return dense_matmul


@njit
def absent(w, rows, cols, first, last, acts, tokens, out, out_bytes):
    """Stands in a slot that a model does not use."""
