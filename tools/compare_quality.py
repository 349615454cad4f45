"""npmix's quantisation against llama.cpp's: KL divergence and perplexity of the same checkpoint at the same bits, with and without calibration.

    pip install '.[dev,compare]'                  transformers for the base, llama.cpp for the peer (or --llama-python), matplotlib
    python tools/compare_quality.py --work DIR --json FILE --plot FILE.png

One hard fact: only the experts differ. Embeddings, head and attention are q8 on our side and Q8_0 on theirs, the router is float32 on both,
keys and values too, and both are held against one set of float32 log-probabilities that transformers computed.

The text is cut as llama.cpp's perplexity tool cuts it (windows of 512, second half scored). Errors are paired: of the differences, window by
window (a window's positions are not independent, windows nearly are). Measured is on the larger piece of what the bundled model's training did
not have, calibrated on the smaller: two good roundings differ in perplexity by less than the chance of a few windows, so one counts as higher
only from DOUBT of its own errors on. Calibration: `npmix calibrate`; llama.cpp gets the same mean squares as its importance matrix. First both
run without rounding, which must give the base's probabilities: else they are not the same model.
DIR keeps what was computed of the base and of llama.cpp, and is used again for the same checkpoint, text and settings only.
"""

import argparse
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny_corpus  # noqa: E402
from quality_peer import Peer, PeerError, llama_arrays, llama_importance  # noqa: E402

from npmix.calibrate import calibrate  # noqa: E402
from npmix.checkpoint import open_checkpoint  # noqa: E402
from npmix.convert import convert, info  # noqa: E402
from npmix.engine import Engine  # noqa: E402
from npmix.evaluation import LogitsReader, LogitsWriter, Plan, Scores, make_plan, run_windows, score  # noqa: E402
from npmix.formats import PACKED  # noqa: E402
from npmix.store.importance import load_importance  # noqa: E402
from npmix.threads import default_threads  # noqa: E402
from npmix.tokenizer import Tokenizer  # noqa: E402

TYPES = {"q2": "Q2_K", "q3": "Q3_K", "q4": "Q4_K", "q5": "Q5_K", "q6": "Q6_K", "q8": "Q8_0"}
OTHERS = "Q8_0"  # theirs beside our q8: embeddings, head, attention
GOALS = {"q8": 1.0}  # KL of ours over theirs at most
GOAL = 0.9
DOUBT = 2  # standard errors
SAME_MODEL = 1e-5  # nats of KL that two float32 programs may differ by


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def other_modules() -> str:
    """The modules of Python's library that neither the bundled model's training nor the tests' held-out text has."""
    library = tiny_corpus.default_stdlib()
    names = sorted(tiny_corpus.HELD - set(tiny_corpus.PIECE))
    return "".join((library / name).read_text(encoding="utf-8") for name in names)


# ---- what was found ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One program at one width. bits: a weight of the experts, all bytes counted. kl, nll: nats, (windows, scored positions)."""

    label: str
    bits: float
    kl: np.ndarray
    nll: np.ndarray

    def figures(self) -> dict:
        """Means with the standard errors of windows."""
        kl, kl_error = over_windows(self.kl)
        nll, nll_error = over_windows(self.nll)
        return {
            "label": self.label, "bits": self.bits, "kl": kl, "kl_error": kl_error,
            "perplexity": math.exp(nll), "perplexity_error": math.exp(nll) * nll_error,
        }  # fmt: skip


def over_windows(values: np.ndarray) -> tuple[float, float]:
    """(mean, its standard error) of (windows, positions), windows as the independent samples; NaN for a single one."""
    by_window = values.mean(1)
    error = by_window.std(ddof=1) / math.sqrt(len(by_window)) if len(by_window) > 1 else math.nan
    return float(by_window.mean()), float(error)


