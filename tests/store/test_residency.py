"""Weights under a budget: the bits of every budget, faults of files and disks, memory that becomes less, interrupts, ends."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from make import tiny_hf

from npmix import budget, budgeted
from npmix.engine import Engine
from npmix.errors import EngineError, InputError, StoreError
from npmix.generate import BUNDLED
from npmix.kernels._jit import DISABLED
from npmix.kernels.tables import LAYERS_AHEAD
from npmix.model.streaming import StreamingForward
from npmix.store import paging
from npmix.store import residency as module
from npmix.store.residency import Residency

IDS = list(range(40, 49)) if DISABLED else [int(i) for i in np.random.default_rng(5).integers(3, 700, 48)]
PROMPT = len(IDS) - 3
EXPERTS = 32  # of the bundled model: 4 layers of 8
STEPS = 1 if DISABLED else 3


def run(engine):
    """Logits after a prompt and after each of some more tokens, from an empty cache."""
    engine.reset()
    return np.stack([engine.prefill(IDS[:PROMPT]), *(engine.step(i) for i in IDS[PROMPT : PROMPT + STEPS])])


def same(found, expected):
    return (found.view(np.int32) == expected.view(np.int32)).all()


@pytest.fixture(scope="module")
def expected():
    with Engine(BUNDLED, threads=1, context=64) as engine:
        return run(engine)


@pytest.fixture
def store(tmp_path):
    return shutil.copytree(BUNDLED, tmp_path / "store")


@pytest.fixture
def opened():
    """open(capacity, path, **options): an engine that holds at most so many experts."""
    engines = []

    def open(capacity, path=BUNDLED, **options):
        engine = Engine(path, **{"threads": 1 + len(engines) % 2, "context": 64, "chunk": 20, "ram": "2G", **options})
        engines.append(engine)
        engine.residency.affordable = None
        engine.residency.resize(capacity)
        return engine

    yield open
    for engine in engines:
        engine.close()


def all_there(engine):
    """Wait until everything has been read ahead."""
    residency = engine.residency
    while residency._ready < EXPERTS:
        time.sleep(0.01)
    return engine


@pytest.mark.parametrize("load", ["read", "map"])
@pytest.mark.parametrize("capacity", [1, 3, 32] if DISABLED else [1, 2, 3, 9, 31, 32])
def test_any_budget_gives_the_same_bits(opened, expected, capacity, load):
    """Prompt and tokens with any number of experts in memory, copied or mapped, guessing or not: ==; never more of them than allowed."""
    for guess in (True,) if DISABLED else (True, False):
        engine = opened(capacity, load=load, guess=guess)
        for _ in range(1 if DISABLED else 3):
            assert same(run(engine), expected)
        assert engine.residency._held <= capacity
        stats = engine.residency.stats
        assert guess or stats.guesses_right == stats.guesses_wrong == 0
        assert capacity >= EXPERTS - 1 or stats.misses > 0  # the one that is left out may never be wanted


def test_without_direct_reads(opened, expected, monkeypatch):
    """A system without O_DIRECT reads through the page cache: the same bits."""
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert same(run(opened(3)), expected)


@pytest.mark.compiled
def test_a_kernel_without_populate(opened, expected, monkeypatch):
    """Where madvise knows no MADV_POPULATE_READ, a map's pages come through the page cache: the same bits."""
    monkeypatch.setattr(paging, "_madvise", lambda *_: errno.EINVAL)
    assert same(run(opened(3, load="map")), expected)


