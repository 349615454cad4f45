"""The importance file: what is read is what was written, blended and with a floor; whatever is wrong with a file is named."""

import json

import numpy as np
import pytest
from make import write_safetensors

from npmix.config import Config
from npmix.errors import CalibrationError
from npmix.store.importance import FLOOR, PSEUDO_TOKENS, Importance, load_importance, save_importance, shapes
from npmix.store.moments import Moments, MomentsWriter, moment_shapes

CONFIG = Config(
    dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=24, hidden_dim=160, n_experts=3, n_active=2, vocab_size=40,
    norm_eps=1e-5, rope_theta=1e4, max_positions=64,
)  # fmt: skip
ABOUT = {"tokens": 50, "window": 10, "model": "m", "text": "t"}
COUNTS = np.array([[50, 48, 2], [50, 50, 0]], np.int64)


def means(seed=0):
    """Sound random values for every tensor; expert 2 of layer 1 was never chosen."""
    rng = np.random.default_rng(seed)
    out = {name: rng.gamma(1.0, 1.0, shape).astype(np.float32) + np.float32(1e-3) for name, shape in shapes(CONFIG).items()}
    for name in out:
        if name.startswith("layers.1.experts.2"):
            out[name][:] = 0
    return out


def save_raw(path, tensors, counts=COUNTS, about=None):
    """A file with whatever is in it: numpy arrays by name."""
    dtypes = {"float32": "F32", "float64": "F64", "int64": "I64", "float16": "F16"}
    raw = {name: (dtypes[str(a.dtype)], a.shape, a.tobytes()) for name, a in {**tensors, "counts": counts}.items()}
    text = json.dumps({"format": "npmix-importance", "version": 1, **ABOUT, **(about or {})})
    return write_safetensors(path, raw, {"npmix": text})


def test_what_is_written_is_read(tmp_path):
    """Means, counts and metadata come back to the bit; equal content gives equal files; any safetensors reader opens them."""
    values = means()
    for name in "ab":
        save_importance(tmp_path / name, values, COUNTS, ABOUT)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, counts, about = load_importance(tmp_path / "a", CONFIG)
    assert set(found) == set(values) and all((found[name] == values[name]).all() for name in values)
    assert (counts == COUNTS).all() and {name: about[name] for name in ABOUT} == ABOUT
    from safetensors.numpy import load_file

    assert (load_file(tmp_path / "a")["layers.0.wo"] == values["layers.0.wo"]).all()


def test_every_matrix_has_its_weights(tmp_path):
    """Each matrix of the model gets float32 (K,) above 0; those that share an input get equal ones; norms and the table get None."""
    values = means()
    save_importance(tmp_path / "i", values, COUNTS, ABOUT)
    importance = Importance.open(tmp_path / "i", CONFIG)
    for name, shape in CONFIG.tensor_shapes().items():
        found = importance.of(name)
        if len(shape) == 1 or name == "tok_embeddings":
            assert found is None
        else:
            assert found.shape == (shape[1],) and found.dtype == np.float32 and (found > 0).all()
    for a, b in (("wk", "wq"), ("wv", "wq"), ("experts.1.w_up", "experts.1.w_gate")):
        assert (importance.of(f"layers.1.{a}") == importance.of(f"layers.1.{b}")).all()
    assert (importance.of("layers.0.wo") == values["layers.0.wo"]).all() and importance.tokens == 50


def test_blend(tmp_path):
    """An expert's weights are its own means and all experts' in the shares of its tokens and PSEUDO_TOKENS."""
    values = means()
    save_importance(tmp_path / "i", values, COUNTS, ABOUT)
    importance = Importance.open(tmp_path / "i", CONFIG)
    for layer in range(2):
        for kind in ("w_gate", "w_down"):
            own = [values[f"layers.{layer}.experts.{e}.{kind}"].astype(np.float64) for e in range(3)]
            every = sum(n * mean for n, mean in zip(COUNTS[layer], own)) / COUNTS[layer].sum()
            for e in range(3):
                share = COUNTS[layer, e] / (COUNTS[layer, e] + PSEUDO_TOKENS)
                expected = share * own[e] + (1 - share) * every
                assert np.allclose(importance.of(f"layers.{layer}.experts.{e}.{kind}"), expected, rtol=1e-6)
            assert COUNTS[1, 2] or layer == 0 or np.allclose(expected, every)


def test_floor(tmp_path):
    """An input that was always 0 gets FLOOR times the mean, and one that is tiny in a tiny row stays above 0."""
    values = means()
    values["layers.0.wo"][5] = 0
    values["output"][:] = 1e-44
    save_importance(tmp_path / "i", values, COUNTS, ABOUT)
    importance = Importance.open(tmp_path / "i", CONFIG)
    assert np.isclose(importance.of("layers.0.wo")[5], FLOOR * values["layers.0.wo"].mean(), rtol=1e-5)
    assert (importance.of("output") > 0).all()


def changed(name, index, value):
    def change(values):
        values[name][index] = value

    return change


