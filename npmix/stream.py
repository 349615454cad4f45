"""Text as it is generated: one running generation, its figures, and whose turn it is at the engine.

One hard fact: there is one KV cache, so there is one generation at a time. A stream takes the model at its first
`next` and gives it back at its end, at `close()`, when the loop over it is left, or when it is garbage collected.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

from .errors import EngineError
from .sampling import Sampling, sample
from .store.disk_stats import DiskStats


@dataclass
class Stats:
    """Figures of one generation; complete when `stop_reason` is set. Times in seconds.

    stop_reason: "eos", "length" (max_tokens reached), "stop" (a stop string), "context" (the KV cache is full),
    "cancelled" (closed or interrupted), None while it runs. ids: all generated ids, the eos included.
    cached_tokens: prompt tokens that were in the KV cache already (sessions). first_token_s: from the first `next`
    to the first id, prefill included. decode_s: for all ids after the first. seed: None when greedy. disk: what was read
    meanwhile (`store.disk_stats.DiskStats`) under a memory budget.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    stop_reason: str | None = None
    seed: int | None = None
    ids: list[int] = field(default_factory=list)
    disk: DiskStats | None = None

    @property
    def generated_tokens(self) -> int:
        return len(self.ids)

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens that were computed, per second of prefill."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (len(self.ids) - 1) / self.decode_s if self.decode_s else 0.0

    def to_dict(self) -> dict:
        """All figures as plain JSON values."""
        return {
            **asdict(self),
            "disk": self.disk and self.disk.to_dict(),
            "generated_tokens": self.generated_tokens,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


class StopStrings:
    """Cuts a growing text where the first of some strings ends; holds back what may be the beginning of one."""

    def __init__(self, strings: tuple[str, ...]):
        self._strings = strings
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown now. Once `found`, nothing follows."""
        text = self.held + text
        ends = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:  # the one that is complete first; of two, the longer
            self.found, self.held = True, ""
            return text[: min(ends)[1]]
        keep = 0
        for s in self._strings:
            for size in range(min(len(s) - 1, len(text)), keep, -1):
                if s.startswith(text[len(text) - size :]):
                    keep = size
                    break
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self, text: str) -> str:
        """The last text and all that was held back."""
        text = self.push(text)
        held, self.held = self.held, ""
        return text + held


class Turns:
    """Whose turn it is at the one engine of a model.

    Streams of several threads queue; a second one in the thread that holds the model could only wait for itself,
    so it is an error. `running` is held during a call of the engine alone, so that close() waits for no more.
    """

    def __init__(self):
        self._turn = threading.Lock()
        self._running = threading.Lock()
        self._runner: int | None = None
        self._pid = os.getpid()
        self._mark: list[int] = []  # of who has the turn
        self.closed = False

    @property
    def holder(self) -> int | None:
        """The thread whose turn it is."""
        return next(iter(self._mark), None)

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that loaded the model."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """EngineError if the model cannot be used (any more)."""
        if self.closed:
            raise EngineError("the model is closed: load it again")
        if self.forked:
            raise EngineError("the model was loaded before a fork: load it again in this process")

    def check_free(self) -> None:
        """EngineError if a take() in this thread could only fail."""
        self.check()
        if self.holder == threading.get_ident():
            raise EngineError("another stream of this model is open in this thread: finish or close() it first")

    def take(self, mark: list[int]) -> None:
        """Wait for the turn. `mark`, an empty list, holds this thread's number from here to the `give` of any thread."""
        self.check_free()
        try:
            while not self._turn.acquire(timeout=0.2):
                self.check()
            mark.append(threading.get_ident())
            self._mark = mark
            self.check()
        except BaseException:  # an interrupt too
            self.give(mark)
            raise

    def hand_over(self, mark: list[int]) -> bool:
        """Make this thread the holder, if the turn is still the mark's."""
        try:
            mark[0] = threading.get_ident()
        except IndexError:
            return False
        return True

    def give(self, mark: list[int]) -> None:
        """Give the turn back if it is the mark's: of several threads that try at once, one does."""
        try:
            mark.pop()  # one step, which no other thread can come between
        except IndexError:
            return
        self._turn.release()

    @contextmanager
    def running(self):
        """Around a call of the engine. Only for who has the turn, and for close()."""
        if self._runner == threading.get_ident():
            raise EngineError("the model was called from inside its own progress callback")
        self.check()  # after a fork the lock may be held by a thread that does not exist
        with self._running:
            self.check()
            self._runner = threading.get_ident()
            try:
                yield
            finally:
                self._runner = None


@dataclass(frozen=True)
class Request:
    """What to generate. ids: the prompt. context: ids whose text comes before the answer's (for its first space)."""

    ids: list[int]
    context: list[int]
    sampling: Sampling
    seed: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    reuse: bool = False  # start from the part of the prompt that the KV cache holds
    on_progress: Callable | None = None


class Stream:
    """Pieces of generated text, as an iterator; made by `Model.stream`.

    `stats` fills as it runs. Leaving a `for` loop over it ends it (stop_reason "cancelled"); to take single pieces
    use `next` and `close`, or `with`. `held`: text kept back because it may be the beginning of a stop string;
    it can be read after an early end.
    """

    def __init__(self, model, request: Request):
        self._model = model
        self._request = request
        self._mark: list[int] = []  # not empty while it has the turn
        self._rng = random.Random(request.seed)  # random() of equal seeds is promised to stay equal by Python
        self._decoder = model.tokenizer.stream_decoder(request.context)
        self._stops = StopStrings(request.stop)
        self._seen: np.ndarray | None = None
        self._choices = min(model.tokenizer.vocab_size, model.config.vocab_size)  # spare ids are never chosen
        seed = request.seed if request.sampling.temperature > 0 else None
        self.stats = Stats(prompt_tokens=len(request.ids), seed=seed)

    @property
    def held(self) -> str:
        return self._stops.held

    @property
    def _open(self) -> bool:
        """Whether it has the turn."""
        return bool(self._mark)

    def __iter__(self):
        return _Loop(self)

    def __next__(self) -> str:
        try:
            while self.stats.stop_reason is None:
                piece = self._take(self._next_id())
                if piece:
                    return piece
        except BaseException:  # an interrupt too: the turn must not stay taken
            if self._open:
                self._end(self.stats.stop_reason or "cancelled")
            raise
        raise StopIteration

    def close(self) -> None:
        """End the generation if it runs and give the model back."""
        if self.stats.stop_reason is None:
            self._end("cancelled")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "_mark", None):
            self._end(self.stats.stop_reason or "cancelled")

    def _end(self, reason: str) -> None:
        self.stats.stop_reason = reason
        self._model.turns.give(self._mark)

    def _next_id(self) -> int | None:
        """Run the engine for one more id; None if another thread closed the stream meanwhile."""
        model, stats = self._model, self.stats
        start = time.perf_counter()
        if not self._open:
            model.turns.take(self._mark)
            if stats.stop_reason is not None:  # closed while it waited
                model.turns.give(self._mark)
                return None
        residency = model.engine.residency
        read_before = residency and residency.stats.copy()
        with model.turns.running():
            if not model.turns.hand_over(self._mark):  # a stream may be handed to another thread
                return None
            if not stats.ids:
                model.engine.load_kernels()  # the first run compiles: no prompt is to blame for that
                before = time.perf_counter()
                logits, stats.cached_tokens = model.feed(self._request.ids, self._request.reuse, self._request.on_progress)
                stats.prefill_s = time.perf_counter() - before
            else:
                logits = model.step(stats.ids[-1])
        if residency:
            stats.disk = residency.stats.since(read_before, stats.disk)
        id = self._choose(logits)
        elapsed = time.perf_counter() - start
        if stats.ids:
            stats.decode_s += elapsed
        else:
            stats.first_token_s = elapsed
        stats.ids.append(id)
        return id

    def _choose(self, logits: np.ndarray) -> int:
        sampling = self._request.sampling
        if sampling.repetition_penalty != 1:
            if self._seen is None:
                self._seen = np.zeros(self._choices, dtype=bool)
                self._seen[[id for id in self._request.ids if id < self._choices]] = True
            if self.stats.ids:
                self._seen[self.stats.ids[-1]] = True
        return sample(logits[: self._choices], sampling, self._rng.random(), self._seen)

    def _take(self, id: int | None) -> str:
        """The text that can be shown after this id; ends the stream where it ends."""
        if id is None:
            return ""
        request, stats = self._request, self.stats
        reason = None
        if id in self._model.config.eos_ids and not request.ignore_eos:
            reason, text = "eos", ""
        else:
            text = self._stops.push(self._decoder.push(id))
            if self._stops.found:
                reason = "stop"
            elif len(stats.ids) >= request.max_tokens:
                reason = "length"
            elif len(request.ids) + len(stats.ids) >= self._model.engine.context:
                reason = "context"
        if reason in ("eos", "length", "context"):
            text += self._stops.finish(self._decoder.finish())
        if reason:
            self._end("stop" if self._stops.found else reason)
        return text


class _Loop:
    """What a `for` loop over a stream holds: when the loop drops it, the stream ends, whoever else holds the stream."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __iter__(self):
        return self

    def __next__(self) -> str:
        return next(self._stream)

    def __del__(self):
        if self._stream._open:  # one that could not begin is left as it is
            self._stream.close()
