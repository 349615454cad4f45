"""Writing a packed store: front to back, one file at a time, atomically.

One hard fact: a file gets its name only when it is whole and on the disk (temporary name, fsync,
rename), and the manifest comes last, so no interruption leaves anything that could be taken
for a finished store. Finished files are recorded, and the same conversion goes on after them.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from ..errors import ConversionError, StoreError
from .layout import LOCK, MANIFEST, PARTIAL, PROGRESS, TOKENIZER, FilePlan

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# what a conversion writes, and nothing else is ever removed
OURS = re.compile(r"((layer-\d{5}|rest)\.safetensors|tokenizer\.model|npmix\.json|npmix\.partial\.json)(\.partial)?|\.npmix\.lock")
PIECE = 8 << 20  # bytes of a file written at a time: file systems that cache files in large pages then have whole 2 MiB ones to map
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without flock say


def _problem(error: OSError, doing: str) -> ConversionError:
    if error.errno in NO_ROOM:
        return ConversionError(f"no space left while {doing}: free some, then run the same command again, it goes on where it stopped")
    return ConversionError(f"failed while {doing}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    """Make renames in the folder durable, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file under a temporary name, sync it, give it its name."""
    temporary = path.with_name(path.name + PARTIAL)
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


class FileLock:
    """An exclusive lock that dies with its process (where the system and the file system have flock).

    path: a file made for it and removed on release. problem: what the StoreError says when another process holds it.
    """

    def __init__(self, path: Path, problem: str):
        self.path = path
        while True:
            self._file = open(self.path, "a+b")
            try:
                if fcntl is not None:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno not in NO_LOCKS:
                    self._file.close()
                    if e.errno not in LOCKED:
                        raise
                    raise StoreError(problem) from None
            if self._is_there():
                return
            self._file.close()  # the former holder removed the file between our open and our lock

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and let the lock go."""
        if fcntl is not None:
            self.path.unlink(missing_ok=True)
        self._file.close()
        if fcntl is None:
            self.path.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


class FileWriter:
    """One safetensors file being written: `write` its tensors' bytes in the order of the plan."""

    def __init__(self, folder: Path, plan: FilePlan):
        self.plan, self._final = plan, folder / plan.name
        self._temporary = folder / (plan.name + PARTIAL)
        self._at = 0
        self._sha = hashlib.sha256()
        self._piece, self._filled = memoryview(bytearray(PIECE)), 0
        self._file = open(self._temporary, "wb", buffering=0)
        self.write(plan.header)

    def write(self, data) -> None:
        """Append bytes (or a C-contiguous array)."""
        data = memoryview(data).cast("B")
        self._sha.update(data)
        self._at += data.nbytes
        while data.nbytes:
            taken = min(data.nbytes, PIECE - self._filled)
            self._piece[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if self._filled == PIECE:
                self._flush()

    def _flush(self) -> None:
        left = self._piece[: self._filled]
        while left.nbytes:
            left = left[self._file.write(left) :]
        self._filled = 0

    def finish(self) -> dict:
        """Sync, rename; returns the manifest's entry."""
        if self._at != self.plan.nbytes:
            raise ConversionError(f"{self.plan.name}: {self._at} bytes were written, the plan says {self.plan.nbytes}")
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._final)
        _sync_folder(self._final.parent)
        return {"bytes": self._at, "sha256": self._sha.hexdigest()}

    def discard(self) -> None:
        """Remove what was written."""
        try:
            self._file.close()
        except OSError:  # it may tell of a late error of the disk; the file goes anyway
            pass
        self._temporary.unlink(missing_ok=True)


