import io

import pytest

from npmix.cli.interrupts import Interrupts
from npmix.cli.notices import ProgressBar, compile_notice, duration, size
from npmix.cli.output import figures
from npmix.stream import Stats


class Screen(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, live):
        super().__init__()
        self.live = live

    def isatty(self):
        return self.live


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_999, "1.0 MB"), (8_650_000, "8.7 MB"), (26.3e9, "26.30 GB")],
)
def test_size(count, text):
    """Powers of 1,000, never "1000.0 kB"."""
    assert size(count) == text


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03")])
def test_duration(seconds, text):
    """Seconds, minutes and hours."""
    assert duration(seconds) == text


def clock(times):
    ticks = iter(times)
    return lambda: next(ticks)


def test_bar_on_a_terminal():
    """The line is rewritten in place: share, bytes, bytes per second since this run began, time left."""
    screen = Screen(live=True)
    bar = ProgressBar(clock=clock([0, 0, 2, 4]), stream=screen)
    bar.update(1000, 5000)  # a resumed run starts with 1,000 done
    bar.update(3000, 5000)
    bar.update(5000, 5000)
    bar.finish()
    lines = screen.getvalue().split("\r")[1:]
    assert lines[0].startswith("[#####                   ]  20 %  1.0 kB of 5.0 kB  0 B/s  ? left")
    assert lines[1].startswith("[##############          ]  60 %  3.0 kB of 5.0 kB  1.0 kB/s  2 s left")
    assert lines[2].startswith("[########################] 100 %  5.0 kB of 5.0 kB  1.0 kB/s  0 s left")
    assert screen.getvalue().endswith("\n")


def test_bar_elsewhere():
    """In a file: a line every ten seconds and the last one."""
    screen = Screen(live=False)
    bar = ProgressBar(clock=clock([0, 0, 5, 11, 12]), stream=screen)
    for done in (0, 10, 20, 30):
        bar.update(done, 30)
    bar.finish()
    shares = [line.split("%")[0].split()[-1] for line in screen.getvalue().splitlines()]
    assert shares == ["67", "100"]


def test_quiet_bar():
    """--quiet draws nothing."""
    screen = Screen(live=True)
    bar = ProgressBar(quiet=True, stream=screen)
    bar.update(1, 1)
    bar.finish()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_compile_notice_is_one_line(quiet, capsys):
    """However many kernels are compiled, one line says so; --quiet says nothing; the names are counted all the same."""
    from npmix.kernels import _jit

    with compile_notice(quiet) as names:
        for listener in list(_jit._listeners):
            listener("a")
            listener("b")
    assert names == ["a", "b"] and not _jit._listeners
    assert capsys.readouterr().err == ("" if quiet else "npmix: compiling kernels (first run only) ...\n")


def test_figures():
    """One line: speeds of prompt and text, the wait, memory, and the seed only if it was drawn."""
    stats = Stats(
        prompt_tokens=12, cached_tokens=2, prefill_s=0.5, decode_s=0.25, first_token_s=0.51, stop_reason="length", seed=7, ids=[1, 2]
    )
    assert figures(stats, True).startswith("prompt 10 tokens at 20.0 tok/s, text 2 tokens at 4.0 tok/s, first token 0.51 s, peak memory ")
    assert figures(stats, True).endswith(", seed 7") and "seed" not in figures(stats, False)
    one = Stats(prompt_tokens=1, prefill_s=0.5, first_token_s=0.5, ids=[5])
    assert figures(one, True).startswith("prompt 1 token at 2.0 tok/s, text 1 token, first token 0.50 s")
    assert "seed" not in figures(one, True)


def test_interrupts_only_set_a_flag():
    """The first SIGINT in the block is remembered, not raised; a progress callback raises it; afterwards SIGINT is Python's again."""
    import signal

    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            interrupts.check(1, 2)
    assert signal.getsignal(signal.SIGINT) is before
