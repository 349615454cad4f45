"""Random checkpoints and packed stores of any size, for benchmarks and tests; full-width Mixtral unless told otherwise.

    python tools/make_checkpoint.py OUT --layers 4 --quant q4              a packed store, written straight from the random source
    python tools/make_checkpoint.py OUT --layers 4 --quant q4 --uniform    every matrix at 4.5 bits
    python tools/make_checkpoint.py OUT --layers 2 --hf                    a Hugging Face folder: bf16 shards, index, config.json
    python tools/make_checkpoint.py OUT --stream --quant q4                the conversion of 93 GB in bf16, made as they are asked for

One hard fact: routing that repeats itself, or that is easily guessed, flatters whatever keeps experts in a cache. So weights have zero
mean, each layer changes the residual stream as much as the one before (`random_scales.py`), and the routing is measured and printed: each
expert's share by layer (the real Mixtral: 3.5-19.9 %), how often the next token has the same first choice (14-28 % there), and how many
experts are guessed right by applying a layer's router to the hidden state that the layer before it routed by (Eliseev & Mazur, arXiv
2312.17238): 60 to 80 % in every layer.

All matrices are windows of one pool of random bf16 numbers of variance 1 / dim. Windows start at different distances from a multiple of
gcd(dim, hidden), so no two experts have a row in common, and none repeats within a matrix, which is smaller than the pool.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_scales import EMBEDDING_STD, factor, growth  # noqa: E402

from npmix.benchmark import anonymous_memory  # noqa: E402
from npmix.checkpoint.names import huggingface_places  # noqa: E402
from npmix.config import Config  # noqa: E402
from npmix.convert import convert, make_recipe, round_piece, tensor_formats  # noqa: E402
from npmix.errors import NpmixError  # noqa: E402
from npmix.formats import PACKED, ROW_BLOCK, row_blocks, span_bytes  # noqa: E402
from npmix.quant.tensor import Tensor  # noqa: E402

SHARD = 4 << 30  # bytes of weights in a file of the Hugging Face folder
PIECE = 1 << 22
POOL_ROWS = 2048  # rows of each kind that a packed store draws its own from
MIXTRAL = {
    "layers": 32, "dim": 4096, "hidden": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "experts": 8, "active": 2, "vocab": 32000,
    "positions": 65536,
}  # fmt: skip


def make_config(**sizes) -> Config:
    """Mixtral's config with some sizes changed; the names are those of MIXTRAL."""
    s = {**MIXTRAL, **sizes}
    return Config(
        dim=s["dim"], n_layers=s["layers"], n_heads=s["heads"], n_kv_heads=s["kv_heads"], head_dim=s["head_dim"], hidden_dim=s["hidden"],
        n_experts=s["experts"], n_active=s["active"], vocab_size=s["vocab"], norm_eps=1e-5, rope_theta=1e6, max_positions=s["positions"],
    )  # fmt: skip


