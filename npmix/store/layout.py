"""The packed store, version 2: the specification, then the arithmetic of its bytes.

A store is a folder:

    npmix.json                  the manifest, written last: a folder without it is no store
    layer-00000.safetensors     one file per layer
    rest.safetensors            tok_embeddings, norm, output
    tokenizer.model             the source's, if it had one

The manifest is one JSON object:

    format       "npmix-store"
    version      2; a reader refuses a higher number (1 differs in its 4-bit format, which is no longer read)
    config       the fields of `config.Config`
    recipe       how the weights were rounded, in words; for people
    source       where they came from, in words; for people
    is_instruct  whether the source was tuned to chat
    tokenizer    "tokenizer.model" or null
    tensors      our name -> {"file", "format", "group", "shape"}; exactly the names and shapes of
                 Config.tensor_shapes(). format: f32, f16, bf16 (group 0) or a packed one
                 (`formats.PACKED`) with the inputs that share a scale, one of its `groups`
    files        file name -> {"bytes", "sha256"} of every file but the manifest

Each .safetensors file is an ordinary one, which any safetensors reader opens:

    - the header is padded with spaces so that the data starts on a page of 4,096 bytes;
    - a dense tensor has its own dtype (F32, F16, BF16) and shape; a packed one is U8 of one axis,
      its bytes as `formats` describes them;
    - tensors start on 64 bytes and follow one another in the order of the forward pass; an expert's w_gate, w_up
      and w_down lie next to each other and start on a page, so an expert is one contiguous read;
    - what padding this takes is explicit, tensors named pad.0, pad.1 ... of U8 zeros, because the format
      forbids holes.

While a conversion runs, the folder also holds npmix.partial.json (the files finished so far and
a digest of the plan, so that the same conversion can go on), .npmix.lock and one *.partial file.

One hard fact: the plan fixes every byte's place before the first weight is read, so the space needed is known
exactly and files can be written front to back.
"""

import hashlib
import json
from dataclasses import dataclass

from ..config import Config
from ..formats import DENSE, PACKED, tensor_bytes

FORMAT = "npmix-store"
VERSION = 2
MANIFEST = "npmix.json"
PROGRESS = "npmix.partial.json"
LOCK = ".npmix.lock"
PARTIAL = ".partial"
REST = "rest.safetensors"
TOKENIZER = "tokenizer.model"
PAGE = 4096
LINE = 64
SAFETENSORS_DTYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16", **dict.fromkeys(PACKED, "U8")}


@dataclass(frozen=True)
class Slot:
    """A tensor's place: `start` counts from the beginning of its file. Pads have an empty format."""

    name: str
    format: str
    group: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class FilePlan:
    """One safetensors file: the bytes before the data, and its tensors in order, pads included."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(slot.nbytes for slot in self.slots)


def file_of(tensor: str) -> str:
    """The file that holds a tensor, by our name."""
    parts = tensor.split(".")
    return f"layer-{int(parts[1]):05d}.safetensors" if parts[0] == "layers" else REST


def stored_shape(format: str, shape: tuple[int, ...], nbytes: int) -> tuple[int, ...]:
    """The shape in the safetensors header."""
    return tuple(shape) if format in DENSE else (nbytes,)


def _header(slots: list[Slot]) -> bytes:
    """Length and JSON of the header, spaces up to a page; offsets count from the data's start."""
    table = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    for slot in slots:
        dtype = SAFETENSORS_DTYPE.get(slot.format, "U8")
        shape = stored_shape(slot.format, slot.shape, slot.nbytes)
        table[slot.name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [slot.start, slot.start + slot.nbytes]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def plan_file(name: str, tensors: list[tuple[str, str, int, tuple[int, ...]]]) -> FilePlan:
    """Lay out (name, format, group, shape) one after another, an expert's first matrix on a page."""
    slots: list[Slot] = []
    at = pads = 0
    expert = None
    for tensor, format, group, shape in tensors:
        parts = tensor.split(".")
        this = tuple(parts[:4]) if len(parts) == 5 else None
        unit = PAGE if this is not None and this != expert else LINE
        expert = this
        if at % unit:
            gap = -at % unit
            slots.append(Slot(f"pad.{pads}", "", 0, (gap,), at, gap))
            pads += 1
            at += gap
        nbytes = tensor_bytes(format, shape, group)
        slots.append(Slot(tensor, format, group, tuple(shape), at, nbytes))
        at += nbytes
    header = _header(slots)
    moved = (Slot(s.name, s.format, s.group, s.shape, s.start + len(header), s.nbytes) for s in slots)
    return FilePlan(name, header, tuple(moved))


def plan_store(config: Config, formats: dict[str, tuple[str, int]]) -> list[FilePlan]:
    """The files of a store. formats: our name -> (format, group)."""
    files: dict[str, list] = {}
    for tensor, shape in config.tensor_shapes().items():
        files.setdefault(file_of(tensor), []).append((tensor, *formats[tensor], shape))
    return [plan_file(name, files[name]) for name in sorted(files)]


def tensor_table(plan: list[FilePlan]) -> dict[str, dict]:
    """The manifest's `tensors`."""
    return {
        slot.name: {"file": file.name, "format": slot.format, "group": slot.group, "shape": list(slot.shape)}
        for file in plan
        for slot in file.slots
        if slot.format
    }


def plan_digest(config: Config, plan: list[FilePlan], source: str) -> str:
    """What two conversions must share for one to go on where the other stopped."""
    digest = hashlib.sha256(json.dumps([VERSION, config.to_dict(), source], sort_keys=True).encode())
    for file in plan:
        digest.update(file.header)
        digest.update(json.dumps([[s.name, s.format, s.group, s.shape] for s in file.slots]).encode())
    return digest.hexdigest()
