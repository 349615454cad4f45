"""Prefill and decode in turns with the machine's ceilings, at several lengths, depths, chunks and numbers of threads.

One hard fact: within a turn every piece of work stands between two measurements of the ceilings and is held against
their mean; a share or ratio is formed within a turn, and what is told is the median over the turns with least and most.

A chunk is the number of prompt tokens computed at a time: npmix runs one sequence, so this is its batch size. The ids of
every engine are the beginning of one sequence; what the KV cache holds of it was computed once, and stays right whatever
is measured in between, because a token's keys and values have the same bits whichever way it came.
"""

import contextlib
import statistics
import time
from dataclasses import dataclass

from ..errors import InputError
from .compare import LAYOUT
from .host import machine, weight_formats
from .needs import attention_operations, decode_bytes, prefill_ceiling, prefill_operations, prompt_bytes
from .starts import starts

PROMPTS, DEPTHS = (16, 512), (0, 1024)  # as far as the model's positions allow
READ_BYTES = 2 << 30  # of anonymous memory that the read speed is measured on: no cache holds a part worth mention
LEAST_S = 0.1  # work is repeated within a turn until it took this long together
WARM_TOKENS = 128  # in every layer enough that every expert is chosen, so that all weights are in memory
START_TOKENS = 512  # longest prompt of the run whose memory is told


@dataclass(frozen=True)
class Work:
    """kind: "prefill" or "decode". tokens: computed. depth: positions in the cache before. chunk: prompt tokens at a time, 0 in decode."""

    kind: str
    threads: int
    tokens: int
    depth: int
    chunk: int


@dataclass(frozen=True)
class Plan:
    """What is measured: every prompt with every chunk, every depth, on every number of threads. context: positions that takes."""

    threads: tuple[int, ...]
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    chunks: tuple[int, ...]
    tokens: int
    context: int

    def engines(self) -> dict[tuple[int, int], list[Work]]:
        """(threads, chunk) -> its work. A chunk longer than the prompt is the prompt, and the same work is done once."""
        found: dict[tuple[int, int], list[Work]] = {}
        for threads in self.threads:
            done = set()
            for chunk in self.chunks:
                work = [Work("prefill", threads, n, 0, min(n, chunk)) for n in self.prompts]
                if chunk == self.chunks[0]:
                    work += [Work("decode", threads, self.tokens, depth, 0) for depth in self.depths]
                if new := [w for w in work if w not in done]:
                    found[threads, chunk] = new
                    done.update(new)
        return found


def make_plan(config, *, threads=None, prompt=None, depth=None, chunk=None, tokens=64) -> Plan:
    """The plan for a model. threads, prompt, depth, chunk: a number, several, or None for the default.

    Raises InputError for what is no whole number in range or does not fit the model's positions.
    """
    from ..engine import DEFAULT_CHUNK, MAX_CHUNK, MAX_THREADS
    from ..threads import default_threads

    positions = config.max_positions
    room = f"the model has {positions} positions"
    (tokens,) = _numbers("tokens", tokens, 1, positions, room)
    if prompt is None:
        prompt = tuple(n for n in PROMPTS if n <= positions) or (positions,)
    if depth is None:
        depth = tuple(n for n in DEPTHS if n + tokens <= positions)
    depths = _numbers("depth", depth, 0, positions - tokens, f"{room}, {tokens} of them for the decoded tokens")
    prompts = _numbers("prompt", prompt, 1, positions, room)
    return Plan(
        threads=_numbers("threads", default_threads() if threads is None else threads, 1, MAX_THREADS),
        prompts=prompts,
        depths=depths,
        chunks=_numbers("chunk", DEFAULT_CHUNK if chunk is None else chunk, 1, MAX_CHUNK),
        tokens=tokens,
        context=max(*prompts, max(depths) + tokens),
    )


def _numbers(name: str, given, low: int, high: int, why: str = "the limit") -> tuple[int, ...]:
    """One or several whole numbers from low to high, each once, in rising order. why: what sets the upper bound."""
    numbers = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    for n in numbers:
        if type(n) is not int or not low <= n <= high:
            raise InputError(f"{name} is {n!r}, expected a whole number from {low} to {high} ({why})")
    if not numbers:
        raise InputError(f"{name} is empty, expected at least one number")
    return tuple(sorted(set(numbers)))


