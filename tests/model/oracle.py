"""transformers as the oracle, and the tiny models that are compared with it.

One hard fact: the oracle is loaded with `from_pretrained(dtype=torch.float32)`; a model cast with `.to(bfloat16).float()`
keeps inverse frequencies of RoPE rounded to bfloat16 and is off by up to 1 % of the largest logit.
"""

import numpy as np
from make import tiny_hf

ODD = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6, "head_dim": 24, "vocab_size": 389}
HEADS = {
    "hidden_size": 48, "intermediate_size": 304, "num_attention_heads": 14, "num_key_value_heads": 1, "head_dim": 80, "vocab_size": 385,
}  # fmt: skip
SMALLEST = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2, "vocab_size": 5}

# What a model of the family may look like, as overrides of make.TINY. All of them share one kernel per weight format.
KINDS = {
    "mixtral": {},
    "eight experts": {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 10000.0},
    "one of three": {"num_local_experts": 3, "num_experts_per_tok": 1},
    "three of three": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "one of one": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "odd sizes": ODD,
    "many heads": HEADS,
    "smallest": SMALLEST,
    "tied": {"tie_word_embeddings": True},
    "mixtral with a window": {"sliding_window": 20},
    "mistral": {"mistral": True, "sliding_window": 16},
    "mistral without a window": {"mistral": True, "sliding_window": None, "num_key_value_heads": 4},
    "mistral with one key": {"mistral": True, "sliding_window": 1, "tie_word_embeddings": True},
}
GOLDEN_KINDS = (
    "mixtral", "eight experts", "one of three", "odd sizes", "many heads", "smallest", "tied", "mixtral with a window", "mistral",
)  # fmt: skip


def make_model(path, kind, **options):
    """Write the Hugging Face folder of a kind; returns its path."""
    return tiny_hf(path, **{**KINDS[kind], **options})


def random_ids(vocab_size, count, seed=0):
    """`count` ids, drawn evenly."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def load_oracle(path):
    """The model of transformers in float32, with the plainest attention and experts it has."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # models this small gain nothing, and a busy machine takes much
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    return model.eval()


def oracle_logits(model, ids):
    """float32 (T, V) of a whole sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(map(int, ids))]), use_cache=False).logits[0].float().numpy()


def oracle_greedy(model, ids, count):
    """(ids, margins): the greedy continuation, whole sequence each time, and by how much each token won, in largest logits."""
    ids, margins = list(ids), []
    for _ in range(count):
        row = oracle_logits(model, ids)[-1]
        second, first = np.sort(row)[-2:]
        margins.append(float((first - second) / np.abs(row).max()))
        ids.append(int(row.argmax()))
    return ids[-count:], margins


def greedy(engine, ids, count):
    """The engine's greedy continuation of ids, from an empty cache; leaves it empty."""
    engine.reset()
    row, out = engine.prefill(ids), []
    for _ in range(count):
        out.append(int(row.argmax()))
        row = engine.step(out[-1])
    engine.reset()
    return out


def distance(found, expected):
    """The largest difference, as a share of the largest logit."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())
