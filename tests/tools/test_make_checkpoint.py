"""tools/make_checkpoint.py: random models of any size, as a packed store and as a Hugging Face folder."""

import sys
from pathlib import Path

import numpy as np
import pytest

from npmix.checkpoint import open_checkpoint
from npmix.convert import verify
from npmix.quant.pack import dequantize
from npmix.store import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

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
