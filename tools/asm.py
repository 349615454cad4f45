"""Show a kernel's inner loop as the machine runs it, and count its instructions.

    python tools/asm.py packed q4 64 2 6          the tile of 2 row blocks x 6 tokens
    python tools/asm.py dense bf16 4 1            4 rows x 1 token
    python tools/asm.py score f16 4               attention scores of 4 query rows (also: value)

The hottest loop is taken to be the one with the most vector instructions. NUMBA_CPU_NAME, NUMBA_CPU_FEATURES
and NPMIX_FORM choose the machine and the form, as they do for npmix itself.
"""

import collections
import re

import click
import numba

from npmix.kernels import attention, tile
from npmix.kernels.cpu import form


def kernel(kind: str, args: tuple[str, ...]):
    """The tile named on the command line, and how many int64 arguments it takes."""
    if kind == "packed":
        name, group, blocks, height = args
        return tile.packed_tile(name, int(group), int(blocks), int(height)), 7
    if kind == "dense":
        name, rows, height = args
        return tile.dense_tile(name, int(rows), int(height)), 8
    kv, rows = args
    return (attention.score_tile(kv, int(rows)), 7) if kind == "score" else (attention.value_tile(kv, int(rows), 4), 9)


def assembly(tile_op, count: int) -> str:
    """The assembly of a function that only calls the tile."""
    names = [f"a{i}" for i in range(count)]
    wrappers = {
        7: lambda a, b, c, d, e, f, g: tile_op(a, b, c, d, e, f, g),
        8: lambda a, b, c, d, e, f, g, h: tile_op(a, b, c, d, e, f, g, h),
        9: lambda a, b, c, d, e, f, g, h, i: tile_op(a, b, c, d, e, f, g, h, i),
    }
    function = numba.njit((numba.int64,) * len(names))(wrappers[count])
    return next(iter(function.inspect_asm().values()))


def loops(text: str):
    """Every innermost loop: the lines between a label and a jump back to it that hold no other label's loop."""
    lines = text.splitlines()
    label_at = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\.?\w+):", line))}
    for i, line in enumerate(lines):
        jump = re.match(r"\s+(?:j\w+|b\.\w+|cbnz|tbnz)\s.*?(\.?L\w+)\s*$", line)
        if jump and label_at.get(jump.group(1), i) < i:
            body = [x.strip() for x in lines[label_at[jump.group(1)] + 1 : i + 1] if x.startswith("\t") and not x.strip().startswith(".")]
            yield body


@click.command()
@click.argument("kind", type=click.Choice(["packed", "dense", "score", "value"]))
@click.argument("args", nargs=-1, required=True)
def main(kind, args):
    """Print the inner loop and the counts of its instructions."""
    text = assembly(*kernel(kind, args))
    found = [body for body in loops(text)]
    vector = re.compile(r"[xyz]mm|\bv\d+\.")
    body = max(found, key=lambda b: sum(bool(vector.search(x)) for x in b) / (1 + 0.01 * len(b)))
    print("\n".join(body))
    counts = collections.Counter(x.split()[0] for x in body)
    print(f"\n{len(body)} instructions, form {form()}, registers: " + ", ".join(r for r in ("xmm", "ymm", "zmm") if r in text))
    print(", ".join(f"{name} {n}" for name, n in counts.most_common()))


if __name__ == "__main__":
    main()
