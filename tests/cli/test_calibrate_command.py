"""`npmix calibrate`: what it says, and that what goes wrong is one line and exit code 1."""

import pytest
from make import TEXT

from npmix.store import open_source
from npmix.store.importance import Importance
from npmix.store.moments import Moments


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_calibrate(npmix_command, tiny, tmp_path, text):
    """It makes both files, the bar ends at 100 %, and a line tells how many tokens there were and what the experts got."""
    out, second = tmp_path / "importance.safetensors", tmp_path / "second.safetensors"
    arguments = ("calibrate", tiny, text, "-o", out, "--second-moments", second, "--tokens", 60, "--window", 32, "--threads", 1)
    result = npmix_command(*arguments)
    assert result.exit_code == 0 and result.stdout == ""
    bar, line = result.stderr.splitlines()[-2:]
    assert bar.startswith("[########################] 100 %  60 of 60 ")
    assert "importance.safetensors: measured on 60 tokens in windows of 32, each expert got " in line
    with open_source(tiny) as source:
        assert Importance.open(out, source.config).tokens == 60
        assert Moments(second, source.config).of("output").shape == (1, 128, 128)
    again = npmix_command(*arguments)
    assert again.exit_code == 1 and again.stderr.startswith("npmix: error: ") and "--force" in again.stderr
    quiet = npmix_command(*arguments, "--force", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_text_from_standard_input(npmix_command, tiny, tmp_path, text):
    """-: the text from standard input gives the same file."""
    for name, source in (("a", text), ("b", "-")):
        result = npmix_command("calibrate", tiny, source, "-o", tmp_path / name, "--tokens", 40, "--quiet", input=TEXT)
        assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_goes_wrong(npmix_command, tiny, tmp_path, text):
    """No model, no text, an empty text, one that is not UTF-8, a folder for an output: one line on stderr, exit code 1."""
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    for model, source, out in (
        (tmp_path / "none", text, "i"), (tmp_path, text, "i"), (tiny, tmp_path / "none", "i"), (tiny, tmp_path / "empty", "i"),
        (tiny, tmp_path / "latin", "i"), (tiny, tmp_path, "i"), (tiny, text, "."), (tiny, text, "none/i"),
    ):  # fmt: skip
        result = npmix_command("calibrate", model, source, "-o", tmp_path / out, "--quiet")
        assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith("npmix: error: ") and result.stdout == ""
    assert npmix_command("calibrate", tiny, text).exit_code == 2
    assert not (tmp_path / "i").exists()
