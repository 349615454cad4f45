import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from make import tiny_hf


@pytest.fixture(scope="module")
def store(tiny, npmix_command, tmp_path_factory):
    """The tiny model packed by the command."""
    folder = tmp_path_factory.mktemp("stores") / "q8"
    result = npmix_command("convert", tiny, folder, "--quant", "q8", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    return folder


def failed(result):
    """stderr of a command that ended with 1 and one line."""
    assert result.exit_code == 1 and result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("npmix: error: ") and "Traceback" not in result.stderr
    return line


def test_convert_tells_what_it_made(npmix_command, tiny, tmp_path):
    """Without --quiet the bar ends at 100 % and a line tells the sizes."""
    result = npmix_command("convert", tiny, tmp_path / "q4", "--quant", "q4", "--threads", 2)
    assert result.exit_code == 0 and result.stdout == ""
    bar, line = result.stderr.splitlines()[-2:]
    assert bar.startswith("[########################] 100 %")
    assert re.search(r"q4: [\d,]+ weights in [\d.]+ kB, [\d.]+ bits per weight$", line)


def test_verify_and_damage(npmix_command, store, tmp_path):
    """verify says what it checked; one flipped byte is found and named, exit code 1."""
    good = npmix_command("verify", store, "--quiet")
    assert good.exit_code == 0 and "match their sha256" in good.stdout
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    file = copy / "rest.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "rest.safetensors" in failed(npmix_command("verify", copy, "--quiet"))


def test_info(npmix_command, tiny, store):
    """info lists config and weights by kind for both kinds of folders; --json holds the same numbers."""
    for folder in (tiny, store):
        table = npmix_command("info", folder).stdout
        found = json.loads(npmix_command("info", folder, "--json").stdout)
        assert found["config"]["n_layers"] == 2 and "2 layers, dim 64" in table
        assert f"{found['total']['weights']:,}" in table and "experts" in table
    assert found["weights"]["experts"]["formats"] == ["q8 group 32"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are any bytes")
def test_names_that_are_no_text(npmix_command, store, tmp_path):
    """A byte in a path that is no UTF-8 and control characters in a manifest are printed as escapes."""
    odd = shutil.copytree(store, os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff\xc3\xa9"))
    path = os.path.join(odd, "npmix.json")
    with open(path) as f:
        manifest = json.load(f)
    manifest["source"]["name"] = "x\x1b[2J\nkind  y"
    with open(path, "w") as f:
        json.dump(manifest, f)
    found = npmix_command("info", odd)
    assert found.exit_code == 0 and "odd\\udcffé" in found.stdout and "x\\x1b[2J\\nkind  y (" in found.stdout
    for command in (["info", odd], ["info", odd, "--json"], ["verify", odd, "--quiet"]):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        result = subprocess.run([sys.executable, "-m", "npmix", *command], capture_output=True, env=environment)
        assert (result.returncode, result.stderr) == (0, b"") and b"odd\\udcff\\" in result.stdout


def test_refusals(npmix_command, tiny, store, tmp_path):
    """A DST in use, a SRC that is none, a DIR that is none: one line; contradicting options: usage."""
    assert "--force" in failed(npmix_command("convert", tiny, store, "--quant", "q8"))
    failed(npmix_command("convert", tmp_path / "none", tmp_path / "out", "--quant", "q8"))
    assert not (tmp_path / "out").exists()
    failed(npmix_command("verify", tmp_path / "none"))
    failed(npmix_command("info", tmp_path / "none"))
    for arguments in (["--quant", "q9"], [], ["--quant", "q4", "--group", "128"]):
        assert npmix_command("convert", tiny, tmp_path / "x", *arguments).exit_code == 2
    assert not (tmp_path / "x").exists()


def test_force_replaces(npmix_command, tiny, store, tmp_path):
    """--force makes a store anew over an old one."""
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    (copy / "npmix.json").write_text("{}")
    assert npmix_command("convert", tiny, copy, "--quant", "q8", "--force", "--quiet").exit_code == 0
    assert npmix_command("verify", copy, "--quiet").exit_code == 0


@pytest.mark.compiled
def test_warmup_leaves_nothing_to_compile(npmix_command, store):
    """After `npmix warmup` another one finds every kernel in the cache, and a run compiles nothing."""
    assert npmix_command("warmup", "-m", store, "--quiet").stderr == ""
    second = subprocess.run([sys.executable, "-m", "npmix", "warmup", "-m", store], capture_output=True, text=True)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "npmix: all kernels are compiled already\n")
    run = subprocess.run([sys.executable, "-m", "npmix", "run", "-m", store, "-n", "4", "def f(x): return"], capture_output=True, text=True)
    assert run.returncode == 0 and "compiling" not in run.stderr


def test_warmup_of_a_short_model(npmix_command, tmp_path):
    """A model of fewer positions than warmup would take is warmed up with those it has."""
    short = tiny_hf(tmp_path / "short", max_position_embeddings=32, num_hidden_layers=1)
    assert npmix_command("warmup", "-m", short, "--quiet").exit_code == 0