def paired(ours: Side, theirs: Side) -> dict:
    """Difference and ratio of KL, and ratio of perplexities, ours against theirs, each with the standard error of paired windows."""
    difference, error = over_windows(ours.kl - theirs.kl)
    loss, loss_error = over_windows(ours.nll - theirs.nll)
    base = float(theirs.kl.mean())
    ratio = float(ours.kl.mean()) / base
    _, ratio_error = over_windows((ours.kl - ratio * theirs.kl) / base)  # to first order
    return {
        "kl_difference": difference, "kl_difference_error": error, "kl_ratio": ratio, "kl_ratio_error": ratio_error,
        "perplexity_ratio": math.exp(loss), "perplexity_ratio_error": math.exp(loss) * loss_error,
    }  # fmt: skip


def row(width: str, calibrated: bool, ours: Side, theirs: Side) -> dict:
    """One line of the table, with whether the goal is met."""
    found = {"width": width, "calibrated": calibrated, "npmix": ours.figures(), "llamacpp": theirs.figures(), **paired(ours, theirs)}
    doubt = DOUBT * np.nan_to_num(found["perplexity_ratio_error"])
    found["met"] = bool(ours.bits <= theirs.bits and found["kl_ratio"] <= GOALS.get(width, GOAL) and found["perplexity_ratio"] <= 1 + doubt)
    return found


def table(rows: list[dict]):
    """Lines for people: KL in units of 1e-3 nats."""
    yield (
        f"{'experts':14}{'bits':>7}{'perplexity':>12}{'KL / 1e-3':>18}   {'llama.cpp':10}{'bits':>7}{'perplexity':>12}{'KL / 1e-3':>18}"
        f"{'KL ratio':>18}{'difference / 1e-3':>22}{'perplexity ratio':>22}  goal"
    )
    for r in rows:
        a, b = r["npmix"], r["llamacpp"]

        def side(s):
            return f"{s['bits']:7.4g}{s['perplexity']:12.4f}{1e3 * s['kl']:10.4f} ± {1e3 * s['kl_error']:.4f}"

        yield (
            f"{r['width'] + (' calibrated' if r['calibrated'] else ''):14}{side(a)}   {b['label']:10}{side(b)}"
            f"{r['kl_ratio']:10.3f} ± {r['kl_ratio_error']:.3f}{1e3 * r['kl_difference']:13.4f} ± {1e3 * r['kl_difference_error']:.4f}"
            f"{r['perplexity_ratio']:13.5f} ± {r['perplexity_ratio_error']:.5f}  {'met' if r['met'] else 'MISSED'}"
        )


def plot(rows: list[dict], path: Path) -> None:
    """KL over bits a weight, both programs, with and without calibration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for program, name, colour in (("npmix", "npmix", "tab:blue"), ("llamacpp", "llama.cpp", "tab:orange")):
        for calibrated, style in ((False, "o--"), (True, "s-")):
            points = sorted((r[program]["bits"], r[program]["kl"], r[program]["kl_error"]) for r in rows if r["calibrated"] == calibrated)
            if points:
                bits, kl, error = zip(*points)
                axes.errorbar(bits, kl, yerr=error, fmt=style, color=colour, label=name + (", calibrated" if calibrated else ""))
    axes.set(xlabel="bits a weight of the experts", ylabel="KL divergence from float32, nats a token", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# ---- measuring -----------------------------------------------------------------------------------------


def write_base(path: Path, checkpoint: Path, plan: Plan, vocab_size: int) -> None:
    """Log-probabilities of transformers in float32, from the saved checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad(), LogitsWriter(path, plan, vocab_size, f"{checkpoint}, transformers, float32") as writer:
        for window in plan.windows:
            logits = model(torch.tensor([plan.fed(window)]), use_cache=False).logits[0, window.first :]
            writer.add(score(logits.numpy(), plan.targets(window)))
            writer.end_window()
        writer.finish()


def as_side(label: str, bits: float, scores: Scores, plan: Plan) -> Side:
    """The positions of a text as (windows, positions)."""
    return Side(label, bits, *(scores.column(name).reshape(len(plan.windows), -1) for name in ("kl", "nll")))


