"""A Hugging Face folder as a source of weights: config.json, safetensors shards, tokenizer.model.

One hard fact: nothing is copied or converted. A tensor is a view on the mapped file in the
file's own dtype (bf16 as uint16); what the file claims is checked before the map exists.
"""

import hashlib
from pathlib import Path

from ..config import Config
from ..errors import CheckpointError
from ..quant.tensor import Tensor
from .config_json import read_config
from .jsonfile import read_json
from .names import Place, huggingface_places
from .safetensors_file import DTYPES, SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _shard_names(index: dict, where: Path) -> dict[str, str]:
    """tensor name -> file name, from the index; a name that leaves the folder is refused."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{where} has no weight_map, expected tensor names -> file names: download it again")
    for tensor, file in table.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not file.startswith(".")
        if not plain or any(c in file for c in "/\\:\0"):
            raise CheckpointError(
                f"{where} puts {tensor[:100]!r} into {str(file)[:100]!r}, expected the plain name of a .safetensors file in the same folder"
            )
    return table


def _looks_instruct(folder: Path, raw: dict) -> bool:
    """Whether the checkpoint was tuned to chat: it has a chat template, or says so in its name."""
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.exists() and read_json(tokenizer_config, CheckpointError).get("chat_template"):
        return True
    names = folder.resolve().name, str(raw.get("_name_or_path", ""))
    return any("instruct" in name.lower() for name in names)


class HuggingFaceCheckpoint:
    """Weights of a Hugging Face folder by our names. Use as a context manager or `close` it."""

    kind = "huggingface"

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a folder: expected one with config.json and {SINGLE} or {INDEX}")
        self.config: Config
        self.config, raw = read_config(self.path)
        self._shapes = self.config.tensor_shapes()
        self.generation = {"eos_ids": self.config.eos_ids}
        self.is_instruct = _looks_instruct(self.path, raw)
        tokenizer = self.path / "tokenizer.model"
        self.tokenizer_path = tokenizer if tokenizer.exists() else None
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._where = self._open_files()
            self._places = {name: self._find(name, places) for name, places in huggingface_places(self.config).items()}
        except CheckpointError:
            self.close()
            raise

    def _open_files(self) -> dict[str, str]:
        """Open every shard; returns tensor name -> file name."""
        if (self.path / SINGLE).exists():
            self._files[SINGLE] = SafetensorsFile(self.path / SINGLE)
            return {name: SINGLE for name in self._files[SINGLE].entries}
        if not (self.path / INDEX).exists():
            other = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            if other:
                raise CheckpointError(
                    f"{self.path} holds weights only as {other[0]}; npmix reads no pickles: get the safetensors form of this model"
                )
            raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}: download the weights")
        table = _shard_names(read_json(self.path / INDEX, CheckpointError), self.path / INDEX)
        for file in sorted(set(table.values())):
            if not (self.path / file).exists():
                raise CheckpointError(f"{self.path / file} is missing, {INDEX} names it: download it")
            self._files[file] = SafetensorsFile(self.path / file)
        return table

    def _find(self, name: str, places: list[Place]) -> Place:
        """The first place that exists, its dtype and shape checked."""
        for place in places:
            if place.name not in self._where:
                continue
            file = self._where[place.name]
            entry = self._files[file].entries.get(place.name)
            if entry is None:
                raise CheckpointError(f"{self.path / file} lacks {place.name}, though {INDEX} says it is there: download it again")
            if DTYPES.get(entry.dtype, (None,))[0] is None:
                raise CheckpointError(f"{self.path / file}: {place.name} is {entry.dtype}, npmix reads F32, F16 and BF16")
            if entry.shape != place.shape:
                raise CheckpointError(
                    f"{self.path / file}: {place.name} has shape {entry.shape}, config.json says {place.shape}: of different models"
                )
            return place
        raise CheckpointError(f"{self.path} has no tensor {places[0].name} ({name}): incomplete or of another architecture")

    def names(self) -> list[str]:
        """Our names of all tensors, in the order of the forward pass."""
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        """A read-only view on the map. "output" of a model with tied embeddings is tok_embeddings."""
        if name == "output" and self.config.tied_embeddings:
            name = "tok_embeddings"
        place = self._places[name]
        file = self._files[self._where[place.name]]
        data = file.view(place.name)
        shape = self._shapes[name] if place.plane is not None else place.shape
        if place.plane is not None:
            data = data[place.plane, place.row : place.row + shape[0]]
        return Tensor(data, DTYPES[file.entries[place.name].dtype][0], shape)

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process (conversion calls it after use)."""
        place = self._places[name]
        file = self._files[self._where[place.name]]
        nbytes = self.tensor(name).nbytes
        row_bytes = nbytes // self._shapes[name][0]
        skipped = 0 if place.plane is None else (place.plane * place.shape[1] + place.row) * row_bytes
        file.release(file.entries[place.name].start + skipped, nbytes)

    def fingerprint(self) -> str:
        """What changes when the weights do: every shard's header, size and time of change."""
        digest = hashlib.sha256()
        for name, file in sorted(self._files.items()):
            stat = file.path.stat()
            digest.update(repr((name, stat.st_size, stat.st_mtime_ns, sorted(file.entries.items()))).encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Drop the maps; tensors must not be used afterwards."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
