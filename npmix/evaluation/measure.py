"""Perplexity of a model on a text, and its distance from a base model, window by window.

One hard fact: model and base walk through a window together, a few positions at a time, so memory holds some rows of the
vocabulary's width and four numbers for each position scored, however long the text.
"""

import contextlib
import time
from pathlib import Path

from .. import __version__
from ..engine import Engine
from ..errors import InputError, TokenizerError
from ..tokenizer import Tokenizer
from .logits_file import LogitsReader, LogitsWriter, digest
from .scores import Scores, score
from .windows import Plan, Window, make_plan

CONTEXT = 512
NUMBERS = 1 << 20  # logits that are looked at together: a few arrays of 8 MB


def evaluate(path, text: str, *, context: int = CONTEXT, stride: int | None = None, against=None, save_logits=None, against_logits=None,
             kv: str = "f16", threads: int | None = None, limit: int | None = None, on_progress=None) -> dict:  # fmt: skip
    """Perplexity of the model in the folder `path` on a text; against a base also the KL divergence from it.

    context, stride, limit: the windows, see `windows.make_plan`: without a stride as llama.cpp's perplexity tool has them,
    with one as Hugging Face's guide. against: the folder of the base model, run beside the model. against_logits: instead,
    a file that an evaluation of the base on the same text and windows wrote as save_logits (16 + 2 V bytes a position).
    kv, threads: as `Engine`, for both models. on_progress(done, total, loss): tokens computed and to compute, and the
    mean loss in nats so far (None before the first figure).

    Returns a dict that JSON can hold; every figure is {"value", "standard_error"}, losses and divergences are in nats:
    "perplexity" and its logarithm "log_perplexity"; with a stride "guide_perplexity"; against a base "base" (its own
    perplexity), "perplexity_ratio" and "log_perplexity_ratio" (model over base, paired), "kl" (KL(base || model) per position: "mean",
    "median", "percentile_90" .. "percentile_99.9", "largest"), "same_top" (share of positions where both find the
    same token likeliest); and "model", "settings", "text", "scored", "seconds".
    Definitions as in llama.cpp's tools/perplexity (--kl-divergence), but that here the base is not cut off below e^-16.

    Raises InputError, LogitsFileError, TokenizerError and what opening and running a model raises (all NpmixError); OSError.
    """
    if against is not None and against_logits is not None:
        raise InputError("against and against_logits are both given: hold the model against one base")
    if save_logits is not None and against_logits is not None and Path(save_logits).resolve() == Path(against_logits).resolve():
        raise InputError(f"{save_logits} is to be read and written: choose another name for one of them")
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_open(path, context, kv, threads))
        tokenizer, ids = text_ids(engine, text)
        plan = make_plan(ids, context, stride, tokenizer.bos_id, limit)
        vocab_size, base = engine.config.vocab_size, None
        if against is not None:
            base = stack.enter_context(_open(against, context, kv, threads))
            _check_base(base, engine, ids, text)
        elif against_logits is not None:
            base = stack.enter_context(LogitsReader(against_logits, plan, vocab_size))
        writer = stack.enter_context(LogitsWriter(save_logits, plan, vocab_size, str(path))) if save_logits is not None else None
        scores = run_windows(plan, engine, base, writer, on_progress)
        if writer:
            writer.finish()
        found = _about(engine, plan, limit, against, against_logits, base)
        found |= scores.figures(stride is not None)
    return {**found, "seconds": time.perf_counter() - began}


def _open(path, context: int, kv: str, threads: int | None) -> Engine:
    return Engine(path, threads=threads, context=context, kv=kv)


def text_ids(engine: Engine, text: str) -> tuple[Tokenizer, list[int]]:
    """The tokenizer of an engine's model and the ids of a text, the bos id in front."""
    if not isinstance(text, str):
        raise InputError(f"the text is {type(text).__name__}, expected str")
    if engine.source.tokenizer_path is None:
        raise TokenizerError(f"{engine.source.path} has no tokenizer.model: copy it from where the weights came from")
    tokenizer = Tokenizer.for_model(engine.source.tokenizer_path, engine.config)
    return tokenizer, tokenizer.encode(text)


