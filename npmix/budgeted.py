"""A forward pass under a memory budget: what stays, how many experts fit beside it, and what to say when too few do.

One hard fact: what is not an expert is measured once the kernels are loaded and the weights that all tokens need are
read, with KV cache and scratch counted as if they were full; the experts get the rest.
"""

from . import budget
from .errors import InputError
from .model.streaming import StreamingForward
from .store.residency import Residency

SCRATCH_SHARE = 16  # of the budget, for a chunk longer than the default: each chunk reads all experts again


def open_forward(store, ram, load: str | None, guess: bool, context: int, chunk: int, longest: int, kv: str, threads: int):
    """A StreamingForward whose process stays below `ram` (`budget.parse`; None: "auto").

    chunk: tokens of a prefill step; when not all experts fit, up to `longest` if the scratch for them is no large part of the budget.
    Raises InputError for a budget that is too small, naming the least that would do; StoreError.
    """
    if store.kind != "store":
        raise InputError(f"{store.path} is no packed store, which a memory budget needs: npmix convert makes one")
    if load not in (None, "read", "map"):
        raise InputError(f'load is {load!r}, expected "map" or "read"')
    limit = budget.allowance("auto" if ram is None else ram)
    residency = Residency(store, load or "read", guess)
    try:
        forward = StreamingForward(residency, context, chunk, kv, threads)
        forward.load_kernels()
        fixed, needed = _fixed(forward) + residency.shared_bytes, residency.stats.experts * residency.expert_bytes
        if limit < fixed + needed and longest > chunk:
            more = min(longest, limit // SCRATCH_SHARE * chunk // forward.state.nbytes // chunk * chunk)
            if more > chunk:
                forward.team.close()
                forward = StreamingForward(residency, context, more, kv, threads)
                forward.load_kernels()
                fixed = _fixed(forward) + residency.shared_bytes
        _check(residency, forward, limit, fixed)
        residency.begin()
        fixed = _fixed(forward)
        residency.affordable = lambda: (min(limit, budget.permitted()) - fixed) // residency.expert_bytes
        residency.resize(residency.affordable())
        return forward
    except BaseException:
        residency.close()
        raise


def _fixed(forward) -> int:
    """Bytes of the process as it is now, with its buffers full."""
    return budget.own() + forward.cache.nbytes + forward.state.nbytes + budget.SPARE


def _check(residency, forward, limit: int, fixed: int) -> None:
    fewest = min(residency.stats.experts, residency.config.n_active + 1)  # those at work in a layer, and one on its way
    least = fixed + fewest * residency.expert_bytes
    if limit >= least:
        return
    cache, scratch, shared = forward.cache.nbytes, forward.state.nbytes, residency.shared_bytes
    raise InputError(
        f"a memory budget of {limit >> 20}M is too small, the least that would do is {(least >> 20) + 16}M: {shared >> 20}M of weights that "
        f"all tokens need, {fewest} experts of {residency.expert_bytes >> 20}M, KV cache {cache >> 20}M, scratch {scratch >> 20}M, "
        f"the program {(fixed - shared - cache - scratch) >> 20}M; give more, a smaller --context or --chunk, or --kv q8"
    )
