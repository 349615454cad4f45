"""Fast error-compensating rounding into the packed bytes: the twin of `quant/compensate.py` (the law stands there).

One hard fact: rows do not touch each other, so 16 of them lie in the lanes as in `rounding.py`; a target's sum is taken up
where it was left, first over whole sub-blocks, then inside its own for each selector, which is the order of the inputs.
"""

import functools

import numpy as np

from ..formats import PACKED, SCALE_BOUNDS, MOMENTS, STEPS, codes_at, row_blocks, span_bytes, spans
from ._jit import njit
from .ops import absolute, add, div, get_f32, load_f32, max_f32, maximum, minimum, mul, splat_f32, store_f32, sub, where_greater
from .packing import add_products, nearest_of, rows_table
from .rounding import CODES, LARGEST, SCALE, SCRATCH_BYTES, SELECTORS, WEIGHTS, group_writer, half, load_group, scale_finder

_ZERO, _ONE = np.float32(0), np.float32(1)
_STEPS = np.array(STEPS, np.float32)
_LOW, _HIGH = np.array(SCALE_BOUNDS, np.float32)

# More scratch memory, in vectors of 16 rows. Of the group: the errors, values and targets' errors under the scale that is tried, selectors, and the
# same of the best scale; of a sub-block: targets, and for each selector errors, values; of each selector: factor, its inverse, error
_VECTORS = {
    "errors": 128, "values": 128, "missed": 128, "chosen": 32, "best values": 128, "best missed": 128, "targets": 16,
    "tried errors": 256, "tried values": 256, "factor": 16, "inverse": 16, "found": 16, "trial": 1, "total": 1, "best": 1,
}  # fmt: skip
_PLACES = dict(zip(_VECTORS, (SCRATCH_BYTES + 64 * n for n in np.cumsum([0, *_VECTORS.values()]).tolist())))
_ALL_BYTES = SCRATCH_BYTES + 64 * sum(_VECTORS.values())
(
    _ERRORS, _VALUES, _MISSED, _CHOSEN, _BEST_VALUES, _BEST_MISSED, _TARGETS,
    _TRIED_ERRORS, _TRIED_VALUES, _FACTOR, _INVERSE, _FOUND, _TRIAL, _TOTAL, _BEST,
) = _PLACES.values()  # fmt: skip


@functools.lru_cache(maxsize=None)
def _sub_block_kernels(name):
    """Three kernels: a target's sum inside a sub-block, all selectors tried on one whose targets are there, the best of them kept."""
    spec, value, per = PACKED[name], nearest_of(name, False), PACKED[name].per
    selectors, row_bytes = len(spec.multipliers), 4 * rows_table(name).shape[1]

    @njit
    def within(target, errors, k, feedback):
        """The k-th input's target: what earlier sub-blocks gave and the errors of the k before it; feedback: its column."""
        for i in range(k):
            target = add(target, mul(splat_f32(get_f32(feedback + 512 * i)), load_f32(errors + 64 * i)))
        return target

    @njit
    def try_all(x, feedback, weights, rows, scratch):
        for s in range(selectors):
            store_f32(scratch + _FOUND + 64 * s, splat_f32(_ZERO))
        for k in range(per):
            before, w, weight = load_f32(scratch + _TARGETS + 64 * k), load_f32(x + 64 * k), splat_f32(get_f32(weights + 4 * k))
            for s in range(selectors):
                errors, found = scratch + _TRIED_ERRORS + 64 * per * s, scratch + _FOUND + 64 * s
                z = mul(within(before, errors, k, feedback + 4 * k), load_f32(scratch + _INVERSE + 64 * s))
                q = value(z, rows + row_bytes * s)
                miss = sub(z, q)
                store_f32(found, add(load_f32(found), mul(mul(miss, miss), weight)))
                store_f32(errors + 64 * k, sub(w, mul(q, load_f32(scratch + _FACTOR + 64 * s))))
                store_f32(scratch + _TRIED_VALUES + 64 * (per * s + k), q)

    @njit
    def choose(block, x, feedback, scratch):
        """The best selector's values, errors and targets' errors of a sub-block, its selector, its error added to the total."""
        values, factor = scratch + _VALUES + 64 * per * block, load_f32(scratch + _FACTOR)
        least, chosen = mul(load_f32(scratch + _FOUND), mul(factor, factor)), splat_f32(_ZERO)
        for k in range(per):
            store_f32(values + 64 * k, load_f32(scratch + _TRIED_VALUES + 64 * k))
        for s in range(1, selectors):
            other = load_f32(scratch + _FACTOR + 64 * s)
            found = mul(load_f32(scratch + _FOUND + 64 * s), mul(other, other))
            for k in range(per):
                new = load_f32(scratch + _TRIED_VALUES + 64 * (per * s + k))
                store_f32(values + 64 * k, where_greater(least, found, new, load_f32(values + 64 * k)))
            chosen = where_greater(least, found, splat_f32(np.float32(s)), chosen)
            factor = where_greater(least, found, other, factor)
            least = minimum(found, least)
        store_f32(scratch + _CHOSEN + 64 * block, chosen)
        store_f32(scratch + _TOTAL, add(load_f32(scratch + _TOTAL), least))
        errors, missed = scratch + _ERRORS + 64 * per * block, scratch + _MISSED + 64 * per * block
        for k in range(per):
            rounded = mul(load_f32(values + 64 * k), factor)
            target = within(load_f32(scratch + _TARGETS + 64 * k), errors, k, feedback + 4 * k)
            store_f32(missed + 64 * k, sub(target, rounded))
            store_f32(errors + 64 * k, sub(load_f32(x + 64 * k), rounded))

    return within, try_all, choose


