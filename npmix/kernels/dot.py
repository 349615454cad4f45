"""The int8 dot: unsigned codes times signed inputs, in the form this machine has.

One hard fact: sums of products of bytes are exact integers, so every form gives equal results;
each is held to the plain one on random and edge values.
"""

from . import cpu
from .simd import call, const_vector, load, scalar, shuffle, splat, vector


def emit_splat4(builder, address):
    """Four bytes in each of 16 lanes: the activations of four consecutive inputs, for 16 rows."""
    return builder.bitcast(splat(builder, load(builder, address, scalar("i32"))), vector("i8", 64))


def emit_dot4(builder, acc, codes, inputs):
    """acc[r] + sum over j < 4 of (int8 of codes[4r + j]) * inputs[4r + j], given the start of `emit_dot_start`.

    codes: int8 + 128; inputs: signed bytes in -127..127. Some forms work on unsigned codes and rely on the start, others take
    128 off themselves.
    """
    form = cpu.form()
    if form == "avx512vnni":
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", acc.type, acc, *_vnni_operands(builder, codes, inputs))
    if form == "avxvnni":
        return _by_parts(builder, acc, codes, inputs, 8, _vnni256)
    if form == "avx2":
        return _by_parts(builder, acc, codes, inputs, 8, _avx2)
    if form == "neon":
        return _by_parts(builder, acc, codes, inputs, 4, _neon)
    return _plain_dot4(builder, acc, codes, inputs)


def takes_signed():
    """Whether the form takes 128 off the codes itself, so that accumulators start at 0."""
    return cpu.form() in ("avx2", "neon")


START = -128  # a group's sum of inputs is kept times this: what accumulators of codes that are int8 + 128 start from


def emit_dot_start(builder, address):
    """What an accumulator starts from, all lanes; address: int32, START times the sum of the group's inputs."""
    if takes_signed():
        return const_vector("i32", 16, 0)
    return splat(builder, load(builder, address, scalar("i32")))


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


def _avx2(builder, acc, codes, inputs):
    """|w| as the unsigned operand, its sign moved to the input: pairs reach 2 * 128 * 127 = 32,512 and fit."""
    signed = builder.xor(codes, const_vector("i8", 32, -128))
    size = call(builder, "llvm.abs.v32i8", codes.type, signed, scalar("i1")(0))
    negative = builder.icmp_signed("<", signed, const_vector("i8", 32, 0))
    turned = builder.select(negative, builder.neg(inputs), inputs)
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", vector("i16", 16), size, turned)
    return builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, pairs, const_vector("i16", 16, 1)))


def _neon(builder, acc, codes, inputs):
    signed = builder.xor(codes, const_vector("i8", 16, -128))
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, signed, inputs)


def _plain_dot4(builder, acc, codes, inputs):
    for j in range(4):
        lanes = range(j, 64, 4)
        a = builder.zext(shuffle(builder, codes, lanes), vector("i32", 16))
        b = builder.sext(shuffle(builder, inputs, lanes), vector("i32", 16))
        acc = builder.add(acc, builder.mul(a, b))
    return acc
