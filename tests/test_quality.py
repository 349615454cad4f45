"""What quantisation costs on real text: the trained checkpoint against its q8 and q4 stores, on modules it never saw.

One hard fact: the base is the unconverted path with a float32 cache, which the parity tests tie to transformers.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import npmix.generate
from npmix.convert import convert
from npmix.engine import Engine
from npmix.store import open_store
from npmix.tokenizer import Tokenizer

pytestmark = pytest.mark.compiled
DATA = Path(__file__).parent / "data"
WINDOW, POSITIONS = 1024, 20_000  # tokens of a sequence; positions that are compared, at least
Q4_KL, Q4_TOP1 = 0.0, 1.0


@pytest.fixture(scope="module")
def windows():
    """The held-out text's ids, in sequences of WINDOW."""
    ids = Tokenizer(DATA / "tiny_mixtral" / "tokenizer.model").encode((DATA / "heldout.txt").read_text(encoding="utf-8"))
    whole = -(-POSITIONS // WINDOW)
    assert len(ids) >= whole * WINDOW, f"heldout.txt has {len(ids)} tokens"
    return np.array(ids[: whole * WINDOW]).reshape(whole, WINDOW)


@pytest.fixture(scope="module")
def base(windows):
    """Natural logarithms of the unquantised model's probabilities, float32 (sequences, WINDOW, V)."""
    with Engine(DATA / "tiny_mixtral", kv="f32") as engine:
        return np.stack([log_softmax(engine.logits(ids)).astype(np.float32) for ids in windows])


def log_softmax(logits):
    """In float64: the differences of interest are of the order of 1e-4."""
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(path, windows, base, kv="f32"):
    """(share of positions with the same first choice, mean KL from the base in nats, perplexity ratio)."""
    same, kl, loss, counted = 0, 0.0, 0.0, 0
    with Engine(path, kv=kv) as engine:
        for ids, p in zip(windows, base):
            q, p = log_softmax(engine.logits(ids)), p.astype(np.float64)
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
            kl += float((np.exp(p) * (p - q)).sum())
            loss += float((p - q)[np.arange(len(ids) - 1), ids[1:]].sum())
            counted += len(ids)
    assert counted >= POSITIONS
    found = same / counted, kl / counted, float(np.exp(loss / counted))
    print(f"\n{path}: {counted} positions, first choice equal {found[0]:.4%}, mean KL {found[1]:.6f}, perplexity x {found[2]:.5f}")
    return found


def test_q8(tmp_path, windows, base):
    """8 bits: the first choice agrees at 98 % of 20,000 held-out positions or more, mean KL is below 0.001."""
    same, kl, _ = compare(convert(DATA / "tiny_mixtral", tmp_path / "q8", "q8"), windows, base)
    assert same >= 0.98 and 0 <= kl < 0.001


def test_q4(tmp_path, windows, base):
    """4 bits: the measured cost does not grow (a bound a quarter above it)."""
    same, kl, _ = compare(convert(DATA / "tiny_mixtral", tmp_path / "q4", "q4"), windows, base)
    assert same >= Q4_TOP1 and 0 <= kl < Q4_KL


def test_float16_cache(windows, base):
    """A float16 cache costs next to nothing: mean KL below 1e-5."""
    same, kl, _ = compare(DATA / "tiny_mixtral", windows, base, kv="f16")
    assert same >= 0.999 and kl < 1e-5


def test_bundled_model_is_the_checkpoint(tmp_path):
    """The model that npmix brings is, byte for byte, the q8 conversion of the checkpoint that the tests use."""
    path = convert(DATA / "tiny_mixtral", tmp_path / "q8", "q8")
    with open_store(path) as made, open_store(npmix.generate.BUNDLED) as bundled:
        assert made.config == bundled.config
        for name in made.config.tensor_shapes():
            a, b = made.tensor(name), bundled.tensor(name)
            assert (a.format, a.group, a.shape) == (b.format, b.group, b.shape)
            assert (np.asarray(a.data) == np.asarray(b.data)).all(), name
            del a, b
    names = (DATA / "tiny_mixtral" / "tokenizer.model", npmix.generate.BUNDLED / "tokenizer.model")
    assert names[0].read_bytes() == names[1].read_bytes()
    assert json.loads((npmix.generate.BUNDLED / "npmix.json").read_text())["recipe"]["name"] == "q8"
