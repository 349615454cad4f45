"""`npmix warmup`: compile ahead what the first run would."""

import time

import click

from .notices import compile_notice, say
from .options import model_option, model_path, threads_option

PROMPT_TOKENS = 100  # more than any tile of tokens has rows, and not a multiple of one


@click.command(short_help="Compile the kernels ahead of the first run.")
@model_option
@threads_option
@click.option("--quiet", is_flag=True, help="Nothing on stderr but errors and warnings.")
def warmup(model, threads, quiet):
    """Compile the kernels ahead of the first run.

    Kernels are compiled for the formats a model's weights have, and kept in a cache folder: $NPMIX_CACHE_DIR, else
    npmix below $XDG_CACHE_HOME or ~/.cache.
    """
    from ..engine import Engine
    from ..kernels._jit import DISABLED, cache_dir
    from ..store import open_source

    began = time.monotonic()
    path = model_path(model)
    with open_source(path) as source:
        context = min(2 * PROMPT_TOKENS, source.config.max_positions)
    with compile_notice(quiet) as compiled:
        for kv in ("f16", "f32", "q8"):
            with Engine(path, threads=threads, context=context, kv=kv) as engine:
                count = min(PROMPT_TOKENS, engine.context - 1)
                engine.prefill([i % engine.config.vocab_size for i in range(count)])
                engine.step(0)
    if quiet:
        return
    if DISABLED:
        say("nothing to compile: NUMBA_DISABLE_JIT is set")
    elif compiled:
        where = cache_dir()
        say(f"compiled {len(compiled)} kernels in {time.monotonic() - began:.1f} s" + (f", kept in {where}" if where else ", not kept"))
    else:
        say("all kernels are compiled already")
