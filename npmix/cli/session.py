"""The session of `npmix run` on a terminal: a turn a line, the KV cache kept between turns.

One hard fact: Ctrl-C during a text ends that text, at the prompt it ends the session (exit code 130), as Ctrl-D does (0).
"""

import sys

import click

from ..errors import ContextError
from .interrupts import INTERRUPTED, Interrupts
from .notices import disk_notice, say
from .output import figures, follow, write

PROMPT = "> "


def converse(model, chat: bool, settings: dict, quiet: bool) -> None:
    """Read lines and answer them until the input ends."""
    session = model.session(chat=True if chat else None)
    if not quiet:
        what = "chat" if session.is_chat else "each line goes on with the text"
        say(f"{what}; Ctrl-C ends a text, Ctrl-D the session")
    read = line_reader()
    while True:
        try:
            line = read()
        except EOFError:
            sys.stderr.write("\n")
            return
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            click.get_current_context().exit(INTERRUPTED)
        if not line and (session.is_chat or not session.ids):
            continue
        try:
            turn(session, line, settings, quiet)
        except ContextError as error:
            say(f"{error}")
            say("the session starts anew")
            session.reset()


def turn(session, line: str, settings: dict, quiet: bool) -> None:
    """One line and the text that follows it."""
    interrupts = Interrupts()
    stream = session.send(line, **settings, on_progress=interrupts.check)
    last = "\n"
    with disk_notice(session.model, interrupts, quiet) as arrived:
        for last in follow(stream, interrupts):
            arrived()
            write(last)
    if not last.endswith("\n"):
        write("\n")
    if not quiet:
        say(figures(stream.stats, settings["seed"] is None))


def line_reader():
    """A function that reads a line. With readline's editing where both ends are a terminal; else the prompt goes to stderr."""
    if sys.stdout.isatty():
        try:
            import readline  # noqa: F401  (importing it is what gives input() its editing)
        except ImportError:  # Windows
            pass
        return lambda: input(PROMPT)

    def read():
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
        return input()

    return read
