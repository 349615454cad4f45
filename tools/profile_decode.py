"""Where a decoded token's time goes, phase by phase, against the bytes it must read and the operations it must do.

    python tools/profile_decode.py MODEL [--depth 0] [--tokens 32] [--threads N] [--prefill N] [--json]

The phases are those of npmix/kernels/decode.py (or prefill.py with --prefill), measured by member 0's own clock, the
wait for the other members included; what is left of the wall time is Python, dispatch and waking the team.
"""

import json
import time

import click
import numpy as np

from npmix.benchmark import token_ids
from npmix.engine import Engine
from npmix.kernels import tables as t
from npmix.kernels.ceilings import Ceilings


def phase_bytes(engine, depth: int) -> dict[str, int]:
    """Bytes that each phase of decoding one token at `depth` reads."""
    c, tensor = engine.config, engine.source.tensor
    size = lambda *names: sum(tensor(f"layers.{i}.{n}").nbytes for i in range(c.n_layers) for n in names)  # noqa: E731
    experts = {
        n: sum(size(f"experts.{e}.{n}") for e in range(c.n_experts)) * c.n_active // c.n_experts for n in ("w_gate", "w_up", "w_down")
    }
    seen = min(depth + 1, c.sliding_window or depth + 1)
    return {
        "qkv": size("wq", "wk", "wv"),
        "attention": seen * engine.bytes_per_position(),
        "wo": size("wo"),
        "gate_up": experts["w_gate"] + experts["w_up"] + (size("router") if c.has_router else 0),
        "down": experts["w_down"],
        "head": tensor("output").nbytes,
    }


def measure(engine, depth: int, tokens: int, prefill: int) -> tuple[float, np.ndarray]:
    """Wall seconds and the clocks of every phase, over `tokens` decoded tokens or one prefill."""
    ids = token_ids(depth + tokens + prefill + 2, engine.config.vocab_size)
    clocks = engine._forward.state.array(t.CLOCKS)
    for warm in (True, False):
        engine.reset()
        if depth:
            engine.prefill(ids[:depth])
        clocks[:] = 0
        began = time.perf_counter()
        if prefill:
            engine.prefill(ids[depth : depth + prefill])
        else:
            for token in ids[depth : depth + (2 if warm else tokens)]:
                engine.step(token)
        wall = time.perf_counter() - began
    return wall, clocks[1:].astype(float)


@click.command()
@click.argument("model")
@click.option("--depth", default=0, show_default=True, help="Positions in the cache before.")
@click.option("--tokens", default=32, show_default=True, help="Tokens decoded.")
@click.option("--prefill", default=0, help="Profile a prefill of this many tokens instead.")
@click.option("--threads", type=int, help="Default: the physical cores.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of the table.")
def main(model, depth, tokens, prefill, threads, as_json):
    """Profile one model."""
    with Engine(model, threads=threads, context=depth + tokens + prefill + 2) as engine:
        engine.load_kernels()
        with Ceilings(engine.threads) as ceilings:
            bandwidth, peak = ceilings.read_bandwidth(), ceilings.int8_peak()
        wall, clocks = measure(engine, depth, tokens, prefill)
        count = 1 if prefill else tokens
        inside = _seconds_per_tick() * clocks / count
        nbytes = {} if prefill else phase_bytes(engine, depth + tokens // 2)
    rows = {name: {"ms": 1e3 * s, "gbs": nbytes.get(name, 0) / s / 1e9} for name, s in zip(t.PHASES, inside) if s > 0}
    rows["outside kernels"] = {"ms": 1e3 * (wall / count - inside.sum()), "gbs": 0.0}
    found = {
        "model": str(model),
        "threads": engine.threads,
        "ms": 1e3 * wall / count,
        "read_gbs": bandwidth / 1e9,
        "int8_gops": peak / 1e9,
        "phases": rows,
    }
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{found['ms']:.3f} ms a {'prefill' if prefill else 'token'}; memory read {bandwidth / 1e9:.1f} GB/s, int8 {peak / 1e9:.0f} GOP/s"
    )
    for name, row in rows.items():
        rate = f"{row['gbs']:6.1f} GB/s" if row["gbs"] else ""
        print(f"{name:16s} {row['ms']:9.3f} ms {100 * row['ms'] / found['ms']:5.1f} %  {rate}")


def _seconds_per_tick() -> float:
    """One tick of the processor's clock, against the system's."""
    from npmix.kernels._jit import njit
    from npmix.kernels.ops import ticks

    read = njit(lambda: ticks())
    read()
    a, began = read(), time.perf_counter()
    time.sleep(0.1)
    return (time.perf_counter() - began) / (read() - a)


if __name__ == "__main__":
    main()
