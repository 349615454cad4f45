"""What a piece of work has to read and compute at least, and how long that takes at a machine's ceilings.

One hard fact: only what is needed counts. In the last layer every token's keys and values are needed, but of attention,
experts and output only the last token's; of attention only the pairs of a query and a key that it may see.

Decode is held against the read speed of memory: every decoded token reads all matrices outside the experts, A of E
experts and the keys and values once. Prefill is held against the slower of reading the weights once and of 2 int8
operations a weight and token.
"""


def decode_bytes(engine, position: int) -> int:
    """Bytes that decoding the token at `position` has to read: weights, keys and values."""
    seen = min(position + 1, engine.config.sliding_window or position + 1)
    return engine.bytes_per_token() + seen * engine.bytes_per_position()


def prompt_bytes(engine, tokens: int) -> int:
    """Bytes of weights that a prompt has to read once: every expert (or as many as `tokens` can choose), in the last layer A of E."""
    c = engine.config
    last, chosen = f"layers.{c.n_layers - 1}.experts.", min(c.n_experts, tokens * c.n_active)
    total = engine.source.tensor("output").nbytes if c.tied_embeddings else 0
    for name, shape in c.tensor_shapes().items():
        if len(shape) == 2 and name != "tok_embeddings":
            size = engine.source.tensor(name).nbytes
            share = c.n_experts if ".experts." not in name else c.n_active if name.startswith(last) else chosen
            total += size * share // c.n_experts
    return total


def prefill_operations(config, tokens: int) -> int:
    """Multiplications and additions by weights that `tokens` prompt tokens need; attention's own are left out."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rest = config.dim * 2 * q + config.n_active * 3 * config.dim * config.hidden_dim  # weights: wq, wo, experts
    cached = config.dim * 2 * kv  # wk, wv
    weights = tokens * (config.n_layers - 1) * (rest + cached) + tokens * cached + rest + config.dim * config.vocab_size
    return 2 * weights


def attention_operations(config, tokens: int) -> int:
    """Multiplications and additions by keys and values that a prompt needs: 4 x head_dim a head and causal pair.

    A query sees at most the sliding window; in the last layer the last query alone is needed.
    """
    seen = min(tokens, config.sliding_window or tokens)  # keys of the last query
    pairs = seen * (seen + 1) // 2 + (tokens - seen) * seen
    return 4 * config.n_heads * config.head_dim * (pairs * (config.n_layers - 1) + seen)


def prefill_ceiling(engine, tokens: int, read: float, int8: float) -> tuple[float, str]:
    """(seconds a prompt takes at least, which bound holds: "read" or "int8"). read: bytes a second; int8: operations a second.

    The larger of two times: the weights read once, and the operations by weights at the int8 peak. Attention's own
    operations are not in it: they are float32, and are held against that peak by themselves.
    """
    reading, computing = prompt_bytes(engine, tokens) / read, prefill_operations(engine.config, tokens) / int8
    return (reading, "read") if reading > computing else (computing, "int8")
