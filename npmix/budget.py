"""How much memory this process may use, and how much it does: what `--ram` and `ram=` mean.

One hard fact: the page cache counts as free here, this process's mapped weights included, because the system gives it
up before it kills anybody; what cannot be given up is anonymous memory, shared memory and page tables.

Read from the system (Linux): MemAvailable of /proc/meminfo (Documentation/filesystems/proc.rst), and of every control
group from this process's own up to the root of what the container sees, version 1 (limit_in_bytes) or 2 (memory.max,
memory.high): limit - usage + file pages (Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst). All calls are
cheap enough to be made between tokens: 0.1 to 0.2 ms. Other systems tell only how much memory there is in all.
"""

import os
import re
import warnings
from functools import lru_cache
from pathlib import Path

from .errors import InputError

PROC = Path("/proc")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(?:I?B)?", re.ASCII)
LEAST_MARGIN = 128 << 20
# Left free under a budget, for what is not seen from inside: pages that were cached when libraries and Python files were read, 140 MiB when
# they were cold (a control group counts them); pieces on their way; the heap as it grows
SPARE = 160 << 20
UNLIMITED = 1 << 60  # what a group without a limit says in version 1 lies above
KINDS = {  # file names of a group: limits, usage, fields of memory.stat that count file pages, children included
    "memory": (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    "": (("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
}


def parse(ram) -> int | float | str:
    """What a person or program gave: bytes (int), a share of the memory there is (float, 0 < x <= 1), or "auto".

    Text: "8G", "8GiB" (K, M, G, T are powers of 1,024), "1.5G", "0.5", "auto". A bare number up to 1 is a share, above
    it bytes. Raises InputError for anything else.
    """
    given = ram
    if isinstance(ram, str):
        text = ram.strip().upper()
        if text == "AUTO":
            return "auto"
        found = SIZE.fullmatch(text)
        if found:
            number, unit = float(found[1]), found[2]
            if unit or number > 1:
                ram = int(number * UNITS[unit])
            elif text == found[1]:  # no share in "0.5B"
                ram = number
    elif type(ram) is float and ram > 1 and ram.is_integer():
        ram = int(ram)
    elif type(ram) is int and ram == 1:
        ram = 1.0
    if (type(ram) is int and 1 < ram < UNLIMITED) or (type(ram) is float and 0 < ram <= 1):
        return ram
    raise InputError(f'ram is {str(given)[:40]!r}, expected a size such as "8G", a share of the memory from 0 to 1 such as 0.5, or "auto"')


def in_bytes(ram) -> int:
    """What `parse` takes, in bytes: "auto" is `permitted()` now, a share is of `total()`. InputError where the system tells neither."""
    ram = parse(ram)
    if isinstance(ram, int):
        return ram
    if total() == UNLIMITED:
        raise InputError('this system does not say how much memory it has: give a size, such as "8G"')
    return permitted() if ram == "auto" else int(ram * total())


def allowance(ram) -> int:
    """Bytes that this whole process may use, of all kinds, mapped weights and libraries included.

    ram: as `parse` takes it, "auto": `permitted()` now. More than `total()` is refused; more than what is permitted now is
    cut to that, with a warning. Raises InputError.
    """
    wanted, now, whole = in_bytes(ram), permitted(), total()
    if wanted > whole:
        raise InputError(f"ram is {_gib(wanted)}, this machine or its control group has {_gib(whole)}: give less, or auto")
    if wanted > now and parse(ram) != "auto":
        warnings.warn(f"of the {_gib(wanted)} of memory asked for only {_gib(now)} can be had now: going on with that", stacklevel=2)
    return min(wanted, now)


def permitted() -> int:
    """Bytes that this whole process may have now, weights and libraries included, without coming near the out-of-memory killer.

    What it holds for good, and what is available, less a margin of a thirty-second of the memory there is, at least
    128 MiB. Poll it to give way to other programs.
    """
    whole, free = _memory()
    return max(0, _held(_status()) + free - margin(whole))


def margin(whole: int) -> int:
    """Bytes left alone of a machine or control group that has `whole`."""
    return max(LEAST_MARGIN, whole // 32)


def total() -> int:
    """Bytes this process could ever have: the machine's memory or the least limit of its control groups."""
    return _memory()[0]


def available() -> int:
    """Bytes that can still be taken now: of the machine, and of every control group around this process; at least 0."""
    return _memory()[1]


def own(mapped: int = 0) -> int:
    """Bytes this process has now: anonymous and shared memory, page tables, and the pages of files it has mapped.

    mapped: bytes of mapped weights in memory, which are not counted, so that libraries remain. Where the system does not
    tell (no Linux), its peak.
    """
    status = _status()
    return _held(status) + max(0, status.get("RssFile", 0) - mapped)


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def _read(path) -> str:
    """A small file's text; nothing if it cannot be read. By descriptor: half the time of a file object."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            parts = []
            while part := os.read(file, 1 << 16):  # the kernel gives some files a page at a time
                parts.append(part)
            return b"".join(parts).decode("ascii", "replace")
        finally:
            os.close(file)
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _fields(path: Path, wanted) -> dict[str, int]:
    """Bytes of the wanted fields of a file in the style of /proc/meminfo ("MemTotal:  8 kB") or memory.stat ("cache 8")."""
    found = {}
    for line in _read(path).splitlines():
        name, *words = line.replace(":", " ").split()[:3] or [""]
        if name in wanted and words and words[0].isdecimal():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _memory() -> tuple[int, int]:
    """(`total`, `available`)"""
    whole, free = _machine()
    for folder, kind in _groups(_read(PROC / "self" / "cgroup")):
        limits, usage, pages = KINDS[kind]
        limits = [limit for limit in (_number(folder / name) for name in limits) if limit is not None and limit < UNLIMITED]
        used = _number(folder / usage) if limits else None
        if used is not None:
            whole = min(whole, *limits)
            free = min(free, min(limits) - used + sum(_fields(folder / "memory.stat", pages).values()))
    return whole, max(0, free)


def _machine() -> tuple[int, int]:
    """(bytes of memory, bytes available now) without regard to control groups; UNLIMITED if nobody says"""
    found = _fields(PROC / "meminfo", ("MemTotal", "MemAvailable"))
    if len(found) == 2:
        return found["MemTotal"], found["MemAvailable"]
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return UNLIMITED, UNLIMITED
    return whole, whole * 3 // 4


def _status() -> dict[str, int]:
    found = _fields(PROC / "self" / "status", ("RssAnon", "RssShmem", "RssFile", "VmPTE"))
    if found or os.name != "posix":
        return found
    import resource
    import sys

    return {"RssAnon": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


def _held(status: dict[str, int]) -> int:
    """Of what the process has, that which the system cannot take back."""
    return sum(status.get(name, 0) for name in ("RssAnon", "RssShmem", "VmPTE"))


@lru_cache(maxsize=4)
def _groups(text: str) -> tuple[tuple[Path, str], ...]:
    """(folder, kind) of the control groups around this process, the innermost first. text: /proc/self/cgroup.

    A line is "id:controllers:/path"; in version 2 the controllers are empty. Where the path lies below what the mount
    shows (field 4 of /proc/self/mountinfo, "root"), the folder is the rest of it below the mount point.
    """
    found = []
    for line in text.splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        kind = "memory" if "memory" in controllers.split(",") else ""
        if controllers and not kind:
            continue
        for root, point in _mounts(kind):
            inside = path == root or path.startswith(root.rstrip("/") + "/")
            rest = [part for part in path[len(root) :].split("/") if part] if inside and ".." not in path.split("/") else []
            folders = [Path(point, *rest[:depth]) for depth in range(len(rest), -1, -1)]
            found += [(folder, kind) for folder in folders if (folder / KINDS[kind][1]).exists()]
    return tuple(found)


def _mounts(kind: str) -> list[tuple[str, str]]:
    """(root, mount point) of the file systems that show control groups with memory limits."""
    found = []
    for line in _read(PROC / "self" / "mountinfo").splitlines():
        first, _, second = line.partition(" - ")
        words, types = first.split(), second.split()
        if len(words) < 5 or not types:
            continue
        version_1 = types[0] == "cgroup" and "memory" in types[-1].split(",")
        if version_1 if kind else types[0] == "cgroup2":
            found.append((_unescaped(words[3]), _unescaped(words[4])))
    return found


def _unescaped(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
