"""Bytes of files into memory in planned pieces, and out again: into memory of our own, or the pages of a map.

One hard fact: a planned read passes the system's page cache by (O_DIRECT) where the file system can, or drops from it
what it brought, so that the memory taken is what was planned; and it never holds the interpreter's lock.

Measured here cold, 96 MiB experts, other programs at work: O_DIRECT 2.4 GB/s with any number of threads and pieces of 0.5 to
96 MiB, MADV_POPULATE_READ of huge pages 2.0 with 4 threads, of small ones 1.2, preadv through the page cache 0.7-1.2.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import StoreError

PAGE = 4096  # of the layout, and what O_DIRECT wants offsets, lengths and addresses to be multiples of
PIECE = 1 << 20  # bytes read at a time: a right read waits no longer than for the pieces of guesses that are under way
BEHIND = 4 << 20  # bytes the kernel may read past the end of a planned range of a map, where pages are huge
MADV_DONTNEED, MADV_POPULATE_READ = 4, 22  # Linux (madvise(2))


class PlannedFile:
    """One file, open for planned reads; notes when it was changed in place. A file renamed over it is another one."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._direct = None
        try:
            self.fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._state = self._look()
        except OSError as e:
            raise StoreError(f"cannot read {self.path}: {e.strerror or e}") from None
        with contextlib.suppress(OSError, AttributeError):  # a file system or a system without O_DIRECT
            direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(direct, [mmap.mmap(-1, PAGE)], 0)
                self._direct = direct
            finally:
                if self._direct is None:
                    os.close(direct)

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self.fd)
        return found.st_size, found.st_mtime_ns

    @property
    def nbytes(self) -> int:
        """Size when it was opened."""
        return self._state[0]

    def check(self) -> None:
        """StoreError if the file is not what it was."""
        found = self._look()
        if found != self._state:
            what = f"has {found[0]} bytes, {self._state[0]} before" if found[0] != self._state[0] else "was written to"
            raise StoreError(f"{self.path} changed while in use: it {what}; copy the store again and load it again")

    def read(self, memory: memoryview, start: int) -> None:
        """Fill `memory`, whose length is a multiple of PAGE, from a page of the file; past its end nothing is written. StoreError."""
        done, whole = 0, min(len(memory), self.nbytes - start)
        try:
            while done < whole:
                count = self._read(memory[done:], start + done)
                if count <= 0:
                    break
                done += count
        except OSError as e:
            raise StoreError(f"cannot read {self.path} at byte {start + done}: {e.strerror or e}; check the disk") from None
        self.check()
        if done < whole:
            raise StoreError(f"{self.path} ended at byte {start + done}: truncated; copy the store again")

    def _read(self, memory: memoryview, start: int) -> int:
        if not hasattr(os, "preadv"):  # Windows
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                return file.readinto(memory)
        if self._direct is not None and start % PAGE == 0:
            try:
                return os.preadv(self._direct, [memory], start)
            except OSError as e:
                if e.errno != errno.EINVAL:  # a disk of larger blocks than pages: through the page cache then
                    raise
        count = os.preadv(self.fd, [memory], start)
        self.forget(start, count)
        return count

    def warm(self, start: int, nbytes: int) -> None:
        """Read a range into the page cache. StoreError."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                file.read(nbytes)
        except OSError as e:
            raise StoreError(f"cannot read {self.path} at byte {start}: {e.strerror or e}; check the disk") from None
        self.check()

    def forget(self, start: int = 0, nbytes: int = 0) -> None:
        """Let the page cache drop a range (0: to the end) that no map holds."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, start, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for fd in (self.fd, self._direct):
            if fd is not None:
                os.close(fd)
        self.fd = self._direct = None


class Copy:
    """Memory of our own for a range of a file: what happens to the file later does not matter."""

    def __init__(self, nbytes: int):
        self.fresh = True  # not all of it was ever touched
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE, **flags)  # not shared: huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.address = self.bytes.__array_interface__["data"][0]

    def fetch(self, file: PlannedFile, start: int, offset: int, nbytes: int) -> None:
        """Bytes start + offset.. of the file into their place. offset: a multiple of PAGE."""
        file.read(memoryview(self.bytes)[offset : offset + -(-nbytes // PAGE) * PAGE], start + offset)


class Mapped:
    """A range of a file's map: pages are brought in before they are used, and given back."""

    fresh = False  # memory of the page cache

    def __init__(self, bytes: np.ndarray):
        self.bytes = bytes
        self.address = bytes.__array_interface__["data"][0]

    def fetch(self, file: PlannedFile, start: int, offset: int, nbytes: int) -> None:
        """Bring in the pages of a piece. StoreError where computing on them would kill the process."""
        file.check()
        error = _madvise(self.address + offset, nbytes, MADV_POPULATE_READ)
        if error == errno.EINVAL:  # a kernel before 5.14, or no Linux; into the page cache then
            file.warm(start + offset, nbytes)
        elif error:
            file.check()
            raise StoreError(f"cannot read {file.path} at byte {start + offset}: {os.strerror(error)}; check the disk")

    def release(self, file: PlannedFile, start: int, nbytes: int) -> None:
        """Give the pages of a range from `start` of the file on back; fadvise alone skips mapped ones."""
        first = self.address - self.address % PAGE
        _madvise(first, self.address + len(self.bytes) - first, MADV_DONTNEED)
        file.forget(start, nbytes)


@lru_cache(maxsize=1)
def _libc():
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        return libc
    except (OSError, TypeError, AttributeError):  # Windows
        return None


def _madvise(address: int, nbytes: int, advice: int) -> int:
    """0 or an errno; EINVAL where there is no such call. By ctypes: mmap's own holds the interpreter's lock meanwhile."""
    libc = _libc()
    if libc is None or not sys.platform.startswith("linux"):
        return errno.EINVAL
    first = address - address % PAGE
    return ctypes.get_errno() if libc.madvise(first, nbytes + address - first, advice) else 0
