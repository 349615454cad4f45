"""npmix against llama.cpp on the same shapes and the same bits, each beside the ceiling of the machine at that minute.

    pip install llama-cpp-python gguf                                       (compiles llama.cpp; or see --llama-bench)
    python tools/compare_llamacpp.py --work DIR --json FILE                 all rows; at most 25 minutes
    python tools/compare_llamacpp.py --work DIR --rows decode,prefill_512   some; what DIR holds is used again

One hard fact: the bandwidth of a shared machine halves and doubles for minutes at a time. So ceiling, npmix, ceiling, llama.cpp
run in turns; ratio and share are quotients within a turn, and the median over the turns is what counts. Run it on a machine that does
nothing else: llama.cpp's threads spin at barriers and lose far more than npmix to any other program (each turn notes `other_cores`).

Random full-width Mixtrals with near-uniform routing, every matrix at 4.5 bits on both sides (`npmix convert --quant q4 --uniform`, Q4_0):
4 layers; one layer for decode at depth; two for a long prompt, as both programs skip the last layer's experts.
`decode_shipped` is the profile `--quant q4` with its own bytes beside the same llama.cpp. A token's ceiling:

    decode        the bytes it needs (all matrices but unchosen experts, keys and values), over the read bandwidth
    prefill_512   the operations by weights it needs, over the int8 peak
    prefill_16    the larger of that, and of the bytes of all matrices (in the last layer: of the chosen experts only) over the bandwidth
    prefill_8192  as prefill_512, and attention's operations over the float32 peak; `attention` is attention's share of that peak by itself
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from llamacpp_peer import PeerError, Settings, Work, best_settings, make_peer, write_gguf  # noqa: E402
from make_checkpoint import MIXTRAL, PackedSource, make_config  # noqa: E402

from npmix.benchmark import attention_operations, decode_bytes, machine, prefill_operations, prompt_bytes, token_ids  # noqa: E402
from npmix.convert import convert  # noqa: E402
from npmix.engine import Engine  # noqa: E402
from npmix.kernels import tables as t  # noqa: E402
from npmix.kernels.ceilings import Ceilings  # noqa: E402
from npmix.store import open_store  # noqa: E402
from npmix.threads import default_threads  # noqa: E402

LIMIT = 25 * 60  # seconds
PROBING = 180  # seconds a row may spend on finding llama.cpp's best settings
SIZES = ("dim", "hidden", "heads", "kv_heads", "head_dim", "experts", "active", "vocab")


@dataclass(frozen=True)
class Row:
    """One line of the table. store: "uniform" or "shipped"."""

    name: str
    layers: int
    work: Work
    store: str = "uniform"


ROWS = {
    row.name: row
    for row in (
        Row("decode", 4, Work("decode", 64)),
        Row("decode_shipped", 4, Work("decode", 64), "shipped"),
        Row("prefill_16", 4, Work("prefill", 16)),
        Row("prefill_512", 4, Work("prefill", 512)),
        Row("decode_8192", 1, Work("decode", 32, 8192)),
        Row("decode_32768", 1, Work("decode", 32, 32768)),
        Row("prefill_8192", 2, Work("prefill", 8192)),
    )
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def busy_seconds() -> float:
    """Processor time that all programs and the host of a virtual machine took since the start (Linux), else 0."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# ---- what a machine could do at most -----------------------------------------------------------------


