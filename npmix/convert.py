"""Conversion of a checkpoint into a packed store; its check (verify) and description (info).

One hard fact: weights stream through in pieces of a few megabytes, rounded by plain threads and
written in order, so memory does not grow with the model. The pages of a tensor that has been read are handed back.
What becomes what: `store/recipe.py`.

With an importance file (`store/importance.py`) an error of a weight counts as much as its input is large, and with second moments too
(`store/moments.py`) later weights of a group make up for the errors of earlier ones, in tables with groups of 128 (q2, q3, q4). f16 has
no use for either, q8, q6 and q5 have none for second moments: a warning says so.
"""

import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .checkpoint import open_checkpoint
from .errors import ConversionError, InputError
from .formats import DENSE, MOMENTS, PACKED, ROW_BLOCK, packed_bytes
from .kernels import compensate, rounding
from .kernels._jit import DISABLED
from .quant import round as plain
from .quant.compensate import quantise_compensated
from .quant.pack import dequantize, pack
from .quant.tensor import Tensor
from .store import Store, open_source, open_store
from .store.layout import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    VERSION,
    FilePlan,
    plan_digest,
    plan_store,
    tensor_table,
)
from .store.recipe import make_recipe, tensor_formats
from .store.verify import is_finite, verify_files, verify_finite, weigh
from .store.weighting import Weighting
from .store.writer import StoreWriter
from .threads import default_threads

PIECE_WEIGHTS = 1 << 20  # weights a thread rounds at a time: 4 MB of float32
LARGEST_F16 = 65504.0


class BadWeights(ConversionError):
    """Weights that cannot be rounded to a format: trying again is of no use. advice: what to do."""

    def __init__(self, found: str, advice: str = "get the checkpoint again, npmix converts finite weights only"):
        super().__init__(found)
        self.advice = advice


def formats_of(source, recipe: dict) -> dict[str, tuple[str, int]]:
    """Our name -> (format, group) of the store to be made; what a packed source has in the recipe's format already keeps its group too."""
    formats = tensor_formats(source.config, recipe, lambda name: source.tensor(name).format)
    if isinstance(source, Store):
        for name, (format, _) in formats.items():
            tensor = source.tensor(name)
            if tensor.format == format:
                formats[name] = (format, tensor.group)
    return formats


