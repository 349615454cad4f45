"""llama.cpp as the other side of a comparison: through llama-cpp-python (a worker process) or a llama-bench binary, and its best settings.

One hard fact: llama.cpp has no settings that are best at everything: repacking, flash attention and the micro-batch are tried
for each kind of work by themselves, and the comparison is held with what was fastest.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from json_lines import PeerError, Process

from npmix.benchmark import token_ids

WORKER = Path(__file__).resolve().parent / "llamacpp_worker.py"
WRITER = Path(__file__).resolve().parent / "llamacpp_gguf.py"
UBATCHES = (128, 256, 1024, 2048)


@dataclass(frozen=True)
class Settings:
    """What llama.cpp lets its user choose on a CPU."""

    repack: bool = True
    flash: bool = True
    ubatch: int = 512

    def words(self) -> str:
        return f"{'repacked' if self.repack else 'as it is'}, flash attention {'on' if self.flash else 'off'}, micro-batch {self.ubatch}"


@dataclass(frozen=True)
class Work:
    """What is timed. kind: "prefill" of `tokens` from an empty cache, or "decode" of `tokens` after `depth` positions."""

    kind: str
    tokens: int
    depth: int = 0

    @property
    def positions(self) -> int:
        return self.tokens + self.depth


def process_seconds(pid) -> float:
    """User and system time of a process (Linux), else 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write_gguf(python: str, path: Path, config: dict) -> None:
    """Make the file with gguf in the Python that has it; the config is kept beside it."""
    beside = path.with_name(path.name + ".json")
    if path.exists() and beside.exists():
        if json.loads(beside.read_text()) != config:
            raise PeerError(f"{path} was made with other sizes: remove it or choose another --work")
        return
    beside.write_text(json.dumps(config))
    done = subprocess.run([python, str(WRITER), str(path), str(beside)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise PeerError(f"{python} could not write {path}: {done.stderr.strip()[-400:]} (pip install gguf)")


class WorkerPeer:
    """llama-cpp-python's C API in a process of its own. It keeps model, context and cache between calls where it can."""

    def __init__(self, python: str, threads: int, vocab_size: int):
        self.python, self.threads, self.vocab_size = python, threads, vocab_size
        self.info = ""
        self._process = None
        self._loaded = self._made = None
        self._position = 0

    def speed(self, path: Path, work: Work, settings: Settings, positions: int) -> float:
        """Tokens a second. positions: how many the context must hold."""
        self._load(path, settings.repack)
        self._context(positions, settings)
        ids = token_ids(work.positions, self.vocab_size)
        keep = min(self._position, work.depth)
        self._process.ask("reset", position=keep)
        if work.kind == "prefill":
            seconds = self._process.ask("prefill", ids=ids)["seconds"]
        else:
            if keep < work.depth:
                self._process.ask("prefill", ids=ids[keep : work.depth])
            self._position = work.depth
            seconds = self._process.ask("decode", ids=ids[work.depth :])["seconds"]
        self._position = work.positions
        return work.tokens / seconds

    def processor_seconds(self) -> float:
        """Processor time its process took so far, 0 where the system does not tell."""
        return process_seconds(self._process.pid) if self._process else 0.0

    def _load(self, path: Path, repack: bool) -> None:
        if self._loaded != (path, repack):
            self.close()
            self._process = Process(self.python, WORKER, "llama-cpp-python")
            self.info = self._process.ask("load", path=str(path), repack=repack)["info"]
            self._loaded = path, repack

    def _context(self, positions: int, settings: Settings) -> None:
        wanted = positions, settings.flash, settings.ubatch
        if self._made != wanted:
            self._made, self._position = None, 0
            self._process.ask("context", positions=positions, flash=settings.flash, ubatch=settings.ubatch, threads=self.threads)
            self._made = wanted

    def close(self) -> None:
        """End the process: its repacked weights are memory that others need."""
        if self._process is not None:
            self._process.close()
        self._process = self._loaded = self._made = None
        self._position = 0


class BenchPeer:
    """A llama-bench binary, started anew for every measurement."""

    def __init__(self, binary: str, threads: int):
        self.binary, self.threads, self.info = binary, threads, ""

    def speed(self, path: Path, work: Work, settings: Settings, positions: int) -> float:
        prompt, generated = (work.tokens, 0) if work.kind == "prefill" else (0, work.tokens)
        options = {"-m": path, "-p": prompt, "-n": generated, "-d": work.depth, "-t": self.threads, "-r": 1, "-o": "json", "-ngl": 0}
        options.update({"-fa": int(settings.flash), "-ub": settings.ubatch, "-b": max(2048, settings.ubatch)})
        if not settings.repack:
            options["--repack"] = 0
        command = [self.binary, *(str(word) for pair in options.items() for word in pair)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise PeerError(f"{self.binary} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        found = json.loads(done.stdout)[0]
        self.info = f"build {found.get('build_commit', '?')}"
        return float(found["avg_ts"])

    def processor_seconds(self) -> float:
        """Of the runs that ended."""
        times = os.times()
        return times.children_user + times.children_system

    def close(self) -> None:
        """Nothing stays open."""


def best_settings(peer, path: Path, work: Work, start: Settings, positions: int, patience: float, report) -> tuple[Settings, list[dict]]:
    """Try one setting after the other on a piece of `work`; returns the fastest and what was tried.

    Decode: repacking, flash attention. Prefill: these and the micro-batches that the prompt fills. At depth, weights are
    read as in any decode, so only flash attention is tried there, at no more than 8,192 positions. After `patience` seconds
    nothing more is tried.
    """
    tried: dict[Settings, float] = {}
    rounds = 1 if work.tokens > 64 else 4  # the best of these: short runs are noisy
    began = time.monotonic()
    probe = replace(work, tokens=min(work.tokens, 2048 if work.kind == "prefill" else 24), depth=min(work.depth, 8192))
    first = replace(probe, tokens=min(probe.tokens, 16))  # pages in, threads awake, the cache filled to its depth

    def speed(settings):
        if settings in tried:
            return tried[settings]
        if time.monotonic() - began > patience:
            report(f"no time to try llama.cpp {settings.words()}")
            return 0.0
        tried[settings] = 0.0
        try:
            peer.speed(path, first, settings, positions)
            tried[settings] = max(peer.speed(path, probe, settings, positions) for _ in range(rounds))
        except PeerError as error:
            report(f"llama.cpp failed: {error}")
        report(f"  llama.cpp {settings.words()}: {tried[settings]:.4g} tokens/s")
        return tried[settings]

    def choose(best, name, values):
        options = [replace(best, **{name: value}) for value in values]
        for settings in options:
            speed(settings)
        return max((best, *options), key=speed)  # of equals the first: what was not tried changes nothing

    best = start
    if work.depth == 0:
        best = choose(best, "repack", (False, True))
    best = choose(best, "flash", (False, True))
    if work.kind == "prefill":
        best = choose(best, "ubatch", [n for n in UBATCHES if n <= probe.tokens])
    return best, [{**asdict(settings), "tokens_per_s": round(value, 2)} for settings, value in tried.items()]


def make_peer(llama_bench: str | None, python: str | None, threads: int, vocab_size: int):
    """The peer the options name."""
    if llama_bench:
        return BenchPeer(llama_bench, threads)
    return WorkerPeer(python or sys.executable, threads, vocab_size)
