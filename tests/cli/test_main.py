import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from npmix import __version__, cli
from npmix.errors import InputError

HEAVY = ("numba", "llvmlite", "sentencepiece", "safetensors", "numpy")


def python(code):
    """Run code in a fresh interpreter; its stdout."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_and_help_load_nothing_heavy():
    """`import npmix` and `npmix --help` load neither numba nor sentencepiece nor safetensors, nor even numpy."""
    code = (
        "import sys, json, npmix, npmix.cli\n"
        "try: npmix.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(python(code).splitlines()[-1]))
    assert not loaded & set(HEAVY)
    assert not [name for name in loaded if name.startswith("npmix.") and not name.startswith(("npmix.cli", "npmix.errors"))]


def test_help_is_fast():
    """`npmix --help` answers in under 0.3 s more than an empty interpreter takes: the best of several tries, the machine may be busy."""
    best = 9.0
    for _ in range(8):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "npmix", "--help"], check=True, capture_output=True)
        best = min(best, time.perf_counter() - began)
        if best < 0.3:
            break
    assert best < 0.3


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_table_tells_what_the_commands_tell(name):
    """The lazy table's line is the command's own short help and the first paragraph of its help."""
    command = cli.main.get_command(None, name)
    assert command.name == name
    assert command.short_help == cli.COMMANDS[name][2]
    assert command.help.split("\n\n")[0] == cli.COMMANDS[name][2]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_has_help(name):
    """`npmix COMMAND --help` works and explains every option."""
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.stdout
    for parameter in cli.main.get_command(None, name).params:
        assert parameter.param_type_name == "argument" or parameter.help


def test_version():
    """`npmix --version`, `npmix run --version` and `python -m npmix --version` say the same."""
    assert CliRunner().invoke(cli.main, ["--version"]).stdout == f"npmix {__version__}\n"
    assert CliRunner().invoke(cli.main, ["run", "--version"]).stdout == f"npmix {__version__}\n"
    run = subprocess.run([sys.executable, "-m", "npmix", "--version"], capture_output=True, text=True)
    assert run.stdout == f"npmix {__version__}\n"


@pytest.mark.parametrize("words", ["nothing", "run --nothing", "convert a", "run --top-p nan x", "run -n 0 x"])
def test_usage_errors_exit_with_2(words):
    """What click refuses ends with 2, on stderr, without a traceback."""
    result = CliRunner().invoke(cli.main, words.split())
    assert result.exit_code == 2
    assert result.stdout == "" and "Error" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "error, text",
    [
        (InputError("bad\nthing\x1b[31m"), "bad thing [31m"),
        (MemoryError(), "out of memory: choose a smaller --context or --chunk, or a model packed into fewer bits"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_errors_are_one_line(monkeypatch, error, text):
    """Errors that are no bugs give one line on stderr without control characters, nothing on stdout, exit code 1."""

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(cli.main.get_command(None, "info"), "callback", failing)
    result = CliRunner().invoke(cli.main, ["info", "x"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"npmix: error: {text}\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Any other exception is a bug and is not dressed up as a user's mistake."""

    def failing(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr(cli.main.get_command(None, "info"), "callback", failing)
    assert isinstance(CliRunner().invoke(cli.main, ["info", "x"]).exception, KeyError)


def test_interrupt_exits_with_130(monkeypatch):
    """Ctrl-C outside of a text ends with 130 and no traceback."""

    def failing(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.main.get_command(None, "info"), "callback", failing)
    result = CliRunner().invoke(cli.main, ["info", "x"])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\n")


def test_warnings_are_one_line(monkeypatch):
    """Warnings come as one line on stderr, not as Python prints them."""
    import warnings

    monkeypatch.setattr(cli.main.get_command(None, "info"), "callback", lambda **_: warnings.warn("so so", stacklevel=1))
    result = CliRunner().invoke(cli.main, ["info", "x"])
    assert (result.exit_code, result.stderr) == (0, "npmix: warning: so so\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes that report their closing")
def test_closed_pipe_is_quiet():
    """A reader that goes away ends the command with 141 (128 + SIGPIPE) and nothing on stderr."""
    code = (
        "import npmix.cli as c, sys\n"
        "def callback(**_):\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "c.main.get_command(None, 'info').callback = callback\n"
        "c.main(['info', 'x'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(), error) == (141, b"")
