"""The router's choice: top-k of the raw logits, then softmax over those k, experts in ascending order.

One hard fact: near-ties flip experts, so logits are float32 sums of the source's own weights and equal
logits go to the lower index.
"""

from numpy import float32 as F

from ._jit import njit
from .ops import exp2, first, get_f32, get_i32, put_f32, put_i32, splat_f32

LOG2_E = 1.4426950408889634


@njit
def choose(logits, n_experts, n_active, experts, weights):
    """Write the chosen experts (int32, ascending) and their softmax weights (float32)."""
    for a in range(n_active):
        best = -1
        for e in range(n_experts):
            taken = False
            for b in range(a):
                taken = taken or get_i32(experts + 4 * b) == e
            x = get_f32(logits + 4 * e)
            if not taken and (best < 0 or x > get_f32(logits + 4 * best) or x != x):  # a NaN is chosen, so that it shows
                best = e
        put_i32(experts + 4 * a, best)
    top = get_f32(logits + 4 * get_i32(experts))
    for a in range(1, n_active):  # insertion sort by index
        e = get_i32(experts + 4 * a)
        b = a
        while b > 0 and get_i32(experts + 4 * (b - 1)) > e:
            put_i32(experts + 4 * b, get_i32(experts + 4 * (b - 1)))
            b -= 1
        put_i32(experts + 4 * b, e)
    total = F(0.0)
    for a in range(n_active):
        x = get_f32(logits + 4 * get_i32(experts + 4 * a))
        p = first(exp2(splat_f32((x - top) * F(LOG2_E))))
        put_f32(weights + 4 * a, p)
        total += p
    for a in range(n_active):
        put_f32(weights + 4 * a, get_f32(weights + 4 * a) / total)
