"""What a model takes of memory, what of it fits, and how fast it would run: arithmetic alone, nothing is loaded.

One hard fact: a token needs A of each layer's E experts, and a disk is ten to fifty times slower than memory; so the
speed of a model larger than memory is that of reading the experts which did not fit.

Of a run with a memory of R bytes (`ram`), all in bytes:

    shared   = weights - experts                                attention, routers, norms, embeddings, output: they stay
    fixed    = shared + KV cache + scratch + program            program: Python and its libraries, page tables
    slots    = (R - fixed - SPARE) // expert, at most L E       experts in memory; all of them: the model fits
    hits     = slots / (L E)                                    routing is uniform, whatever the policy (LRU: 57 % for 4 of 8)
    missing  = L A (1 - hits) expert                            read from disk for a token
    seconds  = (shared of a token + keys and values) / memory + max(missing / disk, L A expert / memory)

with the read speeds of memory and disk times SHARE. The last term says that experts are computed while others are read. Keys
and values count for a full context: fewer positions are faster. Shared of a token: all but the embeddings, of which it reads a row.

The sizes are the packed store's own (`store/layout.py`); those of the KV cache and the scratch are counted as
`model/kv_cache.py` and `model/state.py` allocate them, whose constants stand here once more because theirs come with Numba;
a test holds them together. PROGRAM is measured: 145 MiB with compiled kernels at hand, 180 MiB more where they are compiled first.
SPARE (`budget.py`) is what a run under a budget leaves free; the longer chunks that it may take for prompts are not counted.
"""

from dataclasses import dataclass
from pathlib import Path

from .budget import SPARE
from .checkpoint.config_json import read_config
from .config import Config
from .errors import CheckpointError, InputError
from .formats import EXPERT_UNIT, packed_bytes, tensor_bytes
from .store import open_store
from .store.layout import MANIFEST, PAGE, PROGRESS, plan_store
from .store.recipe import QUANTS, make_recipe, tensor_formats

PROGRAM = 150 << 20
PAGE_TABLE = 512  # bytes of mapped memory for each byte of page table
SHARE = 0.85  # of the read speeds of memory (measured: 79 to 101 %) and of the disk
MEMORY_SPEED, DISK_SPEED = 20e9, 1e9  # bytes a second where nobody measured: two channels of DDR4, a plain SSD
CHUNK = 512  # prompt tokens at a time, the engine's default

NAMED = {
    "mixtral-8x7b": Config(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, n_experts=8, n_active=2, vocab_size=32000,
        norm_eps=1e-5, rope_theta=1e6, max_positions=32768,
    ),
    "mistral-7b": Config(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, n_experts=1, n_active=1, vocab_size=32000,
        norm_eps=1e-5, rope_theta=1e4, max_positions=32768, sliding_window=4096, has_router=False,
    ),
}  # fmt: skip

# kernels/cache.py: positions of a block; of a kind of numbers the bytes of one, of its scale, and what rows of keys, values are a multiple of
BLOCK = 256
KV = {"f16": (2, 0, 1, 16), "f32": (4, 0, 1, 16), "q8": (1, 4, 4, 32)}
# kernels/attention.py, prefill.py, decode.py, matmul.py: rows of a tile of queries and of a member's, units of an expert, row blocks of a panel
TALLEST, QUERY_ROWS, RUN, PANEL_ROWS = 6, 64, 4, 32


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights in one width.

    total: of the store's weight files. expert: one expert's three matrices in whole pages; experts: how many there are in all
    layers. a_token: shared weights that a decoded token reads. groups: inputs per scale (0: dense) of all matrices that are
    multiplied, embeddings_group: of tok_embeddings.
    """

    width: str
    total: int
    expert: int
    experts: int
    a_token: int
    groups: tuple[int, ...]
    embeddings_group: int

    @property
    def shared(self) -> int:
        return self.total - self.expert * self.experts


@dataclass(frozen=True)
class Model:
    """What is planned for. own: the formats of a packed store's tensors and the bytes of its weight files."""

    name: str
    config: Config
    router_format: str = "bf16"
    own: tuple[str, dict[str, tuple[str, int]], int] | None = None


