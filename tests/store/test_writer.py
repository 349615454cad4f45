"""Writing a store: atomic, resumable, locked, careful with what it finds in the folder."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
from make import tiny_hf

from npmix.convert import convert
from npmix.errors import ConversionError, StoreError
from npmix.store import open_store, writer
from npmix.store.layout import LOCK, MANIFEST, PROGRESS


class Stop(Exception):
    """An interruption at a chosen moment."""


def stop_after(part):
    """A progress callback that raises once `part` of all bytes are written."""

    def progress(done, total, what):
        if done >= part * total:
            raise Stop

    return progress


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("hf") / "model", num_hidden_layers=3, tokenizer=True)


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    return content(convert(hf, tmp_path_factory.mktemp("whole") / "store", "q4"))


def test_files_are_written_in_pieces(hf, whole, tmp_path, monkeypatch):
    """Pieces far smaller than a tensor, by a system that takes only a part of each at a time: the same bytes."""

    class Reluctant:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            return self._file.write(data[:777])

        def __getattr__(self, name):
            return getattr(self._file, name)

    def opened(*args, **options):
        file = open(*args, **options)
        return Reluctant(file) if options.get("buffering") == 0 else file

    monkeypatch.setattr(writer, "PIECE", 1000)
    monkeypatch.setattr(writer, "open", opened, raising=False)
    assert content(convert(hf, tmp_path / "store", "q4")) == whole


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_an_interrupted_conversion_is_no_store_and_goes_on(hf, whole, tmp_path, part):
    """Stopped anywhere, the folder is no store and holds no partial file; the same call ends with the same bytes."""
    dst = tmp_path / "store"
    with pytest.raises(Stop):
        convert(hf, dst, "q4", progress=stop_after(part))
    assert not (dst / MANIFEST).exists() and (dst / PROGRESS).exists()
    assert not list(dst.glob("*.partial")) and not (dst / LOCK).exists()
    with pytest.raises(StoreError, match="unfinished"):
        open_store(dst)
    kept = {p.name: p.stat().st_mtime_ns for p in dst.glob("*.safetensors")}
    convert(hf, dst, "q4")
    assert content(dst) == whole
    assert all((dst / name).stat().st_mtime_ns == then for name, then in kept.items())  # finished files were not written again


def test_killed_processes_leave_no_store(hf, whole, tmp_path):
    """A process killed in the middle of a file leaves a partial one, which the next run replaces."""
    dst = tmp_path / "store"
    code = (
        "import sys, os\n"
        "from npmix.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], 'q4', progress=lambda done, total, what: os._exit(9) if done > 0.6 * total else None)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(hf), str(dst)], timeout=300).returncode == 9
    assert not (dst / MANIFEST).exists() and list(dst.glob("*.partial"))
    convert(hf, dst, "q4")
    assert content(dst) == whole


def test_other_settings_do_not_go_on(hf, tmp_path):
    """An unfinished conversion is continued only with the same source and settings; --force starts anew."""
    dst = tmp_path / "store"
    with pytest.raises(Stop):
        convert(hf, dst, "q4", progress=stop_after(0.6))
    with pytest.raises(ConversionError, match="other settings"):
        convert(hf, dst, "q8")
    other = tiny_hf(tmp_path / "other", num_hidden_layers=3, tokenizer=True, seed=1)
    with pytest.raises(ConversionError, match="another source"):
        convert(other, dst, "q4")
    convert(hf, dst, "q8", force=True)
    with open_store(dst) as store:
        assert store.manifest["recipe"]["name"] == "q8"


def test_a_truncated_finished_file_is_made_again(hf, whole, tmp_path):
    """A recorded file of another size is not trusted."""
    dst = tmp_path / "store"
    with pytest.raises(Stop):
        convert(hf, dst, "q4", progress=stop_after(0.6))
    path = dst / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    convert(hf, dst, "q4")
    assert content(dst) == whole


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": 1}', '{"plan": 1, "files": []}'])
def test_a_damaged_progress_file_is_not_believed(hf, tmp_path, text):
    """A progress file that cannot be read is another conversion's."""
    dst = tmp_path / "store"
    dst.mkdir()
    (dst / PROGRESS).write_text(text)
    with pytest.raises(ConversionError, match="--force"):
        convert(hf, dst, "q4")
    convert(hf, dst, "q4", force=True)


def test_occupied_folders_are_refused(hf, whole, tmp_path):
    """A finished store or a foreign file: refused without force; with it only npmix's own files are replaced."""
    dst = convert(hf, tmp_path / "store", "q8")
    with pytest.raises(ConversionError, match="finished store"):
        convert(hf, dst, "q4")
    (dst / "layer-00007.safetensors").write_bytes(b"of a deeper model")
    (dst / "notes.txt").write_text("mine")
    convert(hf, dst, "q4", force=True)
    assert content(dst) == {**whole, "notes.txt": b"mine"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="not empty"):
        convert(hf, other, "q4")
    assert content(other) == {"notes.txt": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        convert(hf, tmp_path / "file", "q4")


def test_force_leaves_folders_of_others_alone(hf, tmp_path):
    """Without a manifest or progress file a folder is not npmix's: force replaces nothing in it, whatever its files' names."""
    dst = tmp_path / "mistral"
    dst.mkdir()
    for name in ("params.json", "consolidated.safetensors", "tokenizer.model"):
        (dst / name).write_text("mine")
    before = content(dst)
    with pytest.raises(ConversionError, match="npmix did not make it"):
        convert(hf, dst, "q4", force=True)
    assert content(dst) == before


def test_force_counts_what_it_replaces_and_looks_first(hf, tmp_path, monkeypatch):
    """Too little space leaves the old store whole; the room that it takes itself counts as free."""
    dst = convert(hf, tmp_path / "store", "q8")
    before = content(dst)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=100_000))  # the plan wants 1 MB to spare
    with pytest.raises(ConversionError, match="would be replaced"):
        convert(hf, dst, "q8", force=True)
    assert content(dst) == before
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=(1 << 20) + 4096))  # less than a store
    convert(hf, dst, "q8", force=True)
    assert content(dst) == before


