"""`npmix plan`: what a model takes of memory in every width, what of it fits, and how fast it would run.

One hard fact: nothing is loaded and, without --measure, Numba is not imported, so the answer comes at once.
"""

import json
from pathlib import Path

import click

from .convert import QUANTS
from .notices import compile_notice, escaped, size
from .options import Choices, Number, Numbers, threads_option

GIB = 1 << 30
ANSWERS = {"fits": "all", "streams": "{hits} % of the experts", "too small": "no, it needs {least}"}


def _speed(value: float, source: str) -> str:
    return f"{value / 1e9:.1f} GB/s ({source})"


def _lines(found: dict):
    """The report, a line at a time."""
    config, first = found["config"], found["rows"][0]
    experts = f"{config['n_experts']} experts, {config['n_active']} a token" if config["has_router"] else "dense"
    yield f"model    {found['model']}: {config['n_layers']} layers, {experts}"
    yield f"memory   {found['ram'] / GIB:.2f} GiB ({found['ram_is']}), {size(first['program'])} and more of it for Python, libraries and page tables"
    speeds = [f"{what} {_speed(found[f'{what}_speed'], found[f'{what}_speed_is'])}" for what in ("memory", "disk")]
    yield f"reading  {', '.join(speeds)}, {100 * found['share']:.0f} % of them used"
    head = ["width", "weights", "in all", "in memory", "from disk a token", "tokens/s"]
    first_column = max(len(_width(row)) for row in found["rows"])
    group = None
    for row in found["rows"]:
        if group != (row["context"], row["kv"]):
            group = row["context"], row["kv"]
            yield ""
            yield f"{row['context']:,} positions, KV cache {row['kv']} {size(row['kv_cache'])}, scratch {size(row['scratch'])}"
            yield _cells(first_column, head)
        answer = ANSWERS[row["verdict"]].format(hits=int(100 * row["hits"]), least=size(row["least"]))
        speed = ["", ""] if row["tokens_per_s"] is None else [size(row["disk_per_token"]), f"{row['tokens_per_s']:.3g}"]
        yield _cells(first_column, [_width(row), size(row["weights"]), size(row["total"]), answer, *speed])


def _width(row: dict) -> str:
    return f"as it is ({row['width']})" if row["own"] else row["width"]


def _cells(first: int, words: list[str]) -> str:
    """A line of the table; `first`: characters of the first column."""
    return "".join(f"{word:{width}}" for word, width in zip(words, (f"<{max(first, 5)}", ">12", ">12", ">24", ">19", ">10"))).rstrip()


def _measure(found, threads: int, memory: float | None, disk: float | None) -> tuple[float, float]:
    """Both speeds in bytes a second, those that were not given measured; the disk's on the model's largest file."""
    from ..benchmark import disk_speed
    from ..kernels.ceilings import read_bandwidth

    if memory is None:
        with compile_notice():
            memory = read_bandwidth(threads) * 1e9
    if disk is None:
        files = [file for file in Path(found.name).glob("*.safetensors") if file.is_file()]
        disk = disk_speed(max(files, key=lambda file: file.stat().st_size, default=None))
    return memory, disk


@click.command(short_help="Show what a model takes of memory in every width, and how fast it would run.")
@click.argument("model", default="mixtral-8x7b")
@click.option("--ram", metavar="SIZE", default="auto", help="Memory for all: 16G, a share as 0.5, auto.  [default: what can be had now]")
@click.option("--context", metavar="N,N", type=Numbers(1), help="Positions of the KV cache.  [default: 4096,32768]")
@click.option("--kv", metavar="X,X", type=Choices(["f16", "f32", "q8"]), default=("f16", "q8"), help="Numbers in it.  [default: f16,q8]")
@click.option("--quant", metavar="X,X", type=Choices(QUANTS), default=QUANTS, help="Widths to show.  [default: all]")
@threads_option
@click.option("--measure", is_flag=True, help="Measure how fast memory and disk are read.")
@click.option("--bandwidth", metavar="GB/S", type=Number(0, 1e6, above=True), help="How fast memory is read.  [default: 20]")
@click.option("--disk", metavar="GB/S", type=Number(0, 1e6, above=True), help="How fast the disk is read.  [default: 1]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def plan(model, ram, context, kv, quant, threads, measure, bandwidth, disk, as_json):
    """Show what a model takes of memory in every width, and how fast it would run.

    MODEL is a packed store, a Hugging Face folder, or, without any files, mixtral-8x7b or mistral-7b. For every context, kind of
    KV cache and width: the weights, everything together, whether it fits, and else how many of the experts stay in
    memory, what a token reads of the others from the disk, and the tokens per second that this allows with a full
    context, if all experts are chosen equally often. A packed store's own sizes stand first. Speeds of memory and disk are
    given, measured with --measure (the disk's on a file of the model, or on a temporary one in the current folder), or assumed.
    """
    from .. import budget, planner
    from ..threads import default_threads

    found, threads = planner.find_model(model), threads or default_threads()
    given = [None if speed is None else speed * 1e9 for speed in (bandwidth, disk)]
    known = _measure(found, threads, *given) if measure else given
    memory, disk = (value or default for value, default in zip(known, (planner.MEMORY_SPEED, planner.DISK_SPEED)))
    result = planner.plan(found, budget.in_bytes(ram), threads, contexts=context, kvs=kv, widths=quant, memory=memory, disk=disk)
    result["ram_is"] = "what can be had now" if budget.parse(ram) == "auto" else "given"
    for what, speed in zip(("memory", "disk"), given):
        result[f"{what}_speed_is"] = "given" if speed else "measured" if measure else "assumed"
    if as_json:
        print(json.dumps(result))
        return
    for line in _lines(result):
        print(escaped(line))
