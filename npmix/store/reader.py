"""Reading a packed store: check every claim, then map.

One hard fact: kernels run over these maps without bounds checks, so a tensor is handed out only
after its file's size, its header entry, its format, group and shape have been compared with what
the model's config and the layout demand. Digests are checked by `verify`, not here.
"""

import hashlib
from pathlib import Path

import numpy as np

from ..checkpoint.jsonfile import read_json
from ..checkpoint.safetensors_file import SafetensorsFile
from ..config import Config
from ..errors import ConfigError, StoreError
from ..formats import DENSE, PACKED, tensor_bytes
from ..quant.tensor import Tensor
from .layout import FORMAT, MANIFEST, PROGRESS, SAFETENSORS_DTYPE, TOKENIZER, VERSION, file_of, stored_shape

FIELDS = {"format", "version", "config", "recipe", "source", "is_instruct", "tokenizer", "tensors", "files"}


def read_manifest(folder: Path) -> dict:
    """npmix.json with its top-level claims checked."""
    path = folder / MANIFEST
    if not path.exists():
        if (folder / PROGRESS).exists():
            raise StoreError(f"{folder} holds an unfinished conversion: run the same npmix convert again, it goes on where it stopped")
        raise StoreError(f"{folder} has no {MANIFEST}: it is not a packed store")
    manifest = read_json(path, StoreError)
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{path}: format is {str(manifest.get('format'))[:40]!r}, expected {FORMAT!r}")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise StoreError(f"{path}: version is {str(version)[:40]!r}, expected a whole number")
    if version > VERSION:
        raise StoreError(f"{path}: the store has format version {version}, this npmix reads up to {VERSION}: upgrade npmix")
    if set(manifest) != FIELDS:
        raise StoreError(f"{path} has missing or unknown fields: {', '.join(sorted(set(manifest) ^ FIELDS))[:200]}: convert again")
    for name, kind in (("is_instruct", bool), ("tensors", dict), ("files", dict), ("recipe", dict), ("source", dict)):
        if not isinstance(manifest[name], kind):
            raise StoreError(f"{path}: {name} is a JSON {type(manifest[name]).__name__}: convert again")
    for name, field in (("recipe", "name"), ("source", "kind"), ("source", "name")):
        if not isinstance(manifest[name].get(field), str):
            raise StoreError(f"{path}: {name} lacks {field} or it is no text: convert again")
    return manifest


def _check_files(folder: Path, manifest: dict, config: Config) -> None:
    """File names, sizes and digests as the manifest states them, against the folder."""
    expected = {file_of(name) for name in config.tensor_shapes()}
    if manifest["tokenizer"] is not None:
        if manifest["tokenizer"] != TOKENIZER:
            raise StoreError(f"{folder / MANIFEST}: tokenizer is {str(manifest['tokenizer'])[:60]!r}, expected {TOKENIZER!r} or null")
        expected.add(TOKENIZER)
    if set(manifest["files"]) != expected:
        odd = sorted(set(manifest["files"]) ^ expected)
        raise StoreError(f"{folder / MANIFEST}: files do not match the config: {', '.join(odd)[:200]}: convert again")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise StoreError(f"{folder / MANIFEST}: the entry of {name} lacks bytes or sha256: convert again")
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path} is missing: copy the store again or convert again")
        if path.stat().st_size != entry["bytes"]:
            found = path.stat().st_size
            raise StoreError(f"{path} has {found} bytes, the manifest says {entry['bytes']}: copy the store again or convert again")


