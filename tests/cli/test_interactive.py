import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

import npmix

pty = pytest.importorskip("pty")
pytestmark = pytest.mark.compiled  # a person waits for every turn


class Terminal:
    """npmix run on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "dumb"}
        command = [sys.executable, "-m", "npmix", "run", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True)
        os.close(slave)
        self.unread = b""

    def until(self, pattern, seconds=300):
        """Read until the pattern comes; all up to its end."""
        seen, end = self.unread, time.monotonic() + seconds
        while not (found := re.search(pattern, seen)):
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} after {seconds} s in {seen!r}"
            try:
                data = os.read(self.master, 4096)
            except OSError:  # Linux: the other end is closed
                data = b""
            assert data, f"no {pattern!r} before the end in {seen!r}"
            seen += data
        self.unread = seen[found.end() :]
        return seen[: found.end()]

    def type(self, text):
        os.write(self.master, text)

    def end(self):
        code = self.process.wait(timeout=120)
        os.close(self.master)
        return code


FIGURES = rb"prompt (\d+) tokens at [^\n]*first token[^\n]*\n"


def test_session_keeps_its_cache(tiny):
    """Each turn computes its own tokens only; Ctrl-D ends the session with 0."""
    terminal = Terminal("-m", tiny, "-n", 5, "--temperature", 0, "--ignore-eos")
    terminal.until(rb"> ")
    terminal.type(b"x = [1, 2, 3, 4, 5, 6, 7, 8]\n")
    first = int(re.search(FIGURES, terminal.until(FIGURES)).group(1))
    terminal.until(rb"> ")
    terminal.type(b"y\n")
    second = int(re.search(FIGURES, terminal.until(FIGURES)).group(1))
    assert 1 <= second < first
    terminal.until(rb"> ")
    terminal.type(b"\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_ends_with_130(tiny):
    """Ctrl-C where a line is read ends the session with 130 and no traceback."""
    terminal = Terminal("-m", tiny, "-n", 5)
    terminal.until(rb"> ")
    for _ in range(100):  # readline may print its prompt a moment before it can be interrupted
        os.kill(terminal.process.pid, signal.SIGINT)
        try:
            terminal.process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            continue
    assert terminal.end() == 130


def test_session_starts_anew_when_the_context_is_full(tiny):
    """A line that no longer fits says so and the session goes on empty."""
    terminal = Terminal("-m", tiny, "-n", 8, "--context", 24, "--temperature", 0, "--ignore-eos")
    terminal.until(rb"> ")
    for _ in range(4):
        terminal.type(b"return n\n")
        seen = terminal.until(rb"> ")
        if b"starts anew" in seen:
            break
    assert b"starts anew" in seen
    terminal.type(b"def f\n")
    terminal.until(FIGURES)
    terminal.until(rb"> ")
    terminal.type(b"\x04")
    assert terminal.end() == 0


def test_chat_on_an_instruct_model(tiny, tmp_path):
    """A model with a chat template gets a chat; --chat asks for one on any model."""
    terminal = Terminal("-m", tiny, "--chat", "-n", 3, "--temperature", 0)
    assert b"chat" in terminal.until(rb"> ")
    terminal.type(b"\n")  # an empty line is no question
    terminal.until(rb"> ")
    terminal.type(b"Why?\n")
    seen = terminal.until(FIGURES)
    with npmix.load(tiny) as model:
        count = len(npmix.chat.encode_chat(model.tokenizer, [{"role": "user", "content": "Why?"}]))
    assert int(re.search(FIGURES, seen).group(1)) == count
    terminal.until(rb"> ")
    terminal.type(b"\x04")
    assert terminal.end() == 0
