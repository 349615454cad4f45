"""A team of plain Python threads that run one compiled kernel together, and the barrier inside it.

One hard fact: no Numba threading layer is used: workqueue aborts the process when two threads enter
parallel code, the host program's own included, and OpenMP kills the child after a fork. A kernel here
is an ordinary nogil function called by every member with its index.

A member that waits spins for a while, then gives way; the calling thread is member 0.

To wake a thread and to have it back in Python takes 0.15 ms, which short work repeats thousands of times a second. So the
members of `Team.call` stay in the kernel a little longer than its work: whoever is still there sees the next call at once
(`called`), whoever has left is woken as ever.
"""

import collections
import threading

import numpy as np

from ._jit import DISABLED, Inner, njit, signature
from .ops import atomic_add, atomic_get, atomic_put, get_i64, give_way, put_i64, spin_hint

_SPINS = 4000  # about 40 microseconds
_STAY = 8000  # looks for the next call: a millisecond, and another one for the wake-up that came meanwhile; to choose a token takes less

# `Team.cells`, a cache line each: the barrier's two; the number of the call that member 0 is about to make, and of the one that it
# has made; what it is to do; then for each member the last call that it served
_COMING, _MADE, WORK, _SERVED = (np.int64(64 * i) for i in (2, 3, 4, 5))
_NONE = -1  # coming: nothing of this kind, leave


@njit
def _pause(turns):
    if turns < _SPINS:
        spin_hint()
    else:
        give_way()


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
        _pause(spins)


@njit
def make_call(cells):
    """Member 0, before it begins: what it put at WORK may be read."""
    atomic_put(cells + _MADE, atomic_get(cells + _COMING))


@njit
def called(cells, index):
    """Another member: wait for a call that it has not served yet; False when none came for a while, and it must leave."""
    served = cells + _SERVED + 64 * index
    turns, coming = 0, atomic_get(cells + _COMING)
    while coming == get_i64(served):
        turns += 1
        if turns == _STAY:
            return False
        _pause(turns)
        coming = atomic_get(cells + _COMING)
    while coming != _NONE and atomic_get(cells + _MADE) != coming:  # member 0 is on its way, or gave up and makes another call
        turns += 1
        _pause(turns)
        coming = atomic_get(cells + _COMING)
    put_i64(served, coming)
    return coming != _NONE


def prepare(kernel, *args):
    """Compile or load `kernel` for these arguments in the calling thread, so that an interrupt meanwhile leaves no member waiting."""
    if isinstance(kernel, Inner):
        kernel.open()
    if not getattr(kernel, "signatures", True):
        kernel.compile(signature(*args))


class Team:
    """`size` members: the caller of `run` or `call` and size - 1 daemon threads, which start at the first of these.

    cells: int64, what the members share; a kernel that keeps its address needs nothing else to wait in `barrier`.
    """

    def __init__(self, size: int):
        self.size = 1 if DISABLED else size  # plain Python kernels cannot wait for each other
        raw = np.zeros(_SERVED // 8 + 8 * self.size + 8, np.int64)
        self.cells = raw[-raw.__array_interface__["data"][0] % 64 // 8 :][: raw.size - 8]
        self._job = None  # (kernel, args, who has finished)
        self._prepared = None  # the kernel that ran last
        self._calls = 0
        self._stop = threading.Event()  # tells the present threads to end
        self._wake, self._threads = [], []
        self._done = threading.Semaphore(0)
        self._failure = None

    @property
    def address(self) -> int:
        """Where `cells` lie, a multiple of 64."""
        return self.cells.__array_interface__["data"][0]

    def run(self, kernel, *args):
        """Call kernel(*args, index, members) on every member and wait for all. An exception of any member is raised.

        A Ctrl-C meanwhile, or what else a signal raises, is raised when all have come back: nobody may still be at work when the next run starts.
        """
        finished = collections.deque()
        interrupt = self._together(kernel, args, finished, _NONE)
        while len(finished) < len(self._wake):
            try:
                self._done.acquire()
            except BaseException as stop:
                interrupt = stop
        self._job = None
        self._raise(interrupt)

    def call(self, kernel, *args):
        """The same for a compiled kernel whose members wait in a barrier at its end and then in `called`: its end is everyone's.

        Of one team's calls only one kernel with the same objects as args may be made; what changes goes through `cells`. A Ctrl-C is
        raised at its end.
        """
        self._calls += 1
        self._raise(self._together(kernel, args, None, self._calls))

    def _together(self, kernel, args, finished, coming):
        """Wake all and be member 0; what has interrupted it."""
        if self.size == 1:
            kernel(*args, 0, 1)
            return None
        if not self._wake:
            self._start()
        if kernel is not self._prepared:
            prepare(kernel, *args, 0, self.size)
            self._prepared = kernel
        interrupt, entered = None, False
        self._job, self._failure = (kernel, args, finished), None
        while not entered:  # whoever was woken waits for us inside the kernel
            try:
                self.cells[_COMING // 8] = coming
                for lock in self._wake:
                    _wake_up(lock)
                entered = True
                kernel(*args, 0, self.size)
            except BaseException as stop:  # whatever a signal's handler raises, or the kernel
                interrupt = stop
        return interrupt

    def _raise(self, interrupt):
        failure, self._failure = interrupt or self._failure, None
        if failure is not None:
            raise failure

    def _start(self):
        for thread in self._threads:  # closed, perhaps not yet gone
            thread.join()
        self._threads, self._stop, locks = [], threading.Event(), []
        try:
            for index in range(1, self.size):
                lock = threading.Lock()
                lock.acquire()
                locks.append(lock)
                thread = threading.Thread(target=self._serve, args=(index, lock, self._stop), name=f"npmix-{index}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:  # all or none: a call waits for every member
            self._end(locks)
            raise
        self._wake = locks

    def _serve(self, index, lock, stop):
        last = None
        while True:
            lock.acquire()
            if stop.is_set():
                return
            job = self._job
            if job is None or job[2] is last is not None:  # woken twice for one job
                continue
            kernel, args, last = job
            try:
                kernel(*args, index, self.size)
            except Exception as failure:  # handed to the caller, who raises it
                self._failure = failure
            finally:
                del kernel, args, job
                if last is not None:
                    last.append(index)
                    self._done.release()

    def close(self):
        """End the threads; not while a call or run is under way."""
        self.cells[_COMING // 8] = _NONE
        self._end(self._wake)
        self._wake, self._job = [], None

    def _end(self, locks):
        self._stop.set()
        for lock in locks:
            _wake_up(lock)


def _wake_up(lock):
    """Release a member's lock; a second time does no harm."""
    try:
        lock.release()
    except RuntimeError:  # not yet taken since the first time
        pass
