"""Conversion with second moments: the twin's bytes, less error in the outputs, wrong files refused, experts seldom chosen."""

import json

import numpy as np
import pytest
from make import TINY, tiny_hf
from test_convert_importance import CONFIG, TOKENS, content, importance_file

from npmix.convert import convert
from npmix.errors import CalibrationError, ConversionError, InputError
from npmix.formats import MOMENTS, PACKED
from npmix.quant.compensate import factors, quantise_compensated
from npmix.quant.pack import dequantize, pack
from npmix.store import open_source, open_store
from npmix.store.moments import Moments, MomentsWriter, moment_shapes
from npmix.store.weighting import PSEUDO_TOKENS, UNRELATED_TOKENS, Weighting


def moments_file(path, seed=0, config=CONFIG, change=None, **about):
    """Moments of inputs that a few hidden causes move together; change(name, values) alters a matrix's."""
    rng = np.random.default_rng(seed)
    writer, width = MomentsWriter(path, config, {"text": "t", "tokens": TOKENS, **about}), config.dim
    for layer in range(config.n_layers):
        part = {}
        for name, shape in moment_shapes(config).items():
            if name.startswith(f"layers.{layer}.") or (name == "output" and layer == config.n_layers - 1):
                width = config.hidden_dim if name.endswith("w_down") else config.dim
                x = np.zeros((300, 128))
                x[:, :width] = rng.standard_normal((300, 8)) @ rng.standard_normal((8, width)) + rng.standard_normal((300, width))
                part[name] = np.zeros(shape, np.float32) + (x.T @ x / len(x)).astype(np.float32)
                if change:
                    change(name, part[name])
        writer.add(layer, part)
    writer.finish()
    writer.clear()
    return path


@pytest.fixture
def files(tmp_path):
    return {"importance": importance_file(tmp_path / "i"), "second_moments": moments_file(tmp_path / "m")}


def test_every_expert_is_rounded_by_its_own_moments(tmp_path, files):
    """A store's bytes are the twin's under that very matrix's factors; e' H e is less than with importance alone; q8 matrices are the same."""
    hf = tiny_hf(tmp_path / "hf")
    weighted = convert(hf, tmp_path / "a", "q4", importance=files["importance"])
    ours = convert(hf, tmp_path / "b", "q4", **files)
    weighting = Weighting(files["importance"], files["second_moments"], CONFIG)
    with open_source(hf) as source, open_store(weighted) as a, open_store(ours) as b:
        for name in ("layers.0.experts.1.w_gate", "layers.1.experts.2.w_up", "layers.1.experts.3.w_down"):
            w, factored = dequantize(source.tensor(name)), weighting.factors(name, source.tensor(name).shape[1])
            rounded = quantise_compensated(w, "q4", 128, weighting.weights(name), factored)
            assert (b.tensor(name).data == pack(*rounded, "q4", 128)).all(), name
            h = Moments(files["second_moments"], CONFIG).of(name)[0, : w.shape[1], : w.shape[1]]
            before, after = (
                float(((dequantize(store.tensor(name)) - w) @ h * (dequantize(store.tensor(name)) - w)).sum()) for store in (a, b)
            )
            assert after < 0.7 * before, name
        assert (a.tensor("layers.0.wq").data == b.tensor("layers.0.wq").data).all()


@pytest.mark.parametrize("quant", [name for name, spec in PACKED.items() if spec.group != MOMENTS or not spec.values])
def test_formats_of_other_groups_take_importance_alone(tmp_path, files, quant):
    """Where no whole block of moments shares a scale of a table, second moments change nothing: a warning says so, the recipe has none."""
    hf = tiny_hf(tmp_path / "hf")
    weighted = convert(hf, tmp_path / "a", quant, importance=files["importance"])
    with pytest.warns(UserWarning, match=f"{quant} weighs errors by .*i alone: .*m is of use to q4, q3 and q2, and is not used"):
        assert content(convert(hf, tmp_path / "b", quant, **files)) == content(weighted)
    recipe = json.loads((tmp_path / "b" / "npmix.json").read_text())["recipe"]
    assert "importance" in recipe and "second_moments" not in recipe


def test_f16_takes_neither_file(tmp_path, files):
    """Nothing of f16 is weighted: a warning names what is not used, one file or both; the store is the same as without, manifest included."""
    hf = tiny_hf(tmp_path / "hf")
    alone = convert(hf, tmp_path / "a", "f16")
    with pytest.warns(UserWarning, match="f16 weighs no errors: .*i and .*m are not used"):
        both = convert(hf, tmp_path / "b", "f16", **files)
    with pytest.warns(UserWarning, match="f16 weighs no errors: .*i is not used"):
        one = convert(hf, tmp_path / "c", "f16", importance=files["importance"])
    for other in (both, one):
        assert content(other) == content(alone) and (other / "npmix.json").read_text() == (alone / "npmix.json").read_text()


