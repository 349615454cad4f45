"""A team of plain Python threads that run one compiled kernel together, and the barrier inside it.

One hard fact: no Numba threading layer is used: workqueue aborts the process when two threads enter
parallel code, the host program's own included, and OpenMP kills the child after a fork. A kernel here
is an ordinary nogil function called once by every member with its index.

A member that waits spins for a while, then gives way; the calling thread is member 0.
"""

import collections
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
        self._job = None  # (kernel, args, who has finished)
        self._stop = threading.Event()  # tells the present threads to end
        self._wake = []
        self._done = threading.Semaphore(0)
        self._failure = None

    def run(self, kernel, *args):
        """Call kernel(*args, index, members) on every member and wait for all. An exception of any member is raised.

        A Ctrl-C meanwhile is raised when all have come back: nobody may still be at work when the next run starts.
        """
        if self.size == 1:
            kernel(*args, 0, 1)
            return
        if not self._wake:
            self._start()
        prepare(kernel, *args, 0, self.size)
        finished, interrupt, entered = collections.deque(), None, False
        self._job, self._failure = (kernel, args, finished), None
        while not entered:  # whoever was woken waits for us inside the kernel
            try:
                for lock in self._wake:
                    _wake_up(lock)
                entered = True
                kernel(*args, 0, self.size)
            except KeyboardInterrupt as stop:
                interrupt = stop
            except Exception as failure:
                self._failure = failure
        while len(finished) < len(self._wake):
            try:
                self._done.acquire()
            except KeyboardInterrupt as stop:
                interrupt = stop
        self._job = None
        failure, self._failure = interrupt or self._failure, None
        if failure is not None:
            raise failure

    def _start(self):
        self._stop = threading.Event()
        for index in range(1, self.size):
            lock = threading.Lock()
            lock.acquire()
            self._wake.append(lock)
            threading.Thread(target=self._serve, args=(index, lock, self._stop), name=f"npmix-{index}", daemon=True).start()

    def _serve(self, index, lock, stop):
        last = None
        while True:
            lock.acquire()
            if stop.is_set():
                return
            job = self._job
            if job is None or job[2] is last:  # woken twice for one job
                continue
            kernel, args, last = job
            try:
                kernel(*args, index, self.size)
            except Exception as failure:  # handed to the caller, who raises it
                self._failure = failure
            finally:
                del kernel, args, job
                last.append(index)
                self._done.release()

    def close(self):
        """End the threads."""
        self._stop.set()
        for lock in self._wake:
            _wake_up(lock)
        self._wake = []


def _wake_up(lock):
    """Release a member's lock; a second time does no harm."""
    try:
        lock.release()
    except RuntimeError:  # not yet taken since the first time
        pass
