"""By what a conversion weighs errors: the importance of a matrix's inputs, and the factors of their second moments.

One hard fact: moments of few tokens hold correlations that are chance, and making up for errors by these costs more than it gains. So
products of different inputs shrink as if UNRELATED_TOKENS with none had been seen too; and an expert's moments are blended with those over
all experts of its layer as if PSEUDO_TOKENS came from there. With both, 512 tokens of text do better than none (`tools/LOG.md`).
"""

import hashlib
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import CalibrationError, InputError
from ..quant.compensate import factors
from .importance import SHARED_INPUT, Importance
from .moments import Moments

PSEUDO_TOKENS = 512
UNRELATED_TOKENS = 512
_READ = 1 << 22


def digest(path) -> str:
    """sha256 of a file, read in pieces."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ):
            sha.update(piece)
    return sha.hexdigest()


def _own_name(name: str, config: Config) -> str:
    """Under which name a matrix's inputs are filed, but for those it shares: a tied model's table of embeddings is its output matrix too."""
    return "output" if name == "tok_embeddings" and config.tied_embeddings else name


def column_weights(importance: Importance | None, name: str, config: Config) -> np.ndarray | None:
    """Float32 (K,) with a mean of 1: how much an error counts in each input of a matrix; None: all the same.

    A mean of 1 because the search sums in float32: activations of 1e-20 or 1e20 would leave its range.
    """
    values = importance.of(_own_name(name, config)) if importance else None
    return None if values is None else (values / values.mean(dtype=np.float64)).astype(np.float32)


def _shrunk(moments: np.ndarray, tokens: int) -> np.ndarray:
    """Second moments of so many tokens, as if UNRELATED_TOKENS with the same squares and no correlation had come too."""
    out, inputs = moments * np.float32(tokens / (tokens + UNRELATED_TOKENS)), np.arange(moments.shape[1])
    out[:, inputs, inputs] = moments[:, inputs, inputs]
    return out


class Weighting:
    """What was measured of a model: `weights` and `factors` by our tensor's name; about: what a manifest says of the files.

    Raises CalibrationError for files that are damaged, of another model, or not of one run; InputError for moments without importance.
    """

    def __init__(self, importance, moments, config: Config):
        if moments is not None and importance is None:
            raise InputError("second moments go with the importance file of the same npmix calibrate: name it too")
        self._config, self._importance, self._moments = config, None, None
        self.about: dict[str, dict] = {}
        self._kept: dict[str, object] = {}  # of the layer at hand: means over experts and the factors last made
        for path in (importance, moments):
            if path is not None and not Path(path).exists():
                raise CalibrationError(f"{path} does not exist: make it with npmix calibrate")
        if importance is not None:
            self._importance = Importance.open(importance, config)
            self._describe("importance", importance, self._importance.about)
        if moments is not None:
            self._moments = Moments(moments, config)
            self._describe("second_moments", moments, self._moments.about)
            one, other = self.about.values()
            if (one["text"], one["tokens"]) != (other["text"], other["tokens"]):
                raise CalibrationError(
                    f"{moments} and {importance} were not measured on the same text: take both files of one npmix calibrate"
                )

    def _describe(self, kind: str, path, about: dict) -> None:
        self.about[kind] = {"sha256": digest(Path(path)), "text": about.get("text"), "tokens": about.get("tokens")}

    def weights(self, name: str) -> np.ndarray | None:
        """`column_weights` of a matrix."""
        return column_weights(self._importance, name, self._config)

    def factors(self, name: str, cols: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What `quant.compensate.factors` makes of a matrix's second moments; None without these."""
        if self._moments is None:
            return None
        parts = _own_name(name, self._config).split(".")
        name = ".".join([*parts[:-1], SHARED_INPUT.get(parts[-1], parts[-1])])
        if self._kept.get("name") != name:
            values = self._blended(name)
            try:
                self._kept |= {"name": name, "factors": None if values is None else factors(values, cols)}
            except CalibrationError as e:
                raise CalibrationError(f"{self._moments.path}: {name} has {e}") from None
        return self._kept["factors"]

    def _blended(self, name: str) -> np.ndarray | None:
        values, parts = self._moments.of(name), name.split(".")
        if values is None:
            return None
        if len(parts) < 5:
            return _shrunk(values, self._importance.tokens)
        layer, expert, kind = int(parts[1]), int(parts[3]), parts[4]
        counts = self._importance.counts[layer]
        if self._kept.get("layer") != layer:
            self._kept = {"layer": layer}
        if kind not in self._kept:
            total = np.zeros(values.shape, np.float32)
            for e in np.flatnonzero(counts):
                total += np.float32(counts[e] / counts.sum()) * self._moments.of(f"layers.{layer}.experts.{e}.{kind}")
            self._kept[kind] = _shrunk(total, int(counts.sum()))
        share = np.float32(counts[expert] / (counts[expert] + PSEUDO_TOKENS))
        return share * _shrunk(values, int(counts[expert])) + (np.float32(1) - share) * self._kept[kind]
