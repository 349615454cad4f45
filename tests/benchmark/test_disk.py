import pytest

from npmix.benchmark import disk, disk_speed
from npmix.errors import InputError


def test_a_file_is_read_whole(tmp_path, monkeypatch):
    """Every byte is read once, the last piece short, and the figure is bytes a second of that."""
    monkeypatch.setattr(disk, "PIECE", 1000)
    file = tmp_path / "f"
    file.write_bytes(bytes(12_345))
    pieces = []
    take = disk._take
    monkeypatch.setattr(disk, "_take", lambda file, queue, failed: (pieces.append(queue.qsize()), take(file, queue, failed)))
    assert disk_speed(file) > 0 and max(pieces) == 13


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

    monkeypatch.setattr(disk, "open", failing, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        disk_speed(tmp_path / "f")
