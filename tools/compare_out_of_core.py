"""npmix against llama.cpp on a model larger than memory: each alone in a memory control group, from a cold page cache.

    pip install llama-cpp-python gguf
    python tools/compare_out_of_core.py --work DIR --json FILE                    all limits; 53 GB of disk, which is given back
    python tools/compare_out_of_core.py --store DIR --gguf FILE --limits 8,4      with files that are there already, which stay

One hard fact: the model is synthetic: all of Mixtral-8x7B's shapes, random weights, every matrix at 4.5 bits on both sides, near-uniform
routing (`make_checkpoint.py`); so no text is worth reading, and no expert is used more than another, as it would be in a trained model.

Per limit, and each from a cold cache: the disk's sequential rate, llama.cpp with the fastest of its settings that load, npmix with guessing,
npmix without, the disk again. Random token ids are fed one by one, as llama-bench does. --disk-rate
holds the disk to fewer bytes a second, for both programs, as another machine's might be. What is printed:

    tok/s       of the tokens fed, after the program said that it is ready; `loaded` in brackets: the same with loading counted, in which
                llama.cpp reads its map ahead and npmix the experts that its budget holds (`Engine.load_experts`)
    ratio       npmix over llama.cpp, over the tokens that both came to (--seconds cuts slow runs short)
    bound       tokens a second if the disk had read, at the rate measured around it, without a pause, what had to be read (all bytes of the
                experts that were missing, or that were read in time because of a right guess); share: npmix's part of that; later: the
                same of the second half of the tokens, when hardly any memory is touched for the first time
    read        gigabytes from the disk per token after loading, npmix / llama.cpp (/proc/PID/io)
    peak        the most memory of the control group, page cache counted (libraries that others brought into the cache are not), of both
"""

import argparse
import json
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare_llamacpp import busy_seconds, say  # noqa: E402
from disk import evict, sequential_rates  # noqa: E402
from json_lines import PeerError, Process  # noqa: E402
from llamacpp_peer import process_seconds, write_gguf  # noqa: E402
from make_checkpoint import MIXTRAL, PackedSource, make_config  # noqa: E402
from memory_group import MemoryGroup, NoGroup, disk_of  # noqa: E402

from npmix.benchmark import machine, token_ids  # noqa: E402
from npmix.convert import convert  # noqa: E402
from npmix.errors import NpmixError  # noqa: E402
from npmix.store import open_store  # noqa: E402

TOOLS = Path(__file__).resolve().parent
GIB = 1 << 30
LLAMACPP = {  # settings -> options of its worker's `load`; the first two want all weights in memory of their own
    "mapped and repacked": {"repack": True},
    "read into memory": {"repack": False, "mode": 0},
    "mapped": {"repack": False},
}
PROBE = 3  # tokens to choose between settings
NPMIX = {"guessing": {}, "not guessing": {"guess": False}}
SIZES = [name for name in MIXTRAL if name != "layers"]


# ---- one program, once --------------------------------------------------------------------------------


class Program:
    """A worker process in a control group, started, loaded and fed."""

    def __init__(self, python: str, worker: str, needs: str, path: Path, threads: int):
        self.python, self.worker, self.needs, self.path, self.threads = python, TOOLS / worker, needs, path, threads

    def load(self, process: Process, positions: int, options: dict) -> float:
        """Seconds."""
        if self.worker.stem == "npmix_worker":
            return process.ask("load", path=self.path, threads=self.threads, positions=positions, options=options)["seconds"]
        seconds = process.ask("load", path=self.path, **options)["seconds"]
        process.ask("context", positions=max(256, positions), flash=True, ubatch=32, threads=self.threads)
        return seconds

    def run(self, ids: list[int], limit: int, options: dict, patience: float, disk: tuple[str, int] | None = None) -> dict:
        """Feed the ids from a cold start; after `patience` seconds no further ones. Returns what was found, an "error" where it failed.

        disk: `MemoryGroup`'s.
        """
        found = {"tokens": [], "logits": [], "options": options, "load_seconds": 0.0, "processor": 0.0, "read": 0}
        with MemoryGroup("npmix-compare", limit, disk) as group:
            process = Process(self.python, self.worker, self.needs, group.prefix)
            alarm = threading.Timer(2 * patience + 60, process.kill)
            alarm.start()
            try:
                found["load_seconds"] = self.load(process, len(ids), options)
                found["read_by_load"] = read_bytes(process.pid)
                while len(found["tokens"]) < len(ids) and sum(found["tokens"]) < patience:
                    answer = process.ask("decode", ids=[ids[len(found["tokens"])]])
                    found["tokens"].append(answer["seconds"])
                    found["logits"].append(answer.get("logits"))
                    found["read"] = read_bytes(process.pid) - found["read_by_load"]
                    if self.worker.stem == "npmix_worker" and len(found["tokens"]) == len(ids) // 2:
                        found["halfway"] = {"tokens": len(found["tokens"]), **process.ask("statistics")}
                if self.worker.stem == "npmix_worker":
                    found["statistics"] = process.ask("statistics")
            except PeerError as error:
                found["error"] = str(error)
            finally:
                alarm.cancel()
                found["processor"] = process_seconds(process.pid)
                process.kill()
            found.update(peak=group.peak(), killed=group.killed())
        return found


