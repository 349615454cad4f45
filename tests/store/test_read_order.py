"""What is read next and who must go: wanted, guessed, the rest; what a long prompt leaves behind."""

import time

import pytest

from npmix.engine import Engine
from npmix.generate import BUNDLED
from npmix.store import open_store, paging
from npmix.store.disk_stats import MemoryPrice
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
        assert [residency._next()[0] for _ in range(2)] == [wanted, guessed]
        guessed.flying = 0
        assert residency._next()[0] is residency._experts[0, 0]
        assert residency._next() is None
        residency.close()


def test_a_guess_is_read_a_piece_at_a_time(monkeypatch):
    """While a piece of a guess is under way no other one is begun, and a wanted expert is at once; what a prompt is sure to need has all readers."""
    monkeypatch.setattr("npmix.store.residency.PIECE", paging.PAGE)
    with open_store(BUNDLED) as store:
        residency = Residency(store)
        residency.resize(4)
        guessed, wanted = residency._experts[2, 3], residency._experts[1, 6]
        with residency._changed:
            residency._plan(1, [], [3])
            assert residency._next()[0] is guessed and residency._next() is None
            residency._wanted = [wanted]
            assert residency._next()[0] is wanted and residency._next()[0] is wanted
            residency._wanted = []
            guessed.flying = 0
            assert residency._next()[0] is guessed
            residency.expect(2, [3])
            assert residency._next()[0] is guessed and residency._next()[0] is guessed
        residency.close()


@pytest.mark.compiled
@pytest.mark.parametrize("load", ["read", "map"])
def test_idle_disks_fill_memory_with_whole_experts(monkeypatch, load):
    """While nothing is asked for, experts are read in the order of the layers, each to its end, until there is no more memory; `load_experts`
    waits for it."""
    monkeypatch.setattr("npmix.store.residency.PIECE", paging.PAGE)
    with Engine(BUNDLED, context=64, ram="2G", load=load) as engine:
        residency = engine.residency
        residency.affordable = None
        residency.resize(5)
        engine.load_experts()
        ready = [(unit.layer, unit.expert) for unit in residency._experts.values() if unit.ready]
        begun = [unit for unit in residency._experts.values() if unit.memory]
    assert len(ready) == len(begun) == 5


@pytest.mark.compiled
@pytest.mark.parametrize("dear", [True, False])
def test_a_long_prompt_uses_memory_again_where_new_memory_is_dear(dear):
    """Where touching new memory takes longer than reading, a long prompt holds three layers' experts at most, else all that fit; what comes after
    it takes what is left."""
    with Engine(BUNDLED, context=160, chunk=160, ram="2G") as engine:
        residency, held = engine.residency, []
        residency.affordable = None
        assert until(lambda: residency.resize(1) or residency._held == 1)  # what was being read stays until it is there
        residency.stats.rate, residency._price = 1e9, MemoryPrice()
        residency._price.add(True, 1e9 * dear, 1 << 40)
        residency.passing = True
        residency.resize(31)
        engine.prefill(list(range(40, 190)), lambda done, total: held.append(residency._held))
        assert max(held[:3]) <= 24 if dear else until(lambda: residency._held == 31)
        engine.step(7)
        assert until(lambda: residency._ready == 31)


def test_the_price_of_memory():
    """What fresh memory takes beyond used memory counts, against the disk's time for as many bytes; nothing known is not dear."""
    price = MemoryPrice()
    assert not price.dear(1e9)
    price.add(True, 2.0, 10**9)
    assert price.dear(1e9) and not price.dear(0.4e9)
    price.add(False, 1.5, 10**9)  # reading itself takes most of it
    assert not price.dear(1e9)


@pytest.mark.compiled
def test_one_expert_in_many_pieces_where_only_one_fits(monkeypatch):
    """A guess that was begun holds the only memory when the router wants it and another one: it is read to its end first; no one waits for ever."""
    monkeypatch.setattr("npmix.store.residency.PIECE", paging.PAGE)
    with open_store(BUNDLED) as store:
        residency = Residency(store)
        residency.resize(1)
        begun = residency._experts[2, 5]
        with residency._changed:
            residency._plan(1, [], [5])
            assert residency._next()[0] is begun
            begun.flying = 0
            residency._plan(2, [residency._experts[2, 1], begun], [])
            assert residency._next()[0] is begun
        residency.close()
