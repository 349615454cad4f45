import json

import numpy as np
import pytest
from make import tiny_hf

from npmix.benchmark import benchmark, make_plan, measure, token_ids
from npmix.benchmark.measure import Runner, Work, decode_row, prefill_row, scaling_rows, summary
from npmix.config import Config
from npmix.engine import Engine
from npmix.errors import InputError

SHAPE = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 96, "n_experts": 4, "n_active": 2,
    "vocab_size": 384, "norm_eps": 1e-5, "rope_theta": 1e6, "max_positions": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of a tiny random model."""
    return tiny_hf(tmp_path_factory.mktemp("measure") / "m")


def test_token_ids_spread():
    """The ids lie in the vocabulary, are always the same, and few repeat."""
    ids = token_ids(1000, 2048)
    assert ids == token_ids(1000, 2048) and 0 <= min(ids) and max(ids) < 2048
    assert len(set(ids)) > 900
    assert len({token_ids(300, v)[i] for v in (1, 2) for i in range(300)}) == 2


def test_plan_does_no_work_twice():
    """A chunk longer than a prompt is the prompt; each prompt and real chunk is measured once a thread count, decode with one chunk."""
    plan = make_plan(Config(**SHAPE), threads=(2, 1, 2), prompt=(16, 300), depth=(0, 100), chunk=(512, 128), tokens=8)
    assert plan.context == 300
    assert list(plan.engines()) == [(1, 128), (1, 512), (2, 128), (2, 512)]
    works = [
        Work("prefill", 1, 16, 0, 16), Work("prefill", 1, 300, 0, 128), Work("decode", 1, 8, 0, 0), Work("decode", 1, 8, 100, 0),
    ]  # fmt: skip
    assert plan.engines()[1, 128] == works
    assert plan.engines()[1, 512] == [Work("prefill", 1, 300, 0, 300)]
    assert list(make_plan(Config(**SHAPE), threads=1, prompt=16, chunk=(128, 512)).engines()) == [(1, 128)]


def test_defaults_fit_the_model():
    """Without settings, lengths and depths are those the positions allow."""
    plan = make_plan(Config(**SHAPE))
    assert (plan.prompts, plan.depths, plan.chunks, plan.context) == ((16, 512), (0, 1024), (512,), 1088)
    short = make_plan(Config(**{**SHAPE, "max_positions": 100}))
    assert (short.prompts, short.depths, short.context) == ((16,), (0,), 64)
    assert make_plan(Config(**{**SHAPE, "max_positions": 10}), tokens=10).prompts == (10,)


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": 0}, {"prompt": 4097}, {"prompt": ()}, {"prompt": "x"}, {"prompt": (16, 2.5)}, {"depth": 4096 - 63}, {"depth": -1},
     {"tokens": 0}, {"tokens": 5000}, {"threads": 0}, {"chunk": 1 << 17}, {"chunk": True}],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    """What the model cannot take is an InputError that names the setting."""
    with pytest.raises(InputError, match=next(iter(wrong))):
        make_plan(Config(**SHAPE), **wrong)


@pytest.mark.parametrize("change", [{}, {"mistral": True}])
def test_cache_at_a_depth(tmp_path, change):
    """Whatever was measured before, at a depth the cache holds what a prefill of that many tokens leaves: equal logits."""
    path = tiny_hf(tmp_path / "m", **change)
    ids = token_ids(40, 384)
    with Engine(path, context=40, threads=1, chunk=8) as engine, Engine(path, context=40, threads=1, chunk=8) as fresh:
        runner = Runner(engine, ids)
        runner.warm(20)
        for depth in (20, 5, 0, 30, 20):
            runner.go_to(depth)
            assert engine.position == depth
            fresh.reset()
            if depth:
                fresh.prefill(ids[:depth])
            assert np.array_equal(engine.step(ids[depth]), fresh.step(ids[depth]))
            engine.reset()
            runner._prefill(Work("prefill", 1, 9, 0, 8))


@pytest.mark.compiled
def test_measured_seconds(tiny, monkeypatch):
    """Kernels take part of the wall time, attention part of the kernels' time; sampling is counted in decode alone."""
    monkeypatch.setattr(measure, "LEAST_S", 1e-9)
    with Engine(tiny, context=64, threads=1) as engine:
        runner = Runner(engine, token_ids(64, 384))
        runner.warm(16)
        decode, prefill = runner.measure(Work("decode", 1, 8, 16, 0)), runner.measure(Work("prefill", 1, 32, 0, 32))
    for seconds in (decode, prefill):
        assert 0 < seconds["attention"] < seconds["kernels"] and 0 < seconds["wall"]
    assert decode["sampling"] > 0 and prefill["sampling"] == 0


