"""The one compiled function that Python calls.

One hard fact: decode, prefill and the output head are made of the same products and attention blocks, and
LLVM's time goes into those; one entry has them compiled once.
"""

import functools

from ..formats import PACKED
from ._jit import DISABLED, njit
from .attention import attend
from .cache import cache_rows
from .decode import decode
from .phases import matmul_by_slot, start_clock
from .prefill import head, prefill
from .proof import prove
from .rows import embedder
from .simd import i64

DECODE, PREFILL, HEAD = range(3)


@functools.lru_cache(maxsize=None)
def entry(slots, embeddings, kv):
    """The kernel of a model with these slots (`phases.matmul_by_slot`), embeddings (`rows.embedder`) and KV cache:
    (work, m, layers, a, b, c, d, e, part, index, members); part: of each layer (`tables.ROUTE`), unused by HEAD.

    work DECODE: token, position, first layer, last layer, address of the logits or 0 (`decode.decode`).
    work PREFILL: tokens, position, layer, skip, unused (`prefill.prefill`).
    work HEAD: first token, tokens, address of the logits, bytes from one token's to the next's, unused (`prefill.head`).
    """
    mm, embed, attend_block = matmul_by_slot(slots), embedder(*embeddings), attend(kv)
    put_key, put_value = cache_rows(kv)

    @njit(entry=f"{slots} {embeddings} {kv}")
    def run(work, m, layers, a, b, c, d, e, part, index, members):
        start_clock(m, index)
        if work == DECODE:
            decode(mm, embed, attend_block, put_key, put_value, m, layers, a, b, c, d, e, part, index, members)
        elif work == PREFILL:
            prefill(mm, embed, attend_block, put_key, put_value, m, layers, a, b, c, d, part, index, members)
        else:
            head(mm, m, a, b, c, d, index, members)

    return run


def load(run, formats: set[str]) -> None:
    """Compile an entry, or load it from the disk cache, before its first call. formats: those of the model's weights."""
    if not DISABLED:
        prove(tuple(sorted(name for name in formats if name in PACKED and PACKED[name].values)))
        run.compile((i64, i64[::1], i64[:, ::1]) + (i64,) * 8)
