"""tools/compare_quality.py, as far as it needs no llama.cpp: its names, orders and importance for llama.cpp, the errors, the table."""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from make import TEXT, tiny_hf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import compare_quality as tool  # noqa: E402
import quality_peer as peer  # noqa: E402

from npmix.checkpoint import open_checkpoint  # noqa: E402
from npmix.config import Config  # noqa: E402
from npmix.model.reference import rope, rope_angles  # noqa: E402
from npmix.quant.pack import dequantize  # noqa: E402
from npmix.store.importance import load_importance, save_importance, shapes  # noqa: E402


def side(kl, nll, bits=4.0, label="x"):
    return tool.Side(label, bits, np.array(kl, np.float64), np.array(nll, np.float64))


def interleaved(x, angles):
    """RoPE on neighbouring pairs, as llama.cpp has it."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    out = np.empty_like(x)
    out[..., ::2], out[..., 1::2] = x[..., ::2] * cos - x[..., 1::2] * sin, x[..., ::2] * sin + x[..., 1::2] * cos
    return out


def test_paired_rows_give_the_same_scores():
    """q and k whose rows changed places, rotated by neighbouring pairs, have the products that halves give."""
    config = Config(32, 1, 4, 2, 8, 32, 2, 1, 40, 1e-5, 1e4, 64)
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((7, 32)), rope_angles(config, np.arange(7))
    wq, wk = rng.standard_normal((32, 32)), rng.standard_normal((16, 32))
    products = []
    for q, k, turn in ((wq, wk, rope), (peer.paired_rows(wq, 4), peer.paired_rows(wk, 2), interleaved)):
        q, k = turn((x @ q.T).reshape(7, 4, 8), angles), turn((x @ k.T).reshape(7, 2, 8), angles)
        products.append(np.einsum("thd,shd->hts", q, np.repeat(k, 2, axis=1)))
    assert np.allclose(*products)


def test_arrays_hold_every_weight_once(tmp_path):
    """All weights of the checkpoint stand under GGUF's names, experts stacked, and nothing else does."""
    with open_checkpoint(tiny_hf(tmp_path / "hf")) as source:
        arrays = peer.llama_arrays(source)
        total = sum(math.prod(shape) for shape in source.config.tensor_shapes().values())
        assert sum(a.size for a in arrays.values()) == total and all(a.dtype == np.float32 for a in arrays.values())
        for ours, theirs in (("router", "ffn_gate_inp"), ("wo", "attn_output"), ("ffn_norm", "ffn_norm")):
            assert (arrays[f"blk.1.{theirs}.weight"] == dequantize(source.tensor(f"layers.1.{ours}"))).all()
        for ours, theirs in (("w_gate", "ffn_gate_exps"), ("w_up", "ffn_up_exps"), ("w_down", "ffn_down_exps")):
            assert (arrays[f"blk.0.{theirs}.weight"][2] == dequantize(source.tensor(f"layers.0.experts.2.{ours}"))).all()
        assert (arrays["output.weight"] == dequantize(source.tensor("output"))).all()


def test_importance_under_llamas_names(tmp_path):
    """Each matrix gets the mean squares of its own inputs, experts side by side; one that no token chose gets ones; router and table get none."""
    with open_checkpoint(tiny_hf(tmp_path / "hf")) as source:
        config, arrays = source.config, peer.llama_arrays(source)
    rng = np.random.default_rng(0)
    means = {name: rng.gamma(1.0, 1.0, shape).astype(np.float32) for name, shape in shapes(config).items()}
    counts = np.array([[20, 20, 20, 20], [40, 40, 0, 0]])
    for name in means:
        if name.startswith(("layers.1.experts.2", "layers.1.experts.3")):
            means[name][:] = 0
    save_importance(tmp_path / "i", means, counts, {"tokens": 40, "window": 8})
    found = peer.llama_importance(*load_importance(tmp_path / "i", config)[:2], config)
    assert set(found) == {name for name, a in arrays.items() if a.ndim > 1} - {
        "token_embd.weight",
        *(f"blk.{i}.ffn_gate_inp.weight" for i in (0, 1)),
    }
    assert all(values.shape == (*arrays[name].shape[:-2], arrays[name].shape[-1]) for name, values in found.items())
    assert (found["blk.1.attn_v.weight"] == means["layers.1.wq"]).all() and (found["output.weight"] == means["output"]).all()
    assert (found["blk.0.ffn_up_exps.weight"][3] == means["layers.0.experts.3.w_gate"]).all()
    assert (found["blk.1.ffn_down_exps.weight"][2] == 1).all()


