"""Conversion of a checkpoint into a packed store; its check (verify) and description (info).

One hard fact: weights stream through in pieces of a few megabytes, rounded by plain threads and
written in order, so memory does not grow with the model. The pages of a tensor that has been read are handed back.

    recipe    experts    wq wk wv wo, tok_embeddings, output    router       norms
    q8        q8         q8 group 32                             as it was    f32
    q6 .. q2  q6 .. q2   q8 group 128                           as it was    f32
    uniform   any        like the experts                       as it was    f32
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .checkpoint import open_checkpoint
from .config import Config
from .errors import ConversionError, InputError
from .formats import DENSE, PACKED, ROW_BLOCK, packed_bytes
from .kernels import rounding
from .kernels._jit import DISABLED
from .quant import round as plain
from .quant.pack import dequantize, pack
from .quant.tensor import Tensor
from .store import open_source
from .store.layout import FORMAT, MANIFEST, TOKENIZER, VERSION, FilePlan, plan_digest, plan_store, tensor_table
from .store.verify import is_finite, kind_of, verify_files, verify_finite, weigh
from .store.writer import StoreWriter
from .threads import default_threads

PIECE_WEIGHTS = 1 << 20  # weights a thread rounds at a time: 4 MB of float32
QUANTS = ("q8", "q6", "q5", "q4", "q3", "q2")


class BadWeights(ConversionError):
    """Weights that no conversion can round: trying again is of no use."""


def make_recipe(quant: str, uniform: bool = False) -> dict:
    """What each kind of matrix is rounded to: {"name", "experts": [format, group], "matrices": [format, group]}."""
    if quant not in QUANTS:
        raise InputError(f"quant is {quant!r}, expected one of {', '.join(QUANTS)}")
    experts = [quant, 32 if quant == "q8" else PACKED[quant].group]
    matrices = experts if uniform or quant == "q8" else ["q8", PACKED["q8"].group]
    return {"name": f"uniform {quant}" if uniform else quant, "experts": experts, "matrices": matrices}


def tensor_formats(config: Config, recipe: dict, router_format) -> dict[str, tuple[str, int]]:
    """Our name -> (format, group). router_format(name) -> the format in which the source has a router."""
    out = {}
    for name in config.tensor_shapes():
        kind = kind_of(name)
        if kind == "norms":
            out[name] = ("f32", 0)
        elif kind == "router":
            out[name] = (router_format(name), 0)
        else:
            out[name] = tuple(recipe["experts" if kind == "experts" else "matrices"])
    return out


def as_float32(tensor: Tensor, first: int, last: int) -> np.ndarray:
    """Rows [first, last) of a dense matrix as a new, aligned float32 array."""
    piece = Tensor(tensor.data[first:last], tensor.format, (last - first, *tensor.shape[1:]))
    return np.require(dequantize(piece), requirements=["C", "A"])


def round_piece(tensor: Tensor, first: int, last: int, format: str, group: int) -> np.ndarray:
    """Packed bytes of rows [first, last); raises BadWeights for weights that cannot be rounded."""
    w = as_float32(tensor, first, last)
    if DISABLED:  # kernels would run as plain Python: the NumPy twin gives the same bytes
        problem = plain.status(w, format)
        if problem == plain.FINE:
            return pack(*plain.quantise(w, format, group), format, group)
    else:
        out = np.empty(packed_bytes(format, *w.shape, group), np.uint8)
        problem = rounding.round_rows(w, format, group, out)
        if problem == plain.FINE:
            return out
    if problem == plain.NOT_FINITE:
        raise BadWeights("NaN or infinite weights")
    raise BadWeights(f"weights larger than {plain.largest(format):.0f}, too large for a float16 scale")


class _Rounder:
    """Rounds tensors on a pool of threads and hands their bytes out in order."""

    def __init__(self, threads: int):
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="npmix-round")

    def pieces(self, tensor: Tensor, format: str, group: int):
        """Yield the packed bytes of a matrix, a row range at a time, at most 2 x threads of them in memory."""
        rows, cols = tensor.shape
        step = max(1, PIECE_WEIGHTS // (cols * ROW_BLOCK)) * ROW_BLOCK
        waiting: deque = deque()
        for first in range(0, rows, step):
            if len(waiting) >= 2 * self.threads:
                yield waiting.popleft().result()
            waiting.append(self._pool.submit(round_piece, tensor, first, min(first + step, rows), format, group))
        while waiting:
            yield waiting.popleft().result()

    def close(self):
        """Stop the threads; pieces not yet begun are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _dense_bytes(tensor: Tensor, format: str) -> np.ndarray:
    """A small dense tensor (norm, router) in `format`: its own, or float32."""
    if not is_finite(tensor):
        raise BadWeights("NaN or infinite weights")
    data = tensor.data if format == tensor.format else dequantize(tensor)
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _fill(file, plan: FilePlan, source, rounder: _Rounder, report) -> None:
    """Write the tensors of one file in the plan's order."""
    for slot in plan.slots:
        if not slot.format:
            file.write(bytes(slot.nbytes))
            continue
        tensor = source.tensor(slot.name)
        try:
            if slot.format in DENSE:
                parts = [_dense_bytes(tensor, slot.format)]
            elif (tensor.format, tensor.group) == (slot.format, slot.group):  # a source that is packed itself
                parts = [tensor.data]
            else:
                parts = rounder.pieces(tensor, slot.format, slot.group)
            for part in parts:
                file.write(part)
                report(part.nbytes, slot.name)
        except BadWeights as e:
            raise BadWeights(f"{source.path}: {slot.name} has {e}: get the checkpoint again, npmix converts finite weights only") from None
        del tensor
        if hasattr(source, "release"):
            source.release(slot.name)