def as_float32(tensor: Tensor, first: int, last: int) -> np.ndarray:
    """Rows [first, last) of a matrix as a new, aligned float32 array; of a packed one whole row blocks (first a multiple of 16)."""
    rows, data = last - first, tensor.data
    if tensor.format in PACKED:
        one = packed_bytes(tensor.format, ROW_BLOCK, tensor.shape[1], tensor.group)
        data = data[first // ROW_BLOCK * one :][: -(-rows // ROW_BLOCK) * one]
    else:
        data = data[first:last]
    piece = Tensor(data, tensor.format, (rows, *tensor.shape[1:]), tensor.group)
    return np.require(dequantize(piece), requirements=["C", "A"])


def round_piece(tensor: Tensor, first: int, last: int, format: str, group: int, importance=None, factored=None) -> np.ndarray:
    """Bytes of rows [first, last) in another format; raises BadWeights for weights that cannot be rounded.

    importance: float32 (K,), how much an error counts in each input; None: all the same. factored: with it, what
    `quant.compensate.factors` gave; errors are then made up for.
    """
    w = as_float32(tensor, first, last)
    if format in DENSE:
        return _narrow(w, format)
    if DISABLED:  # kernels would run as plain Python: the NumPy twin gives the same bytes
        problem = plain.status(w, format)
        if problem == plain.FINE:
            rounded = (
                plain.quantise(w, format, group, importance)
                if factored is None
                else quantise_compensated(w, format, group, importance, factored)
            )
            return pack(*rounded, format, group)
    else:
        out = np.empty(packed_bytes(format, *w.shape, group), np.uint8)
        if factored is None:
            problem = rounding.round_rows(w, format, group, out, importance)
        else:
            problem = compensate.round_rows_compensated(w, format, group, out, importance, factored)
        if problem == plain.FINE:
            return out
    if problem == plain.NOT_FINITE:
        raise BadWeights("NaN or infinite weights")
    raise BadWeights(f"weights larger than {plain.largest(format):.0f}, too large for a float16 scale")


def _narrow(w: np.ndarray, format: str) -> np.ndarray:
    """float32 as the bytes of f32 or f16; what is smaller than float16's smallest number becomes 0."""
    if not np.isfinite(w).all():
        raise BadWeights("NaN or infinite weights")
    if format == "f16":
        if w.size and np.abs(w).max() > LARGEST_F16:
            raise BadWeights(f"weights larger than {LARGEST_F16:.0f}, the largest float16", "convert to q8, which takes larger ones")
        w = w.astype(np.float16)
    return w.reshape(-1).view(np.uint8)


class _Rounder:
    """Rounds tensors on a pool of threads and hands their bytes out in order."""

    def __init__(self, threads: int):
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="npmix-round")

    def pieces(self, tensor: Tensor, *how):
        """Yield the bytes of a matrix, a row range at a time, at most 2 x threads of them in memory; how: `round_piece`'s other arguments."""
        rows, cols = tensor.shape
        step = max(1, PIECE_WEIGHTS // (cols * ROW_BLOCK)) * ROW_BLOCK
        waiting: deque = deque()
        for first in range(0, rows, step):
            if len(waiting) >= 2 * self.threads:
                yield waiting.popleft().result()
            waiting.append(self._pool.submit(round_piece, tensor, first, min(first + step, rows), *how))
        while waiting:
            yield waiting.popleft().result()

    def close(self):
        """Stop the threads; pieces not yet begun are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _compensated(format: str, group: int) -> bool:
    """Whether second moments are of use."""
    return format in PACKED and bool(PACKED[format].values) and group == MOMENTS


def _of_use(recipe: dict, importance, second_moments) -> tuple:
    """The files of `calibrate` that a recipe uses; a warning names the others."""
    format, group = recipe["experts"]
    if importance is not None and format not in PACKED:
        what = f"{importance} is" if second_moments is None else f"{importance} and {second_moments} are"
        warnings.warn(f"{format} weighs no errors: {what} not used", stacklevel=3)
        return None, None
    if None not in (importance, second_moments) and not _compensated(format, group):
        warnings.warn(
            f"{format} weighs errors by {importance} alone: {second_moments} is of use to q4, q3 and q2, and is not used", stacklevel=3
        )
        return importance, None
    return importance, second_moments


def _as_it_is(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor that keeps its format."""
    if not is_finite(tensor):
        raise BadWeights("NaN or infinite weights")
    return np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)


def _fill(file, plan: FilePlan, source, rounder: _Rounder, weighting: Weighting, report) -> None:
    """Write the tensors of one file in the plan's order."""
    for slot in plan.slots:
        if not slot.format:
            file.write(bytes(slot.nbytes))
            continue
        tensor = source.tensor(slot.name)
        try:
            if (tensor.format, tensor.group) == (slot.format, slot.group):
                parts = [_as_it_is(tensor)]
            elif len(slot.shape) == 1:
                parts = [_narrow(dequantize(tensor), slot.format)]
            else:
                measured = [weighting.weights(slot.name)] if slot.format in PACKED else []
                if _compensated(slot.format, slot.group):
                    measured.append(weighting.factors(slot.name, slot.shape[1]))
                parts = rounder.pieces(tensor, slot.format, slot.group, *measured)
            for part in parts:
                file.write(part)
                report(part.nbytes, slot.name)
        except BadWeights as e:
            raise BadWeights(f"{source.path}: {slot.name} has {e}: {e.advice}") from None
        del tensor
        if hasattr(source, "release"):
            source.release(slot.name)


