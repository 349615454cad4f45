"""A memory control group (version 1 or 2) for one program: a limit that counts its page cache too, the most it took, and a slower disk.

One hard fact: a page of a file is charged to the group that brought it into memory, so files must be out of the cache before a
program starts in its group, or it has them for nothing. Documentation/admin-guide/cgroup-v1/memory.rst, blkio-controller.rst, cgroup-v2.rst.
"""

import contextlib
import os
import re
import time
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
FILES = {  # version -> limit, most taken, and what forbids swap
    1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.memsw.limit_in_bytes"),
    2: ("memory.max", "memory.peak", "memory.swap.max"),
}


class NoGroup(RuntimeError):
    """Memory control groups cannot be made here; the text says why."""


def find_mount(controller: str = "memory") -> tuple[int, Path]:
    """(version, folder) of the mounted control groups for memory, or of another controller by its name in version 1."""
    found, newer = {}, {"blkio": "io"}.get(controller, controller)
    for line in MOUNTS.read_text().splitlines() if MOUNTS.exists() else []:
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup" and controller in options.split(","):
            found[1] = Path(point)
        if kind == "cgroup2" and newer in (Path(point) / "cgroup.controllers").read_text().split():
            found[2] = Path(point)
    if not found:
        raise NoGroup(f"no {controller} control groups are mounted here (cgroup v1 or v2)")
    return min(found.items())


def disk_of(path: Path) -> str:
    """ "major:minor" of the whole disk that a file lies on."""
    device = path.stat().st_dev
    found = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if not found.exists():
        raise NoGroup(f"{path} lies on no disk of its own whose speed could be held")
    return ((found.parent if (found / "partition").exists() else found) / "dev").read_text().strip()


class MemoryGroup:
    """A group with a limit; a program is started in it by `prefix`. A context manager: the group is removed at the end.

    disk: (`disk_of` a file, bytes that may be read from there a second), or None for as many as the disk gives.
    """

    def __init__(self, name: str, limit: int, disk: tuple[str, int] | None = None):
        self.version, root = find_mount()
        self.limit, self.path = limit, root / f"{name}-{os.getpid()}"
        self.slow: Path | None = None  # version 1 has a group of its own for disks
        if disk and self.version == 1:
            version, mount = find_mount("blkio")
            if version != 1:
                raise NoGroup("memory is controlled by cgroup v1 here and disks by v2: the disk cannot be held")
            self.slow = mount / self.path.name
        bound, self._most, swap = FILES[self.version]
        try:
            if self.version == 2:
                control = root / "cgroup.subtree_control"
                if "memory" not in control.read_text().split():
                    control.write_text("+memory")
            self.path.mkdir()
            (self.path / bound).write_text(str(limit))
            if disk and self.slow:
                self.slow.mkdir()
                (self.slow / "blkio.throttle.read_bps_device").write_text("{} {}".format(*disk))
            elif disk:
                (root / "cgroup.subtree_control").write_text("+io")
                (self.path / "io.max").write_text("{} rbps={}".format(*disk))
        except OSError as error:
            self.close()
            raise NoGroup(
                f"a memory control group cannot be made in {root} ({error.strerror}): it takes root on the machine itself"
            ) from None
        with contextlib.suppress(OSError):  # a kernel that counts no swap
            (self.path / swap).write_text(str(limit) if self.version == 1 else "0")

    @property
    def prefix(self) -> list[str]:
        """Words before a command, so that it runs in the group from its first page on."""
        return [
            "sh",
            "-c",
            'echo $$ > "$0/cgroup.procs" && echo $$ > "$1/cgroup.procs" && shift && exec "$@"',
            str(self.path),
            str(self.slow or self.path),
        ]

    def peak(self) -> int:
        """The most bytes it took so far, page cache included; 0 where version 2 is too old to tell."""
        try:
            return int((self.path / self._most).read_text())
        except OSError:
            return 0

    def killed(self) -> int:
        """How many of its processes the out-of-memory killer ended."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        found = re.search(r"^oom_kill (\d+)", (self.path / name).read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    def close(self) -> None:
        """Remove it; its processes have ended."""
        for path in (self.path, self.slow) if self.slow else (self.path,):
            for _ in range(50):
                try:
                    path.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:  # the last process is still going
                    time.sleep(0.1)
                    continue
                break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