def convert(source, dst, quant: str = "q8", *, uniform=False, force=False, threads=None, progress=None) -> Path:
    """Write the packed store `dst` from a checkpoint; returns its path.

    source: a Hugging Face folder, or an object as `checkpoint` describes it. uniform: every matrix like the
    experts (for comparisons). force: replace what npmix wrote to `dst` before. An interrupted
    conversion goes on when the same call is made again. progress(done_bytes, total_bytes, tensor or file name).
    Raises ConversionError (space, permission, bad weights, occupied folder), StoreError (locked), CheckpointError, ConfigError.
    """
    recipe = make_recipe(quant, uniform)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected 1 or more")
    own = not hasattr(source, "tensor")
    if own:
        if Path(source).resolve() == Path(dst).resolve():
            raise ConversionError(f"source and destination are the same folder {dst}: choose another destination")
        if (Path(source) / MANIFEST).exists():
            raise ConversionError(f"{source} is a packed store already: convert from the checkpoint it was made from")
        source = open_checkpoint(source)
    try:
        return _convert(source, Path(dst), recipe, force, threads or default_threads(), progress)
    finally:
        if own:
            source.close()


def _convert(source, dst: Path, recipe: dict, force: bool, threads: int, progress) -> Path:
    config = source.config
    plan = plan_store(config, tensor_formats(config, recipe, lambda name: source.tensor(name).format))
    fingerprint = source.fingerprint() if hasattr(source, "fingerprint") else ""
    total, done = sum(file.nbytes for file in plan), 0

    def report(nbytes, what):
        nonlocal done
        done += nbytes
        if progress:
            progress(min(done, total), total, what)

    rounder = _Rounder(threads)
    try:
        with StoreWriter(dst, plan, plan_digest(config, plan, fingerprint), force) as writer:
            for file_plan in plan:
                if file_plan.name in writer.finished:
                    report(file_plan.nbytes, file_plan.name)
                    continue
                before = done
                try:
                    writer.write_file(file_plan, lambda file, plan=file_plan: _fill(file, plan, source, rounder, report))
                except BadWeights:
                    writer.abandon()
                    raise
                report(file_plan.nbytes - (done - before), file_plan.name)  # header and pads
            tokenizer = source.tokenizer_path
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "config": config.to_dict(),
                "recipe": recipe,
                "source": {"kind": source.kind, "name": Path(source.path).name, "fingerprint": fingerprint},
                "is_instruct": bool(source.is_instruct),
                "tokenizer": TOKENIZER if tokenizer else None,
                "tensors": tensor_table(plan),
            }
            writer.finish(manifest, tokenizer)
    finally:
        rounder.close()
    return dst


def verify(path, progress=None) -> dict:
    """Check the weights in a folder; returns {"path", "kind", "files", "bytes"}.

    A store: every file's sha256, then scales and dense tensors for NaN and infinity. A Hugging Face folder (it has no
    digests): every weight for NaN and infinity. Raises StoreError or CheckpointError, naming the file or tensor.
    """
    with open_source(path) as source:
        files = source.manifest["files"] if source.kind == "store" else {}
        in_files = sum(entry["bytes"] for entry in files.values())
        in_tensors = sum(source.tensor(name).nbytes for name in source.names())

        def after_files(done, _, what):
            progress(in_files + done, in_files + in_tensors, what)

        if files:
            verify_files(source, progress and (lambda done, _, what: progress(done, in_files + in_tensors, what)))
        verify_finite(source, progress and after_files)
        return {"path": str(source.path), "kind": source.kind, "files": len(files), "bytes": in_files or in_tensors}


def info(path) -> dict:
    """What lies in a folder: {"path", "kind", "config", "recipe", "source", "is_instruct", "tokenizer", "weights", "total", "digests"}.

    weights: kind -> {"tensors", "weights", "bytes", "bits_per_weight", "formats"}; total: the same sums.
    """
    with open_source(path) as source:
        kinds = weigh(source)
        total = {key: sum(row[key] for row in kinds.values()) for key in ("tensors", "weights", "bytes")}
        total["bits_per_weight"] = 8 * total["bytes"] / total["weights"]
        store = source.kind == "store"
        return {
            "path": str(source.path),
            "kind": source.kind,
            "config": source.config.to_dict(),
            "recipe": source.manifest["recipe"] if store else None,
            "source": source.manifest["source"] if store else None,
            "is_instruct": source.is_instruct,
            "tokenizer": source.tokenizer_path.name if source.tokenizer_path else None,
            "weights": kinds,
            "total": total,
            "digests": f"recorded for {len(source.manifest['files'])} files; npmix verify checks them" if store else "none recorded",
        }
