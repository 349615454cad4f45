"""Conversion to float16, and from a packed store to another."""

import json
import warnings

import numpy as np
import pytest
from make import TINY, tiny_arrays, tiny_hf

from npmix import cli
from npmix import convert as conversion
from npmix.convert import as_float32, convert, verify
from npmix.errors import ConversionError
from npmix.formats import DENSE, PACKED
from npmix.quant.pack import dequantize, pack
from npmix.quant.round import quantise
from npmix.quant.tensor import Tensor
from npmix.store import open_source, open_store


def quiet(*arguments, **options):
    """A conversion that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert(*arguments, **options)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_f16(tmp_path, monkeypatch, dtype, fused):
    """--quant f16: every matrix as its float16, the router as the source has it, norms float32; in pieces or whole."""
    hf = tiny_hf(tmp_path / "hf", dtype=dtype, fused=fused)
    monkeypatch.setattr(conversion, "PIECE_WEIGHTS", 64 * 32)
    with open_store(quiet(hf, tmp_path / "store", "f16")) as store, open_source(hf) as source:
        for name in store.names():
            ours, w = store.tensor(name), dequantize(source.tensor(name))
            expected = dtype if name.endswith("router") else "f32" if name.endswith("norm") else "f16"
            assert (ours.format, ours.group) == (expected, 0), name
            assert (dequantize(ours) == (w.astype(np.float16) if expected == "f16" else w)).all(), name
    assert verify(tmp_path / "store")["files"] == 3


@pytest.mark.parametrize("value, says", [(7e4, "65504.*convert to q8"), (np.nan, "NaN"), (np.inf, "NaN or inf")])
def test_f16_refuses_what_it_cannot_hold(tmp_path, value, says):
    """A weight beyond float16's range, or none at all, is an error that names the tensor; nothing is left behind."""
    arrays = tiny_arrays(TINY)
    arrays["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 5] = value
    hf = tiny_hf(tmp_path / "hf", arrays=arrays)
    with pytest.raises(ConversionError, match=f"layers.1.experts.2.w_down has .*{says}"):
        convert(hf, tmp_path / "store", "f16")
    assert not (tmp_path / "store").exists()


@pytest.mark.compiled
def test_a_float16_store_runs(tmp_path):
    """Logits of a float16 store are, to the bit, those of the float16 checkpoint it was made from."""
    from npmix.engine import Engine

    hf = tiny_hf(tmp_path / "hf", dtype="f16", num_hidden_layers=1)
    with Engine(convert(hf, tmp_path / "store", "f16"), kv="f32") as a, Engine(hf, kv="f32") as b:  # kernels that other tests need too
        assert (a.logits([1, 5, 9, 300]) == b.logits([1, 5, 9, 300])).all()


def test_a_store_is_converted_only_when_asked(tmp_path):
    """Without requantize a store is refused, and the message names the option."""
    store = convert(tiny_hf(tmp_path / "hf"), tmp_path / "store", "q8")
    with pytest.raises(ConversionError, match="--requantize"):
        convert(store, tmp_path / "again", "q4")
    assert not (tmp_path / "again").exists()


def test_requantize(tmp_path, monkeypatch):
    """Matrices are rounded from what the store's mean, those that keep their format are copied to the bit, and a warning counts the former."""
    store = convert(tiny_hf(tmp_path / "hf", tokenizer=True, vocab_size=1000), tmp_path / "q8", "q8")
    monkeypatch.setattr(conversion, "PIECE_WEIGHTS", 64 * 32)
    with pytest.warns(UserWarning, match="24 matrices from q8 to q4; the errors of both"):
        convert(store, tmp_path / "q4", "q4", requantize=True)
    with open_store(store) as a, open_store(tmp_path / "q4") as b:
        for name in a.names():
            old, new = a.tensor(name), b.tensor(name)
            if ".experts." in name:
                assert (new.data == pack(*quantise(dequantize(old), "q4", new.group), "q4", new.group)).all(), name
            else:
                assert (old.format, old.group) == (new.format, new.group) and np.ascontiguousarray(
                    old.data
                ).tobytes() == np.ascontiguousarray(new.data).tobytes()
        source = b.manifest["source"]
        assert source["kind"] == "store" and source["recipe"] == a.manifest["recipe"] and b.tokenizer_path
    verify(tmp_path / "q4")


def test_no_warning_where_nothing_is_rounded_twice(tmp_path):
    """From float16 to fewer bits, or to the same formats again, only one rounding is in the weights."""
    hf = tiny_hf(tmp_path / "hf")
    half = quiet(hf, tmp_path / "f16", "f16")
    q4 = quiet(half, tmp_path / "q4", "q4", requantize=True)
    same = quiet(q4, tmp_path / "same", "q4", requantize=True)
    assert (q4 / "rest.safetensors").read_bytes() == (same / "rest.safetensors").read_bytes()
    direct = quiet(hf, tmp_path / "direct", "q4")
    assert (direct / "layer-00000.safetensors").read_bytes() == (
        q4 / "layer-00000.safetensors"
    ).read_bytes()  # bf16 is exact in float16 here


@pytest.mark.parametrize("format", PACKED)
def test_rows_of_a_packed_matrix(format):
    """Rows of a packed matrix, cut at multiples of 16, are those of the whole."""
    group = PACKED[format].group
    w = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)
    tensor = Tensor(pack(*quantise(w, format, group), format, group), format, w.shape, group)
    whole = dequantize(tensor)
    for first, last in ((0, 16), (16, 48), (32, 50), (48, 50), (0, 50)):
        assert (as_float32(tensor, first, last) == whole[first:last]).all()