@pytest.mark.parametrize("load", ["read", "map"])
def test_half_an_expert_is_computed_while_the_rest_is_read(opened, expected, monkeypatch, load):
    """In decode w_gate and w_up are computed before w_down is there: the same bits."""
    monkeypatch.setattr(module, "PIECE", paging.PAGE)
    memory, halves, computed = paging.Copy if load == "read" else paging.Mapped, [], threading.Event()
    fetch, select = memory.fetch, StreamingForward._select
    engine = opened(2, load=load)

    def slow_fetch(self, file, start, offset, nbytes):
        unit = next((unit for unit in engine.residency._experts.values() if unit.memory is self), None)
        if engine.position >= PROMPT and unit and unit.pinned and offset >= unit.head:
            computed.wait(20.0)
        fetch(self, file, start, offset, nbytes)

    def noting(self, numbers, arrival):
        if arrival.up and not arrival.down:
            halves.append(arrival)
            computed.set()
        return select(self, numbers, arrival)

    monkeypatch.setattr(memory, "fetch", slow_fetch)
    monkeypatch.setattr(StreamingForward, "_select", noting)
    assert same(run(engine), expected)
    assert halves and not any(arrival.last for arrival in halves)


@pytest.mark.compiled
def test_an_expert_is_read_at_most_once_a_chunk(opened, monkeypatch):
    """A chunk that wants every expert reads none of them twice, however few fit."""
    for capacity in (2, 5, 12):
        engine, read = opened(capacity, chunk=64), []
        monkeypatch.setattr(paging.Copy, "fetch", note_fetches(paging.Copy.fetch, read))
        engine.prefill(IDS[:PROMPT])
        engine.close()
        monkeypatch.undo()
        assert len(read) == len(set(read)) >= EXPERTS - capacity - 8


def note_fetches(fetch, read):
    def noting(self, file, start, offset, nbytes):
        read.append((file.path.name, start, offset))
        fetch(self, file, start, offset, nbytes)

    return noting


def test_statistics(opened):
    """Each choice of the router is a hit or a miss; what was read is a whole number of experts beside what all tokens need."""
    engine = opened(4)
    run(engine)
    before = engine.residency.stats.copy()
    engine.step(7)
    time.sleep(0.1)
    new = engine.residency.stats.since(before)
    assert new.hits + new.misses == engine.config.n_layers * engine.config.n_active
    from_layers = sum(min(layer, LAYERS_AHEAD) for layer in range(engine.config.n_layers))
    assert new.guesses_right + new.guesses_wrong <= engine.config.n_active * from_layers
    assert new.to_dict()["capacity"] == 4 and new.experts == EXPERTS


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["read", "map"])
@pytest.mark.parametrize("harm", ["truncated", "overwritten"])
def test_a_shard_changed_in_place(opened, store, load, harm):
    """A file that shrinks or is written to while in use is a StoreError that names it, not a signal and not a wrong token."""
    engine, path = opened(2, store, load=load), store / "layer-00002.safetensors"
    run(engine)
    position = engine.position
    if harm == "truncated":
        os.truncate(path, 8192)
    else:
        data = bytearray(path.read_bytes())
        data[-1000] ^= 255
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    for _ in range(2):
        with pytest.raises(StoreError, match="layer-00002.*changed while in use"):
            engine.step(5)
        assert engine.position == position


@pytest.mark.compiled
def test_a_mapped_shard_changed_when_all_is_in_memory(opened, store):
    """A map is the file: it is looked at before each token even when nothing needs to be read."""
    engine = all_there(opened(EXPERTS, store, load="map"))
    run(engine)
    os.truncate(store / "layer-00001.safetensors", 4096)
    with pytest.raises(StoreError, match="changed while in use"):
        engine.step(5)


@pytest.mark.compiled
def test_copies_do_not_care(opened, store, expected):
    """With load="read" and everything in memory the files may be truncated: the same bits."""
    engine = all_there(opened(EXPERTS, store))
    for file in store.glob("layer-*"):
        os.truncate(file, 4096)
    assert same(run(engine), expected)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be replaced")
