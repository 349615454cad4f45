"""Laws of text generation on real engines over tiny random checkpoints."""

import json
import os
from pathlib import Path

import make
import numpy as np
import pytest

import npmix
from npmix.chat import encode_chat
from npmix.errors import ContextError, EngineError, InputError, NpmixError, TokenizerError
from npmix.generate import BUNDLED

SMALL = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
PROMPT = "def f(n):"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make.tiny_hf(tmp_path_factory.mktemp("generate") / "model", tokenizer=True, **SMALL)


@pytest.fixture(scope="module")
def model(folder):
    with npmix.load(folder, threads=2) as model:
        yield model


def run(model, prompt=PROMPT, **options):
    """(text, stats) of one generation."""
    stream = model.stream(prompt, **options)
    return "".join(stream), stream.stats


def greedy_ids(model, ids: list[int], count: int) -> list[int]:
    """The definition: the largest logit of the tokenizer's ids, again and again, each time from an empty cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(np.argmax(model.logits(ids)[-1][: model.tokenizer.vocab_size])))
    return ids[-count:]


def test_greedy_is_repeated_argmax(model):
    """Greedy ids equal the argmax of the logits of the whole sequence so far, whatever is cached."""
    text, stats = run(model, temperature=0, max_tokens=8, ignore_eos=True)
    assert stats.ids == greedy_ids(model, model.tokenizer.encode(PROMPT), 8)
    assert text == model.generate(PROMPT, temperature=0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("seed", range(12))
def test_text_follows_the_prompt(model, seed):
    """The pieces joined are the text of prompt and answer without that of the prompt; half characters included."""
    tokenizer = model.tokenizer
    text, stats = run(model, temperature=5.0, seed=seed, max_tokens=20, ignore_eos=True)
    ids = tokenizer.encode(PROMPT)
    assert PROMPT + text == tokenizer.decode(ids + stats.ids)
    again, ids_stats = run(model, ids, temperature=5.0, seed=seed, max_tokens=20, ignore_eos=True)
    assert (again, ids_stats.ids) == (text, stats.ids)


def test_seed(folder, model):
    """The same seed gives the same ids on any number of threads and on any run; another seed another text."""
    options = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
    text, stats = run(model, seed=7, **options)
    assert run(model, seed=7, **options)[1].ids == stats.ids
    with npmix.load(folder, threads=1, chunk=3) as single:
        assert run(single, seed=7, **options)[0] == text
    assert run(model, seed=8, **options)[1].ids != stats.ids


def test_random_seed_is_told(model):
    """Without a seed a random one is chosen; repeating it repeats the text. Greedy has none."""
    text, stats = run(model, temperature=1.5, max_tokens=8)
    assert run(model, temperature=1.5, max_tokens=8, seed=stats.seed)[0] == text
    assert run(model, temperature=1.5, max_tokens=1)[1].seed != stats.seed
    assert run(model, temperature=0, max_tokens=1)[1].seed is None


def test_spare_ids_are_never_sampled(model):
    """Ids between the tokenizer's size and the model's vocabulary never come out, however flat the distribution."""
    assert model.tokenizer.vocab_size < model.config.vocab_size
    for seed in range(4):
        _, stats = run(model, temperature=100.0, top_p=1.0, seed=seed, max_tokens=50, ignore_eos=True)
        assert max(stats.ids) < model.tokenizer.vocab_size


def test_repetition_penalty_counts_prompt_and_answer(model):
    """With the largest penalty, greedy ids differ from those without it and follow the definition."""
    prompt = model.tokenizer.encode(PROMPT)
    _, stats = run(model, temperature=0, repetition_penalty=100.0, max_tokens=10, ignore_eos=True)
    ids = list(prompt)
    for _ in range(10):
        scores = model.logits(ids)[-1][: model.tokenizer.vocab_size].astype(np.float64)
        for id in set(ids):
            scores[id] = scores[id] / 100 if scores[id] > 0 else scores[id] * 100
        ids.append(int(np.argmax(scores)))
    assert stats.ids == ids[len(prompt) :]


def test_eos_ends_and_is_not_printed(model, tmp_path):
    """Any of the config's eos ids ends the text and has no text itself; ignore_eos goes on as if there were none."""
    text, stats = run(model, temperature=0, max_tokens=8, ignore_eos=True)
    eos = stats.ids[3]
    folder = make.tiny_hf(tmp_path / "eos", tokenizer=True, eos_token_id=[2, eos], **SMALL)
    with npmix.load(folder) as other:
        short, ended = run(other, temperature=0, max_tokens=8)
        end = stats.ids.index(eos) + 1
        assert (ended.ids, ended.stop_reason) == (stats.ids[:end], "eos")
        ids = other.tokenizer.encode(PROMPT)
        assert PROMPT + short == other.tokenizer.decode(ids + ended.ids[:-1])
        assert run(other, temperature=0, max_tokens=8, ignore_eos=True)[0] == text


