"""`npmix evaluate` at the command line: what it prints, keeps and refuses."""

import json
import math

import pytest
from make import TEXT

SETTINGS = ["--context", "32", "--threads", "1", "--limit", "2"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.compiled
def test_lines_and_json(tiny, text, tmp_path, npmix_command):
    """A few lines on stdout that say what was measured, progress on stderr, and everything in the file of --json."""
    result = npmix_command("evaluate", tiny, text, *SETTINGS, "--against", tiny, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    labels = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert labels == ["model", "text", "perplexity", "against", "ratio", "KL, nats", "same top"]
    assert f"{found['perplexity']['value']:.4f} ± {found['perplexity']['standard_error']:.4f}" in result.stdout
    assert "2 windows of 32, 30 tokens scored" in result.stdout and "100.000 ± 0.000 %" in result.stdout
    assert found["kl"]["mean"] == {"value": 0, "standard_error": 0} and found["settings"]["kv"] == "f16"
    assert "100 %" in result.stderr and "124 tok of 124 tok" in result.stderr and "so far" in result.stderr
    assert math.isclose(math.log(found["perplexity"]["value"]), found["log_perplexity"]["value"])


@pytest.mark.compiled
def test_saved_logits_and_stride(tiny, text, tmp_path, npmix_command):
    """--save-logits, then --against-logits; --quiet says nothing else; --stride also shows the guide's own weighting."""
    words = [tiny, text, *SETTINGS, "--stride", "16", "--quiet"]
    result = npmix_command("evaluate", *words, "--save-logits", tmp_path / "base.lp")
    assert result.exit_code == 0 and "windows of up to 32, one every 16" in result.stdout and "Hugging Face's guide" in result.stdout
    result = npmix_command("evaluate", *words, "--against-logits", tmp_path / "base.lp")
    assert result.exit_code == 0 and f"{tmp_path / 'base.lp'}, saved from {tiny}" in result.stdout
    assert "npmix:" not in result.stderr.replace("npmix: compiling", "") and "%" not in result.stderr


@pytest.mark.compiled
def test_standard_input(tiny, npmix_command):
    """TEXT -: standard input, in UTF-8 or an error that says where it is not."""
    result = npmix_command("evaluate", tiny, "-", *SETTINGS, "--quiet", input=TEXT)
    assert result.exit_code == 0 and result.stdout.splitlines()[2].startswith("perplexity  ")
    result = npmix_command("evaluate", tiny, "-", *SETTINGS, input=b"ab\xff")
    assert result.exit_code == 1 and "standard input is not UTF-8: byte 0xff at offset 2" in result.stderr


@pytest.mark.parametrize("words, said", [
    (["MODEL", "none.txt"], "none.txt: No such file"), (["none", "TEXT"], "none is not a folder"),
    (["MODEL", "TEXT", "--context", "600"], "context is 600"), (["MODEL", "TEXT", "--context", "400"], "fewer than one window of 400"),
    (["MODEL", "TEXT", "--context", "8", "--stride", "9"], "stride is 9"), (["MODEL", "TEXT", "--kv", "f8"], "kv is 'f8'"),
    (["MODEL", "TEXT", "--against", "none"], "none is not a folder"), (["MODEL", "TEXT", "--against-logits", "TEXT"], "no file of saved log-prob"),
    (["MODEL", "TEXT", "--save-logits", "TEXT"], "choose another name"), (["MODEL", "TEXT", "--save-logits", "none/x"], "No such file"),
])  # fmt: skip
def test_errors_are_one_line(tiny, text, words, said, npmix_command, monkeypatch, tmp_path):
    """Whatever is wrong: one line on stderr, nothing on stdout, exit code 1, and the text file untouched."""
    monkeypatch.chdir(tmp_path)
    words = [{"MODEL": tiny, "TEXT": text}.get(word, word) for word in words]
    words += [] if "--context" in words else ["--context", "32"]
    result = npmix_command("evaluate", *words)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("npmix: error: ") and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert text.read_text() == TEXT and [f.name for f in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("words", ["a", "a b --context 0", "a b --limit 0", "a b --stride x", "a b --against c --against-logits d"])
def test_usage_errors(words, npmix_command):
    """Missing arguments, numbers out of range, two bases: exit code 2."""
    result = npmix_command("evaluate", *words.split())
    assert result.exit_code == 2 and "Error" in result.stderr and result.stdout == ""