def read_bytes(pid: int) -> int:
    """Bytes a process has had read from the disk, by page faults too (Documentation/filesystems/proc.rst, /proc/PID/io)."""
    try:
        return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/io").read_text().splitlines() if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return 0


def speed(run: dict, count: int | None = None, loading: bool = False) -> float:
    """Tokens a second over the first `count` tokens, 0 if there are none."""
    seconds = run["tokens"][:count]
    return len(seconds) / (sum(seconds) + run["load_seconds"] * loading) if seconds else 0.0


# ---- all of a limit -----------------------------------------------------------------------------------


class Comparison:
    """Both programs and the files they read."""

    def __init__(self, args, store: Path, gguf: Path | None):
        self.args, self.store_files = args, sorted(store.glob("*.safetensors"))
        self.files = self.store_files + ([gguf] if gguf else [])
        with open_store(store) as opened:
            self.ids = token_ids(args.tokens, opened.config.vocab_size)
        self.npmix = Program(sys.executable, "npmix_worker.py", "numpy numba", store, args.threads)
        self.llamacpp = gguf and Program(args.llama_python or sys.executable, "llamacpp_worker.py", "llama-cpp-python", gguf, args.threads)
        self.settings = dict(LLAMACPP)  # those that loaded so far
        self.disk = (disk_of(self.files[0]), int(args.disk_rate * 1e9)) if args.disk_rate else None

    def compile(self, limit: int) -> None:
        """Have npmix's kernels compiled, outside of any limit and of what is timed."""
        process = Process(self.npmix.python, self.npmix.worker, self.npmix.needs)
        try:
            self.npmix.load(process, len(self.ids), {"ram": limit})
        finally:
            process.close()

    def cold(self, program: Program, limit: int, options: dict, tokens: int | None = None) -> dict:
        """A run with none of the files in the page cache."""
        stayed, busy, began = evict(self.files), busy_seconds(), time.monotonic()
        found = program.run(self.ids[:tokens], limit, options, self.args.seconds, self.disk)
        others = (busy_seconds() - busy - found["processor"]) / (time.monotonic() - began)
        return {**found, "stayed_in_cache": stayed, "other_cores": max(0.0, others)}

    def best_of_llamacpp(self, limit: int) -> dict:
        """A run with the fastest settings that load; those that do not are not tried with less memory again."""
        probes = {}
        for name, options in list(self.settings.items()):
            if len(self.settings) == 1:
                break
            probes[name] = self.cold(self.llamacpp, limit, options, PROBE)
            say(f"  llama.cpp, {name}: {in_words(probes[name])}")
            if probes[name].get("error"):
                del self.settings[name]
        if not self.settings:
            return {"tokens": [], "error": "llama.cpp loads with none of its settings", "probes": probes}
        name = max(self.settings, key=lambda name: speed(probes[name]) if name in probes else 1.0)
        return {**self.cold(self.llamacpp, limit, self.settings[name]), "settings": name, "probes": probes}

    def row(self, limit: int) -> dict:
        """Disk, llama.cpp, npmix with and without guessing, disk."""
        row = {"limit": limit, "disk": [sequential_rates(self.store_files)]}
        if self.llamacpp:
            row["llamacpp"] = self.best_of_llamacpp(limit)
            say(f"  llama.cpp: {in_words(row['llamacpp'])}")
            row["disk"].append(sequential_rates(self.store_files))
        for name, options in NPMIX.items():
            row[name] = self.cold(self.npmix, limit, {"ram": limit, "load": self.args.load, **options})
            say(f"  npmix, {name}: {in_words(row[name])}")
            row["disk"].append(sequential_rates(self.store_files))
        row["disk_rate"] = statistics.median(max(rates.values()) for rates in row["disk"])
        if self.disk:
            row["disk_rate"] = min(row["disk_rate"], self.disk[1])
        return row


