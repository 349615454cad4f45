"""`npmix calibrate`: a text through a model, and the file of what its matrices took in."""

from pathlib import Path

import click

from .notices import compile_notice, escaped, resumable_bar, say
from .options import read_text, threads_option

COUNT = click.IntRange(2, 1 << 40)
NAME = click.Path(path_type=Path)


@click.command(short_help="Measure on a text which inputs of a model's matrices are large.")
@click.argument("model", type=NAME)
@click.argument("text", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-o", "--output", metavar="FILE", type=NAME, required=True, help="The importance file to make (safetensors).")
@click.option("--second-moments", metavar="FILE", type=NAME, help="Also the products of inputs in blocks of 128, to this file.")
@click.option("--tokens", metavar="N", type=COUNT, help="Use at most this many tokens of the text.  [default: all]")
@click.option("--window", metavar="N", type=click.IntRange(2, 1 << 16), help="Tokens of a sequence.  [default: 512]")
@click.option("--force", is_flag=True, help="Replace FILE, and what an interrupted run left.")
@threads_option
@click.option("--quiet", is_flag=True, help="No progress bar.")
def calibrate(model, text, output, second_moments, tokens, window, force, threads, quiet):
    """Measure on a text which inputs of a model's matrices are large.

    MODEL is a Hugging Face folder or a packed store, TEXT a file in UTF-8 (-: standard input). 100,000 tokens of the kind of
    text the model is for are plenty. An interrupted run goes on when the same command is given again.
    """
    from ..calibrate import calibrate as measure

    content = read_text(text)
    with compile_notice(quiet), resumable_bar(quiet, amount=lambda count: f"{count:,.0f}") as bar:
        found = measure(
            model, content, output, tokens=tokens, window=window, threads=threads, moments=second_moments, force=force,
            progress=bar.update,
        )  # fmt: skip
    if not quiet:
        counts = found["counts"]
        seldom = f", each expert got {counts.min():,} to {counts.max():,} of them" if counts.shape[1] > 1 else ""
        say(f"{escaped(output)}: measured on {found['tokens']:,} tokens in windows of {found['window']}{seldom}")