def as_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> bf16 as uint16, to nearest."""
    return ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def random_pool(count: int, std: float, seed: int) -> np.ndarray:
    """`count` bf16 numbers (as uint16), normal with mean 0."""
    rng, pool = np.random.default_rng(seed), np.empty(count, np.uint16)
    for at in range(0, count, PIECE):
        pool[at : at + PIECE] = as_bf16(rng.standard_normal(min(PIECE, count - at), np.float32) * np.float32(std))
    return pool


def scaled(rows: np.ndarray, factor: float) -> np.ndarray:
    """bf16 rows times a number."""
    out = np.empty_like(rows)
    for row in range(0, len(rows), 512):
        out[row : row + 512] = as_bf16((rows[row : row + 512].astype(np.uint32) << 16).view(np.float32) * np.float32(factor))
    return out


class RandomSource:
    """Weights made as they are asked for: a checkpoint for `convert` that never lies on a disk."""

    kind = "random"
    is_instruct = False
    tokenizer_path = None

    def __init__(self, config: Config, seed: int = 0, embedding_std: float = EMBEDDING_STD, name: str = "random"):
        self.path, self.config, self.seed, self.embedding_std = Path(name), config, seed, embedding_std
        self.served = 0  # bytes of tensors handed out
        self._shapes = config.tensor_shapes()
        largest = max(math.prod(shape) for shape in self._shapes.values())
        self._unit = math.gcd(config.dim, config.hidden_dim)
        self._pool = random_pool(largest + largest // 2 + 64 * self._unit, config.dim**-0.5, seed)
        matrices = [name for name, shape in self._shapes.items() if len(shape) == 2]
        self._number = {name: i for i, name in enumerate(matrices)}

    def names(self) -> list[str]:
        return list(self._shapes)

    def _window(self, name: str) -> np.ndarray:
        """Rows (N, K) of the pool: a random multiple of `unit`, and a remainder no other matrix has (as far as they go round)."""
        shape, number = self._shapes[name], self._number[name]
        count = math.prod(shape)
        places = (len(self._pool) - count) // self._unit - 1
        place = int(np.random.default_rng([self.seed, number]).integers(places))
        at = place * self._unit + (number * 37 + 1) % self._unit
        return self._pool[at : at + count].reshape(shape)

    def factor(self, name: str) -> float:
        """What a matrix is larger than the pool's numbers."""
        parts = name.split(".")
        return factor(parts[-1], int(parts[1]) if len(parts) > 1 else 0, self.config.dim, self.embedding_std)

    @property
    def pool_bytes(self) -> int:
        """Memory of the random numbers."""
        return self._pool.nbytes

    def tensor(self, name: str) -> Tensor:
        """A norm (ones, f32) or a matrix (bf16)."""
        shape, factor = self._shapes[name], self.factor(name)
        self.served += 2 * math.prod(shape)
        if len(shape) == 1:
            return Tensor(np.ones(shape, np.float32), "f32", shape)
        data = self._window(name)
        return Tensor(data if factor == 1 else scaled(data, factor), "bf16", shape)

    def fingerprint(self) -> str:
        return f"random pool, seed {self.seed}, embeddings {self.embedding_std}, growing by {growth(self.embedding_std)}"


class PackedSource(RandomSource):
    """Random weights that are packed already: each matrix is drawn from a pool of row blocks that were rounded once.

    So a packed store of any size is made as fast as the disk takes it. Two matrices share row blocks, in another order.
    """

    def __init__(self, config: Config, quant: str, uniform: bool = False, seed: int = 0, embedding_std: float = EMBEDDING_STD):
        super().__init__(config, seed, embedding_std, f"random {quant}")
        self._formats = tensor_formats(config, make_recipe(quant, uniform), lambda name: "bf16")
        self._pools = {}

    def tensor(self, name: str) -> Tensor:
        """A norm (ones, f32), a router (bf16) or a packed matrix."""
        format, group = self._formats[name]
        if not group:
            return super().tensor(name)
        shape = self._shapes[name]
        pool = self._pool_of(shape[1], format, group, name == "tok_embeddings")
        order = np.random.default_rng([self.seed, self._number[name]]).integers(len(pool), size=row_blocks(shape[0]))
        data, factor = pool[order].reshape(-1), self.factor(name)
        if factor != 1:
            spans = data.reshape(-1, span_bytes(format, group))  # each begins with its scales, 64 bytes
            scales = np.ascontiguousarray(spans[:, :64]).view(np.float16)
            spans[:, :64] = (scales * np.float16(factor)).view(np.uint8)
        return Tensor(data, format, shape, group)

    def _pool_of(self, cols: int, format: str, group: int, embeddings: bool) -> np.ndarray:
        """(row blocks, bytes of one); embeddings have rows of their own, or the first layer would find itself in its input."""
        key = cols, format, embeddings
        if key not in self._pools:
            rows = min(POOL_ROWS, len(self._pool) // (2 * cols * ROW_BLOCK) * ROW_BLOCK)
            data = self._pool[rows * cols :] if embeddings else self._pool
            weights = Tensor(data[: rows * cols].reshape(rows, cols), "bf16", (rows, cols))
            self._pools[key] = round_piece(weights, 0, rows, format, group).reshape(row_blocks(rows), -1)
        return self._pools[key]

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}, {POOL_ROWS} rows of each kind"


