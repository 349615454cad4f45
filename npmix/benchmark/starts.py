"""Cold and warm start: seconds from starting a process to its first token, with no compiled kernels kept and with them.

One hard fact: both start with the weights in the page cache as far as they fit; "cold" is about kernels, not about the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from ..errors import EngineError
from .host import anonymous_memory

PROMPT = "def fibonacci(n):"


def first_token(path: str, threads: int, ids: list[int], prompt: int, kv: str) -> None:
    """In a process of its own: open, prefill ids[:prompt], decode the rest; print the time of day of the first token, then memory."""
    from ..engine import Engine

    with Engine(path, threads=threads, context=len(ids), kv=kv) as engine:
        engine.prefill(ids[:prompt])
        now = time.time()
        for id in ids[prompt:]:
            engine.step(id)
        print(json.dumps({"first": now, "anonymous": anonymous_memory(), "held": engine.memory()}))


def _run(command: list[str], env: dict) -> tuple[float, str]:
    """(seconds until the process's first output, all of its output). Raises EngineError if it fails."""
    started = time.time()
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors) as process:
            head = os.read(process.stdout.fileno(), 1 << 16)
            seconds = time.time() - started
            out = process.stdout.read()
        errors.seek(0)
        err = errors.read()
    if process.returncode:
        raise EngineError(f"a run of its own ended with {process.returncode}: {err.decode(errors='replace').strip()[-300:]}")
    return seconds, (head + out).decode()


def starts(source, threads: int, ids: list[int], prompt: int, kv: str, report) -> dict:
    """{"start": {cold_s, warm_s, what}, "memory": {anonymous, held}}: seconds to the first token, bytes of a run of ids[:prompt].

    source: an open model; the processes open its path anew. Raises EngineError if one of them fails.
    """
    path = str(source.path)
    call = f"from npmix.benchmark.starts import first_token; first_token({path!r}, {threads}, {ids}, {prompt}, {kv!r})"
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
        held = json.loads(_run(probe, env)[1])
    found["what"] = f"npmix run {PROMPT!r}" if source.tokenizer_path else f"engine, {prompt} tokens"
    return {"start": found, "memory": {"anonymous": held["anonymous"], "held": held["held"]}}
