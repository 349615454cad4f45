"""What a person sees on stderr while waiting: the compile notice, the progress bar, the closing figures.

One hard fact: lines are rewritten in place only on a terminal; anywhere else each is printed once.
"""

import sys
import time
from contextlib import contextmanager


def say(text: str) -> None:
    """One line on stderr."""
    print(f"npmix: {text}", file=sys.stderr, flush=True)


def escaped(text) -> str:
    """The text with control characters, line breaks and bytes that are no text as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@contextmanager
def compile_notice(quiet: bool = False):
    """Within this block, say so once when kernels have to be compiled; yields the growing list of their names."""
    from ..kernels._jit import on_compile

    names: list[str] = []

    def listener(name):
        names.append(name)
        if len(names) == 1 and not quiet:  # only once: text may stand on the terminal's line by the next one
            say("compiling kernels (first run only) ...")

    stop = on_compile(listener)
    try:
        yield names
    finally:
        stop()


class DiskNotice:
    """What is read while computing waits for it, once no text has come for a second; on a terminal behind the text, else every ten seconds."""

    def __init__(self, clock=time.monotonic, stream=None):
        self._clock, self._stream = clock, stream or sys.stderr
        self._live = self._stream.isatty()
        self._last = self._shown = clock()
        self._drawn = False
        self._before = None

    def waiting(self, stats) -> None:
        """Call while it waits, as often as you like."""
        now = self._clock()
        if self._before is None:
            self._before = now, stats.bytes_read
        if now - self._last < (1.0 if self._live else 10.0) or now - self._shown < (0.3 if self._live else 10.0):
            return
        seconds, nbytes = now - self._before[0], stats.bytes_read - self._before[1]
        text = f"reading experts: {size(nbytes)} in {duration(seconds)}"
        self._shown = now
        if self._live:  # behind the text: the place is kept, and at the line's end the rest is cut off rather than scrolled
            self._stream.write(f"\x1b7\x1b[?7l [{text}]\x1b[K\x1b[?7h\x1b8")
            self._drawn = True
        else:
            self._stream.write(f"npmix: {text}\n")
        self._stream.flush()

    def arrived(self) -> None:
        """Call before text is written."""
        self._last, self._before = self._clock(), None
        if self._drawn:
            self._stream.write("\x1b[K")
            self._stream.flush()
            self._drawn = False


@contextmanager
def disk_notice(model, interrupts, quiet: bool):
    """Within this block, say what is read while a model with a memory budget waits, and let Ctrl-C end the wait; yields `arrived`."""
    residency = model.engine.residency
    if residency is None:
        yield lambda: None
        return
    notice = DiskNotice()

    def waiting(stats):
        interrupts.check()
        if not quiet:
            notice.waiting(stats)

    residency.on_wait = waiting
    try:
        yield notice.arrived
    finally:
        residency.on_wait = None
        notice.arrived()


def size(count: float) -> str:
    """Bytes for people, in powers of 1,000: 512 B, 8.6 MB, 26.30 GB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit, scale, digits in (("kB", 1e3, 1), ("MB", 1e6, 1), ("GB", 1e9, 2)):
        if count < scale * 999.95 or unit == "GB":
            return f"{count / scale:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Seconds for people: 4 s, 3:05, 1:02:03."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressBar:
    """Bytes done of bytes in all, bytes per second, time left. On a terminal a bar, else a line every ten seconds.

    amount: how a number of what is counted is written, if not bytes.
    """

    def __init__(self, quiet: bool = False, clock=time.monotonic, stream=None, amount=size):
        self._clock, self._stream, self._quiet, self._amount = clock, stream or sys.stderr, quiet, amount
        self._live = self._stream.isatty()
        self._started = clock()
        self._first = None  # bytes done when first told: a resumed run starts with some
        self._last = 0
        self._shown = -1e9
        self._drawn = False

    def update(self, done: int, total: int, note: str = "") -> None:
        """Call with the bytes finished so far, as often as you like. note: what else to show."""
        now = self._clock()
        if self._first is None or done < self._last:  # the beginning, or of a second pass
            self.finish()
            self._first, self._started = done, now
        self._last = done
        if self._quiet or (now - self._shown < (0.1 if self._live else 10.0) and done < total):
            return
        if not self._live and self._shown < 0 and done < total:
            self._shown = now  # the first line only after the first interval
            return
        self._shown = now
        text = self._line(done, total, now - self._started) + (f"  {note}" if note else "")
        if self._live:
            self._stream.write(f"\r{text}\x1b[K")
            self._drawn = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _line(self, done: int, total: int, seconds: float) -> str:
        share = done / total if total else 1.0
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        left = duration((total - done) / rate) if rate > 0 else "?"
        bar = "#" * round(24 * share)
        done, total, rate = self._amount(done), self._amount(total), self._amount(rate)
        return f"[{bar:<24}] {100 * share:3.0f} %  {done} of {total}  {rate}/s  {left} left"

    def finish(self) -> None:
        """End the line that the bar was drawn on."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False


@contextmanager
def resumable_bar(quiet: bool, amount=size):
    """A progress bar for work that goes on where an interrupt stopped it, and says so."""
    bar = ProgressBar(quiet, amount=amount)
    try:
        yield bar
    except KeyboardInterrupt:
        bar.finish()
        say("interrupted; the same command goes on where this one stopped")
        raise
    finally:
        bar.finish()