def in_words(run: dict) -> str:
    if run.get("error"):
        return "killed: out of memory" if run.get("killed") else run["error"]
    return f"{speed(run):.3f} tok/s over {len(run['tokens'])} tokens, loaded in {run['load_seconds']:.1f} s"


# ---- the report ---------------------------------------------------------------------------------------


def bound(run: dict, disk_rate: float, later: bool = False) -> float:
    """Tokens a second if the disk read what had to be read and nothing else; 0 if nothing had to. later: of the tokens of the second half."""
    if not (stats := run.get("statistics")):
        return 0.0
    before = run["halfway"] if later else {}
    needed = stats["missed_bytes"] - before.get("missed_bytes", 0)
    return disk_rate * (len(run["tokens"]) - before.get("tokens", 0)) / needed if needed else 0.0


def later_share(run: dict, disk_rate: float) -> float | None:
    """Part of the bound that was had of the second half of the tokens; None where that is not known."""
    if not run.get("halfway") or not (most := bound(run, disk_rate, later=True)):
        return None
    seconds = run["tokens"][run["halfway"]["tokens"] :]
    return len(seconds) / sum(seconds) / most


COLUMNS = {  # and their widths
    "GiB": 5, "npmix": 14, "tok/s (loaded)": 16, "llama.cpp": 16, "ratio": 7, "(loaded)": 9, "bound": 7, "share": 6, "later": 6,
    "disk": 6, "read": 11, "peak": 12, "hits": 6, "guessed right": 15, "tokens": 8,
}  # fmt: skip


def table(rows: list[dict]):
    """Two lines a row: with guessing, and without."""
    yield in_columns(list(COLUMNS))
    for row in rows:
        peer = row.get("llamacpp") or {"tokens": []}
        for name in NPMIX:
            yield in_columns([f"{row['limit'] / GIB:.3g}", name, *cells(row[name], peer, row["disk_rate"])])


def in_columns(texts: list[str]) -> str:
    return " ".join(text.rjust(width) for text, width in zip(texts, COLUMNS.values()))


def cells(run: dict, peer: dict, disk_rate: float) -> list[str]:
    """A run's part of a line, from its tokens a second on; what is not known is a dash."""
    if run.get("error"):
        return [in_words(run)]
    ours, theirs = len(run["tokens"]), len(peer["tokens"])
    both, most, stats = min(ours, theirs), bound(run, disk_rate), run.get("statistics", {})
    later = later_share(run, disk_rate)
    hits, right, wrong = (stats.get(key, 0) for key in ("hits", "guesses_right", "guesses_wrong"))
    asked = hits + stats.get("misses", 0)

    def speeds(run):
        return f"{speed(run):.3f} ({speed(run, loading=True):.3f})"

    def ratio(loading):
        return f"{speed(run, both, loading) / speed(peer, both, loading):.2f}" if both else "-"

    def read(run):
        return f"{run['read'] / len(run['tokens']) / 1e9:.2f}" if run["tokens"] else "-"

    return [
        speeds(run),
        speeds(peer) if theirs else "does not run" if "error" in peer else "-",
        ratio(False),
        f"({ratio(True)})",
        f"{most:.3f}" if most else "-",
        f"{100 * speed(run) / most:.0f} %" if most else "-",
        f"{100 * later:.0f} %" if later else "-",
        f"{disk_rate / 1e9:.2f}",
        f"{read(run)}/{read(peer)}",
        f"{run['peak'] / GIB:.2f}/{peer.get('peak', 0) / GIB:.2f}",
        f"{100 * hits / asked:.0f} %" if asked else "-",
        f"{right} of {right + wrong}" if right + wrong else "-",
        f"{ours}/{theirs}",
    ]


def report(rows: list[dict], about: dict) -> None:
    """The table and what makes it doubtful."""
    print(about["model"])
    print(f"{about['machine']['cpu']}, {about['threads']} threads; disk in GB/s, memory in GiB; cold page cache, cgroup v{about['cgroup']}")
    print(*table(rows), sep="\n")
    runs = [run for row in rows for run in row.values() if isinstance(run, dict)]
    if (most := max((run.get("other_cores", 0) for run in runs), default=0)) > 0.15:
        print(f"other programs took up to {most:.2f} cores meanwhile: this is no fair comparison")
    if (most := max((run.get("stayed_in_cache", 0) for run in runs), default=0)) > 1 << 20:
        print(f"up to {most / 1e6:.0f} MB of the files stayed in the page cache: another program has them mapped")
    digests = [run["logits"] for row in rows for name in NPMIX if "error" not in (run := row[name])]
    same = all(one == other for run in digests for one, other in zip(run, digests[0]))
    print("npmix's logits: the same bits in all runs" if same else "npmix's logits DIFFER between runs")