def test_errors_are_of_paired_windows():
    """What both sides have in common drops out of the difference; the ratio's error is that of its windows, as a jackknife finds it."""
    rng = np.random.default_rng(0)
    common = rng.gamma(1.0, 1.0, (200, 1)) + rng.gamma(1.0, 0.1, (200, 50))
    ours, theirs = side(0.8 * common, common), side(common, common + 0.01)
    found = tool.paired(ours, theirs)
    assert abs(found["kl_ratio"] - 0.8) < 1e-12 and found["kl_ratio_error"] < 1e-12
    assert abs(found["perplexity_ratio"] - math.exp(-0.01)) < 1e-12 and found["perplexity_ratio_error"] < 1e-12
    noisy = side(0.8 * common * rng.gamma(50.0, 1 / 50, (200, 1)), common)
    found = tool.paired(noisy, theirs)
    left = [np.delete(noisy.kl, i, 0).mean() / np.delete(common, i, 0).mean() for i in range(200)]
    jackknife = math.sqrt(199 / 200 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert abs(found["kl_ratio_error"] / jackknife - 1) < 0.05
    mean, error = tool.over_windows(common)
    assert abs(error - common.mean(1).std(ddof=1) / math.sqrt(200)) < 1e-12 and abs(mean - common.mean()) < 1e-12
    assert math.isnan(tool.over_windows(common[:1])[1])


@pytest.mark.parametrize(
    "width, bits, kl, nll, met",
    [
        ("q4", 4.4, 0.9, 1.0, True),
        ("q4", 4.6, 0.9, 1.0, False),
        ("q4", 4.4, 0.91, 1.0, False),
        ("q4", 4.4, 0.9, 1.001, False),
        ("q8", 4.4, 1.0, 1.0, True),
        ("q8", 4.4, 1.01, 1.0, False),
    ],
)
def test_goal_and_table(width, bits, kl, nll, met):
    """Bits, KL and perplexity must all hold; the table says so in one line a row, and JSON holds it."""
    theirs = side([[1, 2], [3, 2]], [[1, 1], [1, 1]], 4.5, "Q4_K")
    found = tool.row(width, True, side(kl * theirs.kl, nll * theirs.nll, bits), theirs)
    assert found["met"] is met
    head, line = tool.table([found])
    assert "perplexity" in head and f"{width} calibrated" in line and "Q4_K" in line and line.endswith("met" if met else "MISSED")
    assert json.loads(json.dumps(found))["llamacpp"]["bits"] == 4.5


@pytest.mark.parametrize("more, met", [(0.0003, True), (0.0006, False)])
def test_a_perplexity_is_higher_beyond_doubt_only(more, met):
    """Losses of windows that differ by 0.002 either way (error 0.002 / sqrt(99)): a mean of 0.0003 more may be chance, 0.0006 is not."""
    common = np.ones((100, 2))
    chance = 0.002 * np.where(np.arange(100) % 2, 1, -1)[:, None]
    theirs = side(common, common, 4.5, "Q4_K")
    assert tool.row("q4", False, side(0.5 * common, common + more + chance), theirs)["met"] is met


def test_texts_of_their_own():
    """What is measured on, by default, is no part of what is calibrated on, nor of the bundled model's training."""
    given = tool.arguments().parse_args([])
    assert given.text is None and given.calibration.name == "heldout.txt"
    modules = tool.other_modules()
    assert len(modules) > 4 * given.calibration.stat().st_size
    assert not any(line in modules for line in given.calibration.read_text(encoding="utf-8").splitlines() if len(line) > 78)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib: pip install '.[compare]'")
def test_plot(tmp_path):
    """The plot is a PNG."""
    theirs = side([[1, 2], [3, 2]], [[1, 1], [1, 1]], 4.5, "Q4_K")
    rows = [tool.row("q4", calibrated, side(theirs.kl / 2, theirs.nll), theirs) for calibrated in (False, True)]
    tool.plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


class FakePeer:
    """llama.cpp as the base itself, with noise on its logits."""

    def __init__(self, base, tensors):
        self.base, self.tensors, self.noise, self.asked = base, tensors, 0.0, []

    def ask(self, do, **what):
        self.asked.append(do)
        if do == "open":
            self.noise = 0.0 if what["gguf"].name == "f32.gguf" else 0.5
        if do == "quantize":
            kinds = {
                name: what["experts"] if "_exps" in name else "F32" if len(a) == 1 or "inp" in name else "Q8_0"
                for name, a in self.tensors.items()
            }
            return {"tensors": {name: [kinds[name], math.prod(a), 2 * math.prod(a)] for name, a in self.tensors.items()}}
        if do == "logits":
            rows = self.base.logits(what["ids"])[what["first"] :]
            np.save(what["out"], rows + self.noise * np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32))
        return {}


