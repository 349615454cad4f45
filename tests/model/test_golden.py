"""The engine against what transformers computed once (tools/make_golden.py), for machines without torch."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from oracle import GOLDEN_KINDS, distance, greedy, make_model

import npmix.generate
from npmix.engine import Engine
from npmix.kernels._jit import DISABLED

DATA = Path(__file__).parents[1] / "data"
CLOSE, CLOSE_F16 = 1e-4, 5e-3  # of the largest logit: float32 and float16 cache
SIZE = 300_000  # bytes of all golden files together


def record(file, prefix, path):
    """One model's golden numbers; they must have been made from the same weights."""
    with np.load(DATA / file) as numbers:
        out = {key[len(prefix) :]: numbers[key] for key in numbers.files if key.startswith(prefix)}
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(out["digest"]), f"{path} has other weights than {file} was made from: run tools/make_golden.py"
    return out


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_tiny_models(tmp_path, kind):
    """Tiny random models: logits within 1e-4 of the largest of transformers', the same greedy tokens."""
    path = make_model(tmp_path / "m", kind)
    golden = record("golden_tiny.npz", kind + "/", path)
    count, tokens = (18, 4) if DISABLED else (40, 32)
    some = golden["positions"] < count
    with Engine(path, kv="f32", chunk=9) as engine:
        rows = engine.logits(golden["ids"][:count])
        assert distance(rows[golden["positions"][some]], golden["logits"][some]) < CLOSE
        assert (rows.argmax(1) == golden["best"][:count]).all()
        assert greedy(engine, golden["prompt"].tolist(), tokens) == golden["greedy"][:tokens].tolist()


@pytest.mark.compiled
@pytest.mark.parametrize("kv, close", [("f32", CLOSE), ("f16", CLOSE_F16)])
def test_trained_model(kv, close):
    """The trained checkpoint as it is: within 1e-4 (float32 cache) or 5e-3 (float16 cache), the same greedy text."""
    path = DATA / "tiny_mixtral"
    golden = record("golden_trained.npz", "", path)
    with Engine(path, kv=kv, chunk=128) as engine:
        rows = engine.logits(golden["ids"])
        assert distance(rows[golden["positions"]], golden["logits"]) < close
        differ = rows.argmax(1) != golden["best"]
        assert differ.sum() <= (0 if kv == "f32" else 2)  # of 600, at a tie
        assert greedy(engine, golden["prompt"].tolist(), len(golden["greedy"])) == golden["greedy"].tolist()


@pytest.mark.compiled
def test_bundled_model_agrees():
    """The model that npmix brings (8 bits) chooses what the oracle of its checkpoint chooses, at 97 % of 600 positions or more."""
    golden = record("golden_trained.npz", "", DATA / "tiny_mixtral")
    with Engine(npmix.generate.BUNDLED) as engine:
        assert (engine.logits(golden["ids"]).argmax(1) == golden["best"]).mean() >= 0.97


def test_golden_files_are_small():
    """What is committed for parity stays below 300 KB."""
    files = list(DATA.glob("golden_*.npz"))
    assert len(files) == 2 and sum(file.stat().st_size for file in files) < SIZE