def _check_base(base: Engine, engine: Engine, ids: list[int], text: str) -> None:
    """InputError unless both models speak of the same tokens."""
    if base.config.vocab_size != engine.config.vocab_size:
        raise InputError(
            f"{base.source.path} has a vocabulary of {base.config.vocab_size}, {engine.source.path} one of {engine.config.vocab_size}: "
            f"only models with the same tokens can be compared"
        )
    if base.source.tokenizer_path is not None and text_ids(base, text)[1] != ids:
        raise InputError(f"{base.source.path} and {engine.source.path} cut the text into different tokens: they cannot be compared")


def run_windows(plan: Plan, engine: Engine, base: Engine | LogitsReader | None = None, writer=None, on_progress=None) -> Scores:
    """Every window through the model, and through the base beside it: for who wants the numbers of each position.

    base: an engine of its own, or a reader of saved log-probabilities. writer: a LogitsWriter that gets the model's; it is
    left to the caller to finish. on_progress as in `evaluate`. Both engines need a context of plan.context positions.
    """
    scores, most = Scores(), max(1, min(64, NUMBERS // engine.config.vocab_size))
    engines = 2 if isinstance(base, Engine) else 1
    progress = _Progress(on_progress, engines * sum(w.fed for w in plan.windows))
    for window in plan.windows:
        with contextlib.ExitStack() as stack:  # an engine is at work until its iterator is closed
            blocks = stack.enter_context(contextlib.closing(_blocks(engine, plan, window, most, progress)))
            if isinstance(base, Engine):
                of_base = stack.enter_context(contextlib.closing(_blocks(base, plan, window, most, progress)))
            elif base:
                base.begin(window)
            for block in blocks:
                other = None if base is None else next(of_base) if isinstance(base, Engine) else base.read(len(block.nll))
                scores.add(window.guide_weight, block, other)
                progress.loss(float(block.nll.sum()), len(block.nll))
                if writer:
                    writer.add(block)
        if writer:
            writer.end_window()
    return scores


def _blocks(engine: Engine, plan: Plan, window: Window, most: int, progress: "_Progress"):
    """The scored positions of a window, at most `most` together."""
    targets, at = plan.targets(window), 0
    for rows in engine.logit_blocks(plan.fed(window), window.first, most, progress.within(window.fed)):
        yield score(rows, targets[at : at + len(rows)])
        at += len(rows)


class _Progress:
    """Tokens computed by one or two engines that take turns, and the loss so far."""

    def __init__(self, report, total: int):
        self._report, self._total = report, total
        self.done, self._sum, self._count = 0, 0.0, 0

    def within(self, tokens: int):
        """The callback of one engine for one window: it counts tokens times layers."""
        if self._report is None:
            return None
        reached = 0

        def on_progress(done: int, of: int) -> None:
            nonlocal reached
            new = tokens * done // of
            self.done, reached = self.done + new - reached, new
            self._report(self.done, self._total, self._sum / self._count if self._count else None)

        return on_progress

    def loss(self, nats: float, positions: int) -> None:
        """Take in the loss of some positions."""
        self._sum, self._count = self._sum + nats, self._count + positions


def _about(engine: Engine, plan: Plan, limit, against, against_logits, base) -> dict:
    """What was measured."""
    from ..benchmark import weight_formats

    found = {
        "npmix": __version__,
        "model": {"path": str(engine.source.path), "format": weight_formats(engine.source), "bytes": engine.memory()["weights"]},
        "settings": {"context": plan.context, "stride": plan.stride, "limit": limit, "kv": engine.kv, "threads": engine.threads},
        "text": {"tokens": len(plan.ids), "sha256": digest(plan.ids), "windows": len(plan.windows)},
        "against": None,
    }
    if isinstance(base, Engine):
        found["against"] = {"path": str(against), "format": weight_formats(base.source), "bytes": base.memory()["weights"]}
    elif base is not None:
        found["against"] = {"logits": str(against_logits), "path": base.base}
    return found
