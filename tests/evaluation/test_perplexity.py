"""`npmix.evaluate` on tiny models: against logits of the engine and sums written out, against transformers, and its errors."""

import json
import math

import numpy as np
import pytest
from make import TEXT, tiny_arrays, tiny_hf

import npmix
from npmix import engine as engine_module
from npmix.engine import Engine
from npmix.errors import ConfigError, EngineError, InputError, LogitsFileError, TokenizerError
from npmix.tokenizer import Tokenizer

MODEL = {"num_hidden_layers": 1, "max_position_embeddings": 64}
CONTEXT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("evaluate") / "model", tokenizer=True, **MODEL)


@pytest.fixture(scope="module")
def near(folder, tmp_path_factory):
    """A model whose weights differ from the first one's by 2 %."""
    config = json.loads((folder / "config.json").read_text())
    noise = np.random.default_rng(1)
    arrays = {k: (v * (1 + 0.02 * noise.standard_normal(v.shape))).astype(np.float32) for k, v in tiny_arrays(config).items()}
    return tiny_hf(tmp_path_factory.mktemp("evaluate") / "near", tokenizer=True, arrays=arrays, **MODEL)


@pytest.fixture(scope="module")
def ids(folder):
    return Tokenizer(folder / "tokenizer.model").encode(TEXT)


def run(path, **options):
    return npmix.evaluate(path, TEXT, **{"context": CONTEXT, "kv": "f32", "threads": 1, **options})


