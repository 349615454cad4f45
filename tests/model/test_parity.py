"""The engine on unconverted Hugging Face folders against transformers: logits, and greedy text."""

from pathlib import Path

import numpy as np
import pytest
from oracle import KINDS, distance, greedy, load_oracle, make_model, oracle_greedy, oracle_logits, random_ids

from npmix.engine import Engine
from npmix.tokenizer import Tokenizer

pytestmark = [pytest.mark.transformers, pytest.mark.compiled]
DATA = Path(__file__).parents[1] / "data"
CLOSE, CLOSE_F16 = 1e-4, 5e-3  # of the largest logit: float32 and float16 cache
DTYPES = [("mixtral", dtype) for dtype in ("f16", "f32")] + [("mistral", dtype) for dtype in ("f16", "f32")]


@pytest.mark.parametrize("kind, dtype", [(kind, "bf16") for kind in KINDS] + DTYPES)
def test_logits_and_greedy_text(tmp_path, kind, dtype):
    """With a float32 cache: within 1e-4 of the largest logit at every position, and the same 40 greedy tokens."""
    path = make_model(tmp_path / "m", kind, dtype=dtype, shards=2)
    oracle = load_oracle(path)
    ids = random_ids(oracle.config.vocab_size, 90, seed=3)
    expected, _ = oracle_greedy(oracle, ids[:20], 40)
    with Engine(path, kv="f32", chunk=16) as engine:
        assert distance(engine.logits(ids), oracle_logits(oracle, ids)) < CLOSE
        assert greedy(engine, ids[:20], 40) == expected


@pytest.mark.parametrize("kind", ["mistral", "mixtral with a window"])
@pytest.mark.parametrize("window, chunk", [(16, 64), (100, 7), (100, 300), (256, 256), (300, 290), (1000, 512)])
def test_sliding_window(tmp_path, kind, window, chunk):
    """A window is transformers' window, for prompts longer than it and chunks shorter and longer than it, decode included."""
    path = make_model(tmp_path / "m", kind, sliding_window=window, max_position_embeddings=2048)
    oracle = load_oracle(path)
    ids = random_ids(oracle.config.vocab_size, 700, seed=5)
    expected = oracle_logits(oracle, ids)
    with Engine(path, kv="f32", chunk=chunk) as engine:
        assert distance(engine.logits(ids), expected) < CLOSE
        assert distance(engine.prefill(ids[:600]), expected[599]) < CLOSE
        steps = [engine.step(token) for token in ids[600:]]
        assert distance(steps, expected[600:]) < CLOSE


@pytest.mark.parametrize("kv, close", [("f32", CLOSE), ("f16", CLOSE_F16)])
def test_trained_model(kv, close):
    """The trained checkpoint as it is: within 1e-4 (float32 cache) or 5e-3 (float16 cache), and the same greedy text."""
    path = DATA / "tiny_mixtral"
    oracle = load_oracle(path)
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer(path / "tokenizer.model").encode(text[:3000])[:700]
    with Engine(path, kv=kv, chunk=256) as engine:
        assert distance(engine.logits(ids), oracle_logits(oracle, ids)) < close
        for prompt in (ids[:60], ids[:400]):
            expected, margins = oracle_greedy(oracle, prompt, 64)
            sure = next((i for i, margin in enumerate(margins) if margin < 4 * close), 64)  # from a tie on, either way is right
            assert greedy(engine, prompt, 64)[:sure] == expected[:sure]
            assert kv == "f16" or sure >= 32, "no prompt for a test of greedy text: choose another"
            assert np.median(margins) > close
