"""One safetensors file, checked and mapped read-only.

File: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without holes.
One hard fact: every claim of the header is checked against the file's size before it is mapped,
because compiled kernels that later read through these addresses have no bounds checks.
Tensors may lie at any byte alignment; bf16 is seen as uint16 (NumPy has no bf16).
"""

import contextlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, NpmixError

LARGEST_HEADER = 100_000_000  # the safetensors library's own limit
# dtype in the header -> (our format or None, NumPy dtype)
DTYPES = {
    "F32": ("f32", np.dtype("<f4")),
    "F16": ("f16", np.dtype("<f2")),
    "BF16": ("bf16", np.dtype("<u2")),
    "U8": (None, np.dtype("u1")),
}
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
               "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _entry(name: str, claim, data_start: int, where: str, error: type[NpmixError]) -> Entry:
    """One header entry, with its own claims checked against each other."""
    if not isinstance(claim, dict) or not {"dtype", "shape", "data_offsets"} <= set(claim):
        raise error(f"{where}: the entry of {name[:100]!r} lacks dtype, shape or data_offsets: download the file again")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise error(f"{where}: {name[:100]!r} has dtype {str(dtype)[:40]!r}, which npmix does not know (it reads F32, F16 and BF16)")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(n) for n in shape):
        raise error(f"{where}: {name[:100]!r} has shape {str(shape)[:80]}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets) or offsets[0] > offsets[1]:
        raise error(f"{where}: {name[:100]!r} has data_offsets {str(offsets)[:80]}, expected [begin, end]")
    nbytes = DTYPE_BYTES[dtype]
    for n in shape:
        nbytes *= n
    if nbytes != offsets[1] - offsets[0]:
        raise error(
            f"{where}: {name[:100]!r} is {dtype} of shape {tuple(shape)} = {nbytes} bytes, but its data_offsets span "
            f"{offsets[1] - offsets[0]}: the header lies, download the file again"
        )
    return Entry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def read_header(path: Path, error: type[NpmixError] = CheckpointError) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of a safetensors file, every claim checked against the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise error(f"{path} has {size} bytes, too few for its header of {length}: truncated, download it again")
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise error(f"{path} does not exist: download it") from None
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise error(f"{path}: the header is not valid JSON ({str(e)[:80]}): download the file again") from None
    if not isinstance(header, dict):
        raise error(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise error(f"{path}: __metadata__ is a JSON {type(metadata).__name__}, expected an object")
    entries = {name: _entry(name, claim, 8 + length, str(path), error) for name, claim in header.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != at:
            kind = "overlaps the tensor before it" if entry.start < at else "leaves a hole before it"
            raise error(f"{path}: {name[:100]!r} {kind}: the header lies, download the file again")
        at += entry.nbytes
    if at != size:
        kind = "truncated" if size < at else "too long"
        raise error(f"{path} has {size} bytes, its header claims {at}: {kind}, download it again")
    return entries, metadata


class SafetensorsFile:
    """A checked, read-only map of one file.

    Views from `view` keep the map alive: `close` unmaps as soon as the last of them is gone.
    """

    def __init__(self, path: Path, error: type[NpmixError] = CheckpointError):
        self.path = Path(path)
        self.entries, self.metadata = read_header(self.path, error)
        try:
            with safe_open(str(self.path), framework="np"):  # the format's own library must agree with us
                pass
            with open(self.path, "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a system without them
                    self._map.madvise(mmap.MADV_HUGEPAGE)  # what is read from the disk may come in pages of 2 MiB: fewer misses of the TLB
            # through a memoryview, which forbids unmapping while a view lives; ndarray(buffer=map) would not
            self._bytes = np.frombuffer(memoryview(self._map), np.uint8)
        except SafetensorError as e:
            raise error(f"{self.path}: {str(e)[:160]}: download the file again") from None
        except (OSError, ValueError) as e:
            raise error(f"cannot map {self.path}: {e}") from None

    def view(self, name: str) -> np.ndarray:
        """The tensor's bytes as a read-only array of its shape (F32, F16, BF16 as uint16, U8)."""
        entry = self.entries[name]
        return self._bytes[entry.start : entry.start + entry.nbytes].view(DTYPES[entry.dtype][1]).reshape(entry.shape)

    def range(self, start: int, nbytes: int) -> np.ndarray:
        """Any bytes of the file as a read-only view."""
        return self._bytes[start : start + nbytes]

    def release(self, start: int, nbytes: int) -> None:
        """Tell the system that these bytes of the file will not be needed soon (a hint, Linux and macOS)."""
        first = start - start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and nbytes:
            self._map.madvise(mmap.MADV_DONTNEED, first, start + nbytes - first)

    def close(self) -> None:
        """Unmap now, or when the last view is dropped if somebody still holds one."""
        if self._map is not None:
            self._bytes = None
            try:
                self._map.close()
            except BufferError:  # a view is alive: the map goes with it
                pass
            self._map = None
