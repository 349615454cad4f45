"""`npmix evaluate`: perplexity and divergence as a few lines on stdout, all of it as JSON in a file.

One hard fact: what follows "±" is one standard error, as in llama.cpp's perplexity tool.
"""

import json
import math
from pathlib import Path

import click

from .interrupts import Interrupts
from .notices import ProgressBar, compile_notice, escaped, say
from .options import read_text, threads_option

FILE = click.Path(path_type=Path)
WHOLE = click.IntRange(1)


def _tokens(count: float) -> str:
    return f"{count:,.0f} tok"


def _figure(of: dict, digits: int, scale: float = 1, unit: str = "") -> str:
    """1.2345 ± 0.0067, in as many digits as asked."""
    if of["value"] is None:
        return "beyond all bounds"
    error = "" if of["standard_error"] is None else f" ± {scale * of['standard_error']:.{digits}f}"
    return f"{scale * of['value']:.{digits}f}{error}{unit}"


def result_lines(found: dict):
    """What `npmix.evaluate` found, for people."""
    settings, text = found["settings"], found["text"]
    form = f"of {settings['context']}" if settings["stride"] is None else f"of up to {settings['context']}, one every {settings['stride']}"
    windows = f"{text['windows']:,} window{'' if text['windows'] == 1 else 's'} {form}"
    yield f"model       {found['model']['path']}: {found['model']['format']}; KV cache {settings['kv']}"
    yield f"text        {text['tokens']:,} tokens, {windows}, {found['scored']:,} tokens scored"
    guide = found.get("guide_perplexity")
    yield f"perplexity  {_figure(found['perplexity'], 4)}" + (f" ({guide:.4f} as weighted in Hugging Face's guide)" if guide else "")
    if found["against"]:
        against, kl = found["against"], found["kl"]
        saved = f"{against['logits']}, saved from {against['path']}" if "logits" in against else f"{against['path']}: {against['format']}"
        yield f"against     {saved}; perplexity {_figure(found['base']['perplexity'], 4)}"
        yield f"ratio       {_figure(found['perplexity_ratio'], 5)} of the perplexities"
        rest = f"median {kl['median']:.6f}, 99 % {kl['percentile_99']:.6f}, largest {kl['largest']:.6f}"
        yield f"KL, nats    mean {_figure(kl['mean'], 6)}, {rest}"
        yield f"same top    {_figure(found['same_top'], 3, 100, ' %')}"


@click.command(short_help="Measure perplexity on a text, and the divergence from a base model.")
@click.argument("model", type=FILE)
@click.argument("text", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--context", metavar="N", type=WHOLE, default=512, show_default=True, help="Tokens of a window.")
@click.option(
    "--stride", metavar="N", type=WHOLE, help="Overlapping windows, one every N tokens.  [default: side by side, second half scored]"
)
@click.option("--against", metavar="BASE", type=FILE, help="Also the KL divergence from this model: a folder or packed store.")
@click.option("--against-logits", metavar="FILE", type=FILE, help="The same from what --save-logits wrote for the base.")
@click.option("--save-logits", metavar="FILE", type=FILE, help="Keep MODEL's log-probabilities for --against-logits.")
@click.option("--kv", metavar="FORMAT", default="f16", show_default=True, help="Numbers in the KV cache, as for npmix run.")
@threads_option
@click.option("--limit", metavar="WINDOWS", type=WHOLE, help="Only the first so many windows.  [default: all]")
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Write everything to FILE as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(model, text, json_file, quiet, **settings):
    """Measure perplexity on a text, and the divergence from a base model.

    MODEL is a Hugging Face folder or a packed store, TEXT a file in UTF-8 (-: standard input). Windows and definitions are
    those of llama.cpp's perplexity tool; with --stride those of Hugging Face's guide to perplexity of fixed-length models.
    What follows ± is one standard error.

    Saved log-probabilities take 16 + 2 V bytes for each token scored, V the vocabulary: 16 MB a window of 512 at 32,000.
    """
    if settings["against"] and settings["against_logits"]:
        raise click.UsageError("Give --against or --against-logits, not both.")
    words = read_text(text)
    from ..evaluation import evaluate as measure

    bar, interrupts = ProgressBar(quiet, amount=_tokens), Interrupts()

    def on_progress(done, total, loss):
        interrupts.check()
        bar.update(done, total, "" if loss is None or loss > 700 else f"perplexity {math.exp(loss):.4f} so far")

    with compile_notice(quiet), interrupts:
        try:
            found = measure(model, words, on_progress=on_progress, **settings)
        finally:
            bar.finish()
    if json_file:
        from ..store.writer import write_atomically

        write_atomically(json_file, (json.dumps(found, indent=1) + "\n").encode())
    if settings["save_logits"] and not quiet:
        say(f"wrote {escaped(settings['save_logits'])}")
    for line in result_lines(found):
        print(escaped(line))
