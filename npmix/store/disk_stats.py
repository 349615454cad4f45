"""Figures of weights read under a memory budget, and what the memory for them costs.

One hard fact: a wait's bytes are compared with the fastest stretch of the same run, so the share says how busy the disk was kept,
not how fast it is.
"""

from dataclasses import asdict, dataclass, replace


@dataclass
class DiskStats:
    """Figures of what was read. Bytes are of weights; times in seconds.

    bytes_read: from the start on. hits, misses: experts that were, or were not, in memory when the router chose them.
    missed_bytes: of the missed ones, and of those that were only there because of a right guess. guesses_right, guesses_wrong:
    experts read ahead for a layer that then did, or did not, want them. waited_s, waited_bytes: while computing stood
    still, and what was read meanwhile. rate: bytes a second of the fastest 256 MiB read without a pause. capacity,
    experts: how many experts the budget holds now, and how many there are.
    """

    bytes_read: int = 0
    hits: int = 0
    misses: int = 0
    missed_bytes: int = 0
    guesses_right: int = 0
    guesses_wrong: int = 0
    waited_s: float = 0.0
    waited_bytes: int = 0
    rate: float = 0.0
    capacity: int = 0
    experts: int = 0

    @property
    def share_of_rate(self) -> float:
        """Of the disk's rate, what was had while computing stood still; 0 if it never did."""
        return self.waited_bytes / self.waited_s / self.rate if self.waited_s and self.rate else 0.0

    def copy(self) -> "DiskStats":
        return replace(self)

    def since(self, before: "DiskStats", so_far: "DiskStats | None" = None) -> "DiskStats":
        """What came after an earlier copy, on top of what was so far; rate, capacity and experts as they are now."""
        new, so_far = self.copy(), so_far or DiskStats()
        for name in ("bytes_read", "hits", "misses", "missed_bytes", "guesses_right", "guesses_wrong", "waited_s", "waited_bytes"):
            setattr(new, name, getattr(self, name) - getattr(before, name) + getattr(so_far, name))
        return new

    def to_dict(self) -> dict:
        """All figures as plain JSON values."""
        return {**asdict(self), "share_of_rate": self.share_of_rate}


class MemoryPrice:
    """What touching memory for the first time costs: readers' processor time for it, above that for memory that was used before.

    A virtual machine may get each page from its host when it is first touched: 1 to 3 s a GB, which computing could have had.
    """

    def __init__(self):
        self._seconds, self._bytes = [0.0, 0.0], [0, 0]  # of used, of fresh memory

    def add(self, fresh: bool, seconds: float, nbytes: int) -> None:
        """Note the processor time of a read."""
        self._seconds[fresh] += seconds
        self._bytes[fresh] += nbytes

    def dear(self, rate: float) -> bool:
        """Whether a byte of it costs more time than reading one from a disk of that many bytes a second."""
        used, fresh = (seconds / nbytes if nbytes else 0.0 for seconds, nbytes in zip(self._seconds, self._bytes))
        return (fresh - used) * rate > 1
