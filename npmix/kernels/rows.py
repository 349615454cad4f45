"""What happens to one token's row between the matrix products: embedding, RMSNorm, quantisation, SwiGLU, RoPE.

One hard fact: each of these is written once and used by decode and prefill alike, so a row gets the
same bits on both ways. Rows are padded with zeros to whole vectors.
"""

import functools

import numpy as np
from numpy import float32 as F
from numpy import int32 as I32
from numpy import int64 as I64

from ..formats import span_bytes
from ._jit import njit
from .dot import FLOAT, START
from .ops import (
    absolute,
    add,
    add_i32,
    div,
    exp2,
    fma,
    fma1,
    get_bf16,
    get_f16,
    get_f32,
    get_i32,
    load_f32,
    load_u8_words,
    max_f32,
    maximum,
    mul,
    nearest,
    put_f32,
    put_i32,
    splat_f32,
    splat_i32,
    sqrt1,
    store_f32,
    store_i8_words,
    sub,
    sum_f32,
    sum_i32,
    to_f32,
    to_i32,
)
from .unpack import unpack_block

MINUS_LOG2_E = -1.4426950408889634
TOPS = (127, 126, 125, 124)  # codes that the largest input of a group may have
FINE = 32  # groups that look for theirs: those of q8, beside whose errors the inputs' are not small


