"""The plain NumPy model against transformers, and the kernels against the plain model."""

import numpy as np
import pytest
from oracle import KINDS, distance, load_oracle, make_model, oracle_logits, random_ids

from npmix.checkpoint import open_checkpoint
from npmix.engine import Engine
from npmix.kernels._jit import DISABLED
from npmix.model import reference
from npmix.quant.pack import dequantize


def reference_logits(path, ids):
    """float32 (T, V) of `model/reference.py` over a Hugging Face folder."""
    with open_checkpoint(path) as source:
        return reference.forward(source.config, lambda name: dequantize(source.tensor(name)), ids)


@pytest.mark.transformers
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_model_of_transformers(tmp_path, kind):
    """One page of NumPy gives the logits of MixtralForCausalLM and MistralForCausalLM within 1e-5 of the largest."""
    path = make_model(tmp_path / "m", kind)
    oracle = load_oracle(path)
    ids = random_ids(oracle.config.vocab_size, 70)
    assert distance(reference_logits(path, ids), oracle_logits(oracle, ids)) < 1e-5


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["Mixtral", "Mistral"])
def test_a_checkpoint_that_transformers_saved(tmp_path, name):
    """save_pretrained's own folder, in bfloat16: read as it is, the same logits as its reload in float32."""
    import torch
    import transformers

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"num_local_experts": 4} if name == "Mixtral" else {"sliding_window": 16}
    config = getattr(transformers, name + "Config")(vocab_size=300, max_position_embeddings=256, initializer_range=0.1, **sizes, **more)
    getattr(transformers, name + "ForCausalLM")(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    ids = random_ids(300, 50)
    assert distance(reference_logits(tmp_path / "m", ids), oracle_logits(load_oracle(tmp_path / "m"), ids)) < 1e-5


@pytest.mark.transformers
@pytest.mark.parametrize("kind", ["mixtral", "mistral", "odd sizes"])
def test_inverse_frequencies_of_the_oracle(tmp_path, kind):
    """The oracle's inv_freq are 1 / theta^(2i/d) computed in float32 throughout, and so are our angles, bit for bit."""
    import torch

    path = make_model(tmp_path / "m", kind)
    oracle = load_oracle(path)
    config = open_checkpoint(path).config
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    formula = 1.0 / (config.rope_theta**exponent)
    buffers = [value for name, value in oracle.named_buffers() if name.endswith(".inv_freq")]
    assert len(buffers) == 1
    assert buffers[0].dtype == torch.float32 and torch.equal(buffers[0], formula)
    ours = reference.rope_angles(config, np.array([1]))[0]
    np.testing.assert_allclose(ours, formula.numpy(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_the_reference(tmp_path, kind):
    """The engine on the unconverted folder is within 1e-5 of the largest logit of the plain model, for every shape of model."""
    path = make_model(tmp_path / "m", kind)
    with Engine(path, kv="f32", chunk=5 if DISABLED else 37) as engine:
        ids = random_ids(engine.config.vocab_size, 8 if DISABLED else 150)
        assert distance(engine.logits(ids), reference_logits(path, ids)) < 1e-5
