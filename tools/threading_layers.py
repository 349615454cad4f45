"""What a parallel region costs: npmix's team of plain threads beside Numba's threading layers.

    python tools/threading_layers.py --threads 2

Two bodies, an almost empty one and one of about 50 microseconds; two ways to a region: many inside one compiled
function (for the team: the barrier between two phases of a kernel), and one a call from Python. Every layer has a
process of its own, asked in turns while the others sleep; shown are medians over the turns.

One hard fact: the cost shown is what a region takes beyond its body, and the body is measured with all threads at
work and no boundary between, so that what threads take from each other is not counted as the layer's.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time

import click
import numba
import numpy as np

LAYERS = ("npmix", "workqueue", "omp", "tbb")
BODY = 50.0  # microseconds of the longer body
REGIONS = {"empty": 2000, "body": 400}


@numba.njit(nogil=True, inline="always")
def work(steps, seed):
    """A chain of `steps` shifts and xors, each waiting for the one before; products and sums a compiler would fold."""
    x = seed + 1
    for _ in range(steps):
        x ^= x << 13
        x ^= x >> 7
        x ^= x << 17
    return x


def team_regions(threads):
    """(many regions in one call, one region a call, many bodies in one region) on npmix's team."""
    from npmix.kernels._jit import njit
    from npmix.kernels.ops import atomic_put, get_i64
    from npmix.kernels.team import WORK, Team, barrier, called, make_call

    team, results = Team(threads), np.zeros(8 * (threads + 1), np.int64)
    cell, out = team.address, -(-results.ctypes.data // 64) * 64

    @njit
    def phases(cell, out, rounds, steps, fence, index, members):
        for r in range(rounds):
            atomic_put(out + 64 * index, work(steps, r + index))
            if fence:
                barrier(cell, members)

    @njit
    def served(cells, out, index, members):
        if index == 0:
            make_call(cells)
        while index == 0 or called(cells, index):
            atomic_put(out + 64 * index, work(get_i64(cells + WORK), index))
            barrier(cells, members)
            if index == 0:
                return

    def inside(rounds, steps):
        team.run(phases, cell, out, rounds, steps, 1)

    def from_python(rounds, steps):
        team.cells[WORK // 8] = steps
        for _ in range(rounds):
            team.call(served, cell, out)

    team.results = results  # what the address means lives as long as the team
    return inside, from_python, lambda rounds, steps: team.run(phases, cell, out, rounds, steps, 0)


def numba_regions(threads):
    """The same three on the Numba layer that NUMBA_THREADING_LAYER names."""
    numba.set_num_threads(threads)
    out = np.zeros(8 * threads, np.int64)

    @numba.njit(parallel=True)
    def region(out, steps, repeat):
        for i in numba.prange(out.size // 8):
            for r in range(repeat):
                out[8 * i] = work(steps, r + i)

    @numba.njit(parallel=True)
    def regions(out, rounds, steps):
        for r in range(rounds):
            for i in numba.prange(out.size // 8):
                out[8 * i] = work(steps, r + i)

    def from_python(rounds, steps):
        for _ in range(rounds):
            region(out, steps, 1)

    return lambda rounds, steps: regions(out, rounds, steps), from_python, lambda rounds, steps: region(out, steps, rounds)


def timed(function, rounds, steps) -> float:
    """Microseconds a region."""
    start = time.perf_counter()
    function(rounds, steps)
    return (time.perf_counter() - start) * 1e6 / rounds


def serve(layer: str, threads: int, steps: int) -> None:
    """Be one layer's process: a line of figures for every line that comes in."""
    try:
        inside, from_python, alone = team_regions(threads) if layer == "npmix" else numba_regions(threads)
        for function in (inside, from_python, alone):
            function(3, 10)  # compiles, starts the threads
        assert layer == "npmix" or numba.threading_layer() == layer
    except Exception as failure:  # a missing library shows as several kinds
        print(json.dumps({"missing": str(failure).strip().splitlines()[0]}), flush=True)
        return
    print("{}", flush=True)
    for _ in sys.stdin:
        figures = {}
        for name, n in (("empty", 0), ("body", steps)):
            rounds = REGIONS[name]
            timed(inside, 400, steps)  # wakes threads that slept, and gives the system time to put them on CPUs of their own
            figures[name] = {"inside": timed(inside, rounds, n), "python": timed(from_python, rounds, n), "alone": timed(alone, rounds, n)}
        print(json.dumps(figures), flush=True)


def start(layer: str, threads: int, steps: int):
    """The layer's process, or the reason why there is none."""
    env = {**os.environ, "NUMBA_NUM_THREADS": str(threads)}
    if layer != "npmix":
        env["NUMBA_THREADING_LAYER"] = layer
    command = [sys.executable, __file__, "--threads", str(threads), "--serve", layer, str(steps)]
    child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    line = child.stdout.readline()
    reason = json.loads(line).get("missing") if line else f"its process ended with code {child.wait()}"
    return child, reason


def ask(child) -> dict:
    child.stdin.write("go\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def steps_of_body() -> int:
    """How many steps take BODY microseconds."""
    work(10, 1)
    caller = numba.njit(lambda steps, seed: work(steps, seed))
    caller(10, 1)
    return int(20_000 * BODY / min(timed(lambda _, n: caller(n, 1), 1, 20_000) for _ in range(50)))


@click.command()
@click.option("--threads", type=int, default=None, help="Threads of each layer; the default is every CPU this process may use.")
@click.option("--turns", type=int, default=9, show_default=True)
@click.option("--serve", "served", nargs=2, type=(click.Choice(LAYERS), int), hidden=True)
def main(threads, turns, served):
    """Print the cost of a region on each layer, as a table and as JSON."""
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if served:
        return serve(served[0], threads, served[1])
    steps = steps_of_body()
    started = {layer: start(layer, threads, steps) for layer in LAYERS}
    missing = {layer: reason for layer, (_, reason) in started.items() if reason}
    turns_of = {layer: [] for layer in LAYERS if layer not in missing}
    for _ in range(turns):
        for layer, kept in turns_of.items():
            kept.append(ask(started[layer][0]))
            time.sleep(0.1)  # threads of this layer may spin for a while
    for child, _ in started.values():
        child.stdin.close()
        child.wait()

    def cost(layer, body, way):
        """Median microseconds of a region beyond its body."""
        return statistics.median(turn[body][way] - turn[body]["alone"] for turn in turns_of[layer])

    print(f"{threads} threads, Numba {numba.__version__}, {turns} turns: microseconds of a region beyond its body\n")
    print(f"{'':12}{'in one function':>24}{'one call from Python':>26}")
    print(f"{'':12}{'empty':>12}{f'{BODY:.0f} us':>12}{'empty':>14}{f'{BODY:.0f} us':>12}{'body alone':>14}")
    table = {}
    for layer in LAYERS:
        if layer in missing:
            print(f"{layer:12}not available: {missing[layer]}")
            continue
        figures = {f"{way} {body}": round(cost(layer, body, way), 2) for way in ("inside", "python") for body in ("empty", "body")}
        figures["body alone"] = round(statistics.median(turn["body"]["alone"] for turn in turns_of[layer]), 2)
        table[layer] = figures
        print(f"{layer:12}" + "".join(f"{x:>{w}.2f}" for x, w in zip(figures.values(), (12, 12, 14, 12, 14))))
    print(json.dumps({"threads": threads, "cpu": platform.processor() or platform.machine(), "us": table, "missing": missing}))


if __name__ == "__main__":
    main()
