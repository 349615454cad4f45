"""llama.cpp as the other side of compare_quality.py: our weights and our calibration under its names, and the process that uses them.

One hard fact: llama.cpp rotates neighbouring pairs of a head (x[2i], x[2i + 1]) where Hugging Face rotates halves (x[i], x[i + d / 2]), so
the rows of wq and wk change places; a row stays a row, and what was measured of its inputs holds for both.
"""

from pathlib import Path

import numpy as np
from json_lines import PeerError, Process

from npmix.config import Config
from npmix.quant.pack import dequantize
from npmix.store.importance import SHARED_INPUT

WORKER = Path(__file__).resolve().parent / "llamacpp_quality.py"
NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention_norm": "attn_norm", "wq": "attn_q",
    "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "ffn_norm": "ffn_norm", "router": "ffn_gate_inp",
    "w_gate": "ffn_gate_exps", "w_up": "ffn_up_exps", "w_down": "ffn_down_exps",
}  # fmt: skip


def paired_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads x d, K) from the order of halves to that of neighbouring pairs, head by head."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def gguf_name(name: str) -> str:
    """Ours -> GGUF's; an expert's matrix is a plane of one tensor for all."""
    parts = name.split(".")
    at = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{at}{NAMES[parts[-1]]}.weight"


def llama_arrays(source) -> dict[str, np.ndarray]:
    """All weights of a source in float32 by GGUF names, inputs last; experts (E, rows, K)."""
    config: Config = source.config
    if not config.has_router:
        raise SystemExit(f"{source.path} has no experts: compare a Mixtral")
    out: dict = {}
    for name in dict.fromkeys([*config.tensor_shapes(), "output"]):
        w, kind = np.array(dequantize(source.tensor(name)), np.float32), name.rsplit(".", 1)[-1]
        if kind in ("wq", "wk"):
            w = paired_rows(w, config.n_heads if kind == "wq" else config.n_kv_heads)
        out.setdefault(gguf_name(name), []).append(w)
    return {name: np.stack(planes) if "_exps" in name else planes[0] for name, planes in out.items()}


def llama_importance(means: dict[str, np.ndarray], counts: np.ndarray, config: Config) -> dict[str, np.ndarray]:
    """What llama-imatrix would have kept: mean squares by GGUF names, (K,) or (E, K); ones for an expert that no token chose.

    means, counts: as `store.importance.load_importance` gives them, unblended.
    """
    out: dict = {}
    for name, shape in config.tensor_shapes().items():
        parts = name.split(".")
        shared = ".".join([*parts[:-1], SHARED_INPUT.get(parts[-1], parts[-1])])
        if shared not in means or parts[-1] == "router":
            continue
        chosen = len(parts) != 5 or counts[int(parts[1]), int(parts[3])] > 0
        out.setdefault(gguf_name(name), []).append(means[shared] if chosen else np.ones(shape[1], np.float32))
    return {name: np.stack(rows) if "_exps" in name else rows[0] for name, rows in out.items()}


class Peer(Process):
    """The worker's process, to ask. Use in `with`."""

    def __init__(self, python: str):
        super().__init__(python, WORKER, "llama-cpp-python gguf")
        try:
            self.version = self.ask("about")["version"]
        except PeerError:
            self.close()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self.close()
