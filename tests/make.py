"""Tiny random checkpoints for tests, written with NumPy alone.

One hard fact: weights are drawn with variance 1/K, so activations keep their size through the layers.
"""

import io
import json
from pathlib import Path

import numpy as np

DTYPE_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

TINY = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}

TEXT = """def fibonacci(n):
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)

class Stack:
    def __init__(self):
        self.items = []
    def push(self, item):
        self.items.append(item)
    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

for name, value in sorted(table.items(), key=lambda item: item[1]):
    print(f"{name}: {value}", file=sys.stderr)
"""


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits (uint16), round half to even; finite input."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """bf16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(x: np.ndarray, dtype: str) -> bytes:
    """float32 array -> raw little-endian bytes of f32, f16 or bf16."""
    if dtype == "bf16":
        return bf16_bits(x).tobytes()
    return np.ascontiguousarray(x, np.float16 if dtype == "f16" else np.float32).tobytes()


def write_safetensors(path, tensors: dict, metadata: dict | None = None) -> Path:
    """Write name -> (dtype name such as "BF16", shape, bytes) as a safetensors file."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            f.write(data)
    return Path(path)


def tiny_arrays(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by Hugging Face names, for a config.json's content."""
    rng = np.random.default_rng(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(rows, cols):
        return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)

    def norm():
        return (1 + 0.1 * rng.standard_normal(d)).astype(np.float32)

    out = {"model.embed_tokens.weight": matrix(v, d) * np.float32(np.sqrt(d))}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        out[at + "input_layernorm.weight"] = norm()
        for name, rows, cols in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
            out[at + f"self_attn.{name}_proj.weight"] = matrix(rows, cols)
        out[at + "post_attention_layernorm.weight"] = norm()
        if config["model_type"] == "mixtral":
            out[at + "block_sparse_moe.gate.weight"] = matrix(config["num_local_experts"], d) * np.float32(2)
            for e in range(config["num_local_experts"]):
                for name, rows, cols in (("w1", f, d), ("w2", d, f), ("w3", f, d)):
                    out[at + f"block_sparse_moe.experts.{e}.{name}.weight"] = matrix(rows, cols)
        else:
            for name, rows, cols in (("gate", f, d), ("up", f, d), ("down", d, f)):
                out[at + f"mlp.{name}_proj.weight"] = matrix(rows, cols)
    out["model.norm.weight"] = norm()
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = matrix(v, d)
    return out


def fuse_experts(arrays: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """The same weights in the fused spelling: mlp.experts.gate_up_proj (E, 2F, D), mlp.experts.down_proj (E, D, F)."""
    out = {k.replace("block_sparse_moe.gate", "mlp.gate"): v for k, v in arrays.items() if ".experts." not in k}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.block_sparse_moe.experts."
        experts = range(config["num_local_experts"])
        fused = [np.concatenate([arrays[f"{at}{e}.w1.weight"], arrays[f"{at}{e}.w3.weight"]]) for e in experts]
        out[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.stack(fused)
        out[f"model.layers.{layer}.mlp.experts.down_proj"] = np.stack([arrays[f"{at}{e}.w2.weight"] for e in experts])
    return out


def train_tokenizer(path, vocab_size: int = 360) -> Path:
    """A small sentencepiece BPE model with byte fallback and Mixtral's control ids (unk 0, bos 1, eos 2)."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4), model_writer=out, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, character_coverage=0.9995, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    Path(path).write_bytes(out.getvalue())
    return Path(path)


def tiny_hf(path, *, dtype="bf16", seed=0, shards=1, tokenizer=False, mistral=False, fused=False, arrays=None, **overrides) -> Path:
    """Write a Hugging Face folder of a tiny random model; returns its path.

    overrides: keys of config.json (None is written as null). arrays: weights by Hugging Face names
    instead of random ones. shards > 1 writes an index. fused: the fused spelling of the experts.
    tokenizer: also train tokenizer.model.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {**TINY, **(MISTRAL if mistral else {}), **overrides}
    if mistral:
        config = {k: v for k, v in config.items() if k not in ("num_local_experts", "num_experts_per_tok")}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    arrays = tiny_arrays(config, seed) if arrays is None else arrays
    if fused:
        arrays = fuse_experts(arrays, config)
    raw = {name: (DTYPE_NAMES[dtype], a.shape, encode(a, dtype)) for name, a in arrays.items()}
    if shards == 1:
        write_safetensors(path / "model.safetensors", raw, {"format": "pt"})
    else:
        names, weight_map = list(raw), {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
            write_safetensors(path / file, {name: raw[name] for name in part}, {"format": "pt"})
            weight_map.update({name: file for name in part})
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if tokenizer:
        train_tokenizer(path / "tokenizer.model")
    return path
