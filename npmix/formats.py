"""Weight formats: how numbers lie in the bytes. Constants and size arithmetic only.

Dense formats (f32, f16, bf16) are the source's own rows, (N, K) row-major.

Packed formats: a weight is an int8 times a float16 scale per group of G inputs, and a format only says how
its codes become int8:

    q8              w = (code - 128) * scale
    q6, q4          w = values[code] * multipliers[selector] * scale
    q2, q3, q5      w = values[selector][code] * scale

with a selector for each `per` inputs of a row. Values are small tables of integers, uneven because weights are, but for q6's; a selector
picks the table, or a signed multiplier that scales and mirrors the one there is, to suit its inputs. All integers
fit int8, so every kernel sees the same exact ones, and no table has more than 128 of them: one instruction of AVX-512 finds any.

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
GROUPS = (32, 64, 128)  # inputs that may share a scale; their activations share one too
EXPERT_UNIT = 256  # rows of w_gate and w_up that one thread takes at a time: whole pairs of groups of w_down's inputs

# The scales that rounding tries for a format with selectors, times its `unit`; those for one without, as by how much the largest weight
# comes short of the lowest value (`Packed.extremes`); and how often it refits the best by least squares
RATIOS = (0.7, 0.775, 0.85, 0.95, 1.05, 1.15, 1.275, 1.4)
SHORT = (0.0, 0.48, -0.48, -0.96, -1.44, -1.92, -2.88)
REFITS = 2

# Error-compensating rounding: what is added to the diagonal of second moments of mean 1, the scales tried, and the limits of the last step
MOMENTS = 128  # inputs of a block of second moments; only a format whose scale is shared by as many is compensated
DAMPING = 0.01
STEPS = (0.94, 1.0, 1.06)
SCALE_BOUNDS = (0.75, 1.34)

DENSE = {"f32": 4, "f16": 2, "bf16": 2}  # bytes a weight


@dataclass(frozen=True)
class Packed:
    """A packed format.

    planes: bits of each plane of codes. group: inputs that share a scale unless the recipe says otherwise. values: a row of
    ascending integers by code for each selector, or one for all; () for code - 128. multipliers: of each selector. per: inputs that
    share a selector. unit: the scale that most groups of weights with a mean square of 1 get, if there are selectors.
    """

    name: str
    planes: tuple[int, ...]
    group: int
    values: tuple[tuple[int, ...], ...] = ()
    multipliers: tuple[int, ...] = (1,)
    per: int = CHUNK
    unit: float = 0.0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(self.planes)

    @property
    def selector_bits(self) -> int:
        return max(0, len(self.multipliers) - 1).bit_length()

    @property
    def word(self) -> int:
        """Inputs whose selectors lie together, in whole bytes."""
        return 64 if self.selector_bits and 32 // self.per * self.selector_bits % 8 else 32

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups this format can have: selectors stand in for finer ones."""
        return (self.group,) if self.selector_bits else GROUPS

    @property
    def pad(self) -> int:
        """The code that fills what lies outside the matrix: that of a weight of 0 under the first selector."""
        return sum(a + b < 0 for a, b in zip(self.row(0), self.row(0)[1:]))

    @property
    def top(self) -> int:
        """The largest |int8| that a code means."""
        return max(max(map(abs, self.row(s))) * abs(m) for s, m in enumerate(self.multipliers))

    @property
    def extremes(self) -> tuple[float, ...]:
        """What the weight of largest magnitude becomes under each scale that is tried, if there are no selectors."""
        low = self.row(0)[0]
        return (*(low + short for short in SHORT), -low - 0.96)

    def row(self, selector: int) -> tuple[int, ...]:
        """A selector's values, before its multiplier."""
        return self.values[selector % len(self.values)] if self.values else tuple(range(-128, 128))

    def selector_bytes(self, inputs: int) -> int:
        """Bytes of one row's selectors for so many inputs."""
        return inputs // self.per * self.selector_bits // 8


# Tables fitted to Gaussian weights (Lloyd's algorithm, scales and selectors chosen anew in each round); `tools/LOG.md` has their errors
_Q2 = (
    (-127, -40, 11, 71),
    (-93, -21, 22, 66),
    (-112, -52, -8, 34),
    (-77, -31, 9, 74),
    (-85, -39, 3, 47),
    (-60, -20, 15, 54),
    (-69, -30, -1, 29),
    (-49, -19, 8, 37),
    (-33, -7, 19, 49),
    (-40, -2, 31, 65),
    (-47, -13, 21, 78),
    (-64, -8, 36, 78),
    (-32, 7, 45, 92),
    (-68, -21, 21, 104),
    (-53, -2, 48, 126),
    (-93, -19, 39, 107),
)
_Q3 = (
    (-112, -66, -38, -16, 4, 25, 50, 120),
    (-102, -52, -29, -9, 9, 29, 51, 75),
    (-82, -50, -30, -12, 5, 22, 43, 81),
    (-80, -53, -34, -16, 0, 16, 34, 65),
    (-72, -47, -26, -11, 4, 20, 36, 54),
    (-58, -40, -23, -9, 5, 19, 35, 61),
    (-58, -38, -23, -10, 2, 14, 27, 44),
    (-45, -30, -18, -7, 3, 14, 26, 39),
    (-40, -25, -13, -2, 9, 20, 33, 49),
    (-53, -32, -17, -4, 8, 21, 34, 52),
    (-47, -32, -18, -5, 9, 25, 43, 65),
    (-66, -34, -16, -1, 13, 28, 45, 67),
    (-62, -40, -21, -3, 13, 31, 52, 80),
    (-75, -41, -23, -6, 10, 27, 49, 97),
    (-88, -57, -27, -5, 14, 34, 60, 94),
    (-98, -43, -20, 0, 19, 40, 65, 102),
)
_Q5 = (
    (-55, -46, -38, -34, -30, -27, -24, -21, -18, -15, -12, -10, -8, -5, -3, -1,
     1, 3, 6, 8, 10, 13, 15, 18, 21, 24, 27, 30, 34, 39, 50, 57),
    (-75, -61, -50, -44, -40, -36, -32, -28, -24, -20, -16, -13, -10, -7, -4, -1,
     1, 4, 7, 11, 14, 17, 20, 24, 28, 32, 36, 41, 45, 53, 64, 74),
    (-94, -84, -67, -58, -53, -47, -42, -36, -31, -26, -22, -17, -13, -9, -5, -1,
     2, 6, 9, 13, 17, 22, 26, 32, 37, 43, 47, 52, 59, 67, 83, 97),
    (-127, -104, -88, -79, -71, -63, -55, -48, -40, -34, -28, -22, -17, -12, -7, -2,
     2, 8, 13, 18, 23, 29, 35, 42, 48, 56, 62, 71, 79, 89, 106, 124),
)  # fmt: skip

PACKED = {
    format.name: format
    for format in (
        Packed("q8", (8,), 128),
        Packed("q6", (4, 2), 64, (tuple(range(-32, 32)),), (2, 3), 4, 0.028),
        Packed("q5", (4, 1), 64, _Q5, (1,) * 4, 8, 0.029),
        Packed("q4", (4,), 128, ((-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9, 11),), (-5, -4, -3, -2, 2, 3, 4, 5), 8, 0.0578),
        Packed("q3", (2, 1), 128, _Q3, (1,) * 16, 16, 0.029),
        Packed("q2", (2,), 128, _Q2, (1,) * 16, 8, 0.0219),
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