@functools.lru_cache(maxsize=None)
def embedder(name, group):
    """A kernel (table, token, dim, out, panel): row `token` of an embedding table as float32 (dim,), then zeros up to a multiple of 16."""
    read, size = {"f32": (get_f32, 4), "f16": (get_f16, 2), "bf16": (get_bf16, 2)}.get(name, (None, 0))

    @njit
    def embed_dense(table, token, dim, out, panel):
        for k in range(dim, (dim + 15) // 16 * 16):  # what an earlier, not finite row left there would spread
            put_f32(out + 4 * k, F(0.0))
        for k in range(dim):
            put_f32(out + 4 * k, read(table + size * (token * dim + k)))

    if not group:
        return embed_dense
    unpack, whole, plain = unpack_block(name, group), span_bytes(name, group), span_bytes("q8", group)

    @njit
    def embed_packed(table, token, dim, out, panel):
        spans, lane = (dim + 2 * group - 1) // (2 * group), token % 16
        unpack(table + token // 16 * spans * whole, 2 * spans, panel)
        for k in range(0, dim, 16):
            span, g, at = panel + k // (2 * group) * plain, k // group % 2, k % (2 * group)
            scale = splat_f32(get_f16(span + 32 * g + 2 * lane))
            code = add_i32(load_u8_words(span + 64 + 16 * at + 4 * lane, 64), splat_i32(I32(-128)))
            store_f32(out + 4 * k, mul(to_f32(code), scale))
        for k in range(dim, (dim + 15) // 16 * 16):
            put_f32(out + 4 * k, F(0.0))

    return embed_packed


@njit
def rms_norm(x, weight, dim, width, eps, out):
    """x / sqrt(mean(x**2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467); width: dim padded to 16.

    Returns the sum of squares, which is not finite when any element is not.
    """
    total = splat_f32(F(0.0))
    for k in range(0, width, 16):
        v = load_f32(x + 4 * k)
        total = fma(v, v, total)
    squares = sum_f32(total)
    scale = splat_f32(F(1.0) / sqrt1(squares / F(dim) + eps))
    for k in range(0, width, 16):
        store_f32(out + 4 * k, mul(mul(load_f32(x + 4 * k), scale), load_f32(weight + 4 * k)))
    return squares


@njit
def best_top(x, group, inverse):
    """Of TOPS as the code of the largest input, the one of least squared error, the first of equals; inverse: 1 / max|x|."""
    best, least = F(TOPS[0]), F(np.inf)
    for top in TOPS:
        factor, total = splat_f32(F(top) * inverse), splat_f32(F(0.0))
        for k in range(0, group, 16):
            z = mul(load_f32(x + 4 * k), factor)
            miss = sub(z, nearest(z))
            total = fma(miss, miss, total)
        error = sum_f32(total) * F(1.0 / (top * top))
        if error < least:
            best, least = F(top), error
    return best


@njit
def quantise_group(x, group, codes, word_bytes, scale, start):
    """int8 codes = nearest(x * top / max|x|) of the inputs of one group, which share a scale; top: 127, in groups of FINE `best_top`.

    Four consecutive codes are a word, `word_bytes` apart, as a tile wants them. scale: float32; start: int32, what accumulators
    start from (`dot.emit_dot_start`). An element that is not finite gives a NaN for a scale, so that nothing hides it.
    """
    most, taint = splat_f32(F(0.0)), splat_f32(F(0.0))
    for k in range(0, group, 16):
        v = load_f32(x + 4 * k)
        most = maximum(absolute(v), most)
        taint = fma(v, splat_f32(F(0.0)), taint)
    largest = max_f32(most)
    tiny = largest < F(1e-30)  # top / largest would overflow
    top = F(TOPS[0])
    if group == FINE and not tiny:
        top = best_top(x, group, F(1.0) / largest)
    inverse = splat_f32(F(0.0) if tiny else top / largest)
    counted = splat_i32(I32(0))
    for k in range(0, group, 16):
        code = to_i32(nearest(mul(load_f32(x + 4 * k), inverse)))
        counted = add_i32(counted, code)
        store_i8_words(codes + k // 4 * word_bytes, code, word_bytes)
    put_i32(start, FLOAT + I64(sum_i32(counted)) * START)
    put_f32(scale, (F(0.0) if tiny else largest / top) + sum_f32(taint))


@njit
def quantise_row(x, cols, group, out):
    """One token's activations in the layout of a tile of height 1; with group 0 a copy of the row."""
    if group == 0:
        for k in range(0, cols, 16):
            store_f32(out + 4 * k, load_f32(x + 4 * k))
        return
    n_groups = (cols + 2 * group - 1) // (2 * group) * 2
    scales = out + n_groups * group
    for g in range(n_groups):
        quantise_group(x + 4 * g * group, group, out + g * group, I64(4), scales + 4 * g, scales + 4 * (n_groups + g))


@njit
def put_in_tile(row, cols, group, tile, height, t):
    """Copy one token's activations (height 1) into place t of a tile of `height` tokens."""
    if group == 0:
        at = tile + t * ((cols + 15) // 16 * 64)
        for k in range(0, cols, 16):
            store_f32(at + 4 * k, load_f32(row + 4 * k))
        return
    n_groups = (cols + 2 * group - 1) // (2 * group) * 2
    for i in range(n_groups * (group // 4 + 2)):  # codes, scales and starts are all four bytes a piece
        put_i32(tile + 4 * (i * height + t), get_i32(row + 4 * i))


@njit
def swiglu(gate, up, count, out):
    """silu(gate) * up = gate / (1 + exp(-gate)) * up (Shazeer 2020, arXiv 2002.05202); count: a multiple of 16."""
    one = splat_f32(F(1.0))
    for k in range(0, count, 16):
        g = load_f32(gate + 4 * k)
        e = exp2(mul(g, splat_f32(F(MINUS_LOG2_E))))
        store_f32(out + 4 * k, mul(div(g, add(one, e)), load_f32(up + 4 * k)))


@njit
def rope(x, cos_sin, half, scale, out):
    """Rotate the pairs (x[i], x[i + half]) by the position's angles and scale (Su et al. 2021, arXiv 2104.09864).

    cos_sin: float32, `half` cosines, then `half` sines.
    """
    whole, by = half // 16 * 16, splat_f32(scale)
    for i in range(0, 4 * whole, 64):
        c, s, a, b = load_f32(cos_sin + i), load_f32(cos_sin + 4 * half + i), load_f32(x + i), load_f32(x + 4 * half + i)
        store_f32(out + i, mul(fma(sub(splat_f32(F(0.0)), b), s, mul(a, c)), by))
        store_f32(out + 4 * half + i, mul(fma(b, c, mul(a, s)), by))
    for i in range(whole, half):
        c, s = get_f32(cos_sin + 4 * i), get_f32(cos_sin + 4 * (half + i))
        a, b = get_f32(x + 4 * i), get_f32(x + 4 * (half + i))
        put_f32(out + 4 * i, fma1(F(0.0) - b, s, a * c) * scale)
        put_f32(out + 4 * (half + i), fma1(b, c, a * s) * scale)
