"""Mixtral in plain NumPy float32: read this first. It is also the oracle that the kernels are tested against.

One hard fact: nothing here is fast, everything here is in the papers' words. Shapes stand at the line
ends: T tokens, D dim, H heads, K kv heads, d head_dim, F hidden_dim, E experts, A active, V vocabulary.

Jiang et al. 2024, "Mixtral of Experts", arXiv 2401.04088; Jiang et al. 2023, "Mistral 7B", arXiv 2310.06825.
"""

import numpy as np

from ..config import Config


def forward(config: Config, weights, ids) -> np.ndarray:
    """Logits (T, V) float32 of a whole sequence. weights(name) returns a float32 array of `config.tensor_shapes()[name]`."""
    x = weights("tok_embeddings")[np.asarray(ids)]  # (T, D)
    for layer in range(config.n_layers):
        w = lambda name, at=f"layers.{layer}.": weights(at + name)  # noqa: E731
        x = x + attention(config, w, rms_norm(x, w("attention_norm"), config.norm_eps))  # (T, D)
        x = x + mixture_of_experts(config, w, rms_norm(x, w("ffn_norm"), config.norm_eps))  # (T, D)
    x = rms_norm(x, weights("norm"), config.norm_eps)  # (T, D)
    return x @ weights("output").T  # (T, V)


def rms_norm(x, weight, eps):
    """Zhang & Sennrich 2019, arXiv 1910.07467."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def rope_angles(config: Config, positions) -> np.ndarray:
    """The angle of each pair at each position, (T, d / 2), in float32 as every implementation of the model has it."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse_frequency = np.float32(1) / np.float32(config.rope_theta) ** exponent  # (d / 2,)
    return np.asarray(positions, np.float32)[:, None] * inverse_frequency  # (T, d / 2)


def rope(x, angles):
    """Rotate the pairs (x[i], x[i + d / 2]): Su et al. 2021, arXiv 2104.09864. x: (T, heads, d)."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # (T, 1, d / 2)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(config: Config, w, x):
    """Grouped-query attention, causal, within the sliding window if there is one."""
    tokens, d = len(x), config.head_dim
    angles = rope_angles(config, np.arange(tokens))
    q = rope((x @ w("wq").T).reshape(tokens, config.n_heads, d), angles)  # (T, H, d)
    k = rope((x @ w("wk").T).reshape(tokens, config.n_kv_heads, d), angles)  # (T, K, d)
    v = (x @ w("wv").T).reshape(tokens, config.n_kv_heads, d)  # (T, K, d)
    shared = config.n_heads // config.n_kv_heads
    k, v = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)  # (T, H, d)
    scores = np.einsum("thd,shd->hts", q, k) / np.float32(np.sqrt(d))  # (H, T, T)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)  # (T, T)
    seen = (distance >= 0) & (distance < (config.sliding_window or tokens))
    out = np.einsum("hts,shd->thd", softmax(np.where(seen, scores, np.float32(-np.inf))), v)  # (T, H, d)
    return out.reshape(tokens, -1) @ w("wo").T  # (T, D)


def mixture_of_experts(config: Config, w, x):
    """Top-k of the raw router logits, softmax over those k, outputs summed in expert order."""
    if not config.has_router:
        return swiglu(w, 0, x)
    logits = x @ w("router").T  # (T, E)
    chosen = np.sort(np.argsort(-logits, axis=-1, kind="stable")[:, : config.n_active], axis=-1)  # (T, A)
    share = softmax(np.take_along_axis(logits, chosen, axis=-1))  # (T, A)
    out = np.zeros_like(x)
    for expert in range(config.n_experts):
        token, place = np.nonzero(chosen == expert)
        if len(token):
            out[token] += share[token, place, None] * swiglu(w, expert, x[token])
    return out  # (T, D)


def swiglu(w, expert, x):
    """w_down @ (silu(w_gate @ x) * (w_up @ x)): Shazeer 2020, arXiv 2002.05202."""
    gate, up = x @ w(f"experts.{expert}.w_gate").T, x @ w(f"experts.{expert}.w_up").T  # (T, F)
    return (gate / (1 + np.exp(-gate)) * up) @ w(f"experts.{expert}.w_down").T  # (T, D)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
