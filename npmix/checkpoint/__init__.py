"""Foreign weights in: Hugging Face folders, and the one table of tensor names.

One hard fact: a source of weights is an object with path, kind, config, is_instruct, tokenizer_path, names(),
tensor(name), close(), and where they help release(name) and fingerprint(). Conversion and engine see
no more of it, so another one may generate tensors as they are asked for.
"""

from .huggingface import HuggingFaceCheckpoint


def open_checkpoint(path) -> HuggingFaceCheckpoint:
    """Open a Hugging Face folder; raises CheckpointError or ConfigError."""
    return HuggingFaceCheckpoint(path)
