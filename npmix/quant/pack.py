"""Codes, selectors and scales <-> the packed bytes of `formats`, in plain NumPy.

One hard fact: rows are padded to 16 and inputs to two groups with a scale of 0, so a kernel may run over the
padding and add exact zeros.
"""

import numpy as np

from ..formats import CHUNK, DENSE, PACKED, ROW_BLOCK, codes_at, packed_bytes, row_blocks, span_bytes, spans
from .tensor import Tensor


def pack(codes: np.ndarray, scales: np.ndarray, selectors: np.ndarray, format: str, group: int) -> np.ndarray:
    """codes uint8 (N, K), scales float16 (N, ceil(K / group)), selectors uint8 (N, ceil(K / per)) -> uint8 (packed_bytes,)."""
    spec = PACKED[format]
    rows, cols = codes.shape
    blocks, per_row = row_blocks(rows), spans(cols, group)
    width = 2 * group * per_row
    full = _padded(codes, blocks, width, spec.pad)
    out = np.empty((blocks, per_row, span_bytes(format, group)), np.uint8)
    # (block, row, span, group) -> (block, span, group, row)
    by_span = _padded(scales.astype(np.float16), blocks, 2 * per_row, 0).reshape(blocks, ROW_BLOCK, per_row, 2).transpose(0, 2, 3, 1)
    out[:, :, :64] = np.ascontiguousarray(by_span).view(np.uint8).reshape(blocks, per_row, 64)
    if spec.selector_bits:
        chosen = _padded(selectors, blocks, width // spec.per, 0).reshape(blocks, ROW_BLOCK, -1, spec.word // spec.per)
        numbers = (chosen.astype("<u4") << spec.selector_bits * np.arange(chosen.shape[3], dtype="<u4")).sum(3, dtype="<u4")
        # (block, row, word, byte) -> (block, span, chunk, row, byte)
        data = numbers[..., None].view(np.uint8)[..., : spec.selector_bytes(spec.word)]
        data = data.reshape(blocks, ROW_BLOCK, per_row, 2 * group // spec.word, -1).transpose(0, 2, 3, 1, 4)
        out[:, :, 64 : codes_at(format, group)] = data.reshape(blocks, per_row, -1)
    # (block, row, span, chunk, vector, 4 inputs) -> (block, span, chunk, vector, row, 4 inputs)
    vectors = full.reshape(blocks, ROW_BLOCK, per_row, 2 * group // CHUNK, CHUNK // 4, 4).transpose(0, 2, 3, 4, 1, 5)
    planes, low = [], 0
    for p in spec.planes:
        part = (vectors >> low & (1 << p) - 1).reshape(*vectors.shape[:3], -1, 8 // p, 64)
        planes.append((part << p * np.arange(8 // p, dtype=np.uint8)[:, None]).sum(4, dtype=np.uint8).reshape(*vectors.shape[:3], -1))
        low += p
    out[:, :, codes_at(format, group) :] = np.concatenate(planes, axis=3).reshape(blocks, per_row, -1)
    return out.reshape(-1)


def _padded(table: np.ndarray, blocks: int, width: int, fill: int) -> np.ndarray:
    full = np.full((blocks * ROW_BLOCK, width), fill, table.dtype)
    full[: table.shape[0], : table.shape[1]] = table
    return full


def unpack(data: np.ndarray, format: str, shape: tuple[int, int], group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inverse of `pack`: codes uint8 (N, K), scales float16 (N, ceil(K / group)), selectors uint8 (N, ceil(K / per))."""
    spec = PACKED[format]
    rows, cols = shape
    blocks, per_row = row_blocks(rows), spans(cols, group)
    if data.dtype != np.uint8 or data.size != packed_bytes(format, rows, cols, group):
        raise ValueError(f"{data.size} {data.dtype} for a {format} matrix {shape} of group {group}")
    data = data.reshape(blocks, per_row, span_bytes(format, group))
    by_span = np.ascontiguousarray(data[:, :, :64]).view(np.float16).reshape(blocks, per_row, 2, ROW_BLOCK)
    scales = by_span.transpose(0, 3, 1, 2).reshape(blocks * ROW_BLOCK, 2 * per_row)
    selectors = np.zeros((rows, -(-cols // spec.per)), np.uint8)
    if spec.selector_bits:
        size = spec.selector_bytes(spec.word)
        parts = data[:, :, 64 : codes_at(format, group)].reshape(blocks, per_row, -1, ROW_BLOCK, size).astype("<u4")
        numbers = (parts << 8 * np.arange(size, dtype="<u4")).sum(4, dtype="<u4")
        chosen = numbers[..., None] >> spec.selector_bits * np.arange(spec.word // spec.per, dtype="<u4") & (1 << spec.selector_bits) - 1
        chosen = chosen.transpose(0, 3, 1, 2, 4).reshape(blocks * ROW_BLOCK, -1)
        selectors = chosen[:rows, : -(-cols // spec.per)].astype(np.uint8)
    chunks = data[:, :, codes_at(format, group) :].reshape(blocks, per_row, 2 * group // CHUNK, -1)
    vectors, low, at = 0, 0, 0
    for p in spec.planes:
        size = CHUNK * ROW_BLOCK * p // 8
        lines = chunks[..., at : at + size].reshape(*chunks.shape[:3], -1, 1, 64)
        part = lines >> p * np.arange(8 // p, dtype=np.uint8)[:, None] & (1 << p) - 1
        vectors = vectors | part.reshape(*chunks.shape[:3], -1, 64) << low
        low, at = low + p, at + size
    vectors = vectors.reshape(*chunks.shape[:3], -1, ROW_BLOCK, 4)
    codes = vectors.transpose(0, 4, 1, 2, 3, 5).reshape(blocks * ROW_BLOCK, 2 * group * per_row)
    return codes[:rows, :cols].astype(np.uint8), scales[:rows, : -(-cols // group)].copy(), selectors


def integers(codes: np.ndarray, selectors: np.ndarray, format: str) -> np.ndarray:
    """The int8 that each code means, as int32 (N, K)."""
    spec = PACKED[format]
    if not spec.values:
        return codes.astype(np.int32) - 128
    rows = np.array([[v * m for v in spec.row(s)] for s, m in enumerate(spec.multipliers)], np.int32)
    return rows[np.repeat(selectors, spec.per, axis=1)[:, : codes.shape[1]], codes]


def dequantize(tensor: Tensor) -> np.ndarray:
    """Any tensor as float32 of its shape; packed: integer * scale, exact products rounded once."""
    if tensor.format in DENSE:
        if tensor.format == "bf16":
            return (tensor.data.astype(np.uint32) << 16).view(np.float32)
        return tensor.data.astype(np.float32)
    codes, scales, selectors = unpack(tensor.data, tensor.format, tensor.shape, tensor.group)
    wide = np.repeat(scales.astype(np.float32), tensor.group, axis=1)[:, : tensor.shape[1]]
    return integers(codes, selectors, tensor.format).astype(np.float32) * wide
