"""What is read next and who must go: wanted, guessed, the rest; what a long prompt leaves behind."""

import time

import pytest

from npmix.engine import Engine
from npmix.generate import BUNDLED
from npmix.store import open_store, paging
from npmix.store.residency import Residency


def until(condition):
    """Whether it comes true within half a minute."""
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_what_is_expected_last_goes_first():
    """With equal use the layer just computed goes first; an expert chosen lately stays before one that was not; what is pinned stays."""
    with open_store(BUNDLED) as store:
        residency = Residency(store)
        for unit in residency._experts.values():
            unit.memory, unit.landed = object(), unit.nbytes
        residency._layer = 1
        assert residency._victim(False).layer == 1
        for expert in range(8):
            residency._experts[1, expert].pinned = True
        assert residency._victim(False).layer == 0
        residency._chosen[3, 5] = 0.1
        assert (residency._victim(False).layer, residency._victim(False).expert) == (3, 5)
        residency.close()


def test_wanted_reads_come_before_guesses_and_those_before_the_rest():
    """The next piece is of a wanted expert; when none is left, of a guessed one; then of any, while there is memory to spare."""
    with open_store(BUNDLED) as store:
        residency = Residency(store)
        residency.resize(3)
        wanted, guessed = residency._experts[1, 6], residency._experts[2, 3]
        with residency._changed:
            residency._plan(1, [wanted], [3])
        assert [residency._next()[0] for _ in range(3)] == [wanted, guessed, residency._experts[0, 0]]
        assert residency._next() is None
        residency.close()


@pytest.mark.compiled
@pytest.mark.parametrize("load", ["read", "map"])
def test_idle_disks_fill_memory_with_whole_experts(monkeypatch, load):
    """While nothing is asked for, experts are read in the order of the layers, each to its end, until there is no more memory."""
    monkeypatch.setattr("npmix.store.residency.PIECE", paging.PAGE)
    with Engine(BUNDLED, context=64, ram="2G", load=load) as engine:
        residency = engine.residency
        residency.affordable = None
        residency.resize(5)
        assert until(lambda: residency._ready == 5)
        ready = [(unit.layer, unit.expert) for unit in residency._experts.values() if unit.ready]
        begun = [unit for unit in residency._experts.values() if unit.memory]
    assert len(ready) == len(begun) == 5


@pytest.mark.compiled
@pytest.mark.parametrize("dear", [True, False])
def test_a_long_prompt_uses_memory_again_where_new_memory_is_dear(dear):
    """Where touching new memory takes longer than reading, a long prompt holds three layers' experts at most, else all that fit; what comes after
    it takes what is left."""
    with Engine(BUNDLED, context=64, chunk=64, ram="2G") as engine:
        residency = engine.residency
        residency.affordable = None
        residency.resize(1)
        assert until(lambda: residency._held == 1)
        residency.stats.rate, residency._fresh_s, residency._fresh_bytes = 1e9, 1e9 * dear, 1 << 40
        residency.passing = True
        residency.resize(31)
        engine.prefill(list(range(40, 88)))
        assert 8 <= residency._held <= 24 if dear else until(lambda: residency._held == 31)
        engine.step(7)
        assert until(lambda: residency._ready == 31)
