import pytest
from make import tiny_hf

from npmix.benchmark import attention_operations, decode_bytes, prefill_ceiling, prefill_operations, prompt_bytes
from npmix.config import Config
from npmix.engine import Engine

SHAPE = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "hidden_dim": 14336, "n_experts": 8, "n_active": 2,
    "vocab_size": 32000, "norm_eps": 1e-5, "rope_theta": 1e6, "max_positions": 32768,
}  # fmt: skip
MIXTRAL = Config(**SHAPE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny model of float32 weights; nothing of it is run."""
    with Engine(tiny_hf(tmp_path_factory.mktemp("needs") / "m", dtype="f32"), context=32, threads=1) as engine:
        yield engine


def test_operations_of_a_prompt():
    """By hand: 2 operations a weight; the last layer only makes keys and values, but for the last token."""
    attention, experts, cached, head = 2 * 4096 * 4096 + 2 * 4096 * 1024, 2 * 3 * 4096 * 14336, 2 * 4096 * 1024, 4096 * 32000
    rest = attention - cached + experts
    assert prefill_operations(MIXTRAL, 1) == 2 * (31 * (attention + experts) + cached + rest + head)
    assert prefill_operations(MIXTRAL, 2) - prefill_operations(MIXTRAL, 1) == 2 * (31 * (attention + experts) + cached)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
def test_operations_of_attention(window):
    """Every pair of a query and a key it may see costs 4 operations an element of a head; of the last layer the last query's alone."""
    config = Config(**{**SHAPE, "sliding_window": window})
    seen = [min(token + 1, window or token + 1) for token in range(12)]
    assert attention_operations(config, 12) == 4 * 32 * 128 * (31 * sum(seen) + seen[-1])


def test_bytes_of_a_decoded_token(engine):
    """By hand on a tiny model: matrices outside the experts, A of E experts, router, and the cache of what was said."""
    c = engine.config
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 2 * 3 * 64 * 96 + 4 * 64) + 384 * 64
    assert engine.bytes_per_token() == 4 * weights
    assert decode_bytes(engine, 9) == 4 * weights + 10 * c.n_layers * 2 * c.n_kv_heads * c.head_dim * 2


def test_bytes_of_a_prompt(engine):
    """By hand: all E experts, or what few tokens can choose; the last layer's for one token; one token is a decoded one's weights."""
    outside = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 4 * 64) + 384 * 64
    assert prompt_bytes(engine, 2) == prompt_bytes(engine, 500) == 4 * (outside + (4 + 2) * 3 * 64 * 96)
    assert prompt_bytes(engine, 1) == engine.bytes_per_token()


@pytest.mark.parametrize("change", [{"tie_word_embeddings": True}, {"mistral": True}])
def test_bytes_of_one_token_agree(tmp_path, change):
    """Of tied embeddings and of dense models too: a prompt of one token reads what a decoded token reads."""
    with Engine(tiny_hf(tmp_path / "m", **change), context=8, threads=1) as engine:
        assert prompt_bytes(engine, 1) == engine.bytes_per_token()


def test_ceiling_of_a_prompt(engine):
    """The larger of two times, and which one it is."""
    nbytes, operations = prompt_bytes(engine, 16), prefill_operations(engine.config, 16)
    assert prefill_ceiling(engine, 16, read=nbytes / 2, int8=operations) == (2.0, "read")
    assert prefill_ceiling(engine, 16, read=nbytes, int8=operations / 3) == (3.0, "int8")