def plain_logs(path, ids, kv="f32"):
    """Log-probabilities in the widest floats there are, straight from the engine's logits."""
    with Engine(path, kv=kv, threads=1) as engine:
        logits = engine.logits(ids).astype(np.longdouble)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def plain_windows(path, ids):
    """Log-probabilities and targets of llama.cpp's windows: second halves, bos first."""
    logs, targets = [], []
    for at in range(0, len(ids) // CONTEXT * CONTEXT, CONTEXT):
        window = [1, *ids[at + 1 : at + CONTEXT]]
        logs.append(plain_logs(path, window)[CONTEXT // 2 : -1])
        targets += window[CONTEXT // 2 + 1 :]
    return np.concatenate(logs), np.array(targets)


@pytest.mark.compiled
def test_perplexity(folder, ids):
    """The definition: exp of the mean loss over second halves, its error by the delta rule, the setting told."""
    found = run(folder)
    logs, targets = plain_windows(folder, ids)
    loss = -logs[np.arange(len(targets)), targets].astype(np.float64)
    error = math.sqrt(((loss**2).mean() - loss.mean() ** 2) / (len(loss) - 1))
    assert math.isclose(found["perplexity"]["value"], math.exp(loss.mean()), rel_tol=1e-11)
    assert math.isclose(found["perplexity"]["standard_error"], math.exp(loss.mean()) * error, rel_tol=1e-8)
    assert found["scored"] == len(targets) == len(ids) // CONTEXT * (CONTEXT - 1 - CONTEXT // 2)
    assert found["text"]["tokens"] == len(ids) and found["text"]["windows"] == len(ids) // CONTEXT >= 4
    assert found["settings"] == {"context": CONTEXT, "stride": None, "limit": None, "kv": "f32", "threads": 1}
    assert found["against"] is None and "kl" not in found and json.loads(json.dumps(found)) == found


@pytest.fixture(scope="module")
def live(folder, near):
    return run(near, against=folder)


@pytest.mark.compiled
def test_against(folder, near, ids, live):
    """KL, top and ratio against a base that runs beside the model, from both models' logits."""
    (p, targets), (q, _) = plain_windows(folder, ids), plain_windows(near, ids)
    kl = (np.exp(p) * (p - q)).sum(-1).astype(np.float64)
    every = np.arange(len(targets))
    change = (p - q)[every, targets].astype(np.float64)
    assert math.isclose(live["kl"]["mean"]["value"], kl.mean(), rel_tol=1e-9) and 1e-5 < kl.mean() < 0.1
    assert math.isclose(live["kl"]["percentile_99"], np.percentile(kl, 99), rel_tol=1e-9)
    assert math.isclose(live["perplexity_ratio"]["value"], math.exp(change.mean()), rel_tol=1e-11)
    assert live["same_top"]["value"] == (p.argmax(-1) == q.argmax(-1)).mean()
    assert math.isclose(live["base"]["perplexity"]["value"], run(folder)["perplexity"]["value"], rel_tol=1e-14)
    assert live["against"]["path"] == str(folder)


def test_against_itself(folder):
    """A model and itself: divergence exactly 0, ratio exactly 1, every first choice the same."""
    found = run(folder, against=folder, limit=1)
    assert found["kl"]["largest"] == 0 == found["kl"]["mean"]["value"]
    assert found["perplexity_ratio"]["value"] == 1 == found["same_top"]["value"]


@pytest.mark.compiled
@pytest.mark.parametrize("options", [{}, {"stride": 7, "limit": 5}, {"context": 63, "limit": 2}])
def test_saved_logits(folder, near, tmp_path, options, monkeypatch):
    """Saved log-probabilities give what a live base gives: divergences within the stored precision, the rest exactly."""
    monkeypatch.setattr(engine_module, "DEFAULT_CHUNK", 16)  # so that windows span several chunks
    run(folder, save_logits=tmp_path / "base.lp", **options)
    saved, live = run(near, against_logits=tmp_path / "base.lp", **options), run(near, against=folder, **options)
    for name in ("perplexity", "base", "perplexity_ratio", "log_perplexity_ratio", "same_top", "scored", "text", "settings"):
        assert saved[name] == live[name], name
    for name in ("median", "percentile_99", "largest"):
        assert math.isclose(saved["kl"][name], live["kl"][name], rel_tol=0.02, abs_tol=1e-7)
    error = live["kl"]["mean"]["standard_error"]
    assert abs(saved["kl"]["mean"]["value"] - live["kl"]["mean"]["value"]) < 2e-9 + 0.05 * error
    assert saved["against"] == {"logits": str(tmp_path / "base.lp"), "path": str(folder)}
    itself = run(folder, against_logits=tmp_path / "base.lp", **options)
    assert 0 <= itself["kl"]["mean"]["value"] < 5e-9 and itself["same_top"]["value"] == 1


@pytest.mark.compiled
def test_numbers_of_each_position(folder, near, ids, tmp_path, live):
    """run_windows gives every position's numbers, also against a file written from another program's logits."""
    from npmix.evaluation import LogitsReader, LogitsWriter, make_plan, run_windows, score

    plan = make_plan(ids, CONTEXT, None, 1)
    (logs, targets), per_window = plain_windows(folder, ids), CONTEXT - 1 - CONTEXT // 2
    with LogitsWriter(tmp_path / "f", plan, 384, "another program") as writer:
        for at in range(0, len(targets), per_window):
            writer.add(score(logs[at : at + per_window].astype(np.float32), targets[at : at + per_window]))
            writer.end_window()
        writer.finish()
    with Engine(near, kv="f32", threads=1) as engine, LogitsReader(tmp_path / "f", plan, 384) as base:
        scores = run_windows(plan, engine, base)
    assert np.allclose(scores.column("base_nll"), -logs[np.arange(len(targets)), targets].astype(np.float64), atol=1e-5)
    assert len(scores.column("kl")) == len(scores.column("same")) == live["scored"] and scores.column("kl").min() >= 0
    assert math.isclose(scores.column("kl").mean(), live["kl"]["mean"]["value"], rel_tol=1e-3)


@pytest.mark.compiled
@pytest.mark.parametrize("text, options, said", [
    (TEXT + " ", {}, "tokens"), (TEXT.replace("fib", "fab"), {}, "sha256|tokens"), (TEXT, {"context": 16}, "context 20, expected 16"),
    (TEXT, {"stride": 10}, "stride None, expected 10"), (TEXT, {"limit": 3}, "2 windows, expected 3"),
])  # fmt: skip
def test_saved_logits_of_something_else(folder, tmp_path, text, options, said):
    """Another text, other windows, or more of them than were saved: an error before the model has run."""
    run(folder, save_logits=tmp_path / "base.lp", limit=2)
    settings = {"context": CONTEXT, "kv": "f32", "threads": 1, "against_logits": tmp_path / "base.lp", **options}
    reports = []
    with pytest.raises(LogitsFileError, match=said):
        npmix.evaluate(folder, text, on_progress=lambda *a: reports.append(a), **settings)
    assert not reports


@pytest.mark.compiled
@pytest.mark.transformers
@pytest.mark.parametrize("context, stride", [(24, 8), (24, 24), (24, 23), (40, 1), (64, 32)])
def test_strided_is_the_guides_loop(folder, context, stride, ids):
    """With a stride: the loop of Hugging Face's guide, run on transformers; and, each scored token once, its formula."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = torch.tensor([ids])
    losses, nll_sum, n_tokens, prev_end = [], 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        trg_len = end - prev_end
        labels = tokens[:, begin:end].clone()
        labels[:, :-trg_len] = -100
        with torch.no_grad():
            out = model(tokens[:, begin:end], labels=labels)
        if (scored := labels[0, 1:] != -100).any():
            nll_sum += float(out.loss) * (int((labels != -100).sum()) - 1)
            n_tokens += int((labels != -100).sum()) - 1
            each = torch.nn.functional.cross_entropy(out.logits[0, :-1].double(), tokens[0, begin + 1 : end], reduction="none")
            losses += each[scored].tolist()
        prev_end = end
        if end == len(ids):
            break
    found = run(folder, context=context, stride=stride)
    assert found["scored"] == len(losses)
    assert math.isclose(math.log(found["guide_perplexity"]), nll_sum / n_tokens, rel_tol=1e-5)
    assert math.isclose(found["log_perplexity"]["value"], np.mean(losses), rel_tol=1e-5)
    assert math.isclose(found["log_perplexity"]["standard_error"], np.std(losses) / math.sqrt(len(losses) - 1), rel_tol=1e-3)


@pytest.mark.compiled
def test_progress(folder, near):
    """Progress rises by every token of both models to the total; the loss so far is told; an exception from it ends the run."""
    reports = []
    found = run(near, against=folder, on_progress=lambda *a: reports.append(a))
    done, totals, losses = zip(*reports)
    assert list(done) == sorted(done) and done[-1] == totals[0] == 2 * (CONTEXT - 1) * found["text"]["windows"] and len(set(totals)) == 1
    assert losses[0] is None and 0 < losses[-1] < 20

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(near, against=folder, on_progress=stop)


@pytest.mark.compiled
def test_memory_does_not_grow_with_the_text(folder, monkeypatch):
    """Rows are looked at in blocks of at most the given size, whatever the window, so memory holds a block's rows and no window's."""
    from npmix.evaluation import measure

    monkeypatch.setattr(measure, "NUMBERS", 3 * 384)
    sizes, score = [], measure.score
    monkeypatch.setattr(measure, "score", lambda rows, targets: sizes.append(rows.shape) or score(rows, targets))
    found = run(folder)
    assert max(sizes) == (3, 384) and sum(n for n, _ in sizes) == found["scored"]
    monkeypatch.undo()
    assert run(folder)["perplexity"] == found["perplexity"]


def test_wrong_options(folder, near, tmp_path):
    """Options that cannot be met: one line that names them, no matter how deep it was noticed."""
    cases = [
        ({"context": 65}, InputError, "context is 65"), ({"context": 3}, InputError, "context is 3"), ({"stride": 21}, InputError, "stride is 21"),
        ({"limit": 0}, InputError, "limit is 0"), ({"kv": "f8"}, InputError, "kv is 'f8'"),
        ({"against": near, "against_logits": "x"}, InputError, "one base"),
        ({"save_logits": tmp_path / "a", "against_logits": tmp_path / "b" / ".." / "a"}, InputError, "choose another name"),
        ({"against_logits": tmp_path / "none"}, LogitsFileError, "cannot read"),
    ]  # fmt: skip
    for options, error, said in cases:
        with pytest.raises(error, match=said) as e:
            run(folder, **options)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="text is bytes"):
        npmix.evaluate(folder, b"x", context=CONTEXT)
    with pytest.raises(InputError, match="the text has 1 tokens, fewer than one window of 20"):
        npmix.evaluate(folder, "", context=CONTEXT)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_compare(folder, tmp_path):
    """Another vocabulary, another tokenizer or none: an error before anything is computed."""
    other = tiny_hf(tmp_path / "other", tokenizer=True, **{**MODEL, "vocab_size": 400})
    with pytest.raises(InputError, match="vocabulary of 400.*one of 384"):
        run(folder, against=other)
    bare = tiny_hf(tmp_path / "bare", **MODEL)
    with pytest.raises(TokenizerError, match="no tokenizer.model"):
        run(bare)
    assert run(folder, against=bare, limit=1)["kl"]["largest"] == 0  # the same weights; a base needs no tokenizer of its own
    from make import train_tokenizer

    train_tokenizer(bare / "tokenizer.model", vocab_size=340)
    with pytest.raises(InputError, match="cut the text into different tokens"):
        run(folder, against=bare)
    with pytest.raises((ConfigError, npmix.NpmixError)):
        run(folder, against=tmp_path / "nothing")


@pytest.mark.compiled
@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_logit_blocks(folder, ids, chunk):
    """Engine.logit_blocks: the rows of Engine.logits, bit for bit, from any position on, in blocks of at most the size asked for."""
    with Engine(folder, kv="f32", chunk=chunk, threads=1) as engine:
        whole = engine.logits(ids[:40])
        for first, most in ((0, 64), (7, 6), (39, 1)):
            blocks = list(engine.logit_blocks(ids[:40], first, most))
            assert (np.concatenate(blocks) == whole[first:]).all() and max(map(len, blocks)) <= most
        for bad in ({"first": 40}, {"first": -1}, {"first": 1.0}, {"most": 0}):
            with pytest.raises(InputError):
                next(engine.logit_blocks(ids[:40], **bad))
        blocks = engine.logit_blocks(ids[:40], 0, 8)
        next(blocks)
        with pytest.raises(EngineError, match="at work"):
            engine.step(1)
        blocks.close()
        assert len(engine.step(1)) == 384