def test_a_damaged_store_is_not_copied_on(tmp_path):
    """An infinite scale in a tensor that would be copied is found and named."""
    store = convert(tiny_hf(tmp_path / "hf"), tmp_path / "q8", "q8")
    with open_store(store) as opened:
        start = opened._files["rest.safetensors"].entries["output"].start
    data = bytearray((store / "rest.safetensors").read_bytes())
    data[start : start + 2] = (0x7C00).to_bytes(2, "little")
    (store / "rest.safetensors").write_bytes(data)
    with pytest.warns(UserWarning), pytest.raises(ConversionError, match="output has NaN"):
        convert(store, tmp_path / "q4", "q4", requantize=True)


def test_an_interrupted_one_goes_on_only_from_the_same_store(tmp_path):
    """The store's manifest is part of what must be the same."""
    stores = [convert(tiny_hf(tmp_path / f"hf{seed}", seed=seed), tmp_path / f"q8{seed}", "q8") for seed in (0, 1)]

    def stop(done, total, what):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning):
        with pytest.raises(KeyboardInterrupt):
            convert(stores[0], tmp_path / "q4", "q4", requantize=True, progress=stop)
        with pytest.raises(ConversionError, match="another source"):
            convert(stores[1], tmp_path / "q4", "q4", requantize=True)
        convert(stores[0], tmp_path / "q4", "q4", requantize=True)
    assert verify(tmp_path / "q4")["kind"] == "store"


def test_command(tmp_path):
    """The command offers every format, warns on stderr in a line of its own, and names the option where it is missing."""
    from click.testing import CliRunner

    from npmix.cli.convert import QUANTS as offered
    from npmix.store.recipe import QUANTS

    assert set(offered) == set(QUANTS) == {*PACKED, "f16"} and "f16" in DENSE
    store = convert(tiny_hf(tmp_path / "hf"), tmp_path / "q8", "q8")
    command = ["convert", str(store), str(tmp_path / "q4"), "--quant", "q4", "--quiet"]
    refused = CliRunner().invoke(cli.main, command)
    assert refused.exit_code == 1 and "--requantize" in refused.stderr.splitlines()[-1]
    done = CliRunner().invoke(cli.main, [*command, "--requantize"])
    assert done.exit_code == 0 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("npmix: warning: ")] == done.stderr.splitlines()
    assert json.loads((tmp_path / "q4" / "npmix.json").read_text())["source"]["name"] == "q8"