def token_ids(count: int, vocab_size: int) -> list[int]:
    """`count` ids spread over the vocabulary, always the same: text would route to the same few experts again and again."""
    return [(1 + i * 2654435761) % (1 << 32) * vocab_size >> 32 for i in range(count)]


class Runner:
    """One engine, how far its cache holds `ids`, and the processor's clock against the system's."""

    def __init__(self, engine, ids: list[int]):
        self.engine, self.ids = engine, ids
        self.filled = 0  # positions of the cache that hold ids
        self._first = (0.0, 0)  # both clocks after the warm-up
        self._ended = 0.0  # the system's clock when the engine last came back

    def warm(self, depth: int) -> None:
        """Load kernels and every page of the weights, fill the cache to `depth`, decode two tokens."""
        self.engine.load_kernels()
        count = min(WARM_TOKENS, self.engine.context)
        self.engine.logits(self.ids[:count])  # all positions' logits: the last layer's experts too
        self.go_to(depth)
        for id in self.ids[depth : depth + 2]:
            self.engine.step(id)
        self._first = (time.perf_counter(), self.engine.phase_ticks()["now"])

    def go_to(self, depth: int) -> None:
        """Have exactly `depth` positions cached; only what was never computed is."""
        engine, window = self.engine, self.engine.config.sliding_window
        if window and window < engine.context:  # a ring: what lies behind the window was overwritten
            engine.reset()
            self.filled = 0
        engine.position = min(depth, self.filled)
        if engine.position < depth:
            engine.prefill(self.ids[engine.position : depth])
            self.filled = depth

    def measure(self, work: Work) -> dict[str, float]:
        """Seconds of the work: "wall", "kernels", "attention" (both by member 0's clock), "sampling" (beside "wall", decode only)."""
        runs, found = 0, {"wall": 0.0, "kernels": 0.0, "attention": 0.0, "sampling": 0.0}
        while found["wall"] < LEAST_S:
            self.go_to(work.depth)
            before = self.engine.phase_ticks()
            wall, sampling = self._prefill(work) if work.kind == "prefill" else self._decode(work)
            after = self.engine.phase_ticks()
            spent = {name: (after[name] - before[name]) * self._seconds_per_tick(after["now"]) for name in after if name != "now"}
            took = {"wall": wall, "kernels": sum(spent.values()), "attention": spent["attention"], "sampling": sampling}
            found = {name: found[name] + took[name] for name in found}
            runs += 1
        return {name: seconds / runs for name, seconds in found.items()}

    def _prefill(self, work: Work) -> tuple[float, float]:
        began = time.perf_counter()
        self.engine.prefill(self.ids[: work.tokens])
        self._ended = time.perf_counter()
        self.filled = max(self.filled, work.tokens)
        return self._ended - began, 0.0

    def _decode(self, work: Work) -> tuple[float, float]:
        """Seconds of all steps, and of choosing a token after each as `npmix run` does by default with a model of one's own."""
        from ..sampling import Sampling, sample

        settings, sampling, clock = Sampling(temperature=0.7, top_p=0.95), 0.0, time.perf_counter
        began = clock()
        for id in self.ids[work.depth : work.depth + work.tokens]:
            row = self.engine.step(id)
            self._ended = clock()
            sample(row, settings, 0.5)
            sampling += clock() - self._ended
        wall = clock() - began - sampling
        self.filled = max(self.filled, work.depth + work.tokens)
        return wall, sampling

    def _seconds_per_tick(self, now: int) -> float:
        """The processor's clock since the warm-up against the system's; now: its last reading."""
        began, first = self._first
        return (self._ended - began) / max(1, now - first)


def _ceilings(measured) -> dict[str, float]:
    """Bytes a second of `read`, operations a second of `int8` and `float32`."""
    return {"read": measured.read_bandwidth(), "int8": measured.int8_peak(), "float32": measured.float32_peak()}


