"""The engine's behaviour: options, limits, order of calls, several engines, forks, broken weights."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from make import TINY as MODEL_CONFIG
from make import tiny_arrays, tiny_hf

from npmix.engine import DEFAULT_CHUNK, DEFAULT_CONTEXT, Engine
from npmix.errors import CheckpointError, ContextError, EngineError, InputError
from npmix.model import forward
from npmix.threads import default_threads

MODEL = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 100}
IDS = [3, 14, 15, 92, 65, 35]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("engine") / "model", **MODEL)


@pytest.fixture
def engine(folder):
    with Engine(folder, threads=1, context=16, chunk=4, kv="f32") as engine:
        yield engine


def test_defaults(folder):
    """Threads: the cores of this process; context: the model's maximum up to 4,096; chunk: 512 up to the context; f16 cache."""
    with Engine(folder) as engine:
        assert (engine.threads, engine.context, engine.chunk, engine.kv) == (default_threads(), 64, 64, "f16")
    assert (DEFAULT_CONTEXT, DEFAULT_CHUNK) == (4096, 512)


def test_default_context_of_a_long_model(tmp_path):
    """A model of 32,768 positions gets a cache of 4,096, and one of 32,768 when asked."""
    path = tiny_hf(tmp_path / "m", **{**MODEL, "max_position_embeddings": 32768})
    with Engine(path) as engine:
        assert (engine.context, engine.chunk) == (4096, 512)
    with Engine(path, context=32768) as engine:
        assert engine.context == 32768


@pytest.mark.parametrize("name, values", [
    ("threads", (0, -1, 1025, 2.0, "2", True)),
    ("context", (0, -1, 65, 1.5, "16", True)),
    ("chunk", (0, -1, 70000, 2.5, "4", True)),
    ("kv", ("q4", "F16", "", None, 16, ["f16"])),
])  # fmt: skip
def test_options_out_of_range(folder, name, values):
    """An option that makes no sense is an InputError that names it; nothing is taken for a default or cut to size."""
    for value in values:
        with pytest.raises(InputError, match=name) as e:
            Engine(folder, **{name: value})
        assert "\n" not in str(e.value)


def test_no_model(tmp_path):
    """A path with no model is a CheckpointError."""
    with pytest.raises(CheckpointError):
        Engine(tmp_path)


@pytest.mark.parametrize("ids", [
    [], (), None, 5, "abc", [1.0], ["1"], [[1, 2]], [None], [1, [2]], [True], [10**30], np.zeros(3), np.zeros((2, 2), int), {1: 2},
])  # fmt: skip
def test_ids_of_the_wrong_kind(engine, ids):
    """Whatever is not one sequence of at least one whole number is an InputError and leaves the sequence as it was."""
    engine.prefill(IDS[:2])
    for call in (engine.prefill, engine.logits):
        with pytest.raises(InputError):
            call(ids)
    assert engine.position == 2


@pytest.mark.parametrize("bad", [-1, 100, 2**31, 2**32 + 1, 2**63, 2**64 - 1, -(2**63)])
def test_ids_outside_the_vocabulary(engine, bad):
    """An id below 0 or from vocab_size on is an InputError, in every call, however large; the sequence is as it was."""
    engine.prefill(IDS[:2])
    for call in (engine.step, lambda i: engine.prefill([1, i]), lambda i: engine.logits([i, 1])):
        with pytest.raises(InputError, match="vocabulary|whole numbers"):
            call(bad)
    assert engine.position == 2


@pytest.mark.parametrize("bad", [1.0, "1", None, [1], True])
def test_a_step_takes_one_id(engine, bad):
    """A step takes one whole number."""
    with pytest.raises(InputError):
        engine.step(bad)


def test_ids_of_any_integer_type(engine):
    """Lists, tuples and arrays of any integer type are the same ids; the caller's array is left alone."""
    expected = engine.logits(IDS)
    for ids in (tuple(IDS), np.array(IDS, np.uint8), np.array(IDS, np.int64), np.array(IDS + IDS, np.int16)[:6], range(3, 9)):
        before = list(ids)
        assert (engine.logits(ids) == (expected if list(ids) == IDS else engine.logits(before))).all()
        assert list(ids) == before


