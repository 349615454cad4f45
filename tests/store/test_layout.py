"""The store's bytes: pages, pads, sizes, and that any safetensors reader opens them."""

import hashlib
import json

import numpy as np
import pytest
from make import TINY, tiny_hf
from safetensors import safe_open

from npmix.checkpoint.config_json import translate
from npmix.convert import convert, make_recipe, tensor_formats
from npmix.formats import PACKED, tensor_bytes
from npmix.store import open_store
from npmix.store.layout import LINE, PAGE, plan_digest, plan_store

ODD = {"hidden_size": 72, "intermediate_size": 100, "vocab_size": 333, "head_dim": 18}


@pytest.mark.parametrize("overrides", [{}, ODD])
@pytest.mark.parametrize("quant", PACKED)
def test_plan_places_experts_on_pages(overrides, quant):
    """Data and each expert start on a page, tensors on a line; an expert's matrices touch; slots follow without holes."""
    config = translate({**TINY, **overrides})
    plan = plan_store(config, tensor_formats(config, make_recipe(quant), lambda name: "bf16"))
    assert [file.name for file in plan] == ["layer-00000.safetensors", "layer-00001.safetensors", "rest.safetensors"]
    for file in plan:
        assert len(file.header) % PAGE == 0
        at = len(file.header)
        for slot in file.slots:
            assert slot.start == at
            at += slot.nbytes
            if slot.format:
                assert slot.start % LINE == 0 and slot.nbytes == tensor_bytes(slot.format, slot.shape, slot.group)
            if slot.name.endswith("w_gate"):
                assert slot.start % PAGE == 0
        assert at == file.nbytes
        names = [slot.name for slot in file.slots]
        for gate in (name for name in names if name.endswith("w_gate")):
            i = names.index(gate)
            assert [name.rsplit(".", 1)[-1] for name in names[i : i + 3]] == ["w_gate", "w_up", "w_down"]


def test_any_safetensors_reader_opens_the_files(tmp_path):
    """The safetensors library reads every tensor; dense ones have dtype and shape, packed ones are bytes; pads are zeros."""
    store = convert(tiny_hf(tmp_path / "hf", dtype="f16"), tmp_path / "store", "q4")
    with open_store(store) as ours:
        table = ours.manifest["tensors"]
        for file in sorted(store.glob("*.safetensors")):
            with safe_open(file, framework="np") as theirs:
                for name in theirs.keys():
                    data = theirs.get_tensor(name)
                    if name.startswith("pad."):
                        assert data.dtype == np.uint8 and not data.any()
                    else:
                        assert table[name]["file"] == file.name
                        assert (data == ours.tensor(name).data).all()
        seen = {name for name in table}
        assert seen == set(ours.names())


def test_manifest_holds_sizes_and_digests(tmp_path):
    """The manifest's bytes and sha256 are those of the files."""
    store = convert(tiny_hf(tmp_path / "hf", tokenizer=True), tmp_path / "store", "q8")
    manifest = json.loads((store / "npmix.json").read_text())
    assert set(manifest["files"]) == {p.name for p in store.iterdir()} - {"npmix.json"}
    for name, entry in manifest["files"].items():
        data = (store / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (store / "tokenizer.model").read_bytes() == (tmp_path / "hf" / "tokenizer.model").read_bytes()


def test_plan_digest_tells_conversions_apart():
    """Another recipe, another source or another model is another plan; the same is the same."""
    config = translate(TINY)

    def digest(config, quant, source, uniform=False):
        return plan_digest(config, plan_store(config, tensor_formats(config, make_recipe(quant, uniform), lambda _: "bf16")), source)

    base = digest(config, "q4", "s")
    assert digest(config, "q4", "s") == base
    other = translate({**TINY, "rope_theta": 1e4})
    assert base not in (digest(config, "q4", "s", True), digest(config, "q8", "s"), digest(config, "q4", "t"))
    assert base != digest(other, "q4", "s")