class Comparison:
    """Checkpoint, text, base and both programs."""

    def __init__(self, args, peer):
        self.args, self.peer, self.work = args, peer, args.work
        self.threads = args.threads or default_threads()
        self.source = open_checkpoint(args.checkpoint)
        self.config = self.source.config
        tokenizer = Tokenizer.for_model(self.source.tokenizer_path, self.config)
        ids = tokenizer.encode(args.text.read_text(encoding="utf-8") if args.text else other_modules())
        self.plan = make_plan(ids, args.context, None, tokenizer.bos_id, args.limit)
        self.calibration = args.calibration.read_text(encoding="utf-8")
        self.base, self.importance = self.work / "base.logits", self.work / "importance.safetensors"
        self._own_work()

    def _own_work(self) -> None:
        """Refuse a folder that holds what belongs to other settings."""
        digest = hashlib.sha256(np.asarray(self.plan.ids, "<i4").tobytes() + self.calibration.encode()).hexdigest()
        about = {"checkpoint": self.source.fingerprint(), "texts": digest, "context": self.args.context, "limit": self.args.limit}
        beside = self.work / "about.json"
        if beside.exists() and json.loads(beside.read_text()) != about:
            raise SystemExit(f"{self.work} was made of another checkpoint, text or setting: remove it or choose another --work")
        beside.write_text(json.dumps(about))

    def prepare(self) -> None:
        """The base's log-probabilities and the importance file, unless they are there."""
        if not self.base.exists():
            say("base: transformers in float32")
            write_base(self.base, self.args.checkpoint, self.plan, self.config.vocab_size)
        if not self.importance.exists():
            say("calibrating")
            calibrate(self.args.checkpoint, self.calibration, self.importance, threads=self.threads)

    def reader(self) -> LogitsReader:
        return LogitsReader(self.base, self.plan, self.config.vocab_size)

    def ours(self, label: str, folder: Path, bits: float) -> Side:
        """npmix on a store or a checkpoint."""
        with Engine(folder, threads=self.threads, context=self.plan.context, kv="f32") as engine, self.reader() as base:
            return as_side(label, bits, run_windows(self.plan, engine, base), self.plan)

    def packed(self, width: str, calibrated: bool) -> Side:
        """npmix at one width, converted anew."""
        folder = self.work / f"{width}{'-calibrated' if calibrated else ''}"
        convert(self.args.checkpoint, folder, width, importance=self.importance if calibrated else None, force=True, threads=self.threads)
        kinds = info(folder)["weights"]
        formats = {kind: kinds[kind]["formats"] for kind in ("embeddings", "attention", "output") if kind in kinds}
        if any(not names[0].startswith("q8") or len(names) > 1 for names in formats.values()):
            raise SystemExit(f"{folder}: {formats}, expected q8 beside {OTHERS}: not a fair comparison")
        return self.ours("npmix", folder, kinds["experts"]["bits_per_weight"])

    def theirs(self, type: str, calibrated: bool) -> Side:
        """llama.cpp with experts of one type ("F32": not rounded at all), from DIR if it was measured before."""
        name = f"{type}{'-calibrated' if calibrated else ''}"
        kept = self.work / f"llamacpp-{name}.npz"
        if kept.exists():
            with np.load(kept, allow_pickle=False) as found:
                return Side(type, float(found["bits"]), found["kl"], found["nll"])
        say(f"llama.cpp {name}")
        path, bits = self._gguf(), 32.0
        if type != "F32":
            path, bits = self._quantized(type, calibrated)
        self.peer.ask("open", gguf=path, positions=self.plan.context, threads=self.threads)
        scores, rows = Scores(), self.work / "rows.npy"
        with self.reader() as base:
            for window in self.plan.windows:
                self.peer.ask("logits", ids=self.plan.fed(window), first=window.first, out=rows)
                block = score(np.load(rows, allow_pickle=False), self.plan.targets(window))
                base.begin(window)
                scores.add(1.0, block, base.read(len(block.nll)))
        side = as_side(type, bits, scores, self.plan)
        whole = self.work / "whole.npz"  # a name of its own until it is one
        np.savez(whole, bits=bits, kl=side.kl, nll=side.nll)
        whole.replace(kept)
        return side

    def _gguf(self) -> Path:
        """The checkpoint as float32 GGUF."""
        path, arrays = self.work / "f32.gguf", self.work / "weights.npz"
        if not path.exists():
            np.savez(arrays, **llama_arrays(self.source))
            self.peer.ask("gguf", weights=arrays, config=self.config.to_dict(), out=path)
            arrays.unlink()
        return path

    def _quantized(self, type: str, calibrated: bool) -> tuple[Path, float]:
        """The file, and bits a weight of its experts; every tensor's type is looked at."""
        matrix, path = self.work / "imatrix.npz", self.work / f"{type}.gguf"
        if calibrated:
            means, counts, _ = load_importance(self.importance, self.config)
            np.savez(matrix, **llama_importance(means, counts, self.config))
        what = {"gguf": self._gguf(), "out": path, "experts": type, "others": OTHERS, "threads": self.threads}
        tensors = self.peer.ask("quantize", **what, importance=matrix if calibrated else None)["tensors"]
        for name, (found, _, _) in tensors.items():
            expected = type if "_exps" in name else "F32" if "norm" in name or "gate_inp" in name else OTHERS
            if found != expected:
                raise SystemExit(f"{path}: {name} is {found}, expected {expected}: not a fair comparison")
        experts = [entry for name, entry in tensors.items() if "_exps" in name]
        return path, 8 * sum(e[1] for e in experts) / sum(e[2] for e in experts)

    def run(self, widths: list[str]) -> list[dict]:
        """Both programs without rounding, then every width."""
        self.prepare()
        for side in (self.ours("npmix", self.args.checkpoint, 16.0), self.theirs("F32", False)):
            kl = float(side.kl.mean())
            say(f"{side.label} without rounding: perplexity {math.exp(side.nll.mean()):.5f}, KL {kl:.2e}")
            if not kl < SAME_MODEL:
                raise SystemExit(
                    f"{side.label} without rounding is {kl:.2e} nats from the base, expected below {SAME_MODEL}: another model"
                )
        rows = []
        for width in widths:
            for calibrated in (False, True):
                rows.append(row(width, calibrated, self.packed(width, calibrated), self.theirs(TYPES[width], calibrated)))
                say(f"{width}{' calibrated' if calibrated else ''}: KL ratio {rows[-1]['kl_ratio']:.3f}")
        return rows


