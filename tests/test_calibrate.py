"""Calibration: what it measures, that it does so to the bit however it is run, and that a killed run goes on."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make import TEXT, TINY, tiny_arrays, tiny_hf

import npmix.calibrate
from npmix.calibrate import calibrate, windows
from npmix.errors import CalibrationError, InputError, NumericsError, StoreError
from npmix.generate import BUNDLED
from npmix.kernels import tables
from npmix.kernels._jit import njit
from npmix.kernels.observe import add_products
from npmix.kernels.ops import load_f32
from npmix.model import reference
from npmix.model.forward import Forward
from npmix.model.weights import Weights
from npmix.quant.pack import dequantize
from npmix.store import open_source
from npmix.store.importance import Importance, load_importance
from npmix.store.moments import Moments
from npmix.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
SMALL = {"num_hidden_layers": 3, "tokenizer": True}
TOKENS, WINDOW = 50, 24  # two whole windows and a rest


class Input:
    """A matrix for `x @ w.T` that remembers its inputs."""

    __array_ufunc__ = None  # so that NumPy leaves the product to us

    def __init__(self, w, rows):
        self.w, self.rows = w, rows

    @property
    def T(self):
        return self

    def __rmatmul__(self, x):
        self.rows.append(x)
        return x @ self.w.T


def observed(path, ids, window):
    """Name -> every input row of that matrix in the plain model, float64 (tokens, K)."""
    with open_source(path) as source:

        def weights(name):
            w = np.asarray(dequantize(source.tensor(name)), np.float32)
            return w if w.ndim == 1 or name == "tok_embeddings" else Input(w, rows.setdefault(name, []))

        rows: dict[str, list] = {}
        for start in range(0, len(ids), window):
            reference.forward(source.config, weights, ids[start : start + window])
        return {name: np.concatenate(found).astype(np.float64) for name, found in rows.items()}


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("calibrate") / "model", **SMALL)


def test_products_twin():
    """The kernel's float64 sums are those of NumPy, on ordinary and extreme numbers."""

    @njit
    def run(p, a, b):
        add_products(p, load_f32(a), load_f32(b))

    rng = np.random.default_rng(0)
    for scale in (1.0, 1e-20, 1e19, 1e-40):
        a, b = (rng.standard_normal((2, 16)) * scale).astype(np.float32)
        sums = rng.standard_normal(16)
        expected = sums + a.astype(np.float64) * b.astype(np.float64)
        run(sums.ctypes.data, a.ctypes.data, b.ctypes.data)
        assert (sums == expected).all()


@pytest.mark.parametrize("kind", [
    {}, {"tie_word_embeddings": True, "num_local_experts": 3, "num_experts_per_tok": 1}, {"mistral": True},
    {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6, "head_dim": 24},
])  # fmt: skip
def test_means_are_those_of_the_plain_model(tmp_path, kind):
    """Every mean is that of the squares which the NumPy model multiplies with, an expert's over its own tokens; so are the products."""
    path, out, second = tiny_hf(tmp_path / "m", **{**SMALL, "num_hidden_layers": 2, **kind}), tmp_path / "i", tmp_path / "s"
    calibrate(path, TEXT, out, tokens=TOKENS, window=WINDOW, moments=second)
    with open_source(path) as source:
        config = source.config
        ids = windows(Tokenizer.for_model(source.tokenizer_path, config), TEXT, WINDOW, TOKENS)
    rows = observed(path, ids, WINDOW)
    means, counts, about = load_importance(out, config)
    moments = Moments(second, config)
    assert about["tokens"] == len(ids) == TOKENS and about["window"] == WINDOW
    for name, mean in means.items():
        expected = (rows[name] ** 2).mean(0) if name in rows else 0 * mean
        assert np.abs(mean - expected).max() <= 2e-3 * expected.max(), name  # a float16 cache, rounded norms
        if name.endswith("w_gate") and name in rows:
            assert counts[int(name.split(".")[1]), int(name.split(".")[3])] == len(rows[name])
        block = moments.of(name)
        if name.endswith("router"):
            assert block is None
            continue
        for b in range(len(block)):
            x = rows[name][:, 128 * b : 128 * b + 128] if name in rows else np.zeros((1, 0))
            full = x.T @ x / len(x)
            n = len(full)
            assert np.abs(block[b, :n, :n] - full).max(initial=0) <= 4e-3 * expected.max(), name
            assert not block[b, n:].any() and not block[b, :, n:].any()
        diagonal = np.concatenate([np.diagonal(part) for part in block])[: len(mean)]
        assert np.allclose(diagonal, mean, rtol=1e-5)
    assert (rows["layers.0.wk"] == rows["layers.0.wq"]).all() and set(counts.sum(1)) == {TOKENS * config.n_active}


