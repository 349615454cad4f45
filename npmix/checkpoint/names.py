"""The one table of tensor names: ours <-> Hugging Face.

One hard fact: in Mixtral's Hugging Face names w1 is the SwiGLU's gate, w3 its up and w2 its down
matrix. q and k come permuted for half-split RoPE there, which is the order npmix computes in.
"""

from dataclasses import dataclass

from ..config import Config

# {L} layer, {E} expert. Several names: spellings of different releases, the first one found counts.
WHOLE = {
    "tok_embeddings": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "output": ("lm_head.weight",),
}
LAYER = {
    "attention_norm": ("model.layers.{L}.input_layernorm.weight",),
    "wq": ("model.layers.{L}.self_attn.q_proj.weight",),
    "wk": ("model.layers.{L}.self_attn.k_proj.weight",),
    "wv": ("model.layers.{L}.self_attn.v_proj.weight",),
    "wo": ("model.layers.{L}.self_attn.o_proj.weight",),
    "ffn_norm": ("model.layers.{L}.post_attention_layernorm.weight",),
    "router": ("model.layers.{L}.block_sparse_moe.gate.weight", "model.layers.{L}.mlp.gate.weight"),
}
EXPERT = {
    "w_gate": ("model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight", "model.layers.{L}.mlp.experts.{E}.w1.weight"),
    "w_up": ("model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight", "model.layers.{L}.mlp.experts.{E}.w3.weight"),
    "w_down": ("model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight", "model.layers.{L}.mlp.experts.{E}.w2.weight"),
}
DENSE_MLP = {  # MistralForCausalLM: one expert without a router
    "w_gate": ("model.layers.{L}.mlp.gate_proj.weight",),
    "w_up": ("model.layers.{L}.mlp.up_proj.weight",),
    "w_down": ("model.layers.{L}.mlp.down_proj.weight",),
}
GATE_UP = "model.layers.{L}.mlp.experts.gate_up_proj"  # (E, 2 F, D): gate rows, then up rows
DOWN = "model.layers.{L}.mlp.experts.down_proj"  # (E, D, F)


@dataclass(frozen=True)
class Place:
    """Where one of our tensors lies in a foreign one: all of it, or rows [row, row + n) of plane `plane`."""

    name: str
    shape: tuple[int, ...]  # what the foreign tensor's shape must be
    plane: int | None = None
    row: int = 0


def huggingface_places(config: Config) -> dict[str, list[Place]]:
    """Our name -> the places to look for it, in order of preference."""
    e, f, d = config.n_experts, config.hidden_dim, config.dim
    places = {}
    for name, shape in config.tensor_shapes().items():
        parts = name.split(".")
        if len(parts) == 1:
            places[name] = [Place(foreign, shape) for foreign in WHOLE[name]]
            continue
        layer, kind = parts[1], parts[-1]
        if len(parts) == 3:
            places[name] = [Place(foreign.format(L=layer), shape) for foreign in LAYER[kind]]
        elif not config.has_router:
            places[name] = [Place(foreign.format(L=layer), shape) for foreign in DENSE_MLP[kind]]
        else:
            expert = int(parts[3])
            found = [Place(foreign.format(L=layer, E=expert), shape) for foreign in EXPERT[kind]]
            if kind == "w_down":
                found.append(Place(DOWN.format(L=layer), (e, d, f), expert))
            else:
                found.append(Place(GATE_UP.format(L=layer), (e, 2 * f, d), expert, f if kind == "w_up" else 0))
            places[name] = found
    return places
