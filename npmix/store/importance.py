"""The importance file: how large the inputs of each matrix are, measured on a text; the specification, writer and reader.

A safetensors file. K: the inputs (columns) of a matrix; E: experts; the names are our tensors' names:

    layers.L.wq                  float32 (K,)  mean of the squares of each input of wq, wk and wv, over all tokens
    layers.L.wo                  float32 (K,)
    layers.L.router              float32 (K,)  absent in a model without a router
    layers.L.experts.E.w_gate    float32 (K,)  of w_gate and w_up, over the tokens that chose this expert; zeros if none did
    layers.L.experts.E.w_down    float32 (K,)  likewise
    output                       float32 (K,)
    counts                       int64 (layers, E)  the tokens that chose each expert
    metadata "npmix"             JSON: {"format": "npmix-importance", "version": 1, "model", "text" (sha256), "tokens", "window"}

One hard fact: the file holds what was measured and nothing else; what is done about experts seldom chosen
(PSEUDO_TOKENS) and inputs that were never anything but 0 (FLOOR) happens on reading.

All in one metadata value: the library writes several in random order, and equal runs give equal files.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint.safetensors_file import read_header
from ..config import Config
from ..errors import CalibrationError
from .writer import write_atomically

FORMAT, VERSION, COUNTS = "npmix-importance", 1, "counts"
PSEUDO_TOKENS = 32  # an expert's means are blended with those over all experts of its layer as if this many tokens came from there
FLOOR = 1e-6  # of the mean over a matrix's inputs: no input counts less, so that no group of weights is without weight
SHARED_INPUT = {"wk": "wq", "wv": "wq", "w_up": "w_gate"}  # whose input a matrix shares
MAX_COUNT = 1 << 48


def shapes(config: Config, layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """The float32 tensors of a file; with `layers` only those of the first layers, as a partial state has them."""
    out = {}
    for name, shape in config.tensor_shapes().items():
        parts = name.split(".")
        inside = parts[0] != "layers" or layers is None or int(parts[1]) < layers
        if len(shape) == 2 and inside and parts[-1] not in (*SHARED_INPUT, "tok_embeddings", "output"):
            out[name] = (shape[1],)
    if layers is None or layers == config.n_layers:
        out["output"] = (config.dim,)
    return out


def save_importance(path: Path, means: dict[str, np.ndarray], counts: np.ndarray, about: dict) -> None:
    """Write a file, atomically. about: what stands in the metadata beside format and version."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **about}, sort_keys=True)
    tensors = {name: np.ascontiguousarray(values, np.float32) for name, values in means.items()}
    data = save({**tensors, COUNTS: np.ascontiguousarray(counts, np.int64)}, {"npmix": text})
    write_atomically(Path(path), data)


