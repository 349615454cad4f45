"""Write a random Mixtral as GGUF, every matrix in Q4_0 (4.5 bits), for llama.cpp to run beside npmix.

    python tools/llamacpp_gguf.py OUT.gguf CONFIG.json       CONFIG.json: the fields of npmix's Config

One hard fact: llama.cpp knows Mixtral as architecture "llama" with an expert count, and stacks a layer's experts into one
tensor. Needs gguf and numpy only, so it runs in whatever Python llama.cpp was installed into.

Blocks come from one pool of normal numbers, rounded by gguf itself, in windows at random places; routers and norms are float32.
Every layer changes the residual stream as much as the one before, as in npmix's random stores, so routing is near-uniform here too.
"""

import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import random_scales

BLOCK, BLOCK_BYTES = 32, 18  # inputs and bytes of a Q4_0 block: a float16 scale, 16 bytes of nibbles
PIECE = 1 << 22
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def block_pool(count: int, std: float, rng) -> np.ndarray:
    """(count, 18) uint8: Q4_0 blocks of normal numbers with mean 0."""
    pool = np.empty((count, BLOCK_BYTES), np.uint8)
    step = PIECE // BLOCK
    for at in range(0, count, step):
        numbers = rng.standard_normal((min(step, count - at), BLOCK), np.float32) * np.float32(std)
        pool[at : at + step] = gguf.quants.quantize(numbers, Q4_0)
    return pool


def scaled(blocks: np.ndarray, factor: float) -> np.ndarray:
    """The same blocks, their scales times a number."""
    out = blocks.copy()
    scales = np.ascontiguousarray(out[:, :2]).view(np.float16) * np.float16(factor)
    out[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    return out


def tensors(c: dict):
    """(GGUF name, shape with the inputs last, kind, factor) in file order. kind: "matrix", "router", "norm"; factor: `random_scales.factor`."""
    d, f, e = c["dim"], c["hidden_dim"], c["n_experts"]
    q, kv = c["n_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
    yield "token_embd.weight", (c["vocab_size"], d), "matrix", random_scales.factor("tok_embeddings", 0, d)
    for layer in range(c["n_layers"]):
        at = f"blk.{layer}."
        yield at + "attn_norm.weight", (d,), "norm", 1.0
        yield at + "attn_q.weight", (q, d), "matrix", 1.0
        yield at + "attn_k.weight", (kv, d), "matrix", 1.0
        yield at + "attn_v.weight", (kv, d), "matrix", 1.0
        yield at + "attn_output.weight", (d, q), "matrix", random_scales.factor("wo", layer, d)
        yield at + "ffn_norm.weight", (d,), "norm", 1.0
        yield at + "ffn_gate_inp.weight", (e, d), "router", 1.0
        yield at + "ffn_gate_exps.weight", (e, f, d), "matrix", 1.0
        yield at + "ffn_up_exps.weight", (e, f, d), "matrix", 1.0
        yield at + "ffn_down_exps.weight", (e, d, f), "matrix", random_scales.factor("w_down", layer, d)
    yield "output_norm.weight", (d,), "norm", 1.0
    yield "output.weight", (c["vocab_size"], d), "matrix", 1.0


class Weights:
    """Hands out each tensor's data as it is written."""

    def __init__(self, c: dict, seed: int = 0):
        self.rng, self.dim = np.random.default_rng(seed), c["dim"]
        largest = max(math.prod(shape[-2:]) for _, shape, kind, _ in tensors(c) if kind == "matrix")
        self.pool = block_pool(largest // BLOCK * 3 // 2 + 4096, self.dim**-0.5, self.rng)

    def _window(self, rows: int, cols: int) -> np.ndarray:
        count = rows * cols // BLOCK
        at = int(self.rng.integers(len(self.pool) - count))
        return self.pool[at : at + count]

    def data(self, shape: tuple[int, ...], kind: str, factor: float) -> np.ndarray:
        """Q4_0 as uint8 of shape (..., rows, bytes a row); routers and norms float32."""
        if kind == "norm":
            return np.ones(shape, np.float32)
        if kind == "router":
            return self.rng.standard_normal(shape, np.float32) * np.float32(self.dim**-0.5)
        planes = [self._window(*shape[-2:]) for _ in range(math.prod(shape[:-2]))]
        planes = np.stack([plane if factor == 1 else scaled(plane, factor) for plane in planes])
        return planes.reshape(*shape[:-1], shape[-1] // BLOCK * BLOCK_BYTES)


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    return math.prod(shape) * 4 if kind in ("norm", "router") else math.prod(shape) // BLOCK * BLOCK_BYTES


def describe(writer, c: dict, file_type=gguf.LlamaFileType.MOSTLY_Q4_0) -> None:
    """The key-value pairs llama.cpp asks for; it has no vocabulary but its size."""
    writer.add_name("Mixtral of npmix")
    writer.add_context_length(c["max_positions"])
    writer.add_embedding_length(c["dim"])
    writer.add_block_count(c["n_layers"])
    writer.add_feed_forward_length(c["hidden_dim"])
    writer.add_head_count(c["n_heads"])
    writer.add_head_count_kv(c["n_kv_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["norm_eps"])
    writer.add_expert_count(c["n_experts"])
    writer.add_expert_used_count(c["n_active"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")


def write(path: Path, c: dict, seed: int = 0) -> None:
    """Write the file under a temporary name, a tensor at a time, then give it its name."""
    odd = [name for name in ("dim", "hidden_dim") if c[name] % BLOCK]
    if odd:
        raise SystemExit(f"{odd[0]} is {c[odd[0]]}, expected a multiple of {BLOCK}: Q4_0 rounds {BLOCK} inputs at a time")
    weights = Weights(c, seed)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    describe(writer, c)
    for name, shape, kind, _ in tensors(c):
        raw = None if kind in ("norm", "router") else Q4_0
        stored = shape if raw is None else (*shape[:-1], shape[-1] // BLOCK * BLOCK_BYTES)
        writer.add_tensor_info(name, stored, np.dtype(np.float32 if raw is None else np.uint8), nbytes(shape, kind), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, *what in tensors(c):
        writer.write_tensor_data(weights.data(*what))
    writer.close()
    partial.replace(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
