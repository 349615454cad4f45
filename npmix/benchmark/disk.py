"""How fast files come from the disk: large reads on several threads, past the page cache.

One hard fact: what lies in the page cache is read at memory's speed, so the pages of the file are dropped before; those
that a program has mapped and uses stay, and a file system in memory has no disk.
"""

import os
import queue
import tempfile
import threading
import time
from pathlib import Path

from ..errors import InputError

PIECE = 16 << 20
THREADS = 4
READ = 1 << 30  # of a model's file
WRITTEN = 256 << 20  # of a temporary one


def disk_speed(file=None) -> float:
    """Bytes a second that a file (up to 1 GiB of it) is read with from the disk, or a temporary one in the current folder.

    Raises OSError for what cannot be read or written, InputError for an empty file.
    """
    if file is not None:
        return _read_speed(Path(file))
    with tempfile.NamedTemporaryFile(prefix=".npmix-", dir=".") as temporary:
        for _ in range(WRITTEN // PIECE):
            temporary.write(os.urandom(PIECE))  # nothing that a file system could compress
        temporary.flush()
        os.fsync(temporary.fileno())
        return _read_speed(Path(temporary.name))


def _read_speed(file: Path) -> float:
    size = min(file.stat().st_size, READ)
    if not size:
        raise InputError(f"{file} is empty: nothing to measure the disk with")
    _drop(file, size)
    pieces, failed = queue.SimpleQueue(), []
    for start in range(0, size, PIECE):
        pieces.put((start, min(PIECE, size - start)))
    threads = [threading.Thread(target=_take, args=(file, pieces, failed)) for _ in range(THREADS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return size / (time.perf_counter() - began)


def _drop(file: Path, size: int) -> None:
    """Ask the system to forget the file's pages (Linux); elsewhere the figure may be the page cache's."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _take(file: Path, pieces, failed: list) -> None:
    """Read pieces until there are none."""
    try:
        with open(file, "rb", buffering=0) as opened:
            room = memoryview(bytearray(PIECE))
            while True:
                start, count = pieces.get_nowait()
                opened.seek(start)
                while count and (got := opened.readinto(room[:count])):
                    count -= got
    except queue.Empty:
        pass
    except OSError as error:
        failed.append(error)
