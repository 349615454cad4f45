"""Numbers that are not finite, or too large for the cache: who is named, and that nothing of them stays behind."""

import warnings

import numpy as np
import pytest
from make import TINY as MODEL_CONFIG
from make import tiny_arrays, tiny_hf

from npmix.engine import Engine
from npmix.errors import NumericsError
from npmix.kernels._jit import DISABLED

MODEL = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 100}
IDS = [3, 14, 15, 92, 65, 35]
ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
EXPERTS = [f"block_sparse_moe.experts.{{}}.w{i}" for i in (1, 2, 3)]
BROKEN = ["input_layernorm", *ATTENTION, "post_attention_layernorm", "block_sparse_moe.gate", *EXPERTS]
if DISABLED:
    BROKEN = BROKEN[::3]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_layer_of_a_broken_weight(tmp_path, name, value):
    """Weights that are NaN or infinite: prefill, decode and logits raise a NumericsError that names the first layer that broke."""
    arrays = tiny_arrays({**MODEL_CONFIG, **MODEL})
    for expert in range(4 if "{}" in name else 1):
        arrays[f"model.layers.1.{name.format(expert)}.weight"][...] = value
    path = tiny_hf(tmp_path / "m", arrays=arrays, dtype="f32", **MODEL)
    with Engine(path, threads=1, kv="f32", chunk=4) as engine:
        for call in (lambda: engine.prefill(IDS), lambda: engine.step(3), lambda: engine.logits(IDS)):
            with pytest.raises(NumericsError, match=r"layer 1 \(of 0..2\)"):
                call()
            assert engine.position == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name, where", [("lm_head", "output"), ("model.norm", "output"), ("model.embed_tokens", "embeddings")])
def test_broken_weights_outside_the_layers(tmp_path, name, where):
    """The same of the embeddings and of what follows the last layer."""
    arrays = tiny_arrays({**MODEL_CONFIG, **MODEL})
    arrays[name + ".weight"][...] = np.nan
    path = tiny_hf(tmp_path / "m", arrays=arrays, dtype="f32", **MODEL)
    with Engine(path, threads=1, kv="f32", chunk=4) as engine:
        for call in (lambda: engine.prefill(IDS), lambda: engine.step(3), lambda: engine.logits(IDS)):
            with pytest.raises(NumericsError, match=where):
                call()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype, kv", [("f32", "f32"), ("bf16", "q8")])
def test_numbers_that_were_not_finite_are_forgotten(tmp_path, dtype, kv):
    """One broken embedding: its token is refused, and neither this sequence nor the next one keeps anything of it."""
    arrays = tiny_arrays({**MODEL_CONFIG, **MODEL})
    arrays["model.embed_tokens.weight"][50] = np.nan
    path = tiny_hf(tmp_path / "m", arrays=arrays, dtype=dtype, **MODEL)
    with Engine(path, threads=1, kv=kv, chunk=4) as engine:
        expected = engine.logits(IDS)
        for call in (lambda: engine.logits([1, 2, 50, 3]), lambda: engine.logits([1, 2, 3, 4, 5, 50]), lambda: engine.step(50)):
            with pytest.raises(NumericsError, match="embeddings"):
                call()
            assert (engine.logits(IDS) == expected).all()
        engine.prefill(IDS[:3])
        with pytest.raises(NumericsError):
            engine.step(50)
        with pytest.raises(NumericsError):
            engine.prefill([50, 2])
        assert engine.position == 3
        assert (engine.step(IDS[3]) == expected[3]).all()


def test_saturation(tmp_path):
    """A value beyond 65,504 is cut in a float16 cache, which `saturated` and one warning tell, and kept in a float32
    and in an 8-bit one."""
    arrays = tiny_arrays({**MODEL_CONFIG, **MODEL})
    arrays["model.layers.1.self_attn.v_proj.weight"] *= 1e6
    path = tiny_hf(tmp_path / "m", arrays=arrays, **MODEL)
    for kv in ("f16", "f32", "q8"):
        for call in ("prefill", "step"):
            with Engine(path, threads=1, kv=kv) as engine:
                assert not engine.saturated
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    row = engine.prefill(IDS) if call == "prefill" else engine.step(5)
                    engine.step(6)
                assert ["--kv f32" in str(w.message) for w in told] == ([True] if kv == "f16" else [])
                assert np.isfinite(row).all()
                assert engine.saturated == (kv == "f16")
