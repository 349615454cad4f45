"""The planner's arithmetic against what stores, buffers and runs really take."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from make import TINY, tiny_hf

from npmix import engine, planner
from npmix.benchmark.needs import decode_bytes
from npmix.checkpoint.config_json import translate
from npmix.convert import convert
from npmix.engine import Engine
from npmix.errors import CheckpointError, ConfigError, InputError, StoreError
from npmix.generate import BUNDLED
from npmix.kernels import attention, cache, decode, prefill, tile
from npmix.model.kv_cache import KVCache
from npmix.model.state import RunState
from npmix.store import open_source
from npmix.store.recipe import QUANTS

GIB = 1 << 30
MIXTRAL = planner.find_model("mixtral-8x7b")


def row(model=MIXTRAL, ram=16 * GIB, context=4096, kv="f16", width="q4", **speeds):
    """One row of a plan."""
    (found,) = planner.plan(model, ram, 2, contexts=[context], kvs=[kv], widths=[width] if width else [], **speeds)["rows"]
    return found


def test_constants_are_the_kernels():
    """What stands in the planner once more, because the kernels' modules import Numba, is the same there."""
    assert (planner.BLOCK, planner.KV) == (cache.BLOCK, cache.KINDS) and attention.BLOCK == cache.BLOCK
    assert (planner.TALLEST, planner.QUERY_ROWS, planner.RUN) == (attention.TALLEST, prefill.QUERY_ROWS, decode.RUN)
    assert planner.PANEL_ROWS >= 16 * tile.BLOCKS and planner.CHUNK == engine.DEFAULT_CHUNK
    assert planner.QUANTS is QUANTS


@pytest.mark.parametrize(
    "quant, options", [("q8", {}), ("q4", {"dtype": "f32"}), ("f16", {"mistral": True}), ("q3", {"tie_word_embeddings": True})]
)
def test_bytes_of_stores(tmp_path, quant, options):
    """Planned from config.json alone, a store's weight files have exactly the bytes that the conversion writes, and an expert its pages."""
    dtype = options.get("dtype", "bf16")
    source = tiny_hf(tmp_path / "hf", torch_dtype={"f32": "float32", "bf16": "bfloat16"}[dtype], **options)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "config.json").write_bytes((source / "config.json").read_bytes())
    planned = row(planner.find_model(tmp_path / "only"), context=512, width=quant)
    store = convert(source, tmp_path / "store", quant)
    written = sum(file.stat().st_size for file in store.glob("*.safetensors"))
    assert planned["weights"] == written
    own, again = planner.plan(planner.find_model(store), 16 * GIB, 2, contexts=[512], kvs=["f16"], widths=[quant])["rows"]
    assert again == planned and own == {**planned, "own": True}
    with open_source(store) as opened:
        starts = [opened.tensor(f"layers.0.experts.{e}.w_gate").address for e in range(opened.config.n_experts)]
        assert {b - a for a, b in zip(starts, starts[1:])} <= {planned["expert"]}
        assert (
            0 <= planned["expert"] - sum(opened.tensor(f"layers.1.experts.0.{name}").nbytes for name in ("w_gate", "w_up", "w_down")) < 4096
        )
        assert planned["experts"] == opened.config.n_layers * opened.config.n_experts


SHAPES = [
    (MIXTRAL.config, 4096), (MIXTRAL.config, 32768), (planner.NAMED["mistral-7b"], 32768), (translate(TINY), 300),
    (translate({**TINY, "head_dim": 18, "sliding_window": 100}), 512), (translate({**TINY, "num_local_experts": 20, "vocab_size": 999}), 64),
]  # fmt: skip


@pytest.mark.parametrize("kv", list(cache.KINDS))
@pytest.mark.parametrize("config, context", SHAPES)
def test_bytes_of_cache_and_scratch(config, context, kv):
    """The KV cache is counted to the byte; the scratch within 64 KiB and half a panel a thread, at every width and chunk."""
    for width in ("q8", "q5", "q3", "f16") if context < 32768 else ("q4",):
        sizes = planner.sizes_of(config, width, planner.tensor_formats(config, planner.make_recipe(width), lambda _: "bf16"))
        for chunk, threads in ((512, 1), (7, 3)):
            chunk = min(chunk, context)
            real = KVCache(config, context, chunk, kv)
            assert planner.cache_bytes(config, context, kv, chunk) == real.nbytes
            slots = [SimpleNamespace(group=group) for group in sizes.groups]
            weights = SimpleNamespace(
                config=config, slots=slots, embeddings_kind=("", sizes.embeddings_group), embeddings=0, norm=0, output=0
            )
            weights.output_slot, weights.group, weights.span = 0, lambda slot: 0, lambda slot: 0
            found = RunState(weights, real, context, chunk, threads).nbytes
            planned = planner.scratch_bytes(config, sizes, context, kv, threads, chunk)
            assert abs(planned - found) <= (1 << 16) + threads * 17 * config.hidden_dim


