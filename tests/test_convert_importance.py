"""Conversion weighted by an importance file: less weighted error, the same bytes from kernel and twin, another file is another conversion."""

import json

import numpy as np
import pytest
from make import TINY, tiny_hf

from npmix.checkpoint.config_json import translate
from npmix.convert import convert
from npmix.errors import CalibrationError, ConversionError
from npmix.formats import PACKED
from npmix.quant.pack import dequantize, pack
from npmix.quant.round import quantise
from npmix.store import open_source, open_store
from npmix.store.importance import Importance, save_importance, shapes
from npmix.store.weighting import column_weights

CONFIG = translate(TINY)
TOKENS = 1000


def importance_file(path, seed=0, config=CONFIG, scale=1.0):
    """Means that differ by four orders of magnitude; every expert got as many tokens as the next."""
    rng = np.random.default_rng(seed)
    means = {name: (scale * np.exp(3 * rng.standard_normal(shape))).astype(np.float32) for name, shape in shapes(config).items()}
    counts = np.full((config.n_layers, config.n_experts), TOKENS * config.n_active // config.n_experts, np.int64)
    save_importance(path, means, counts, {"tokens": TOKENS, "window": 512, "model": "m", "text": "t"})
    return path


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "npmix.json"}


@pytest.mark.parametrize("quant", PACKED)
def test_every_matrix_is_rounded_by_its_own_weights(tmp_path, quant):
    """A store's bytes are the twin's under the weights of that very matrix, and the weighted error is less than without."""
    hf, path = tiny_hf(tmp_path / "hf"), importance_file(tmp_path / "i")
    importance = Importance.open(path, CONFIG)
    plain, weighted = convert(hf, tmp_path / "a", quant, uniform=True), convert(hf, tmp_path / "b", quant, uniform=True, importance=path)
    with open_source(hf) as source, open_store(plain) as a, open_store(weighted) as b:
        for name in ("layers.0.wk", "layers.0.wo", "layers.1.experts.2.w_up", "layers.1.experts.3.w_down", "output"):
            w, ours = dequantize(source.tensor(name)), b.tensor(name)
            v = column_weights(importance, name, CONFIG)
            assert abs(v.mean() - 1) < 1e-5 and (ours.data == pack(*quantise(w, quant, ours.group, v), quant, ours.group)).all()
            error = [float((v * (dequantize(store.tensor(name)) - w) ** 2).sum()) for store in (a, b)]
            assert error[1] < 0.9 * error[0], name
        assert (a.tensor("tok_embeddings").data == b.tensor("tok_embeddings").data).all()  # a table multiplies nothing


def test_the_size_of_the_activations_does_not_matter(tmp_path):
    """Means that are 1e18 times as large or as small give the same weights of errors, so nothing overflows in float32."""
    found = []
    for scale in (1e-18, 1, 1e18):
        importance = Importance.open(importance_file(tmp_path / "i", scale=scale), CONFIG)
        found.append(column_weights(importance, "layers.1.experts.2.w_up", CONFIG))
    assert np.allclose(found[0], found[1], rtol=1e-5) and np.allclose(found[2], found[1], rtol=1e-5)


def test_tied_embeddings_are_weighted_as_the_output_matrix_they_are():
    """The one table of a tied model gets the weights of the output's inputs; an untied table gets none."""
    means = {"output": np.array([1, 3], np.float32)}
    importance = Importance(means, np.ones((1, 1), np.int64), {"tokens": 1})
    tied = translate({**TINY, "tie_word_embeddings": True})
    assert column_weights(importance, "tok_embeddings", tied).tolist() == [0.5, 1.5]
    assert column_weights(importance, "tok_embeddings", CONFIG) is None and column_weights(None, "output", CONFIG) is None


def test_the_manifest_says_by_what_it_was_weighted(tmp_path):
    """The recipe holds the file's sha256, its text and its tokens; without a file nothing of it."""
    import hashlib

    hf, path = tiny_hf(tmp_path / "hf"), importance_file(tmp_path / "i")
    convert(hf, tmp_path / "a", "q3", importance=path)
    recipe = json.loads((tmp_path / "a" / "npmix.json").read_text())["recipe"]
    assert recipe["importance"] == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "text": "t", "tokens": TOKENS}
    convert(hf, tmp_path / "b", "q3")
    assert "importance" not in json.loads((tmp_path / "b" / "npmix.json").read_text())["recipe"]


class Stop(Exception):
    pass


def stop_half_way(done, total, what):
    if done > total / 2:
        raise Stop


def test_an_interrupted_conversion_goes_on_only_with_the_same_file(tmp_path):
    """Another importance file, or none, is refused; a copy of the same one goes on and gives the bytes of an uninterrupted run."""
    hf, path, other = tiny_hf(tmp_path / "hf"), importance_file(tmp_path / "i"), importance_file(tmp_path / "other", 1)
    with pytest.raises(Stop):
        convert(hf, tmp_path / "a", "q3", importance=path, progress=stop_half_way)
    for wrong in (other, None):
        with pytest.raises(ConversionError, match="other settings"):
            convert(hf, tmp_path / "a", "q3", importance=wrong)
    again = tmp_path / "copy"
    again.write_bytes(path.read_bytes())
    whole = content(convert(hf, tmp_path / "b", "q3", importance=path))
    assert content(convert(hf, tmp_path / "a", "q3", importance=again)) == whole


@pytest.mark.parametrize("wrong", ["none", "of another model", "no importance file"])
def test_a_wrong_file_is_refused_before_anything_is_written(tmp_path, wrong):
    """A file that is missing, of another model or of another kind: CalibrationError, and no destination."""
    hf, path = tiny_hf(tmp_path / "hf"), tmp_path / "i"
    if wrong == "of another model":
        importance_file(path, config=translate({**TINY, "hidden_size": 32, "head_dim": 8}))
    elif wrong == "no importance file":
        path = hf / "model.safetensors"
    with pytest.raises(CalibrationError):
        convert(hf, tmp_path / "a", "q3", importance=path)
    assert not (tmp_path / "a").exists()


def test_command(tmp_path):
    """The command takes what `npmix calibrate` wrote, and tells in one line what is wrong with another file."""
    from click.testing import CliRunner

    from npmix import cli

    hf, path = tiny_hf(tmp_path / "hf"), importance_file(tmp_path / "i")
    command = ["convert", str(hf), str(tmp_path / "a"), "--quant", "q3", "--quiet", "--importance"]
    wrong = CliRunner().invoke(cli.main, [*command, str(tmp_path / "none")])
    assert wrong.exit_code == 1 and [line[:13] for line in wrong.stderr.splitlines()] == ["npmix: error:"]
    assert CliRunner().invoke(cli.main, [*command, str(path)]).exit_code == 0
    assert content(tmp_path / "a") == content(convert(hf, tmp_path / "b", "q3", importance=path))
