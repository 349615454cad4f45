"""Hugging Face config.json -> Config.

One hard fact: a key that would change the arithmetic and is not supported is an error, never
ignored. So there are three lists: keys we translate, keys known to be harmless, and keys with the
one value we can honour; anything else must be null, false or empty. An absent key means
what transformers' MixtralConfig and MistralConfig take it to mean.
"""

from pathlib import Path

from ..config import Config
from ..errors import ConfigError
from .jsonfile import read_json

ARCHITECTURES = {"MixtralForCausalLM": "mixtral", "MistralForCausalLM": "mistral"}
# Absent keys, from transformers' configuration_mixtral.py and configuration_mistral.py
DEFAULTS = {
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
    "mistral": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096},
}
TRANSLATED = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "num_local_experts", "num_experts", "num_experts_per_tok", "vocab_size", "rms_norm_eps", "rope_theta", "rope_parameters",
    "rope_scaling", "max_position_embeddings", "sliding_window", "layer_types", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "architectures", "model_type",
}  # fmt: skip
# Training, serialisation and generation defaults; transformers' PreTrainedConfig and GenerationConfig.
HARMLESS = {
    "torch_dtype", "dtype", "use_cache", "initializer_range", "attention_dropout", "router_aux_loss_coef", "router_jitter_noise",
    "output_router_logits", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "pad_token_id", "sep_token_id",
    "unk_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "return_dict",
    "return_dict_in_generate", "output_hidden_states", "output_attentions", "output_scores", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "chunk_size_feed_forward", "torchscript",
    "tf_legacy_loss", "use_bfloat16", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "max_new_tokens", "_attn_implementation_autoset",
    "_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation", "_flash_attn_2_enabled",
    "pretraining_tp", "gradient_checkpointing", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# Keys whose only supported value changes nothing.
ONLY = {"hidden_act": ("silu", "swish"), "is_decoder": (True, False, None), "partial_rotary_factor": (1, None)}


def _number(raw: dict, key: str, default=None, where: str = "config.json") -> int:
    value = raw.get(key, default)
    if type(value) is not int:
        found = "is missing" if value is None else f"is {str(value)[:60]!r}"
        raise ConfigError(f"{where}: {key} {found}, expected a whole number")
    return value


def _float(value, key: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ConfigError(f"config.json: {key} is {str(value)[:60]!r}, expected a number")
    return float(value)


def _family(raw: dict) -> str:
    """ "mixtral" or "mistral"; anything else is refused."""
    names, kind = raw.get("architectures"), raw.get("model_type")
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        raise ConfigError(f"config.json: architectures is {str(names)[:60]!r}, expected a list of names")
    name = names[0] if names else None
    family = ARCHITECTURES.get(name) if name else (kind if kind in ARCHITECTURES.values() else None)
    if family is None or (kind is not None and kind != family):
        raise ConfigError(
            f"config.json: architecture {str(name)[:60]!r} (model_type {str(kind)[:60]!r}) is not supported; npmix runs "
            "MixtralForCausalLM and MistralForCausalLM"
        )
    return family


def _rope_theta(raw: dict, family: str) -> float:
    """rope_theta from the top (older files), rope_parameters (newer) or rope_scaling; only plain RoPE is taken."""
    found = {}
    if raw.get("rope_theta") is not None:
        found["rope_theta"] = _float(raw["rope_theta"], "rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        block = raw.get(key)
        if block is None:
            continue
        if not isinstance(block, dict):
            raise ConfigError(f"config.json: {key} is {str(block)[:60]!r}, expected an object or null")
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"config.json: {key} asks for RoPE type {str(kind)[:40]!r}; npmix computes only 'default'")
        for extra, value in block.items():
            if extra == "partial_rotary_factor" and value in (1, None):
                continue
            if extra not in ("rope_type", "type", "rope_theta") and value is not None:
                raise ConfigError(f"config.json: {key}.{extra[:60]!r} = {str(value)[:60]!r} would change RoPE; npmix does not support it")
        if block.get("rope_theta") is not None:
            found[key] = _float(block["rope_theta"], f"{key}.rope_theta")
    if len(set(found.values())) > 1:
        raise ConfigError(f"config.json: rope_theta is given as {found}, expected one value")
    return next(iter(found.values()), DEFAULTS[family]["rope_theta"])


def _refuse_unknown(raw: dict) -> None:
    for key, value in raw.items():
        if key in TRANSLATED or key in HARMLESS:
            continue
        if key in ONLY:
            if value not in ONLY[key]:
                raise ConfigError(f"config.json: {key} is {str(value)[:60]!r}, npmix supports only {ONLY[key][0]!r}")
        elif value is not None and value is not False and value != {} and value != [] and value != 0:
            raise ConfigError(
                f"config.json: npmix does not know {key[:60]!r} ({str(value)[:60]!r}) and it may change the arithmetic; "
                "if it does not, remove the key from config.json"
            )


def _window(raw: dict, family: str, layers: int) -> int | None:
    """The sliding window; `layer_types` may only say what the window already says for every layer."""
    window = raw.get("sliding_window", DEFAULTS[family]["sliding_window"])
    if window is not None and type(window) is not int:
        raise ConfigError(f"config.json: sliding_window is {str(window)[:60]!r}, expected null or a whole number")
    kinds = raw.get("layer_types")
    same = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers or any(kind != same for kind in kinds)):
        raise ConfigError(f"config.json: layer_types {str(kinds)[:60]!r} mixes kinds of attention; npmix has one kind for all layers")
    return window


def eos_ids(raw: dict, default: tuple[int, ...], where: str = "config.json") -> tuple[int, ...]:
    """eos_token_id as a tuple: a number, a list, or null (no end token); absent: `default`."""
    if "eos_token_id" not in raw:
        return default
    value = raw["eos_token_id"]
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in found):
        raise ConfigError(f"{where}: eos_token_id is {str(value)[:60]!r}, expected a token id or a list of them")
    return tuple(dict.fromkeys(found))


