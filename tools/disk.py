"""The disk under a file: out of the page cache with it, and how fast it can be read. Linux.

One hard fact: posix_fadvise passes over pages that are mapped or not yet written, so a file is synced first, and what is
still in memory is counted (mincore) rather than hoped to be gone.
"""

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PIECE = 8 << 20
LARGE = 96 << 20  # an expert of Mixtral at 4.5 bits
POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


def evict(files) -> int:
    """Drop the files from the page cache; returns the bytes of them that stayed in memory."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return sum(cached(path) for path in files)


def cached(path) -> int:
    """Bytes of a file that are in memory (mincore)."""
    size = os.path.getsize(path)
    if not size:
        return 0
    pages = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
        failed = _libc.mincore(_address(view), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return int((pages & 1).sum()) * mmap.PAGESIZE


def _address(view: mmap.mmap, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(np.frombuffer(view, np.uint8).ctypes.data + offset)


def _pread(handle: int, start: int, size: int, piece: int) -> None:
    buffer = mmap.mmap(-1, piece)  # aligned, as O_DIRECT wants it
    for at in range(start, start + size, piece):
        os.preadv(handle, [buffer], at)
    buffer.close()


def _populate(handle: int, start: int, size: int, piece: int) -> None:
    with mmap.mmap(handle, size, offset=start, access=mmap.ACCESS_READ) as view:
        for at in range(0, size, piece):
            if _libc.madvise(_address(view, at), ctypes.c_size_t(min(piece, size - at)), POPULATE_READ):
                raise OSError(ctypes.get_errno(), "MADV_POPULATE_READ")


METHODS = {  # name: (reader, flags of open, threads, bytes a request)
    "preadv, 1 thread": (_pread, 0, 1, PIECE),
    "preadv, 2 threads": (_pread, 0, 2, LARGE // 4),
    "preadv, 4 threads": (_pread, 0, 4, LARGE // 4),
    "MADV_POPULATE_READ, 1 thread": (_populate, 0, 1, LARGE),
    "MADV_POPULATE_READ, 2 threads": (_populate, 0, 2, LARGE // 4),
    "O_DIRECT, 4 threads": (_pread, getattr(os, "O_DIRECT", 0), 4, PIECE),
}


def sequential_rates(files, amount: int = LARGE * 8) -> dict[str, float]:
    """Bytes a second by method, each over `amount` bytes (or what there is) that no other method has read. The cache is cold afterwards."""
    largest = max(files, key=os.path.getsize)
    evict(files)
    share = min(amount, os.path.getsize(largest)) // (4 * mmap.PAGESIZE) * (4 * mmap.PAGESIZE)
    rates, places = {}, [(path, at) for path in sorted(files) for at in range(0, os.path.getsize(path) - share + 1, share)]
    for number, (name, (read, flags, threads, piece)) in enumerate(METHODS.items()):
        path, start = places[number * len(places) // len(METHODS)]
        part = share // threads // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            handle = os.open(path, os.O_RDONLY | flags)
        except OSError:  # a file system without O_DIRECT
            continue
        try:
            with ThreadPoolExecutor(threads) as pool:
                began = time.perf_counter()
                for done in [pool.submit(read, handle, start + i * part, part, min(piece, part)) for i in range(threads)]:
                    done.result()
                rates[name] = part * threads / (time.perf_counter() - began)
        except OSError:  # a kernel without it
            pass
        finally:
            os.close(handle)
        evict([Path(path)])
    return rates
