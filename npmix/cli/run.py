"""`npmix run`: a prompt in, text on stdout as it is made, one line of figures on stderr.

One hard fact: stdout carries the text and nothing else but the line end that a text without one gets, so it can go into a
file or a pipe; what is said to a person goes to stderr.
"""

import json
import sys
from pathlib import Path

import click

from .. import __version__
from ..errors import InputError
from .interrupts import INTERRUPTED, Interrupts
from .notices import compile_notice, disk_notice, say
from .options import Number, engine_options, memory_options, model_option, read_text
from .output import figures, follow, write

SEED = click.IntRange(0, (1 << 64) - 1)
COUNT = click.IntRange(1, (1 << 31) - 1)


def read_prompt(prompt, file) -> str | None:
    """The prompt from the argument, the file or standard input; None on a terminal: a session. Text is taken as it is."""
    if prompt is not None and file is not None:
        raise click.UsageError("Give the prompt as an argument or with --file, not both.")
    if prompt is not None:
        return prompt
    if file is None:
        if sys.stdin is None:  # a program without a console
            return ""
        if sys.stdin.isatty():
            return None
    return read_text(file or "-")


def sampling_options(command):
    """How tokens are chosen, and when the text ends."""
    for option in (
        click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
        click.option("--seed", metavar="N", type=SEED, help="Same seed, same text.  [default: random, shown on stderr]"),
        click.option("--repetition-penalty", type=Number(0.01, 100), default=1.0, help="Above 1: less of what was said.  [default: 1]"),
        click.option("--min-p", type=Number(0, 1), default=0.0, help="Drop tokens below this share of the best one's probability."),
        click.option("--top-p", type=Number(1e-6, 1), help="Choose among the likeliest that sum to this.  [default: 0.95]"),
        click.option("--top-k", metavar="N", type=click.IntRange(0), default=0, help="Choose among this many; 0: all.  [default: 0]"),
        click.option("--temperature", type=Number(0, 100), help="0: always the likeliest.  [default: bundled model 0, else 0.7]"),
        click.option("-n", "--max-tokens", metavar="N", type=COUNT, default=256, show_default=True, help="Tokens to make at most."),
    ):
        command = option(command)
    return command


@click.command(short_help="Print the text that a model continues or answers a prompt with.")
@click.argument("prompt", required=False)
@model_option
@click.option("--file", type=click.Path(path_type=Path, allow_dash=True), help="Read the prompt from this file (UTF-8); -: standard input.")
@click.option("--chat", is_flag=True, help="The prompt is a question to an instruct model.")
@sampling_options
@engine_options
@memory_options
@click.option("--echo", is_flag=True, help="Print the prompt before the text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, ids, stop reason and timings.")
@click.option("--quiet", is_flag=True, help="Nothing on stderr but errors and warnings.")
@click.version_option(__version__, message="npmix %(version)s")
def run(prompt, model, file, chat, threads, context, chunk, kv, ram, load, echo, as_json, quiet, **sampling):
    """Print the text that a model continues or answers a prompt with.

    PROMPT comes from the argument, from --file or from standard input. With none of them on a terminal a session starts:
    chat on an instruct model, else each line goes on with the text.
    """
    text = read_prompt(prompt, file)
    if text is None and (as_json or echo):
        raise click.UsageError("--json and --echo need a prompt.")
    if text == "":
        raise InputError("the prompt is empty: give some text")
    settings = {**sampling, "stop": list(sampling["stop"])}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    import npmix

    options = {"threads": threads, "context": context, "chunk": chunk, "kv": kv, "ram": ram, "load": load}
    with compile_notice(quiet), npmix.load(model, **options) as loaded:
        if text is None:
            from .session import converse

            converse(loaded, chat, settings, quiet)
        else:
            run_once(loaded, text, chat, settings, echo, as_json, quiet)


def run_once(model, prompt, chat, settings, echo, as_json, quiet):
    """One text: stream it to stdout, or collect it for the JSON object."""
    interrupts = Interrupts()
    settings = {**settings, "on_progress": interrupts.check}
    stream = model.chat_stream([{"role": "user", "content": prompt}], **settings) if chat else model.stream(prompt, **settings)
    pieces = [prompt] if echo else []
    if echo and not as_json:
        write(prompt)
    with disk_notice(model, interrupts, quiet) as arrived:
        for piece in follow(stream, interrupts):
            arrived()
            pieces.append(piece)
            if not as_json:
                write(piece)
    if as_json:
        write(json.dumps(report(model, "".join(pieces), stream.stats)) + "\n")
    elif pieces and not pieces[-1].endswith("\n"):
        write("\n")
    if not quiet:
        say(figures(stream.stats, settings["seed"] is None))
    if interrupts.asked:
        click.get_current_context().exit(INTERRUPTED)


def report(model, text: str, stats) -> dict:
    """What --json prints."""
    from ..benchmark import anonymous_memory, peak_memory

    return {
        "text": text,
        **stats.to_dict(),
        "model": str(model.engine.source.path),
        "threads": model.engine.threads,
        "peak_memory": peak_memory(),
        "anonymous_memory": anonymous_memory(),
    }
