"""Weight formats: how numbers lie in the bytes. Constants and size arithmetic only.

Dense formats (f32, f16, bf16) are the source's own rows, (N, K) row-major.

Packed formats: a weight is an int8 times a float scale per group of G inputs,
``w[n, k] = (code[n, k] - zero) * scale[n, k // G]``, with unsigned codes of b bits.
16 rows form a row block and two groups a span; both are the unit of padding (codes `zero`,
scales 0). A row block is one stream of bytes, span after span:

    64 bytes            scales: 16 float16 of the first group (one per row), then 16 of the second
    2 * G/step * 64     codes: a 64-byte line holds 16 rows x 4 consecutive inputs, row r in bytes 4r..4r+3
                        q8: line i holds inputs 4i..4i+3           (step = 4)
                        q4: line i holds inputs 8i..8i+3 in the low nibbles, 8i+4..8i+7 in the high ones (step = 8)

so that each 32-bit lane of a vector register is one row and nothing is summed across lanes.
"""

from dataclasses import dataclass

ROW_BLOCK = 16  # rows of a row block
GROUPS = (32, 64, 128)  # inputs that may share a scale
DEFAULT_GROUP = 64
SHARED = 128  # activations that share a scale, whatever the weights' group: dim 4,096 has 32 scales a token
EXPERT_UNIT = 256  # rows of w_gate and w_up that one thread takes at a time: whole pairs of groups of w_down's inputs

DENSE = {"f32": 4, "f16": 2, "bf16": 2}  # bytes a weight


@dataclass(frozen=True)
class Packed:
    """A packed format: code bits, the code that means 0, and inputs per 64-byte line."""

    name: str
    bits: int
    zero: int
    step: int


PACKED = {
    "q8": Packed("q8", 8, 128, 4),
    "q4": Packed("q4", 4, 8, 8),
}

FORMAT_IDS = {"f32": 0, "f16": 1, "bf16": 2, "q8": 3, "q4": 4}  # as kernels see them


def span_bytes(name: str, group: int) -> int:
    """Bytes of one span: 16 rows x 2 groups, scales and codes."""
    return 64 + 2 * (group // PACKED[name].step) * 64


def spans(cols: int, group: int) -> int:
    """Spans of a row: inputs padded up to whole pairs of groups."""
    return -(-cols // (2 * group))


def row_blocks(rows: int) -> int:
    """Row blocks of a matrix: rows padded up to a multiple of 16."""
    return -(-rows // ROW_BLOCK)


def packed_bytes(name: str, rows: int, cols: int, group: int) -> int:
    """Bytes of a packed (rows, cols) matrix."""
    return row_blocks(rows) * spans(cols, group) * span_bytes(name, group)


def tensor_bytes(name: str, shape: tuple[int, ...], group: int = 0) -> int:
    """Bytes of a tensor in any format."""
    if name in DENSE:
        count = DENSE[name]
        for n in shape:
            count *= n
        return count
    rows, cols = shape
    return packed_bytes(name, rows, cols, group)
