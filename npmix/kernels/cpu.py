"""Which form of the int8 dot this machine gets, from the features Numba compiles for.

One hard fact: the features are Numba's, not the CPU's: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES
choose the form too, so the AVX2 form can be tested on an AVX-512 machine. NPMIX_FORM names one outright.
"""

import contextlib
import functools
import os
import platform
import sys

import llvmlite.binding as llvm
from numba.core import config

from ..errors import ConfigError

# Form -> the target features it needs, the best first.
NEEDS = {
    "avx512vnni": {"avx512vnni", "avx512bw", "avx512vl", "avx512f"},
    "avxvnni": {"avxvnni", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "neon": {"dotprod"},
    "plain": set(),
}
FORMS = tuple(NEEDS)


@functools.lru_cache(maxsize=None)
def features() -> frozenset[str]:
    """The target features that Numba compiles for, without their plus signs."""
    if config.CPU_FEATURES is not None:
        text = config.CPU_FEATURES
        return frozenset(part[1:] for part in text.split(",") if part.startswith("+"))
    try:
        found = frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)
    except RuntimeError:  # LLVM knows no features of this host
        found = frozenset()
    if not is_x86():
        with contextlib.suppress(RuntimeError):  # an LLVM without a backend for its own host
            if implies_dotprod(llvm.get_default_triple(), cpu_name(), found):
                return found | {"dotprod"}
    return found


def cpu_name() -> str:
    """The processor that Numba compiles for, as LLVM names it."""
    return config.CPU_NAME or llvm.get_host_cpu_name()


_DOT_OF_BYTES = """
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define i32 @dot(<16 x i8> %a, <16 x i8> %b) {
  %x = sext <16 x i8> %a to <16 x i32>
  %y = sext <16 x i8> %b to <16 x i32>
  %p = mul <16 x i32> %x, %y
  %s = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %p)
  ret i32 %s
}
"""


def implies_dotprod(triple: str, name: str, has: frozenset[str]) -> bool:
    """Whether LLVM uses sdot on this ARM processor: it does not list `dotprod` among a host's features, the name implies it."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    text = ",".join(f"+{feature}" for feature in sorted(has))
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=text, opt=2)
    return "sdot" in machine.emit_assembly(llvm.parse_assembly(_DOT_OF_BYTES))


def llvm_major() -> int:
    return llvm.llvm_version_info[0]


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def is_windows() -> bool:
    return sys.platform == "win32"


def prefetching() -> str:
    """How far ahead software should ask for weights that one token reads: "far" (AMD's cores from Zen 5 on: one thread reads
    q4 a quarter faster), "near" (Intel's, 5-10 %) or "none" (AMD's before: it cost a quarter of the speed; ARM's: not tried).

    The host decides, whichever processor NUMBA_CPU_NAME makes Numba compile for.
    """
    host = llvm.get_host_cpu_name()
    if not is_x86() or host.startswith(("bdver", "btver")):
        return "none"
    zen = host.removeprefix("znver")
    if zen == host:
        return "near"
    return "far" if zen.isdigit() and int(zen) >= 5 else "none"


def multishift_takes_dots_ports() -> bool:
    """Whether selecting bits of each byte (vpmultishiftqb) goes through the ports of the int8 dot, as on AMD's cores from Zen 5 on: beside
    dots it takes half a cycle there, where a shift and a shuffle of bytes take 0.11 together.
    """
    return prefetching() == "far"


def looks_up_bytes() -> bool:
    """Whether one instruction reads any of 128 bytes by index in each byte (AVX-512 VBMI), beside the widest form."""
    return form() == "avx512vnni" and "avx512vbmi" in features()


def wide_registers() -> bool:
    """Whether there are 32 registers of 16 lanes (AVX-512), not 16 or 32 narrower ones."""
    return is_x86() and "avx512f" in features()


_wrong: set[str] = set()


def distrust(name: str) -> None:
    """Never choose this form again in this process: it gave wrong results."""
    _wrong.add(name)


def form() -> str:
    """The best form whose instructions the target has, or the one NPMIX_FORM names; "plain" in place of a wrong one."""
    best = _best_form()
    return "plain" if best in _wrong else best


@functools.lru_cache(maxsize=None)
def _best_form() -> str:
    has, forced = features(), os.environ.get("NPMIX_FORM")
    if not forced:
        return next(name for name, needs in NEEDS.items() if needs <= has)
    if forced not in FORMS:
        raise ConfigError(f"NPMIX_FORM is {forced!r}, expected one of {', '.join(FORMS)}")
    missing = NEEDS[forced] - has
    if forced == "avxvnni" and NEEDS["avx512vnni"] <= has:
        missing = set()  # the same instruction on AVX-512's narrow registers
    if missing:
        raise ConfigError(f"NPMIX_FORM is {forced!r}, but the CPU lacks {', '.join(sorted(missing))}; leave it unset to get the best form")
    return forced
