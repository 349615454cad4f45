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


def figures(stats, random_seed: bool) -> str:
    """The closing line: speeds, time to the first token, memory, a seed that was drawn."""
    from ..benchmark import peak_memory

    computed = stats.prompt_tokens - stats.cached_tokens
    parts = [f"prompt {computed} tokens at {stats.prompt_tokens_per_s:.1f} tok/s"]
    parts.append(f"text {stats.generated_tokens} tokens at {stats.decode_tokens_per_s:.1f} tok/s")
    parts.append(f"first token {stats.first_token_s:.2f} s")
    peak = peak_memory()
    if peak is not None:
        parts.append(f"peak memory {size(peak)}")
    if random_seed and stats.seed is not None:
        parts.append(f"seed {stats.seed}")
    return ", ".join(parts)
