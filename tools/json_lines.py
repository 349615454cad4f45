"""A program in a process of its own: JSON commands on its stdin, one JSON answer each on its stdout. Both ends.

One hard fact: the worker runs in the Python that has llama.cpp, which may lack everything else, so only the standard library is used here.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path


class PeerError(RuntimeError):
    """The program is not there, or failed."""


class Process:
    """The caller's end of a worker. python: the interpreter that runs it; needs: the packages it imports, for the error that they are not
    there; prefix: words before the command that starts it."""

    def __init__(self, python: str, worker: Path, needs: str, prefix: list[str] = ()):
        self._where, self._worker, self._needs = python, worker.stem, needs
        try:
            self._process = subprocess.Popen([*prefix, python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as e:
            raise PeerError(f"{python}: {e.strerror or e}") from None
        self.pid = self._process.pid

    def ask(self, do: str, **what) -> dict:
        """One command, its answer; PeerError if it failed. Paths go as text."""
        command = {name: str(value) if isinstance(value, Path) else value for name, value in what.items()}
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self._where}: {self._worker} ended during {do!r} (pip install {self._needs})")
        found = json.loads(line)
        if "error" in found:
            raise PeerError(found["error"])
        return found

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """End the process, and with it the memory it holds."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve(make_answer) -> None:
    """The worker's end: make_answer() -> a function from a command to its answer; an error of it is an answer too."""
    answers = os.fdopen(os.dup(1), "w")  # llama.cpp may print on file 1
    os.dup2(2, 1)
    answer = make_answer()
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
