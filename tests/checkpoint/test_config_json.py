"""config.json -> Config: old and new spellings, defaults, and the keys that must not be ignored."""

import pytest
from make import MISTRAL, TINY

from npmix.checkpoint.config_json import translate
from npmix.errors import ConfigError


def config(**changes):
    """TINY with changes; a value of `...` removes the key."""
    return {k: v for k, v in {**TINY, **changes}.items() if v is not ...}


def mistral(**changes):
    return config(**{**MISTRAL, "num_local_experts": ..., "num_experts_per_tok": ..., **changes})


def test_every_field_is_translated():
    """Each number of config.json arrives in its field."""
    c = translate(config(num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=12345, eos_token_id=[2, 7], bos_token_id=3))
    assert (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim) == (64, 96, 2, 4, 1, 16)
    assert (c.n_experts, c.n_active, c.vocab_size, c.max_positions) == (4, 2, 384, 512)
    assert (c.norm_eps, c.rope_theta, c.sliding_window, c.has_router) == (1e-6, 12345.0, None, True)
    assert (c.bos_id, c.eos_ids, c.tied_embeddings) == (3, (2, 7), False)


def test_mistral_is_one_expert_without_router():
    """A dense model is one expert, no router, with its sliding window."""
    c = translate(mistral())
    assert (c.n_experts, c.n_active, c.has_router, c.sliding_window) == (1, 1, False, 16)
    assert translate(mistral(sliding_window=None)).sliding_window is None


def test_absent_keys_mean_what_transformers_takes_them_to_mean():
    """Defaults of MixtralConfig and MistralConfig."""
    absent = dict.fromkeys(("rms_norm_eps", "rope_theta", "sliding_window", "head_dim", "num_local_experts", "num_experts_per_tok"), ...)
    c = translate(config(num_key_value_heads=..., num_attention_heads=16, **absent))
    assert (c.norm_eps, c.rope_theta, c.sliding_window, c.n_experts, c.n_active, c.n_kv_heads) == (1e-5, 1e6, None, 8, 2, 8)
    c = translate(mistral(**{**absent, "max_position_embeddings": ...}))
    assert (c.norm_eps, c.rope_theta, c.sliding_window, c.head_dim, c.max_positions) == (1e-6, 1e4, 4096, 16, 131072)


@pytest.mark.transformers
@pytest.mark.parametrize("family", ["mixtral", "mistral"])
def test_defaults_equal_transformers(family, tmp_path):
    """What an absent key means is held to the installed transformers, and what it writes is read."""
    import transformers

    made = {"mixtral": transformers.MixtralConfig, "mistral": transformers.MistralConfig}[family](
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=16, vocab_size=384
    )
    made.architectures = [f"{family.capitalize()}ForCausalLM"]
    full = translate(made.to_dict())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type", "architectures")
    assert translate({key: made.to_dict()[key] for key in sizes}) == full


def test_both_spellings_of_rope_theta():
    """rope_theta at the top (older files) or under rope_parameters (newer), the same number if both."""
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert translate(config(rope_theta=..., **new)).rope_theta == 5e5
    assert translate(config(rope_theta=5e5, **new)).rope_theta == 5e5
    assert translate(config(rope_theta=..., rope_scaling={"type": "default"})).rope_theta == 1e6
    with pytest.raises(ConfigError, match="one value"):
        translate(config(rope_theta=1e4, **new))


def test_head_dim_null_or_explicit():
    """head_dim null or absent is hidden_size / num_attention_heads; explicit, it may be anything even."""
    assert translate(config(head_dim=None)).head_dim == 16
    assert translate(config(head_dim=...)).head_dim == 16
    assert translate(config(head_dim=32)).head_dim == 32
    with pytest.raises(ConfigError, match="head_dim"):
        translate(config(head_dim=..., num_attention_heads=6))


def test_num_experts_is_an_alias():
    """num_experts and num_local_experts are one number; two different ones are an error."""
    assert translate(config(num_local_experts=..., num_experts=6)).n_experts == 6
    with pytest.raises(ConfigError, match="differ"):
        translate(config(num_experts=6))


def test_end_tokens():
    """generation_config.json's end tokens come before config.json's; a number, a list or null."""
    assert translate(config()).eos_ids == (2,)
    assert translate(config(eos_token_id=None)).eos_ids == ()
    assert translate(config(eos_token_id=...)).eos_ids == (2,)
    assert translate(config(), {"eos_token_id": [5, 6]}).eos_ids == (5, 6)
    assert translate(config(eos_token_id=4), {"bos_token_id": 1}).eos_ids == (4,)
    with pytest.raises(ConfigError, match="eos_token_id"):
        translate(config(eos_token_id="</s>"))


