"""The README as something to run: its commands, what they printed, its code. `python tests/readme.py` writes the outputs anew.

One hard fact: outputs are compared as they stand, but for figures that depend on the machine: those lines are compared
with their numbers masked.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FIGURES = re.compile(r"^(npmix: |\[#)")  # lines whose numbers depend on the machine
DROPPED = re.compile(r"compiling kernels")  # only where no run came before


def blocks(language):
    """The contents of the README's fenced blocks of a language."""
    return [body for name, body in BLOCK.findall(README.read_text()) if name == language]


def commands(block):
    """[(command, printed lines)] of a console block."""
    found = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def masked(lines):
    """The lines that must agree: numbers of figures masked, what comes only once dropped, trailing space cut."""
    out = []
    for line in lines:
        if not DROPPED.search(line):
            out.append(re.sub(r"\d[\d,.:]*( [kMG]?B)?", "#", line) if FIGURES.match(line) else line.rstrip())
    return out


def prepare(folder):
    """A folder that looks like a checkout to the commands, and the environment in which `npmix` and `python` are this interpreter's."""
    (folder / "tests").symlink_to(ROOT / "tests")
    bin = folder / "bin"
    bin.mkdir()
    for name, words in (("python", ""), ("npmix", " -m npmix")):
        (bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (bin / name).chmod(0o755)
    path = os.pathsep.join([str(bin), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(command, folder, env):
    """What a command prints, stdout and stderr as they come."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, text=True, check=True, **streams).stdout.splitlines()


def rewrite():
    """Run every console command and put what it prints into the README; a first round, not kept, compiles."""
    import tempfile

    text = README.read_text()
    for _ in range(2):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            env = prepare(folder)
            new = text
            for block in blocks("console"):
                parts = []
                for command, _ in commands(block):
                    parts += [f"$ {command}\n", *(line.rstrip() + "\n" for line in run(command, folder, env))]
                new = new.replace(f"```console\n{block}```", f"```console\n{''.join(parts)}```")
    README.write_text(new)


if __name__ == "__main__":
    rewrite()
