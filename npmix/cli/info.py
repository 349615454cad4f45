"""`npmix info`: what lies in a model's folder, as a table or as JSON."""

import json
from pathlib import Path

import click

from .notices import escaped, size
from .options import model_path


def _lines(found: dict):
    """The report, a line at a time."""
    config = found["config"]
    yield f"path       {found['path']}"
    recipe = f", {found['recipe']['name']}" if found["recipe"] else ""
    yield f"kind       {found['kind']}{recipe}{', instruct' if found['is_instruct'] else ''}"
    if found["source"]:
        yield f"source     {found['source']['name']} ({found['source']['kind']})"
    yield (
        f"shape      {config['n_layers']} layers, dim {config['dim']}, {config['n_heads']} heads of {config['head_dim']},"
        f" {config['n_kv_heads']} for keys and values"
    )
    experts = f"{config['n_experts']} experts, {config['n_active']} a token, " if config["has_router"] else "dense, "
    yield f"           {experts}hidden {config['hidden_dim']}, vocabulary {config['vocab_size']}"
    window = f", sliding window {config['sliding_window']}" if config["sliding_window"] else ""
    yield f"positions  {config['max_positions']}{window}, rope theta {config['rope_theta']:g}"
    yield f"tokenizer  {found['tokenizer'] or 'none'}"
    yield f"digests    {found['digests']}"
    yield ""
    yield f"{'weights':<12}{'tensors':>8}{'count':>16}{'size':>12}{'bits':>8}  formats"
    rows = [*found["weights"].items(), ("total", {**found["total"], "formats": []})]
    for kind, row in rows:
        formats = ", ".join(row["formats"])
        counts = f"{kind:<12}{row['tensors']:>8}{row['weights']:>16,}"
        yield f"{counts}{size(row['bytes']):>12}{row['bits_per_weight']:>8.2f}  {formats}".rstrip()


@click.command(short_help="Show a model's config, weights by kind and sizes.")
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def info(folder, as_json):
    """Show a model's config, weights by kind and sizes.

    DIR is a Hugging Face folder or a packed store; the bundled model if none is given.
    """
    from ..convert import info as describe

    found = describe(model_path(folder))
    if as_json:
        print(json.dumps(found))
        return
    for line in _lines(found):
        print(escaped(line))