def find_model(name) -> Model:
    """A packed store, a Hugging Face folder (its config alone is read), or one of NAMED. Raises NpmixError for anything else."""
    path = Path(name)
    if (path / MANIFEST).exists() or (path / PROGRESS).exists():
        with open_store(path) as store:
            tensors = {tensor: store.tensor(tensor) for tensor in store.names()}
            formats = {tensor: (found.format, found.group) for tensor, found in tensors.items()}
            del tensors
            files = sum(entry["bytes"] for file, entry in store.manifest["files"].items() if file.endswith(".safetensors"))
            router = next((format for tensor, (format, _) in formats.items() if tensor.endswith("router")), "bf16")
            return Model(str(name), store.config, router, (store.manifest["recipe"]["name"], formats, files))
    if (path / "config.json").exists():
        config, raw = read_config(path)
        dtype = {"float16": "f16", "float32": "f32"}.get(str(raw.get("dtype", raw.get("torch_dtype"))), "bf16")
        return Model(str(name), config, dtype)
    if str(name) in NAMED:
        return Model(str(name), NAMED[str(name)])
    found = "has neither" if path.is_dir() else "is no folder with"
    raise CheckpointError(f"{name} {found} {MANIFEST} or config.json, and no model of that name is known: {', '.join(NAMED)}")


def sizes_of(config: Config, width: str, formats: dict[str, tuple[str, int]], total: int | None = None) -> Sizes:
    """The sizes of a store with these formats (our name -> format, group). total: of its weight files, if they are there."""
    files = plan_store(config, formats)
    ends = [(slot.start, slot.start + slot.nbytes) for file in files for slot in file.slots if slot.name.startswith("layers.0.experts.0.")]
    a_token, groups = 0, set()
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1 or (name == "tok_embeddings" and not config.tied_embeddings):
            continue
        if ".experts." not in name:
            a_token += tensor_bytes(formats[name][0], shape, formats[name][1])
        if not name.endswith("router") or config.n_experts > 1:
            groups.add(formats[name][1])
    return Sizes(
        width=width,
        total=sum(file.nbytes for file in files) if total is None else total,
        expert=_pad(max(end for _, end in ends) - min(start for start, _ in ends), PAGE),
        experts=config.n_layers * config.n_experts,
        a_token=a_token,
        groups=tuple(sorted(groups)),
        embeddings_group=formats["tok_embeddings"][1],
    )


def cache_bytes(config: Config, context: int, kv: str, chunk: int = CHUNK) -> int:
    """Bytes of the KV cache: `model.kv_cache.KVCache.nbytes`."""
    number, scale, of_keys, of_values = KV[kv]
    row = (_pad(config.head_dim, of_keys) + _pad(config.head_dim, of_values)) * number + 2 * scale
    return config.n_layers * config.n_kv_heads * _capacity(config, context, chunk) * row


def cache_read(config: Config, context: int, kv: str) -> int:
    """Bytes of keys and values that the last token of a full context reads."""
    number, scale = KV[kv][:2]
    seen = min(context, config.sliding_window or context)
    return config.n_layers * config.n_kv_heads * seen * 2 * (config.head_dim * number + scale)