def arguments() -> argparse.ArgumentParser:
    data, work = ROOT / "tests" / "data", Path("compare_quality.work")
    parser = argparse.ArgumentParser(description="Compare npmix's quantisation with llama.cpp's at the same bits a weight.")
    parser.add_argument("--checkpoint", type=Path, default=data / "tiny_mixtral", metavar="DIR", help="Hugging Face folder of a Mixtral")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="default: held-out modules of this Python's library that heldout.txt lacks"
    )
    parser.add_argument("--calibration", type=Path, default=data / "heldout.txt", metavar="FILE", help="default: the tests' held-out text")
    parser.add_argument("--work", type=Path, default=work, metavar="DIR", help=f"keeps models and base (default {work})")
    known = [width for width in TYPES if width in PACKED]
    parser.add_argument("--widths", default=",".join(known), metavar="A,B", help=f"some of {', '.join(known)}")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a window (default 512)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N windows")
    parser.add_argument("--threads", type=int, metavar="N", help="of both programs; default: the physical cores")
    parser.add_argument("--llama-python", metavar="PATH", default=sys.executable, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    return parser


def main(argv=None) -> None:
    args = arguments().parse_args(argv)
    widths = args.widths.split(",")
    unknown = [width for width in widths if width not in TYPES or width not in PACKED]
    if unknown:
        raise SystemExit(f"--widths: {unknown[0]!r} is none of {', '.join(width for width in TYPES if width in PACKED)}")
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        with Peer(args.llama_python) as peer:
            comparison = Comparison(args, peer)
            rows = comparison.run(widths)
    except PeerError as error:
        raise SystemExit(f"compare_quality: {error}") from None
    plan = comparison.plan
    print(
        f"{args.checkpoint}: {len(plan.windows)} windows of {plan.context}, {sum(w.scored for w in plan.windows):,} tokens scored; {peer.version}"
    )
    print(*table(rows), sep="\n")
    if args.json:
        about = {"checkpoint": str(args.checkpoint), "windows": len(plan.windows), "context": plan.context, "peer": peer.version}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
