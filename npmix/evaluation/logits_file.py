"""Log-probabilities of a base model in a file, so that it need not be loaded for every model held against it.

    8 bytes   b"npmixlp1"
    8 bytes   length of the header, little-endian
    header    JSON: vocab_size, context, stride, tokens, sha256 (of the ids as int32), windows, base
    windows   for each scored position 16 + 2 V bytes: f8 nll, i4 top, 4 zero bytes, u2 codes (V,); after each window the
              CRC-32 of its bytes

One hard fact: a code is 65,536 (1 - e^(-x / 8)) for a token x nats below the likeliest, so the steps are finest where the
probability is: 0.00012 nats at the top, 0.0004 at 10 nats, and nothing is cut off before 88 nats. A mean KL, 1e-4 and less
included, moves by about a hundredth of its own standard error, and by no more than 1e-9 where that is smaller; float16 would
be off by 2.5e-6. Perplexities and first choices come from `nll` and `top` and are exact.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

from ..errors import LogitsFileError
from .scores import Block, normalised
from .windows import Plan, Window, make_plan

MAGIC = b"npmixlp1"
LARGEST_HEADER = 1 << 16
LEVELS, NATS = 1 << 16, 8.0
FIELDS = ("vocab_size", "context", "stride", "tokens", "sha256", "windows", "base")


def row_type(vocab_size: int) -> np.dtype:
    """One position."""
    return np.dtype([("nll", "<f8"), ("top", "<i4"), ("zero", "<i4"), ("codes", "<u2", (vocab_size,))])


def encode(logs: np.ndarray) -> np.ndarray:
    """Log-probabilities (n, V) -> codes; the likeliest token's is 0."""
    below = logs - logs.max(-1, keepdims=True)
    return np.minimum(np.rint(-LEVELS * np.expm1(below / NATS)), LEVELS - 1).astype(np.uint16)


def decode(codes: np.ndarray) -> np.ndarray:
    """Codes (n, V) -> log-probabilities, whose exponentials sum to 1 again."""
    table = NATS * np.log1p(-np.arange(LEVELS) / LEVELS)
    return normalised(table[codes])


def digest(ids) -> str:
    """sha256 of token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


def _nbytes(windows: list[Window], vocab_size: int) -> int:
    return sum(w.scored for w in windows) * row_type(vocab_size).itemsize + 4 * len(windows)


class LogitsWriter:
    """A file being written: `add` the blocks of each window, `end_window` after it, `finish` at last.

    Used in `with`: unless finished, nothing is left. Raises LogitsFileError where something else lies in the way or the
    disk has too little room; OSError as the system gives it.
    """

    def __init__(self, path, plan: Plan, vocab_size: int, base: str):
        self.path = Path(path)
        if self.path.exists() and not _is_ours(self.path):
            raise LogitsFileError(f"{self.path} exists and holds no saved log-probabilities: choose another name")
        header = {
            "vocab_size": vocab_size, "context": plan.context, "stride": plan.stride, "tokens": len(plan.ids),
            "sha256": digest(plan.ids), "windows": len(plan.windows), "base": base[:1024],
        }  # fmt: skip
        text = json.dumps(header).encode()
        needed = 16 + len(text) + _nbytes(plan.windows, vocab_size)
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise LogitsFileError(
                f"{self.path} would take {needed} bytes, the disk has {free}: free some or evaluate fewer windows (--limit)"
            )
        self._row, self._crc = row_type(vocab_size), 0
        self._temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        self._file = open(self._temporary, "wb")
        self._file.write(MAGIC + len(text).to_bytes(8, "little") + text)

    def add(self, block: Block) -> None:
        """Some positions of the present window."""
        rows = np.zeros(len(block.nll), self._row)
        rows["nll"], rows["top"], rows["codes"] = block.nll, block.top, encode(block.logs)
        data = rows.tobytes()
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)

    def end_window(self) -> None:
        """Close the present window."""
        self._file.write(self._crc.to_bytes(4, "little"))
        self._crc = 0

    def finish(self) -> None:
        """Sync, give the file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def __enter__(self) -> "LogitsWriter":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # a late error of the disk; the file goes anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(len(MAGIC)) == MAGIC