def translate(raw: dict, generation: dict | None = None) -> Config:
    """The Config that config.json (and generation_config.json, whose end tokens take precedence) describes."""
    family = _family(raw)
    _refuse_unknown(raw)
    mixtral = family == "mixtral"
    dim, heads, layers = (_number(raw, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if raw.get("head_dim") is None and (heads < 1 or dim % heads):
        raise ConfigError(f"config.json: hidden_size {dim} is not a multiple of num_attention_heads {heads}; give head_dim")
    head_dim = _number(raw, "head_dim") if raw.get("head_dim") is not None else dim // heads
    kv_heads = _number(raw, "num_key_value_heads", 8) if raw.get("num_key_value_heads", 8) is not None else heads
    experts = raw.get("num_local_experts", raw.get("num_experts", 8))
    if "num_experts" in raw and raw["num_experts"] != experts:
        raise ConfigError(f"config.json: num_local_experts {str(experts)[:60]!r} and num_experts {str(raw['num_experts'])[:60]!r} differ")
    if not mixtral and (raw.get("num_local_experts") or raw.get("num_experts")):
        raise ConfigError("config.json: MistralForCausalLM is dense, but num_local_experts is given")
    tied = False if raw.get("tie_word_embeddings") is None else raw["tie_word_embeddings"]
    if type(tied) is not bool:
        raise ConfigError(f"config.json: tie_word_embeddings is {str(tied)[:60]!r}, expected true or false")
    vocab = _number(raw, "vocab_size")
    bos = raw.get("bos_token_id", 1)
    ends = eos_ids(raw, (2,))
    if generation and generation.get("eos_token_id") is not None:
        ends = eos_ids(generation, ends, "generation_config.json")
    return Config(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=_number(raw, "intermediate_size"),
        n_experts=_number({"num_local_experts": experts}, "num_local_experts") if mixtral else 1,
        n_active=_number(raw, "num_experts_per_tok", 2) if mixtral else 1,
        vocab_size=vocab,
        norm_eps=_float(raw.get("rms_norm_eps", DEFAULTS[family]["rms_norm_eps"]), "rms_norm_eps"),
        rope_theta=_rope_theta(raw, family),
        max_positions=_number(raw, "max_position_embeddings", 4096 * 32),
        sliding_window=_window(raw, family, layers),
        has_router=mixtral,
        tied_embeddings=tied,
        bos_id=min(1, vocab - 1) if bos is None else bos,
        eos_ids=ends,
    )


def read_config(folder: Path) -> tuple[Config, dict]:
    """The Config of a Hugging Face folder, and the raw config.json."""
    raw = read_json(folder / "config.json", ConfigError)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path, ConfigError) if generation_path.exists() else None
    return translate(raw, generation), raw
