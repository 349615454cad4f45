"""The one compiled function that Python calls: a token (`decode.py`) or a chunk of a prompt (`prefill.py`) through the layers.

One hard fact: both are made of the same products and attention blocks, and LLVM's time goes into those; one entry has them compiled
once. Phases are merged into it (`inline`) and hardly into each other: Numba copies all variables of a merged function
once for each of its blocks, so a chain of merges takes time by the square of its size (3.2 s of 25; flat 1.0).
"""

import functools

from ..formats import PACKED
from ._jit import DISABLED, njit
from .attention import attend
from .cache import cache_rows
from .decode import attention as token_attention
from .decode import choose_experts as token_choice
from .decode import experts as token_experts
from .decode import head as token_head
from .ops import get_i32, get_i64
from .phases import NONE, blocks_of, end_phase, matmul_by_slot, scratch, start_clock
from .prefill import attention, attention_output, choose_experts, experts, head, project
from .proof import prove
from .rows import embedder
from .simd import i64
from .tables import *  # noqa: F403
from .team import WORK, barrier, called, make_call

DECODE, PREFILL = range(2)


@functools.lru_cache(maxsize=None)
def entry(slots, embeddings, kv):
    """The kernel of a model with these slots (`phases.matmul_by_slot`), embeddings (`rows.embedder`) and KV cache:
    (m, layers, index, members) for `Team.call`. Counters must be 0. WORK of the team's cells holds

    work, token or tokens, position, first layer, last layer, skip, part, logits

    DECODE: the token, which is embedded when the first layer is 0. PREFILL: how many of TOKENS, embedded likewise; position: of the first
    one; skip: so many only fill the cache in the model's last layer. part: of each layer (`tables.ROUTE`). logits: where the token's or
    those of tokens skip.. go once the layers, of which there may be none, are done, whole row blocks; 0: nowhere.

    A part finds what the ones before left in the members' scratch, so the same team must run them.
    """
    mm, embed, attend_block = matmul_by_slot(slots), embedder(*embeddings), attend(kv)
    put_key, put_value = cache_rows(kv)

    @njit(entry=f"{slots} {embeddings} {kv}")
    def run(m, layers, index, members):
        job = m[TEAM] + WORK
        if index == 0 and members > 1:
            make_call(m[TEAM])
        while index == 0 or called(m[TEAM], index):
            work, tokens, position, first = get_i64(job), get_i64(job + 8), get_i64(job + 16), get_i64(job + 24)
            last, skip, part, logits = get_i64(job + 32), get_i64(job + 40), get_i64(job + 48), get_i64(job + 56)
            start_clock(m, index)
            if work == DECODE:
                token = tokens
                if first == 0 and part <= ROUTE and index == 0:
                    embed(m[EMBEDDINGS], token, m[DIM], m[X], scratch(m, S_PANEL, index))
                end_phase(m, T_EMBED, index, members)
                for layer in range(first, last):
                    if part <= ROUTE:
                        token_attention(mm, attend_block, put_key, put_value, m, layers, layer, layer - first, position, index, members)
                        token_choice(mm, m, layers, layer, part, index, members)
                    if part != ROUTE:
                        token_experts(mm, m, layers, layer, layer - first, part, index, members)
                if logits:
                    token_head(mm, m, logits, index, members)
            else:
                if first == 0 and part <= ROUTE:
                    for t in range(index, tokens, members):
                        token, at = get_i32(m[TOKENS] + 4 * t), m[X] + 4 * m[X_WIDTH] * t
                        embed(m[EMBEDDINGS], token, m[DIM], at, scratch(m, S_PANEL, index))
                    end_phase(m, T_EMBED, index, members)
                for layer in range(first, last):
                    cached = skip if layer + 1 == m[N_LAYERS] else NONE
                    if part <= ROUTE:
                        project(mm, put_key, put_value, m, layers, layer, tokens, position, cached, index, members)
                        attention(attend_block, m, layer, tokens, position, cached, index, members)
                        attention_output(mm, m, layers, layer, tokens, cached, index, members)
                        choose_experts(mm, m, layers, layer, tokens, cached, part, index, members)
                    if part != ROUTE:
                        experts(mm, m, layers, layer, tokens - cached, cached, part, index, members)
                if logits:
                    head(mm, m, skip, tokens - skip, logits, 64 * blocks_of(m[VOCAB]), index, members)
            barrier(m[TEAM], members)  # member 0 returns for all: nobody may touch the state any more
            if index == 0:
                return

    return run


def load(run, formats: set[str]) -> None:
    """Compile an entry, or load it from the disk cache, before its first call. formats: those of the model's weights."""
    if not DISABLED:
        prove(tuple(sorted(name for name in formats if name in PACKED and PACKED[name].values)))
        run.compile((i64[::1], i64[:, ::1], i64, i64))
