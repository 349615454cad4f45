"""A text on its way to stdout, and the figures that close it.

One hard fact: each piece is flushed by itself, so a reader sees a token when it was made and a closed pipe is noticed at once.
"""

import sys

from .notices import size


def follow(stream, interrupts):
    """The pieces of a stream until it ends or Ctrl-C asks; then also what was held back as a stop string's beginning."""
    try:
        with interrupts:
            while not interrupts.asked and (piece := next(stream, None)) is not None:
                yield piece
    except KeyboardInterrupt:  # raised by interrupts.check between the chunks of a prompt
        pass
    finally:
        stream.close()
    if interrupts.asked and stream.held:
        yield stream.held


def write(text: str) -> None:
    """Text to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _rate(what: str, count: int, per_second: float) -> str:
    """prompt 10 tokens at 512.0 tok/s; no speed where none was measured: the first token of a text belongs to the prompt."""
    tokens = f"{what} {count} token{'' if count == 1 else 's'}"
    return f"{tokens} at {per_second:.1f} tok/s" if per_second else tokens


def disk_figures(disk) -> str:
    """What was read under a memory budget, what was there already, what was guessed, and the wait."""
    wanted, guesses = disk.hits + disk.misses, disk.guesses_right + disk.guesses_wrong
    parts = [f"read {size(disk.bytes_read)}", f"{100 * disk.hits / max(wanted, 1):.0f} % of experts were in memory"]
    if guesses:
        parts.append(f"{100 * disk.guesses_right / guesses:.0f} % of guesses right")
    waited = f"waited {disk.waited_s:.1f} s for the disk"
    parts.append(f"{waited} at {100 * disk.share_of_rate:.0f} % of its rate" if disk.share_of_rate else waited)
    return ", ".join(parts)


def figures(stats, random_seed: bool) -> str:
    """The closing line: speeds, time to the first token, memory, a seed that was drawn."""
    from ..benchmark import peak_memory

    computed = stats.prompt_tokens - stats.cached_tokens
    parts = [_rate("prompt", computed, stats.prompt_tokens_per_s), _rate("text", stats.generated_tokens, stats.decode_tokens_per_s)]
    parts.append(f"first token {stats.first_token_s:.2f} s")
    if stats.disk:
        parts.append(disk_figures(stats.disk))
    peak = peak_memory()
    if peak is not None:
        parts.append(f"peak memory {size(peak)}")
    if random_seed and stats.seed is not None:
        parts.append(f"seed {stats.seed}")
    return ", ".join(parts)
