"""Checking weights against their digests and for NaN or infinity, and counting them by kind.

One hard fact: a packed weight is finite exactly when its scale is, so a store is checked by its
digests, its float16 scales and its dense tensors; codes have no bad values.
"""

import hashlib

import numpy as np

from ..errors import CheckpointError, StoreError
from ..formats import DENSE, PACKED, row_blocks, span_bytes, spans
from ..quant.tensor import Tensor
from .reader import Store

PIECE = 8 << 20  # bytes looked at between two reports of progress
KINDS = ("embeddings", "attention", "router", "experts", "norms", "output")


def kind_of(name: str) -> str:
    """The kind of a tensor, one of KINDS."""
    last = name.rsplit(".", 1)[-1]
    if last in ("wq", "wk", "wv", "wo"):
        return "attention"
    if last.endswith("norm"):
        return "norms"
    return {"tok_embeddings": "embeddings", "output": "output", "router": "router"}.get(last, "experts")


def _scales(tensor: Tensor) -> np.ndarray:
    """All float16 scales of a packed tensor, as a view."""
    rows, cols = tensor.shape
    table = tensor.data.reshape(row_blocks(rows), spans(cols, tensor.group), span_bytes(tensor.format, tensor.group))
    return table[:, :, :64]


def _half_bits_finite(bits: np.ndarray) -> bool:
    return not ((bits & 0x7C00) == 0x7C00).any()


def is_finite(tensor: Tensor) -> bool:
    """Whether every weight is a number; looks at a few megabytes at a time."""
    if tensor.format in PACKED:
        scales = _scales(tensor)
        step = max(1, PIECE // max(1, scales[:1].nbytes))
        pieces = (np.ascontiguousarray(scales[i : i + step]).view(np.uint16) for i in range(0, len(scales), step))
        return all(_half_bits_finite(piece) for piece in pieces)
    rows = tensor.data.reshape(-1, tensor.shape[-1])
    step = max(1, PIECE // max(1, rows[:1].nbytes))
    for i in range(0, len(rows), step):
        piece = rows[i : i + step]
        bad = ((piece & 0x7F80) == 0x7F80).any() if tensor.format == "bf16" else not np.isfinite(piece).all()
        if bad:
            return False
    return True


def verify_files(store: Store, progress=None) -> int:
    """Compare every file's sha256 with the manifest; returns the bytes read. progress(done, total, what)."""
    files = store.manifest["files"]
    total, done = sum(entry["bytes"] for entry in files.values()), 0
    for name, entry in sorted(files.items()):
        digest = hashlib.sha256()
        try:
            with open(store.path / name, "rb") as f:
                while piece := f.read(PIECE):
                    digest.update(piece)
                    done += len(piece)
                    if progress:
                        progress(done, total, name)
        except OSError as e:
            raise StoreError(f"cannot read {store.path / name}: {e.strerror or e}") from None
        if digest.hexdigest() != entry["sha256"]:
            raise StoreError(f"{store.path / name} is damaged, its sha256 is not the manifest's: copy the store again or convert again")
    return done


def verify_finite(source, progress=None) -> int:
    """Raise if a weight of any source is NaN or infinite; returns the bytes of all tensors."""
    error = StoreError if source.kind == "store" else CheckpointError
    names = source.names()
    total, done = sum(source.tensor(name).nbytes for name in names), 0
    for name in names:
        tensor = source.tensor(name)
        if not is_finite(tensor):
            raise error(f"{source.path}: {name} has NaN or infinite weights: get the checkpoint again")
        done += tensor.nbytes
        del tensor
        source.release(name)
        if progress:
            progress(done, total, name)
    return done


def weigh(source) -> dict[str, dict]:
    """kind -> {"tensors", "weights", "bytes", "bits_per_weight", "formats"}; kinds that occur only."""
    table: dict[str, dict] = {}
    for name in source.names():
        tensor = source.tensor(name)
        row = table.setdefault(kind_of(name), {"tensors": 0, "weights": 0, "bytes": 0, "formats": []})
        row["tensors"] += 1
        row["weights"] += int(np.prod(tensor.shape))
        row["bytes"] += tensor.nbytes
        label = tensor.format if tensor.format in DENSE else f"{tensor.format} group {tensor.group}"
        if label not in row["formats"]:
            row["formats"].append(label)
    for row in table.values():
        row["bits_per_weight"] = 8 * row["bytes"] / row["weights"]
    return {kind: table[kind] for kind in KINDS if kind in table}