@functools.lru_cache(maxsize=None)
def _targets_kernel(name):
    """A kernel (block, errors, feedback, scratch): a sub-block's targets from all sub-blocks before it."""
    products, per = add_products(PACKED[name].per), PACKED[name].per

    @njit
    def targets(block, errors, feedback, scratch):
        """Its weights, and the errors of all before it times their factors."""
        for k in range(per):
            store_f32(scratch + _TARGETS + 64 * k, load_f32(scratch + WEIGHTS + 64 * (per * block + k)))
        for i in range(block):
            products(scratch + _TARGETS, errors + 64 * per * i, feedback + 4 * (MOMENTS * per * i + per * block))

    return targets


@functools.lru_cache(maxsize=None)
def _finishers(name):
    """Two kernels for values and selectors that stay: their codes, and the last step of the scale."""
    spec, code, within, targets = PACKED[name], nearest_of(name, True), _sub_block_kernels(name)[0], _targets_kernel(name)
    per, pad, selectors, row_bytes = spec.per, np.float32(spec.pad), len(spec.multipliers), 4 * rows_table(name).shape[1]

    @njit
    def write_codes(valid, rows, scratch):
        """Codes of the values and selectors in scratch; zeros have the padding's selector and code, inputs that do not exist its code."""
        largest, zero = load_f32(scratch + LARGEST), splat_f32(_ZERO)
        for i in range(MOMENTS // per):
            chosen = where_greater(largest, zero, load_f32(scratch + SELECTORS + 64 * i), zero)
            store_f32(scratch + SELECTORS + 64 * i, chosen)
            for k in range(per * i, per * i + per):
                store_f32(scratch + CODES + 64 * k, splat_f32(pad))
            for s in range(selectors):
                other = absolute(sub(chosen, splat_f32(np.float32(s))))
                for k in range(per * i, min(per * i + per, valid)):
                    at, q = scratch + CODES + 64 * k, load_f32(scratch + _BEST_VALUES + 64 * k)
                    found = where_greater(largest, zero, code(q, rows + row_bytes * s), splat_f32(pad))
                    store_f32(at, where_greater(other, zero, load_f32(at), found))

    @njit
    def fair_scale(feedback, weights, scratch):
        """The scale times w' H w / w' H value."""
        square, product, zero, one = splat_f32(_ZERO), splat_f32(_ZERO), splat_f32(_ZERO), splat_f32(_ONE)
        for block in range(MOMENTS // per):
            targets(block, scratch + WEIGHTS, feedback, scratch)
            x, own = scratch + WEIGHTS + 64 * per * block, feedback + 4 * (MOMENTS + 1) * per * block
            for k in range(per):
                weight = splat_f32(get_f32(weights + 4 * (per * block + k)))
                target = within(load_f32(scratch + _TARGETS + 64 * k), x, k, own + 4 * k)
                square = add(square, mul(mul(target, target), weight))
                rounded = sub(target, load_f32(scratch + _BEST_MISSED + 64 * (per * block + k)))
                product = add(product, mul(mul(target, rounded), weight))
        ratio = div(square, where_greater(product, zero, product, one))
        ratio = minimum(maximum(ratio, splat_f32(_LOW)), splat_f32(_HIGH))
        store_f32(scratch + SCALE, half(mul(load_f32(scratch + SCALE), where_greater(product, zero, ratio, one)), scratch))

    return write_codes, fair_scale


@functools.lru_cache(maxsize=None)
def _compensator(name):
    """A kernel (valid, importance, feedback, weights, rows, scratch): scale, selectors and codes of the group in scratch."""
    find, targets, (_, try_all, choose) = scale_finder(name), _targets_kernel(name), _sub_block_kernels(name)
    write_codes, fair_scale = _finishers(name)
    per, multipliers = PACKED[name].per, np.array(PACKED[name].multipliers, np.float32)

    @njit
    def try_scale(feedback, weights, rows, scratch):
        scale = load_f32(scratch + _TRIAL)
        for s in range(len(multipliers)):
            factor = mul(scale, splat_f32(multipliers[s]))
            store_f32(scratch + _FACTOR + 64 * s, factor)
            store_f32(scratch + _INVERSE + 64 * s, div(splat_f32(_ONE), factor))
        store_f32(scratch + _TOTAL, splat_f32(_ZERO))
        for block in range(MOMENTS // per):
            x, own = scratch + WEIGHTS + 64 * per * block, feedback + 4 * (MOMENTS + 1) * per * block
            targets(block, scratch + _ERRORS, feedback, scratch)
            try_all(x, own, weights + 4 * per * block, rows, scratch)
            choose(block, x, own, scratch)

    @njit
    def keep(first, scratch):
        """The scale just tried, if it is better than the best so far."""
        new, old = load_f32(scratch + _TOTAL), load_f32(scratch + _BEST)
        for kept, found, count in (
            (SCALE, _TRIAL, 1),
            (SELECTORS, _CHOSEN, MOMENTS // per),
            (_BEST_VALUES, _VALUES, MOMENTS),
            (_BEST_MISSED, _MISSED, MOMENTS),
        ):
            for i in range(count):
                v = load_f32(scratch + found + 64 * i)
                store_f32(scratch + kept + 64 * i, v if first else where_greater(old, new, v, load_f32(scratch + kept + 64 * i)))
        store_f32(scratch + _BEST, new if first else minimum(new, old))

    @njit
    def compensate(valid, importance, feedback, weights, rows, scratch):
        find(MOMENTS, importance, rows, scratch)
        start = load_f32(scratch + SCALE)
        for i in range(len(_STEPS)):
            store_f32(scratch + _TRIAL, half(mul(start, splat_f32(_STEPS[i])), scratch))
            try_scale(feedback, weights, rows, scratch)
            keep(i == 0, scratch)
        write_codes(valid, rows, scratch)
        fair_scale(feedback, weights, scratch)

    return compensate


@functools.lru_cache(maxsize=None)
def _row_blocks_kernel(name):
    """An entry (w, rows, cols, importance, feedback, weights, table, limit, first_codes, span_size, out, scratch): 0, 1 (not finite) or 2."""
    compensate, write = _compensator(name), group_writer(name)

    @njit(entry=name)
    def compensate_row_blocks(w, rows, cols, importance, feedback, weights, table, limit, first_codes, span_size, out, scratch):
        per_row = (cols + 2 * MOMENTS - 1) // (2 * MOMENTS)
        for block in range((rows + 15) // 16):
            for g in range(2 * per_row):
                col = g * MOMENTS
                if load_group(w, rows, cols, block * 16, col, MOMENTS, scratch) != 0:
                    return 1
                if max_f32(load_f32(scratch + LARGEST)) > limit:
                    return 2
                valid, own = (
                    max(0, min(MOMENTS, cols - col)),
                    min(g, (cols - 1) // MOMENTS),
                )  # a group past the end is zeros under any moments
                compensate(valid, importance + 4 * col, feedback + 4 * MOMENTS * MOMENTS * own, weights + 4 * MOMENTS * own, table, scratch)
                write(MOMENTS, g % 2, first_codes, out + (block * per_row + g // 2) * span_size, scratch)
        return 0

    return compensate_row_blocks


def round_rows_compensated(w: np.ndarray, format: str, group: int, out: np.ndarray, importance: np.ndarray, factored: tuple) -> int:
    """As `rounding.round_rows`, each error made up for by the weights after it; importance: float32 (K,).

    factored: of the inputs' second moments, float32 (ceil(K / 128), 128, 128) and (ceil(K / 128), 128), from `quant.compensate.factors`.
    """
    rows, cols = w.shape
    span_size, spec, blocks = span_bytes(format, group), PACKED[format], -(-cols // MOMENTS)
    if w.dtype != np.float32 or out.dtype != np.uint8 or out.size != row_blocks(rows) * spans(cols, group) * span_size:
        raise ValueError(f"{w.dtype} {w.shape} into {out.size} bytes of {format}")
    if not out.flags.c_contiguous or not group == spec.group == MOMENTS or not spec.values:
        raise ValueError(f"{format} of group {group}, or bytes that do not lie in a row")
    if [a.shape for a in factored] != [(blocks, MOMENTS, MOMENTS), (blocks, MOMENTS)] or importance.shape != (cols,):
        raise ValueError(f"factors {[a.shape for a in factored]} and importance {importance.shape} of a matrix with {cols} inputs")
    counts, scratch = np.zeros(2 * MOMENTS * spans(cols, group), np.float32), np.zeros(_ALL_BYTES, np.uint8)
    counts[:cols] = importance
    arrays = [np.ascontiguousarray(a, np.float32) for a in (w, counts, *factored, rows_table(format))]
    first, *inputs = [a.__array_interface__["data"][0] for a in arrays]
    last = [a.__array_interface__["data"][0] for a in (out, scratch)]
    limit = np.float32(65504.0 * spec.top)
    return _row_blocks_kernel(format)(first, rows, cols, *inputs, limit, codes_at(format, group), span_size, *last)
