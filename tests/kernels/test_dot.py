"""The int8 dot: every form that this CPU can run gives the plain integers.

One hard fact: the form is asked for when a kernel is compiled, so one process can compile all of them; `test_forms.py`
compiles whole kernels for lesser CPUs in processes of their own.
"""

import numpy as np
import pytest
from kernel_tools import Memory, memory

from npmix.errors import ConfigError
from npmix.kernels import cpu
from npmix.kernels._jit import njit
from npmix.kernels.dot import FLOAT, SMALL, START, emit_dot4, emit_dot_start, emit_less, emit_scaled, emit_splat4
from npmix.kernels.simd import const_i64, emit_load_f16, i64, load, op, store, vector, void

COUNT = 2000
EDGES = [0, 1, 15, 127, 128, 129, 254, 255]


def runnable(form):
    """Whether this CPU has what a form needs."""
    has = cpu.features()
    return {
        "plain": True,
        "avx2": cpu.is_x86() and "avx2" in has,
        "avxvnni": cpu.is_x86() and bool({"avxvnni"} <= has or {"avx512vnni", "avx512vl"} <= has),
        "avx512vnni": cpu.is_x86() and {"avx512vnni", "avx512vl", "avx512bw"} <= has,
        "neon": not cpu.is_x86() and "dotprod" in has,
    }[form]


FORMS = [form for form in cpu.FORMS if runnable(form)]


def dots(form, offset, monkeypatch):
    """A compiled loop: 16 accumulators start from a group's sum, then take four vectors of codes, each against four inputs."""
    monkeypatch.setattr(cpu, "form", lambda: form)

    def emit(builder, total, acc, codes, inputs, out):
        value = emit_dot_start(builder, total, offset)
        value = builder.add(value, load(builder, acc, vector("i32", 16)))
        for i in range(4):
            line = load(builder, builder.add(codes, const_i64(64 * i)), vector("i8", 64))
            value = emit_dot4(builder, value, line, emit_splat4(builder, builder.add(inputs, const_i64(4 * i))), offset)
        store(builder, value, out)

    one = op(void, (i64,) * 5, None)(emit)

    @njit
    def run(count, total, acc, codes, inputs, out):
        for i in range(count):
            one(total + 4 * i, acc + 64 * i, codes + 256 * i, inputs + 16 * i, out + 64 * i)

    run.compile("void(int64, int64, int64, int64, int64, int64)")  # while the form is patched
    return run