def _check_tensor(where: Path, name: str, claim, shape: tuple[int, ...], version: int) -> tuple[str, int]:
    """(format, group) of one entry of the manifest's table."""
    if not isinstance(claim, dict) or set(claim) != {"file", "format", "group", "shape"}:
        raise StoreError(f"{where}: the entry of {name} lacks file, format, group or shape: convert again")
    format, group = claim["format"], claim["group"]
    if claim["shape"] != list(shape):
        raise StoreError(f"{where}: {name} has shape {str(claim['shape'])[:60]}, the config says {list(shape)}: convert again")
    if claim["file"] != file_of(name):
        raise StoreError(f"{where}: {name} is in {str(claim['file'])[:60]!r}, expected {file_of(name)}: convert again")
    if not isinstance(format, str) or format not in SAFETENSORS_DTYPE:
        raise StoreError(f"{where}: {name} has format {str(format)[:40]!r}, expected one of {', '.join(SAFETENSORS_DTYPE)}: upgrade npmix")
    if format == "q4" and version < 2:
        raise StoreError(f"{where}: {name} is q4 as an older npmix packed it, no longer read: convert again from the checkpoint")
    if type(group) is not int or (group != 0 if format in DENSE else group not in PACKED[format].groups):
        raise StoreError(
            f"{where}: {name} has group {str(group)[:40]}, expected {0 if format in DENSE else PACKED[format].groups}: convert again"
        )
    if format in PACKED and (len(shape) != 2 or name.endswith((".router", "norm"))):
        raise StoreError(f"{where}: {name} is packed as {format}, expected a dense format: convert again")
    if name.endswith("norm") and format != "f32":
        raise StoreError(f"{where}: {name} is {format}, expected f32: convert again")
    return format, group


class Store:
    """Weights of a packed store by our names. Use as a context manager or `close` it."""

    kind = "store"

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is not a folder: expected one with {MANIFEST}")
        self.manifest = read_manifest(self.path)
        where = self.path / MANIFEST
        try:
            self.config = Config.from_dict(self.manifest["config"])
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}") from None
        self._shapes = self.config.tensor_shapes()
        table = self.manifest["tensors"]
        if set(table) != set(self._shapes):
            odd = sorted(set(table) ^ set(self._shapes))
            raise StoreError(f"{where}: tensors do not match the config: {', '.join(odd)[:200]}: convert again")
        self._formats = {
            name: _check_tensor(where, name, table[name], shape, self.manifest["version"]) for name, shape in self._shapes.items()
        }
        _check_files(self.path, self.manifest, self.config)
        self.generation = {"eos_ids": self.config.eos_ids}
        self.is_instruct = self.manifest["is_instruct"]
        self.tokenizer_path = self.path / TOKENIZER if self.manifest["tokenizer"] else None
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._open_files()
        except StoreError:
            self.close()
            raise

    def _open_files(self) -> None:
        """Map every file; compare each header entry with the manifest's format and shape."""
        for name, shape in self._shapes.items():
            file = file_of(name)
            if file not in self._files:
                self._files[file] = SafetensorsFile(self.path / file, StoreError)
            entry = self._files[file].entries.get(name)
            if entry is None:
                raise StoreError(f"{self.path / file} lacks {name}: convert again")
            format, group = self._formats[name]
            nbytes = tensor_bytes(format, shape, group)
            expected = SAFETENSORS_DTYPE[format], stored_shape(format, shape, nbytes), nbytes
            if (entry.dtype, entry.shape, entry.nbytes) != expected:
                raise StoreError(
                    f"{self.path / file}: {name} is {entry.dtype} {entry.shape}, expected {expected[0]} {expected[1]}: convert again"
                )

    def names(self) -> list[str]:
        """Our names of all tensors, in the order of the forward pass."""
        return list(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """A read-only view on the map. "output" of a model with tied embeddings is tok_embeddings."""
        if name == "output" and self.config.tied_embeddings:
            name = "tok_embeddings"
        format, group = self._formats[name]
        return Tensor(self._files[file_of(name)].view(name), format, self._shapes[name], group)

    def extent(self, name: str) -> tuple[str, int, int]:
        """(file name, first byte, bytes) of a tensor."""
        entry = self._files[file_of(name)].entries[name]
        return file_of(name), entry.start, entry.nbytes

    def range(self, file: str, start: int, nbytes: int) -> np.ndarray:
        """Bytes of a file's map as a read-only view."""
        return self._files[file].range(start, nbytes)

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process."""
        file = self._files[file_of(name)]
        file.release(file.entries[name].start, file.entries[name].nbytes)

    def fingerprint(self) -> str:
        """What changes when the weights do: the manifest's sha256, since it holds every file's."""
        try:
            return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()
        except OSError as e:
            raise StoreError(f"cannot read {self.path / MANIFEST}: {e.strerror or e}") from None

    def close(self) -> None:
        """Drop the maps; tensors must not be used afterwards."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
