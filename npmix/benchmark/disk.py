"""How fast files come from the disk: large reads on several threads, past the page cache.

One hard fact: what lies in the page cache is read at memory's speed. So the file is opened with O_DIRECT, and where the
file system or the system cannot, its pages are dropped before; a file system in memory has no disk at all.
"""

import contextlib
import mmap
import os
import queue
import tempfile
import threading
import time
from pathlib import Path

from ..errors import InputError

PIECE = 4 << 20
THREADS = 4
READ = 1 << 30  # of a model's file
WRITTEN = 256 << 20  # of a temporary one


def disk_speed(file=None) -> float:
    """Bytes a second that a file (up to 1 GiB of it) is read with from the disk, or a temporary one in the current folder.

    Raises OSError for what cannot be read or written, InputError for an empty file.
    """
    if file is not None:
        return _read_speed(Path(file))
    with tempfile.TemporaryDirectory(prefix=".npmix-", dir=".") as folder:
        with open(Path(folder, "temporary"), "wb") as temporary:
            for _ in range(WRITTEN // PIECE):
                temporary.write(os.urandom(PIECE))  # nothing that a file system could compress
            temporary.flush()
            os.fsync(temporary.fileno())
        return _read_speed(Path(temporary.name))


def _read_speed(file: Path) -> float:
    size = min(file.stat().st_size, READ)
    if not size:
        raise InputError(f"{file} is empty: nothing to measure the disk with")
    flags, starts, failed = _flags(file, size), queue.SimpleQueue(), []
    for start in range(0, size, PIECE):
        starts.put(start)
    threads = [threading.Thread(target=_take, args=(file, flags, starts, failed)) for _ in range(THREADS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return size / (time.perf_counter() - began)


def _flags(file: Path, size: int) -> int:
    """How to open the file so that it is read from the disk; its pages are dropped where that cannot be said."""
    if hasattr(os, "O_DIRECT"):
        with (
            contextlib.suppress(OSError),
            open(file, "rb", buffering=0, opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_DIRECT)) as opened,
        ):
            opened.readinto(mmap.mmap(-1, mmap.PAGESIZE))
            return os.O_DIRECT
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
    return 0


def _take(file: Path, flags: int, starts, failed: list) -> None:
    """Read pieces until there are none; the last one may end before its end."""
    try:
        with open(file, "rb", buffering=0, opener=lambda path, mode: os.open(path, mode | flags)) as opened:
            room = memoryview(mmap.mmap(-1, PIECE))  # on a page, as O_DIRECT wants it
            while True:
                at, done = starts.get_nowait(), 0
                opened.seek(at)
                while done < PIECE and (got := opened.readinto(room[done:])):
                    done += got
                    if done % mmap.PAGESIZE:  # the file's end
                        break
    except queue.Empty:
        pass
    except OSError as error:
        failed.append(error)
