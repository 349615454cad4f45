"""The bundled model's corpus: CPython 3.11.7's standard library, as a fixed list of files.

The list (tiny_corpus.txt: part, sha256, path) is the truth, not the folder: a file whose digest differs stops the run, so two people
train on the same bytes or not at all. Modules marked "held" are never seen in training; they serve validation and the tests.
"""

import hashlib
import re
import sysconfig
from pathlib import Path

LIST = Path(__file__).with_name("tiny_corpus.txt")

# Whole modules, typical in style and without a near-copy of themselves among the training files.
HELD = frozenset(
    """argparse.py cmd.py configparser.py csv.py fractions.py ftplib.py functools.py graphlib.py heapq.py json/__init__.py
    json/decoder.py json/encoder.py json/scanner.py json/tool.py queue.py random.py shelve.py shlex.py statistics.py
    textwrap.py""".split()
)
# What the tests carry as real input: about 80 KB of the held-out text.
PIECE = ("textwrap.py", "csv.py", "cmd.py", "queue.py", "graphlib.py", "shelve.py")

# Tests, foreign packages, and files that are tables rather than programs.
SKIPPED_FOLDERS = frozenset(["test", "tests", "idle_test", "site-packages", "pydoc_data", "__phello__", "__pycache__"])
SKIPPED_FILES = frozenset(["html/entities.py", "stringprep.py", "encodings/aliases.py"])
SKIPPED_STARTS = (
    "config-",
    "_sysconfigdata",
    "encodings/cp",
    "encodings/iso",
    "encodings/mac",
    "encodings/koi",
    "encodings/kz",
    "encodings/ptcp",
    "encodings/tis",
    "encodings/hp",
)


def default_stdlib():
    return Path(sysconfig.get_path("stdlib"))


def choose(stdlib):
    """The rule that made the list: yields (part, path inside the library) in order of path."""
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib).as_posix()
        if SKIPPED_FOLDERS & set(path.split("/")[:-1]) or path in SKIPPED_FILES or path.startswith(SKIPPED_STARTS):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield ("held" if path in HELD else "train"), path


def write_list(stdlib):
    rows = [(part, hashlib.sha256((stdlib / path).read_bytes()).hexdigest(), path) for part, path in choose(stdlib)]
    LIST.write_text("".join(f"{part} {digest} {path}\n" for part, digest, path in rows))
    return rows


def read_corpus(stdlib, part):
    """{path: text} of one part ("train" or "held"), every file checked against the list."""
    texts = {}
    for line in LIST.read_text().splitlines():
        kind, digest, path = line.split(" ", 2)
        if kind != part:
            continue
        data = (stdlib / path).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise SystemExit(f"{stdlib / path} is not the file of CPython 3.11.7: give that version's library as --stdlib")
        texts[path] = data.decode("utf-8")
    return texts


def held_piece(stdlib):
    texts = read_corpus(stdlib, "held")
    return "".join(texts[path] for path in PIECE)


def split_definitions(text):
    """The text in pieces that begin at top-level definitions (decorators included), nothing lost."""
    starts = [0, *(m.start() for m in re.finditer(r"^(?:@|async def |def |class )", text, re.MULTILINE) if m.start())]
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]
    joined = []
    for piece in pieces:  # a decorator's piece ends where its definition begins
        if joined and joined[-1].startswith("@") and not re.search(r"^(?:async def|def|class) ", joined[-1], re.MULTILINE):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