def test_results_belong_to_the_caller(engine):
    """Every call returns fresh float32 arrays of vocab_size: a later call changes none of them."""
    a = engine.prefill(IDS)
    kept = a.copy()
    b = engine.step(1)
    c = engine.logits(IDS)
    a[:] = 0
    assert a.shape == b.shape == (100,) and c.shape == (6, 100) and {x.dtype for x in (a, b, c)} == {np.dtype(np.float32)}
    assert (c[-1] == kept).all()
    assert (engine.logits(IDS) == c).all()


def test_the_context_is_never_overrun(engine):
    """One token too many is a ContextError before anything is computed; the sequence goes on to exactly the last position."""
    expected = engine.logits(range(16))
    with pytest.raises(ContextError, match="16"):
        engine.logits(range(17))
    with pytest.raises(ContextError):
        engine.prefill(range(17))
    assert engine.position == 0
    engine.prefill(range(10))
    with pytest.raises(ContextError, match="context"):
        engine.prefill(range(7))
    assert engine.position == 10
    assert (engine.prefill(range(10, 15)) == expected[14]).all()
    assert (engine.step(15) == expected[15]).all()
    for call in (lambda: engine.step(1), lambda: engine.prefill([1])):
        with pytest.raises(ContextError):
            call()
    assert engine.position == 16


def test_refused_logits_leave_the_sequence(engine):
    """A call of `logits` that is refused (too long) does not empty the cache."""
    engine.prefill(IDS)
    with pytest.raises(ContextError):
        engine.logits(range(17))
    assert engine.position == 6
    expected = engine.step(7)
    assert (engine.logits([*IDS, 7])[-1] == expected).all()
    assert engine.position == 0


def test_reset(engine):
    """Going back to a position and on again gives the bits of the sequence itself; forward is not back."""
    expected = engine.logits(IDS)
    engine.prefill(IDS)
    for bad in (-1, 7, 1.0, None, True):
        with pytest.raises(InputError):
            engine.reset(bad)
    assert engine.position == 6
    engine.reset(6)
    engine.reset(2)
    assert (engine.prefill(IDS[2:4]) == expected[3]).all()
    engine.reset()
    assert engine.position == 0
    assert (engine.step(IDS[0]) == expected[0]).all()


@pytest.mark.compiled
def test_reset_of_a_ring(tmp_path):
    """A ring that has moved on can be emptied or left alone, but not cut: a shorter prefix is an InputError."""
    path = tiny_hf(tmp_path / "m", **{**MODEL, "sliding_window": 8, "max_position_embeddings": 1024})
    with Engine(path, threads=1, chunk=16, kv="f32") as engine:
        ids = np.arange(400) % 100
        expected = engine.logits(ids)
        engine.prefill(ids[:200])
        engine.reset(100)  # nothing has been overwritten
        engine.prefill(ids[100:399])
        with pytest.raises(InputError, match="window"):
            engine.reset(300)
        engine.reset(399)
        assert (engine.step(ids[399]) == expected[399]).all()
        engine.reset()
        assert (engine.prefill(ids[:50]) == expected[49]).all()


