"""The team: its barrier, its threads, exceptions, and a host program's own Numba beside it."""

import threading
import time

import numpy as np
import pytest
from kernel_tools import address, child

from npmix.kernels import team as team_module
from npmix.kernels._jit import DISABLED, njit
from npmix.kernels.ops import atomic_add, get_i64, put_i64
from npmix.kernels.team import WORK, Team, barrier, called, make_call

ROUNDS = 40


@njit
def _rounds(cell, counters, seen, rounds, index, members):
    """In each round every member adds 1, waits, and notes what it sees: all must see all."""
    for r in range(rounds):
        atomic_add(counters + 8 * r, 1)
        barrier(cell, members)
        put_i64(seen + 8 * (r * members + index), get_i64(counters + 8 * r))
        barrier(cell, members)


def cells():
    """Zeroed int64 cells on a cache line of their own."""
    raw = np.zeros(24, np.int64)
    return raw[(-address(raw) % 64) // 8 :][:16]


def members():
    return {t for t in threading.enumerate() if t.name.startswith("npmix-")}


def gone(threads, seconds=10):
    """Whether all threads end within a time."""
    end = time.monotonic() + seconds
    while any(t.is_alive() for t in threads) and time.monotonic() < end:
        time.sleep(0.005)
    return not any(t.is_alive() for t in threads)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_barrier(size):
    """Nobody passes a barrier before everybody came: after it all members see all additions, round after round, run after run, also
    with more members than cores."""
    team, cell = Team(size), cells()
    size = 1 if DISABLED else size
    try:
        for _ in range(3):
            counters, seen = np.zeros(ROUNDS, np.int64), np.zeros((ROUNDS, size), np.int64)
            team.run(_rounds, address(cell), address(counters), address(seen), ROUNDS)
            assert (counters == size).all() and (seen == size).all()
        assert cell[0] == 0 and cell[8] == (0 if size == 1 else 6 * ROUNDS)
    finally:
        team.close()


def test_every_member_runs_once(monkeypatch):
    """run calls the kernel once with each index and the number of members; member 0 is the caller."""
    monkeypatch.setattr(team_module, "DISABLED", False)
    for size in (1, 2, 4):
        calls, team = [], Team(size)
        team.run(lambda a, index, members: calls.append((a, index, members, threading.current_thread().name)), "x")
        assert sorted(c[:3] for c in calls) == [("x", i, size) for i in range(size)]
        assert [c[3] for c in calls if c[1] == 0] == [threading.current_thread().name]
        team.close()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_exception_of_any_member_is_raised(bad, monkeypatch):
    """A failing member's exception comes out of run, after all others have finished; the next run is sound and fails no more."""
    monkeypatch.setattr(team_module, "DISABLED", False)
    team, finished = Team(3), []

    def kernel(fail, index, members):
        if fail and index == bad:
            raise ArithmeticError(f"member {index}")
        time.sleep(0.05)
        finished.append(index)

    try:
        for _ in range(2):
            with pytest.raises(ArithmeticError, match=f"member {bad}"):
                team.run(kernel, True)
            assert sorted(finished) == [i for i in range(3) if i != bad]
            finished.clear()
            team.run(kernel, False)
            assert sorted(finished) == [0, 1, 2]
            finished.clear()
    finally:
        team.close()


def test_an_interrupt_leaves_nobody_at_work(monkeypatch):
    """A Ctrl-C that strikes member 0 is raised only when every other member is done."""
    monkeypatch.setattr(team_module, "DISABLED", False)
    team, finished = Team(2), []

    def kernel(index, members):
        if index == 0:
            raise KeyboardInterrupt
        time.sleep(0.1)
        finished.append(index)

    with pytest.raises(KeyboardInterrupt):
        team.run(kernel)
    assert finished == [1]
    team.close()


@njit
def _served(cells, seen, index, members):
    """Each member adds the number at WORK to its own place of `seen`, so that only calls served once each and in order give the right sum."""
    if index == 0:
        make_call(cells)
    while index == 0 or called(cells, index):
        at = seen + 64 * index
        put_i64(at, (3 * get_i64(at) + get_i64(cells + WORK)) % 1_000_003)
        barrier(cells, members)
        if index == 0:
            return


@pytest.mark.parametrize("size", [1, 2, 3])
def test_calls(size):
    """Every member serves every call once and in order, whether it is still in the kernel or has long left it, or ran something else
    meanwhile; when a call returns, all have served it."""
    team, cell = Team(size), cells()
    seen, counters, rounds = np.zeros((size, 8), np.int64), np.zeros(4, np.int64), np.zeros((4, size), np.int64)
    members = 1 if DISABLED else size
    expected = 0
    try:
        for call in range(1, 400):
            team.cells[WORK // 8] = call
            team.call(_served, team.address, address(seen))
            expected = (3 * expected + call) % 1_000_003
            assert seen[:members, 0].tolist() == [expected] * members
            if call % 40 == 0:
                time.sleep(0.05)  # nobody stays so long
            if call % 50 == 0:
                team.run(_rounds, address(cell), address(counters), address(rounds), 4)
    finally:
        team.close()


@pytest.mark.compiled
def test_nobody_stays_for_long():
    """Members that wait for a call give the processor back soon, and close ends them at once, also in the midst of waiting; then the
    team starts anew."""
    team, seen = Team(2), np.zeros((2, 8), np.int64)
    before = members()
    team.call(_served, team.address, address(seen))
    time.sleep(0.5)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.25
    for call in range(3):
        team.call(_served, team.address, address(seen))
        mine = members() - before
        assert len(mine) == 1
        team.close()
        assert gone(mine)


@pytest.mark.compiled
@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("woken", [False, True])
def test_an_interrupted_call_is_served_by_all(woken, signal, monkeypatch):
    """A Ctrl-C, or what another signal's handler raises, before or after the others are woken, is raised at the call's end, when all have
    served it; the next call is sound."""
    team, seen, wake_up = Team(2), np.zeros((2, 8), np.int64), team_module._wake_up

    def interrupted(lock):
        monkeypatch.setattr(team_module, "_wake_up", wake_up)
        if woken:
            wake_up(lock)
            time.sleep(0.05)  # by now it waits for member 0
        raise signal

    team.cells[WORK // 8] = 1
    for count in (1, 4):
        monkeypatch.setattr(team_module, "_wake_up", interrupted)
        with pytest.raises(signal):
            team.call(_served, team.address, address(seen))
        assert seen[:, 0].tolist() == [count, count]
    team.close()


def test_a_thread_that_does_not_start(monkeypatch):
    """When not all members start, those that did end, the error is the caller's, and the next run starts all anew."""
    monkeypatch.setattr(team_module, "DISABLED", False)
    before, team, start, starts, calls = members(), Team(3), threading.Thread.start, [], []

    def refuse_the_second(thread):
        starts.append(thread)
        if len(starts) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(RuntimeError, match="new thread"):
        team.run(lambda index, members: calls.append(index))
    assert gone(members() - before) and not calls
    team.run(lambda index, members: calls.append(index))
    assert sorted(calls) == [0, 1, 2]
    team.close()


@pytest.mark.compiled
def test_an_inner_kernel_is_compiled_before_anyone_waits(monkeypatch):
    """So is one that was compiled for another kernel only, without a way in from Python."""

    @njit
    def inner(cells, index, members):
        barrier(cells, members)

    outer = njit(lambda cells: inner(cells, 0, 1))
    team, wake_up, compiled = Team(2), team_module._wake_up, []
    outer(team.address)

    def wake(lock):
        compiled.append(inner.nopython_signatures and not inner.targetoptions["no_cpython_wrapper"])
        wake_up(lock)

    monkeypatch.setattr(team_module, "_wake_up", wake)
    team.run(inner, team.address)
    assert compiled == [True]
    team.close()


@pytest.mark.compiled
def test_a_kernel_is_compiled_before_anyone_waits():
    """The first run compiles in the calling thread: a kernel that cannot be compiled fails there, and no member waits in a barrier."""
    team, cell = Team(2), cells()

    @njit
    def broken(a, index, members):
        barrier(a, members)
        return a.nothing_of_this_name

    with pytest.raises(Exception, match="nothing_of_this_name"):
        team.run(broken, address(cell))
    assert not cell.any()
    counters, seen = np.zeros(1, np.int64), np.zeros((1, 2), np.int64)
    team.run(_rounds, address(cell), address(counters), address(seen), 1)
    assert (seen == 2).all()
    team.close()


def test_close_ends_the_threads(monkeypatch):
    """Threads start at the first run, are daemons, and end at close; closing twice is fine, and a later run starts new ones."""
    monkeypatch.setattr(team_module, "DISABLED", False)
    before = members()
    team = Team(3)
    assert members() == before
    for _ in range(2):
        team.run(lambda index, members: None)
        mine = members() - before
        assert len(mine) == 2 and all(t.daemon for t in mine)
        team.close()
        assert gone(mine)
    team.close()


HOST = """
import threading, numpy as np, numba
from test_team import _rounds, address, cells
from npmix.kernels.team import Team

@numba.njit(parallel=True)
def own(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += x[i]
    return total

x = np.ones(100_000)
assert own(x) == x.size  # compiled, its threading layer running
stop, sums = threading.Event(), []
def host():
    while not stop.is_set():
        sums.append(own(x))
thread = threading.Thread(target=host)
thread.start()
team, cell = Team(2), cells()
for _ in range(20):  # few rounds: with more threads than cores a barrier may wait for a time slice
    counters, seen = np.zeros(10, np.int64), np.zeros((10, 2), np.int64)
    team.run(_rounds, address(cell), address(counters), address(seen), 10)
    assert (seen == 2).all()
stop.set()
thread.join()
assert set(sums) == {float(x.size)}
print("host and team are fine", numba.threading_layer())
"""


@pytest.mark.compiled
def test_a_host_program_with_its_own_prange(tmp_path):
    """A host that runs Numba's prange in another thread meanwhile, on the workqueue layer that aborts when two enter it, is not disturbed
    and disturbs nobody."""
    assert "fine workqueue" in child(HOST, tmp_path, NUMBA_THREADING_LAYER="workqueue").stdout
