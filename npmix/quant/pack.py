"""Codes and scales <-> the packed bytes of `formats`, in plain NumPy.

One hard fact: rows are padded to 16 and inputs to two groups with the code that means 0 and a scale
of 0, so a kernel may run over the padding and add exact zeros.
"""

import numpy as np

from ..formats import DENSE, PACKED, ROW_BLOCK, packed_bytes, row_blocks, span_bytes, spans
from .tensor import Tensor


def pack(codes: np.ndarray, scales: np.ndarray, format: str, group: int) -> np.ndarray:
    """codes uint8 (N, K), scales float16 (N, ceil(K / group)) -> uint8 (packed_bytes,)."""
    spec = PACKED[format]
    rows, cols = codes.shape
    blocks, per_row = row_blocks(rows), spans(cols, group)
    width = 2 * group * per_row
    full = np.full((blocks * ROW_BLOCK, width), spec.zero, np.uint8)
    full[:rows, :cols] = codes
    full_scales = np.zeros((blocks * ROW_BLOCK, 2 * per_row), np.float16)
    full_scales[:rows, : scales.shape[1]] = scales
    out = np.empty((blocks, per_row, span_bytes(format, group)), np.uint8)
    # (block, row, span, group) -> (block, span, group, row)
    by_span = full_scales.reshape(blocks, ROW_BLOCK, per_row, 2).transpose(0, 2, 3, 1)
    out[:, :, :64] = np.ascontiguousarray(by_span).view(np.uint8).reshape(blocks, per_row, 64)
    # (block, row, span, line, half, 4 inputs) -> (block, span, line, half, row, 4 inputs)
    halves = spec.step // 4
    lines = full.reshape(blocks, ROW_BLOCK, per_row, 2 * group // spec.step, halves, 4).transpose(0, 2, 3, 4, 1, 5)
    packed = lines[:, :, :, 0] if halves == 1 else lines[:, :, :, 0] | (lines[:, :, :, 1] << 4)
    out[:, :, 64:] = packed.reshape(blocks, per_row, -1)
    return out.reshape(-1)


def unpack(data: np.ndarray, format: str, shape: tuple[int, int], group: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`: codes uint8 (N, K) and scales float16 (N, ceil(K / group))."""
    spec = PACKED[format]
    rows, cols = shape
    blocks, per_row = row_blocks(rows), spans(cols, group)
    if data.dtype != np.uint8 or data.size != packed_bytes(format, rows, cols, group):
        raise ValueError(f"{data.size} {data.dtype} for a {format} matrix {shape} of group {group}")
    data = data.reshape(blocks, per_row, span_bytes(format, group))
    by_span = np.ascontiguousarray(data[:, :, :64]).view(np.float16).reshape(blocks, per_row, 2, ROW_BLOCK)
    scales = by_span.transpose(0, 3, 1, 2).reshape(blocks * ROW_BLOCK, 2 * per_row)
    lines = data[:, :, 64:].reshape(blocks, per_row, 2 * group // spec.step, 1, ROW_BLOCK, 4)
    if spec.step == 8:
        lines = np.concatenate([lines & 15, lines >> 4], axis=3)
    codes = lines.transpose(0, 4, 1, 2, 3, 5).reshape(blocks * ROW_BLOCK, 2 * group * per_row)
    return codes[:rows, :cols].copy(), scales[:rows, : -(-cols // group)].copy()


def dequantize(tensor: Tensor) -> np.ndarray:
    """Any tensor as float32 of its shape; packed: (code - zero) * scale, exact products rounded once."""
    if tensor.format in DENSE:
        if tensor.format == "bf16":
            return (tensor.data.astype(np.uint32) << 16).view(np.float32)
        return tensor.data.astype(np.float32)
    codes, scales = unpack(tensor.data, tensor.format, tensor.shape, tensor.group)
    wide = np.repeat(scales.astype(np.float32), tensor.group, axis=1)[:, : tensor.shape[1]]
    return (codes.astype(np.float32) - np.float32(PACKED[tensor.format].zero)) * wide