class StoreWriter:
    """A folder that becomes a store. Use as a context manager: it holds the folder's lock.

    finished: the files that an interrupted run of the same conversion has left whole.
    """

    def __init__(self, folder: Path, plan: list[FilePlan], digest: str, force: bool):
        self.folder, self.plan, self.digest = Path(folder), plan, digest
        self.finished: dict[str, dict] = {}
        self._made = False
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise ConversionError(f"{self.folder} is a file, expected a folder or nothing")
            self._refuse_occupied(force)
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            problem = f"another conversion is writing {self.folder}: wait for it or choose another folder"
            self._lock = FileLock(self.folder / LOCK, problem)
        except OSError as e:
            raise _problem(e, f"making {self.folder}") from None
        try:
            self._prepare(force)
        except OSError as e:
            self._lock.release()
            raise _problem(e, f"preparing {self.folder}") from None
        except (ConversionError, StoreError):
            self._lock.release()
            if self._made and not any(self.folder.iterdir()):
                self.folder.rmdir()
            raise

    def _refuse_occupied(self, force: bool) -> None:
        """Raise unless the folder is new, empty, ours to continue, or `force` is given."""
        if not self.folder.exists():
            return
        if (self.folder / "config.json").exists():
            raise ConversionError(f"{self.folder} holds a Hugging Face checkpoint: choose another folder")
        names = {p.name for p in self.folder.iterdir()} - {LOCK}
        if not names:
            return
        if force:
            if MANIFEST not in names and PROGRESS not in names:  # a tokenizer.model here would be the user's own
                raise ConversionError(f"{self.folder} is not empty and npmix did not make it: choose another folder")
            return
        unfinished = PROGRESS in names and MANIFEST not in names and all(OURS.fullmatch(name) for name in names)
        if not unfinished:
            what = "holds a finished store" if MANIFEST in names else "is not empty"
            raise ConversionError(f"{self.folder} {what}: choose another folder, or --force to replace what npmix wrote there")
        if self._progress().get("plan") != self.digest:
            raise ConversionError(
                f"{self.folder} holds an unfinished conversion of another source or with other settings: choose another folder, or --force"
            )

    def _progress(self) -> dict:
        """The progress file, or {} if it cannot be read."""
        try:
            found = json.loads((self.folder / PROGRESS).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}

    def _prepare(self, force: bool) -> None:
        """Under the lock: look again, check the space, and only then clear what is not ours to keep."""
        self._refuse_occupied(force)
        if not force:
            recorded = self._progress().get("files", {})
            for file in self.plan:
                entry, path = recorded.get(file.name), self.folder / file.name
                if isinstance(entry, dict) and path.exists() and path.stat().st_size == file.nbytes == entry.get("bytes"):
                    self.finished[file.name] = {"bytes": file.nbytes, "sha256": str(entry.get("sha256"))}
        keep = (LOCK, PROGRESS, MANIFEST, *self.finished)
        old = [path for path in self.folder.iterdir() if path.is_file() and OURS.fullmatch(path.name) and path.name not in keep]
        self._check_space(old)
        if (self.folder / MANIFEST).exists():  # first: from here on this is no store, but still known as ours
            os.replace(self.folder / MANIFEST, self.folder / PROGRESS)
        for path in old:
            path.unlink()
        self._record()

    def _check_space(self, old: list[Path]) -> None:
        """Raise unless the disk has room for what is still to be written once the `old` files are gone."""
        needed = sum(file.nbytes for file in self.plan if file.name not in self.finished) + (1 << 20)
        stats = [path.lstat() for path in old]
        free = shutil.disk_usage(self.folder).free + sum(stat.st_size for stat in stats if stat.st_nlink == 1)
        if free < needed:
            what = "free or taken by what would be replaced" if old else "free"
            raise ConversionError(
                f"{self.folder} needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB {what}: free some or choose another disk"
            )

    def _record(self) -> None:
        progress = {"plan": self.digest, "files": self.finished}
        write_atomically(self.folder / PROGRESS, json.dumps(progress, indent=1).encode())

    def write_file(self, plan: FilePlan, fill) -> None:
        """Write one file: `fill(file_writer)` writes its tensors in order."""
        try:
            file = FileWriter(self.folder, plan)
        except OSError as e:
            (self.folder / (plan.name + PARTIAL)).unlink(missing_ok=True)
            raise _problem(e, f"writing {self.folder / plan.name}") from None
        try:
            fill(file)
            self.finished[plan.name] = file.finish()
            self._record()
        except OSError as e:
            raise _problem(e, f"writing {self.folder / plan.name}") from None
        finally:
            file.discard()  # after `finish` there is nothing left to remove

    def finish(self, manifest: dict, tokenizer: Path | None) -> None:
        """Copy the tokenizer, then write the manifest: from here on the folder is a store."""
        try:
            files = dict(self.finished)
            if tokenizer is not None:
                data = tokenizer.read_bytes()
                write_atomically(self.folder / TOKENIZER, data)
                files[TOKENIZER] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            write_atomically(self.folder / MANIFEST, json.dumps({**manifest, "files": dict(sorted(files.items()))}, indent=1).encode())
            (self.folder / PROGRESS).unlink(missing_ok=True)
        except OSError as e:
            raise _problem(e, f"finishing {self.folder}") from None

    def abandon(self) -> None:
        """Remove everything this conversion wrote: it cannot be continued (bad weights)."""
        for path in list(self.folder.iterdir()):
            if path.is_file() and OURS.fullmatch(path.name) and path.name != LOCK:
                path.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lock.release()
        if self._made and not any(self.folder.iterdir()):
            self.folder.rmdir()
