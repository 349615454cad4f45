"""`npmix bench`: the measurements of `npmix.benchmark`, or two saved ones side by side; the same as JSON in the last line."""

import json
from pathlib import Path

import click
from click.core import ParameterSource

from .bench_table import comparison_lines, result_lines
from .notices import compile_notice, escaped, say
from .options import Numbers, model_option, model_path

FILE = click.Path(path_type=Path)


def _check_alone(ctx, allowed=("compared", "json_file")) -> None:
    """With --compare nothing is measured: options that say what to measure are a mistake."""
    for parameter in ctx.command.params:
        if parameter.name not in allowed and ctx.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE:
            option = "/".join([parameter.opts[-1], *parameter.secondary_opts])
            raise click.UsageError(f"--compare measures nothing, so it takes no {option}.", ctx)


@click.command(short_help="Measure start, prefill and decode against the machine's ceilings.")
@model_option
@click.option("--prompt", metavar="N,N", type=Numbers(1), help="Tokens of the prompts.  [default: 16,512]")
@click.option("--depth", metavar="N,N", type=Numbers(0), help="Positions in the KV cache before decode.  [default: 0,1024]")
@click.option("--tokens", metavar="N", type=click.IntRange(1), default=64, show_default=True, help="Tokens to decode.")
@click.option("--threads", metavar="N,N", type=Numbers(1, 1024), help="Threads to compute with.  [default: physical cores]")
@click.option("--chunk", metavar="N,N", type=Numbers(1, 1 << 16), help="Prompt tokens computed at a time.  [default: 512]")
@click.option("--turns", metavar="N", type=click.IntRange(1), default=5, show_default=True, help="Measurements of each figure.")
@click.option("--kv", type=click.Choice(["f16", "f32", "q8"]), default="f16", show_default=True, help="Numbers in the KV cache.")
@click.option("--start/--no-start", default=True, help="Whether to measure cold and warm start.  [default: yes]")
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Also write the JSON to FILE.")
@click.option("--compare", "compared", nargs=2, metavar="OLD NEW", type=FILE, help="Measure nothing: compare two files of --json.")
@click.pass_context
def bench(ctx, model, prompt, depth, tokens, threads, chunk, turns, kv, start, json_file, compared):
    """Measure start, prefill and decode against the machine's ceilings.

    First the ceilings: the memory's read speed and the peaks of the int8 and float32 units. Then prefill at each length
    and chunk, and decode at each depth, on each number of threads. Each figure is a median over several turns with its
    least and most; each share is held against ceilings measured before and after it in the same turn (a model small
    enough for the caches can exceed the read speed). The ceiling of a prefill is the slower of two: its operations at the
    int8 peak, its weights read once. Outside the kernels are Python, dispatch and choosing a token.

    --compare shows each figure of two saved results, the ratio of their medians, and whether either median lies within
    the other's least and most. The last line is everything as one JSON object.
    """
    if compared:
        _check_alone(ctx)
        from ..benchmark import compare, read_result

        old, new = map(read_result, compared)
        found = compare(old, new)
        lines = comparison_lines(*compared, old, new, found)
    else:
        from ..benchmark import benchmark

        settings = {"threads": threads, "prompt": prompt, "depth": depth, "tokens": tokens, "turns": turns, "chunk": chunk, "kv": kv}
        with compile_notice():
            found = benchmark(model_path(model), **settings, start=start, report=say)
        lines = result_lines(found)
    for line in lines:
        print(escaped(line))
    text = json.dumps(found)
    print(text)
    if json_file:
        json_file.write_text(text + "\n")
