"""Vector types and the operations on them: the words in which kernels are written.

One hard fact: Numba types int32 * int32 as int64 and so never vectorises integer loops; a type
whose data model is an LLVM vector stays in registers and gives the code a C programmer would write.

Here are the types, the way to make an operation, and the words for kernels that emit an inner loop
themselves; `ops.py` holds the operations and `dot.py` the int8 dot. llvmlite is used here alone.

Everything is 16 logical lanes (F32, I32) or 64 bytes (U8), whatever the machine's registers: LLVM
splits them, so AVX2, AVX-512 and NEON give equal bits. Only the int8 dot has machine forms. Each operation
is written twice: as LLVM IR, and as its NumPy twin, which runs when Numba's JIT is disabled.
Memory is named by address (int64). Loads and stores need no alignment.
"""

import ctypes

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from ._jit import DISABLED

_i8, _i16, _i32, _i64, _f32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
LANES = 16


class _Vector(types.Type):
    """A Numba type for one LLVM vector value."""

    def __init__(self, name, element, lanes):
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=f"simd.{name}")


class _F32(_Vector):
    def __init__(self):
        super().__init__("F32", _f32, 16)


class _I32(_Vector):
    def __init__(self):
        super().__init__("I32", _i32, 16)


class _U8(_Vector):
    def __init__(self):
        super().__init__("U8", _i8, 64)


@register_model(_F32)
@register_model(_I32)
@register_model(_U8)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


F32, I32, U8 = _F32(), _I32(), _U8()
i64, i32, f32, void = types.int64, types.int32, types.float32, types.void


def op(ret, args, twin):
    """Make an operation from its IR emitter: decorate `emit(builder, *values)`; `twin` is the same in NumPy."""

    def wrap(emit):
        if DISABLED:
            return twin
        signature = ret(*args)

        def codegen(context, builder, _signature, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if ret is void else value

        # Numba reads the number of arguments off the function itself
        shapes = {
            0: lambda typingctx: (signature, codegen),
            1: lambda typingctx, a: (signature, codegen),
            2: lambda typingctx, a, b: (signature, codegen),
            3: lambda typingctx, a, b, c: (signature, codegen),
            4: lambda typingctx, a, b, c, d: (signature, codegen),
            5: lambda typingctx, a, b, c, d, e: (signature, codegen),
            6: lambda typingctx, a, b, c, d, e, f: (signature, codegen),
            7: lambda typingctx, a, b, c, d, e, f, g: (signature, codegen),
            8: lambda typingctx, a, b, c, d, e, f, g, h: (signature, codegen),
            9: lambda typingctx, a, b, c, d, e, f, g, h, i: (signature, codegen),
        }
        made = intrinsic(shapes[len(args)])
        made.twin, made.emit, made.arity = twin, emit, len(args)  # tests hold one to the other; tools compile the IR for other machines
        return made

    return wrap


# ---- the same words for kernels that emit their inner loop themselves ---------------------------


def scalar(element):
    """An LLVM number type by its short name."""
    return {
        "f16": ir.HalfType(),
        "f32": _f32,
        "f64": ir.DoubleType(),
        "i1": ir.IntType(1),
        "i8": _i8,
        "i16": _i16,
        "i32": _i32,
        "i64": _i64,
        "void": ir.VoidType(),
    }[element]


def vector(element, lanes):
    """An LLVM vector type."""
    return ir.VectorType(scalar(element), lanes)


def const_i64(value):
    return ir.Constant(_i64, value)


def const_i32(value):
    return ir.Constant(_i32, value)


def const_vector(element, lanes, value):
    """A constant vector: one value in every lane, or a list of them."""
    return ir.Constant(vector(element, lanes), value if isinstance(value, list) else [value] * lanes)


def load(builder, address, kind, align=1):
    """Load a value of LLVM type `kind` from an i64 address."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store(builder, value, address, align=1):
    done = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    done.align = align


def call(builder, name, ret, *values):
    """Call an LLVM intrinsic or an external C function by name."""
    kind = ir.FunctionType(ret, [v.type for v in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def add_symbol(name, address):
    """Let code that is linked from now on call what lies at an address by name."""
    binding.add_symbol(name, address)


def prefetch(builder, address, keep=3):
    """Ask for a cache line that will be read soon; past the end of memory it does no harm.

    keep: into all caches (3), all but the first (2), or as what will not be read again (0).
    It stays between the loads it is written between: LLVM would gather the prefetches of a loop at its head, and of a burst
    a processor forgets some. The fences hold the compiler only and are no instructions.
    """
    pointer = builder.inttoptr(address, _i8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _i32, _i32, _i32])
    read, keep, data = const_i32(0), const_i32(keep), const_i32(1)
    builder.fence("seq_cst", "singlethread")
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [pointer, read, keep, data])
    builder.fence("seq_cst", "singlethread")


def share(items, part, parts):
    """Part number `part` of `parts` about equal ones: to spread prefetches over a run of code."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


def splat(builder, value, lanes=16):
    """All lanes equal to a scalar."""
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, const_i32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(vector("i32", lanes), [0] * lanes))


def shuffle(builder, value, lanes):
    return builder.shuffle_vector(value, value, ir.Constant(vector("i32", len(lanes)), list(lanes)))


def join(builder, parts):
    """One vector of all the lanes of several."""
    while len(parts) > 1:
        width = parts[0].type.count
        mask = const_vector("i32", 2 * width, list(range(2 * width)))
        parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


def emit_fma(builder, a, b, c):
    suffix = "f32" if isinstance(a.type, ir.FloatType) else f"v{a.type.count}f32"
    return call(builder, f"llvm.fma.{suffix}", a.type, a, b, c)


def emit_load_f16(builder, address, lanes=16):
    return builder.fpext(load(builder, address, vector("f16", lanes)), vector("f32", lanes))


def emit_load_bf16(builder, address, lanes=16):
    wide = builder.zext(load(builder, address, vector("i16", lanes)), vector("i32", lanes))
    return builder.bitcast(builder.shl(wide, const_vector("i32", lanes, 16)), vector("f32", lanes))


def emit_reduce_add(builder, value):
    """The sum of 16 lanes by halves: the tree every twin follows."""
    for half in (8, 4, 2, 1):
        value = builder.fadd(shuffle(builder, value, range(half)), shuffle(builder, value, range(half, 2 * half)))
    return builder.extract_element(value, const_i32(0))


# ---- twins of loads and stores ----------------------------------------------------------------


def peek(address, dtype, count):
    """A NumPy view of memory at an address (twins only)."""
    return np.frombuffer((ctypes.c_uint8 * (np.dtype(dtype).itemsize * count)).from_address(int(address)), dtype)


def poke(address, values):
    peek(address, values.dtype, values.size)[:] = values.ravel()


def twin_fma(a, b, c):
    """a * b + c with the product exact; rounding twice differs from a true fma in rare last bits."""
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + c).astype(np.float32)


def twin_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def twin_reduce_add(value):
    for half in (8, 4, 2, 1):
        value = value[..., :half] + value[..., half : 2 * half]
    return value[..., 0]