# ---- the command --------------------------------------------------------------------------------------


def prepare(args, made: list[Path]) -> tuple[Path, Path | None]:
    """Store and GGUF; what is not there is made, and noted in `made` before."""
    store, gguf = args.store or args.work / "store_q4u", args.gguf or args.work / "q4_0.gguf"
    config = make_config(layers=args.layers, **{name: getattr(args, name) for name in SIZES})
    if not (store / "npmix.json").exists():
        say(f"making {store}")
        store.parent.mkdir(parents=True, exist_ok=True)
        made.append(store)
        convert(PackedSource(config, "q4", True), store, "q4", uniform=True)
    with open_store(store) as opened:
        config = opened.config
    if args.no_llama:
        return store, None
    if not gguf.exists():
        gguf.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(file.stat().st_size for file in store.iterdir()) * 1.01, shutil.disk_usage(gguf.parent).free
        if free < needed:
            raise SystemExit(f"{gguf} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")
        say(f"making {gguf}")
        made += [gguf, gguf.with_name(gguf.name + ".json")]
        write_gguf(args.llama_python or sys.executable, gguf, config.to_dict())
    return store, gguf


def remove(paths: list[Path]) -> None:
    """What this program made."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".partial").unlink(missing_ok=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare npmix with llama.cpp on a model larger than the memory each is allowed.")
    work = Path("compare_out_of_core.work")
    parser.add_argument("--work", type=Path, default=work, metavar="DIR", help=f"where files are made (default {work})")
    parser.add_argument("--store", type=Path, metavar="DIR", help="a packed store; made in --work if it is not there")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same shapes for llama.cpp; made in --work if it is not there")
    parser.add_argument("--keep", action="store_true", help="leave the files that were made")
    parser.add_argument("--limits", default="22,14,8,4", metavar="A,B", help="of memory in GiB, the largest first (default 22,14,8,4)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument("--seconds", type=float, default=300, metavar="S", help="after which a run gets no further tokens (default 300)")
    parser.add_argument("--disk-rate", type=float, metavar="GB/S", help="hold the disk to so many GB a second for both programs")
    parser.add_argument("--turns", type=int, default=1, metavar="N", help="of all limits (default 1)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of both programs (default 2)")
    parser.add_argument("--load", choices=("map", "read"), help="how npmix holds experts; default: its own")
    parser.add_argument("--llama-python", metavar="PATH", help="a Python that has llama-cpp-python and gguf; default: this one")
    parser.add_argument("--no-llama", action="store_true", help="npmix alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, every token's seconds among them")
    for name, value in MIXTRAL.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value, metavar="N", help=f"of what is made (default {value})")
    return parser


def main(argv=None) -> None:
    args = arguments().parse_args(argv)
    if args.disk_rate is not None and not args.disk_rate > 0:
        raise SystemExit(f"--disk-rate: {args.disk_rate}, expected gigabytes a second, above 0")
    try:
        limits = sorted((int(float(text) * 1024) << 20 for text in args.limits.split(",")), reverse=True)
        with MemoryGroup("npmix-try", max(limits)) as group:
            version = group.version
    except ValueError:
        raise SystemExit(f"--limits: {args.limits!r}, expected numbers of GiB such as 22,14,8,4") from None
    except NoGroup as error:
        raise SystemExit(f"compare_out_of_core: {error}; without one memory cannot be limited with the page cache counted") from None
    made: list[Path] = []
    rows: list[dict] = []
    try:
        store, gguf = prepare(args, made)
        comparison = Comparison(args, store, gguf)
        model = f"a synthetic model of {sum(f.stat().st_size for f in comparison.store_files) / 1e9:.1f} GB: random weights, near-uniform routing"
        about = {"model": model, "machine": machine(), "threads": args.threads, "tokens": args.tokens, "cgroup": version}
        comparison.compile(limits[0])
        for limit in limits * args.turns:
            say(f"{limit / GIB:.3g} GiB")
            rows.append(comparison.row(limit))
            if args.json:
                args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        report(rows, about)
    except (PeerError, NpmixError, NoGroup) as error:
        raise SystemExit(f"compare_out_of_core: {error}") from None
    finally:
        if not args.keep:
            remove(made)


if __name__ == "__main__":
    main()
