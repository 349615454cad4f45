"""How large the matrices of a random model are, for the writers of both programs' files. Standard library only.

One hard fact: normalised inputs make every layer add equally much, so in a deep model with equal layers each is small beside
the sum of those before it, and the next layer's router is guessed right 90 times of 100. So what a layer adds grows with depth as the
residual stream does (as in trained models: Heimersheim and Turner 2023), by a factor that the embeddings' size settles.

With the defaults 62-73 % of the experts are guessed right in each of 32 layers at full width, and each expert takes 6-20 % of 128 tokens' choices.
"""

EMBEDDING_STD = 1.5  # of the residual stream at its beginning
LAYER_STD = 1.0  # what a layer adds to it at the beginning, about: then the first layers are guessed like the others
ATTENTION = 0.25  # of wo: a mean over positions is the same for all tokens, and at 1 it draws them all to the same experts


def growth(embedding_std: float) -> float:
    """What the residual stream grows by in a layer."""
    return (1 + (LAYER_STD / embedding_std) ** 2) ** 0.5


def factor(kind: str, layer: int, dim: int, embedding_std: float = EMBEDDING_STD) -> float:
    """What a matrix is larger than numbers of variance 1 / dim. kind: "tok_embeddings", "wo", "w_down" or another, which is 1."""
    if kind == "tok_embeddings":
        return embedding_std * dim**0.5
    if kind in ("wo", "w_down"):
        return growth(embedding_std) ** layer * (ATTENTION if kind == "wo" else 1.0)
    return 1.0
