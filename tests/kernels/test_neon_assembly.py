"""The NEON form of the int8 dot, compiled for AArch64 on any machine: what its inner loop is made of.

One hard fact: tiles are emitted as IR before a machine is known, so LLVM's AArch64 backend shows on an x86 host what an ARM host would run.
"""

import json
import re

import llvmlite.binding as llvm
import pytest
from kernel_tools import ROOT, child

from npmix.formats import PACKED
from npmix.kernels import cpu

PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import asm
asm.aim("aarch64")
from npmix.kernels import cpu
texts = {name: asm.cross_assembly(*asm.kernel("packed", name.split()), "aarch64") for name in sys.argv[2:]}
print(json.dumps({name: (text, asm.hottest(text), asm.on_stack(asm.hottest(text))) for name, text in texts.items()}))
assert cpu.form() == "neon"
"""
TILES = ["q8 64 1 1", "q8 64 1 4", "q4 128 1 4", *(f"{name} {spec.group} 1 1" for name, spec in PACKED.items())]
# A line of 64 bytes of codes is four registers; lanes or bytes taken one by one would be these.
ONE_BY_ONE = re.compile(r"^(?:umov|smov|ins|ldrb|ldrsb|strb|ldrh|strh|[su]xtb|bfxil|[su]bfx)\b|\.[bh]\[")


def has_backend() -> bool:
    """Whether this llvmlite can compile for AArch64."""
    llvm.initialize_all_targets()
    try:
        llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        return False
    return True


pytestmark = [pytest.mark.compiled, pytest.mark.skipif(not has_backend(), reason="llvmlite has no AArch64 backend")]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Tile -> (its assembly, the instructions of its inner loop, how many of them reach for the stack)."""
    cache = tmp_path_factory.mktemp("cache")
    clear = dict.fromkeys(("NPMIX_FORM", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"))
    return json.loads(child(PROBE, cache, ROOT / "tools", *TILES, **clear).stdout)


@pytest.mark.parametrize("name", TILES)
def test_the_loop_is_made_of_dots(tiles, name):
    """16 products each, exactly as many `sdot` as the products of the loop: a group's, or where several tokens share q8's bytes, a vector's."""
    text, body, _ = tiles[name]
    format, group, blocks, height = (int(x) if x.isdigit() else x for x in name.split())
    inputs = 4 if format == "q8" and height > 1 else group
    dots = [line for line in body if line.startswith("sdot")]
    assert len(dots) == inputs * 16 * blocks * height // 16
    assert all(re.fullmatch(r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.(?:16b|4b\[\d\])", line) for line in dots)


@pytest.mark.parametrize("name", TILES)
def test_bytes_stay_in_registers(tiles, name):
    """No byte is moved by itself, nothing is called, and activations enter by loads that fill a register."""
    text, body, _ = tiles[name]
    assert not [line for line in body if ONE_BY_ONE.search(line)]
    assert PACKED[name.split()[0]].values or not [line for line in body if line.startswith("tbl")]
    assert not re.search(r"^\s+(?:bl|blr)\s", text, re.M) and "x86" not in text
    assert [line for line in body if re.match(r"ld1r\s+\{ v\d+\.4s \}|dup\s+v\d+\.4s|ldp?r?\s+q", line)]


@pytest.mark.parametrize("name", [name for name in TILES if PACKED[name.split()[0]].values])
def test_tables_are_read_a_register_at_a_time(name, tiles):
    """Codes are looked up 16 at a time: a table of 16 integers costs a register of codes one `tbl`, and so do multipliers and the spreading
    of selectors over the inputs that share them, at most; a few put a chunk's selectors into lanes. Even steps cost none."""
    _, body, _ = tiles[name]
    name, group, blocks, _ = name.split()
    spec, registers = PACKED[name], int(group) * int(blocks)
    even = spec.row(0) == tuple(range(spec.row(0)[0], spec.row(0)[-1] + 1))  # steps of 1 are an addition
    tables = 0 if even else -(-len(spec.values) * (1 << spec.bits) // 16)
    lookups = [line for line in body if line.startswith("tbl")]
    assert tables * registers <= len(lookups) <= (tables + 2) * registers + 16


@pytest.mark.parametrize(
    "name, has, implied",
    [
        ("generic", (), False),
        ("generic", ("dotprod",), True),
        ("neoverse-n1", ("neon",), True),
        ("cortex-a72", (), False),
        ("apple-m1", (), True),
    ],
)
def test_processors_that_have_the_dot(name, has, implied):
    """LLVM's list of a host's features leaves `dotprod` out; the processor's name tells."""
    assert cpu.implies_dotprod("aarch64-unknown-linux-gnu", name, frozenset(has)) is implied