def test_experts_seldom_chosen_take_after_the_others(tmp_path):
    """Blended by tokens with the mean over the layer's experts, products of different inputs shrunk by tokens: one that no token chose
    gets the mean, one chosen often nearly its own."""
    path, moments = (
        tmp_path / "i",
        moments_file(tmp_path / "m", change=lambda name, values: values.fill(0) if ".experts.3." in name else None),
    )
    weighting = Weighting(importance_file(path), moments, CONFIG)
    counts = np.array([800, 1000, 200, 0])
    weighting._importance.counts[0] = counts
    own = [Moments(moments, CONFIG).of(f"layers.0.experts.{e}.w_gate").astype(np.float64) for e in range(4)]
    mean = sum(n * h for n, h in zip(counts, own)) / counts.sum()

    def shrunk(h, tokens):
        return np.where(np.eye(128, dtype=bool), h, h * tokens / (tokens + UNRELATED_TOKENS))

    for e in (3, 0, 2):
        expected = (counts[e] * shrunk(own[e], counts[e]) + PSEUDO_TOKENS * shrunk(mean, 2000)) / (counts[e] + PSEUDO_TOKENS)
        for name in ("w_gate", "w_up"):
            for found, right in zip(weighting.factors(f"layers.0.experts.{e}.{name}", 64), factors(expected.astype(np.float32), 64)):
                assert np.allclose(found, right, rtol=1e-3, atol=1e-4)
    assert (weighting.factors("layers.0.experts.2.w_up", 64)[0] != weighting.factors("layers.1.experts.2.w_up", 64)[0]).any()
    expected = shrunk(Moments(moments, CONFIG).of("layers.1.wo"), TOKENS).astype(np.float32)
    assert np.allclose(weighting.factors("layers.1.wo", 64)[0], factors(expected, 64)[0], rtol=1e-3, atol=1e-4)
    assert weighting.factors("tok_embeddings", 64) is None and Weighting(path, None, CONFIG).factors("output", 64) is None


def test_the_manifest_names_both_files(tmp_path, files, recwarn):
    """The recipe holds the sha256, text and tokens of both where both are used, and nothing warns."""
    import hashlib

    convert(tiny_hf(tmp_path / "hf"), tmp_path / "a", "q4", **files)
    recipe = json.loads((tmp_path / "a" / "npmix.json").read_text())["recipe"]
    for kind, path in files.items():
        assert recipe[kind] == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "text": "t", "tokens": TOKENS}
    assert not recwarn.list


@pytest.mark.compiled
def test_an_interrupted_conversion_goes_on_only_with_the_same_moments(tmp_path, files):
    """Other moments, or none, are refused; the same ones go on and give the bytes of an uninterrupted run."""
    hf, only = tiny_hf(tmp_path / "hf"), {"importance": files["importance"]}
    with pytest.raises(RuntimeError):
        convert(hf, tmp_path / "a", "q4", **files, progress=lambda done, total, what: raise_half_way(done, total))
    for wrong in ({**only, "second_moments": moments_file(tmp_path / "other", 1)}, only):
        with pytest.raises(ConversionError, match="other settings"):
            convert(hf, tmp_path / "a", "q4", **wrong)
    whole = content(convert(hf, tmp_path / "b", "q4", **files))
    assert content(convert(hf, tmp_path / "a", "q4", **files)) == whole


def raise_half_way(done, total):
    if done > total / 2:
        raise RuntimeError


def spoil(name, values):
    if name == "layers.1.experts.0.w_down":
        values[0, 3, 4] = values[0, 4, 3] = 1e4


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ("none", CalibrationError, "does not exist: make it with npmix calibrate"),
        ("an importance file", CalibrationError, "no file of second moments"),
        ("of another model", CalibrationError, "calibrate this"),
        ("of another text", CalibrationError, "not measured on the same text"),
        ("without importance", InputError, "name it too"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_written(tmp_path, wrong, error, message):
    """A file that is missing, of another kind, model or text, or alone: an error that says what to do, and no destination."""
    hf, importance, moments = tiny_hf(tmp_path / "hf"), importance_file(tmp_path / "i"), tmp_path / "m"
    if wrong == "an importance file":
        moments = importance
    elif wrong == "of another model":
        from npmix.checkpoint.config_json import translate

        moments_file(moments, config=translate({**TINY, "num_local_experts": 3}))
    elif wrong == "of another text":
        moments_file(moments, text="u")
    elif wrong == "without importance":
        importance = None
    with pytest.raises(error, match=message):
        convert(hf, tmp_path / "a", "q4", importance=importance, second_moments=moments)
    assert not (tmp_path / "a").exists()


def test_moments_that_cannot_be_stop_the_conversion(tmp_path):
    """A negative square, seen when its matrix comes, is an error that names file and matrix."""
    files = {"importance": importance_file(tmp_path / "i"), "second_moments": moments_file(tmp_path / "m", change=spoil)}
    with pytest.raises(CalibrationError, match="m: layers.1.experts.0.w_down has second moments that no inputs can have"):
        convert(tiny_hf(tmp_path / "hf"), tmp_path / "a", "q4", **files)


@pytest.mark.compiled
def test_the_command_takes_both_files(tmp_path, files):
    """`npmix convert --second-moments` gives the same bytes as the call; a wrong file is one line on stderr, exit code 1."""
    from click.testing import CliRunner

    from npmix.cli import main

    hf = tiny_hf(tmp_path / "hf")
    command = [
        "convert",
        str(hf),
        str(tmp_path / "a"),
        "--quant",
        "q4",
        "--quiet",
        "--importance",
        str(files["importance"]),
        "--second-moments",
    ]
    result = CliRunner().invoke(main, [*command, str(files["importance"])])
    assert (
        (result.exit_code, result.stdout) == (1, "")
        and len(result.stderr.splitlines()) == 1
        and "no file of second moments" in result.stderr
    )
    result = CliRunner().invoke(main, [*command, str(files["second_moments"])])
    assert (result.exit_code, result.output) == (0, "")
    assert content(tmp_path / "a") == content(convert(hf, tmp_path / "b", "q4", **files))
