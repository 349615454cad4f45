import os
import re
import subprocess
import sys

import pytest
import readme

from npmix import cli

TEXT = readme.README.read_text()
INSTALL = 'python3 -m venv .venv && . .venv/bin/activate && pip install . && npmix run "def fibonacci(n):"'
TEST = "python3 -m venv .venv && . .venv/bin/activate && pip install '.[test]' && python -m pytest -n 2 --dist loadfile"


@pytest.mark.compiled
@pytest.mark.skipif(os.name != "posix", reason="the README's commands are a shell's")
def test_commands_print_what_is_shown(tmp_path):
    """Every command of the README runs and prints the lines that stand below it."""
    env = readme.prepare(tmp_path)
    shown = [pair for block in readme.blocks("console") for pair in readme.commands(block)]
    assert len(shown) >= 5
    for command, lines in shown:
        assert readme.masked(readme.run(command, tmp_path, env)) == readme.masked(lines), command


def test_first_lines_to_paste():
    """Two shell lines: one installs and prints text, one installs the test extra and runs the tests; .ci/run takes the second from there."""
    assert [block.strip() for block in readme.blocks("sh")] == [INSTALL, TEST]
    assert "grep -m 1 -F \"pip install '.[test]'\" README.md" in (readme.ROOT / ".ci" / "run").read_text()
    assert next(line for line in TEXT.splitlines() if "pip install '.[test]'" in line) == TEST


def test_five_lines_say_what_it_is():
    """What npmix is and is not stands in five lines under the title."""
    head = TEXT.split("\n## ")[0].splitlines()
    assert head[0] == "# npmix" and len([line for line in head[1:] if line]) == 5


@pytest.mark.compiled
def test_python_example_runs(tmp_path):
    """The Python block runs as it stands."""
    (code,) = readme.blocks("python")
    env = readme.prepare(tmp_path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_reference_names_every_option(name):
    """The reference of a command names exactly the options that it has."""
    section = re.search(rf"^### `npmix {name}\b.*?(?=^##)", TEXT, re.M | re.S).group()
    named = set(re.findall(r"`(--?[a-z][a-z-]*)`", section))
    options = {o for p in cli.main.get_command(None, name).params if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)}
    assert named == options


def test_file_map_is_whole():
    """The file map names every module and folder of the package, and nothing that is not there."""
    (tree,) = [body for body in readme.blocks("") if body.startswith("npmix/")]
    named = set(re.findall(r"(?:^|\s)([a-z_]+(?:\.py|/))", tree.replace("; reference.py", ""))) - {"npmix/", "tests/", "tools/"}
    there = {p.name + ("/" if p.is_dir() else "") for p in (readme.ROOT / "npmix").iterdir() if not p.name.startswith("_")}
    assert named == {name for name in there if name.endswith((".py", "/"))}
