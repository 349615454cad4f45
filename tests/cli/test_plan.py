"""`npmix plan`: the table, the JSON, what is given, assumed or measured, and what goes wrong."""

import json
import subprocess
import sys

import pytest

from npmix.cli import plan as command
from npmix.store.recipe import QUANTS


def found(result):
    """The JSON of a call that went well."""
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_table_and_json_agree(npmix_command):
    """The named model without any files: a line for each width below each context and cache, the same numbers as --json."""
    words = ["plan", "mixtral-8x7b", "--ram", "16G", "--context", "8192,4096", "--bandwidth", "40", "--disk", "1.3", "--threads", "2"]
    data = found(npmix_command(*words, "--json"))
    lines = npmix_command(*words).stdout.splitlines()
    assert (data["ram"], data["ram_is"], data["memory_speed"], data["disk_speed_is"]) == (16 << 30, "given", 40e9, "given")
    assert "16.00 GiB (given)" in lines[1] and "memory 40.0 GB/s (given), disk 1.3 GB/s (given), 85 % of them used" in lines[2]
    shown = [line.split() for line in lines if line.split()[:1] and line.split()[0] in QUANTS]
    assert [words[0] for words in shown] == [row["width"] for row in data["rows"]] == [*QUANTS] * 4
    assert [line.split(" positions")[0] for line in lines if "positions" in line] == ["4,096"] * 2 + ["8,192"] * 2
    for words, row in zip(shown, data["rows"]):
        assert words[1:5] == [*command.size(row["weights"]).split(), *command.size(row["total"]).split()]
        assert words[-1] == f"{row['tokens_per_s']:.3g}" and row["verdict"] in ("fits", "streams")
    assert " all " in "".join(lines) and " % of the experts " in "".join(lines)


def test_a_folder_and_too_little_memory(npmix_command, tiny, tmp_path):
    """A Hugging Face folder by its config alone; a store's own sizes stand first; without enough memory the least that would do is named."""
    data = found(npmix_command("plan", tiny, "--ram", "64M", "--quant", "q4,q8", "--kv", "q8", "--json"))
    assert [(row["width"], row["context"], row["kv"], row["verdict"]) for row in data["rows"]] == [
        ("q8", 512, "q8", "too small"), ("q4", 512, "q8", "too small"),
    ]  # fmt: skip
    text = npmix_command("plan", tiny, "--ram", "64M", "--quant", "q4", "--kv", "q8").stdout
    assert f"no, it needs {command.size(data['rows'][1]['least'])}" in text
    assert npmix_command("convert", tiny, tmp_path / "q8", "--quant", "q8", "--quiet").exit_code == 0
    text = npmix_command("plan", tmp_path / "q8", "--quant", "q4", "--kv", "f16").stdout
    assert [line.split("  ")[0] for line in text.splitlines()[-2:]] == ["as it is (q8)", "q4"]


def test_this_machine(npmix_command):
    """Without --ram it is what can be had now, with a share that of the machine; speeds nobody gave are assumed."""
    now, half = (found(npmix_command("plan", *words, "--json", "--quant", "q4")) for words in ([], ["--ram", "0.5"]))
    assert now["ram"] > 0 and now["ram_is"] == "what can be had now" and half["ram_is"] == "given"
    assert (now["model"], now["memory_speed_is"], now["disk_speed_is"]) == ("mixtral-8x7b", "assumed", "assumed")


def test_measure(npmix_command, tiny, tmp_path, monkeypatch):
    """--measure measures what was not given: memory, and the disk on a file of the model, or on a temporary one that goes away."""
    from npmix.benchmark import disk
    from npmix.kernels import ceilings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "WRITTEN", disk.PIECE)
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda threads: 10.0 * threads)
    for model in (tiny, "mistral-7b"):
        data = found(npmix_command("plan", model, "--measure", "--threads", 3, "--json"))
        assert (data["memory_speed"], data["memory_speed_is"], data["disk_speed_is"]) == (30e9, "measured", "measured")
        assert data["disk_speed"] > 1e6 and list(tmp_path.iterdir()) == []
    data = found(npmix_command("plan", tiny, "--measure", "--bandwidth", 7, "--disk", 0.5, "--json"))
    assert (data["memory_speed"], data["disk_speed"], data["memory_speed_is"], data["disk_speed_is"]) == (7e9, 5e8, "given", "given")


def test_loads_no_numba():
    """The named model's plan imports neither numba nor llvmlite nor sentencepiece, and makes no file."""
    code = (
        "import sys, npmix.cli\n"
        "try: npmix.cli.main(['plan', '--ram', '8G'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print([n for n in ('numba', 'llvmlite', 'sentencepiece') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words, said",
    [("nothing", "no model of that name is known"), ("--ram 8X", "ram is '8X'"), ("--ram 0", "ram is '0'"), ("--context 40000", "context is 40000"),
     ("--ram -1G", "ram is '-1G'")],
)  # fmt: skip
def test_errors_are_one_line(npmix_command, words, said):
    """What is no model, no size or beyond the model: one line on stderr, nothing on stdout, exit code 1."""
    result = npmix_command("plan", *words.split())
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert result.stderr.startswith("npmix: error: ") and said in result.stderr


@pytest.mark.parametrize(
    "words", ["--context 0", "--context a", "--kv f8", "--quant q4,", "--quant q9", "--threads 0", "--disk 0", "--bandwidth nan", "a b"]
)
def test_usage_errors(npmix_command, words):
    """Numbers out of range and words that are none: exit code 2."""
    result = npmix_command("plan", *words.split())
    assert result.exit_code == 2 and "Error" in result.stderr and result.stdout == ""
