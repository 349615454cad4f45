import json

import pytest
from click.testing import CliRunner
from make import tiny_hf

from npmix import cli
from npmix.benchmark import anonymous_memory, decode_bytes, peak_memory, prefill_operations, token_ids
from npmix.config import Config
from npmix.engine import Engine

MIXTRAL = Config(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, n_experts=8, n_active=2, vocab_size=32000,
    norm_eps=1e-5, rope_theta=1e6, max_positions=32768,
)  # fmt: skip


def test_operations_of_a_prompt():
    """By hand: 2 operations a weight; the last layer only makes keys and values, but for the last token."""
    attention, experts, cached, head = 2 * 4096 * 4096 + 2 * 4096 * 1024, 2 * 3 * 4096 * 14336, 2 * 4096 * 1024, 4096 * 32000
    rest = attention - cached + experts
    assert prefill_operations(MIXTRAL, 1) == 2 * (31 * (attention + experts) + cached + rest + head)
    assert prefill_operations(MIXTRAL, 2) - prefill_operations(MIXTRAL, 1) == 2 * (31 * (attention + experts) + cached)


def test_bytes_of_a_decoded_token(tmp_path):
    """By hand on a tiny model: matrices outside the experts, A of E experts, router, and the cache of what was said."""
    with Engine(tiny_hf(tmp_path / "m", dtype="f32"), context=32, threads=1) as engine:
        c = engine.config
        weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 2 * 3 * 64 * 96 + 4 * 64) + 384 * 64
        assert engine.bytes_per_token() == 4 * weights
        assert decode_bytes(engine, 9) == 4 * weights + 10 * c.n_layers * 2 * c.n_kv_heads * c.head_dim * 2


def test_token_ids_spread():
    """The ids lie in the vocabulary, are always the same, and few repeat."""
    ids = token_ids(1000, 2048)
    assert ids == token_ids(1000, 2048) and 0 <= min(ids) and max(ids) < 2048
    assert len(set(ids)) > 900
    assert len({token_ids(300, v)[i] for v in (1, 2) for i in range(300)}) == 2


def test_memory_figures():
    """Peak memory is at least what is anonymous now (both known on Linux)."""
    anonymous, peak = anonymous_memory(), peak_memory()
    assert anonymous is None or 1 << 20 < anonymous <= peak


@pytest.mark.compiled
def test_bench_prints_figures_and_json_last(tmp_path):
    """Every figure the report promises is there, shares fit speeds and ceilings, and the last line is the JSON of --json."""
    model, file = tiny_hf(tmp_path / "m"), tmp_path / "b.json"
    arguments = ["bench", "-m", str(model), "--prompt", "9", "--tokens", "4", "--turns", "2", "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    *table, last = result.stdout.splitlines()
    for word in ("machine", "software", "model", "setting", "start", "memory", "ceilings", "prefill", "decode"):
        assert any(line.startswith(word) for line in table)
    found = json.loads(last)
    assert found == json.loads(file.read_text())
    assert found["threads"] == 1 and found["format"] == "bf16 (100 %)"
    assert 0 < found["start"]["warm_s"] < found["start"]["cold_s"]
    for part, share in (("prefill", "share_of_int8"), ("decode", "share_of_read")):
        assert 0 < found[part][share]["min"] <= found[part][share]["median"] <= found[part][share]["max"]
        assert found[part]["tokens_per_s"]["median"] > 0
    assert found["ceilings"]["read_gbs"]["median"] > 0.1 and found["ceilings"]["int8_gops"]["median"] > 0.1
