import os

import pytest

from npmix.benchmark import disk, disk_speed
from npmix.errors import InputError


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_is_read_whole(tmp_path, monkeypatch, direct):
    """Every byte is read once, the last piece short, with O_DIRECT or without."""
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(disk, "PIECE", 1 << 14)
    file = tmp_path / "f"
    file.write_bytes(bytes(100_001))
    read = []

    class Counting:
        def __init__(self, opened):
            self.opened, self.seek = opened, opened.seek

        def readinto(self, room):
            read.append(self.opened.readinto(room))
            return read[-1]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.opened.close()

    flags = disk._flags(file, 100_001)
    monkeypatch.setattr(disk, "_flags", lambda *_: flags)
    monkeypatch.setattr(disk, "open", lambda *words, **options: Counting(open(*words, **options)), raising=False)
    assert disk_speed(file) > 0 and sum(read) == 100_001


def test_a_temporary_file(tmp_path, monkeypatch):
    """Without a file one is written in the current folder, and goes away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "WRITTEN", disk.PIECE)
    assert disk_speed() > 0 and list(tmp_path.iterdir()) == []


def test_what_cannot_be_read(tmp_path, monkeypatch):
    """A missing file and one that fails in a thread are an OSError, an empty one an InputError."""
    with pytest.raises(OSError):
        disk_speed(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="is empty"):
        disk_speed(tmp_path / "empty")
    (tmp_path / "f").write_bytes(b"x")

    def failing(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "_flags", lambda *_: 0)
    monkeypatch.setattr(disk, "open", failing, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        disk_speed(tmp_path / "f")
