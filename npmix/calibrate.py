"""Calibration: a text through the model, layer by layer, to measure how large each matrix's inputs are.

One hard fact: after each layer the state beside the output is whole (temporary name, fsync, rename), so a run that was
killed at any moment goes on after the last layer it finished, and gives the same file to the bit.

Beside OUT, while it runs: OUT.partial (the layers done, and a digest of model, text and settings), OUT.rows-N.partial (what
layer N - 1 gave for every token, float32) and OUT.lock.

The method: mean squares of the inputs as in llama.cpp's imatrix; the expected squared error of a product with rounded
weights is, for inputs that are not correlated, the sum of squared errors of the weights times these.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np

from . import __version__
from .config import Config
from .errors import CalibrationError, InputError, NumericsError
from .model.observer import Observer
from .model.weights import Weights
from .store import open_source
from .store.importance import load_importance, save_importance
from .store.moments import MomentsWriter
from .store.writer import FileLock
from .threads import default_threads
from .tokenizer import Tokenizer

DEFAULT_WINDOW = 512  # tokens of a window, as llama.cpp's imatrix has it
MAX_WINDOW = 1 << 16
CHUNK = 512
SPARE = 64 << 20  # bytes of disk that must stay free


def windows(tokenizer: Tokenizer, text: str, window: int, tokens: int | None) -> np.ndarray:
    """The ids of a text, int32, cut into windows that each begin with the bos id; at most `tokens` of them, bos included."""
    ids = tokenizer.encode(text, bos=False)
    step = window if tokenizer.bos_id is None else window - 1
    out: list[int] = []
    for at in range(0, len(ids), step):
        if tokens is not None and len(out) >= tokens:
            break
        out += ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + ids[at : at + step]
    return np.array(out[:tokens], np.int32)


def calibrate(model, text: str, out, *, tokens=None, window=None, threads=None, moments=None, force=False, progress=None) -> dict:
    """Measure the inputs of every matrix of a model on a text and write the importance file `out` (`store/importance.py`).

    model: a packed store or a Hugging Face folder. tokens: how many of the text's to use at most. window: tokens of a
    sequence, default 512. moments: a second file, of second moments (`store/moments.py`). force: replace `out`
    and what another run left. progress(done, total) counts tokens, each layer's share of one as a fraction.
    Returns {"tokens", "window", "counts"}; counts: int64 (layers, E). Raises CalibrationError, InputError, StoreError ...
    """
    out, moments = Path(out), None if moments is None else Path(moments)
    for name, value, low, high in (("tokens", tokens, 2, 1 << 40), ("window", window, 2, MAX_WINDOW), ("threads", threads, 1, 1024)):
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise InputError(f"{name} is {value!r}, expected a whole number from {low} to {high}")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(model))
        config: Config = source.config
        if source.tokenizer_path is None:
            raise InputError(f"{source.path} has no tokenizer.model: copy it from where the weights came from")
        if window is not None and window > config.max_positions:
            raise InputError(f"window is {window}, expected at most {config.max_positions} (the model's maximum)")
        window = min(window or DEFAULT_WINDOW, config.max_positions)
        if window < 2:
            raise InputError(f"a model of {config.max_positions} position has no windows to calibrate with, expected at least 2")
        ids = windows(Tokenizer.for_model(source.tokenizer_path, config), text, window, tokens)
        if len(ids) < 2:
            raise InputError("the text has no tokens: give a text of at least some thousand words")
        about = {"model": source.fingerprint(), "text": hashlib.sha256(ids.tobytes()).hexdigest(), "tokens": len(ids), "window": window}
        _refuse_existing(out, force)
        if moments is not None:
            if moments.resolve() == out.resolve():
                raise InputError(f"both files are to be {out}: give the second moments another name")
            _refuse_existing(moments, force or _state(out).exists())  # killed between the two files, it left this one whole
        try:
            lock = out.with_name(out.name + ".lock")
            stack.enter_context(FileLock(lock, f"another calibration is writing {out}: wait for it or choose another name"))
            run = _Run(config, ids, window, out, moments, about, force)
            counts = run.go(source, threads or default_threads(), progress)
        except OSError as e:
            raise CalibrationError(f"failed while writing {out}: {e.strerror or e}; the same command goes on where it stopped") from None
        return {"tokens": len(ids), "window": window, "counts": counts}


def _refuse_existing(path: Path, force: bool) -> None:
    """Raise unless a file of this name can be made."""
    if not path.parent.is_dir():
        raise CalibrationError(f"{path.parent} is not a folder: make it, or choose another name")
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder, expected the name of a file")
    if path.exists() and not force:
        raise CalibrationError(f"{path} exists: choose another name, or --force to replace it")


def _state(out: Path) -> Path:
    """Where a run that is not finished leaves what it has."""
    return out.with_name(out.name + ".partial")


class _Run:
    """One calibration and the state it leaves beside its output."""

    def __init__(self, config, ids, window, out, moments, about, force):
        self.config, self.ids, self.window, self.out, self.about = config, ids, window, out, about
        settings = [__version__, config.to_dict(), about, moments is not None]
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.state = _state(out)
        self.means: dict[str, np.ndarray] = {}
        self.counts = np.zeros((0, config.n_experts), np.int64)
        self.moments = None if moments is None else MomentsWriter(moments, config, {"text": about["text"], "tokens": about["tokens"]})
        if force:
            self._clear()
        self._resume()
        self._check_space()

    @property
    def layers(self) -> int:
        """How many layers are done."""
        return len(self.counts)

    def rows(self, layer: int) -> Path:
        """The file of what goes into a layer, float32 (tokens, D)."""
        return self.out.with_name(f"{self.out.name}.rows-{layer}.partial")

    def _resume(self) -> None:
        """Take over what an interrupted run has left; CalibrationError if it was another one."""
        if not self.state.exists():
            return
        advice = f"choose another name, or --force to start anew (it removes {self.state})"
        try:
            means, counts, about = load_importance(self.state, self.config, partial=True)
        except CalibrationError:
            about = {}
        if about.get("digest") != self.digest:
            raise CalibrationError(f"{self.state} is what is left of a calibration with another model, text or other settings: {advice}")
        rows, size = self.rows(len(counts)), len(self.ids) * self.config.dim * 4
        whole = len(counts) == self.config.n_layers or (rows.is_file() and rows.stat().st_size == size)
        if not whole or (self.moments and not self.moments.has(len(counts))):
            raise CalibrationError(f"of what belongs to {self.state} something is missing: {advice}")
        self.means, self.counts = means, counts

    def _check_space(self) -> None:
        """Rows of two layers, and the outputs."""
        needed = 2 * 4 * len(self.ids) * self.config.dim + SPARE
        if self.layers:
            needed -= 4 * len(self.ids) * self.config.dim
        if self.moments:
            needed += self.moments.nbytes_left(self.layers)
        free = shutil.disk_usage(self.out.parent).free
        if free < needed:
            raise CalibrationError(
                f"{self.out.parent} has {free / 1e9:.2f} GB free, calibrating with {len(self.ids)} tokens needs {needed / 1e9:.2f} GB there: "
                "free some, or use fewer --tokens"
            )

    def go(self, source, threads: int, progress) -> np.ndarray:
        """The layers that are left, then the files; returns the counts."""
        total, depth = len(self.ids), self.config.n_layers
        if self.layers < self.config.n_layers:
            self._remove_rows(keep=self.layers)
            chunk = min(CHUNK, self.window)
            runner = Observer(Weights(source), self.window, chunk, threads, self.moments is not None)
            try:
                for layer in range(self.layers, self.config.n_layers):
                    report = lambda n, before=layer * total: progress and progress((before + n) / depth, total)  # noqa: E731
                    self._layer(runner, layer, chunk, report)
                    for name in source.names():
                        if name.startswith(f"layers.{layer}."):
                            source.release(name)
            except NumericsError:
                self._clear()  # going on would find the same
                raise
            finally:
                runner.close()
            if runner.forward.saturated:
                warnings.warn("a key or value was too large for the float16 cache and was cut to 65,504", stacklevel=2)
        if self.moments:
            self.moments.finish()
        save_importance(self.out, self.means, self.counts, self.about)
        self._clear()
        return self.counts

    def _layer(self, runner: Observer, layer: int, chunk: int, report) -> None:
        """The whole text through one layer; its sums into the state, its rows into the next layer's file."""
        dim, last = self.config.dim, layer == self.config.n_layers - 1
        temporary = self.rows(layer + 1).with_suffix(".new")
        with contextlib.ExitStack() as stack:
            rows_in = stack.enter_context(open(self.rows(layer), "rb")) if layer else None
            rows_out = None if last else stack.enter_context(open(temporary, "wb"))
            for start in range(0, len(self.ids), self.window):
                window = self.ids[start : start + self.window]
                for at in range(0, len(window), chunk):
                    piece, rows = window[at : at + chunk], None
                    if rows_in:
                        rows = np.fromfile(rows_in, np.float32, len(piece) * dim).reshape(len(piece), dim)
                    out = runner.chunk(layer, piece, at, rows)
                    if rows_out:
                        rows_out.write(np.ascontiguousarray(out).data)
                    report(start + at + len(piece))
            if rows_out:
                rows_out.flush()
                os.fsync(rows_out.fileno())
        if rows_out:
            os.replace(temporary, self.rows(layer + 1))
        means, counts, moments = runner.finish(layer)
        if self.moments:
            self.moments.add(layer, moments)
        self.means.update(means)
        self.counts = np.vstack([self.counts, counts])
        save_importance(self.state, self.means, self.counts, {**self.about, "layers": self.layers, "digest": self.digest})
        self.rows(layer).unlink(missing_ok=True)

    def _remove_rows(self, keep: int | None = None) -> None:
        """Remove files of rows, but that of a layer to be kept."""
        for layer in range(self.config.n_layers + 1):
            self.rows(layer).with_suffix(".new").unlink(missing_ok=True)
            if layer != keep:
                self.rows(layer).unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove everything but the outputs."""
        self._remove_rows()
        if self.moments:
            self.moments.clear()
        self.state.unlink(missing_ok=True)
        self.state.with_name(self.state.name + ".partial").unlink(missing_ok=True)  # left by a kill in the midst of writing it