@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_an_open_engine(kv):
    """Of the bundled model weights, KV cache, scratch and the bytes that a token reads are an open engine's own."""
    model = planner.find_model(BUNDLED)
    found = row(model, context=2048, kv=kv, width=None)
    with Engine(BUNDLED, context=2048, kv=kv, threads=2) as opened:
        memory = opened.memory()
        assert found["kv_cache"] == memory["kv_cache"] and abs(found["scratch"] - memory["scratch"]) < 1 << 16
        assert 0 < found["weights"] - memory["weights"] < 1 << 18  # headers and pads
        sizes = planner.sizes_of(model.config, *model.own)
        experts = opened.bytes_per_token() - sizes.a_token
        wanted = model.config.n_layers * model.config.n_active
        assert 0 <= sizes.expert * wanted - experts < 4096 * wanted
        assert planner.cache_read(model.config, 2048, kv) == decode_bytes(opened, 2047) - opened.bytes_per_token()


@pytest.mark.compiled
@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak of resident memory as Linux counts it")
def test_memory_of_a_run():
    """A run over the whole context with compiled kernels at hand takes what was planned, within 64 MB."""
    words = ["run", "--json", "--quiet", "--ignore-eos", "--threads", "2", "-n", "1500", "import " * 100]
    subprocess.run([sys.executable, "-m", "npmix", "warmup", "--quiet"], check=True)
    out = subprocess.run([sys.executable, "-m", "npmix", *words], check=True, capture_output=True, text=True).stdout
    planned = row(planner.find_model(BUNDLED), context=2048, width=None)
    assert abs(json.loads(out)["peak_memory"] - planned["total"]) < 64e6


def test_thresholds():
    """With all its bytes and some to spare a model fits, with one less it streams; with the least it streams, with one less it does not run."""
    total, least = row()["total"] + planner.SPARE, row()["least"]
    assert (row(ram=total)["verdict"], row(ram=total)["hits"], row(ram=total)["disk_per_token"]) == ("fits", 1, 0)
    assert (row(ram=total - 1)["verdict"], row(ram=total - 1)["experts_in_memory"]) == ("streams", 255)
    assert (row(ram=least)["verdict"], row(ram=least)["experts_in_memory"]) == ("streams", 3)
    small = row(ram=least - 1)
    assert (small["verdict"], small["tokens_per_s"], small["disk_per_token"]) == ("too small", None, None)


def test_more_memory_is_never_slower():
    """Speed rises with memory up to that of a model that fits, and is the same beyond."""
    speeds = [row(ram=gib * GIB)["tokens_per_s"] for gib in (4, 8, 14, 22, 26, 40)]
    assert speeds == sorted(speeds) and speeds[-1] == speeds[-2] > 2 * speeds[0]


def test_speed_of_a_model_that_fits():
    """All in memory, a token takes what its bytes take: 12.75 of 46.70 G weights at 4.5 to 8.125 bits, and a full context's keys and values."""
    read = 2 * 32 * 176.16e6 * 4.5 / 8 + (46.70e9 - 45.10e9 - 0.131e9) * 8.125 / 8 + 4096 * 131072
    found = row(ram=40 * GIB, memory=40e9)
    assert found["tokens_per_s"] == pytest.approx(planner.SHARE * 40e9 / read, rel=0.01)


@pytest.mark.parametrize("gib, bound", [(14, 0.40), (8, 0.27), (4, 0.22)])
def test_speed_from_the_disk(gib, bound):
    """Larger than memory, it is the disk's time for the experts missed that counts: Mixtral at 4.5 bits with 1.3 GB/s."""
    found = row(ram=gib * GIB, memory=40e9, disk=1.3e9 / planner.SHARE)
    assert found["tokens_per_s"] == pytest.approx(bound, rel=0.08)
    assert found["disk_per_token"] == pytest.approx(64 * (1 - found["hits"]) * 99.1e6, rel=0.01)


def test_a_dense_model():
    """One expert a layer, needed by every token: what does not fit is read each time."""
    found = row(planner.find_model("mistral-7b"), ram=3 * GIB, width="q8")
    assert found["verdict"] == "streams" and found["disk_per_token"] == (32 - found["experts_in_memory"]) * found["expert"]
    assert found["kv_cache"] == 32 * 8 * 4096 * 2 * 2 * 128


def test_every_width_context_and_cache():
    """By default a row for each width, at 4,096 and 32,768 positions as far as the model has them, with both kinds of KV cache."""
    rows = planner.plan(MIXTRAL, 8 * GIB, 2)["rows"]
    assert [(r["context"], r["kv"], r["width"]) for r in rows] == [
        (n, kv, w) for n in (4096, 32768) for kv in ("f16", "q8") for w in QUANTS
    ]
    assert {r["context"] for r in planner.plan(planner.find_model(BUNDLED), GIB, 2)["rows"]} == {2048}
    for context in (0, 32769):
        with pytest.raises(InputError, match=f"context is {context}, expected 1 to 32768"):
            row(context=context)


def test_what_is_no_model(tmp_path):
    """A name that is none, an empty folder, a bad config, a broken store: an error that names it."""
    for name in ("mixtral-9x9b", tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="mixtral-8x7b, mistral-7b"):
            planner.find_model(name)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="gpt2"):
        planner.find_model(tmp_path)
    (tmp_path / "npmix.json").write_text("{}")
    with pytest.raises(StoreError):
        planner.find_model(tmp_path)
