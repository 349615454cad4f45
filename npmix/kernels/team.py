"""A team of plain Python threads that run one compiled kernel together, and the barrier inside it.

One hard fact: no Numba threading layer is used: workqueue aborts the process when two threads enter
parallel code, the host program's own included, and OpenMP kills the child after a fork. A kernel here
is an ordinary nogil function called once by every member with its index.

A member that waits spins for a while, then gives way; the calling thread is member 0.
"""

import threading

from ._jit import DISABLED, njit, signature
from .ops import atomic_add, atomic_get, atomic_put, give_way, spin_hint

_SPINS = 4000  # about 40 microseconds


@njit
def barrier(cell, members):
    """Wait until all members came. cell: two int64, a cache line apart: arrivals, then generation."""
    if members == 1:
        return
    generation = atomic_get(cell + 64)
    if atomic_add(cell, 1) == members - 1:
        atomic_put(cell, 0)
        atomic_put(cell + 64, generation + 1)
        return
    spins = 0
    while atomic_get(cell + 64) == generation:
        spins += 1
        if spins < _SPINS:
            spin_hint()
        else:
            give_way()


def prepare(kernel, *args):
    """Compile or load `kernel` for these arguments in the calling thread, so that an interrupt meanwhile leaves no member waiting."""
    if not getattr(kernel, "signatures", True):
        kernel.compile(signature(*args))


class Team:
    """`size` members: the caller of `run` and size - 1 daemon threads, which start at the first run."""

    def __init__(self, size: int):
        self.size = 1 if DISABLED else size  # plain Python kernels cannot wait for each other
        self._job = None
        self._wake = []
        self._done = threading.Semaphore(0)
        self._failure = None

    def run(self, kernel, *args):
        """Call kernel(*args, index, members) on every member and wait for all. An exception of any member is raised."""
        if self.size == 1:
            kernel(*args, 0, 1)
            return
        if not self._wake:
            self._start()
        prepare(kernel, *args, 0, self.size)
        self._job, self._failure = (kernel, args), None
        for lock in self._wake:
            lock.release()
        try:
            kernel(*args, 0, self.size)
        finally:  # also when a Ctrl-C strikes here: nobody may still be at work when the next run starts
            for _ in self._wake:
                self._done.acquire()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _start(self):
        for index in range(1, self.size):
            lock = threading.Lock()
            lock.acquire()
            self._wake.append(lock)
            threading.Thread(target=self._serve, args=(index, lock), name=f"npmix-{index}", daemon=True).start()

    def _serve(self, index, lock):
        while True:
            lock.acquire()
            if self._job is None:
                return
            kernel, args = self._job
            try:
                kernel(*args, index, self.size)
            except Exception as failure:  # handed to the caller, who raises it
                self._failure = failure
            finally:
                self._done.release()

    def close(self):
        """End the threads."""
        self._job = None
        for lock in self._wake:
            lock.release()
        self._wake = []