@pytest.mark.compiled
def test_reset_of_a_ring_after_an_interruption(tmp_path):
    """A prefill that was interrupted may have overwritten the ring: the tokens it kept go on, a shorter prefix is refused."""
    path = tiny_hf(tmp_path / "m", **{**MODEL, "sliding_window": 8, "max_position_embeddings": 1024})
    with Engine(path, threads=1, chunk=200, kv="f32") as engine:
        ids = np.arange(500) % 100
        expected = engine.logits(ids)
        engine.prefill(ids[:150])

        def interrupt(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.prefill(ids[150:350], interrupt)
        assert engine.position == 150 and engine._forward.cache.capacity == 256
        with pytest.raises(InputError, match="window"):
            engine.reset(60)
        assert (engine.prefill(ids[150:350]) == expected[349]).all()


def test_progress(engine, monkeypatch):
    """on_progress counts tokens times layers up to the total, at least AT_ONCE of them or a layer later each time, with the same logits, and an
    exception from it leaves whole chunks behind."""
    expected = engine.prefill(IDS)
    reports = {
        forward.AT_ONCE: [(12, 18), (18, 18)],
        8: [(8, 18), (12, 18), (18, 18)],
        1: [(4, 18), (8, 18), (12, 18), (14, 18), (16, 18), (18, 18)],
    }
    for at_once, report in reports.items():
        monkeypatch.setattr(forward, "AT_ONCE", at_once)
        engine.reset()
        seen = []
        assert (engine.prefill(IDS, lambda done, total, seen=seen: seen.append((done, total))) == expected).all()
        assert seen == report
    engine.reset()

    def interrupt(done, total):
        if done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.prefill(IDS, interrupt)
    assert engine.position == 4
    assert (engine.prefill(IDS[4:]) == expected).all()


def test_closed(folder):
    """After close every use is an EngineError; closing twice is fine; `with` closes."""
    with Engine(folder, threads=1) as engine:
        engine.prefill(IDS)
    engine.close()
    for call in (
        lambda: engine.prefill(IDS), lambda: engine.step(1), lambda: engine.logits(IDS), engine.reset, engine.memory,
        engine.bytes_per_token, lambda: engine.saturated,
    ):  # fmt: skip
        with pytest.raises(EngineError, match="closed"):
            call()


def test_failed_opening_closes_the_files(folder):
    """An option that is refused leaves no map of the weights behind."""
    for _ in range(3):
        with pytest.raises(InputError):
            Engine(folder, threads=1, kv="no")
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert str(folder) not in maps.read()


def test_several_engines(folder, tmp_path):
    """Engines of different models and settings in one process, used in turns, do not know of each other."""
    other = tiny_hf(tmp_path / "other", seed=5, **{**MODEL, "num_local_experts": 3})
    settings = ((folder, 1, 64), (other, 2, 64), (folder, 2, 2))
    a, b, c = (Engine(path, threads=threads, chunk=chunk, kv="f32") for path, threads, chunk in settings)
    with a, b, c:
        expected_a, expected_b = a.logits(IDS), b.logits(IDS)
        assert (expected_a != expected_b).any()
        for i, token in enumerate(IDS):
            assert (a.step(token) == expected_a[i]).all()
            assert (b.step(token) == expected_b[i]).all()
            assert (c.step(token) == expected_a[i]).all()


@pytest.mark.compiled
def test_engines_in_threads(folder):
    """Four engines of two threads each, each in a Python thread of its own: equal bits, no crash, whatever runs beside them."""
    with Engine(folder, threads=1, kv="f32") as engine:
        expected = engine.logits(range(60))
    wrong = []

    def work():
        with Engine(folder, threads=2, kv="f32", chunk=13) as engine:
            engine._forward.decode_team = engine._forward.team
            for _ in range(3):
                if not (engine.logits(range(60)) == expected).all():
                    wrong.append("prefill")
                if not (np.stack([engine.step(i) for i in range(60)]) == expected).all():
                    wrong.append("decode")
                engine.reset()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def run_script(script, *args):
    """Run a Python text in a process of its own; returns its stdout."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import os, sys
from npmix.engine import Engine
from npmix.errors import EngineError
engine = Engine(sys.argv[1], threads=2, kv="f32")
engine._forward.decode_team = engine._forward.team
before = engine.prefill([3, 14, 15])
pid = os.fork()
if pid == 0:
    for call in (lambda: engine.step(1), lambda: engine.prefill([1]), lambda: engine.logits([1, 2]), engine.reset):
        try:
            call()
        except EngineError as e:
            assert "fork" in str(e)
        else:
            os._exit(2)
    engine.close()
    with Engine(sys.argv[1], threads=2, kv="f32") as own:
        os._exit(0 if (own.prefill([3, 14, 15]) == before).all() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
engine.step(92)
engine.reset()
assert (engine.prefill([3, 14, 15]) == before).all()
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork(folder):
    """In a forked child every use is an EngineError, a new engine works there, and the parent goes on."""
    assert run_script(FORK, folder) == "fine\n"


HOST = """
import sys, threading
import numba, numpy as np
from npmix.engine import Engine

@numba.njit(parallel=True, nogil=True)
def host(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += x[i]
    return total

x = np.ones(100_000)
assert host(x) == x.size
ended, sums = threading.Event(), []
def work():
    while not ended.is_set():
        sums.append(host(x))
thread = threading.Thread(target=work)
thread.start()
with Engine(sys.argv[1], threads=2, kv="f32", chunk=7) as engine:
    engine._forward.decode_team = engine._forward.team
    rows = engine.logits(range(60))
    for _ in range(5):
        assert (np.stack([engine.step(i) for i in range(60)]) == rows).all()
        engine.reset()
        assert (engine.logits(range(60)) == rows).all()
ended.set()
thread.join()
assert set(sums) == {x.size}
print("fine")
"""


@pytest.mark.compiled
def test_beside_a_host_program_that_uses_prange(folder):
    """A program may run its own parallel Numba code while the engine's team works: neither aborts, both are right."""
    assert run_script(HOST, folder) == "fine\n"


def test_memory(folder):
    """The figures are those of the definition: cache 2 x layers x kv heads x positions (whole blocks of 256) x head_dim x bytes;
    in 8 bits head_dim is padded to 4 in keys and to 32 in values, and a scale is 4 bytes."""
    for kv, keys, values in (("f16", 32, 32), ("f32", 64, 64), ("q8", 16 + 4, 32 + 4)):
        with Engine(folder, threads=1, kv=kv) as engine:
            memory = engine.memory()
            assert memory["kv_cache"] == 3 * 2 * 256 * (keys + values)
            assert engine.bytes_per_position() == 3 * 2 * 2 * (16 + 4 if kv == "q8" else keys)
            arrays = tiny_arrays({**MODEL_CONFIG, **MODEL})
            assert memory["weights"] == 2 * sum(a.size for a in arrays.values())
            assert 0 < memory["scratch"] < 8 << 20
            per_token = engine.bytes_per_token()
            experts = 3 * 4 * 3 * 48 * 48 * 2
            norms = 2 * 48 * 7
            assert per_token == memory["weights"] - experts // 2 - norms - 2 * 100 * 48


@pytest.mark.compiled
def test_memory_of_a_ring(tmp_path):
    """A sliding window's cache holds window + chunk - 1 positions in whole blocks, however long the context."""
    path = tiny_hf(tmp_path / "m", **{**MODEL, "sliding_window": 300, "max_position_embeddings": 32768})
    with Engine(path, threads=1, context=32768, chunk=200) as engine:
        assert engine.memory()["kv_cache"] == 2 * 3 * 2 * 512 * 16 * 2  # 300 + 200 - 1 positions: two blocks
    with Engine(path, threads=1, context=100, chunk=200) as engine:
        assert engine.memory()["kv_cache"] == 2 * 3 * 2 * 256 * 16 * 2


def test_one_call_at_a_time(folder):
    """A second call while one is at work is an error at once; closing from within a call is too, and does not close."""
    with Engine(folder, threads=1) as engine:
        told = []

        def meanwhile(done, total):
            for call in (lambda: engine.step(1), lambda: engine.prefill([1, 2]), lambda: engine.logits([1]), engine.close):
                with pytest.raises(EngineError):
                    call()
                told.append(done)

        row = engine.prefill(IDS, meanwhile)
        assert len(told) == 4 and engine.position == len(IDS)
        engine.reset()
        assert (engine.prefill(IDS) == row).all()
