"""What every kernel shares: loads, rounding and products that are right on a GPU and in the
interpreter.
"""
# ruff: noqa: RET505, RUF005, SIM108 - Triton compiles what follows an `if` that returns, and its
# tuples are joined, not unpacked

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as raw 16-bit integers: it multiplies those bits in tl.dot,
# truncates float32 -> bfloat16 and mishandles subnormals. The branches on this flag repair it and
# vanish on a GPU.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(v):
    """Any float -> float32, exactly."""
    if INTERPRETED and v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return v.to(tl.float32)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """float32 -> dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = tl.where(v != v, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def mma(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION ("tf32", "ieee") matters for float32 operands alone."""
    if (
        INTERPRETED
    ):  # a product of two halves fits float32 exactly: this is what a tensor core computes
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def program_index(AXIS: tl.constexpr, WIDE: tl.constexpr):
    """The program's index, in 64 bits where offsets built on it need them."""
    pid = tl.program_id(AXIS)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def unpack(v):
    """[P, n] -> n vectors [P], all in the registers of the same lane; n is 1, 2, 4 or 8."""
    P: tl.constexpr = v.shape[0]
    if v.shape[1] == 1:
        return (v.reshape([P]),)
    elif v.shape[1] == 2:
        return tl.split(v)
    elif v.shape[1] == 4:
        even, odd = tl.split(v.reshape([P, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    else:
        even, odd = tl.split(v.reshape([P, 4, 2]))
        a, c, e, g = unpack(even)
        b, d, f, h = unpack(odd)
        return a, b, c, d, e, f, g, h


@triton.jit
def pack(v):
    """n vectors [P] -> [P, n]: the inverse of unpack."""
    P: tl.constexpr = v[0].shape[0]
    if len(v) == 1:
        return v[0].reshape([P, 1])
    elif len(v) == 2:
        return tl.join(v[0], v[1])
    elif len(v) == 4:
        return tl.join(pack((v[0], v[2])), pack((v[1], v[3]))).reshape([P, 4])
    else:
        return tl.join(pack((v[0], v[2], v[4], v[6])), pack((v[1], v[3], v[5], v[7]))).reshape(
            [P, 8]
        )


@triton.jit
def load_run(p, at, ok, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """LENGTH values STEP apart from `at` [P]: a tuple of vectors [P], zero where not ok."""
    if STEP == 1:
        v = tl.load(p + at[:, None] + tl.arange(0, LENGTH)[None, :], mask=ok[:, None], other=0)
        if v.dtype.is_floating():
            v = widen(v)
        return unpack(v)
    else:
        run = ()
        for i in tl.static_range(LENGTH):
            v = tl.load(p + at + i * STEP, mask=ok, other=0)
            if v.dtype.is_floating():
                v = widen(v)
            run = run + (v,)
        return run


@triton.jit
def load_span(
    p,
    at,
    c,
    ok,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    VEC: tl.constexpr,
):
    """Channels c - BEFORE .. c + VEC - 1 + AFTER, zero outside the group of GROUP channels.

    c [P] counts from the start of the group and is a multiple of VEC, which divides GROUP: so the
    neighbours come in aligned pieces that lie wholly inside the group or wholly outside, from L1.
    """
    span = load_run(p, at, ok, VEC, STEP)
    if BEFORE > 0:
        PIECE: tl.constexpr = min(VEC, triton.next_power_of_2(BEFORE)) if STEP == 1 else 1
        for i in tl.static_range(1, (BEFORE + PIECE - 1) // PIECE + 1):
            span = load_run(p, at - i * PIECE * STEP, ok & (c >= i * PIECE), PIECE, STEP) + span
        span = span[(BEFORE + PIECE - 1) // PIECE * PIECE - BEFORE :]
    if AFTER > 0:
        NEXT: tl.constexpr = min(VEC, triton.next_power_of_2(AFTER)) if STEP == 1 else 1
        for i in tl.static_range((AFTER + NEXT - 1) // NEXT):
            inside = ok & (c + (VEC + i * NEXT) < GROUP)
            span = span + load_run(p, at + (VEC + i * NEXT) * STEP, inside, NEXT, STEP)
        span = span[: BEFORE + VEC + AFTER]
    return span


@triton.jit
def store_tile(p, at, tile, ok, STEP: tl.constexpr):
    """Stores a float32 or integer tile [P, VEC], columns STEP elements apart, in p's type."""
    VEC: tl.constexpr = tile.shape[1]
    dtype: tl.constexpr = p.dtype.element_ty
    if dtype.is_floating():
        tile = narrow(tile, dtype)
    else:
        tile = tile.to(dtype)
    if STEP == 1 or VEC == 1:
        tl.store(p + at[:, None] + tl.arange(0, VEC)[None, :] * STEP, tile, mask=ok[:, None])
    else:  # one channel at a time, so that neighbouring lanes write neighbouring pixels
        run = unpack(tile)
        for i in tl.static_range(VEC):
            tl.store(p + at + i * STEP, run[i], mask=ok)
