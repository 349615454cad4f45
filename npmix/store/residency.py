"""Which experts are in memory: a store's weights under a budget, read by threads of their own.

One hard fact: what counts is that the disk is never idle while an expert is missing, and that a read that is needed never waits
for more of a guess than the pieces under way.

An expert is one run of bytes of its layer's file and comes and goes whole. What all tokens need (attention, routers,
embeddings, output) is read first and stays. When a layer's router has chosen, `arrive` gives its experts as they come;
behind them, in this order, the disk reads what the next layers' routers would choose (Eliseev & Mazur 2023, arXiv
2312.17238) and, while there is memory that nobody has used, experts in the order of the layers. Long prompts use the memory of
layers behind again where touching new memory is dear.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable

from ..errors import EngineError, NpmixError, StoreError
from ..quant.tensor import Tensor
from .disk_stats import DiskStats, MemoryPrice
from .eviction import Eviction
from .layout import PAGE
from .paging import BEHIND, PIECE, Copy, Mapped
from .units import Arrival, Unit, computable, units_of

READERS = 4
STRETCH = 256 << 20  # bytes over which the disk's rate is measured
WATCH_S = 0.5  # how often the memory that may be used is looked up


class Residency:
    """A store's weights under a budget; stands in for the store where weights are asked for (`config`, `tensor`).

    load: "read" copies into memory of our own, "map" uses the pages of the store's maps. guessing: read ahead what the
    next layers' routers would choose.
    """

    def __init__(self, store, load: str = "read", guessing: bool = True, clock=time.monotonic):
        self.store, self.config, self.load, self.guessing = store, store.config, load, guessing
        self.stats = DiskStats()
        self.on_wait: Callable | None = None  # called with the stats some ten times a second while computing stands still
        self.affordable: Callable[[], int] | None = None  # experts that the budget holds now
        self.placed: Callable[[int, int, int], None] = lambda layer, expert, address: None  # an expert gets memory (or has none: 0)
        self._clock, self._pid = clock, os.getpid()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._stopped = self._whole = self._guess = False
        self._units = units_of(store)
        self._shared, self._experts = self._units.shared, self._units.experts
        self.stats.experts = len(self._experts)
        self._largest = max(unit.nbytes for unit in self._experts.values())
        self._wanted: list[Unit] = []
        self._guessed: list[Unit] = []
        self._free: list[Copy] = []
        self._filling: Unit | None = None  # what is read because there is memory that nobody has used
        self._held = self._ready = self._flying = self._calls = 0
        self.passing = False  # a long prompt: all experts of a layer are wanted, once, and those behind not soon again
        self._price = MemoryPrice()
        self._stretch = 0.0, 0  # when it began, bytes read at that time
        self._watched = -1e9
        self._eviction = Eviction(self.config, self._experts)

    @property
    def shared_bytes(self) -> int:
        """Bytes of what stays."""
        return sum(unit.nbytes for unit in self._shared.values())

    @property
    def expert_bytes(self) -> int:
        """Memory that an expert takes, page tables and what the kernel reads past a range of a map counted."""
        largest = -(-self._largest // PAGE) * PAGE
        return largest + largest // 256 + (BEHIND if self.load == "map" else 0)

    def tensor(self, name: str) -> Tensor:
        """The store's tensor; one that all tokens need lies where it is read to by `begin`, an expert's where the map has it."""
        tensor = self.store.tensor(name)
        if name == "output" and self.config.tied_embeddings:
            name = "tok_embeddings"
        file, start, nbytes = self._units.extents[name]
        if self.load == "map" or name.endswith("norm") or ".experts." in name:
            return tensor
        unit = self._shared[file]
        unit.memory = unit.memory or Copy(unit.nbytes)
        data = unit.memory.bytes[start - unit.start : start - unit.start + nbytes]
        return Tensor(data.view(tensor.data.dtype).reshape(tensor.data.shape), tensor.format, tensor.shape, tensor.group)

    def begin(self) -> None:
        """Read what all tokens need. Call when all shared tensors have been asked for."""
        for file in self._units.files.values():
            file.forget()  # headers brought more than themselves
        units = list(self._shared.values())
        with self._changed:
            for unit in units:
                unit.pinned, unit.memory = True, unit.memory or self._memory(unit)
            self._wanted = units
            self._start()
        self._wait(units, lambda: units if all(unit.ready for unit in units) else [])
        self.stats.waited_s, self.stats.waited_bytes = 0.0, 0

    def _start(self) -> None:
        for i in range(READERS):
            thread = threading.Thread(target=self._serve, name=f"npmix-read-{i}", daemon=True)
            thread.start()
            self._threads.append(thread)

    # ---- what computing asks for ------------------------------------------------------------

    @contextlib.contextmanager
    def whole(self):
        """Within this block all experts stay; gives whether all are there."""
        self._watch()
        with self._changed:
            if self._held > self.stats.capacity:
                self.resize(self.stats.capacity)
            self._whole = self._ready == len(self._experts)
            whole = self._whole
        try:
            if whole:
                self.check()
            yield whole
        finally:
            with self._changed:
                self._whole = False

    def check(self) -> None:
        """StoreError if a mapped file is not what it was: computing on it could kill the process, or be wrong."""
        if self.load == "map":
            for file in self._units.files.values():
                file.check()

    def arrive(self, layer: int, experts: list[int], guesses: list[tuple[int, int]], halves: bool = False):
        """The experts of a layer as they come. Each must have been computed with when the next are asked for.

        guesses: (layer, expert) of later layers, the most urgent first. halves: w_gate and w_up may come before w_down.
        Raises StoreError when one cannot be read; a later call tries again.
        """
        self._watch()
        units = [self._experts[layer, expert] for expert in experts]
        with self._changed:  # what is under way of a read that failed comes first
            self._changed.wait_for(lambda: self._stopped or not any(unit.error and unit.flying for unit in units))
            self._plan(layer, units, guesses)
        left, begun = units, []
        try:
            while left:
                some = self._wait(left, lambda: computable(left, begun, halves))[: max(1, self.stats.capacity // 4)]
                self.check()
                up, down = some[0] not in begun, some[0].ready
                begun += some
                if down:
                    left = [unit for unit in left if unit not in some]
                yield Arrival([unit.expert for unit in some], up, down, not left)
                if down:
                    self._unpin(some)
        finally:
            self._unpin(units)

    def expect(self, experts: list[tuple[int, int]], guess: bool = False) -> None:
        """Read these (layer, expert) ahead. guess: they may be the wrong ones, which the statistics will say."""
        with self._changed:
            self._guess = guess
            for unit in self._guessed:
                unit.expected = False
            self._guessed = [self._experts[pair] for pair in experts]
            for unit in self._guessed:
                unit.expected = True
            self._changed.notify_all()

    def full(self) -> bool:
        """Whether the readers are done: as many experts as the memory holds are there, and nothing is asked for."""
        with self._changed:
            return self._stopped or not self._flying and self._to_fill() is None

    def _plan(self, layer: int, units: list[Unit], guesses: list[tuple[int, int]]) -> None:
        stats = self.stats
        self._calls += 1
        self._eviction.note(layer, units)
        for expert in range(self.config.n_experts):
            unit = self._experts[layer, expert]
            chosen = unit in units
            if chosen and (unit.ahead or not unit.ready):
                stats.missed_bytes += unit.nbytes - unit.kept
            if unit.ahead:
                stats.guesses_right += chosen
                stats.guesses_wrong += not chosen
                unit.ahead, unit.kept = False, unit.asked
        for unit in units:
            unit.pinned, unit.error = True, None
            stats.hits += unit.ready
            stats.misses += not unit.ready
        self._wanted = sorted((unit for unit in units if not unit.ready), key=lambda unit: unit.memory is None)  # begun ones first
        self.expect(guesses if self.guessing else [], True)

    def _wait(self, units: list[Unit], here: Callable[[], list[Unit]]) -> list[Unit]:
        """What is `here` as soon as something is; the units are being waited for."""
        started, before = None, self.stats.bytes_read
        try:
            while True:
                with self._changed:
                    some = here()
                    failed = next((unit.error for unit in units if unit.error), None)
                    if failed:
                        raise failed
                    if some:
                        return some
                    if self._stopped:
                        raise EngineError("the model was closed while it waited for the disk")
                    started = self._clock() if started is None else started
                    self._changed.wait(0.1)
                if self.on_wait:
                    self.on_wait(self.stats)
        finally:
            if started is not None:
                self.stats.waited_s += self._clock() - started
                self.stats.waited_bytes += self.stats.bytes_read - before

    def _unpin(self, units: list[Unit]) -> None:
        with self._changed:
            for unit in units:
                unit.pinned = False
            self._wanted = [unit for unit in self._wanted if unit.pinned]
            self._changed.notify_all()

    # ---- the readers ----------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (piece := self._next()) is None:
                    if not self._changed.wait(WATCH_S) and not self._stopped:
                        self._watch()
                if self._stopped:
                    return
                (unit, offset, nbytes), call = piece, self._calls
            error, fresh, began = None, unit.memory.fresh, time.thread_time()
            try:
                unit.memory.fetch(unit.file, unit.start, offset, nbytes)
            except NpmixError as failure:
                error = failure
            except (OSError, MemoryError) as failure:
                error = StoreError(f"cannot read {unit.file.path}: {failure}")
            with self._changed:
                self._price.add(fresh, time.thread_time() - began, nbytes)
                self._landed(unit, offset, nbytes, error, call)

    def _next(self) -> tuple[Unit, int, int] | None:
        """The most urgent piece: (unit, offset, bytes)."""
        for unit in self._wanted:
            if unit.unasked:
                return self._piece(unit) if unit.memory or self._room(False) and self._give(unit) else None
        for unit in self._guessed:
            if unit.unasked:
                if unit.memory or self._room(True) and self._give(unit):
                    unit.ahead = self._guess
                    return self._piece(unit)
        self._filling = unit = self._to_fill()
        return self._piece(unit) if unit and (unit.memory or self._give(unit)) else None

    def _to_fill(self) -> Unit | None:
        """What to read where nothing is asked for: experts in the order of the layers, one after the other, while there is memory."""
        unit, room = self._filling, self._held < self.stats.capacity and not self._spares_memory()
        if unit and unit.memory and unit.unasked:
            return unit
        all_fit = self.stats.capacity == len(self._experts) > self._ready  # then what a guess began is wanted too
        for unit in self._experts.values() if room or all_fit else ():
            if unit.unasked and (all_fit or not unit.memory):
                return unit
        return None

    def _piece(self, unit: Unit) -> tuple[Unit, int, int]:
        offset, nbytes = unit.asked, min(PIECE, unit.nbytes - unit.asked)
        unit.asked += nbytes
        unit.flying += 1
        if self._flying == 0:
            self._stretch = self._clock(), self.stats.bytes_read
        self._flying += 1
        return unit, offset, nbytes

    def _landed(self, unit: Unit, offset: int, nbytes: int, error: NpmixError | None, call: int) -> None:
        unit.flying -= 1
        self._flying -= 1
        if error and unit.pinned and call != self._calls:
            unit.spoiled = True  # begun before it was asked for: read again, the disk may be well by now
        else:
            unit.error = unit.error or error
        if unit.error or unit.spoiled:
            if unit.flying == 0 and unit.layer >= 0:
                self._evict(unit)
        else:
            unit.land(offset, nbytes)
            self.stats.bytes_read += nbytes
            self._measure()
            if unit.ready and unit.layer >= 0:
                self._ready += 1
                self._forget_behind(unit)
        if unit.error or unit.flying == 0 or unit.there >= unit.head:  # else nobody can go on: a thousand wakes a second
            self._changed.notify_all()

    def _measure(self) -> None:
        start, before = self._stretch
        seconds, nbytes = self._clock() - start, self.stats.bytes_read - before
        if seconds > 0 and nbytes >= STRETCH:
            self.stats.rate = max(self.stats.rate, nbytes / seconds)
            self._stretch = self._clock(), self.stats.bytes_read

    # ---- memory -----------------------------------------------------------------------------------

    def _memory(self, unit: Unit) -> Copy | Mapped:
        if self.load == "map":
            return Mapped(self.store.range(unit.file.path.name, unit.start, unit.nbytes))
        if unit.layer < 0:
            return Copy(unit.nbytes)
        return self._free.pop() if self._free else Copy(self._largest)

    def _give(self, unit: Unit) -> bool:
        try:
            unit.memory = self._memory(unit)
        except (OSError, MemoryError):  # the system has no more: go on with what there is
            self.stats.capacity = max(1, self._held)
            return False
        self._held += 1
        self.placed(unit.layer, unit.expert, unit.memory.address)
        return True

    def _spares_memory(self) -> bool:
        """Whether to use what was used rather than more of it: in a long prompt, if touching new memory takes longer than reading again."""
        return self.passing and self.stats.capacity < len(self._experts) and self._price.dear(self.stats.rate)

    def _room(self, guess: bool) -> bool:
        """Whether there is memory for one more expert, after one has gone if need be."""
        full, spares = self._held >= self.stats.capacity, self._spares_memory()
        victim = self._victim(guess or not full) if full or spares else None
        if victim:
            self._evict(victim)
        enough = guess and spares and self._held >= self.config.n_experts * 3 // 2  # a layer's experts and half of the next one's
        return victim is not None or not full and not enough

    def _victim(self, keep_expected: bool) -> Unit | None:
        return None if self._whole else self._eviction.victim(keep_expected, self.passing)

    def _evict(self, unit: Unit) -> None:
        whole, memory = unit.ready, unit.memory
        self._ready -= whole
        self._held -= 1
        self.placed(unit.layer, unit.expert, 0)
        unit.leave()
        if isinstance(memory, Mapped):
            memory.release(unit.file, unit.start, unit.nbytes)
        elif self._held < self.stats.capacity:
            memory.fresh = memory.fresh and not whole
            self._free.append(memory)

    def _forget_behind(self, unit: Unit) -> None:
        """Let go of what the kernel read past the end of a mapped range."""
        follower = self._experts.get((unit.layer, unit.expert + 1))
        if self.load == "map" and (follower is None or follower.memory is None):
            end = -(-(unit.start + unit.nbytes) // PAGE) * PAGE
            unit.file.forget(end, 2 * BEHIND)

    def _watch(self) -> None:
        """Every now and then: give way to other programs, or take back what they gave."""
        now = self._clock()
        if self.affordable is not None and now - self._watched >= WATCH_S:
            self._watched = now
            self.resize(self.affordable())

    def resize(self, capacity: int) -> None:
        """Hold at most this many experts, at least one, from now on."""
        with self._changed:
            self.stats.capacity = max(1, min(capacity, len(self._experts)))
            while self._held > self.stats.capacity and (victim := self._victim(False)):
                self._evict(victim)
            self._free = self._free[: max(0, self.stats.capacity - self._held)]
            self._changed.notify_all()

    def close(self) -> None:
        """End the readers, give the memory back, close the files. The store stays open."""
        if os.getpid() != self._pid:  # a forked child has no readers, and the lock may be held by one
            return
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(5.0)
        if any(thread.is_alive() for thread in self._threads):  # a disk that does not answer: what it writes to must live on
            return
        for unit in [*self._shared.values(), *self._experts.values()]:
            unit.memory = None
        self._free = []
        self._units.close()
