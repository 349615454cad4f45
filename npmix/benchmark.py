"""How fast a model runs here, as a share of what this machine can do.

One hard fact: memory bandwidth on a shared machine halves and doubles for minutes at a time, so the ceilings are
measured in turns with the program, and shares are medians over the turns, never quotients of two medians.

Decode is held against the read speed of memory: every decoded token reads all matrices outside the experts, A of E
experts and the keys and values once. Prefill is held against the int8 peak, 2 operations a weight and token.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "def fibonacci(n):"
KV_BYTES = {"f16": 2, "f32": 4}


def peak_memory() -> int | None:
    """Most bytes this process had resident so far, mapped weights included; None where the system does not tell."""
    found = _status("VmHWM")
    if found is None and sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = peak if sys.platform == "darwin" else peak * 1024
    return found


def anonymous_memory() -> int | None:
    """Bytes resident now that no file backs (Linux); None elsewhere."""
    return _status("RssAnon")


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:  # no Linux
        pass
    return None


def decode_bytes(engine, position: int) -> int:
    """Bytes that decoding the token at `position` has to read: weights, keys and values."""
    config = engine.config
    seen = min(position + 1, config.sliding_window or position + 1)
    return engine.bytes_per_token() + seen * config.n_layers * 2 * config.n_kv_heads * config.head_dim * KV_BYTES[engine.kv]


def prefill_operations(config, tokens: int) -> int:
    """Multiplications and additions by weights that `tokens` prompt tokens need; attention's own are left out.

    In the last layer only keys and values are needed of all tokens, the rest of the last one alone.
    """
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rest = config.dim * 2 * q + config.n_active * 3 * config.dim * config.hidden_dim  # weights: wq, wo, experts
    cached = config.dim * 2 * kv  # wk, wv
    weights = tokens * (config.n_layers - 1) * (rest + cached) + tokens * cached + rest + config.dim * config.vocab_size
    return 2 * weights


def weight_formats(source) -> str:
    """The weight formats of the matrices, the largest share first: "q4 group 64 (91 %), q8 group 64 (9 %)"."""
    sums: dict[str, int] = {}
    for name in source.names():
        tensor = source.tensor(name)
        if len(tensor.shape) == 2 and not name.endswith("router"):
            key = f"{tensor.format} group {tensor.group}" if tensor.group else tensor.format
            sums[key] = sums.get(key, 0) + tensor.shape[0] * tensor.shape[1]
    whole = sum(sums.values())
    return ", ".join(f"{key} ({100 * n / whole:.0f} %)" for key, n in sorted(sums.items(), key=lambda item: -item[1]))


def machine() -> dict:
    """What this runs on, in words and numbers."""
    from importlib.metadata import version

    from . import __version__
    from .kernels.cpu import form

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:  # no Linux
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "int8_form": form(),
        "python": platform.python_version(),
        "numba": version("numba"),
        "npmix": __version__,
    }


def token_ids(count: int, vocab_size: int) -> list[int]:
    """`count` ids spread over the vocabulary, always the same: text would route to the same few experts again and again."""
    return [(1 + i * 2654435761) % (1 << 32) * vocab_size >> 32 for i in range(count)]


def first_token(path: str, threads: int, prompt: int, tokens: int, kv: str) -> None:
    """In a process of its own: open, prefill, decode; print the time of day of the first token, then the memory held."""
    import json

    from .engine import Engine

    with Engine(path, threads=threads, context=prompt + tokens, kv=kv) as engine:
        ids = token_ids(prompt + tokens, engine.config.vocab_size)
        engine.prefill(ids[:prompt])
        now = time.time()
        for id in ids[prompt:]:
            engine.step(id)
        print(json.dumps({"first": now, "anonymous": anonymous_memory(), "held": engine.memory()}))


def _run(command: list[str], env: dict) -> tuple[float, str]:
    """(seconds until the process's first output, all of its output). Raises EngineError if it fails."""
    from .errors import EngineError

    started = time.time()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        head = os.read(process.stdout.fileno(), 1 << 16)
        seconds = time.time() - started
        out, err = process.communicate()
    if process.returncode:
        raise EngineError(f"a run of its own ended with {process.returncode}: {err.decode(errors='replace').strip()[-300:]}")
    return seconds, (head + out).decode()


def starts(source, threads: int, prompt: int, kv: str, report) -> dict:
    """Seconds from starting a process to its first token, with an empty kernel cache and a filled one; memory of such a run."""
    import json

    path = str(source.path)
    call = f"from npmix.benchmark import first_token; first_token({path!r}, {threads}, {prompt}, 16, {kv!r})"
    probe = [sys.executable, "-c", call]
    options = ["-n", "1", "--temperature", "0", "--threads", str(threads), "--kv", kv]
    text = [sys.executable, "-m", "npmix", "run", "-m", path, *options, PROMPT]
    found: dict = {}
    with tempfile.TemporaryDirectory(prefix="npmix-bench-") as cache:
        env = {**os.environ, "NPMIX_CACHE_DIR": cache}
        command = text if source.tokenizer_path else probe
        for key in ("cold_s", "warm_s"):
            report(f"{key[:4]} start")
            began = time.time()
            seconds, out = _run(command, env)
            found[key] = seconds if source.tokenizer_path else json.loads(out)["first"] - began
        report("memory")
        _run(probe, env)  # the longer prompt may compile more
        held = json.loads(_run(probe, env)[1])
    found["what"] = f"npmix run {PROMPT!r}" if source.tokenizer_path else f"engine, {prompt} tokens"
    return {"start": found, "memory": {"anonymous": held["anonymous"], "held": held["held"]}}


def _turn(engine, prompt: list[int], following: list[int]) -> dict:
    """One turn: each ceiling, then at once what is held against it."""
    from .kernels import ceilings

    engine.reset()
    int8 = ceilings.int8_peak(engine.threads)
    began = time.perf_counter()
    engine.prefill(prompt)
    prefill = time.perf_counter() - began
    before = ceilings.read_bandwidth(engine.threads)
    began = time.perf_counter()
    for id in following:
        engine.step(id)
    decode = time.perf_counter() - began
    after = ceilings.read_bandwidth(engine.threads)
    return {"int8_gops": int8, "read_gbs": (before + after) / 2, "prefill_s": prefill, "decode_s": decode}


def _summary(values) -> dict:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speeds(engine, prompt: int, tokens: int, turns: int, report) -> dict:
    """Prefill and decode over several turns, each beside the ceiling measured in the same turn."""
    ids = token_ids(prompt + tokens, engine.config.vocab_size)
    report("warming up")
    _turn(engine, ids[:prompt], ids[prompt : prompt + 2])
    rounds = []
    for turn in range(turns):
        report(f"turn {turn + 1} of {turns}")
        rounds.append(_turn(engine, ids[:prompt], ids[prompt:]))
    operations = prefill_operations(engine.config, prompt)
    nbytes = decode_bytes(engine, prompt + tokens // 2)
    return {
        "ceilings": {"read_gbs": _summary(r["read_gbs"] for r in rounds), "int8_gops": _summary(r["int8_gops"] for r in rounds)},
        "prefill": {
            "tokens": prompt,
            "tokens_per_s": _summary(prompt / r["prefill_s"] for r in rounds),
            "operations_per_token": operations / prompt,
            "gops": _summary(operations / r["prefill_s"] / 1e9 for r in rounds),
            "share_of_int8": _summary(operations / r["prefill_s"] / 1e9 / r["int8_gops"] for r in rounds),
        },
        "decode": {
            "tokens": tokens,
            "tokens_per_s": _summary(tokens / r["decode_s"] for r in rounds),
            "bytes_per_token": nbytes,
            "gbs": _summary(nbytes * tokens / r["decode_s"] / 1e9 for r in rounds),
            "share_of_read": _summary(nbytes * tokens / r["decode_s"] / 1e9 / r["read_gbs"] for r in rounds),
        },
    }


def benchmark(path, *, threads=None, prompt=512, tokens=64, turns=5, chunk=None, kv="f16", start=True, report=lambda text: None) -> dict:
    """Measure the model in a folder; returns plain JSON values, shares as fractions, times in seconds.

    prompt, tokens: lengths of prefill and decode. turns: how often each is measured. start: also measure cold and
    warm start, in processes of their own. report(text) is called before each step.
    """
    from .engine import Engine

    with Engine(path, threads=threads, context=prompt + tokens, chunk=chunk, kv=kv) as engine:
        found = {
            "machine": machine(),
            "model": str(engine.source.path),
            "layers": engine.config.n_layers,
            "format": weight_formats(engine.source),
            "threads": engine.threads,
            "chunk": engine.chunk,
            "kv": engine.kv,
        }
        if start:
            found.update(starts(engine.source, engine.threads, prompt, kv, report))
        found.update(speeds(engine, prompt, tokens, turns, report))
    return found
