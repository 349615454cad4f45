"""`npmix bench`: the measurements of `npmix.benchmark` as a table, the same as JSON in the last line."""

import json
from pathlib import Path

import click

from .notices import compile_notice, escaped, say, size
from .options import model_option, model_path, threads_option


def _span(summary: dict, digits: int = 1) -> str:
    """Median and, in brackets, least and most."""
    return f"{summary['median']:,.{digits}f} ({summary['min']:,.{digits}f}-{summary['max']:,.{digits}f})"


def _share(summary: dict) -> str:
    return f"{100 * summary['median']:.0f} % ({100 * summary['min']:.0f}-{100 * summary['max']:.0f})"


def _lines(found: dict):
    """The report, a line at a time; figures are medians, least and most in brackets."""
    on, prefill, decode, ceilings = found["machine"], found["prefill"], found["decode"], found["ceilings"]
    yield f"machine   {on['cpu']}, {on['cores']} cores, {on['system']}, int8 form {on['int8_form']}"
    yield f"software  npmix {on['npmix']}, numba {on['numba']}, Python {on['python']}"
    yield f"model     {found['model']}: {found['layers']} layers, {found['format']}"
    yield f"setting   {found['threads']} threads, prompt of {prefill['tokens']} tokens, chunk {found['chunk']}, KV cache {found['kv']}"
    if "start" in found:
        start, memory = found["start"], found["memory"]
        yield f"start     cold {start['cold_s']:.2f} s, warm {start['warm_s']:.2f} s to the first token ({start['what']})"
        if memory["anonymous"] is not None:
            yield f"memory    {size(memory['anonymous'])} anonymous, {size(memory['held']['kv_cache'])} of it the KV cache"
    yield f"ceilings  memory read {_span(ceilings['read_gbs'])} GB/s, int8 {_span(ceilings['int8_gops'], 0)} GOP/s"
    yield (
        f"prefill   {_span(prefill['tokens_per_s'])} tok/s, {prefill['operations_per_token'] / 1e9:.3f} GOP a token,"
        f" {_span(prefill['gops'])} GOP/s, {_share(prefill['share_of_int8'])} of the int8 peak"
    )
    yield (
        f"decode    {_span(decode['tokens_per_s'])} tok/s, {size(decode['bytes_per_token'])} a token,"
        f" {_span(decode['gbs'])} GB/s, {_share(decode['share_of_read'])} of memory read"
    )


@click.command(short_help="Measure start, prefill and decode against the machine's ceilings.")
@model_option
@threads_option
@click.option("--prompt", metavar="N", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", metavar="N", type=click.IntRange(1), default=64, show_default=True, help="Tokens to decode.")
@click.option("--turns", metavar="N", type=click.IntRange(1), default=5, show_default=True, help="Measurements of each figure.")
@click.option("--chunk", metavar="N", type=click.IntRange(1), help="Prompt tokens computed at a time.")
@click.option("--kv", type=click.Choice(["f16", "f32"]), default="f16", show_default=True, help="Numbers in the KV cache.")
@click.option("--start/--no-start", default=True, help="Whether to measure cold and warm start.  [default: yes]")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Also write the JSON to FILE.")
def bench(model, threads, prompt, tokens, turns, chunk, kv, start, json_file):
    """Measure start, prefill and decode against the machine's ceilings.

    Each speed is a median over several turns with its least and most; each share is held against the memory's read speed
    or the int8 peak measured in the same turn (a model small enough for the caches can exceed it). The last line is
    everything as one JSON object.
    """
    from ..benchmark import benchmark

    with compile_notice():
        found = benchmark(
            model_path(model), threads=threads, prompt=prompt, tokens=tokens, turns=turns, chunk=chunk, kv=kv, start=start, report=say
        )
    for line in _lines(found):
        print(escaped(line))
    text = json.dumps(found)
    if json_file:
        json_file.write_text(text + "\n")
    print(text)