class LogitsReader:
    """A file of log-probabilities, held against the plan it shall serve: `begin` each window, then `read` it.

    Raises LogitsFileError for a file that is damaged, truncated, or made of another text, vocabulary or cut into windows.
    """

    def __init__(self, path, plan: Plan, vocab_size: int):
        self.path, self._row, self._vocab_size = Path(path), row_type(vocab_size), vocab_size
        try:
            self._file = open(self.path, "rb")
        except OSError as e:
            raise LogitsFileError(f"cannot read {self.path}: {e.strerror or e}") from None
        try:
            header = self._header()
            self._check(header, plan)
            self.base: str = header["base"]
        except BaseException:
            self._file.close()
            raise

    def _header(self) -> dict:
        size = os.fstat(self._file.fileno()).st_size
        if self._file.read(8) != MAGIC:
            raise LogitsFileError(f"{self.path} is no file of saved log-probabilities: make one with --save-logits")
        length = int.from_bytes(self._file.read(8), "little")
        if length > min(LARGEST_HEADER, size - 16):
            raise LogitsFileError(f"{self.path} has {size} bytes, too few for its header of {length}: truncated, make it again")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError):
            raise LogitsFileError(f"{self.path}: the header is not valid JSON: damaged, make it again") from None
        if not isinstance(header, dict) or set(header) != set(FIELDS) or not isinstance(header["base"], str):
            raise LogitsFileError(f"{self.path}: the header lacks one of {', '.join(FIELDS)}: made by another version, make it again")
        return header

    def _check(self, header: dict, plan: Plan) -> None:
        expected = {
            "vocab_size": self._vocab_size, "context": plan.context, "stride": plan.stride,
            "tokens": len(plan.ids), "sha256": digest(plan.ids),
        }  # fmt: skip
        for name, value in expected.items():
            found = header[name]
            if type(found) is not type(value) or found != value:
                found = str(found)[:80]
                raise LogitsFileError(
                    f"{self.path} has {name} {found}, expected {value}: it was made of another text, model family or setting; make it again"
                )
        windows = header["windows"]
        if type(windows) is not int or not len(plan.windows) <= windows <= len(plan.ids):
            raise LogitsFileError(
                f"{self.path} has {str(windows)[:40]} windows, expected {len(plan.windows)} or more: make it again, or use a smaller --limit"
            )
        whole = make_plan(plan.ids, plan.context, plan.stride, plan.bos_id, windows).windows
        size, claimed = os.fstat(self._file.fileno()).st_size, self._file.tell() + _nbytes(whole, self._vocab_size)
        if len(whole) != windows or size != claimed:
            kind = "truncated" if size < claimed else "damaged"
            raise LogitsFileError(f"{self.path} has {size} bytes, its header claims {claimed}: {kind}, make it again")

    def begin(self, window: Window) -> None:
        """The next window, in the order of the plan; the one before has been read to its end."""
        self._window, self._left, self._crc = window, window.scored, 0

    def read(self, count: int) -> Block:
        """The next `count` positions of the window."""
        data = self._file.read(count * self._row.itemsize)
        self._crc, self._left = zlib.crc32(data, self._crc), self._left - count
        bad = len(data) != count * self._row.itemsize or (not self._left and self._file.read(4) != self._crc.to_bytes(4, "little"))
        rows = None if bad else np.frombuffer(data, self._row)
        if bad or not (np.isfinite(rows["nll"]) & (rows["nll"] >= 0)).all():
            where = f"the window at token {self._window.begin}"
            raise LogitsFileError(f"{self.path}: {where} does not match its checksum: damaged, make it again")
        return Block(decode(rows["codes"]), rows["nll"].astype(np.float64), rows["top"].astype(np.int64))

    def __enter__(self) -> "LogitsReader":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
