"""Weight formats: how numbers lie in the bytes. Constants and size arithmetic only.

Dense formats (f32, f16, bf16) are the source's own rows, (N, K) row-major.

Packed formats: a weight is an int8 times a float16 scale per group of G inputs, and a format only says how
its codes become int8:

    q8              w = (code - 128) * scale
    q5, q6          w = values[code] * scale
    q2, q3, q4      w = values[code] * multipliers[selector] * scale, a selector for each `per` inputs of a row

`values` is a small table of integers, uneven because weights are; a multiplier is a signed integer, so a
selector both scales and mirrors the table. All products fit int8, so every kernel sees the same exact integers.

16 rows form a row block and two groups a span; both are the unit of padding (scales 0). A row block is
one stream of bytes, span after span:

    64 bytes        scales: 16 float16 of the first group (one per row), then 16 of the second
    selectors       of the first group, then of the second: for each word of 32 or 64 inputs (`Packed.word`) 16 rows x the
                    word's selectors of that row as one little-endian number, the first selector in its lowest bits
    codes           by chunks of 32 inputs; in a chunk one plane of bits after the other (`Packed.planes`, low bits first)

A plane of p bits is made of 64-byte lines: row r has bytes 4r..4r+3, each of 8 / p codes. The inputs
4i..4i+3 of all rows are a vector; a line holds 8 / p vectors, the first in the bytes' lowest bits. So each
32-bit lane of a vector register is one row and nothing is summed across lanes.
"""

from dataclasses import dataclass

ROW_BLOCK = 16  # rows of a row block
CHUNK = 32  # inputs whose codes lie together: whole lines of every plane
GROUPS = (32, 64, 128)  # inputs that may share a scale
SHARED = 128  # activations that share a scale, whatever the weights' group: dim 4,096 has 32 scales a token
EXPERT_UNIT = 256  # rows of w_gate and w_up that one thread takes at a time: whole pairs of groups of w_down's inputs

# The scales that rounding tries for a format with a table, times its `unit`, and how often it refits the best by least squares
RATIOS = (0.7, 0.775, 0.85, 0.95, 1.05, 1.15, 1.275, 1.4)
REFITS = 2

DENSE = {"f32": 4, "f16": 2, "bf16": 2}  # bytes a weight


@dataclass(frozen=True)
class Packed:
    """A packed format.

    planes: bits of each plane of codes. group: inputs that share a scale unless the recipe says otherwise. values: the int8 of each
    code, () for code - 128. multipliers: of each selector, () where there are none. per: inputs that share a selector. unit: the scale
    that most groups of weights with a mean square of 1 get, where the search for theirs starts.
    """

    name: str
    planes: tuple[int, ...]
    group: int
    values: tuple[int, ...] = ()
    multipliers: tuple[int, ...] = ()
    per: int = 0
    unit: float = 0.0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(self.planes)

    @property
    def selector_bits(self) -> int:
        return (len(self.multipliers) - 1).bit_length() if self.per else 0

    @property
    def word(self) -> int:
        """Inputs whose selectors lie together, in whole bytes."""
        return 64 if self.per and 32 // self.per * self.selector_bits % 8 else 32

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups this format can have: selectors stand in for finer ones."""
        return (self.group,) if self.per else GROUPS

    @property
    def pad(self) -> int:
        """The code that fills what lies outside the matrix: that of a weight of 0."""
        return sum(a + b < 0 for a, b in zip(self.values, self.values[1:])) if self.values else 128

    @property
    def top(self) -> int:
        """The largest |int8| that a code means."""
        return max(map(abs, self.values)) * max(map(abs, self.multipliers or (1,))) if self.values else 127

    def selector_bytes(self, inputs: int) -> int:
        """Bytes of one row's selectors for so many inputs."""
        return inputs // self.per * self.selector_bits // 8 if self.per else 0


PACKED = {
    format.name: format
    for format in (
        Packed("q8", (8,), 128),
        Packed("q4", (4,), 128, (-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9, 11), (-5, -4, -3, -2, 2, 3, 4, 5), 8, 0.0578),
        Packed("q3", (2, 1), 128, (-13, -8, -4, -1, 2, 5, 9, 15), (-8, -7, -6, -6, -5, -4, -4, -3, 2, 3, 4, 5, 5, 6, 7, 8), 16, 0.0248),
    )
}


def span_bytes(name: str, group: int) -> int:
    """Bytes of one span: 16 rows x 2 groups, scales, selectors and codes."""
    return codes_at(name, group) + 2 * group * 2 * PACKED[name].bits


def codes_at(name: str, group: int) -> int:
    """Where a span's codes begin: after the scales and the selectors."""
    return 64 + ROW_BLOCK * PACKED[name].selector_bytes(2 * group)


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
