"""Show a kernel's inner loop as the machine runs it, and count its instructions.

    python tools/asm.py packed q4 128 2 6         the tile of 2 row blocks x 6 tokens
    python tools/asm.py dense bf16 4 1            4 rows x 1 token
    python tools/asm.py score f16 4               attention scores of 4 query rows (also: value)
    python tools/asm.py digits 4                  4 rows of digits x 32 lanes of 8-bit keys or values
    python tools/asm.py --target aarch64 packed q4 128 1 4      the same for a machine that is not here (the NEON form)

The hottest loop is taken to be the one with the most vector instructions. NUMBA_CPU_NAME, NUMBA_CPU_FEATURES
and NPMIX_FORM choose the machine and the form, as they do for npmix itself; npmix is imported once they are settled.

One hard fact: a tile is emitted as IR before any machine is known, so another machine's backend compiles it as well;
Numba's own -O3 passes are repeated here, without the wrapper it puts around a function.
"""

import collections
import re

import click
import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import config
from numba.core.registry import cpu_target

TARGETS = {"aarch64": ("aarch64-unknown-linux-gnu", "generic", "+neon,+dotprod")}  # triple, CPU and features when none are asked for


def aim(target: str) -> None:
    """Have npmix choose its form for another machine. Only before npmix's tiles are imported, and nothing can be run here then."""
    _, name, features = TARGETS[target]
    cpu_target.target_context  # Numba's own compiler, which npmix's import touches, is made for this machine first
    config.CPU_NAME, config.CPU_FEATURES = config.CPU_NAME or name, config.CPU_FEATURES or features
    from npmix.kernels import cpu

    cpu.is_x86 = lambda: False


def kernel(kind: str, args: tuple[str, ...]):
    """The tile named on the command line, and how many int64 arguments it takes."""
    from npmix.kernels import attention, digits, tile

    if kind == "packed":
        name, group, blocks, height = args
        return tile.packed_tile(name, int(group), int(blocks), int(height)), 9
    if kind == "dense":
        name, rows, height = args
        return tile.dense_tile(name, int(rows), int(height)), 8
    if kind == "digits":
        return digits.digit_tile(int(args[0]), attention.fetching(int(args[0]))), 9
    kv, rows = args
    return (attention.score_tile(kv, int(rows)), 7) if kind == "score" else (attention.value_tile(kv, int(rows), 4), 9)


def assembly(tile_op, count: int) -> str:
    """The assembly of a function that is only the tile, emitted in place."""
    tile_op = getattr(tile_op, "inner", tile_op)
    names = [f"a{i}" for i in range(count)]
    wrappers = {
        7: lambda a, b, c, d, e, f, g: tile_op(a, b, c, d, e, f, g),
        8: lambda a, b, c, d, e, f, g, h: tile_op(a, b, c, d, e, f, g, h),
        9: lambda a, b, c, d, e, f, g, h, i: tile_op(a, b, c, d, e, f, g, h, i),
    }
    function = numba.njit((numba.int64,) * len(names))(wrappers[count])
    return next(iter(function.inspect_asm().values()))


def cross_assembly(tile_op, count: int, target: str) -> str:
    """The assembly of the tile as a function, compiled for a machine that need not be here."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = TARGETS[target][0]
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=config.CPU_NAME, features=config.CPU_FEATURES, opt=3)
    module = ir.Module("tile")
    module.triple, module.data_layout = triple, str(machine.target_data)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * count), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    getattr(tile_op, "inner", tile_op).emit(builder, *function.args)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def loops(text: str):
    """Every innermost loop: the lines between a label and a jump back to it that hold no other label's loop."""
    lines = text.splitlines()
    label_at = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\.?\w+):", line))}
    for i, line in enumerate(lines):
        jump = re.match(r"\s+(?:j\w+|b\.\w+|cbn?z|tbn?z)\s.*?(\.?L\w+)\s*$", line)
        if jump and label_at.get(jump.group(1), i) < i:
            body = [x.strip() for x in lines[label_at[jump.group(1)] + 1 : i + 1] if x.startswith("\t")]
            yield [x for x in body if not x.startswith((".", "#", "//"))]  # directives, and the fences that hold only the compiler


def hottest(text: str) -> list[str]:
    """The loop with the most vector instructions."""
    vector = re.compile(r"[xyz]mm|\bv\d+\.")
    return max(loops(text), key=lambda b: sum(bool(vector.search(x)) for x in b) / (1 + 0.01 * len(b)))


def on_stack(body: list[str]) -> int:
    """How many instructions of a loop reach for the stack: registers that were spilled."""
    return sum(bool(re.search(r"\[sp\b|\(%r[sb]p", x)) for x in body)


@click.command()
@click.argument("kind", type=click.Choice(["packed", "dense", "score", "value", "digits"]))
@click.argument("args", nargs=-1, required=True)
@click.option("--target", type=click.Choice(list(TARGETS)), help="Compile for this machine instead; NUMBA_CPU_NAME picks its CPU.")
def main(kind, args, target):
    """Print the inner loop and the counts of its instructions."""
    if target:
        aim(target)
    made = kernel(kind, args)
    text = cross_assembly(*made, target) if target else assembly(*made)
    from npmix.kernels.cpu import form

    body = hottest(text)
    print("\n".join(body))
    counts = collections.Counter(x.split()[0] for x in body)
    print(f"\n{len(body)} instructions, {on_stack(body)} with the stack, form {form()}, registers: ", end="")
    print(", ".join(r for r in ("xmm", "ymm", "zmm") if r in text) or ", ".join(sorted(set(re.findall(r"\bv\d+\.(\w+)", text)))))
    print(", ".join(f"{name} {n}" for name, n in counts.most_common()))


if __name__ == "__main__":
    main()
