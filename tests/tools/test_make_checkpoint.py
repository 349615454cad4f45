"""tools/make_checkpoint.py: random models of any size, as a packed store and as a Hugging Face folder."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npmix.checkpoint import open_checkpoint
from npmix.convert import convert, verify
from npmix.quant.pack import dequantize
from npmix.store import open_store
from npmix.store.layout import MANIFEST

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import make_checkpoint as tool  # noqa: E402

SIZES = {"dim": 64, "hidden": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "experts": 4, "vocab": 384, "positions": 512, "layers": 2}
OPTIONS = [word for name, value in SIZES.items() for word in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="module")
def source():
    return tool.RandomSource(tool.make_config(**SIZES))


def test_no_row_is_used_twice(source):
    """All matrices are windows of one pool, and still no two of their rows are equal."""
    for width in {shape[1] for shape in source.config.tensor_shapes().values() if len(shape) == 2}:
        names = [name for name, shape in source.config.tensor_shapes().items() if shape[1:] == (width,)]
        rows = np.concatenate([source.tensor(name).data for name in names])
        assert len(np.unique(rows, axis=0)) == len(rows)


def test_weights_have_mean_zero_and_embeddings_are_larger(source):
    """Weights are zero-mean with variance 1 / dim; embeddings have the standard deviation asked for."""
    for name, std in (("layers.0.experts.1.w_down", 64**-0.5), ("tok_embeddings", tool.EMBEDDING_STD)):
        w = dequantize(source.tensor(name))
        assert abs(w.mean()) < 5 * std / np.sqrt(w.size)
        assert abs(w.std() / std - 1) < 0.05


def test_huggingface_folder_holds_the_source(tmp_path, source):
    """Written as bf16 shards with an index, every tensor reads back bit for bit."""
    tool.write_huggingface(source, tmp_path / "hf", shard_bytes=100_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    with open_checkpoint(tmp_path / "hf") as found:
        assert found.config == source.config
        for name in source.names():
            assert np.array_equal(dequantize(found.tensor(name)), dequantize(source.tensor(name))), name


@pytest.mark.compiled
def test_store_verifies_and_routing_is_near_uniform(tmp_path, capsys):
    """The command makes a store whose digests hold, and prints a histogram in which no expert is starved or favoured."""
    tool.main([str(tmp_path / "q4"), *OPTIONS, "--quant", "q4", "--tokens", "200"])
    printed = capsys.readouterr().out
    assert verify(tmp_path / "q4")["files"] == 3
    assert printed.count("layer ") == 2 and "repeats" in printed and "guessed" in printed
    for row in tool.measure_routing(tmp_path / "q4", 200):
        assert abs(row["shares"].sum() - 1) < 1e-9
        assert 0.1 < row["shares"].min() and row["shares"].max() < 0.45
        assert row["repeats"] < 0.5


def test_uniform_store_has_one_format(tmp_path):
    """--uniform packs every matrix like the experts."""
    tool.main([str(tmp_path / "u"), *OPTIONS, "--uniform", "--tokens", "0"])
    with open_store(tmp_path / "u") as store:
        matrices = [store.tensor(name) for name in store.names() if not name.endswith(("norm", "router"))]
        assert {(tensor.format, tensor.group) for tensor in matrices} == {("q4", 128)}


@pytest.mark.compiled
def test_the_next_layers_experts_are_guessed_neither_always_nor_never(tmp_path):
    """With the sizes by default 60 to 80 % of the experts are guessed right in every layer, however deep (here within chance: 1,024 guesses)."""
    deep = {**SIZES, "dim": 256, "hidden": 896, "layers": 12, "experts": 8}
    tool.main([str(tmp_path / "q4"), *(f"--{name.replace('_', '-')}={n}" for name, n in deep.items()), "--tokens", "0"])
    rates = [row["guessed"] for row in tool.measure_routing(tmp_path / "q4", 512)[1:]]
    assert 0.6 < np.mean(rates) < 0.8 and 0.55 < min(rates) and max(rates) < 0.85


# ---- the streamed source ------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_streamed_conversion_is_the_conversion_of_the_same_files(tmp_path, source, capsys):
    """--stream gives the tensors that converting the written checkpoint gives, and reports memory, rate and processor time."""
    tool.main([str(tmp_path / "streamed"), *OPTIONS, "--stream", "--tokens", "0"])
    printed = capsys.readouterr().out
    for words in ("MB/s", "processor", "random pool"):
        assert words in printed
    tool.write_huggingface(source, tmp_path / "hf")
    converted, streamed = files(convert(tmp_path / "hf", tmp_path / "converted", "q4")), files(tmp_path / "streamed")
    assert {name for name in converted if converted[name] != streamed[name]} == {"npmix.json"}  # it names the source


CHILD = """
import os, random, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import make_checkpoint as tool
out, part, timer = sys.argv[2], float(sys.argv[3]), None

def progress(done, total, what):
    global timer
    if done >= part * total and timer is None:  # then within a millisecond or two: in a tensor, a sync or a rename
        timer = threading.Timer(random.random() * 0.002, os.kill, (os.getpid(), signal.SIGKILL))
        timer.start()

config = tool.make_config(**{**SIZES, "layers": 8})
tool.convert(tool.RandomSource(config), out, "q4", progress=progress)
os._exit(0)
""".replace("SIZES", repr(SIZES))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_conversions_go_on(tmp_path):
    """Killed with kill -9 at any moment and started again, as often as it takes: the files of an unbroken conversion, bit for bit."""
    killed = []
    for part in (0.2, 0.5, 0.8):
        if not (tmp_path / "killed" / MANIFEST).exists():
            command = [sys.executable, "-c", CHILD, str(TOOLS), str(tmp_path / "killed"), str(part)]
            killed.append(subprocess.run(command, capture_output=True, timeout=300).returncode)
    assert killed[0] == -signal.SIGKILL and set(killed) <= {0, -signal.SIGKILL}
    whole = tool.RandomSource(tool.make_config(**{**SIZES, "layers": 8}))
    for name in ("whole", "killed"):
        if not (tmp_path / name / MANIFEST).exists():
            convert(whole, tmp_path / name, "q4")
    assert verify(tmp_path / "killed")["files"] == 9
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
