"""The runs of bytes that a store's weights are read in: an expert, or what all tokens need of a file.

One hard fact: the layout puts an expert on pages of its own (`layout.py`), so a run never ends inside another one; this is checked.
"""

from dataclasses import dataclass

from ..errors import NpmixError, StoreError
from .layout import PAGE
from .paging import Copy, Mapped, PlannedFile


class Unit:
    """A run of bytes of one file that comes as a whole: an expert, or what all tokens need of a file."""

    def __init__(self, layer: int, expert: int, file: PlannedFile, start: int, end: int):
        self.layer, self.expert, self.file, self.start, self.nbytes = layer, expert, file, start, end - start
        self.memory: Copy | Mapped | None = None
        self.asked = self.landed = 0  # bytes of the pieces given to readers, and of those that are there
        self.flying = 0  # pieces being read
        self.pinned = self.expected = self.ahead = False  # ahead: read because of a guess
        self.error: NpmixError | None = None

    @property
    def ready(self) -> bool:
        return self.landed >= self.nbytes


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
    runs: dict[tuple, list[int]] = {}  # (file, layer, expert), -1 for what is shared: beginnings and ends
    for name, (file, start, nbytes) in extents.items():
        parts = name.split(".")
        runs.setdefault((file, int(parts[1]), int(parts[3])) if len(parts) == 5 else (file, -1, -1), []).extend((start, start + nbytes))
    units = Units(extents, {}, {}, {})
    try:
        end, last = 0, ""
        for (file, layer, expert), ends in sorted(runs.items(), key=lambda run: (run[0][0], min(run[1]))):
            if file not in units.files:
                units.files[file] = PlannedFile(store.path / file)
            unit = Unit(layer, expert, units.files[file], min(ends) // PAGE * PAGE, max(ends))
            if file == last and unit.start < end:
                raise StoreError(f"{store.path / file}: an expert does not lie by itself, on pages of its own; convert again")
            end, last = max(ends), file
            if layer < 0:
                units.shared[file] = unit
            else:
                units.experts[layer, expert] = unit
    except BaseException:
        units.close()
        raise
    units.experts = dict(sorted(units.experts.items()))
    return units
