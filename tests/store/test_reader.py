"""Opening a store: what the manifest and the files claim is checked before anything is mapped."""

import json
import shutil

import pytest
from make import tiny_hf

from npmix.checkpoint import open_checkpoint
from npmix.convert import convert
from npmix.errors import CheckpointError, ConfigError, NpmixError, StoreError
from npmix.generate import BUNDLED
from npmix.quant.pack import dequantize
from npmix.store import open_source, open_store
from npmix.store.layout import VERSION


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return convert(tiny_hf(folder / "hf", tokenizer=True), folder / "store", "q4")


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


def change(store, edit):
    path = store / "npmix.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip(made):
    """Dense tensors come back as they were (norms as float32), packed ones close, config and tokenizer too."""
    with open_store(made) as ours, open_checkpoint(made.parent / "hf") as source:
        assert ours.config == source.config and ours.kind == "store"
        assert ours.tokenizer_path == made / "tokenizer.model" and not ours.is_instruct
        assert ours.names() == source.names()
        for name in ours.names():
            x, y = dequantize(ours.tensor(name)), dequantize(source.tensor(name))
            assert not ours.tensor(name).data.flags.writeable
            if name.endswith(("norm", "router")):
                assert (x == y).all()
            else:
                assert ((x - y) ** 2).sum() < (0.01 if ".experts." in name else 5e-5) * (y**2).sum()
        assert ours.tensor("layers.0.router").format == "bf16"


def test_open_source_chooses(made, tmp_path):
    """A folder with npmix.json is a store, one with config.json a checkpoint, anything else an error."""
    with open_source(made) as a, open_source(made.parent / "hf") as b:
        assert (a.kind, b.kind) == ("store", "huggingface")
    for path in (tmp_path, tmp_path / "none", made / "npmix.json"):
        with pytest.raises(CheckpointError):
            open_source(path)


def test_a_newer_version_says_upgrade(store):
    """A store of a newer format version is refused with the advice to upgrade."""
    change(store, lambda m: m.update(version=VERSION + 1, surprise=1))
    with pytest.raises(StoreError, match="upgrade npmix"):
        open_store(store)


def test_version_1(made, store, tmp_path):
    """A store of version 1 is read if all its matrices are q8, in any group; its 4-bit format is gone, and the message says what to do."""
    old = convert(made.parent / "hf", tmp_path / "old", "q8")
    with open_store(old) as ours:
        expected = dequantize(ours.tensor("layers.0.wq"))
    change(old, lambda m: m.update(version=1))
    with open_store(old) as ours:
        assert (dequantize(ours.tensor("layers.0.wq")) == expected).all()
    with open_store(BUNDLED) as ours:  # packed by the first npmix
        assert ours.manifest["version"] == 1 and ours.tensor("tok_embeddings").group == 64
    change(store, lambda m: m.update(version=1))
    with pytest.raises(StoreError, match="older npmix.*convert again") as e:
        open_store(store)
    assert "\n" not in str(e.value) and str(store) in str(e.value)


LIES = {
    "no format": lambda m: m.pop("format"),
    "other format": lambda m: m.update(format="x"),
    "version is text": lambda m: m.update(version="1"),
    "version zero": lambda m: m.update(version=0),
    "field missing": lambda m: m.pop("recipe"),
    "field unknown": lambda m: m.update(more=1),
    "tensors is a list": lambda m: m.update(tensors=[]),
    "is_instruct is a number": lambda m: m.update(is_instruct=1),
    "config missing a field": lambda m: m["config"].pop("dim"),
    "config is a list": lambda m: m.update(config=[]),
    "config of another size": lambda m: m["config"].update(dim=128),
    "config of more layers": lambda m: m["config"].update(n_layers=3),
    "tensor missing": lambda m: m["tensors"].pop("layers.0.wq"),
    "tensor unknown": lambda m: m["tensors"].update(x=m["tensors"]["norm"]),
    "tensor entry is null": lambda m: m["tensors"].update({"layers.0.wq": None}),
    "wrong shape": lambda m: m["tensors"]["layers.0.wq"].update(shape=[64, 63]),
    "file outside the folder": lambda m: m["tensors"]["layers.0.wq"].update(file="../layer-00000.safetensors"),
    "file of another layer": lambda m: m["tensors"]["layers.0.wq"].update(file="layer-00001.safetensors"),
    "format unknown": lambda m: m["tensors"]["layers.0.wq"].update(format="q7"),
    "format is a list": lambda m: m["tensors"]["layers.0.wq"].update(format=["q8"]),
    "format other than stored": lambda m: m["tensors"]["layers.0.wq"].update(format="q4"),
    "group other than stored": lambda m: m["tensors"]["layers.0.experts.0.w_up"].update(group=32),
    "group absurd": lambda m: m["tensors"]["layers.0.wq"].update(group=7),
    "group of a dense tensor": lambda m: m["tensors"]["norm"].update(group=64),
    "norm in bf16": lambda m: m["tensors"]["norm"].update(format="bf16"),
    "router packed": lambda m: m["tensors"]["layers.0.router"].update(format="q8", group=128),
    "files missing": lambda m: m["files"].pop("rest.safetensors"),
    "files leave the folder": lambda m: m["files"].update({"../x": m["files"]["rest.safetensors"]}),
    "file entry is text": lambda m: m["files"].update({"rest.safetensors": "x"}),
    "file size is wrong": lambda m: m["files"]["rest.safetensors"].update(bytes=4096),
    "tokenizer elsewhere": lambda m: m.update(tokenizer="/etc/passwd"),
    "tokenizer unlisted": lambda m: m.update(tokenizer=None),
    "source without a name": lambda m: m.update(source={"x": 1}),
    "source kind is a list": lambda m: m["source"].update(kind=[]),
    "recipe without a name": lambda m: m["recipe"].pop("name"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_manifests_are_refused(store, lie):
    """Each lie is a one-line StoreError (or ConfigError for the config) that names the manifest or the file."""
    change(store, LIES[lie])
    with pytest.raises((StoreError, ConfigError)) as e:
        open_store(store)
    assert "\n" not in str(e.value) and str(store) in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_manifest_that_is_no_object_is_refused(store, content):
    """A damaged manifest is a StoreError."""
    (store / "npmix.json").write_bytes(content)
    with pytest.raises(StoreError):
        open_store(store)


def test_missing_and_truncated_files(store):
    """A missing or truncated file is named; an unfinished conversion says how to go on."""
    path = store / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="layer-00001"):
        open_store(store)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        open_store(store)
    (store / "npmix.json").rename(store / "npmix.partial.json")
    with pytest.raises(StoreError, match="unfinished"):
        open_source(store)
    (store / "npmix.partial.json").unlink()
    with pytest.raises(StoreError, match="not a packed store"):
        open_store(store)


def test_headers_of_the_files_are_held_to_the_manifest(store):
    """Two tensors exchanged in a file's header, sizes kept, are found."""
    path = store / "layer-00000.safetensors"
    data = path.read_bytes()
    assert data.count(b'"layers.0.wq"') == 1
    path.write_bytes(data.replace(b'"layers.0.wq"', b'"layers.0.wx"'))
    with pytest.raises(NpmixError, match="lacks layers.0.wq"):
        open_store(store)


def test_close_drops_the_map(store):
    """After close() the files can be removed and no map is held (views first, then the map)."""
    ours = open_store(store)
    tensor = ours.tensor("norm")
    ours.close()
    assert dequantize(tensor).shape == (64,)  # a view outlives close: the map goes with it
    with pytest.raises(KeyError):
        ours.tensor("norm")
