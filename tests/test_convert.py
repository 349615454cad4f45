"""Conversion as a whole: recipes, threads, odd sizes, other sources; verify and info."""

import json
import shutil

import numpy as np
import pytest
from make import TINY, bf16_bits, tiny_arrays, tiny_hf

from npmix.checkpoint.config_json import translate
from npmix.convert import convert, info, make_recipe, round_piece, verify
from npmix.errors import CheckpointError, InputError, StoreError
from npmix.formats import PACKED, packed_bytes
from npmix.quant.pack import dequantize, pack
from npmix.quant.round import quantise
from npmix.quant.tensor import Tensor
from npmix.store import open_source, open_store

ODD = {"hidden_size": 72, "intermediate_size": 100, "vocab_size": 333, "head_dim": 18, "num_local_experts": 3}


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "options, experts, others",
    [
        ({"quant": "q8"}, ("q8", 32), ("q8", 32)),
        ({"quant": "q8", "uniform": True}, ("q8", 32), ("q8", 32)),
        *(({"quant": name}, (name, PACKED[name].group), ("q8", 32)) for name in ("q6", "q5")),
        *(({"quant": name}, (name, PACKED[name].group), ("q8", 128)) for name in ("q4", "q3", "q2")),
        *(({"quant": name, "uniform": True}, (name, spec.group), (name, spec.group)) for name, spec in PACKED.items() if name != "q8"),
    ],
)
def test_recipes(tmp_path, options, experts, others):
    """Which tensor gets which format, in its own group but for q8, whose groups are finer beside 5 bits and more;
    the router keeps the source's, norms become float32."""
    with open_store(convert(tiny_hf(tmp_path / "hf"), tmp_path / "store", **options)) as store:
        for name in store.names():
            tensor = store.tensor(name)
            if name.endswith("norm"):
                expected = ("f32", 0)
            elif name.endswith("router"):
                expected = ("bf16", 0)
            else:
                expected = experts if ".experts." in name else others
            assert (tensor.format, tensor.group) == expected, name


def test_wrong_options():
    """An unknown quant is an InputError that names those there are."""
    for quant in ("q9", "Q4", "", "bf16"):
        with pytest.raises(InputError, match="q4"):
            make_recipe(quant)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("overrides", [{}, ODD, {"mistral": True}, {"tie_word_embeddings": True}, {"fused": True}])
def test_every_weight_is_what_rounding_alone_gives(tmp_path, dtype, overrides):
    """The store's tensors are exactly the plain rounding of the checkpoint's, for every dtype and size."""
    hf = tiny_hf(tmp_path / "hf", dtype=dtype, **overrides)
    with open_store(convert(hf, tmp_path / "store", "q4")) as store, open_source(hf) as source:
        assert store.config == source.config
        for name in store.names():
            ours, w = store.tensor(name), dequantize(source.tensor(name))
            if ours.group:
                assert (ours.data == pack(*quantise(w, ours.format, ours.group), ours.format, ours.group)).all(), name
            else:
                assert (dequantize(ours) == w).all()


def test_threads_and_pieces_do_not_change_a_byte(tmp_path, monkeypatch):
    """One thread or four, large pieces or small ones: equal files."""
    from npmix import convert as module

    hf = tiny_hf(tmp_path / "hf", vocab_size=1000)
    one = content(convert(hf, tmp_path / "a", "q4", threads=1))
    monkeypatch.setattr(module, "PIECE_WEIGHTS", 64 * 32)
    assert content(convert(hf, tmp_path / "b", "q4", threads=4)) == one


def test_fused_and_plain_spelling_convert_to_the_same_tensors(tmp_path):
    """How the checkpoint spells its experts leaves no trace in the weights."""
    a = content(convert(tiny_hf(tmp_path / "a"), tmp_path / "sa", "q4"))
    b = content(convert(tiny_hf(tmp_path / "b", fused=True), tmp_path / "sb", "q4"))
    assert {k: v for k, v in a.items() if k != "npmix.json"} == {k: v for k, v in b.items() if k != "npmix.json"}


def test_progress_is_monotone_and_complete(tmp_path):
    """progress(done, total, what) never falls and ends at the total; verify's does too."""
    hf = tiny_hf(tmp_path / "hf", tokenizer=True)
    seen = []
    convert(hf, tmp_path / "store", "q4", progress=lambda done, total, what: seen.append((done, total, what)))
    size = sum(p.stat().st_size for p in (tmp_path / "store").glob("*.safetensors"))
    assert seen == sorted(seen, key=lambda s: s[0]) and seen[-1][:2] == (size, size) and all(isinstance(s[2], str) for s in seen)
    for path in (hf, tmp_path / "store"):
        seen.clear()
        verify(path, lambda done, total, what: seen.append((done, total, what)))
        assert seen == sorted(seen, key=lambda s: s[0]) and seen[-1][0] == seen[-1][1] == seen[0][1]


class Generated:
    """A source that makes its tensors when they are asked for."""

    kind, path, is_instruct, tokenizer_path = "synthetic", "synthetic-1", True, None
    config = translate(TINY)

    def names(self):
        return list(self.config.tensor_shapes())

    def tensor(self, name):
        shape = self.config.tensor_shapes()[name]
        x = np.random.default_rng(sum(name.encode())).standard_normal(shape).astype(np.float32)
        return Tensor(bf16_bits(x), "bf16", shape)


