"""Packed weights on disk: the specification (layout), the writer, the mapped reader, the digests' check.

One hard fact: a folder is a store only once its manifest, npmix.json, exists; it is written last.
"""

from pathlib import Path

from ..checkpoint import HuggingFaceCheckpoint, open_checkpoint
from ..errors import CheckpointError
from .layout import MANIFEST, PROGRESS
from .reader import Store


def open_store(path) -> Store:
    """Open a packed store; raises StoreError or ConfigError."""
    return Store(path)


def open_source(path) -> Store | HuggingFaceCheckpoint:
    """Open whatever model lies in the folder: a packed store (npmix.json) or a Hugging Face checkpoint (config.json)."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give the path of a packed store or a Hugging Face checkpoint")
    if (path / MANIFEST).exists() or (path / PROGRESS).exists():
        return Store(path)
    if (path / "config.json").exists():
        return open_checkpoint(path)
    raise CheckpointError(f"{path} has neither {MANIFEST} (packed store) nor config.json (Hugging Face checkpoint)")