def _turn(plan: Plan, runners: dict, rounds: dict, ceilings: dict) -> None:
    """One turn: on every number of threads ceilings, work, ceilings, work, ... ceilings; adds to rounds and ceilings."""
    from ..kernels.ceilings import Ceilings

    for threads in plan.threads:
        with Ceilings(threads, READ_BYTES) as measured:
            all_peaks = [_ceilings(measured)]
            for key, works in plan.engines().items():
                for work in works if key[0] == threads else ():
                    seconds = runners[key].measure(work)
                    all_peaks.append(_ceilings(measured))
                    before, after = all_peaks[-2:]
                    rounds.setdefault(work, []).append({**seconds, **{name: (before[name] + after[name]) / 2 for name in before}})
        means = {name: statistics.fmean(peaks[name] for peaks in all_peaks) for name in all_peaks[0]}
        ceilings.setdefault(threads, []).append(means)


def summary(values) -> dict:
    """{"median", "min", "max"} of one figure over the turns."""
    values = [float(value) for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _least_seconds(engine, work: Work, turn: dict) -> tuple[float, str]:
    """(seconds the work takes at this turn's ceilings, the one that holds)."""
    if work.kind == "prefill":
        return prefill_ceiling(engine, work.tokens, turn["read"], turn["int8"])
    return decode_bytes(engine, work.depth + work.tokens // 2) * work.tokens / turn["read"], "read"


def _order(item) -> tuple:
    """Prefill first, then by threads, length, depth and chunk."""
    work = item[0]
    return work.kind != "prefill", work.threads, work.tokens, work.depth, work.chunk


def prefill_row(engine, work: Work, turns: list[dict]) -> dict:
    """One prefill's figures: speed, share of the ceiling and which one, attention and the rest each against its own peak."""
    operations, pairs = prefill_operations(engine.config, work.tokens), attention_operations(engine.config, work.tokens)
    bounds = [_least_seconds(engine, work, turn) for turn in turns]
    return {
        "threads": work.threads,
        "tokens": work.tokens,
        "chunk": work.chunk,
        "operations": operations,
        "bytes": prompt_bytes(engine, work.tokens),
        "tokens_per_s": summary(work.tokens / turn["wall"] for turn in turns),
        "gops": summary(operations / turn["wall"] / 1e9 for turn in turns),
        "share": summary(least / turn["wall"] for (least, _), turn in zip(bounds, turns)),
        "bound": statistics.mode(bound for _, bound in bounds),
        "attention": {
            "operations": pairs,
            "seconds": summary(turn["attention"] for turn in turns),
            "share_of_float32": summary(pairs / max(turn["attention"], 1e-9) / turn["float32"] for turn in turns),
            "rest_share_of_int8": summary(operations / (turn["wall"] - turn["attention"]) / turn["int8"] for turn in turns),
        },
    }


def decode_row(engine, work: Work, turns: list[dict]) -> dict:
    """One decode's figures: speed, share of the read bandwidth, and milliseconds a token outside the kernels."""
    nbytes = decode_bytes(engine, work.depth + work.tokens // 2)
    return {
        "threads": work.threads,
        "tokens": work.tokens,
        "depth": work.depth,
        "bytes_per_token": nbytes,
        "tokens_per_s": summary(work.tokens / turn["wall"] for turn in turns),
        "gbs": summary(nbytes * work.tokens / turn["wall"] / 1e9 for turn in turns),
        "share": summary(nbytes * work.tokens / turn["wall"] / turn["read"] for turn in turns),
        "dispatch_ms": summary(1e3 * (turn["wall"] - turn["kernels"]) / work.tokens for turn in turns),
        "sampling_ms": summary(1e3 * turn["sampling"] / work.tokens for turn in turns),
        "outside_ms": summary(1e3 * (turn["wall"] - turn["kernels"] + turn["sampling"]) / work.tokens for turn in turns),
    }


def scaling_rows(engine, plan: Plan, rounds: dict) -> list[dict]:
    """More threads against the fewest: the speed's ratio beside the ceiling's own, turn by turn."""
    rows = []
    for work, turns in sorted(rounds.items(), key=_order):
        fewest = rounds[Work(work.kind, plan.threads[0], work.tokens, work.depth, work.chunk)]
        if work.threads == plan.threads[0]:
            continue
        pairs = list(zip(fewest, turns))
        least = [[_least_seconds(engine, work, turn)[0] for turn in pair] for pair in pairs]
        rows.append(
            {
                "kind": work.kind,
                "tokens": work.tokens,
                "depth": work.depth,
                "chunk": work.chunk,
                "threads": work.threads,
                "against": plan.threads[0],
                "ratio": summary(few["wall"] / many["wall"] for few, many in pairs),
                "ceiling_ratio": summary(few / many for few, many in least),
            }
        )
    return rows


def speeds(path, plan: Plan, kv: str, turns: int, report) -> dict:
    """Prefill, decode and scaling over the turns, as `benchmark` returns them."""
    from ..engine import Engine

    rounds: dict[Work, list[dict]] = {}
    ceilings: dict[int, list[dict]] = {}
    with contextlib.ExitStack() as stack:
        runners = {}
        for (threads, chunk), works in plan.engines().items():
            report(f"warming up: {threads} {'thread' if threads == 1 else 'threads'}, chunk {chunk}")
            engine = stack.enter_context(Engine(path, threads=threads, context=plan.context, chunk=chunk, kv=kv))
            runners[threads, chunk] = Runner(engine, token_ids(plan.context, engine.config.vocab_size))
            depth = max(work.depth for work in works)
            if depth:
                report(f"filling the cache to {depth:,} positions")
            runners[threads, chunk].warm(depth)
        for turn in range(turns):
            report(f"turn {turn + 1} of {turns}")
            _turn(plan, runners, rounds, ceilings)
        return {
            "ceilings": [
                {
                    "threads": threads,
                    "read_gbs": summary(peaks["read"] / 1e9 for peaks in of),
                    "int8_gops": summary(peaks["int8"] / 1e9 for peaks in of),
                    "float32_gops": summary(peaks["float32"] / 1e9 for peaks in of),
                }
                for threads, of in ceilings.items()
            ],
            "prefill": [prefill_row(engine, work, of) for work, of in sorted(rounds.items(), key=_order) if work.kind == "prefill"],
            "decode": [decode_row(engine, work, of) for work, of in sorted(rounds.items(), key=_order) if work.kind == "decode"],
            "scaling": scaling_rows(engine, plan, rounds),
        }


def benchmark(
    path, *, threads=None, prompt=None, depth=None, tokens=64, turns=5, chunk=None, kv="f16", start=True, report=lambda text: None
) -> dict:
    """Measure the model in a folder; returns plain JSON values, shares as fractions, times in seconds where no unit is named.

    threads (default the physical cores), prompt (lengths of prefill), depth (positions cached before decode), chunk (prompt
    tokens at a time): one number or several. tokens: decoded at each depth. turns: how often each figure is measured; one
    over the turns is {"median", "min", "max"}. start: also measure cold and warm start, in processes of their own.
    report(text) is called before each step. Raises InputError for settings the model cannot take, and what opening it raises.
    """
    from ..model.kv_cache import DTYPES
    from ..store import open_source

    (turns,) = _numbers("turns", turns, 1, 1 << 20)
    if kv not in DTYPES:
        raise InputError(f"kv is {kv!r}, expected one of {', '.join(DTYPES)}")
    with open_source(path) as source:
        config = source.config
        plan = make_plan(config, threads=threads, prompt=prompt, depth=depth, chunk=chunk, tokens=tokens)
        found = {
            "bench": LAYOUT,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "model": {"path": str(source.path), "layers": config.n_layers, "dim": config.dim, "format": weight_formats(source)},
            "settings": {"kv": kv, "turns": turns},
        }
        if start:
            count = min(max(plan.prompts), START_TOKENS)
            ids = token_ids(min(count + 16, config.max_positions), config.vocab_size)
            found.update(starts(source, plan.threads[-1], ids, count, kv, report))
    found.update(speeds(path, plan, kv, turns, report))
    return found