def test_uniform_layer_types_agree_with_the_window():
    """layer_types may repeat what sliding_window says; a mixture is other arithmetic."""
    translate(mistral(layer_types=["sliding_attention"] * 2))
    translate(mistral(sliding_window=None, layer_types=["full_attention"] * 2))
    for kinds in (["full_attention", "sliding_attention"], ["full_attention"] * 2, ["sliding_attention"]):
        with pytest.raises(ConfigError, match="layer_types"):
            translate(mistral(layer_types=kinds))


def test_harmless_keys_are_ignored():
    """Training and serialisation keys change nothing."""
    harmless = dict(
        torch_dtype="bfloat16", dtype="bfloat16", use_cache=True, initializer_range=0.02, attention_dropout=0.0, router_aux_loss_coef=0.02,
        router_jitter_noise=0.1, output_router_logits=True, transformers_version="4.36", _name_or_path="x", pad_token_id=0,
        id2label={"0": "A"}, return_dict=True, chunk_size_feed_forward=0, problem_type=None, attention_bias=False, rope_scaling=None,
        quantization_config=None,
        _attn_implementation_autoset=True, partial_rotary_factor=1.0, is_decoder=True, pruned_heads={},
    )  # fmt: skip
    assert translate(config(**harmless)) == translate(config())


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"}, "rope_theta": ...},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 1e6, "factor": 2.0}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"attn_logit_softcapping": 50.0},
        {"partial_rotary_factor": 0.5},
        {"hidden_act": "gelu"},
        {"norm_topk_prob": True},
        {"n_shared_experts": 1},
        {"some_new_key": "anything"},
    ],
)
def test_keys_that_change_the_arithmetic_are_errors(changes):
    """A key that is not known to be harmless is an error that names it, never ignored."""
    with pytest.raises(ConfigError) as e:
        translate(config(**changes))
    assert "\n" not in str(e.value)
    assert next(iter(changes)) in str(e.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["MistralForCausalLM"]},
        {"architectures": ["MixtralForSequenceClassification"]},
        {"architectures": "MixtralForCausalLM"},
        {"architectures": ..., "model_type": ...},
        {"architectures": [7]},
        {"architectures": [], "model_type": ["mixtral"]},
        {"hidden_size": "64"},
        {"hidden_size": ...},
        {"hidden_size": 1 << 40},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0, "head_dim": ...},
        {"num_attention_heads": True},
        {"num_key_value_heads": 3},
        {"num_experts_per_tok": 5},
        {"num_local_experts": 0},
        {"num_local_experts": None},
        {"head_dim": 7},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"rope_theta": [1e6]},
        {"rope_parameters": 7},
        {"sliding_window": "wide"},
        {"sliding_window": 0},
        {"tie_word_embeddings": "yes"},
        {"vocab_size": 0},
        {"eos_token_id": 384},
        {"bos_token_id": -1},
        {"bos_token_id": "<s>"},
        {"max_position_embeddings": 1.5},
    ],
)
def test_bad_values_are_one_line_errors(changes):
    """Wrong types, impossible sizes and foreign architectures are ConfigErrors of one line."""
    with pytest.raises(ConfigError) as e:
        translate(config(**changes))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_dense_model_with_experts_is_refused():
    """MistralForCausalLM has no experts."""
    with pytest.raises(ConfigError, match="dense"):
        translate(mistral(num_local_experts=8))


def test_no_value_of_any_key_escapes_as_another_exception():
    """Whatever stands in config.json, the answer is a Config or a ConfigError of one line."""
    numbers = [True, False, 0, -1, 1, 7, 1 << 70, 0.5, float("nan"), float("-inf")]
    values = [*numbers, None, "", "x\ny", [], [1], ["x", None], {}, {"a": 1}, [[]]]
    keys = [*TINY, "rope_parameters", "rope_scaling", "layer_types", "num_experts", "partial_rotary_factor", "is_decoder", "new\nkey", ""]
    for base in (config(), mistral()):
        for key in keys:
            for value in values:
                try:
                    translate({**base, key: value}, {"eos_token_id": value})
                except ConfigError as e:
                    assert "\n" not in str(e), (key, value)