def test_an_expert_nobody_chose(tmp_path):
    """An expert that no token chose has zeros and count 0 in the file; read, it has the means over the others' tokens."""
    arrays = tiny_arrays({**TINY, "num_hidden_layers": 1})
    router = arrays["model.layers.0.block_sparse_moe.gate.weight"]
    router[1], router[3] = -router[0], 0  # of a and -a one is above 0
    path = tiny_hf(tmp_path / "m", arrays=arrays, num_hidden_layers=1, num_experts_per_tok=1, tokenizer=True)
    calibrate(path, TEXT, tmp_path / "i", tokens=TOKENS, window=WINDOW)
    with open_source(path) as source:
        config = source.config
    means, counts, _ = load_importance(tmp_path / "i", config)
    assert counts[0, 3] == 0 and counts[0, :3].sum() == TOKENS
    found = Importance.open(tmp_path / "i", config)
    for kind, count in (("w_gate", 64), ("w_down", 96)):
        assert not means[f"layers.0.experts.3.{kind}"].any()
        every = sum(counts[0, e] * means[f"layers.0.experts.{e}.{kind}"].astype(np.float64) for e in range(3)) / TOKENS
        assert found.of(f"layers.0.experts.3.{kind}").shape == (count,)
        assert np.allclose(found.of(f"layers.0.experts.3.{kind}"), every, rtol=1e-6)


@pytest.mark.compiled
def test_threads_and_chunks_change_no_bit(model, tmp_path, monkeypatch):
    """One thread or two, chunks of 512 tokens or of 7: the importance file is the same, byte for byte."""
    for i, (threads, chunk) in enumerate(((1, 512), (2, 512), (2, 7), (1, 1))):
        monkeypatch.setattr(npmix.calibrate, "CHUNK", chunk)
        calibrate(model, TEXT, tmp_path / str(i), tokens=TOKENS, window=WINDOW, threads=threads)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.compiled
def test_observing_changes_no_bit_of_the_logits(model):
    """Logits are the same, ==, whether a layer's inputs are kept or not; so are those of one layer after the other."""
    ids = np.arange(3, 33, dtype=np.int32)
    with open_source(model) as source:
        plain, kept = (Forward(Weights(source), 64, 32, "f16", 2) for _ in range(2))
        kept.state.observe(kept.config)
        expected = plain.prefill(ids, 0, "all")
        assert (kept.prefill(ids, 0, "all") == expected).all()
        last = [forward.prefill(ids, 0, "last") for forward in (plain, kept)]
        assert (last[0] == expected[-1]).all() and (last[1] == expected[-1]).all()
        plain.prefill(ids, 0, "all")
        rows = None
        for layer in range(kept.config.n_layers):
            rows = kept.layer(layer, ids, 0, None if rows is None else rows.copy())
        assert (rows == plain.state.array(tables.X)[: len(ids), : kept.config.dim]).all()
        plain.close()
        kept.close()


KILLED = """
import os, sys, signal
from npmix.calibrate import calibrate
replace, calls = os.replace, 0
def counted(*paths):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths)
os.replace = counted
model, folder = sys.argv[1:3]
calibrate(model, {text!r}, folder + "/i", tokens={tokens}, window={window}, moments=folder + "/s", threads=1)
"""


