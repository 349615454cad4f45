"""llama.cpp in a process of its own: JSON commands on stdin, one JSON answer each on stdout.

    {"do": "load", "path": FILE, "repack": true}            {"info": "AVX512_VNNI = 1 | ...", "seconds": s}
    {"do": "context", "positions": N, "flash": true, "ubatch": 512, "threads": 2}
    {"do": "prefill", "ids": [...]}                         {"seconds": s}    appended to the sequence
    {"do": "decode", "ids": [...]}                          {"seconds": s}    one step an id
    {"do": "reset", "position": P}                          keep the first P positions

One hard fact: ctypes calls llama.cpp's own C functions, so what is timed is llama.cpp and a few microseconds; logits of
the last token alone are asked for, as llama-bench does. Needs llama-cpp-python; npmix is not imported.
"""

import ctypes
import sys
import time

import llama_cpp as lib
from json_lines import serve

FLASH = {True: 1, False: 0}  # enum llama_flash_attn_type


@lib.llama_log_callback
def _quiet(level, text, _):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


class Worker:
    """One model and one context."""

    def __init__(self):
        self.model = self.context = None
        self.position = 0

    def load(self, path: str, repack: bool, mode: int | None = None) -> dict:
        """mode: enum llama_load_mode, where this llama.cpp has it; None: its default, mapped."""
        began = time.perf_counter()
        params = lib.llama_model_default_params()
        if mode is not None:
            params.load_mode = mode
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        return {"info": lib.llama_print_system_info().decode().strip(), "seconds": time.perf_counter() - began}

    def context_(self, positions: int, flash: bool, ubatch: int, threads: int) -> dict:
        if self.context:
            lib.llama_free(self.context)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = positions, max(ubatch, 2048), ubatch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH[flash]
        params.no_perf = True
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {positions} positions, micro-batch {ubatch}, flash attention {flash}")
        self.position = 0
        return {"batch": lib.llama_n_batch(self.context), "ubatch": lib.llama_n_ubatch(self.context)}

    def prefill(self, ids: list[int]) -> dict:
        array = (ctypes.c_int32 * len(ids))(*ids)
        step = lib.llama_n_batch(self.context)
        began = time.perf_counter()
        for at in range(0, len(ids), step):
            count = min(step, len(ids) - at)
            self._decode(ctypes.cast(ctypes.byref(array, 4 * at), ctypes.POINTER(ctypes.c_int32)), count)
        lib.llama_synchronize(self.context)
        seconds = time.perf_counter() - began
        self.position += len(ids)
        return {"seconds": seconds}

    def decode(self, ids: list[int]) -> dict:
        one = (ctypes.c_int32 * 1)()
        pointer = ctypes.cast(one, ctypes.POINTER(ctypes.c_int32))
        began = time.perf_counter()
        for id in ids:
            one[0] = id
            self._decode(pointer, 1)
            lib.llama_synchronize(self.context)
        seconds = time.perf_counter() - began
        self.position += len(ids)
        return {"seconds": seconds}

    def _decode(self, pointer, count: int) -> None:
        status = lib.llama_decode(self.context, lib.llama_batch_get_one(pointer, count))
        if status:
            raise RuntimeError(f"llama_decode of {count} tokens returned {status}")

    def reset(self, position: int) -> dict:
        memory = lib.llama_get_memory(self.context)
        if position == 0:
            lib.llama_memory_clear(memory, False)
        elif not lib.llama_memory_seq_rm(memory, 0, position, -1):
            raise RuntimeError(f"llama.cpp cannot cut the sequence at {position}")
        self.position = position
        return {}

    def answer(self, command: dict) -> dict:
        known = {"load": self.load, "context": self.context_, "prefill": self.prefill, "decode": self.decode, "reset": self.reset}
        return known[command.pop("do")](**command)


def ready():
    """llama.cpp, started, and what answers a command."""
    lib.llama_log_set(_quiet, None)
    lib.llama_backend_init()
    return Worker().answer


if __name__ == "__main__":
    serve(ready)
