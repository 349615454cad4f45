"""A safetensors file that lies, in every way we could think of, is refused before it is mapped."""

import json

import numpy as np
import pytest
from make import write_safetensors

from npmix.checkpoint.safetensors_file import SafetensorsFile, read_header
from npmix.errors import CheckpointError, StoreError


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_views_at_any_alignment(tmp_path):
    """Tensors are read where they lie, whatever the header's length does to their alignment."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for extra in range(8):
        path = write_safetensors(tmp_path / f"{extra}", {"pad": ("U8", (extra,), bytes(extra)), "x": ("F32", (2, 3), x.tobytes())})
        file = SafetensorsFile(path)
        view = file.view("x")
        assert (view == x).all() and not view.flags.writeable
        del view
        file.close()


def test_empty_tensors_are_fine(tmp_path):
    """A tensor without elements takes no bytes and is no hole."""
    path = write_safetensors(tmp_path / "x", {"none": ("F32", (0, 4), b""), "x": ("U8", (3,), b"abc"), "end": ("F16", (0,), b"")})
    assert set(read_header(path)[0]) == {"none", "x", "end"}


LIES = {
    "offsets beyond the file": ({"x": entry(offsets=(0, 1 << 40), shape=(1 << 38,))}, bytes(16)),
    "shape larger than offsets": ({"x": entry(shape=(2, 3))}, bytes(16)),
    "shape product wraps around 64 bits": ({"x": entry(shape=(1 << 33, 1 << 33))}, bytes(16)),
    "negative size": ({"x": entry(shape=(-2, -2))}, bytes(16)),
    "fraction as size": ({"x": entry(shape=(2.0, 2))}, bytes(16)),
    "boolean as size": ({"x": entry(shape=(True, 4))}, bytes(16)),
    "nine axes": ({"x": entry(shape=(1,) * 7 + (2, 2))}, bytes(16)),
    "offsets reversed": ({"x": entry(offsets=(16, 0))}, bytes(16)),
    "negative offset": ({"x": entry(offsets=(-16, 0))}, bytes(16)),
    "three offsets": ({"x": entry(offsets=(0, 8, 16))}, bytes(16)),
    "overlap": ({"x": entry(), "y": entry(offsets=(8, 24))}, bytes(24)),
    "the same bytes twice": ({"x": entry(), "y": entry()}, bytes(16)),
    "hole": ({"x": entry(), "y": entry(offsets=(24, 40))}, bytes(40)),
    "unused end": ({"x": entry()}, bytes(17)),
    "truncated data": ({"x": entry()}, bytes(15)),
    "unknown dtype": ({"x": entry(dtype="F128")}, bytes(16)),
    "dtype is no text": ({"x": entry(dtype=["F32"])}, bytes(16)),
    "entry is no object": ({"x": [1, 2]}, b""),
    "entry lacks shape": ({"x": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
    "header is a list": ([1, 2, 3], b""),
    "header is no JSON": (b"{'x': 1}", b""),
    "header is no UTF-8": (b'{"\xff\xfe": 1}', b""),
    "header nests too deep": (b"[" * 100_000 + b"]" * 100_000, b""),
    "metadata is no object": ({"__metadata__": 7, "x": entry()}, bytes(16)),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(tmp_path, lie):
    """Each lie is a one-line error that names the file."""
    header, data = LIES[lie]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as e:
        SafetensorsFile(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\0\0\0", bytes(8), (1 << 62).to_bytes(8, "little"), (1000).to_bytes(8, "little") + b"{}"])
def test_truncated_headers_are_refused(tmp_path, content):
    """Files too short for the length they state, and absurd lengths."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as e:
        SafetensorsFile(path)
    assert "\n" not in str(e.value)


def test_missing_file_and_folder_in_its_place(tmp_path):
    """A file that is not there, or is a folder, is our error, not the system's."""
    (tmp_path / "folder").mkdir()
    for name in ("none", "folder"):
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / name)


def test_the_error_type_is_the_caller_s(tmp_path):
    """A store's files raise StoreError."""
    with pytest.raises(StoreError):
        SafetensorsFile(tmp_path / "none", StoreError)


def test_every_truncation_and_many_flips_are_refused_or_read_safely(tmp_path):
    """Cut anywhere, the file is refused; with any byte of the header changed, it is refused or every tensor lies inside it."""
    path = write_safetensors(tmp_path / "x", {"a": ("F32", (2, 2), bytes(range(16))), "b": ("BF16", (3,), bytes(6))})
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            read_header(path)
    rng = np.random.default_rng(0)
    for n in range(len(whole) - 22):
        for flip in rng.integers(1, 256, 4):
            changed = bytearray(whole)
            changed[n] ^= flip
            path.write_bytes(changed)
            try:
                entries, _ = read_header(path)
            except CheckpointError:
                continue
            assert all(0 <= e.start and e.start + e.nbytes <= len(whole) for e in entries.values())
