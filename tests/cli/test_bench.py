import json
import subprocess
import sys

import pytest

from npmix.benchmark import measure


@pytest.fixture(scope="session")
def saved(tiny, npmix_command, tmp_path_factory):
    """(result of the command, file of --json) of one small measurement with cold and warm start."""
    file = tmp_path_factory.mktemp("bench") / "b.json"
    words = ["--prompt", "9,20", "--depth", "0,12", "--tokens", "4", "--turns", "2", "--threads", "1,2", "--chunk", "8,64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "LEAST_S", 1e-9)
        patch.setattr(measure, "READ_BYTES", 1 << 20)
        result = npmix_command("bench", "-m", tiny, *words, "--json", file)
    assert result.exit_code == 0, result.stderr
    return result, file


@pytest.mark.compiled
def test_prints_figures_and_json_last(saved):
    """Every part of the report is there, ceilings first, and the last line is the JSON of --json."""
    result, file = saved
    *table, last = result.stdout.splitlines()
    labels = [line.split()[0] for line in table if line[0] != " "]
    assert labels == ["machine", "software", "model", "setting", "ceilings", "start", "memory", "prefill", "decode", "scaling"]
    found = json.loads(last)
    assert found == json.loads(file.read_text())
    assert found["model"]["format"] == "bf16 (100 %)" and found["settings"] == {"kv": "f16", "turns": 2}
    assert 0 < found["start"]["warm_s"] < found["start"]["cold_s"]
    assert (len(found["prefill"]), len(found["decode"]), len(found["scaling"])) == (8, 4, 6)
    assert found["ceilings"][0]["read_gbs"]["median"] > 0.1 and found["ceilings"][0]["int8_gops"]["median"] > 0.1


@pytest.mark.compiled
def test_compare_prints_every_figure(saved, tmp_path, npmix_command):
    """Two saved results as a table, a line a figure, what differs above it, the same as JSON in the last line and in --json."""
    _, file = saved
    new = json.loads(file.read_text())
    new["settings"]["turns"], new["machine"]["cpu"] = 7, "another\n"
    new["decode"] = new["decode"][1:]
    other = tmp_path / "new.json"
    other.write_text(json.dumps(new))
    result = npmix_command("bench", "--compare", file, other, "--json", tmp_path / "c.json")
    assert result.exit_code == 0
    *table, last = result.stdout.splitlines()
    found = json.loads(last)
    assert found == json.loads((tmp_path / "c.json").read_text())
    assert [row["what"] for row in found["differs"]] == ["machine cpu", "settings turns"]
    for row in found["figures"]:
        (line,) = [line for line in table if f" {row['name']}  " in line]
        assert "within the spread" in line  # a figure measured once is equal on both sides
    assert any(line.startswith("only old  decode 4 at 0, 1 thread") for line in table)
    assert any("the machines differ" in line for line in table) and any("another\\n" in line for line in table)


@pytest.mark.compiled
def test_compare_loads_no_numbers(saved):
    """Comparing needs no model: neither numba nor numpy nor safetensors is imported."""
    _, file = saved
    code = (
        "import sys, npmix.cli\n"
        f"try: npmix.cli.main(['bench', '--compare', {str(file)!r}, {str(file)!r}])\n"
        "except SystemExit as e: assert not e.code\n"
        "print([n for n in ('numba', 'numpy', 'safetensors', 'sentencepiece') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_compare_refuses_other_files(tmp_path, npmix_command):
    """A file that is no result: one line on stderr, exit code 1, nothing on stdout."""
    bad = tmp_path / "bad.json"
    bad.write_text('{"a": 1}')
    for file in (bad, tmp_path / "missing.json"):
        result = npmix_command("bench", "--compare", file, bad)
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr.startswith("npmix: error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    ["--prompt 0", "--prompt a", "--prompt 16,", "--prompt 1,,2", "--depth -1", "--threads 0,1", "--threads 2000", "--chunk 0",
     "--turns 0", "--kv f8", "--compare a.json", "--compare a.json b.json --prompt 16", "--compare a.json b.json -m x",
     "--compare a.json b.json --no-start"],
)  # fmt: skip
def test_usage_errors(words, npmix_command):
    """Lists that are none, numbers out of range, settings beside --compare: exit code 2."""
    result = npmix_command("bench", *words.split())
    assert result.exit_code == 2 and "Error" in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    "words, said",
    [("--prompt 513", "prompt is 513"), ("--depth 500 --tokens 13", "depth is 500"), ("--tokens 600", "tokens is 600")],
)
def test_lengths_beyond_the_model(tiny, npmix_command, words, said):
    """More positions than the model has: one line that names both and exit code 1, before anything is measured."""
    result = npmix_command("bench", "-m", tiny, *words.split())
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith(f"npmix: error: {said}, expected ") and "512 positions" in result.stderr
    assert len(result.stderr.splitlines()) == 1