def load_importance(path, config: Config, partial: bool = False) -> tuple[dict[str, np.ndarray], np.ndarray, dict]:
    """(means, counts, about) of a file, all of it checked against the config; raises CalibrationError naming the tensor.

    partial: the state of an interrupted run, whose `about` says in "layers" how many are there.
    """
    path = Path(path)
    entries, metadata = read_header(path, CalibrationError)
    about = _about(path, metadata)
    layers = about.get("layers") if partial else config.n_layers
    if type(layers) is not int or not 1 <= layers <= config.n_layers or (not partial and "layers" in about):
        raise CalibrationError(f"{path} is not a finished importance file: calibrate again")
    expected = {**{name: ("F32", shape) for name, shape in shapes(config, layers).items()}, COUNTS: ("I64", (layers, config.n_experts))}
    for name, (dtype, shape) in expected.items():
        if name not in entries:
            raise CalibrationError(f"{path} lacks {name}: it is of another model, or damaged; calibrate this one")
        entry = entries[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise CalibrationError(f"{path}: {name} is {entry.dtype} {entry.shape}, this model needs {dtype} {shape}: calibrate this model")
    if set(entries) != set(expected):
        odd = sorted(set(entries) - set(expected))
        raise CalibrationError(f"{path} has {odd[0][:100]!r}, which this model has not: calibrate this model")
    try:
        with safe_open(str(path), framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as e:
        raise CalibrationError(f"{path}: {str(e)[:160]}: calibrate again") from None
    counts = tensors.pop(COUNTS)
    _check_counts(path, counts, about["tokens"], config)
    for name, values in tensors.items():
        _check_values(path, name, values, counts)
    return tensors, counts, about


def _about(path: Path, metadata: dict) -> dict:
    """The metadata as an object, its format, version and number of tokens checked."""
    try:
        about = json.loads(metadata["npmix"])
        if about["format"] != FORMAT:
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CalibrationError(f"{path} is no importance file of npmix: make one with npmix calibrate") from None
    version, tokens = about.get("version"), about.get("tokens")
    if type(version) is not int or version != VERSION:
        raise CalibrationError(
            f"{path} has format version {str(version)[:40]}, this npmix reads {VERSION}: calibrate again, or upgrade npmix"
        )
    if type(tokens) is not int or not 1 <= tokens <= MAX_COUNT:
        raise CalibrationError(f"{path}: tokens is {str(tokens)[:40]}, expected a whole number above 0: calibrate again")
    return about


def _check_counts(path: Path, counts: np.ndarray, tokens: int, config: Config) -> None:
    """Each token chose n_active experts of every layer."""
    if (counts < 0).any() or (counts > MAX_COUNT).any():
        raise CalibrationError(f"{path}: {COUNTS} has a number outside 0..2^48: calibrate again")
    for layer, total in enumerate(counts.sum(axis=1).tolist()):
        if total != tokens * config.n_active:
            raise CalibrationError(
                f"{path}: {COUNTS} of layer {layer} sum to {total}, {tokens} tokens with {config.n_active} experts each "
                f"give {tokens * config.n_active}: calibrate again"
            )


def _check_values(path: Path, name: str, values: np.ndarray, counts: np.ndarray) -> None:
    """Finite, not negative, and not all zero unless no token came."""
    if not np.isfinite(values).all():
        raise CalibrationError(f"{path}: {name} has NaN or infinite numbers: calibrate again")
    if (values < 0).any():
        raise CalibrationError(f"{path}: {name} has negative numbers, mean squares are expected: calibrate again")
    parts = name.split(".")
    unchosen = len(parts) == 5 and counts[int(parts[1]), int(parts[3])] == 0
    if unchosen and values.any():
        raise CalibrationError(f"{path}: {name} has numbers, but no token chose this expert: calibrate again")
    if not unchosen and not values.any():
        raise CalibrationError(f"{path}: {name} is all zeros: its inputs were never anything else, so nothing can be weighted by them")


class Importance:
    """An importance file of a model. counts: int64 (layers, E); tokens: how many were measured; about: the metadata.

    Made by `Importance.open(path, config)`, which raises CalibrationError unless everything the config asks for is there and sound.
    """

    def __init__(self, means: dict[str, np.ndarray], counts: np.ndarray, about: dict):
        self._means, self.counts, self.about = means, counts, about
        self.tokens: int = about["tokens"]

    @classmethod
    def open(cls, path, config: Config) -> "Importance":
        return cls(*load_importance(path, config))

    def of(self, name: str) -> np.ndarray | None:
        """Float32 (K,), above 0: the weight of an error in each column of a matrix. None for what multiplies nothing.

        name: our tensor's name; norms and tok_embeddings (a table, even where it is the output matrix too: there
        ask for "output") have none. An expert's is a blend of its own means and those over all experts, in the shares
        of its tokens and PSEUDO_TOKENS.
        """
        parts = name.split(".")
        parts[-1] = SHARED_INPUT.get(parts[-1], parts[-1])
        name = ".".join(parts)
        if name not in self._means:
            return None
        values = self._means[name].astype(np.float64)
        if len(parts) == 5:
            count = int(self.counts[int(parts[1]), int(parts[3])])
            values = (count * values + PSEUDO_TOKENS * self._of_all(int(parts[1]), parts[4])) / (count + PSEUDO_TOKENS)
        floor = max(FLOOR * float(values.mean()), float(np.finfo(np.float32).tiny))
        return np.maximum(values, floor).astype(np.float32)

    def _of_all(self, layer: int, kind: str) -> np.ndarray:
        """The means over all tokens of a layer's experts."""
        counts = self.counts[layer]
        total = sum(int(n) * self._means[f"layers.{layer}.experts.{e}.{kind}"].astype(np.float64) for e, n in enumerate(counts))
        return total / counts.sum()