def test_a_checkpoint_is_never_written_to(hf, tmp_path):
    """Not even force writes a store into a Hugging Face folder, least of all the source."""
    before = content(hf)
    for force in (False, True):
        with pytest.raises(ConversionError, match="same folder"):
            convert(hf, hf, "q4", force=force)
        copy = shutil.copytree(hf, tmp_path / f"copy{force}")
        with pytest.raises(ConversionError, match="Hugging Face checkpoint"):
            convert(hf, copy, "q4", force=force)
        assert content(copy) == before == content(hf)


@pytest.mark.skipif(writer.fcntl is None, reason="no flock on this system")
def test_two_conversions_cannot_share_a_folder(hf, tmp_path):
    """The second one is refused while the first runs, and both folders end whole."""
    dst = tmp_path / "store"
    refused = []

    def progress(done, total, what):
        if not refused:
            with pytest.raises(StoreError, match="another conversion") as e:
                convert(hf, dst, "q4")
            refused.append(str(e.value))

    convert(hf, dst, "q4", progress=progress)
    assert refused and not (dst / LOCK).exists()
    open_store(dst).close()


@pytest.mark.skipif(writer.fcntl is None, reason="no flock on this system")
@pytest.mark.parametrize("code, error", [(errno.ENOLCK, None), (errno.EAGAIN, StoreError), (errno.EIO, ConversionError)])
def test_what_a_lock_that_fails_means(hf, tmp_path, monkeypatch, code, error):
    """A file system without locks is written to all the same; only a held lock is another conversion."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writer.fcntl, "flock", flock)
    if error is None:
        open_store(convert(hf, tmp_path / "store", "q4")).close()
        assert not (tmp_path / "store" / LOCK).exists()
        return
    with pytest.raises(error) as e:
        convert(hf, tmp_path / "store", "q4")
    assert ("another conversion" in str(e.value)) == (error is StoreError)


def test_too_little_space_is_found_before_writing(hf, tmp_path, monkeypatch):
    """The space needed is known from the plan; if the disk has less, nothing is written, not even the folder."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(ConversionError, match="GB free"):
        convert(hf, tmp_path / "store", "q4")
    assert not (tmp_path / "store").exists()


def test_a_disk_that_fills_up(hf, whole, tmp_path, monkeypatch):
    """A write that fails for want of space is a ConversionError that says so; finished files stay, and it goes on later."""
    dst = tmp_path / "store"
    real = writer.FileWriter.write

    def write(self, data):
        if self.plan.name == "layer-00002.safetensors" and self._at > 20_000:
            raise OSError(28, "No space left on device")
        real(self, data)

    monkeypatch.setattr(writer.FileWriter, "write", write)
    with pytest.raises(ConversionError, match="no space left") as e:
        convert(hf, dst, "q4")
    assert "\n" not in str(e.value)
    assert sorted(p.name for p in dst.iterdir()) == ["layer-00000.safetensors", "layer-00001.safetensors", PROGRESS]
    monkeypatch.undo()
    convert(hf, dst, "q4")
    assert content(dst) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_the_system_refuses_a_write(hf, tmp_path):
    """A real failing write (a limit on file sizes) ends in the same one-line error and leaves no store."""
    code = (
        "import resource, sys\n"
        "from npmix.convert import convert\n"
        "from npmix.errors import ConversionError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n    convert(sys.argv[1], sys.argv[2], 'q8')\n"
        "except ConversionError as e:\n    print(e)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(hf), str(tmp_path / "store")], capture_output=True, text=True, timeout=300)
    assert run.stdout.count("\n") == 1 and "no space left" in run.stdout, run.stderr
    assert not list((tmp_path / "store").glob("*.safetensors*"))


def test_no_permission(hf, tmp_path, monkeypatch):
    """A folder that cannot be made is a ConversionError; for root, who may write anywhere, the refusal is simulated."""

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    if hasattr(os, "geteuid") and os.geteuid() != 0:
        tmp_path.chmod(0o500)
    else:
        monkeypatch.setattr(writer.Path, "mkdir", refuse)
    try:
        with pytest.raises(ConversionError, match="Permission denied") as e:
            convert(hf, tmp_path / "store", "q4")
    finally:
        tmp_path.chmod(0o700)
    assert "\n" not in str(e.value) and not (tmp_path / "store").exists()


def test_the_manifest_comes_last(hf, tmp_path, monkeypatch):
    """When the manifest cannot be written, the folder is no store."""
    real = writer.write_atomically

    def write(path, data):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(writer, "write_atomically", write)
    with pytest.raises(ConversionError, match="no space"):
        convert(hf, tmp_path / "store", "q4")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="unfinished"):
        open_store(tmp_path / "store")
    files = json.loads((tmp_path / "store" / PROGRESS).read_text())["files"]
    assert len(files) == 4
    convert(hf, tmp_path / "store", "q4")
    open_store(tmp_path / "store").close()
