"""The file of second moments: products of a matrix's inputs with each other within blocks of 128; specification and writer.

A safetensors file; names as in the importance file (`importance.py`), the router and counts apart:

    NAME    float32 (ceil(K / 128), 128, 128)   the mean over tokens of x[128 b + i] * x[128 b + j]; zeros past K
    metadata "npmix"    JSON: {"format": "npmix-moments", "version": 1, "text", "tokens"}

One hard fact: Mixtral's has 2.5 GB, so it is written a layer at a time, each layer first into a file of its own,
and joined in the end a tensor at a time.
"""

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint.safetensors_file import read_header
from ..config import Config
from ..errors import CalibrationError
from .importance import SHARED_INPUT, shapes
from .writer import write_atomically

FORMAT, VERSION, BLOCK = "npmix-moments", 1, 128


def moment_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a file, in its order."""
    return {name: (-(-width // BLOCK), BLOCK, BLOCK) for name, (width,) in shapes(config).items() if not name.endswith("router")}


def _of_layer(name: str, layer: int, config: Config) -> bool:
    return name.startswith(f"layers.{layer}.") or (name == "output" and layer == config.n_layers - 1)


class MomentsWriter:
    """Takes a layer's moments at a time; PATH.layer-N.partial are whole or not there."""

    def __init__(self, path: Path, config: Config, about: dict):
        self.path, self.config, self.about = path, config, about
        self._shapes = moment_shapes(config)

    def _part(self, layer: int) -> Path:
        return self.path.with_name(f"{self.path.name}.layer-{layer}.partial")

    def has(self, layers: int) -> bool:
        """Whether the first `layers` layers are there."""
        return all(self._part(layer).is_file() for layer in range(layers))

    def nbytes_left(self, layers: int) -> int:
        """Bytes still to be written when `layers` layers are there: the parts to come, and the whole."""
        sizes = {name: 4 * int(np.prod(shape)) for name, shape in self._shapes.items()}
        there = sum(n for name, n in sizes.items() if any(_of_layer(name, layer, self.config) for layer in range(layers)))
        return 2 * sum(sizes.values()) - there

    def add(self, layer: int, moments: dict[str, np.ndarray]) -> None:
        """Keep a layer's."""
        write_atomically(self._part(layer), save(moments))

    def finish(self) -> None:
        """Join the layers; the file gets its name when it is whole."""
        text, at = json.dumps({"format": FORMAT, "version": VERSION, **self.about}, sort_keys=True), 0
        header: dict = {"__metadata__": {"npmix": text}}
        for name, shape in self._shapes.items():
            nbytes = 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        temporary = self.path.with_name(self.path.name + ".partial")
        with open(temporary, "wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for layer in range(self.config.n_layers):
                with safe_open(str(self._part(layer)), framework="np") as part:
                    for name in (n for n in self._shapes if _of_layer(n, layer, self.config)):
                        out.write(np.ascontiguousarray(part.get_tensor(name)).data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, self.path)

    def clear(self) -> None:
        """Remove the parts."""
        for layer in range(self.config.n_layers):
            self._part(layer).unlink(missing_ok=True)
            self._part(layer).with_name(self._part(layer).name + ".partial").unlink(missing_ok=True)
        self.path.with_name(self.path.name + ".partial").unlink(missing_ok=True)


class Moments:
    """A file of second moments, checked against a config; tensors are read when they are asked for."""

    def __init__(self, path, config: Config):
        self.path, self._shapes = Path(path), moment_shapes(config)
        entries, metadata = read_header(self.path, CalibrationError)
        try:
            self.about = json.loads(metadata["npmix"])
            if (self.about["format"], self.about["version"]) != (FORMAT, VERSION):
                raise ValueError
        except (KeyError, TypeError, ValueError, RecursionError):
            raise CalibrationError(f"{path} is no file of second moments: make one with npmix calibrate --second-moments") from None
        for name, shape in self._shapes.items():
            if name not in entries:
                raise CalibrationError(f"{path} lacks {name}: it is of another model, or damaged; calibrate this one")
            if (entries[name].dtype, entries[name].shape) != ("F32", shape):
                found = f"{entries[name].dtype} {entries[name].shape}"
                raise CalibrationError(f"{path}: {name} is {found}, this model needs F32 {shape}: calibrate this model")
        if set(entries) != set(self._shapes):
            raise CalibrationError(f"{path} has {sorted(set(entries) - set(self._shapes))[0][:100]!r}, which this model has not")

    def of(self, name: str) -> np.ndarray | None:
        """Float32 (blocks, 128, 128) of a matrix's inputs by our tensor's name, None where there are none; zeros of an unchosen expert."""
        parts = name.split(".")
        parts[-1] = SHARED_INPUT.get(parts[-1], parts[-1])
        name = ".".join(parts)
        if name not in self._shapes:
            return None
        try:
            with safe_open(str(self.path), framework="np") as file:
                values = file.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise CalibrationError(f"{self.path}: {str(e)[:160]}: calibrate again") from None
        diagonal = np.diagonal(values, axis1=1, axis2=2)
        if not np.isfinite(values).all() or (diagonal < 0).any() or not (values == values.transpose(0, 2, 1)).all():
            raise CalibrationError(f"{self.path}: {name} is not symmetric and finite with no negative squares: calibrate again")
        return values
