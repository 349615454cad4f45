"""The forward pass when not all experts are in memory: a layer at a time, its experts as they come.

One hard fact: the kernels and the order of additions are those of `forward.py`, so the bits are too; while everything
is in memory a token is one call of the kernel, as there.
"""

from contextlib import closing

import numpy as np

from ..kernels import tables as t
from ..store.residency import Arrival, Residency
from .forward import Forward
from .weights import Weights


class StreamingForward(Forward):
    """`Forward` over a store's weights under a budget."""

    def __init__(self, residency: Residency, context: int, chunk: int, kv: str, threads: int):
        self.residency = residency
        super().__init__(Weights(residency), context, chunk, kv, threads)
        self._all = self.state.array(t.SELECTED).copy()
        if residency.load == "read":
            columns = self.weights.layers[:, t.EXPERTS :]
            self._offsets = columns - columns[:, ::3].repeat(3, 1)  # of an expert's matrices from its first one
            columns[:] = 0
            residency.placed = self._placed

    def _placed(self, layer: int, expert: int, address: int) -> None:
        """An expert lies at this address now, or nowhere."""
        three = slice(3 * expert, 3 * expert + 3)
        self.weights.layers[layer, t.EXPERTS :][three] = address + self._offsets[layer, three] if address else 0

    def _decode(self, token: int, position: int, logits: int) -> None:
        layers, active = self.config.n_layers, self.config.n_active
        self.residency.passing = False
        with self.residency.whole() as whole:
            if whole:
                self._select_all()
                self.residency.stats.hits += layers * active
                return super()._decode(token, position, logits)
        choice = self.state.array(t.SCRATCH)[0, self.state.m[t.S_CHOICE] :][: 4 * active].view(np.int32)
        for layer in range(layers):
            self.residency.check()
            self._decode_part(token, position, layer, layer + 1, 0, t.ROUTE)
            experts = choice.tolist()
            self._decode_experts(token, position, layer, experts)
        self.residency.check()
        self._decode_part(token, position, layers, layers, logits)

    def _decode_experts(self, token: int, position: int, layer: int, experts: list[int]) -> None:
        with closing(self.residency.arrive(layer, experts, self._guesses(layer), halves=True)) as arrivals:
            for arrival in arrivals:
                part = self._select([experts.index(expert) for expert in arrival.experts], arrival)
                self._decode_part(token, position, layer, layer + 1, 0, part)

    def _prefill(self, count: int, position: int, first: int, last: int, skip: int, logits: int) -> None:
        with self.residency.whole() as whole:
            if whole:
                self._select_all()
                return super()._prefill(count, position, first, last, skip, logits)
        for layer in range(first, last):
            self._prefill_layer(count, position, layer, skip)
        if logits:
            self._head(count, skip, logits)

    def _prefill_layer(self, count: int, position: int, layer: int, skip: int) -> None:
        c = self.config
        pairs = count * c.n_active
        self.residency.passing = pairs >= 32 * c.n_experts and layer + 1 < c.n_layers  # computing takes about as long as reading, or longer
        if layer == 0 and pairs >= 2 * c.n_experts:  # nearly all will be needed
            self.residency.expect([(0, expert) for expert in range(c.n_experts)])
        self.residency.check()
        self._prefill_part(count, position, layer, layer + 1, skip, 0, t.ROUTE)
        starts = self.state.array(t.STARTS)
        experts = np.flatnonzero(np.diff(starts)).tolist()
        last_alone = self._wanted in ("last", "none") and layer == c.n_layers - 2  # all that the layer after this one is for
        first = count - 1 if last_alone else 0
        with closing(self.residency.arrive(layer, experts, self._guesses_for_prompt(layer, first, count))) as arrivals:
            for arrival in arrivals:
                self._prefill_part(count, position, layer, layer + 1, skip, 0, self._select(arrival.experts, arrival))

    def _head(self, count: int, skip: int, logits: int) -> None:
        self.residency.check()
        super()._head(count, skip, logits)

    def _select_all(self) -> None:
        self.state.array(t.SELECTED)[:] = self._all

    def _select(self, numbers: list[int], arrival: Arrival) -> int:
        """Put down which experts to compute; gives the kernel's word for it."""
        self.state.array(t.SELECTED)[: len(numbers)] = numbers
        return t.PART * len(numbers) + t.GATE_UP * arrival.up + t.DOWN * arrival.down + t.SUM * arrival.last

    def _guesses(self, layer: int) -> list[tuple[int, int]]:
        """What the routers of the next layers would choose for a token: (layer, expert), the nearest first."""
        chosen = self.state.array(t.GUESS)[0, : min(t.LAYERS_AHEAD, self.config.n_layers - layer - 1)].tolist()
        return [(layer + 1 + ahead, expert) for ahead, experts in enumerate(chosen) for expert in experts]

    def _guesses_for_prompt(self, layer: int, first: int, last: int) -> list[tuple[int, int]]:
        """What the next layer's router would choose for tokens first..last of the chunk: (layer, expert), the most wanted first."""
        c = self.config
        if layer + 1 == c.n_layers:
            return []
        counts = np.bincount(self.state.array(t.GUESS)[0, first:last].ravel(), minlength=c.n_experts)
        return [(layer + 1, int(e)) for e in np.argsort(-counts, kind="stable") if counts[e]]

    def close(self) -> None:
        self.residency.close()
        super().close()
