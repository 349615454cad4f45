"""Laws of a session: the same ids and text as without its cache, and nothing computed twice."""

import make
import pytest

import npmix
from npmix.chat import encode_user
from npmix.errors import ContextError, EngineError, InputError

SMALL = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 512}
OPTIONS = {"temperature": 1.0, "seed": 1, "max_tokens": 6}


@pytest.fixture(scope="module", params=["full", "window"])
def model(request, tmp_path_factory):
    """A Mixtral, and a Mistral whose window of 16 is shorter than the conversations."""
    path = tmp_path_factory.mktemp("session") / request.param
    with npmix.load(make.tiny_hf(path, tokenizer=True, mistral=request.param == "window", **SMALL), chunk=8) as model:
        yield model


def say(session, text, **options):
    stream = session.send(text, **{**OPTIONS, **options})
    return "".join(stream), stream.stats


def test_chat_ids(model):
    """Turns are bos, question, answer as the model made it, eos if it made none, question, ...; answers stand by themselves."""
    tokenizer = model.tokenizer
    session = model.session(chat=True, system="S")
    first, a = say(session, "one", ignore_eos=True)
    expected = [1, *encode_user(tokenizer, "one", "S"), *a.ids]
    assert session.ids == expected and first == tokenizer.decode(a.ids)
    _, b = say(session, "two")
    expected += ([] if a.ids[-1] == 2 else [2]) + [*encode_user(tokenizer, "two"), *b.ids]
    assert session.ids == expected


def test_nothing_is_computed_twice(model):
    """A turn computes its own ids and the answer's last one; text and ids equal those of an empty cache."""
    session = model.session(chat=True)
    say(session, "hello")
    before = len(session.ids)
    text, stats = say(session, "and now?")
    prompt = session.ids[: -len(stats.ids)]
    assert stats.cached_tokens == before - 1
    stream = model.stream(prompt, **OPTIONS)
    "".join(stream)
    assert (stream.stats.ids, stream.stats.cached_tokens) == (stats.ids, 0)
    assert text == model.tokenizer.decode(stats.ids)


def test_other_use_between_turns(model):
    """Whatever else the model does between turns costs time and changes nothing."""
    texts = []
    for disturb in (False, True):
        session = model.session(chat=True)
        for question in ("one", "two", "three"):
            texts.append(say(session, question)[0])
            if disturb:
                model.generate("something else", **OPTIONS)
                model.logits([1, 2, 3])
                say(model.session(chat=True), "another")
    assert texts[:3] == texts[3:]


def test_plain_session_continues_the_text(model):
    """Without chat, what is said continues the text as it stands: the pieces joined are the text of all ids."""
    session, text = model.session(chat=False), ""
    for part in ("def f(n):", "\n    if n", " < 2", "x"):
        text += part
        text += say(session, part, ignore_eos=True)[0]
        assert model.tokenizer.decode(session.ids) == text
    assert session.ids[0] == model.tokenizer.bos_id


def test_plain_session_goes_on_without_new_text(model):
    """An empty text lets the model go on where it was cut: two short turns give the text of one long one."""
    options = {"temperature": 0, "ignore_eos": True}
    session = model.session(chat=False)
    text = say(session, "def f(n):", **options)[0] + say(session, "", **options)[0]
    assert text == model.generate("def f(n):", max_tokens=2 * OPTIONS["max_tokens"], **options)


def test_plain_session_goes_on_after_the_end_token(model):
    """An end token is dropped when the text goes on; it does not stay inside the text."""
    session = model.session(chat=False)
    _, stats = say(session, "x", ignore_eos=True)
    stats.ids.append(model.tokenizer.eos_id)
    before = session.ids[:-1]
    say(session, "y")
    assert session.ids[: len(before) + 1] == [*before, *model.tokenizer.encode_continuation("y")[:1]]


def test_cancelled_turn(model):
    """A turn left early keeps what was made; a turn that never began leaves no trace."""
    session = model.session(chat=True)
    say(session, "one")
    before = session.ids
    session.send("unheard", **OPTIONS)
    assert session.ids == before
    for _ in session.send("two", **{**OPTIONS, "ignore_eos": True}):
        break
    made = session.ids
    assert len(made) > len(before)
    _, stats = say(session, "three")
    tail = made if made[-1] == 2 else [*made, 2]
    assert session.ids == tail + encode_user(model.tokenizer, "three") + stats.ids


def test_open_answer(model):
    """The next question while an answer is still open is an error."""
    session = model.session(chat=True)
    stream = session.send("one", **{**OPTIONS, "ignore_eos": True})
    next(stream)
    with pytest.raises(EngineError, match="still open"):
        session.send("two")
    stream.close()
    say(session, "two")


def test_interrupted_prefill(model):
    """An interrupt while a question is fed leaves the conversation as it was; the next turn is right."""

    def interrupt(done, total):
        raise KeyboardInterrupt

    texts = []
    for disturb in (False, True):
        session = model.session(chat=True)
        say(session, "one")
        before = session.ids
        if disturb:
            with pytest.raises(KeyboardInterrupt):
                say(session, "a question that is long enough for several chunks", on_progress=interrupt)
            assert session.ids == before
        texts.append(say(session, "two")[0])
    assert texts[0] == texts[1]


def test_outgrown_context(model, tmp_path):
    """A turn that does not fit is an error that changes nothing; reset begins anew."""
    with npmix.load(model.engine.source.path, context=48) as small:
        session = small.session(chat=True)
        say(session, "hi")
        before = session.ids
        with pytest.raises(ContextError, match="48"):
            session.send("word " * 60)
        assert session.ids == before
        session.reset()
        assert session.ids == []
        say(session, "hi")
        assert session.ids == before


def test_bad_arguments(model):
    """Text must be text; a system text needs chat; the first text of a plain session must not be empty."""
    with pytest.raises(InputError):
        model.session(chat=False, system="x")
    with pytest.raises(InputError):
        model.session(chat=True, system=None)
    with pytest.raises(InputError):
        model.session(chat=False).send("")
    with pytest.raises(InputError):
        model.session(chat=True).send(None)