@pytest.mark.parametrize("name, change", [
    ("layers.0.wq", changed("layers.0.wq", 3, np.nan)),
    ("layers.1.experts.0.w_down", changed("layers.1.experts.0.w_down", 7, np.inf)),
    ("output", changed("output", 0, -1e-3)),
    ("layers.1.router", changed("layers.1.router", slice(None), 0)),
    ("layers.0.experts.2.w_gate", changed("layers.0.experts.2.w_gate", slice(None), 0)),
    ("layers.1.experts.2.w_gate", changed("layers.1.experts.2.w_gate", 4, 1)),
    ("layers.1.wo", lambda values: values.pop("layers.1.wo")),
    ("layers.0.wo", lambda values: values.update({"layers.0.wo": values["layers.0.wo"][:-1]})),
    ("layers.0.wo", lambda values: values.update({"layers.0.wo": values["layers.0.wo"][:, None]})),
    ("output", lambda values: values.update({"output": values["output"].astype(np.float16)})),
    ("output", lambda values: values.update({"output": values["output"].astype(np.float64)})),
    ("layers.2.wo", lambda values: values.update({"layers.2.wo": values["layers.1.wo"]})),
    ("layers.0.wk", lambda values: values.update({"layers.0.wk": values["layers.0.wq"]})),
])  # fmt: skip
def test_bad_tensors(tmp_path, name, change):
    """NaN, infinite or negative numbers, zeros only, a tensor missing, too much, of another shape or type: an error that names it."""
    values = means()
    change(values)
    with pytest.raises(CalibrationError) as e:
        Importance.open(save_raw(tmp_path / "i", values), CONFIG)
    assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("counts", [
    COUNTS + 1, -COUNTS, COUNTS[:1], COUNTS.astype(np.float64), np.array([[1 << 62, 1 << 62, 1 << 62], [50, 50, 0]]),
    np.array([[150, -50, 0], [50, 50, 0]]),
])  # fmt: skip
def test_bad_counts(tmp_path, counts):
    """Counts that are negative, of another shape or type, or that do not sum to the tokens' choices are an error."""
    with pytest.raises(CalibrationError, match="counts"):
        Importance.open(save_raw(tmp_path / "i", means(), counts), CONFIG)


@pytest.mark.parametrize("about", [
    {"format": "other"}, {"version": 2}, {"version": "1"}, {"version": True}, {"tokens": 0}, {"tokens": 1.5}, {"tokens": None}, {"layers": 2},
])  # fmt: skip
def test_bad_metadata(tmp_path, about):
    """A file of another format or version, without tokens, or of a run that is not finished is an error."""
    with pytest.raises(CalibrationError):
        Importance.open(save_raw(tmp_path / "i", means(), about=about), CONFIG)


def test_other_files(tmp_path):
    """No file, a folder, an empty, cut or foreign file, metadata that is no JSON: an error in one line, never another exception."""
    good = save_raw(tmp_path / "good", means()).read_bytes()
    files = {"empty": b"", "text": b"hello, world" * 9, "cut": good[:-8], "long": good + b"\0", "header": good[:100], "zeros": bytes(200)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    plain = {"output": ("F32", (2,), bytes(8))}
    write_safetensors(tmp_path / "foreign", plain)
    for i, text in enumerate(("{", "[]", "3", "null", '"x"', "[" * 5000, '{"format": ["npmix-importance"]}')):
        write_safetensors(tmp_path / f"meta-{i}", plain, {"npmix": text})
    for path in [*tmp_path.iterdir(), tmp_path / "none", tmp_path]:
        if path.name != "good":
            for reader in (Importance.open, Moments):
                with pytest.raises(CalibrationError) as e:
                    reader(path, CONFIG)
                assert "\n" not in str(e.value)


def test_another_models_file(tmp_path):
    """A file of a model with another shape is refused."""
    save_importance(tmp_path / "i", means(), COUNTS, ABOUT)
    for change in ({"n_layers": 1}, {"n_layers": 3}, {"dim": 48}, {"hidden_dim": 176}, {"n_experts": 4}, {"n_heads": 4}):
        with pytest.raises(CalibrationError):
            Importance.open(tmp_path / "i", Config.from_dict({**CONFIG.to_dict(), **change}))


def write_moments(path, change=None):
    rng = np.random.default_rng(0)
    writer = MomentsWriter(path, CONFIG, {"text": "t", "tokens": 50})
    made = {}
    for name, shape in moment_shapes(CONFIG).items():
        x = rng.standard_normal((shape[0], 128, 4)).astype(np.float32)
        made[name] = x @ x.transpose(0, 2, 1)
        made[name] = (made[name] + made[name].transpose(0, 2, 1)) / 2
        if change:
            change(name, made[name])
    for layer in range(2):
        mine = {name: made[name] for name in made if name.startswith(f"layers.{layer}.") or (layer == 1 and name == "output")}
        writer.add(layer, mine)
        assert writer.has(layer + 1) and not writer.has(layer + 2 if layer == 0 else 3)
    writer.finish()
    writer.clear()
    return made


def test_moments_are_read_as_written(tmp_path):
    """Layers added one by one come back whole by every matrix's name, and nothing else is left in the folder."""
    made = write_moments(tmp_path / "s")
    moments = Moments(tmp_path / "s", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    for name, values in made.items():
        assert (moments.of(name) == values).all()
    assert (moments.of("layers.0.wv") == made["layers.0.wq"]).all() and made["layers.0.experts.0.w_down"].shape == (2, 128, 128)
    for name in ("layers.0.router", "tok_embeddings", "norm"):
        assert moments.of(name) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e3])
def test_bad_moments(tmp_path, value):
    """NaN, infinite numbers or a negative square among the products are an error that names the tensor."""

    def change(name, values):
        if name == "layers.1.wo":
            values[0, 3, 3] = value

    write_moments(tmp_path / "s", change)
    moments = Moments(tmp_path / "s", CONFIG)
    moments.of("layers.0.wo")
    with pytest.raises(CalibrationError, match=r"layers\.1\.wo"):
        moments.of("layers.1.wo")
