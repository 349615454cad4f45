"""The runs of bytes that a store's weights are read in: an expert, or what all tokens need of a file.

One hard fact: the layout puts an expert on pages of its own (`layout.py`), so a run never ends inside another one; this is checked.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import NpmixError, StoreError
from .layout import PAGE
from .paging import Copy, Mapped, PlannedFile


class Unit:
    """A run of bytes of one file that comes as a whole: an expert, or what all tokens need of a file."""

    def __init__(self, layer: int, expert: int, file: PlannedFile, start: int, end: int, head: int):
        self.layer, self.expert, self.file, self.start, self.nbytes = layer, expert, file, start, end - start
        self.head = head - start  # bytes that are enough for an expert's w_gate and w_up
        self.memory: Copy | Mapped | None = None
        self.asked = self.there = 0  # bytes from the start that are given to readers, and that are there
        self.kept = 0  # bytes of them read for a guess that was wrong
        self._apart: dict[int, int] = {}  # pieces that came before earlier ones
        self.flying = 0  # pieces being read
        self.pinned = self.expected = self.ahead = False  # ahead: read because of a guess
        self.error: NpmixError | None = None
        self.spoiled = False  # a piece failed that was begun before the expert was asked for

    @property
    def ready(self) -> bool:
        return self.there >= self.nbytes

    @property
    def unasked(self) -> bool:
        """Whether there is more of it to be asked for."""
        return self.asked < self.nbytes and not self.error and not self.spoiled

    def land(self, offset: int, nbytes: int) -> None:
        """A piece is there."""
        self._apart[offset] = nbytes
        while self.there in self._apart:
            self.there += self._apart.pop(self.there)

    def leave(self) -> None:
        """Nothing is there any more."""
        self.memory, self.asked, self.there, self.kept = None, 0, 0, 0
        self.ahead = self.spoiled = False
        self._apart.clear()


class Arrival(NamedTuple):
    """Experts of a layer that are there: their w_gate and w_up if `up`, their w_down if `down`. last: none comes after them."""

    experts: list[int]
    up: bool
    down: bool
    last: bool


def computable(left: list[Unit], begun: list[Unit], halves: bool) -> list[Unit]:
    """What can be computed with next: experts that are there, those begun or those not, else the first half of one."""
    there = [unit for unit in left if unit.ready]
    if there or not halves:
        return [unit for unit in there if (unit in begun) == (there[0] in begun)]
    return [unit for unit in left if unit.there >= unit.head and unit not in begun][:1]


@dataclass
class Units:
    """extents: tensor -> (file, first byte, bytes). files: open ones by name. shared: by file. experts: by (layer, expert)."""

    extents: dict[str, tuple[str, int, int]]
    files: dict[str, PlannedFile]
    shared: dict[str, Unit]
    experts: dict[tuple[int, int], Unit]

    def close(self) -> None:
        """Close the files; the memory is theirs who hold it."""
        for file in self.files.values():
            file.close()


def units_of(store) -> Units:
    """The units of a `Store`, its files open. StoreError for files whose weights lie in another order."""
    extents = {name: store.extent(name) for name in store.config.tensor_shapes()}
    runs: dict[tuple, list[tuple]] = {}  # (file, layer, expert), -1 for what is shared: beginnings, ends and names
    for name, (file, start, nbytes) in extents.items():
        parts = name.split(".")
        run = (file, int(parts[1]), int(parts[3])) if len(parts) == 5 else (file, -1, -1)
        runs.setdefault(run, []).append((start, start + nbytes, name))
    units = Units(extents, {}, {}, {})
    try:
        end, last = 0, ""
        for (file, layer, expert), tensors in sorted(runs.items(), key=lambda run: (run[0][0], min(run[1]))):
            tensors.sort()
            (start, _, _), (head, beyond, name) = tensors[0], tensors[-1]
            if file not in units.files:
                units.files[file] = PlannedFile(store.path / file)
            head = head if name.endswith(".w_down") else beyond
            unit = Unit(layer, expert, units.files[file], start // PAGE * PAGE, beyond, head)
            if file == last and unit.start < end:
                raise StoreError(f"{store.path / file}: an expert does not lie by itself, on pages of its own; convert again")
            end, last = beyond, file
            if layer < 0:
                units.shared[file] = unit
            else:
                units.experts[layer, expert] = unit
    except BaseException:
        units.close()
        raise
    units.experts = dict(sorted(units.experts.items()))
    return units
