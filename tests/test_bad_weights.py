"""Bad checkpoints: each is a one-line error of the right kind that names what is wrong, and leaves nothing behind."""

import json

import numpy as np
import pytest
from make import TINY, encode, tiny_arrays, tiny_hf, write_safetensors

from npmix.checkpoint import open_checkpoint
from npmix.convert import convert, verify
from npmix.errors import CheckpointError, ConfigError, ConversionError

INDEX = "model.safetensors.index.json"


def refused(path, error=CheckpointError):
    """Open a folder that must be refused; returns the message."""
    with pytest.raises(error) as e:
        open_checkpoint(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def raw_tensors():
    return {name: ("F32", a.shape, encode(a, "f32")) for name, a in tiny_arrays(TINY).items()}


def test_no_folder_no_config_no_weights(tmp_path):
    """What is missing is named."""
    assert "not a folder" in refused(tmp_path / "none")
    assert "config.json" in refused(tmp_path, ConfigError)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert "model.safetensors" in refused(tmp_path)


def test_pickles_are_never_read(tmp_path):
    """A checkpoint in .bin or .pt only: the message asks for safetensors."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "safetensors" in refused(tmp_path) and "pytorch_model.bin" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": }', "\x00", "[" * 100_000])
def test_config_that_is_no_object(tmp_path, text):
    """A damaged config.json is a ConfigError that names it."""
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refused(tmp_path, ConfigError)


def test_damaged_generation_config(tmp_path):
    """generation_config.json is read too, and its errors are the same kind."""
    folder = tiny_hf(tmp_path)
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refused(folder, ConfigError)


def test_missing_shard(tmp_path):
    """A shard that the index names and the folder lacks."""
    folder = tiny_hf(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refused(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(tmp_path, keep):
    """A shard cut short, in its header or in its data."""
    path = tiny_hf(tmp_path, shards=2) / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert path.name in refused(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "c:x.safetensors", "..", ".hidden.safetensors",
     "x.bin", "", 7, None, ["x.safetensors"], "x\0.safetensors"],
)  # fmt: skip
def test_an_index_may_not_leave_the_folder(tmp_path, name):
    """Index entries are plain .safetensors names in the same folder; anything else is refused unopened."""
    folder = tiny_hf(tmp_path / "hf", shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    assert "plain name" in refused(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {}}'])
def test_a_damaged_index(tmp_path, index):
    """An index that is no index."""
    folder = tiny_hf(tmp_path, shards=2)
    (folder / INDEX).write_text(index)
    assert INDEX in refused(folder)


def test_an_index_that_lies(tmp_path):
    """A tensor that is not in the file the index names."""
    folder = tiny_hf(tmp_path, shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": "model-00001-of-00002.safetensors"}))
    assert "lm_head.weight" in refused(folder)


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight", "model.norm.weight"])
def test_missing_tensor(tmp_path, missing):
    """A tensor that the config asks for and no file has."""
    raw = raw_tensors()
    del raw[missing]
    tiny_hf(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", raw)
    assert missing in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "F64", "F8_E4M3", "U8"])
def test_wrong_dtype(tmp_path, dtype):
    """A tensor in a dtype npmix does not compute from (quantised checkpoints, for example)."""
    raw = raw_tensors()
    shape = raw["lm_head.weight"][1]
    raw["lm_head.weight"] = (dtype, shape, bytes(np.prod(shape) * (8 if dtype == "F64" else 1)))
    tiny_hf(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", raw)
    message = refused(tmp_path)
    assert dtype in message and "lm_head.weight" in message


def test_wrong_shape(tmp_path):
    """A tensor of another shape than config.json says: also one with the same number of weights."""
    for key, value in (("vocab_size", 385), ("intermediate_size", 95), ("num_hidden_layers", 3), ("num_local_experts", 5)):
        folder = tiny_hf(tmp_path, shards=1)
        (folder / "config.json").write_text(json.dumps({**TINY, key: value}))
        refused(folder)
    raw = raw_tensors()
    dtype, (rows, cols), data = raw["lm_head.weight"]
    raw["lm_head.weight"] = (dtype, (cols, rows), data)
    write_safetensors(tiny_hf(tmp_path) / "model.safetensors", raw)
    assert "lm_head.weight" in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name, ours",
    [
        ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "layers.1.experts.2.w_up"),
        ("model.layers.0.block_sparse_moe.gate.weight", "layers.0.router"),
        ("model.norm.weight", "norm"),
        ("model.embed_tokens.weight", "tok_embeddings"),
    ],
)
def test_nonfinite_weights(tmp_path, dtype, bad, name, ours):
    """NaN or infinity anywhere: verify and convert name the tensor, and convert leaves nothing behind."""
    arrays = tiny_arrays(TINY)
    arrays[name].reshape(-1)[-3] = bad
    if dtype == "bf16":  # our encoder rounds; NaN and infinity are cut instead
        raw = {k: ("BF16", a.shape, (a.view(np.uint32) >> 16).astype(np.uint16).tobytes()) for k, a in arrays.items()}
        folder = tiny_hf(tmp_path / "hf")
        write_safetensors(folder / "model.safetensors", raw)
    else:
        folder = tiny_hf(tmp_path / "hf", dtype=dtype, arrays=arrays)
    with pytest.raises(CheckpointError, match=ours):
        verify(folder)
    with pytest.raises(ConversionError, match=ours) as e:
        convert(folder, tmp_path / "store", "q4")
    assert "\n" not in str(e.value) and "NaN or infinite" in str(e.value)
    assert not (tmp_path / "store").exists()


def test_weights_too_large_for_a_scale(tmp_path):
    """A weight whose float16 scale would overflow is refused by name, not clipped."""
    arrays = tiny_arrays(TINY)
    arrays["lm_head.weight"][5, 5] = 1e9
    folder = tiny_hf(tmp_path / "hf", dtype="f32", arrays=arrays)
    verify(folder)
    with pytest.raises(ConversionError, match="output.*too large"):
        convert(folder, tmp_path / "store", "q8")
    assert not (tmp_path / "store").exists()
