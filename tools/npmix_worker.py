"""npmix in a process of its own: JSON commands on stdin, one JSON answer each on stdout (`json_lines.py`).

    {"do": "load", "path": STORE, "threads": 2, "positions": 64, "options": {"ram": 8589934592}}     {"seconds": s}
    {"do": "decode", "ids": [...]}       {"seconds": s, "logits": "0f3a..."}     one step an id; a digest of the last logits
    {"do": "statistics"}                 {...}                                   since loading, of the experts in memory; {} without a budget

One hard fact: loading compiles the kernels where no cache has them, so somebody loads once before what is timed.
"""

import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from json_lines import serve  # noqa: E402


class Worker:
    """One engine."""

    def __init__(self):
        import npmix.engine

        self._open, self.engine = npmix.engine.Engine, None

    def load(self, path: str, threads: int, positions: int, options: dict) -> dict:
        began = time.perf_counter()
        self.engine = self._open(path, threads=threads, context=positions, **options)
        self.engine.load_kernels()
        self.engine.load_experts()
        if self.engine.residency:
            self.loaded = replace(self.engine.residency.stats)
        return {"seconds": time.perf_counter() - began}

    def decode(self, ids: list[int]) -> dict:
        began = time.perf_counter()
        for id in ids:
            logits = self.engine.step(id)
        return {"seconds": time.perf_counter() - began, "logits": f"{zlib.crc32(logits.tobytes()):08x}"}

    def statistics(self) -> dict:
        residency = self.engine.residency
        return residency.stats.since(self.loaded).to_dict() if residency else {}

    def answer(self, command: dict) -> dict:
        from npmix.errors import NpmixError

        known = {"load": self.load, "decode": self.decode, "statistics": self.statistics}
        try:
            return known[command.pop("do")](**command)
        except NpmixError as error:
            return {"error": str(error)}


if __name__ == "__main__":
    serve(lambda: Worker().answer)
