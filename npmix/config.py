"""The shape of a model: the numbers its arithmetic needs and nothing else.

One hard fact: every field is range-checked here before it sizes an allocation. Foreign
spellings (config.json) are translated in `checkpoint/`; a store's manifest holds these names.
"""

from dataclasses import asdict, dataclass, fields

from .errors import ConfigError

# Upper bounds: far above any published model of this family, low enough that their products stay inside int64.
LIMITS = {
    "dim": (16, 1 << 16),  # kernels take whole vectors of 16
    "n_layers": (1, 1 << 10),
    "n_heads": (1, 1 << 10),
    "n_kv_heads": (1, 1 << 10),
    "head_dim": (2, 1 << 10),
    "hidden_dim": (16, 1 << 18),
    "n_experts": (1, 1 << 10),
    "n_active": (1, 1 << 10),
    "vocab_size": (1, 1 << 20),
    "max_positions": (1, 1 << 24),
}


@dataclass(frozen=True)
class Config:
    """A decoder of the Mixtral family (Jiang et al. 2024, arXiv 2401.04088; Mistral 7B: arXiv 2310.06825).

    A dense model is one expert with no router: `n_experts == n_active == 1` and `has_router` false.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    n_experts: int
    n_active: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    sliding_window: int | None = None  # positions a query sees, itself included; None: all
    has_router: bool = True
    tied_embeddings: bool = False  # output is tok_embeddings
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}, expected a whole number from {low} to {high}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, expected an even number (RoPE turns pairs)")
        if self.n_heads * self.head_dim < 16:
            raise ConfigError(f"n_heads x head_dim is {self.n_heads * self.head_dim}, expected at least 16")
        if self.n_active > self.n_experts:
            raise ConfigError(f"n_active {self.n_active} is more than n_experts {self.n_experts}")
        if not self.has_router and self.n_experts != 1:
            raise ConfigError(f"{self.n_experts} experts need a router")
        for name, low, high in (("norm_eps", 0.0, 1.0), ("rope_theta", 1.0, 1e12)):
            value = getattr(self, name)
            if type(value) is not float or not low <= value <= high:  # a NaN fails the comparison
                raise ConfigError(f"{name} is {value!r}, expected a number from {low} to {high}")
        window = self.sliding_window
        if window is not None and (type(window) is not int or not 1 <= window <= 1 << 24):
            raise ConfigError(f"sliding_window is {window!r}, expected null or a whole number from 1 to {1 << 24}")
        for token in (self.bos_id, *self.eos_ids):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ConfigError(f"token id {token!r} is outside the vocabulary of {self.vocab_size}")

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return {**asdict(self), "eos_ids": list(self.eos_ids)}

    @classmethod
    def from_dict(cls, data: dict) -> "Config":
        """The inverse of `to_dict`; raises ConfigError for a missing, unknown or ill-typed field."""
        if not isinstance(data, dict):
            raise ConfigError(f"the model's config is {type(data).__name__}, expected an object")
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            odd = sorted(set(data) ^ names)
            raise ConfigError(f"the model's config has missing or unknown fields: {', '.join(odd)[:200]}")
        eos = data["eos_ids"]
        if not isinstance(eos, list):
            raise ConfigError(f"eos_ids is {eos!r}, expected a list")
        for name in ("has_router", "tied_embeddings"):
            if type(data[name]) is not bool:
                raise ConfigError(f"{name} is {data[name]!r}, expected true or false")
        return cls(**{**data, "eos_ids": tuple(eos)})

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by our name -> shape, in the order of the forward pass."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            at = f"layers.{layer}."
            shapes[at + "attention_norm"] = (self.dim,)
            shapes[at + "wq"] = (q, self.dim)
            shapes[at + "wk"] = (kv, self.dim)
            shapes[at + "wv"] = (kv, self.dim)
            shapes[at + "wo"] = (self.dim, q)
            shapes[at + "ffn_norm"] = (self.dim,)
            if self.has_router:
                shapes[at + "router"] = (self.n_experts, self.dim)
            for expert in range(self.n_experts):
                shapes[at + f"experts.{expert}.w_gate"] = (self.hidden_dim, self.dim)
                shapes[at + f"experts.{expert}.w_up"] = (self.hidden_dim, self.dim)
                shapes[at + f"experts.{expert}.w_down"] = (self.dim, self.hidden_dim)
        shapes["norm"] = (self.dim,)
        if not self.tied_embeddings:
            shapes["output"] = (self.vocab_size, self.dim)
        return shapes