def ceiling(engine, work: Work, peaks: dict) -> float:
    """Tokens a second at most. peaks: bytes a second of `read`, operations a second of `int8` and `float32`."""
    if work.kind == "decode":
        return peaks["read"] / decode_bytes(engine, work.depth + work.tokens // 2)
    seconds = prefill_operations(engine.config, work.tokens) / peaks["int8"]
    if work.tokens <= 64:  # fewer tokens an expert than memory is slower than arithmetic
        seconds = max(seconds, prompt_bytes(engine, work.tokens) / peaks["read"])
    if work.tokens >= 4096:
        seconds += attention_operations(engine.config, work.tokens) / peaks["float32"]
    return work.tokens / seconds


def measure_peaks(ceilings: Ceilings, work: Work) -> dict:
    """The ceilings this work needs, in bytes and operations a second."""
    peaks = {}
    if work.kind == "decode" or work.tokens <= 64:
        peaks["read"] = ceilings.read_bandwidth()
    if work.kind == "prefill":
        peaks["int8"] = ceilings.int8_peak()
        if work.tokens >= 4096:
            peaks["float32"] = ceilings.float32_peak()
    return peaks


# ---- npmix's side ------------------------------------------------------------------------------------


def speed(engine: Engine, work: Work) -> float:
    """Tokens a second; the cache is filled to the depth first, and that is not counted."""
    ids = token_ids(work.positions, engine.config.vocab_size)
    engine.reset(min(engine.position, work.depth))
    if work.kind == "prefill":
        began = time.perf_counter()
        engine.prefill(ids)
        return work.tokens / (time.perf_counter() - began)
    if engine.position < work.depth:
        engine.prefill(ids[engine.position : work.depth])
    began = time.perf_counter()
    for id in ids[work.depth :]:
        engine.step(id)
    return work.tokens / (time.perf_counter() - began)


def attention_share(engine: Engine, work: Work, peaks: dict) -> float:
    """Attention's share of the float32 peak by itself, from the kernels' clocks: one more run."""
    clocks = engine._forward.state.array(t.CLOCKS)
    clocks[:] = 0
    seconds = work.tokens / speed(engine, work)
    spent = float(clocks[t.T_ATTENTION]) / float(clocks[1:].sum()) * seconds
    return attention_operations(engine.config, work.tokens) / spent / peaks["float32"]


# ---- rows and turns ----------------------------------------------------------------------------------


class Comparison:
    """Both programs, the ceilings, and what was found so far."""

    def __init__(self, args):
        self.args, self.began = args, time.monotonic()
        self.sizes = {name: getattr(args, name) for name in SIZES}
        self.threads = args.threads or default_threads()
        self.peer = make_peer(args.llama_bench, args.llama_python, self.threads, args.vocab)
        self.settings = Settings()
        self.rows: dict[str, dict] = {}

    def left(self) -> float:
        return LIMIT - (time.monotonic() - self.began)

    def store(self, layers: int, kind: str) -> Path:
        """A packed store in the work folder, made if it is not there."""
        path = self.args.work / f"{'q4u' if kind == 'uniform' else 'q4'}_{layers}l"
        config = make_config(layers=layers, **self.sizes)
        if not (path / "npmix.json").exists():
            say(f"making {path}")
            convert(PackedSource(config, "q4", kind == "uniform"), path, "q4", uniform=kind == "uniform")
        with open_store(path) as store:
            if store.config != config:
                raise SystemExit(f"{path} was made with other sizes: remove it or choose another --work")
        return path

    def gguf(self, layers: int) -> Path:
        """The same shapes as GGUF, made if it is not there."""
        path = self.args.work / f"q4_0_{layers}l.gguf"
        if not path.exists():
            say(f"making {path}")
        write_gguf(self.args.llama_python or sys.executable, path, make_config(layers=layers, **self.sizes).to_dict())
        return path

    def run(self, names: list[str]) -> None:
        """All rows of a model after one another; the peer's settings of one row are where the next row's search starts."""
        with Ceilings(self.threads) as ceilings:
            for layers, kind in dict.fromkeys((ROWS[name].layers, ROWS[name].store) for name in names):
                rows = [ROWS[name] for name in names if (ROWS[name].layers, ROWS[name].store) == (layers, kind)]
                store, gguf = self.store(layers, kind), self.gguf(layers)
                positions = -(-max(row.work.positions for row in rows) // 256) * 256
                with Engine(store, threads=self.threads, context=positions) as engine:
                    for row in rows:
                        if self.rows and self.left() < 60:
                            say(f"{row.name}: no time left")
                            continue
                        self.rows[row.name] = self.row(row, engine, gguf, ceilings, positions)
        self.peer.close()

    def row(self, row: Row, engine: Engine, gguf: Path, ceilings: Ceilings, positions: int) -> dict:
        """Settings, a warm-up of both, then the turns."""
        say(f"{row.name}: {row.layers} layers, {row.work.kind} of {row.work.tokens} at {row.work.depth}")
        same = next((found for found in self.rows.values() if found["work"] == asdict(row.work) and found["layers"] == row.layers), None)
        if same:
            settings, tried = Settings(**same["llamacpp_settings"]), same["llamacpp_tried"]
        else:
            settings, tried = best_settings(self.peer, gguf, row.work, self.settings, positions, min(PROBING, self.left() / 3), say)
            self.settings = Settings(settings.repack, settings.flash)
        self.peer.speed(gguf, self.short(row.work), settings, positions)
        speed(engine, self.short(row.work))
        turns: list[dict] = []
        longest = 0.0
        for number in range(self.args.turns):
            if turns and self.left() < 1.2 * longest + 20:
                say(f"{row.name}: time for {len(turns)} turns only")
                break
            began = time.monotonic()
            turns.append(self.turn(row.work, engine, gguf, ceilings, settings, positions))
            longest = max(longest, time.monotonic() - began)
            shown = ("npmix", "llamacpp", "ratio", "share_of_ceiling")
            say(f"  turn {number + 1}: " + ", ".join(f"{key} {turns[-1][key]:.3g}" for key in shown))
        found = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        if row.work.kind == "prefill" and row.work.tokens >= 4096:
            found["attention"] = attention_share(engine, row.work, measure_peaks(ceilings, row.work))
        found.update(layers=row.layers, store=row.store, work=asdict(row.work), turns=turns)
        found.update(llamacpp_settings=asdict(settings), llamacpp_tried=tried)
        return found

    def own_seconds(self) -> float:
        return time.process_time() + self.peer.processor_seconds()

    @staticmethod
    def short(work: Work) -> Work:
        """Enough to bring every page in and to fill the cache to the depth."""
        return Work(work.kind, min(work.tokens, 512), work.depth)

    def turn(self, work: Work, engine: Engine, gguf: Path, ceilings: Ceilings, settings: Settings, positions: int) -> dict:
        """Ceiling, npmix, ceiling, llama.cpp; and how much of the processor other programs took meanwhile."""
        busy, ours, began = busy_seconds(), self.own_seconds(), time.monotonic()
        before = measure_peaks(ceilings, work)
        npmix = speed(engine, work)
        after = measure_peaks(ceilings, work)
        peaks = {key: (before[key] + after[key]) / 2 for key in before}
        llamacpp = self.peer.speed(gguf, work, settings, positions)
        most = ceiling(engine, work, peaks)
        others = (busy_seconds() - busy - self.own_seconds() + ours) / (time.monotonic() - began)
        rates = {"read": "read_gbs", "int8": "int8_gops", "float32": "float32_gops"}
        return {
            "npmix": npmix,
            "llamacpp": llamacpp,
            "ratio": npmix / llamacpp,
            "share_of_ceiling": npmix / most,
            "ceiling": most,
            "llamacpp_share_of_ceiling": llamacpp / most,
            "other_cores": max(0.0, others),
            **{rates[key]: value / 1e9 for key, value in peaks.items()},
        }


# ---- the report --------------------------------------------------------------------------------------


def table(rows: dict[str, dict]):
    """A line a row; medians, least and most of the ratio and the share in brackets."""
    yield f"{'tokens/s':15}{'npmix':>9}{'llama.cpp':>11}{'ratio':>19}{'ceiling':>11}{'share':>16}  llama.cpp's best settings"
    for name, row in rows.items():
        ratios, shares = ([turn[key] for turn in row["turns"]] for key in ("ratio", "share_of_ceiling"))
        ratio = f"{row['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        share = f"{100 * row['share_of_ceiling']:.0f} % ({100 * min(shares):.0f}-{100 * max(shares):.0f})"
        more = f"; attention {100 * row['attention']:.0f} % of the float32 peak" if "attention" in row else ""
        words = Settings(**row["llamacpp_settings"]).words()
        yield f"{name:15}{row['npmix']:9.1f}{row['llamacpp']:11.1f}{ratio:>19}{row['ceiling']:11.1f}{share:>16}  {words}{more}"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare npmix with llama.cpp, in turns, beside the machine's ceilings.")
    work = Path("compare_llamacpp.work")
    parser.add_argument("--work", type=Path, default=work, metavar="DIR", help=f"keeps stores and GGUF files, 16 GB (default {work})")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="A,B", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--threads", type=int, metavar="N", help="of both programs; default: the physical cores")
    parser.add_argument("--llama-python", metavar="PATH", help="a Python that has llama-cpp-python and gguf; default: this one")
    parser.add_argument("--llama-bench", metavar="PATH", help="a llama-bench to run instead of llama-cpp-python (gguf is still needed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and single turns")
    for name in SIZES:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=MIXTRAL[name], metavar="N", help=f"default {MIXTRAL[name]}")
    return parser


def main(argv=None) -> None:
    args = arguments().parse_args(argv)
    names = args.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown or args.turns < 1:
        raise SystemExit(f"--rows: {unknown[0]!r} is none of {', '.join(ROWS)}" if unknown else "--turns: expected 1 or more")
    args.work.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    try:
        comparison.run(names)
    except PeerError as error:
        raise SystemExit(f"compare_llamacpp: {error}") from None
    finally:
        comparison.peer.close()
    on = machine()
    print(f"{on['cpu']}, {comparison.threads} threads, {on['int8_form']}; npmix {on['npmix']}; llama.cpp {comparison.peer.info}")
    print(*table(comparison.rows), sep="\n")
    most = max((turn["other_cores"] for row in comparison.rows.values() for turn in row["turns"]), default=0.0)
    if most > 0.1:
        print(f"other programs took up to {most:.2f} cores meanwhile: spinning threads suffer most, so this is no fair comparison")
    if args.json:
        about = {"machine": on, "threads": comparison.threads, "llamacpp": comparison.peer.info, "sizes": comparison.sizes}
        args.json.write_text(json.dumps({**comparison.rows, "about": about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
