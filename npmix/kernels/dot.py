"""The int8 dot: unsigned codes times signed inputs, in the form this machine has.

One hard fact: sums of products of bytes are exact integers, so every form gives equal results;
each is held to the plain one on random and edge values.
"""

from . import cpu
from .simd import call, const_vector, load, scalar, shuffle, splat, vector


def emit_splat4(builder, address):
    """Four bytes in each of 16 lanes: the activations of four consecutive inputs, for 16 rows."""
    return builder.bitcast(splat(builder, load(builder, address, scalar("i32"))), vector("i8", 64))


def emit_dot4(builder, acc, codes, inputs, zero):
    """acc[r] + sum over j < 4 of codes[4r + j] * inputs[4r + j]; codes unsigned, inputs signed bytes in -127..127.

    zero: the code that means 0. Codes up to 15 fit every form; with zero 128 the AVX2 form works on
    codes - 128 and the accumulator's start differs, see `emit_dot_start`.
    """
    form = cpu.form()
    if form == "avx512vnni":
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", acc.type, acc, *_vnni_operands(builder, codes, inputs))
    if form == "avxvnni":
        return _by_parts(builder, acc, codes, inputs, 8, _vnni256)
    if form == "avx2":
        return _by_parts(builder, acc, codes, inputs, 8, _avx2_signed if zero == 128 else _avx2_unsigned)
    if form == "neon":
        return _by_parts(builder, acc, codes, inputs, 4, _neon_signed if zero == 128 else _neon_unsigned)
    return _plain_dot4(builder, acc, codes, inputs)


def works_on_signed(zero):
    """Whether `emit_dot4` takes zero off the codes itself, so that accumulators start at 0."""
    return zero == 128 and cpu.form() in ("avx2", "neon")


START = -8  # a group's sum of inputs is kept times this: what the accumulators of 4-bit codes start from


def emit_dot_start(builder, address, zero):
    """What an accumulator starts from, all lanes: -zero * sum of the group's inputs, so the zero point costs nothing.

    address: int32, START times that sum.
    """
    if works_on_signed(zero):
        return const_vector("i32", 16, 0)
    start = splat(builder, load(builder, address, scalar("i32")))
    return start if zero == -START else builder.mul(start, const_vector("i32", 16, zero // -START))


def takes_high_nibbles():
    """Whether codes up to 240 may be multiplied: high nibbles where they are, the sum divided by 16 afterwards."""
    return cpu.form() not in ("avx2", "neon")  # 16-bit sums saturate; signed bytes end at 127


def _vnni_operands(builder, codes, inputs):
    """LLVM 22 takes bytes, older ones took 32-bit lanes."""
    kind = codes.type if cpu.llvm_major() >= 22 else vector("i32", codes.type.count // 4)
    return builder.bitcast(codes, kind), builder.bitcast(inputs, kind)


def _by_parts(builder, acc, codes, inputs, lanes, part):
    """Apply a form with narrower registers to each slice of 16 lanes and join the slices."""
    whole = []
    for at in range(0, 16, lanes):
        piece = part(
            builder,
            shuffle(builder, acc, range(at, at + lanes)),
            shuffle(builder, codes, range(4 * at, 4 * (at + lanes))),
            shuffle(builder, inputs, range(4 * at, 4 * (at + lanes))),
        )
        whole.append(piece)
    return _join(builder, whole)


def _join(builder, parts):
    """One vector of all the lanes of several."""
    while len(parts) > 1:
        width = parts[0].type.count
        mask = const_vector("i32", 2 * width, list(range(2 * width)))
        parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


def _vnni256(builder, acc, codes, inputs):
    name = "llvm.x86.avx512.vpdpbusd.256"  # AVX-VNNI and AVX512VL share the intrinsic
    return call(builder, name, acc.type, acc, *_vnni_operands(builder, codes, inputs))


def _avx2_unsigned(builder, acc, codes, inputs):
    """Codes up to 15: pairs reach 2 * 15 * 127 = 3,810, far from saturation."""
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", vector("i16", 16), codes, inputs)
    return builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, pairs, const_vector("i16", 16, 1)))


def _avx2_signed(builder, acc, codes, inputs):
    """|w| as the unsigned operand, its sign moved to the input: pairs reach 2 * 128 * 127 = 32,512 and fit."""
    signed = builder.xor(codes, const_vector("i8", 32, -128))
    size = call(builder, "llvm.abs.v32i8", codes.type, signed, scalar("i1")(0))
    negative = builder.icmp_signed("<", signed, const_vector("i8", 32, 0))
    turned = builder.select(negative, builder.neg(inputs), inputs)
    return _avx2_unsigned(builder, acc, size, turned)


def _neon_unsigned(builder, acc, codes, inputs):
    """Codes below 128 are the same signed, so the signed dot serves."""
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, codes, inputs)


def _neon_signed(builder, acc, codes, inputs):
    signed = builder.xor(codes, const_vector("i8", 16, -128))
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, signed, inputs)


def _plain_dot4(builder, acc, codes, inputs):
    for j in range(4):
        lanes = range(j, 64, 4)
        a = builder.zext(shuffle(builder, codes, lanes), vector("i32", 16))
        b = builder.sext(shuffle(builder, inputs, lanes), vector("i32", 16))
        acc = builder.add(acc, builder.mul(a, b))
    return acc


# ---- 16-bit sums, where the form has them -----------------------------------------------------------

NARROW_DOTS = 8  # dots a 16-bit pair can take: 8 * 2 * 15 * 127 = 30,480


def has_narrow(zero):
    """Whether pairs of products may be added in 16 bits first: on AVX2 that saves a multiplication and an addition in three."""
    return zero == 8 and cpu.form() == "avx2"


def emit_dot_narrow(builder, acc, codes, inputs):
    """Add 32 pairs of products to <32 x i16>; at most NARROW_DOTS times before `emit_widen`."""
    halves = []
    for at in (0, 32):
        lanes = range(at, at + 32)
        pair = shuffle(builder, codes, lanes), shuffle(builder, inputs, lanes)
        halves.append(call(builder, "llvm.x86.avx2.pmadd.ub.sw", vector("i16", 16), *pair))
    return builder.add(acc, _join(builder, halves))


def emit_widen(builder, acc, narrow):
    """Add the neighbouring 16-bit sums of each lane to the 32-bit accumulator."""
    halves = []
    for at in (0, 16):
        part = shuffle(builder, narrow, range(at, at + 16))
        halves.append(call(builder, "llvm.x86.avx2.pmadd.wd", vector("i32", 8), part, const_vector("i16", 16, 1)))
    return builder.add(acc, _join(builder, halves))
