"""Which tokens of a text are computed together, and which of them are scored.

One hard fact: the logits of position t speak of token t + 1, so a window of n tokens scores n - 1 of them at most, and its
last token is never fed.
"""

from dataclasses import dataclass

from ..errors import InputError

SHORTEST = 4  # tokens of a window: fewer leave nothing worth the name to score


@dataclass(frozen=True)
class Window:
    """ids[begin:end], computed from an empty cache; logits of its positions first.. score the tokens behind them."""

    begin: int
    end: int
    first: int
    guide_weight: float = 1.0  # of each scored token in the code of Hugging Face's guide, see `make_plan`

    @property
    def fed(self) -> int:
        """Tokens that are computed."""
        return self.end - self.begin - 1

    @property
    def scored(self) -> int:
        """Tokens whose probability counts."""
        return self.fed - self.first


@dataclass(frozen=True)
class Plan:
    """A text's ids, cut into windows. bos_id: what the first token of every window is replaced with, if anything."""

    ids: list[int]
    context: int
    stride: int | None
    bos_id: int | None
    windows: list[Window]

    def fed(self, window: Window) -> list[int]:
        """The tokens to compute."""
        ids = self.ids[window.begin : window.end - 1]
        return ids if self.bos_id is None else [self.bos_id, *ids[1:]]

    def targets(self, window: Window) -> list[int]:
        """The tokens that are scored."""
        return self.ids[window.begin + window.first + 1 : window.end]


def make_plan(ids: list[int], context: int, stride: int | None, bos_id: int | None, limit: int | None = None) -> Plan:
    """Windows of at most `context` tokens over a text that begins with its bos id; limit: the first so many of them.

    stride None: llama.cpp's perplexity tool (tools/perplexity). Windows side by side, what is left at the end is dropped;
    each begins with bos_id in place of its own first token, and positions context // 2 .. context - 2 are scored. (That tool
    also wants a text of two windows, where one is enough here, and its -f drops a file's last line break.)

    stride 1 to context: Hugging Face's guide "Perplexity of fixed-length models". A window begins every `stride` tokens
    and scores what no window before it has reached; no token is replaced. By the guide's formula every scored token counts
    once. Its code weights a window's mean with its new tokens less one, though only a window without overlap loses one by
    the shift (at stride 1 nothing behind the first window counts): that is what `guide_weight` is for.

    Raises InputError for numbers out of range and a text too short for one window.
    """
    _check("context", context, SHORTEST, 1 << 24)
    if limit is not None:
        _check("limit", limit, 1, 1 << 40)
    if stride is None:
        windows = [Window(at, at + context, context // 2) for at in range(0, len(ids) - context + 1, context)][:limit]
        if not windows:
            raise InputError(f"the text has {len(ids)} tokens, fewer than one window of {context}: give a longer one or a smaller context")
        return Plan(ids, context, None, bos_id, windows)
    _check("stride", stride, 1, context)
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens, expected at least 2: give a longer one")
    return Plan(ids, context, stride, None, _strided(len(ids), context, stride)[:limit])


def _strided(count: int, context: int, stride: int) -> list[Window]:
    windows, reached = [], 0
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        new = end - reached
        first = max(reached - 1 - begin, 0)
        if scored := end - begin - 1 - first:  # a single token left over, without overlap, has nothing that predicts it
            windows.append(Window(begin, end, first, (new - 1) / scored))
        reached = end
        if end == count:
            break
    return windows


def _check(name: str, value, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{name} is {value!r}, expected a whole number from {low} to {high}")
