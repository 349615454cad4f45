"""The int8 dot: unsigned codes times signed inputs, in the form this machine has.

One hard fact: sums of products of bytes are exact integers, so every form gives equal results;
each is held to the plain one on random and edge values.
"""

from . import cpu
from .simd import call, const_i32, const_vector, emit_fma, join, load, scalar, shuffle, splat, vector


def emit_splat4(builder, address):
    """Four bytes in each of 16 lanes: the activations of four consecutive inputs, for 16 rows."""
    return builder.bitcast(splat(builder, load(builder, address, scalar("i32"))), vector("i8", 64))


def emit_dot4(builder, acc, codes, inputs, offset=128):
    """acc[r] + sum over j < 4 of (int8 of codes[4r + j]) * inputs[4r + j], given the start of `emit_dot_start`.

    codes: int8 + offset; inputs: signed bytes in -127..127. Some forms work on unsigned codes and rely on the start, others take
    128 off themselves. offset: `offset_for` the integers at hand.
    """
    form = cpu.form()
    if offset == SMALL:
        return _by_parts(builder, acc, codes, inputs, 8, _avx2_small) if form == "avx2" else _plain_dot4(builder, acc, codes, inputs)
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
    """Whether the form takes 128 off the codes itself, so that a start does not have to."""
    return cpu.form() in ("avx2", "neon")


START = -128  # a group's sum of inputs is kept times this: what accumulators of codes that are int8 + 128 start from
FLOAT = 0x4B400000  # 1.5 * 2^23 as float32: an integer below 2^22 added to these bits is, read as float32, that much more


SMALL = 64  # the offset of codes that stay below 128


def offset_for(top):
    """What to add to integers of size `top` or less for `emit_dot4`: for AVX2, codes below 128 need no care for signs."""
    return SMALL if cpu.form() == "avx2" and top < SMALL else 128


def emit_dot_start(builder, address, offset=128):
    """What an accumulator starts from, all lanes; address: int32, FLOAT + START times the sum of the group's inputs."""
    if offset == SMALL:  # FLOAT + START / 2 * sum: the mean of FLOAT and what is there
        twice = builder.add(load(builder, address, scalar("i32")), const_i32(FLOAT))
        return splat(builder, builder.lshr(twice, const_i32(1)))
    if takes_signed():
        return const_vector("i32", 16, FLOAT)
    return splat(builder, load(builder, address, scalar("i32")))


def emit_scaled(builder, acc, scale, less=None):
    """float32: the integer in an accumulator times a float16 scale, rounded once; less: `emit_less` of that scale.

    The accumulator's bits are a float32 that is the integer too large by 1.5 * 2^23: no conversion is needed. With `less` it is one fma; without,
    a subtraction (exact) and a product: the same bits, and better where groups are small, since additions need not wait for the dots' ports.
    """
    wide = builder.bitcast(acc, vector("f32", 16))
    if less is None:
        return builder.fmul(builder.fsub(wide, const_vector("f32", 16, 1.5 * 2.0**23)), scale)
    return emit_fma(builder, wide, scale, less)


def emit_less(builder, scale):
    """-1.5 * 2^23 times a scale: exact, a float16 has 11 bits."""
    return builder.fmul(scale, const_vector("f32", 16, -1.5 * 2.0**23))


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
    return join(builder, whole)


def _vnni256(builder, acc, codes, inputs):
    name = "llvm.x86.avx512.vpdpbusd.256"  # AVX-VNNI and AVX512VL share the intrinsic
    return call(builder, name, acc.type, acc, *_vnni_operands(builder, codes, inputs))


def _avx2(builder, acc, codes, inputs):
    """|w| as the unsigned operand, its sign moved to the input: pairs reach 2 * 128 * 127 = 32,512 and fit."""
    pairs = _avx2_pairs(builder, builder.xor(codes, const_vector("i8", 32, -128)), inputs)
    return builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, pairs, const_vector("i16", 16, 1)))


def _avx2_small(builder, acc, codes, inputs):
    """Codes below 128 as they are: pairs reach 2 * 127 * 127 = 32,258 and fit."""
    pairs = _avx2_unsigned_pairs(builder, codes, inputs)
    return builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, pairs, const_vector("i16", 16, 1)))


def _avx2_pairs(builder, weights, inputs):
    """<16 x i16>: sums of two products each, of signed bytes above -128 (weights) and inputs."""
    size = call(builder, "llvm.abs.v32i8", weights.type, weights, scalar("i1")(0))
    turned = call(builder, "llvm.x86.avx2.psign.b", inputs.type, inputs, weights)
    return _avx2_unsigned_pairs(builder, size, turned)


def _avx2_unsigned_pairs(builder, weights, inputs):
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", vector("i16", 16), weights, inputs)


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


# ---- sums that are multiplied once: AVX2, where a multiplication costs as much as a dot ---------------


def multiplies_sums():
    """Whether `emit_dot_multiplied` is the way to take formats with multipliers."""
    return cpu.form() == "avx2"


def emit_dot_multiplied(builder, acc, values, inputs, multipliers, excess=None):
    """acc[r] + multipliers[r] * sum over all of values[4r + j] * inputs[4r + j].

    values, inputs: lists of <64 x i8>, few and small enough that the sums of pairs stay in 16 bits (a sub-block of formats.PACKED's
    tables does); multipliers: <32 x i16>, a lane's twice. excess: none of the values is below 0 as they are too large by a constant,
    and this <32 x i16> of `emit_excess` is what that adds to the sums of pairs.
    """
    whole = []
    for at in (0, 8):
        pairs = None
        for value, x in zip(values, inputs):
            lanes = range(4 * at, 4 * at + 32)
            pair = _avx2_pairs if excess is None else _avx2_unsigned_pairs
            part = pair(builder, shuffle(builder, value, lanes), shuffle(builder, x, lanes))
            pairs = part if pairs is None else builder.add(pairs, part)
        if excess is not None:
            pairs = builder.sub(pairs, shuffle(builder, excess, range(2 * at, 2 * at + 16)))
        m = shuffle(builder, multipliers, range(2 * at, 2 * at + 16))
        whole.append(call(builder, "llvm.x86.avx2.pmadd.wd", vector("i32", 8), pairs, m))
    return builder.add(acc, join(builder, whole))


def emit_excess(builder, inputs, constant, dwords):
    """<16 x i16> of <32 x i8> inputs: constant times the sum of each pair, summed over `dwords` (1 or 2) lanes of 32 bits from each on."""
    pairs = _avx2_unsigned_pairs(builder, const_vector("i8", 32, constant), inputs)
    if dwords == 2:
        wide = builder.bitcast(pairs, vector("i64", 4))
        pairs = builder.add(pairs, builder.bitcast(builder.lshr(wide, const_vector("i64", 4, 32)), pairs.type))
    return pairs