@pytest.mark.compiled
@pytest.mark.parametrize("offset", [128, SMALL])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_plain_integers(form, offset, monkeypatch):
    """FLOAT + acc + sum of (code - offset) * input over 16 inputs, for random and edge codes and inputs, in each lane, exactly. Codes
    with the smaller offset stay below 128."""
    rng, top = np.random.default_rng(128), 2 * offset - 1
    codes = rng.integers(0, top + 1, (COUNT, 4, 16, 4)).astype(np.uint8)
    codes[: COUNT // 2] = rng.choice([edge for edge in EDGES if edge <= top], (COUNT // 2, 4, 16, 4))
    x = rng.integers(-127, 128, (COUNT, 4, 4)).astype(np.int8)
    x[::2] = rng.choice([-127, 0, 127], (COUNT // 2, 4, 4))
    codes[0], x[0] = 0, 127
    codes[1], x[1] = 0, -127
    codes[2], x[2] = top, 127
    codes[3], x[3] = top, -127
    acc = rng.integers(-(2**24), 2**24, (COUNT, 16)).astype(np.int32)
    total = FLOAT + START * x.astype(np.int32).sum((1, 2), dtype=np.int32)
    places = [memory(a) for a in (total, acc, codes, x)]
    out = Memory((COUNT, 16), np.int32)
    dots(form, offset, monkeypatch)(COUNT, *(place.at for place in places), out.at)
    exact = FLOAT + acc + np.einsum("nirj,nij->nr", codes.astype(np.int64) - offset, x.astype(np.int64))
    assert (out.array == exact).all() and out.intact()


def scaled():
    """A compiled loop: an accumulator's integer times a float16 scale."""

    def emit(builder, acc, scale, out):
        wide = emit_load_f16(builder, scale)
        store(builder, emit_scaled(builder, load(builder, acc, vector("i32", 16)), wide, emit_less(builder, wide)), out)

    one = op(void, (i64,) * 3, None)(emit)

    @njit
    def run(count, acc, scale, out):
        for i in range(count):
            one(acc + 64 * i, scale + 32 * i, out + 64 * i)

    return run


@pytest.mark.compiled
def test_scaled_integers_are_rounded_once():
    """float32(integer * scale), for integers up to those of the largest group (128 products of 128 * 127) and below 2^22, and any
    float16 scale, the largest, the smallest and negative ones included."""
    rng, largest = np.random.default_rng(7), 128 * 128 * 127
    whole = rng.integers(-(2**22) + 1, 2**22, (COUNT, 16), dtype=np.int32)
    whole[::2] = rng.choice([0, 1, -1, largest, -largest, 2**22 - 1, 1 - 2**22], (COUNT // 2, 16))
    scale = (rng.standard_normal((COUNT, 16)) * 10.0 ** rng.integers(-7, 4, (COUNT, 16))).astype(np.float16)
    scale[:3], scale[3:6], scale[6:9] = 65504, -65504, 6e-8
    acc, halves, out = memory((FLOAT + whole).astype(np.int32)), memory(scale), Memory((COUNT, 16), np.float32)
    scaled()(COUNT, acc.at, halves.at, out.at)
    exact = whole.astype(np.float64) * scale.astype(np.float64)  # 22 and 11 bits: exact
    assert (out.array == exact.astype(np.float32)).all() and out.intact()


def test_the_form_follows_the_features(monkeypatch):
    """The best form whose instructions Numba compiles for; NPMIX_FORM names one outright; one the CPU lacks or nobody knows is refused."""
    monkeypatch.delenv("NPMIX_FORM", raising=False)
    monkeypatch.setattr(cpu, "_best_form", cpu._best_form.__wrapped__)
    ask = cpu.form
    vnni = {"avx512vnni", "avx512bw", "avx512vl", "avx512f"}
    base = {"avx2", "fma", "f16c"}
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    for has, expected in (
        (vnni | base, "avx512vnni"),
        (vnni - {"avx512vl"} | base, "avx2"),
        (base | {"avxvnni"}, "avxvnni"),
        (base, "avx2"),
        (base - {"f16c"}, "plain"),
        (set(), "plain"),
    ):
        monkeypatch.setattr(cpu, "features", lambda has=has: frozenset(has))
        assert ask() == expected
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    for has, expected in (({"dotprod"}, "neon"), (set(), "plain")):
        monkeypatch.setattr(cpu, "features", lambda has=has: frozenset(has))
        assert ask() == expected
    monkeypatch.setenv("NPMIX_FORM", "avx2")
    with pytest.raises(ConfigError, match="avx2.*lacks.*fma"):
        ask()
    monkeypatch.setattr(cpu, "features", lambda: frozenset(vnni | base))
    for forced in ("avx2", "avxvnni"):  # AVX-512 has AVX-VNNI's instruction too
        monkeypatch.setenv("NPMIX_FORM", forced)
        assert ask() == forced
    monkeypatch.setenv("NPMIX_FORM", "sse9")
    with pytest.raises(ConfigError, match="sse9.*plain"):
        ask()


def test_prefetching_follows_the_host(monkeypatch):
    """AMD's cores change with Zen 5, whatever comes after is taken to be like it, Intel's are all alike, and no ARM was tried."""
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    hosts = {
        "znver1": "none",
        "znver4": "none",
        "znver5": "far",
        "znver10": "far",
        "bdver4": "none",
        "cascadelake": "near",
        "x86-64": "near",
    }
    for host, expected in hosts.items():
        monkeypatch.setattr(cpu.llvm, "get_host_cpu_name", lambda host=host: host)
        assert cpu.prefetching() == expected, host
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.prefetching() == "none"


def test_a_distrusted_form_is_not_chosen(monkeypatch):
    """A form that gave wrong results in this process gives way to the plain one."""
    monkeypatch.setattr(cpu, "_wrong", set())
    best = cpu.form()
    cpu.distrust(best)
    assert cpu.form() == "plain"
