"""Prefill and decode of one model: fills the tables, calls the kernels, reads what they report.

One hard fact: a token's logits have the same bits whichever way it came; both functions are made of
the same kernels (`kernels/decode.py`, `kernels/prefill.py`).
"""

import numpy as np

from ..errors import NumericsError
from ..kernels import tables as t
from ..kernels.entry import DECODE, PREFILL, entry, load
from ..kernels.team import WORK, Team
from .kv_cache import KVCache
from .state import RunState
from .weights import Weights

SMALL = 8 << 20  # bytes of weights a decoded token below which one thread does it: two are a quarter faster, many or busy ones slower
AT_ONCE = 64  # tokens times layers in one call of a prompt's kernel: Python takes up to 0.1 ms between two, but Ctrl-C waits for its end


class Forward:
    """One model's weights, cache and state, and the team that runs its kernels."""

    residency = None  # what holds the weights under a memory budget (`streaming.py`)

    def __init__(self, weights: Weights, context: int, chunk: int, kv: str, threads: int):
        self.chunk = chunk
        self.weights = weights
        self.config = weights.config
        self.cache = KVCache(self.config, context, chunk, kv)
        self.state = RunState(weights, self.cache, context, chunk, threads)
        self.team = Team(threads)
        self.state.m[t.TEAM] = self.team.address
        self._alone = Team(1)
        self._kernel = entry(tuple(weights.slots), weights.embeddings_kind, kv)
        self._width = -(-self.config.vocab_size // 16) * 16
        self._row = self._rows(1)  # of the last token
        self.decode_team = self._alone if weights.bytes_per_token() < SMALL else self.team
        self.saturated = False  # a key or value did not fit float16
        self._wanted, self._loaded = "all", False

    def load_kernels(self) -> None:
        """Prove the int8 kernels, compile the kernels or load them from the cache; the first token does it if nobody did before."""
        if not self._loaded:
            load(self._kernel, {name for name, *_ in [*self.weights.slots, self.weights.embeddings_kind]})
            self._loaded = True

    def _begin(self) -> None:
        """Before any work: kernels at hand, and nothing left of a call that was interrupted."""
        self.load_kernels()
        self.state.array(t.STATUS)[t.BAD_LAYER // 8] = 0

    def decode(self, token: int, position: int) -> np.ndarray:
        """Logits (V,) after one token at `position`; its keys and values enter the cache."""
        self._begin()
        row = self._row
        self._decode(token, position, _address(row))
        self._check(position, 1)
        return row[0, : self.config.vocab_size].copy()

    def _decode(self, token: int, position: int, logits: int) -> None:
        """All layers of one token, and the head."""
        self._decode_part(token, position, 0, self.config.n_layers, logits)

    def _decode_part(self, token: int, position: int, first: int, last: int, logits: int, part: int = 0) -> None:
        self._call(self.decode_team, DECODE, token, position, first, last, 0, part, logits)

    def _prefill(self, count: int, position: int, first: int, last: int, skip: int, logits: int) -> None:
        """Layers first..last of the chunk in TOKENS; skip: tokens that only fill the cache in the model's last layer. Then the logits of the
        others, unless the address is 0."""
        self._prefill_part(count, position, first, last, skip, logits)

    def _prefill_part(self, count: int, position: int, first: int, last: int, skip: int, logits: int, part: int = 0) -> None:
        self._call(self.team, PREFILL, count, position, first, last, skip, part, logits)

    def _call(self, team: Team, *work: int) -> None:
        """Have the kernel do what `entry` says; it reads that in the whole team's cells, whoever works."""
        self.state.array(t.COUNTERS)[:] = 0
        self.team.cells[WORK // 8 :][: len(work)] = work
        team.call(self._kernel, self.state.m, self.weights.layers)

    def prefill(self, tokens: np.ndarray, position: int, wanted: str = "last", on_layer=None) -> np.ndarray | None:
        """One chunk of tokens at `position`.. through all layers; logits of its "last" (1, V), "all" (T, V) or "none" of them. The last
        one's are a view that the next call overwrites.

        "later": none now, but `head` may be asked for any of them until something else is computed. on_layer(layer): every layer up to
        this one is done; few tokens pass several between two calls.
        """
        self._begin()
        count, self._wanted = len(tokens), wanted
        self.state.array(t.TOKENS)[:count] = tokens
        skip = count - 1 if wanted in ("last", "none") else 0  # nothing else: there is room for one more row
        rows = self._row if wanted == "last" else self._rows(count) if wanted == "all" else None
        at_once, layers = max(1, AT_ONCE // count), self.config.n_layers
        for first in range(0, layers, at_once):
            last = min(first + at_once, layers)
            self._prefill(count, position, first, last, skip, 0 if rows is None or last < layers else _address(rows))
            if on_layer:
                on_layer(last - 1)
        self._check(position, count)
        return None if rows is None else rows[:, : self.config.vocab_size]

    def head(self, first: int, count: int, position: int) -> np.ndarray:
        """Logits (count, V) of rows first.. of the chunk that was prefilled last; `position`: where the first of them stands."""
        rows = self._rows(count)
        self._head(first + count, first, _address(rows))
        self._check(position, count)
        return rows[:, : self.config.vocab_size]

    def _rows(self, count: int) -> np.ndarray:
        """Room for the logits of `count` tokens: whole row blocks."""
        return np.zeros((count, self._width), np.float32)

    def _head(self, count: int, skip: int, logits: int) -> None:
        """The logits alone of the chunk's first `count` tokens without the first `skip`."""
        self._prefill_part(count, 0, self.config.n_layers, self.config.n_layers, skip, logits)

    def layer(self, layer: int, tokens: np.ndarray, position: int, rows: np.ndarray | None) -> np.ndarray:
        """One layer by itself over a chunk of tokens at `position`.., every position in full.

        rows: float32 (T, D), what the layer before gave; layer 0 embeds the tokens instead. Returns this layer's
        (T, D), a view on the run state that the next call overwrites.
        """
        self._begin()
        count, self._wanted, x = len(tokens), "all", self.state.array(t.X)[:, : self.config.dim]
        self.state.array(t.TOKENS)[:count] = tokens
        if layer:
            x[:count] = rows
        self._prefill(count, position, layer, layer + 1, 0, 0)
        self._check(position, count)
        return x[:count]

    def _check(self, position: int, count: int) -> None:
        """Raise NumericsError when a kernel saw a number that is not finite; what it cached is erased."""
        status = self.state.array(t.STATUS)
        self.saturated = self.saturated or bool(status[t.SATURATED // 8])
        bad, status[t.BAD_LAYER // 8] = int(status[t.BAD_LAYER // 8]), 0
        if not bad:
            return
        self.cache.erase(position, count)
        layers = self.config.n_layers
        where = "the embeddings" if bad < 0 else "the output matrix" if bad > layers else f"layer {bad - 1} (of 0..{layers - 1})"
        raise NumericsError(f"not finite: the first bad numbers came out of {where}; check the weights with `npmix verify`")

    def phase_ticks(self) -> dict[str, int]:
        """Processor ticks of each phase so far by member 0's clock, waits included; "now": the tick at which the last one ended."""
        now, *spent = self.state.array(t.CLOCKS).tolist()
        return {"now": now, **dict(zip(t.PHASES, spent))}

    def close(self) -> None:
        self.team.close()
        self.weights.close()


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