def test_rows_by_hand(tiny):
    """Shares and ratios are formed within each turn, then the median is taken: checked on made-up seconds and ceilings."""
    turns = [{"wall": w, "kernels": w - 0.25, "attention": w / 2, "sampling": 0.25, "read": r, "int8": r, "float32": r}
             for w, r in ((1.0, 1e6), (2.0, 2e6), (0.5, 4e6))]  # fmt: skip
    with Engine(tiny, context=64, threads=1) as engine:
        row = decode_row(engine, Work("decode", 1, 8, 16, 0), turns)
        nbytes = row["bytes_per_token"]
        assert row["tokens_per_s"] == {"median": 8.0, "min": 4.0, "max": 16.0}
        assert row["share"] == summary([8 * nbytes / 1e6, 8 * nbytes / 4e6, 8 * nbytes / 2e6])
        assert row["dispatch_ms"]["median"] == row["sampling_ms"]["median"] == 31.25 and row["outside_ms"]["median"] == 62.5
        row = prefill_row(engine, Work("prefill", 1, 32, 0, 32), turns)
        operations = row["operations"]
        assert row["bound"] == "int8" and row["share"]["max"] == operations / 1e6
        assert row["attention"]["rest_share_of_int8"]["max"] == operations / 0.5 / 1e6
        assert row["attention"]["share_of_float32"]["median"] == row["attention"]["operations"] / 0.25 / 4e6
        plan = make_plan(engine.config, threads=(1, 2), prompt=32, depth=16, tokens=8)
        faster = [{**turn, "wall": turn["wall"] / 2, "read": turn["read"] * 4} for turn in turns]
        (scaling,) = scaling_rows(engine, plan, {Work("decode", 1, 8, 16, 0): turns, Work("decode", 2, 8, 16, 0): faster})
        assert scaling["ratio"] == summary([2.0]) and scaling["ceiling_ratio"] == summary([4.0])
        assert (scaling["threads"], scaling["against"]) == (2, 1)


@pytest.mark.compiled
def test_every_figure_is_there(tiny, monkeypatch):
    """The result is JSON; it holds a row for each thread count, prompt, chunk and depth, and each figure lies within its spread."""
    monkeypatch.setattr(measure, "LEAST_S", 1e-9)
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 20)
    told = []
    settings = {"threads": (1, 2), "prompt": (4, 20), "depth": (0, 30), "chunk": (8, 64), "tokens": 3, "turns": 2, "start": False}
    found = json.loads(json.dumps(benchmark(tiny, **settings, report=told.append)))
    assert [row["threads"] for row in found["ceilings"]] == [1, 2]
    assert [(row["threads"], row["tokens"], row["chunk"]) for row in found["prefill"]] == [
        (t, *rest) for t in (1, 2) for rest in ((4, 4), (20, 8), (20, 20))
    ]
    assert [(row["threads"], row["depth"], row["tokens"]) for row in found["decode"]] == [(t, d, 3) for t in (1, 2) for d in (0, 30)]
    assert [(row["kind"], row["tokens"]) for row in found["scaling"]] == [("prefill", n) for n in (4, 20, 20)] + [("decode", 3)] * 2
    spans = [value for part in ("ceilings", "prefill", "decode", "scaling") for row in found[part] for value in row.values()]
    spans = [value for value in spans if isinstance(value, dict) and "median" in value]
    assert len(spans) > 40 and all(value["min"] <= value["median"] <= value["max"] for value in spans)
    assert "turn 2 of 2" in told and any("filling the cache to 30" in text for text in told)
