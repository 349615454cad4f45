"""What is read next and who must go: wanted, guessed, the rest; what a long prompt leaves behind."""

import time

import pytest

from npmix.engine import Engine
from npmix.errors import StoreError
from npmix.generate import BUNDLED
from npmix.store import open_store, paging
from npmix.store.disk_stats import MemoryPrice
from npmix.store.residency import Residency
from npmix.store.units import computable


def until(condition):
    """Whether it comes true within half a minute."""
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def residency():
    """Of the bundled model; no reader is running."""
    with open_store(BUNDLED) as store:
        residency = Residency(store)
        yield residency
        residency.close()


@pytest.fixture
def small_pieces(monkeypatch):
    """An expert is read in many pieces, of a page each."""
    monkeypatch.setattr("npmix.store.residency.PIECE", paging.PAGE)


def test_what_is_expected_last_goes_first(residency):
    """With equal use the layer just computed goes first; an expert chosen lately stays before one that was not; what is pinned stays."""
    for unit in residency._experts.values():
        unit.memory, unit.there = object(), unit.nbytes
    residency._eviction.note(1, [])
    assert residency._victim(False).layer == 1
    for expert in range(8):
        residency._experts[1, expert].pinned = True
    assert residency._victim(False).layer == 0
    residency._eviction._chosen[3, 5] = 0.1
    assert (residency._victim(False).layer, residency._victim(False).expert) == (3, 5)


def test_wanted_reads_come_before_guesses_and_those_before_the_rest(residency):
    """The next piece is of a wanted expert; when none is left, of a guessed one; then of any, while there is memory to spare."""
    residency.resize(3)
    wanted, guessed = residency._experts[1, 6], residency._experts[2, 3]
    with residency._changed:
        residency._plan(1, [wanted], [(2, 3)])
    assert [residency._next()[0] for _ in range(2)] == [wanted, guessed]
    guessed.flying = 0
    assert residency._next()[0] is residency._experts[0, 0]
    assert residency._next() is None


def test_a_wanted_expert_comes_before_more_of_a_guess(residency, small_pieces):
    """Guesses have all readers while nothing is wanted, the nearest layer's first; once something is, no further piece of them is begun."""
    residency.resize(4)
    near, far, wanted = (residency._experts[pair] for pair in ((2, 3), (3, 1), (1, 6)))
    with residency._changed:
        residency._plan(1, [], [(2, 3), (3, 1)])
        assert residency._next()[0] is near and residency._next()[0] is near
        residency._wanted = [wanted]
        assert residency._next()[0] is wanted and residency._next()[0] is wanted
        residency._wanted = []
        near.asked = near.nbytes
        assert residency._next()[0] is far


def test_what_failed_before_it_was_asked_for_is_read_again(residency):
    """A piece of a guess that fails after the router chose the expert is no error: all of it is read again; if that fails too, it is."""
    residency.resize(4)
    unit, failure = residency._experts[2, 3], StoreError("a piece cannot be read")
    with residency._changed:
        residency._plan(1, [], [(2, 3)])
        found, offset, nbytes = residency._next()
        call = residency._calls
        residency._plan(2, [unit], [])
        residency._landed(found, offset, nbytes, failure, call)
        assert unit.error is None and unit.memory is None and residency._held == 0
        assert residency._next() == (unit, offset, nbytes)
        residency._landed(unit, offset, nbytes, failure, residency._calls)
        assert unit.error is failure


def test_bytes_that_had_to_be_read(residency, small_pieces):
    """Missed are the bytes of a chosen expert that was not there, or only because of a guess; not those of a guess that was wrong before."""
    residency.resize(4)
    first, second, stats = residency._experts[2, 3], residency._experts[2, 4], residency.stats

    def plan(layer, chosen, guesses=()):
        before = stats.missed_bytes
        residency._plan(layer, chosen, guesses)
        return stats.missed_bytes - before

    with residency._changed:
        assert plan(1, [], [(2, 3)]) == 0 and residency._next()[0] is first
        assert plan(2, [second]) == second.nbytes and stats.guesses_wrong == 1
        assert plan(2, [first]) == first.nbytes - paging.PAGE
        second.asked = second.there = second.nbytes
        assert plan(2, [second]) == 0
        second.ahead = True
        assert plan(2, [second]) == second.nbytes and stats.guesses_right == 1


@pytest.mark.parametrize("offsets", [[0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]])
def test_an_expert_s_first_half_is_there_without_gaps(residency, offsets):
    """w_gate and w_up can be computed with when every byte before w_down is there, in whatever order the pieces came; then w_down alone."""
    unit = residency._experts[1, 6]
    quarter = unit.head // 3
    for i, offset in enumerate(offsets):
        early = computable([unit], [], True)
        assert early == ([unit] if {0, 1, 2} <= set(offsets[:i]) else [])
        unit.land(quarter * offset, quarter if offset < 3 else unit.nbytes - 3 * quarter)
    assert unit.ready and computable([unit], [], False) == computable([unit], [unit], True) == [unit]
    other = residency._experts[1, 7]
    other.there = other.head
    assert computable([other], [], False) == computable([other], [other], True) == []
    assert computable([other, unit], [], True) == [unit]


@pytest.mark.compiled
@pytest.mark.parametrize("load", ["read", "map"])
def test_idle_disks_fill_memory_with_whole_experts(small_pieces, load):
    """While nothing is asked for, experts are read in the order of the layers, each to its end, until there is no more memory; `load_experts`
    waits for it."""
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
    """Where touching new memory takes longer than reading, a long prompt holds a layer's experts and half of the next one's, else all that fit; what
    comes after it takes what is left."""
    with Engine(BUNDLED, context=160, chunk=160, ram="2G") as engine:
        residency, held = engine.residency, []
        residency.affordable = None
        assert until(lambda: residency.resize(1) or residency._held == 1)  # what was being read stays until it is there
        residency.stats.rate, residency._price = 1e9, MemoryPrice()
        residency._price.add(True, 1e9 * dear, 1 << 40)
        residency.passing = True
        residency.resize(31)
        engine.prefill(list(range(40, 190)), lambda done, total: held.append(residency._held))
        assert max(held[:3]) <= 12 if dear else until(lambda: residency._held == 31)
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
def test_one_expert_in_many_pieces_where_only_one_fits(residency, small_pieces):
    """A guess that was begun holds the only memory when the router wants it and another one: it is read to its end first; no one waits for ever."""
    residency.resize(1)
    begun = residency._experts[2, 5]
    with residency._changed:
        residency._plan(1, [], [(2, 5)])
        assert residency._next()[0] is begun
        begun.flying = 0
        residency._plan(2, [residency._experts[2, 1], begun], [])
        assert residency._next()[0] is begun
