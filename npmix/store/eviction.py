"""Which expert must go when another one needs its memory.

One hard fact: experts of Mixtral are chosen almost uniformly, so no policy hits much more often than by chance; what it must not
do is let go of what is needed in a moment.
"""

import numpy as np

from ..config import Config
from .units import Unit

FADE = 1 / 16  # weight of the latest token in how often an expert is chosen


class Eviction:
    """Keeps how often experts were chosen lately. experts: all of them, by (layer, expert)."""

    def __init__(self, config: Config, experts: dict[tuple[int, int], Unit]):
        self._experts, self._layers = experts, config.n_layers
        self._chosen = np.full((config.n_layers, config.n_experts), config.n_active / config.n_experts)
        self._layer = 0

    def note(self, layer: int, chosen: list[Unit]) -> None:
        """The router of this layer, where computing is now, has chosen these."""
        self._layer = layer
        for expert in range(self._chosen.shape[1]):
            self._chosen[layer, expert] += ((self._experts[layer, expert] in chosen) - self._chosen[layer, expert]) * FADE

    def victim(self, keep_expected: bool, passing: bool) -> Unit | None:
        """The expert expected to be needed last, layers being the measure of time; one that is half there goes first.

        None if all are pinned or being read. passing: all experts of a layer are wanted, however often they were chosen.
        """
        best, worst = None, -1.0
        for unit in self._experts.values():
            if unit.memory is None or unit.pinned or unit.flying or keep_expected and unit.expected:
                continue
            when = (unit.layer - self._layer - 1) % self._layers + 1
            if not passing:
                when += self._layers * (1 / max(self._chosen[unit.layer, unit.expert], 1e-3) - 1)
            when = (0.0 if unit.expected else when) if unit.ready else 1e9 - unit.expected
            if when > worst:
                best, worst = unit, when
        return best