# ---- a Hugging Face folder ---------------------------------------------------------------------------


def config_json(c: Config) -> dict:
    """config.json as MixtralForCausalLM writes it."""
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": c.dim, "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim,
        "num_local_experts": c.n_experts, "num_experts_per_tok": c.n_active, "vocab_size": c.vocab_size, "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta, "max_position_embeddings": c.max_positions, "sliding_window": None, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": c.bos_id, "eos_token_id": c.eos_ids[0], "torch_dtype": "bfloat16",
    }  # fmt: skip


def _as_bf16(tensor: Tensor) -> np.ndarray:
    return tensor.data if tensor.format == "bf16" else as_bf16(tensor.data)  # ones: exact


def _write_shard(path: Path, tensors: list[tuple[str, str]], source: RandomSource) -> None:
    """One safetensors file. tensors: (our name, their name)."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for ours, theirs in tensors:
        shape = source.config.tensor_shapes()[ours]
        end = at + 2 * math.prod(shape)
        header[theirs] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for ours, _ in tensors:
            file.write(np.ascontiguousarray(_as_bf16(source.tensor(ours))))


def write_huggingface(source: RandomSource, out: Path, shard_bytes: int = SHARD) -> None:
    """Config, shards and their index."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config_json(source.config), indent=2) + "\n")
    places, shapes = huggingface_places(source.config), source.config.tensor_shapes()
    shards, room = [[]], shard_bytes
    for name, shape in shapes.items():
        if shards[-1] and 2 * math.prod(shape) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, places[name][0].name))
        room -= 2 * math.prod(shape)
    table = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / file, tensors, source)
        table.update({theirs: file for _, theirs in tensors})
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=1))


# ---- what the router does with it --------------------------------------------------------------------


def measure_routing(path, tokens: int = 256, seed: int = 1) -> list[dict]:
    """A layer each: {"shares": (E,), "repeats", "guessed"}, over random tokens run through the engine."""
    from npmix.engine import Engine
    from npmix.kernels import tables as t
    from npmix.quant.pack import dequantize

    with Engine(path, context=tokens, chunk=tokens) as engine:
        c, state = engine.config, engine._forward.state
        ids = np.random.default_rng(seed).integers(0, c.vocab_size, tokens).astype(np.int32)
        guess, found = [], []
        norms = [dequantize(engine.source.tensor(f"layers.{i}.ffn_norm")) for i in range(c.n_layers)]
        routers = [dequantize(engine.source.tensor(f"layers.{i}.router")) for i in range(c.n_layers)]

        def look(layer):
            choice = state.array(t.CHOICE).reshape(-1, c.n_active).copy()  # (T, A)
            weight = state.array(t.CHOICE_WEIGHT).reshape(-1, c.n_active)
            first = np.take_along_axis(choice, weight.argmax(1)[:, None], 1)[:, 0]
            shares = np.bincount(choice.reshape(-1), minlength=c.n_experts) / choice.size
            guessed = float((guess.pop()[:, :, None] == choice[:, None]).any(2).mean()) if guess else None
            found.append({"shares": shares, "repeats": float((first[1:] == first[:-1]).mean()), "guessed": guessed})
            if layer + 1 < c.n_layers:
                rank = state.array(t.RANK).reshape(-1, c.n_active)
                added = (weight[:, :, None] * state.array(t.Y)[rank, : c.dim]).sum(1)  # what the experts put into the residual stream
                seen = state.array(t.X)[:tokens, : c.dim] - added  # what this layer's router saw, but for the norm
                scores = seen * norms[layer + 1] @ routers[layer + 1].T  # a row's scale leaves its order alone
                guess.append(np.argsort(-scores, axis=1)[:, : c.n_active])

        engine._forward.prefill(ids, 0, "all", look)
    return found