def test_max_tokens(model):
    """max_tokens ids, then stop_reason "length"."""
    for count in (1, 5):
        _, stats = run(model, temperature=0, max_tokens=count, ignore_eos=True)
        assert (stats.generated_tokens, stats.stop_reason) == (count, "length")


def test_end_of_the_context(folder):
    """Prompt and answer together fill the context and no more; a prompt that leaves no room is an error at once."""
    with npmix.load(folder, context=16) as model:
        _, stats = run(model, [1] * 10, temperature=0, max_tokens=50, ignore_eos=True)
        assert (stats.generated_tokens, stats.stop_reason) == (6, "context")
        _, stats = run(model, [1] * 15, temperature=0, ignore_eos=True)
        assert (stats.generated_tokens, stats.stop_reason) == (1, "context")
        for length in (16, 100):
            with pytest.raises(ContextError, match=f"{length} tokens.*16 positions.*--context"):
                model.stream([1] * length)


def test_stop_string(model):
    """A stop string ends the text before it, wherever it begins and however many tokens it spans."""
    text, stats = run(model, temperature=3.0, seed=5, max_tokens=24, ignore_eos=True)
    options = {"temperature": 3.0, "seed": 5, "max_tokens": 24, "ignore_eos": True}
    for at in range(0, len(text) - 4, 3):
        stop = text[at : at + 4]
        cut, cut_stats = run(model, stop=stop, **options)
        assert (cut, cut_stats.stop_reason) == (text[: text.index(stop)], "stop")
    assert run(model, stop=["never there", text + "x"], **options)[0] == text


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}, {"repetition_penalty": 0},
        {"seed": -1}, {"seed": 1 << 64}, {"stop": ""}, {"stop": ["a", 3]}, {"stop": ["x"] * 65}, {"stop": "x" * 2000},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(model, options):
    """An option out of range raises InputError when the stream is made, before anything runs."""
    with pytest.raises(InputError):
        model.stream(PROMPT, **options)


@pytest.mark.parametrize("prompt", ["", [], [-1], [384], [1, 10**12], [1.5], ["a"], None, 5, "\udcff", [1, None]])
def test_bad_prompts(model, prompt):
    """An empty prompt, ids out of range and what is neither text nor ids raise InputError at once."""
    with pytest.raises(InputError):
        model.stream(prompt)
    if not isinstance(prompt, str):
        with pytest.raises(InputError):
            model.logits(prompt)


def test_ids_of_numpy(model):
    """A prompt may be an array of ids."""
    ids = model.tokenizer.encode(PROMPT)
    assert run(model, np.array(ids), temperature=0, max_tokens=3)[1].ids == run(model, ids, temperature=0, max_tokens=3)[1].ids


def test_logits(model):
    """float32 (T, V); each row equals what the engine gives after prefill and step, bit for bit."""
    ids = model.tokenizer.encode(PROMPT)
    logits = model.logits(ids)
    assert (logits.shape, logits.dtype) == ((len(ids), model.config.vocab_size), np.float32)
    model.engine.reset()
    assert np.array_equal(model.engine.prefill(ids[:-1]), logits[-2])
    assert np.array_equal(model.engine.step(ids[-1]), logits[-1])


