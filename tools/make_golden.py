"""Make tests/data/golden_*.npz: what transformers computes for the tiny random models and for the trained one.

    python tools/make_golden.py

One hard fact: all but a few of the numbers are the oracle's, so the files are made again whenever a model changes (its
digest stands in the file) and not when npmix does. The others: what 4 bits and 2 bits cost on held-out text, bounds
for later changes of the quantiser. Prompts are chosen so that no greedy token is a near-tie.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "model")]

from oracle import GOLDEN_KINDS, load_oracle, make_model, oracle_greedy, oracle_logits, random_ids  # noqa: E402

from quality import DATA, base_logs, compare, heldout_windows  # noqa: E402

from npmix.convert import convert  # noqa: E402
from npmix.tokenizer import Tokenizer  # noqa: E402

SURE = 2e-3  # of the largest logit: a greedy token that won by less could fall either way with a float16 cache


def golden(path, prompts, count, positions, greedy_tokens):
    """The record of one model: ids and logits at `positions` of the first `count` ids, and a sure greedy continuation."""
    oracle = load_oracle(path)
    for prompt in prompts:
        answer, margins = oracle_greedy(oracle, prompt, greedy_tokens)
        if min(margins) > SURE:
            break
    else:
        raise SystemExit(f"{path}: no prompt whose greedy text has no near-tie")
    ids = np.array(prompts[0][:count] if len(prompts[0]) >= count else random_ids(oracle.config.vocab_size, count, seed=1), np.int32)
    rows = oracle_logits(oracle, ids)
    print(f"{Path(path).name}: {len(ids)} ids, greedy text won by {min(margins):.4f} of the largest logit or more")
    return {
        "digest": hashlib.sha256((Path(path) / "model.safetensors").read_bytes()).hexdigest(),
        "ids": ids,
        "positions": np.array(positions, np.int32),
        "logits": rows[positions],
        "best": rows.argmax(1).astype(np.int32),
        "prompt": np.array(prompt, np.int32),
        "greedy": np.array(answer, np.int32),
    }


def main():
    """Write both files."""
    make_tiny()
    make_trained()
    for name in ("tiny", "trained"):
        print(f"golden_{name}.npz: {(DATA / f'golden_{name}.npz').stat().st_size:,} bytes")


def make_tiny():
    """The tiny random models."""
    tiny = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in GOLDEN_KINDS:
            path = make_model(Path(folder) / kind.replace(" ", "_"), kind)
            vocab = load_oracle(path).config.vocab_size
            prompts = [random_ids(vocab, 8, seed=seed) for seed in range(100)]
            record = golden(path, prompts, 40, [0, 1, 17, 39], 32)
            tiny.update({f"{kind}/{key}": value for key, value in record.items()})
    np.savez_compressed(DATA / "golden_tiny.npz", **tiny)


def make_trained():
    """The trained model, and what 4 and 2 bits cost on it."""
    path = DATA / "tiny_mixtral"
    ids = Tokenizer(path / "tokenizer.model").encode((DATA / "heldout.txt").read_text(encoding="utf-8"))
    prompts = [ids[:600], *(ids[start : start + 100] for start in range(1, 8001, 80))]
    record = golden(path, prompts, 600, [0, 1, 255, 256, 300, 511, 512, 599], 64)
    windows = heldout_windows()
    base = base_logs(windows)
    with tempfile.TemporaryDirectory() as folder:
        found = {quant: np.array(compare(convert(path, Path(folder) / quant, quant), windows, base)) for quant in ("q4", "q2")}
    np.savez_compressed(DATA / "golden_trained.npz", **record, **found)


if __name__ == "__main__":
    main()
