"""What quantisation costs: log-probabilities of the held-out text from two engines, compared in float64."""

from pathlib import Path

import numpy as np

from npmix.engine import Engine
from npmix.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
WINDOW, POSITIONS = 1024, 20_000  # tokens of a sequence, each from an empty cache; positions that are compared, at least


def heldout_windows():
    """The held-out text's ids, (sequences, WINDOW)."""
    ids = Tokenizer(DATA / "tiny_mixtral" / "tokenizer.model").encode((DATA / "heldout.txt").read_text(encoding="utf-8"))
    whole = -(-POSITIONS // WINDOW)
    assert len(ids) >= whole * WINDOW, f"heldout.txt has {len(ids)} tokens, expected {whole * WINDOW} or more"
    return np.array(ids[: whole * WINDOW]).reshape(whole, WINDOW)


def log_softmax(logits):
    """In float64: the differences of interest are of the order of 1e-4."""
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def base_logs(windows):
    """Log-probabilities of the unconverted checkpoint with a float32 cache, float32 (sequences, WINDOW, V)."""
    with Engine(DATA / "tiny_mixtral", kv="f32") as engine:
        return np.stack([log_softmax(engine.logits(ids)).astype(np.float32) for ids in windows])


def compare(path, windows, base, kv="f32"):
    """(share of positions with the same first choice, mean KL from the base in nats, ratio of perplexities); printed too."""
    same, kl, loss, counted, targets = 0, 0.0, 0.0, 0, 0
    with Engine(path, kv=kv) as engine:
        for ids, p in zip(windows, base):
            q, p = log_softmax(engine.logits(ids)), p.astype(np.float64)
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
            kl += float((np.exp(p) * (p - q)).sum())
            loss += float((p - q)[np.arange(len(ids) - 1), ids[1:]].sum())
            counted, targets = counted + len(ids), targets + len(ids) - 1
    found = same / counted, kl / counted, float(np.exp(loss / targets))
    print(f"\n{path}, {kv} cache: {counted} positions")
    print(f"first choice equal {found[0]:.4%}, mean KL {found[1]:.6f}, perplexity x {found[2]:.5f}")
    return found