@pytest.mark.compiled
@pytest.mark.transformers
def test_the_whole_with_a_peer_made_up(tmp_path):
    """Base, npmix's side and the loop over widths on a tiny model; a second run asks the peer for nothing, other settings are refused."""
    from npmix.engine import Engine

    hf = tiny_hf(tmp_path / "hf", tokenizer=True, hidden_size=128, intermediate_size=128)
    (tmp_path / "text").write_text(TEXT * 3)
    (tmp_path / "calibration").write_text(TEXT)
    files = ["--checkpoint", hf, "--text", tmp_path / "text", "--calibration", tmp_path / "calibration", "--work", tmp_path / "work"]
    (tmp_path / "work").mkdir()

    def arguments(*more):
        return tool.arguments().parse_args([str(word) for word in [*files, "--context", 64, "--threads", 2, *more]])

    with open_checkpoint(hf) as source:
        config, tensors = source.config, {name: a.shape for name, a in peer.llama_arrays(source).items()}
    means, counts = {name: np.ones(shape, np.float32) for name, shape in shapes(config).items()}, np.full((2, 4), 20)
    save_importance(tmp_path / "work" / "importance.safetensors", means, counts, {"tokens": 40, "window": 8})  # what calibrating gives
    with Engine(hf, kv="f32") as base:
        fake = FakePeer(base, tensors)
        rows = tool.Comparison(arguments("--limit", 3), fake).run(["q8"])
        assert [r["calibrated"] for r in rows] == [False, True] and rows[0]["llamacpp"]["bits"] == 4.0
        assert 0 < rows[0]["npmix"]["kl"] < 1e-3 < rows[0]["llamacpp"]["kl"] and rows[0]["npmix"]["kl"] == rows[1]["npmix"]["kl"]
        assert set(fake.asked) == {"gguf", "quantize", "open", "logits"}
        asked = len(fake.asked)
        assert tool.Comparison(arguments("--limit", 3), fake).run(["q8"]) == rows and len(fake.asked) == asked
    with pytest.raises(SystemExit, match="another --work"):
        tool.Comparison(arguments("--limit", 2), fake)


@pytest.mark.skipif(os.name != "posix", reason="starts a shell script")
def test_a_peer_that_is_not_there(tmp_path):
    """A Python without llama.cpp, or none at all, is told in one line, before anything is computed."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    for python, says in ((script, "pip install"), (tmp_path / "none", "No such file")):
        with pytest.raises(SystemExit, match=f"compare_quality: .*{says}"):
            tool.main(["--work", str(tmp_path / "work"), "--llama-python", str(python)])
        assert not list((tmp_path / "work").iterdir())