def scratch_bytes(c: Config, sizes: Sizes, context: int, kv: str, threads: int, chunk: int = CHUNK) -> int:
    """Bytes of the run state: `model.state.RunState.nbytes`, within half a panel of w_down a thread."""
    chunk = min(chunk, context)
    query, pairs, groups = c.n_heads * c.head_dim, chunk * c.n_active, sizes.groups
    value_row = 4 * (16 + _pad(c.head_dim, KV[kv][3]))
    act, att, hidden = (max(_act_bytes(n, group) for group in groups) for n in (c.dim, query, c.hidden_dim))
    shared = (
        4 * chunk * (_pad(c.dim, 256) + _pad(query, 16) + 2 * _pad(c.n_kv_heads * c.head_dim, 16) + query + _pad(query, 256))  # x, qkv, q, att
        + chunk * act  # rows
        + max((pairs + 1) * act, (chunk + 1) * act, chunk * att)  # acts
        + pairs * (hidden + 4 * _pad(c.dim, 256))  # h_acts, y
        + (_capacity(c, context, chunk) // BLOCK + 1) * c.n_heads * value_row  # parts
        + 4 * chunk + 16 * pairs + 4 * (c.n_experts + 1)  # tokens, choice, its weight, order, rank, starts
        + 4 * context * c.head_dim  # rope
        + 1024  # counters, clocks and the like
    )  # fmt: skip
    packed = {*groups, sizes.embeddings_group} - {0}
    own = (
        4 * _pad(c.dim, 256),  # a row
        max(act, att),
        *2 * (4 * EXPERT_UNIT * max(chunk, RUN),),  # gate, up
        4 * _pad(c.n_experts, 16) + 8 * c.n_active,  # the router's logits and choice
        TALLEST * (4 * BLOCK + (c.head_dim + 15) // 16 * 32 + 64 + value_row),  # scores, parts
        max(QUERY_ROWS, c.n_heads // c.n_kv_heads) * value_row,
        max((packed_bytes("q8", PANEL_ROWS, n, group) for n in (c.dim, query, c.hidden_dim) for group in packed), default=0),
    )
    return shared + threads * (_pad(sum(_pad(size, 64) for size in own), 4096) + 64)


def estimate(c: Config, sizes: Sizes, context: int, kv: str, ram: int, threads: int, memory: float, disk: float) -> dict:
    """One row of the plan; the formula stands at the top. ram: bytes; memory, disk: bytes a second that they read."""
    cache, scratch = cache_bytes(c, context, kv), scratch_bytes(c, sizes, context, kv, threads)
    program = PROGRAM + (sizes.total + cache) // PAGE_TABLE
    fixed = sizes.shared + cache + scratch + program
    fewest = min(sizes.experts, c.n_active + 1)  # those at work in a layer, and one on its way
    slots = max(0, min(sizes.experts, (ram - fixed - SPARE) // sizes.expert))
    wanted = c.n_layers * c.n_active
    row = {
        "width": sizes.width, "context": context, "kv": kv,
        "weights": sizes.total, "shared": sizes.shared, "expert": sizes.expert, "experts": sizes.experts,
        "kv_cache": cache, "scratch": scratch, "program": program, "total": fixed + sizes.expert * sizes.experts,
        "least": fixed + SPARE + sizes.expert * fewest,
        "verdict": "fits" if slots == sizes.experts else "streams" if slots >= fewest else "too small",
        "experts_in_memory": slots, "hits": slots / sizes.experts, "disk_per_token": None, "tokens_per_s": None,
    }  # fmt: skip
    if row["verdict"] != "too small":
        missing = wanted * (sizes.experts - slots) * sizes.expert // sizes.experts
        reading = max(missing / (SHARE * disk), wanted * sizes.expert / (SHARE * memory))
        seconds = (sizes.a_token + cache_read(c, context, kv)) / (SHARE * memory) + reading
        row |= {"disk_per_token": missing, "tokens_per_s": 1 / seconds}
    return row


def plan(
    model: Model, ram: int, threads: int, *, contexts=None, kvs=("f16", "q8"), widths=QUANTS, memory=MEMORY_SPEED, disk=DISK_SPEED
) -> dict:
    """{"model", "config", "ram", "threads", "chunk", "memory_speed", "disk_speed", "share", "rows"}: a row a context, KV cache and width.

    ram: bytes of memory for everything. contexts: positions, default 4,096 and 32,768 as far as the model has them. A packed
    store also gets rows of its own, "width" its recipe's name and "own" true. memory, disk: bytes a second.
    Raises InputError for a context beyond the model's positions.
    """
    c = model.config
    if contexts is None:
        contexts = [n for n in (4096, 32768) if n <= c.max_positions] or [c.max_positions]
    for context in contexts:
        if not 1 <= context <= c.max_positions:
            raise InputError(f"context is {context}, expected 1 to {c.max_positions}, the model's maximum")
    kinds = [sizes_of(c, width, tensor_formats(c, make_recipe(width), lambda name: model.router_format)) for width in widths]
    if model.own:
        kinds.insert(0, sizes_of(c, *model.own))
    rows = []
    for context in contexts:
        for kv in kvs:
            for at, sizes in enumerate(kinds):
                row = estimate(c, sizes, context, kv, ram, threads, memory, disk)
                rows.append({**row, "own": bool(model.own) and at == 0})
    return {
        "model": model.name, "config": c.to_dict(), "ram": ram, "threads": threads, "chunk": CHUNK,
        "memory_speed": memory, "disk_speed": disk, "share": SHARE, "rows": rows,
    }  # fmt: skip


def _pad(n: int, to: int) -> int:
    return -(-n // to) * to


def _act_bytes(cols: int, group: int) -> int:
    """Bytes of one token's activations: int8 and a scale and a sum for each group, or float32."""
    if group == 0:
        return 4 * _pad(cols, 16)
    return _pad(cols, 2 * group) + 8 * (_pad(cols, 2 * group) // group)


def _capacity(c: Config, context: int, chunk: int) -> int:
    """Positions of the KV cache."""
    chunk = min(chunk, context)
    return _pad(min(context, c.sliding_window + chunk - 1) if c.sliding_window else context, BLOCK)
