"""Mean squares, and second moments, of what every matrix takes in, one layer after the other.

One hard fact: a layer is gone through with the whole text before the next one begins, so its weights are read once
however little memory there is, and only one layer's sums are held: second moments of all of Mixtral would be 5 GB.
"""

import numpy as np

from ..errors import NumericsError
from ..kernels import tables as t
from ..kernels.observe import MOMENT_BLOCK, MOMENTS, NORM_ROWS, SQUARES, observer
from .forward import Forward
from .weights import Weights


class Observer:
    """One model, run a layer at a time; `finish` gives what was summed since the last one.

    window: positions of a sequence. chunk: tokens given at a time at most. moments: also sum products of channels.
    """

    def __init__(self, weights: Weights, window: int, chunk: int, threads: int, moments: bool = False):
        self.config = weights.config
        self.forward = Forward(weights, window, chunk, "f16", threads)
        self._state, self._moments = self.forward.state, moments
        self._state.observe(self.config)
        self._kernel = observer()
        self._squares: dict[str, np.ndarray] = {}
        self._products: dict[str, np.ndarray] = {}
        self._tokens: dict[str, int] = {}
        self._widths: dict[str, int] = {}

    def chunk(self, layer: int, tokens: np.ndarray, position: int, rows: np.ndarray | None) -> np.ndarray:
        """Run a layer over a chunk (`Forward.layer`) and sum its inputs; after the last layer also the output matrix's."""
        out, c, count = self.forward.layer(layer, tokens, position, rows), self.config, len(tokens)
        x_width, hidden_width = int(self._state.m[t.X_WIDTH]), self._state.array(t.OBSERVED_HIDDEN).shape[1]
        self._add("wq", t.OBSERVED_NORMED, x_width, 0, count, c.dim)
        self._add("wo", t.ATT, int(self._state.m[t.ATT_WIDTH]), 0, count, c.n_heads * c.head_dim)
        if c.has_router:
            self._add("router", t.OBSERVED_ROWS, x_width, 0, count, c.dim, moments=False)  # it stays at its source's precision
        starts = self._state.array(t.STARTS).tolist()
        for expert in range(c.n_experts):
            begin, found = starts[expert], starts[expert + 1] - starts[expert]
            order = int(self._state.m[t.ORDER]) + 4 * begin
            self._add(f"experts.{expert}.w_gate", t.OBSERVED_ROWS, x_width, order, found, c.dim)
            self._add(f"experts.{expert}.w_down", t.OBSERVED_HIDDEN, hidden_width, 0, found, c.hidden_dim, first=begin)
        if layer == c.n_layers - 1:
            self._run(NORM_ROWS, 0, 0, 0, count, 0, 0)
            self._add("output", t.OBSERVED_NORMED, x_width, 0, count, c.dim)
        return out

    def _add(self, name, column, row_width, order, count, width, first=0, moments=True) -> None:
        """Sum `count` rows of a buffer, from row `first` on or as `order` numbers them."""
        if name not in self._squares:
            self._squares[name] = np.zeros(-(-width // 16) * 16)
            self._tokens[name], self._widths[name] = 0, width
            if self._moments and moments:
                blocks, n = -(-width // MOMENT_BLOCK), MOMENT_BLOCK  # behind them: a float32 block a member
                self._products[name] = np.zeros(blocks * n * n + -(-self.forward.team.size // 2) * n * n)
        rows, row_bytes = int(self._state.m[column]) + 4 * row_width * first, 4 * row_width
        self._tokens[name] += count
        self._run(SQUARES, rows, row_bytes, order, count, width, self._squares[name].ctypes.data)
        if name in self._products:
            self._run(MOMENTS, rows, row_bytes, order, count, width, self._products[name].ctypes.data)

    def _run(self, work, rows, row_bytes, order, count, width, out) -> None:
        self.forward.team.run(self._kernel, work, self._state.m, rows, row_bytes, order, count, width, out)

    def finish(self, layer: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        """(means, counts, moments) of a layer by our tensor names, and forget them.

        means: float32 (K,), zeros for an expert that no token chose. counts: int64 (E,), the tokens that chose each
        expert. moments: float32 (blocks, 128, 128), empty unless asked for. Raises NumericsError for means that are not finite.
        """
        at = f"layers.{layer}."
        counts = np.array([self._tokens[f"experts.{e}.w_gate"] for e in range(self.config.n_experts)], np.int64)
        means, moments = {}, {}
        for name, sums in self._squares.items():
            full, width, tokens = name if name == "output" else at + name, self._widths[name], self._tokens[name]
            means[full] = _mean(full, sums[:width], tokens)
            if name in self._products:
                moments[full] = _mean(full, _whole(self._products[name], width), tokens)
        self._squares, self._products, self._tokens = {}, {}, {}
        return means, counts, moments

    def close(self) -> None:
        """End the threads, drop the views of the weights."""
        self.forward.close()


def _mean(name: str, sums: np.ndarray, tokens: int) -> np.ndarray:
    """float32 sums / tokens."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (sums / max(tokens, 1)).astype(np.float32)
    if not np.isfinite(mean).all():
        raise NumericsError(
            f"the inputs of {name} are not finite, or too large for float32 to hold their squares; check the weights with `npmix verify`"
        )
    return mean


def _whole(sums: np.ndarray, width: int) -> np.ndarray:
    """The blocks (blocks, 128, 128) with what lies below the diagonal filled in from above it."""
    n = MOMENT_BLOCK
    blocks = sums[: -(-width // n) * n * n].reshape(-1, n, n)
    upper = np.triu(blocks)
    return upper + np.triu(blocks, 1).transpose(0, 2, 1)
