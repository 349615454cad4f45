"""The engine: opens a model, owns its memory and threads, and knows token ids only.

One hard fact: one engine runs one sequence at a time, in whichever thread calls it; who may call when is
decided above it (`generate.py`). After a fork its threads are gone, so a child is told so.
"""

import contextlib
import os
import threading
import time
import warnings

import numpy as np

from .budgeted import open_forward
from .config import Config
from .errors import ContextError, EngineError, InputError
from .model.forward import Forward
from .model.kv_cache import DTYPES, position_bytes
from .model.weights import Weights
from .store import open_source
from .threads import default_threads

DEFAULT_CONTEXT = 4096
DEFAULT_CHUNK = 512
MAX_THREADS = 1024
MAX_CHUNK = 1 << 16


class Engine:
    """One model and one sequence of tokens.

    path: a packed store or a Hugging Face folder. threads: default the physical cores this process may use.
    context: positions of the KV cache, default the smaller of the model's maximum and 4,096. chunk: tokens of a
    prefill step. kv: "f16", "f32" or "q8" (8 bits). ram: memory for the whole process ("8G", bytes, a share of what
    the machine has, "auto"), for a packed store; experts that do not fit are read when they are wanted. load: "map" uses
    the pages of the mapped files, "read" copies (the default with `ram`), so that nothing that happens to the files
    later can matter. guess: read ahead what the next layers will want. Raises NpmixError subclasses for whatever is
    wrong with them.
    """

    def __init__(self, path, *, threads: int | None = None, context: int | None = None, chunk: int | None = None, kv: str = "f16",
                 ram=None, load: str | None = None, guess: bool = True):  # fmt: skip
        self.source = open_source(path)
        try:
            self.config: Config = self.source.config
            largest = self.config.max_positions
            self.threads = default_threads() if threads is None else _whole("threads", threads, MAX_THREADS)
            self.context = min(largest, DEFAULT_CONTEXT) if context is None else _whole("context", context, largest, "the model's maximum")
            self.chunk = min(DEFAULT_CHUNK if chunk is None else _whole("chunk", chunk, MAX_CHUNK), self.context)
            if not isinstance(kv, str) or kv not in DTYPES:
                raise InputError(f"kv is {kv!r}, expected one of {', '.join(DTYPES)}")
            self.kv = kv
            if ram is None and load in (None, "map"):
                self._forward = Forward(Weights(self.source), self.context, self.chunk, kv, self.threads)
            else:
                longest = self.context if chunk is None else self.chunk
                options = self.context, self.chunk, longest, kv, self.threads
                self._forward = open_forward(self.source, ram, load, guess, *options)
                self.chunk = self._forward.chunk
        except MemoryError as error:
            self.source.close()
            raise EngineError(f"not enough memory for a context of {self.context}: {error}; choose a smaller one") from None
        except BaseException:
            self.source.close()
            raise
        self._busy, self._worker = threading.Lock(), None
        self.position = 0
        self._written = 0  # positions cached since it was empty; an interrupted prefill leaves some behind `position`
        self._warned = False
        self._pid = os.getpid()
        self._closed = False

    @contextlib.contextmanager
    def _at_work(self):
        """One call at a time: a second one, from whichever thread, is an error and not a wait (`Model` queues)."""
        self._usable()
        if not self._busy.acquire(blocking=False):
            raise EngineError("the engine is at work in another call; use one engine a thread, or npmix.Model, which queues")
        try:
            self._worker = threading.get_ident()
            self._usable()
            yield
        finally:
            self._worker = None
            self._busy.release()

    def load_kernels(self) -> None:
        """Compile the kernels, or load them from the disk cache, so that the first token does not wait for them."""
        with self._at_work():
            self._forward.load_kernels()

    def load_experts(self) -> None:
        """Read as many experts as a memory budget holds, so that the first tokens do not wait for them; without a budget nothing."""
        with self._at_work():
            residency = self._forward.residency
            while residency and not residency.full():
                time.sleep(0.02)

    def prefill(self, ids, on_progress=None) -> np.ndarray:
        """Append ids to the sequence; float32 logits (V,) of the last. on_progress(done, total) counts tokens times layers; few
        tokens pass several layers between two calls.

        Raises InputError for no ids or ids outside the vocabulary, ContextError before the cache would overflow;
        neither changes the sequence.
        """
        with self._at_work():
            ids = self._checked(ids)
            self._room(len(ids))
            if len(ids) == 1:
                return self._step(int(ids[0]))
            row, start = None, self.position
            for at in range(0, len(ids), self.chunk):
                piece = ids[at : at + self.chunk]
                last = at + len(piece) == len(ids)
                report = _reporter(on_progress, at, len(piece), len(ids), self.config.n_layers)
                self._written = max(self._written, start + at + len(piece))
                row = self._forward.prefill(piece, start + at, "last" if last else "none", report)
                self.position = start + at + len(piece)
            self._warn_if_saturated()
            return row[0].copy()

    def step(self, token: int) -> np.ndarray:
        """Append one token; float32 logits (V,)."""
        with self._at_work():
            if type(token) is not int or not 0 <= token < self.config.vocab_size:
                token = int(self._checked([token])[0])  # arrays take longer than a small model's token
            self._room(1)
            return self._step(token)

    def _step(self, token: int) -> np.ndarray:
        self._written = max(self._written, self.position + 1)
        row = self._forward.decode(token, self.position)
        self.position += 1
        self._warn_if_saturated()
        return row

    def logits(self, ids) -> np.ndarray:
        """Float32 logits (T, V) of a whole sequence, from an empty cache; the cache is empty afterwards."""
        with self._at_work():
            ids = self._checked(ids)
            self._room(len(ids), 0)
            self.position = self._written = 0
            rows = np.empty((len(ids), self.config.vocab_size), np.float32)
            for at in range(0, len(ids), self.chunk):
                piece = ids[at : at + self.chunk]
                rows[at : at + len(piece)] = self._forward.prefill(piece, at, "all")
            return rows

    def logit_blocks(self, ids, first: int = 0, most: int = 64, on_progress=None):
        """Float32 logits (at most `most`, V) of the tokens first.. of a whole sequence, block after block, from an empty cache.

        For sequences whose (T, V) logits are too much to keep. The engine is at work until the last block was taken or
        the iterator is closed; the cache is empty afterwards. on_progress as in `prefill`. Errors as `logits`.
        """
        with self._at_work():
            ids = self._checked(ids)
            self._room(len(ids), 0)
            if type(first) is not int or not 0 <= first < len(ids):
                raise InputError(f"first is {first!r}, expected a position of the sequence, 0 to {len(ids) - 1}")
            _whole("most", most, MAX_CHUNK)
            self.position = self._written = 0
            for at in range(0, len(ids), self.chunk):
                piece = ids[at : at + self.chunk]
                wanted = "later" if at + len(piece) > first else "none"
                self._forward.prefill(piece, at, wanted, _reporter(on_progress, at, len(piece), len(ids), self.config.n_layers))
                for row in range(max(first - at, 0), len(piece), most):
                    self._usable()
                    yield self._forward.head(row, min(most, len(piece) - row), at + row)
            self._warn_if_saturated()

    def reset(self, position: int = 0) -> None:
        """Keep the first `position` tokens and forget the rest; a sliding window that has moved on can only be emptied."""
        self._usable()
        if type(position) is not int or not 0 <= position <= self.position:
            raise InputError(f"cannot go back to position {position!r}, the sequence has {self.position}")
        if self._written > self._forward.cache.capacity and 0 < position < self.position:
            raise InputError(f"the sliding window has left position {position} behind; reset to 0 and prefill again")
        self.position = position
        self._written = self._written if position else 0

    @property
    def saturated(self) -> bool:
        """Whether a key or value was too large for the float16 cache and was cut to 65,504 (kv="f32" avoids it)."""
        self._usable()
        return self._forward.saturated

    def _warn_if_saturated(self) -> None:
        if self._forward.saturated and not self._warned:
            self._warned = True
            text = 'a key or value was too large for the float16 cache and was cut to 65,504; use --kv f32 (kv="f32")'
            warnings.warn(text, stacklevel=3)

    def memory(self) -> dict[str, int]:
        """Bytes: KV cache, scratch buffers (both anonymous), and mapped weights."""
        self._usable()
        return {"kv_cache": self._forward.cache.nbytes, "scratch": self._forward.state.nbytes, "weights": self._weight_bytes()}

    @property
    def residency(self):
        """What holds the weights under a memory budget (`store.residency.Residency`); None without one."""
        self._usable()
        return self._forward.residency

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""
        self._usable()
        return self._forward.weights.bytes_per_token()

    def bytes_per_position(self) -> int:
        """Bytes of keys and values of one position, which every later token reads."""
        self._usable()
        return position_bytes(self.config, self.kv)

    def phase_ticks(self) -> dict[str, int]:
        """Processor ticks that each phase of the kernels took since the engine was opened, and "now", when the last phase ended."""
        self._usable()
        return self._forward.phase_ticks()

    def _weight_bytes(self) -> int:
        return sum(self.source.tensor(name).nbytes for name in self.config.tensor_shapes())

    def _usable(self) -> None:
        if self._closed:
            raise EngineError("the model is closed; load it again")
        if os.getpid() != self._pid:
            raise EngineError("the model was loaded before this process was forked; load it in the child")

    def _checked(self, ids) -> np.ndarray:
        try:
            given = np.asarray(ids)
            if given.dtype.kind not in "iu" and given.size:
                raise ValueError
            array = given.astype(np.int64)
        except (ValueError, TypeError, OverflowError):
            raise InputError("token ids must be a sequence of whole numbers") from None
        if array.ndim != 1 or array.size == 0:
            raise InputError(f"got token ids of shape {array.shape}, expected one sequence of at least one id")
        outside = array[(array < 0) | (array >= self.config.vocab_size)]
        if outside.size:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {self.config.vocab_size}")
        return array.astype(np.int32)

    def _room(self, count: int, position: int | None = None) -> None:
        position = self.position if position is None else position
        if position + count > self.context:
            raise ContextError(
                f"{count} tokens do not fit: {position} of {self.context} positions are taken; "
                f"use a shorter prompt or a larger --context (the model's maximum is {self.config.max_positions})"
            )

    def close(self) -> None:
        """Free the memory, end the threads, close the files; waits for a call in another thread. Closing twice is fine."""
        if self._worker == threading.get_ident():
            raise EngineError("the engine cannot be closed from within its own call")
        forked = os.getpid() != self._pid  # a child has no thread that could give the lock back
        with contextlib.nullcontext() if forked else self._busy:
            if not self._closed:
                self._closed = True
                self._forward.close()
                self._forward = None
                self.source.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _whole(name: str, value, largest: int, what: str = "the limit") -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise InputError(f"{name} is {value!r}, expected a whole number from 1 to {largest} ({what})")
    return value


def _reporter(on_progress, at, count, total, layers):
    if on_progress is None:
        return None
    return lambda layer: on_progress(at * layers + count * (layer + 1), total * layers)