def test_chat(model):
    """chat answers the ids of the instruct format; the answer's text stands by itself (no space in front)."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "return"}]
    stream = model.chat_stream(messages, temperature=4.0, seed=2, max_tokens=9, ignore_eos=True)
    text = "".join(stream)
    assert text == model.tokenizer.decode(stream.stats.ids)
    assert stream.stats.prompt_tokens == len(encode_chat(model.tokenizer, messages))
    ids = encode_chat(model.tokenizer, messages)
    assert stream.stats.ids == run(model, ids, temperature=4.0, seed=2, max_tokens=9, ignore_eos=True)[1].ids
    assert model.chat(messages, temperature=4.0, seed=2, max_tokens=9, ignore_eos=True) == text
    with pytest.raises(InputError, match="last message"):
        model.chat([*messages, {"role": "assistant", "content": "x"}])


def test_stats(model):
    """Figures add up and are plain JSON."""
    _, stats = run(model, temperature=0, max_tokens=5, ignore_eos=True)
    data = json.loads(json.dumps(stats.to_dict()))
    assert (data["prompt_tokens"], data["generated_tokens"]) == (len(model.tokenizer.encode(PROMPT)), 5)
    assert (data["ids"], data["stop_reason"], data["cached_tokens"]) == (stats.ids, "length", 0)
    assert 0 < data["prefill_s"] <= data["first_token_s"] and data["decode_s"] > 0
    assert data["decode_tokens_per_s"] == pytest.approx(4 / data["decode_s"])


def test_defaults(model):
    """A model that is not the bundled one samples by default (temperature 0.7, top-p 0.95)."""
    a = run(model, seed=3, max_tokens=8, ignore_eos=True)[1].ids
    assert a == run(model, seed=3, temperature=0.7, top_p=0.95, max_tokens=8, ignore_eos=True)[1].ids


def test_progress(model):
    """on_progress hears of prefill up to its end."""
    heard = []
    run(model, max_tokens=1, on_progress=lambda done, total: heard.append((done, total)))
    assert heard and heard[-1][0] == heard[-1][1]


def test_closed(folder):
    """After close every use raises EngineError that says so; closing twice is nothing."""
    model = npmix.load(folder)
    model.close()
    model.close()
    for use in (lambda: model.stream(PROMPT), lambda: model.generate(PROMPT), lambda: model.logits([1]), lambda: model.session().send("x")):
        with pytest.raises(EngineError, match="closed"):
            use()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_a_fork(folder):
    """In a child of the process that loaded it, a model raises EngineError instead of hanging; the parent goes on."""
    with npmix.load(folder, threads=2) as model:
        model.generate(PROMPT, max_tokens=1)
        child = os.fork()
        if child == 0:
            try:
                model.generate(PROMPT, max_tokens=1)
            except EngineError:
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert model.generate(PROMPT, max_tokens=1) is not None


def test_without_tokenizer(tmp_path):
    """A folder without tokenizer.model gives logits; text is an error that names the file."""
    with npmix.load(make.tiny_hf(tmp_path / "bare", **SMALL)) as model:
        assert model.logits([1, 2]).shape[0] == 2
        with pytest.raises(TokenizerError, match="tokenizer.model"):
            model.stream(PROMPT)


def test_bad_tokenizer_leaves_nothing_open(tmp_path):
    """A damaged or too large tokenizer is an error of load."""
    folder = make.tiny_hf(tmp_path / "bad", tokenizer=True, vocab_size=300, **SMALL)
    with pytest.raises(TokenizerError, match="vocabulary only 300"):
        npmix.load(folder)
    (folder / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        npmix.load(folder)


def test_missing_folder(tmp_path):
    """No model there is a NpmixError."""
    with pytest.raises(NpmixError):
        npmix.load(tmp_path / "nothing")


def test_bundled_model():
    """Without a path the bundled model opens; it is greedy by default and writes Python."""
    with npmix.load() as model:
        assert model.is_bundled and model.engine.source.path == BUNDLED
        text, stats = run(model, "def fibonacci(n):", max_tokens=32)
        assert text and stats.seed is None
        assert text == model.generate("def fibonacci(n):", max_tokens=32, temperature=0)