def test_a_source_is_any_object_with_tensors(tmp_path):
    """Conversion needs no files: a source may generate tensors as they are asked for."""
    with open_store(convert(Generated(), tmp_path / "store", "q4")) as store:
        assert store.is_instruct and store.manifest["source"]["kind"] == "synthetic" and store.tokenizer_path is None
        w = dequantize(Generated().tensor("layers.1.wk"))
        assert (store.tensor("layers.1.wk").data == pack(*quantise(w, "q8", 128), "q8", 128)).all()


@pytest.mark.compiled
def test_memory_stays_small(tmp_path):
    """Pieces in flight are bounded: rounding a matrix of 64 MB takes a few pieces of memory, not the matrix's."""
    import tracemalloc

    w = Tensor(np.zeros((8192, 4096), np.uint16), "bf16", (8192, 4096))
    from npmix.convert import _Rounder

    rounder = _Rounder(2)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    size = sum(part.nbytes for part in rounder.pieces(w, "q8", 64))
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    rounder.close()
    assert size == packed_bytes("q8", 8192, 4096, 64) and peak < 48 << 20


def test_round_piece_is_the_matrix_cut_at_row_blocks(tmp_path):
    """Packed row ranges, cut at multiples of 16, are the packed matrix."""
    x = np.random.default_rng(0).standard_normal((50, 100)).astype(np.float32)
    tensor = Tensor(x, "f32", x.shape)
    parts = [round_piece(tensor, a, b, "q4", 128) for a, b in ((0, 16), (16, 48), (48, 50))]
    assert (np.concatenate(parts) == pack(*quantise(x, "q4", 128), "q4", 128)).all()


def test_verify(tmp_path):
    """verify passes on what convert made and finds any changed byte, also a tokenizer's."""
    store = convert(tiny_hf(tmp_path / "hf", tokenizer=True), tmp_path / "store", "q4")
    result = verify(store)
    assert result["kind"] == "store" and result["files"] == 4
    assert verify(tmp_path / "hf")["kind"] == "huggingface"
    for name in ("layer-00001.safetensors", "rest.safetensors", "tokenizer.model"):
        for place in (0.6, 0.999):
            broken = shutil.copytree(store, tmp_path / "broken", dirs_exist_ok=True)
            data = bytearray((broken / name).read_bytes())
            data[int(place * len(data))] ^= 16
            (broken / name).write_bytes(data)
            with pytest.raises(StoreError, match=name):
                verify(broken)


def test_verify_finds_a_nonfinite_scale_with_a_true_digest(tmp_path):
    """A store whose digests are right but which holds an infinite scale is refused too."""
    import hashlib

    store = convert(tiny_hf(tmp_path / "hf"), tmp_path / "store", "q4")
    with open_store(store) as opened:
        start = opened._files["layer-00000.safetensors"].entries["layers.0.experts.1.w_up"].start
    path = store / "layer-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[start + 2 : start + 4] = (0x7C00).to_bytes(2, "little")
    path.write_bytes(data)
    manifest = json.loads((store / "npmix.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(data).hexdigest()
    (store / "npmix.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="layers.0.experts.1.w_up"):
        verify(store)


def test_info(tmp_path):
    """info counts weights, bytes and bits by kind, for a store and for a checkpoint, without reading the weights."""
    hf = tiny_hf(tmp_path / "hf", tokenizer=True)
    weights = sum(a.size for a in tiny_arrays(TINY).values())
    a, b = info(hf), info(convert(hf, tmp_path / "store", "q4"))
    assert a["total"]["weights"] == b["total"]["weights"] == weights and a["total"]["bits_per_weight"] == 16
    assert list(a["weights"]) == ["embeddings", "attention", "router", "experts", "norms", "output"]
    assert b["weights"]["router"]["formats"] == ["bf16"] and b["weights"]["experts"]["formats"] == ["q4 group 128"]
    assert b["weights"]["embeddings"]["bits_per_weight"] == 4 * 8.125  # 64 inputs are a quarter of a span: padded to 256
    assert b["config"] == a["config"] == json.loads(json.dumps(a["config"]))
    assert "4 files" in b["digests"] and b["tokenizer"] == "tokenizer.model" and b["recipe"]["name"] == "q4"
    assert json.dumps(b)


def test_info_of_nothing(tmp_path):
    """A folder with no model is an error that says what was looked for."""
    for function in (info, verify):
        with pytest.raises(CheckpointError, match="config.json"):
            function(tmp_path)


def test_threads_by_default_are_those_of_the_engine(tmp_path, monkeypatch):
    """Without threads= a conversion uses as many as an engine would."""
    from npmix import convert as module

    seen = []
    monkeypatch.setattr(module, "default_threads", lambda: 3)
    monkeypatch.setattr(module, "_convert", lambda *arguments: seen.append(arguments[4]))
    convert(tiny_hf(tmp_path / "hf"), tmp_path / "store")
    assert seen == [3]