@pytest.mark.parametrize("load", ["read", "map"])
def test_a_shard_replaced_by_another(opened, store, expected, load):
    """A file renamed over a shard is another file: the old one, still open, goes on being read."""
    engine = opened(2, store, load=load)
    other = store / "other"
    other.write_bytes(bytes(200_000))
    os.replace(other, store / "layer-00001.safetensors")
    assert same(run(engine), expected)


def test_a_read_error_and_after_it(opened, expected, monkeypatch):
    """An error of the disk is a StoreError that says where; when the disk answers again, so does the model, with the same bits."""
    engine = opened(2)
    read = paging.PlannedFile._read

    def fail(self, memory, start):
        if self.path.name == "layer-00003.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, memory, start)

    with monkeypatch.context() as patch:
        patch.setattr(paging.PlannedFile, "_read", fail)
        with pytest.raises(StoreError, match="layer-00003.*at byte.*check the disk"):
            run(engine)
    assert same(run(engine), expected)


@pytest.mark.compiled
def test_experts_in_many_pieces(opened, expected, monkeypatch):
    """Experts of many pieces, some of which fail: an error, again and at once, and never a wait without end; then the same bits."""
    monkeypatch.setattr(module, "PIECE", 8192)
    engine, fetch = opened(2), paging.Copy.fetch

    def fail(self, file, start, offset, nbytes):
        time.sleep(0.002)
        if offset == 16384:
            raise StoreError("this piece cannot be read")
        fetch(self, file, start, offset, nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(paging.Copy, "fetch", fail)
        for _ in range(5):
            with pytest.raises(StoreError, match="this piece"):
                run(engine)
    assert same(run(engine), expected)


@pytest.mark.compiled
def test_a_map_that_cannot_be_read(opened, expected, monkeypatch):
    """An error while a map's pages are brought in is a StoreError, and no signal later."""
    engine = opened(2, load="map")
    madvise = paging._madvise
    with monkeypatch.context() as patch:
        patch.setattr(
            paging, "_madvise", lambda at, n, advice: errno.EFAULT if advice == paging.MADV_POPULATE_READ else madvise(at, n, advice)
        )
        with pytest.raises(StoreError, match="cannot read .*check the disk"):
            run(engine)
    assert same(run(engine), expected)


@pytest.mark.compiled
def test_a_slow_disk(opened, expected, monkeypatch):
    """A slow disk makes a slower run: somebody is told while it waits, the wait is counted, the bits are the same."""
    engine, told = opened(2), []
    engine.residency.on_wait = lambda stats: told.append(stats.bytes_read)
    fetch = paging.Copy.fetch
    monkeypatch.setattr(paging.Copy, "fetch", lambda *a: (time.sleep(0.01), fetch(*a))[1])
    assert same(run(engine), expected)
    assert told and engine.residency.stats.waited_s > 0.05


@pytest.mark.compiled
def test_memory_that_becomes_less_and_more(opened, expected):
    """When other programs take memory, experts go between two layers, down to one; when they give it back, more come; ==."""
    engine = opened(EXPERTS)
    residency = all_there(engine).residency
    for now, held in ((5, 5), (-100, 1), (3, 3), (EXPERTS, EXPERTS)):
        residency.affordable = lambda now=now: now
        residency._watched = -1e9
        assert same(run(engine), expected)
        assert residency._held <= held and len(residency._free) + residency._held <= held
    all_there(engine)


@pytest.mark.compiled
def test_idle_readers_watch(opened):
    """Experts go also while nobody asks for a token."""
    residency = all_there(opened(EXPERTS)).residency
    residency.affordable = lambda: 4
    deadline = time.monotonic() + 20
    while residency._held > 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert residency._held == 4


@pytest.mark.compiled
def test_no_more_memory_from_the_system(opened, expected, monkeypatch):
    """A system that gives no memory for another expert: the run goes on with those there are."""
    engine = opened(2)
    run(engine)

    def refuse(self, nbytes):
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(paging.Copy, "__init__", refuse)
    engine.residency.resize(9)
    assert same(run(engine), expected)


# ---- interrupts and ends --------------------------------------------------------------------------


@pytest.mark.compiled
def test_an_interrupt_while_reading(opened, expected, monkeypatch):
    """Ctrl-C in the middle of a wait leaves a model that works, with the same bits."""
    engine = opened(2)
    run(engine)

    def interrupt(stats):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        fetch = paging.Copy.fetch
        patch.setattr(paging.Copy, "fetch", lambda *a: (time.sleep(0.3), fetch(*a))[1])
        engine.residency.on_wait = interrupt
        with pytest.raises(KeyboardInterrupt):
            run(engine)
    engine.residency.on_wait = None
    assert same(run(engine), expected)


def test_close_ends_the_readers():
    """close() while idle, or while experts are still read ahead, ends every thread and may come twice."""
    before = threading.active_count()
    for wait in (0.0, 0.2):
        engine = Engine(BUNDLED, threads=1, context=64, ram="2G")
        time.sleep(wait)
        assert threading.active_count() > before
        engine.close()
        engine.close()
        assert threading.active_count() == before
        with pytest.raises(EngineError, match="closed"):
            engine.step(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.compiled
def test_fork():
    """A child of a process with a model under a budget is told so, can close it, and ends; the parent goes on."""
    code = (
        "import os, warnings; warnings.simplefilter('ignore')\n"
        "from npmix.engine import Engine; from npmix.errors import EngineError; from npmix.generate import BUNDLED\n"
        "engine = Engine(BUNDLED, threads=1, context=64, ram='2G')\n"
        "engine.residency._changed.acquire()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: engine.step(1)\n"
        "    except EngineError as e: engine.close(); os._exit(7)\n"
        "    os._exit(1)\n"
        "engine.residency._changed.release()\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "engine.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# ---- the budget itself ----------------------------------------------------------------------------------


def test_a_budget_too_small_names_the_least_that_would_do():
    """A budget too small is refused in one line, and what it names as the least does."""
    with pytest.raises(InputError, match="too small, the least that would do is [0-9]+M: ") as e:
        Engine(BUNDLED, threads=1, context=64, ram="32M")
    assert "\n" not in str(e.value)
    least = str(e.value).split("least that would do is ")[1].split(":")[0]
    with Engine(BUNDLED, threads=1, context=64, ram=least) as engine:
        assert engine.residency.stats.capacity >= engine.config.n_active + 1


@pytest.mark.compiled
def test_a_longer_chunk_where_experts_must_be_read_again(monkeypatch):
    """When not all experts fit, the default chunk grows as far as the scratch is a small part of the budget; a given one stays."""
    monkeypatch.setattr(Residency, "expert_bytes", property(lambda self: 100 << 20))
    monkeypatch.setattr(budget, "allowance", lambda ram: budget.own() + (3 << 29))  # whatever other tests left in this process
    with Engine(BUNDLED, threads=1, context=1024, ram="2G") as engine:
        assert engine.chunk == 1024 and engine.residency.stats.capacity < EXPERTS
    with Engine(BUNDLED, threads=1, context=1024, chunk=512, ram="2G") as engine:
        assert engine.chunk == 512
    monkeypatch.setattr(budgeted, "SCRATCH_SHARE", 1000)
    with Engine(BUNDLED, threads=1, context=1024, ram="2G") as engine:
        assert engine.chunk == 512


def test_options(tmp_path):
    """A budget needs a packed store; load is map or read; without a budget "map" is the plain engine and "read" copies."""
    with pytest.raises(InputError, match="no packed store"):
        Engine(tiny_hf(tmp_path / "hf"), ram="2G")
    with pytest.raises(InputError, match="load is 'both'"):
        Engine(BUNDLED, load="both")
    with Engine(BUNDLED, load="map") as engine:
        assert engine.residency is None
    with Engine(BUNDLED, load="read") as engine:
        assert engine.residency.load == "read"