def print_routing(found: list[dict], tokens: int) -> None:
    """The histogram, a line a layer."""
    print(f"routing of {tokens} random tokens, share of each expert in %; first choice repeated by the next token; experts guessed right")
    for layer, row in enumerate(found):
        guessed = "" if row["guessed"] is None else f"   guessed {100 * row['guessed']:3.0f} %"
        shares = " ".join(f"{100 * share:5.1f}" for share in row["shares"])
        print(f"layer {layer:3d}  {shares}   repeats {100 * row['repeats']:3.0f} %{guessed}")


# ---- a conversion of what lies on no disk --------------------------------------------------------------


class Watch:
    """A conversion from a source that counts what it served: resident memory, rate and processor time."""

    def __init__(self, source: RandomSource):
        self.source, self.began, self.said, self.anonymous = source, time.perf_counter(), 0.0, 0

    def __call__(self, done: int, total: int, what: str) -> None:
        self.anonymous = max(self.anonymous, (anonymous_memory() or 0))
        now = time.perf_counter()
        if now - self.said > 30 or done == total:
            self.said = now
            print(f"{100 * done / total:5.1f} %  {self.words()}  {what}", flush=True)

    def words(self) -> str:
        seconds, times = time.perf_counter() - self.began, os.times()
        return (
            f"{self.source.served / 1e9:.2f} GB of bf16 in {seconds:.0f} s, {self.source.served / 1e6 / seconds:.0f} MB/s; "
            f"processor {times.user + times.system:.0f} s; "
            f"memory at most {self.anonymous / 1e6:.0f} MB, {self.source.pool_bytes / 1e6:.0f} of it the random pool"
        )


# ---- the command -------------------------------------------------------------------------------------


def _progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{100 * done / total:5.1f} % {what:40.40}", end="\n" if done == total else "", file=sys.stderr)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a random Mixtral checkpoint or packed store with near-uniform routing.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    for name, value in MIXTRAL.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value, metavar="N", help=f"default {value}")
    parser.add_argument("--quant", choices=list(PACKED), default="q4", help="of the packed store (default q4)")
    parser.add_argument("--uniform", action="store_true", help="every matrix like the experts")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--hf", action="store_true", help="a Hugging Face folder in bf16 instead of a packed store")
    kind.add_argument("--stream", action="store_true", help="round every weight, from bf16 that lies on no disk; made again, it goes on")
    parser.add_argument("--seed", type=int, default=0)
    std = EMBEDDING_STD
    parser.add_argument("--embedding-std", type=float, default=std, metavar="X", help=f"of the embeddings (default {std})")
    parser.add_argument("--force", action="store_true", help="replace a store in OUT")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="to measure the routing with; 0: do not (default 256)")
    return parser


def main(argv=None) -> None:
    args = arguments().parse_args(argv)
    config = make_config(**{name: getattr(args, name) for name in MIXTRAL})
    began = time.perf_counter()
    if args.hf:
        write_huggingface(source := RandomSource(config, args.seed, args.embedding_std), args.out)
    else:
        if args.stream:
            progress = Watch(source := RandomSource(config, args.seed, args.embedding_std))
        else:
            source, progress = PackedSource(config, args.quant, args.uniform, args.seed, args.embedding_std), _progress
        try:
            convert(source, args.out, args.quant, uniform=args.uniform, force=args.force, progress=progress)
        except NpmixError as error:
            raise SystemExit(f"make_checkpoint: {error}") from None
        del progress
    del source
    seconds, size = time.perf_counter() - began, sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {size / 1e9:.2f} GB in {seconds:.0f} s", flush=True)
    if args.tokens:
        print_routing(measure_routing(args.out, args.tokens), args.tokens)


if __name__ == "__main__":
    main()
