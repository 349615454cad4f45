"""llama.cpp's side of compare_quality.py, in a process of its own: JSON commands on stdin, one JSON answer each on stdout.

    {"do": "about"}                                                        {"version": "llama-cpp-python ..."}
    {"do": "gguf", "weights": FILE.npz, "config": {...}, "out": FILE}      float32 GGUF of arrays by GGUF names
    {"do": "quantize", "gguf": FILE, "out": FILE, "experts": "Q4_K", "others": "Q8_0", "importance": FILE.npz or null, "threads": 2}
                                    {"tensors": {name: [type, bytes, weights]}}
    {"do": "open", "gguf": FILE, "positions": 512, "threads": 2}           {"vocab": V, "info": "..."}
    {"do": "logits", "ids": [...], "first": P, "out": FILE.npy}            float32 (n - P, V) of the positions P.., from an empty cache

One hard fact: the rounding is llama_model_quantize itself, told by tensor-type overrides which type the experts get, and the logits
are llama_decode's own with a float32 KV cache. Needs llama-cpp-python, gguf and numpy; npmix is not imported.
"""

import ctypes
import sys
from pathlib import Path

import gguf
import llama_cpp as lib
import numpy as np
from json_lines import serve
from llamacpp_gguf import describe

EXPERTS = rb"ffn_(gate|up|down)_exps"
OTHERS = rb"(attn_(q|k|v|output)|token_embd|^output)\.weight"


@lib.llama_log_callback
def _quiet(level, text, _):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def type_number(name: str) -> int:
    """GGML's number of a type, by its name."""
    return int(gguf.GGMLQuantizationType[name])


def write_gguf(weights: str, config: dict, out: str) -> dict:
    """A float32 GGUF from arrays by GGUF names, shapes with the inputs last."""
    writer = gguf.GGUFWriter(out + ".partial", "llama")
    describe(writer, config, gguf.LlamaFileType.ALL_F32)
    with np.load(weights, allow_pickle=False) as arrays:
        for name in arrays.files:
            writer.add_tensor(name, arrays[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    Path(out + ".partial").replace(out)
    return {}


def importance_entries(path: str, keep: list):
    """llama_model_imatrix_data of an npz, ended by an empty one; `keep` holds the memory."""
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: np.ascontiguousarray(arrays[name], np.float32).reshape(-1) for name in arrays.files}
    entries = (lib.llama_model_imatrix_data * (len(found) + 1))()
    for entry, (name, values) in zip(entries, found.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keep.append(values)
    return entries


def quantize(source: str, out: str, experts: str, others: str, importance: str | None, threads: int) -> dict:
    """Round a float32 GGUF; returns what each tensor became."""
    params, keep = lib.llama_model_quantize_default_params(), []
    params.nthread, params.ftype = threads, lib.LLAMA_FTYPE_MOSTLY_Q8_0
    overrides = (lib.llama_model_tensor_override * 3)()
    for entry, (pattern, name) in zip(overrides, ((EXPERTS, experts), (OTHERS, others))):
        entry.pattern, entry.type = pattern, type_number(name)
    params.output_tensor_type = params.token_embedding_type = type_number(others)
    params.tt_overrides = overrides
    if importance:
        params.imatrix = importance_entries(importance, keep)
    if lib.llama_model_quantize(source.encode(), (out + ".partial").encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantise {source} to {experts}")
    Path(out + ".partial").replace(out)
    reader = gguf.GGUFReader(out)
    return {"tensors": {t.name: [t.tensor_type.name, int(t.n_bytes), int(t.n_elements)] for t in reader.tensors}}


class Model:
    """One model and its context, all in float32 but the weights."""

    def __init__(self):
        self.model = self.context = None

    def open(self, path: str, positions: int, threads: int) -> dict:
        self.close()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = positions
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = type_number("F32")
        params.flash_attn_type = 0  # its own kernel may take keys in float16
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {positions} positions")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        return {"vocab": self.vocab, "info": lib.llama_print_system_info().decode().strip()}

    def logits(self, ids: list[int], first: int, out: str) -> dict:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, id in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = id, i, 1, 0, i >= first
        status = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(ids)} tokens returned {status}")
        rows = np.empty((len(ids) - first, self.vocab), np.float32)
        for i in range(first, len(ids)):
            rows[i - first] = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.vocab,))
        np.save(out, rows)
        return {}

    def close(self) -> None:
        if self.context:
            lib.llama_free(self.context)
        if self.model:
            lib.llama_model_free(self.model)
        self.model = self.context = None


def ready():
    """llama.cpp, started, and what answers a command."""
    lib.llama_log_set(_quiet, None)
    lib.llama_backend_init()
    model = Model()
    known = {
        "about": lambda: {"version": f"llama-cpp-python {lib.__version__}"},
        "gguf": write_gguf,
        "quantize": lambda gguf, **how: quantize(gguf, **how),
        "open": lambda gguf, **how: model.open(gguf, **how),
        "logits": model.logits,
    }
    return lambda command: known[command.pop("do")](**command)


if __name__ == "__main__":
    serve(ready)
