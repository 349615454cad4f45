"""Laws of a running generation: what it shows, and whom the model belongs to meanwhile."""

import gc
import itertools
import random
import threading
import time

import make
import pytest

import npmix
from npmix.errors import EngineError
from npmix.stream import StopStrings

SMALL = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 256}
OPTIONS = {"temperature": 1.0, "seed": 1, "ignore_eos": True, "max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make.tiny_hf(tmp_path_factory.mktemp("stream") / "model", tokenizer=True, **SMALL)


@pytest.fixture(scope="module")
def model(folder):
    with npmix.load(folder) as model:
        yield model


def cut_by_definition(text: str, stops) -> tuple[str, bool]:
    """Read character by character; the first stop string that is complete ends the text before itself."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


def test_stop_strings_by_definition():
    """However the text is cut into pieces: the same result, and never a character of a stop string shown before."""
    rng = random.Random(4)
    for _ in range(4000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(30)))
        stops = tuple({"".join(rng.choice("ab") for _ in range(rng.randrange(1, 7))) for _ in range(rng.randrange(4))})
        want, found = cut_by_definition(text, stops)
        cutter, shown, rest = StopStrings(stops), "", text
        while rest and not cutter.found:
            size = rng.randrange(1, 5)
            shown += cutter.push(rest[:size])
            rest = rest[size:]
            assert want.startswith(shown)
        if not cutter.found:
            shown += cutter.finish("")
        assert (shown, cutter.found) == (want, found), (text, stops)


def test_held_text_is_short():
    """What is held back is shorter than the longest stop string, so a long text costs no more per piece."""
    cutter = StopStrings(("aaaaab",))
    for _ in range(1000):
        cutter.push("a")
        assert len(cutter.held) <= 5


def test_leaving_the_loop_frees_the_model(model):
    """After break the model is free at once, also while a name still refers to the stream."""
    stream = model.stream("a", **OPTIONS)
    for _ in stream:
        break
    assert stream.stats.stop_reason == "cancelled"
    assert list(stream) == []
    assert model.generate("b", **OPTIONS) is not None


def test_exception_in_the_loop_frees_the_model(model):
    """An exception that leaves the loop frees the model even while its traceback is kept."""
    with pytest.raises(ZeroDivisionError) as kept:
        for _ in model.stream("a", **OPTIONS):
            1 / 0
    assert kept.value.__traceback__ is not None
    assert model.generate("b", **OPTIONS) is not None


def test_close_frees_the_model(model):
    """close() ends a stream taken by `next`; a closed stream is at its end; so does `with`."""
    stream = model.stream("a", **OPTIONS)
    next(stream)
    stream.close()
    stream.close()
    assert next(stream, None) is None
    with model.stream("a", **OPTIONS) as stream:
        next(stream)
    assert model.generate("b", **OPTIONS) is not None


def test_garbage_collection_frees_the_model(model):
    """Dropping the last reference is enough; so is the collection of a cycle."""
    stream = model.stream("a", **OPTIONS)
    next(stream)
    del stream
    assert model.generate("b", **OPTIONS) is not None
    cycle = [model.stream("a", **OPTIONS)]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    gc.collect()
    assert model.generate("b", **OPTIONS) is not None


def test_the_end_frees_the_model(model):
    """The model is free with the last piece, before the loop asks for another."""
    stream = model.stream("a", temperature=0, max_tokens=1, ignore_eos=True)
    for _ in stream:
        assert model.generate("b", **OPTIONS) is not None
    assert stream.stats.stop_reason == "length"


def test_taken_at_the_first_next(model):
    """Streams that have not begun hold nothing."""
    streams = [model.stream("a", **OPTIONS) for _ in range(3)]
    assert len({"".join(stream) for stream in streams}) == 1


def test_second_stream_in_the_same_thread(model):
    """While a stream is open, anything else in its thread raises EngineError at once; the stream goes on unharmed."""
    whole = list(model.stream("a", **OPTIONS))
    early = model.stream("a", **OPTIONS)
    stream = model.stream("a", **OPTIONS)
    pieces = [next(stream)]
    start = time.monotonic()
    uses = [lambda: model.stream("b"), lambda: model.generate("b"), lambda: model.logits([1])]
    for use in (*uses, lambda: next(early), lambda: list(early)):
        with pytest.raises(EngineError, match="another stream.*this thread"):
            use()
    assert time.monotonic() - start < 5
    assert pieces + list(stream) == whole
    assert "".join(early) == "".join(whole)  # it could not begin then, and can now


def test_threads_queue(model):
    """Calls of several threads at once take turns; each gets the text it gets alone."""
    prompts = ["a", "def", "return x", "for name in", "class", "1 + 1"]
    alone = {p: model.generate(p, **OPTIONS) for p in prompts}
    got, errors = {}, []

    def work(prompt):
        try:
            for _ in range(3):
                got[prompt] = model.generate(prompt, **OPTIONS)
                model.logits([1, 2, 3])
                for _ in itertools.islice(model.stream(prompt, **OPTIONS), 2):
                    pass
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and got == alone


def test_another_thread_waits(model):
    """A thread that comes while a stream is open waits until the stream ends, then gets its text."""
    stream, done = model.stream("a", **OPTIONS), []
    next(stream)
    thread = threading.Thread(target=lambda: done.append(model.generate("b", **OPTIONS)))
    thread.start()
    time.sleep(0.3)
    assert not done
    stream.close()
    thread.join(60)
    assert done == [model.generate("b", **OPTIONS)]


def test_stream_handed_to_another_thread(model):
    """A stream begun in one thread may be finished in another; the first is then free to queue."""
    whole = list(model.stream("a", **OPTIONS))
    stream = model.stream("a", **OPTIONS)
    pieces = [next(stream)]
    thread = threading.Thread(target=lambda: pieces.extend(stream))
    thread.start()
    thread.join(60)
    assert pieces == whole
    assert model.generate("b", **OPTIONS) is not None


def test_close_while_a_stream_is_open(folder):
    """Closing the model does not wait for open streams; they raise at their next piece, and so do threads that queue."""
    model = npmix.load(folder)
    stream, errors = model.stream("a", **OPTIONS), []
    next(stream)

    def wait():
        try:
            model.generate("b", **OPTIONS)
        except EngineError as e:
            errors.append(str(e))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    model.close()
    thread.join(30)
    assert len(errors) == 1 and "closed" in errors[0]
    with pytest.raises(EngineError, match="closed"):
        next(stream)
    assert stream.stats.stop_reason == "cancelled"


def test_interrupt_inside_a_step(model, monkeypatch):
    """An interrupt in the middle of a step leaves the model free and the next text right."""
    whole = model.generate("a", **OPTIONS)
    stream = model.stream("a", **OPTIONS)
    next(stream)

    def interrupted(id):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert stream.stats.stop_reason == "cancelled"
    assert model.generate("a", **OPTIONS) == whole


def test_error_in_the_progress_callback(model):
    """An exception out of the progress callback ends the stream; calling the model from there is an error, not a hang."""

    def close(done, total):
        model.close()

    for callback, error in ((close, EngineError), (lambda done, total: 1 / 0, ZeroDivisionError)):
        with pytest.raises(error):
            model.generate("a b c", on_progress=callback)
    assert model.generate("b", **OPTIONS) is not None


def test_text_held_back_at_an_early_end(model):
    """Text that might begin a stop string can still be read after close()."""
    text = model.generate("a", **OPTIONS)
    stream = model.stream("a", stop=text + "!", **OPTIONS)
    thread_free = threading.Event()
    assert "".join(stream) == text  # all of it was held back and comes at the end
    stream = model.stream("a", stop=text + "!", **{**OPTIONS, "on_progress": lambda *_: thread_free.set()})
    stream.close()
    assert stream.held == "" and not thread_free.is_set()


def test_closed_by_many_threads_at_once(model):
    """However many threads end a stream together, the model is given back once."""
    for _ in range(50):
        mark, started = [], threading.Barrier(4)
        model.turns.take(mark)

        def give(mark=mark, started=started):
            started.wait()
            model.turns.give(mark)

        threads = [threading.Thread(target=give) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not mark and model.turns.holder is None
    assert model.generate("b", **OPTIONS) is not None


def test_closed_while_it_waits(model):
    """A stream closed by another thread before its turn comes ends empty and keeps nothing."""
    first, second, pieces = model.stream("a", **OPTIONS), model.stream("b", **OPTIONS), []
    next(first)
    thread = threading.Thread(target=lambda: pieces.extend(second))
    thread.start()
    time.sleep(0.1)
    second.close()
    first.close()
    thread.join(30)
    assert not pieces and second.stats.stop_reason == "cancelled"
    assert model.generate("b", **OPTIONS) is not None


def test_interrupt_as_the_turn_is_taken(model, monkeypatch):
    """An interrupt between the wait and the first step leaves the model free."""
    checks = []

    def check():
        checks.append(1)
        if len(checks) == 2:  # the one behind the wait
            raise KeyboardInterrupt

    stream = model.stream("a", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(model.turns, "check", check)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert model.turns.holder is None
    assert model.generate("b", **OPTIONS) is not None