@pytest.mark.compiled
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_kill_and_go_on(model, tmp_path):
    """Killed (-9) before the first of its renames, run again and killed before the second, and so on: never an output before
    the end, and then the same bytes as in one go, with nothing left beside them."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    calibrate(model, TEXT, whole / "i", tokens=TOKENS, window=WINDOW, moments=whole / "s")
    script = KILLED.format(text=TEXT, tokens=TOKENS, window=WINDOW)
    kills = 0
    while True:
        done = subprocess.run([sys.executable, "-c", script, model, cut, str(kills + 1)], capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (cut / "i").exists()
        kills += 1
    assert kills >= 4
    assert file_bytes(cut) == file_bytes(whole)


def interrupted(model, out, layer=1, **options):
    """Stop a calibration in the midst of a layer, as Ctrl-C does."""

    def stop(done, total):
        if done > layer * total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, TEXT, out, **{"tokens": TOKENS, "window": WINDOW, "progress": stop, **options})
    assert out.with_name(out.name + ".partial").exists() and not out.exists()


def test_going_on_skips_what_is_done(model, tmp_path):
    """After an interrupt in layer 2 of 3 the same call begins there: progress starts at one third."""
    out, seen = tmp_path / "i", []
    interrupted(model, out)
    calibrate(model, TEXT, out, tokens=TOKENS, window=WINDOW, progress=lambda done, total: seen.append(done / total))
    assert 1 / 3 < seen[0] < 1 and seen == sorted(seen) and seen[-1] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


@pytest.mark.compiled
@pytest.mark.parametrize("change", ["text", "tokens", "window", "model", "moments"])
def test_goes_on_with_the_same_only(model, tmp_path, change):
    """What another model, text or other settings left is refused, by name, and kept; with force it is replaced."""
    folder, out = tmp_path / "f", tmp_path / "f" / "i"
    folder.mkdir()
    interrupted(model, out)
    before = file_bytes(folder)
    arguments = {"model": model, "text": TEXT, "tokens": TOKENS, "window": WINDOW}
    if change == "model":
        arguments["model"] = tiny_hf(tmp_path / "other", seed=1, **SMALL)
    else:
        arguments[change] = {"text": TEXT[1:], "tokens": TOKENS + 1, "window": WINDOW + 1, "moments": folder / "s"}[change]
    with pytest.raises(CalibrationError, match=r"i\.partial.*--force"):
        calibrate(out=out, **arguments)
    assert file_bytes(folder) == before
    calibrate(out=out, force=True, **arguments)
    assert sorted(path.name for path in folder.iterdir()) == (["i", "s"] if change == "moments" else ["i"])


def test_damaged_state(model, tmp_path):
    """A state that cannot be read, or whose rows are gone or too short, is an error that says how to start anew."""
    out = tmp_path / "i"
    interrupted(model, out, layer=1)
    rows, state = tmp_path / "i.rows-1.partial", tmp_path / "i.partial"
    data, kept = rows.read_bytes(), state.read_bytes()
    for path, bad in ((rows, data[:-4]), (rows, None), (state, kept[:-1]), (state, b""), (state, kept[:200])):
        rows.write_bytes(data)
        state.write_bytes(kept)
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(CalibrationError, match="--force"):
            calibrate(model, TEXT, out, tokens=TOKENS, window=WINDOW)
    calibrate(model, TEXT, out, tokens=TOKENS, window=WINDOW, force=True)


def test_a_second_run_at_once(model, tmp_path):
    """While a run is at work another one for the same file is refused."""
    out = tmp_path / "i"

    def again(done, total):
        with pytest.raises(StoreError, match="another calibration"):
            calibrate(model, TEXT, out, tokens=TOKENS, window=WINDOW)

    calibrate(model, TEXT, out, tokens=TOKENS, window=WINDOW, progress=again)
    assert out.exists()


def test_refusals(model, tmp_path, monkeypatch):
    """Each wrong argument is an error in one line that names it; nothing is written."""
    (tmp_path / "there").write_text("mine")
    for error, match, options in (
        (CalibrationError, "exists", {"out": tmp_path / "there"}),
        (CalibrationError, "exists", {"moments": tmp_path / "there"}),
        (CalibrationError, "folder", {"out": tmp_path}),
        (CalibrationError, "folder", {"out": tmp_path / "none" / "i"}),
        (InputError, "tokens", {"tokens": 1}),
        (InputError, "window", {"window": 1}),
        (InputError, "window", {"window": 513}),
        (InputError, "threads", {"threads": 0}),
        (InputError, "text", {"text": ""}),
        (InputError, "another name", {"moments": tmp_path / "." / "i"}),
        (InputError, "2", {"model": tiny_hf(tmp_path / "one", max_position_embeddings=1, **SMALL)}),
        (InputError, "tokenizer", {"model": tiny_hf(tmp_path / "bare", num_hidden_layers=1)}),
    ):
        with pytest.raises(error, match=match) as e:
            calibrate(**{"model": model, "text": TEXT, "out": tmp_path / "i", **options})
        assert "\n" not in str(e.value)
    monkeypatch.setattr(npmix.calibrate.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(CalibrationError, match="free"):
        calibrate(model, TEXT, tmp_path / "i")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "one", "there"] and (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize("name, match", [("self_attn.o_proj", "layer 0"), ("block_sparse_moe.experts.0.w2", "output")])
def test_a_model_with_bad_weights(tmp_path, name, match):
    """NaN weights end in a NumericsError that names the layer, or the matrix that got the NaN, and no file is left."""
    arrays = tiny_arrays({**TINY, "num_hidden_layers": 1})
    arrays[f"model.layers.0.{name}.weight"][3, 5] = np.nan
    path = tiny_hf(tmp_path / "m", arrays=arrays, num_hidden_layers=1, tokenizer=True)
    with pytest.raises(NumericsError, match=match):
        calibrate(path, TEXT, tmp_path / "i", tokens=TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.compiled
def test_a_packed_store_gives_nearly_the_same(tmp_path):
    """The means of a store of 8 bits are those of its checkpoint but for 3 % on average (a few tokens choose other experts)."""
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")[:12000]
    found = []
    for name, path in (("checkpoint", DATA / "tiny_mixtral"), ("store", BUNDLED)):
        calibrate(path, text, tmp_path / name, tokens=3000)
        with open_source(path) as source:
            importance = Importance.open(tmp_path / name, source.config)
            found.append({name: importance.of(name) for name in source.names()})
    for name, expected in found[0].items():
        if expected is not None:
            assert np.abs(found[1][name] - expected).mean() < 0.03 * expected.mean(), name


def test_windows(model):
    """Each window begins with the bos id and no token of the text is lost; `tokens` cuts the end off."""
    tokenizer = Tokenizer(model / "tokenizer.model")
    ids = windows(tokenizer, TEXT, 10, None).tolist()
    assert set(ids[::10]) == {tokenizer.bos_id}
    assert [id for at, id in enumerate(ids) if at % 10] == tokenizer.encode(TEXT, bos=False)
    assert windows(tokenizer, TEXT, 10, 25).tolist() == ids[:25]