def convert(
    source,
    dst,
    quant="q8",
    *,
    uniform=False,
    importance=None,
    second_moments=None,
    requantize=False,
    force=False,
    threads=None,
    progress=None,
) -> Path:
    """Write the packed store `dst` from a checkpoint; returns its path.

    source: a Hugging Face folder, or an object as `checkpoint` describes it; with requantize also a packed store, whose
    rounding errors then stay and the new ones come on top (a warning says so). uniform: every matrix like the
    experts (for comparisons). importance, second_moments: files that one `calibrate` made of this model; the second needs the first. force:
    replace what npmix wrote to `dst` before. An interrupted conversion goes on when the same call is made again.
    progress(done_bytes, total_bytes, tensor or file name). Raises ConversionError (space, permission, bad weights, occupied folder),
    StoreError (locked), CheckpointError, ConfigError, CalibrationError (a file of `calibrate` that is damaged or of another model).
    """
    recipe = make_recipe(quant, uniform)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected 1 or more")
    own = not hasattr(source, "tensor")
    if own:
        source = _open(source, dst, requantize)
    try:
        if own and isinstance(source, Store):
            _warn_of_both(source, recipe)
        weighting = Weighting(*_of_use(recipe, importance, second_moments), source.config)
        recipe |= weighting.about
        return _convert(source, Path(dst), recipe, force, threads or default_threads(), progress, weighting)
    finally:
        if own:
            source.close()


def _open(source, dst, requantize: bool):
    """The source that lies in a folder, unless it must not be converted."""
    if Path(source).resolve() == Path(dst).resolve():
        raise ConversionError(f"source and destination are the same folder {dst}: choose another destination")
    if not (Path(source) / MANIFEST).exists():
        return open_checkpoint(source)
    if not requantize:
        raise ConversionError(
            f"{source} is a packed store already: convert from the checkpoint it was made from, or --requantize (the errors of both roundings add up)"
        )
    return open_store(source)


def _warn_of_both(source: Store, recipe: dict) -> None:
    """Say what rounding a second time costs, unless nothing was rounded, or nothing will be."""
    twice: dict[tuple[str, str], int] = {}
    for name, (format, _) in formats_of(source, recipe).items():
        old = source.tensor(name).format
        if old in PACKED and old != format:
            twice[old, format] = twice.get((old, format), 0) + 1
    if twice:
        what = ", ".join(f"{count} matrices from {old} to {new}" for (old, new), count in sorted(twice.items()))
        warnings.warn(
            f"rounding rounded weights: {what}; the errors of both roundings add up, a conversion of the original checkpoint has one of them",
            stacklevel=3,
        )


def _convert(source, dst: Path, recipe: dict, force: bool, threads: int, progress, weighting: Weighting) -> Path:
    config = source.config
    plan = plan_store(config, formats_of(source, recipe))
    fingerprint = source.fingerprint() if hasattr(source, "fingerprint") else ""
    origin = {"kind": source.kind, "name": Path(source.path).name, "fingerprint": fingerprint}
    if isinstance(source, Store):
        origin["recipe"] = source.manifest["recipe"]
    settings = " ".join([fingerprint, *(about["sha256"] for about in weighting.about.values())])
    total, done = sum(file.nbytes for file in plan), 0

    def report(nbytes, what):
        nonlocal done
        done += nbytes
        if progress:
            progress(min(done, total), total, what)

    rounder = _Rounder(threads)
    try:
        with StoreWriter(dst, plan, plan_digest(config, plan, settings), force) as writer:
            for file_plan in plan:
                if file_plan.name in writer.finished:
                    report(file_plan.nbytes, file_plan.name)
                    continue
                before = done
                try:
                    writer.write_file(file_plan, lambda file, plan=file_plan: _fill(file, plan, source, rounder, weighting, report))
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
                "source": origin,
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
