"""A weight as it lies in memory or in a mapped file: bytes, format, shape."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """One weight.

    data: a read-only view. Dense: `shape`, C-contiguous, dtype float32 (f32), float16 (f16) or
    uint16 (bf16), of any byte alignment. Packed: uint8, one axis, `formats.packed_bytes` long.
    format: a key of `formats.DENSE` or `formats.PACKED`. group: inputs per scale, 0 if dense.
    """

    data: np.ndarray
    format: str
    shape: tuple[int, ...]
    group: int = 0

    @property
    def address(self) -> int:
        """Where the first byte lies. The owner of the map must outlive every use of it."""
        return self.data.__array_interface__["data"][0]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes
