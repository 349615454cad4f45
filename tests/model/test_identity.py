"""Bit-identity: a token's logits do not depend on how it came. Every comparison here is ==.

The models have odd sizes, so that every kind of remainder (rows, groups, heads, tiles) occurs on each way.
"""

import numpy as np
import pytest
from make import tiny_hf
from oracle import random_ids

from npmix import convert as conversion
from npmix.engine import Engine
from npmix.formats import PACKED
from npmix.kernels._jit import DISABLED

T = 12 if DISABLED else 640  # tokens: beyond two blocks of 256 positions
CHUNKS = (2, 7) if DISABLED else (1, 2, 7, 64, 256, 300)
ODD = {
    "hidden_size": 72, "intermediate_size": 300, "num_attention_heads": 6, "head_dim": 24, "vocab_size": 389,
    "max_position_embeddings": 1024,
}  # fmt: skip

LOW = [(name, spec.group) for name, spec in PACKED.items() if spec.values] * 5  # formats with a table; the first five are all of them
# name: dense dtype of the checkpoint, then its --quant, or the format of each kind of matrix, or None to run it as it is
FORMATS = {
    "bf16": ("bf16", None),
    "f16": ("f16", None),
    "f32": ("f32", None),
    "q8": ("bf16", "q8"),
    "q4": ("bf16", "q4"),
    "mixed": ("bf16", {"wo": LOW[0], "experts": LOW[1], "w_down": LOW[2], "other": LOW[0]}),
    "mixed otherwise": ("bf16", {"wo": LOW[4], "experts": LOW[3], "w_down": LOW[4], "other": LOW[3]}),
    "q8 mixed": ("f32", {"wo": ("q8", 32), "experts": ("q8", 128), "w_down": ("q8", 64), "other": ("q8", 128)}),
}
CASES = [(name, "f32") for name in FORMATS] + [("bf16", "f16"), ("q8", "f16"), ("bf16", "q8")]


def mixed_formats(choice):
    """A stand-in for `convert.tensor_formats` with one format for each kind of matrix: all groups meet in one model."""

    def tensor_formats(config, recipe, router_format):
        out = {}
        for name, shape in config.tensor_shapes().items():
            kind = name.rpartition(".")[2]
            if len(shape) == 1 or kind == "router":
                out[name] = (router_format(name), 0) if kind == "router" else ("f32", 0)
            else:
                out[name] = choice.get(kind, choice["experts" if ".experts." in name else "other"])
        return out

    return tensor_formats


def build(folder, name, **overrides):
    """A model in the named formats; returns its path."""
    dtype, packed = FORMATS[name]
    path = tiny_hf(folder / "hf", dtype=dtype, **{**ODD, **overrides})
    if packed is None:
        return path
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(packed, dict):
            patch.setattr(conversion, "tensor_formats", mixed_formats(packed))
            packed = "q4"
        return conversion.convert(path, folder / "store", packed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> path, each made once."""
    made = {}

    def get(name, **overrides):
        key = (name, *sorted(overrides.items()))
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp("identity"), name, **overrides)
        return made[key]

    return get


def steps(engine, ids):
    """Logits (T, V) by decode alone."""
    engine.reset()
    rows = np.stack([engine.step(int(token)) for token in ids])
    engine.reset()
    return rows


def whole_team(engine):
    """A small model decodes on one thread: have the whole team do it."""
    engine._forward.decode_team = engine._forward.team
    return engine


def assert_equal(found, expected):
    """Every bit, and nothing that is not a number."""
    assert found.dtype == expected.dtype == np.float32 and np.isfinite(expected).all()
    assert (found.view(np.int32) == expected.view(np.int32)).all()


@pytest.mark.parametrize("name, kv", CASES)
def test_decode_prefill_and_chunks(models, name, kv):
    """Decode, prefill at once, prefill in chunks of any size and any mixture of them: the same bits at every position."""
    path = models(name)
    with Engine(path, threads=1, kv=kv, chunk=T) as engine:
        ids = random_ids(engine.config.vocab_size, T, seed=1)
        expected = engine.logits(ids)
        assert_equal(steps(engine, ids), expected)
        assert_equal(engine.prefill(ids), expected[-1])  # the last layer skips all positions but this one
    for chunk in CHUNKS:
        with Engine(path, threads=1, kv=kv, chunk=chunk) as engine:
            assert_equal(engine.logits(ids), expected)
            for end in (T // 2,) if DISABLED else (2, T // 3, T // 2, T - 1):
                engine.reset()
                assert_equal(engine.prefill(ids[:end]), expected[end - 1])
                assert_equal(engine.step(ids[end]), expected[end])


@pytest.mark.parametrize("name", ["bf16", "q8", "mixed"])
def test_random_pieces(models, name):
    """A sequence cut at random into prefills and steps gives the bits of the whole, blocks of 256 positions being no border."""
    rng = np.random.default_rng(7)
    with Engine(models(name), threads=2, kv="f32", chunk=5 if DISABLED else 100) as engine:
        ids = random_ids(engine.config.vocab_size, T, seed=2)
        expected = engine.logits(ids)
        for _ in range(1 if DISABLED else 6):
            engine.reset()
            while engine.position < T:
                at = engine.position
                count = min(int(rng.choice([1, 1, 3, 17, 130])), T - at)
                assert_equal(engine.prefill(ids[at : at + count]), expected[at + count - 1])


@pytest.mark.compiled
@pytest.mark.parametrize("name, kv", CASES)
def test_threads(models, name, kv):
    """1 to 4 threads, in prefill and in decode: the same bits."""
    expected = None
    for threads in (1, 2, 3, 4):
        with Engine(models(name), threads=threads, kv=kv, chunk=130) as engine:
            ids = random_ids(engine.config.vocab_size, 300, seed=3)
            rows = engine.logits(ids)
            expected = rows if expected is None else expected
            assert_equal(rows, expected)
            assert_equal(engine.prefill(ids[:245]), expected[244])
            rest = [whole_team(engine).step(token) for token in ids[245:265]]  # over the border of a block
            assert_equal(np.stack(rest), expected[245:265])


@pytest.mark.parametrize("intermediate, experts", [(600, 2), (1100, 1), (1500, 3)])
def test_runs_of_units_in_decode(models, intermediate, experts):
    """Experts of several units, which decode takes in runs of four that cross from one expert to the next: prefill's bits, on any
    number of threads and with the smallest chunk."""
    count = 4 if DISABLED else 20
    path = models("q4", intermediate_size=intermediate, num_experts_per_tok=experts)
    with Engine(path, threads=1, kv="f32", chunk=count) as engine:
        ids = random_ids(engine.config.vocab_size, count, seed=5)
        expected = engine.logits(ids)
        assert_equal(steps(engine, ids), expected)
    for threads in (1,) if DISABLED else (2, 3):
        with Engine(path, threads=threads, kv="f32", chunk=1) as engine:
            assert_equal(steps(whole_team(engine), ids), expected)


@pytest.mark.compiled
@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_runs_of_blocks_in_decode(models, kv):
    """16 key heads of five blocks of positions, which decode takes in runs that cross from one head to the next: prefill's bits, on any
    number of threads."""
    path = models("bf16", num_attention_heads=16, num_key_value_heads=16, head_dim=16, max_position_embeddings=1536)
    count, last = 1300, 8
    with Engine(path, threads=1, kv=kv, chunk=512) as engine:
        ids = random_ids(engine.config.vocab_size, count, seed=6)
        expected = engine.logits(ids)[-last:]
    for threads in (1, 2, 3):
        with Engine(path, threads=threads, kv=kv, chunk=512) as engine:
            engine.prefill(ids[:-last])
            assert_equal(np.stack([whole_team(engine).step(id) for id in ids[-last:]]), expected)


@pytest.mark.compiled
@pytest.mark.parametrize("dense", [True, False])
def test_ring_of_a_sliding_window(models, dense):
    """A ring that has been overwritten many times gives the bits of a cache that never was, in prefill and in decode."""
    for window, chunk in ((100, 7), (100, 400), (250, 256), (257, 1)):
        path = models("bf16", sliding_window=window, mistral=dense, max_position_embeddings=2048)
        with Engine(path, threads=1, kv="f32", chunk=900) as engine:
            ids = random_ids(engine.config.vocab_size, 900, seed=window)
            expected = engine.logits(ids)
            assert engine._forward.cache.capacity >= 900
            assert_equal(steps(engine, ids), expected)
        with Engine(path, threads=2, kv="f32", chunk=chunk) as engine:
            assert engine._forward.cache.capacity < 900
            assert_equal(engine.logits(ids), expected)
            assert_equal(engine.prefill(ids[:777]), expected[776])
            rest = np.stack([engine.step(token) for token in ids[777:]])
            assert_equal(rest, expected[777:])


def test_window_under_plain_kernels(models):
    """The same of a small ring, for the kernels' plain twins too: a window of 4 and chunks of 1, 3 and 9."""
    expected = None
    for chunk in (12, 1, 3, 9):
        with Engine(models("bf16", sliding_window=4, mistral=True), threads=1, kv="f32", chunk=chunk) as engine:
            ids = random_ids(engine.config.vocab_size, 12, seed=4)
            rows = engine.logits(ids)
            expected = rows if expected is None else expected
            assert_equal(rows, expected)
            assert_equal(steps(engine, ids), expected)


def test_a_sequence_leaves_no_trace(models):
    """What stood in the cache before, shorter or longer, changes no bit of the next sequence."""
    with Engine(models("bf16"), threads=1, kv="f32", chunk=T) as engine:
        ids = random_ids(engine.config.vocab_size, T, seed=8)
        expected = engine.logits(ids[: T // 2])
        engine.logits(ids[::-1])
        assert_equal(engine.logits(ids[: T // 2]), expected)
        engine.prefill(ids)
        engine.reset(T // 4)
        assert_equal(engine.prefill(ids[T // 4 : T // 2]), expected[-1])


@pytest.mark.compiled
def test_many_heads_of_one_key(models):
    """14 query heads on one key head (more than the tallest tile), head_dim 80: decode, chunks and threads agree."""
    sizes = {"hidden_size": 48, "num_attention_heads": 14, "num_key_value_heads": 1, "head_dim": 80}
    with Engine(models("bf16", **sizes), threads=1, kv="f32", chunk=T) as engine:
        ids = random_ids(engine.config.vocab_size, T, seed=9)
        expected = engine.logits(ids)
    for threads, chunk in ((1, 63), (3, 200)):
        with Engine(models("bf16", **sizes), threads=threads, kv="f32", chunk=chunk) as engine:
            assert_equal(engine.logits(ids), expected)
            assert_equal(steps(whole_team(engine), ids[:260]), expected[:260])
