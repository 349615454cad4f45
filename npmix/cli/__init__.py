"""The command line: a click group whose commands are imported when they are called.

One hard fact: importing this module loads click and nothing heavier, so that `npmix --help` answers
in a blink; numba, sentencepiece and safetensors come in inside the commands.
"""

import importlib
import os
import sys
import warnings

import click

from .. import __version__
from ..errors import NpmixError
from .interrupts import INTERRUPTED

# name -> (module, function, the line in `npmix --help`); a test holds the line to the command's own help
COMMANDS = {
    "run": ("run", "run", "Print the text that a model continues or answers a prompt with."),
    "convert": ("convert", "convert", "Pack a model's weights into 2 to 8 bits."),
    "calibrate": ("calibrate", "calibrate", "Measure on a text which inputs of a model's matrices are large."),
    "verify": ("convert", "verify", "Check a packed store against its digests."),
    "info": ("info", "info", "Show a model's config, weights by kind and sizes."),
    "plan": ("plan", "plan", "Show what a model takes of memory in every width, and how fast it would run."),
    "warmup": ("warmup", "warmup", "Compile the kernels ahead of the first run."),
    "evaluate": ("evaluate", "evaluate", "Measure perplexity on a text, and the divergence from a base model."),
    "bench": ("bench", "bench", "Measure start, prefill and decode against the machine's ceilings."),
}
CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports it


def _show_warning(message, category, filename, lineno, file=None, line=None):
    print(f"npmix: warning: {message}", file=sys.stderr)


def one_line(text) -> str:
    """The text without line breaks or control characters, which a file's own words may bring."""
    return "".join(c if c.isprintable() else " " for c in str(text)).strip()


def _let_stdout_go():
    """Send what is still buffered nowhere, so that the interpreter's last flush does not fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no real file behind stdout
        sys.stdout = None


def _explain(error: Exception) -> str:
    """What an error that is no bug says on stderr."""
    if isinstance(error, MemoryError):
        return "out of memory: choose a smaller --context or --chunk, or a model packed into fewer bits"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


class Commands(click.Group):
    """The table above as a click group; turns errors into one line and an exit code."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)

    def format_commands(self, ctx, formatter):
        """The list in `--help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def invoke(self, ctx):
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if hasattr(sys.stdout, "reconfigure"):  # a path may hold what stdout's encoding lacks, or a byte that is no text
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # here, where a closed pipe can still be told apart
                return result
            except BrokenPipeError:
                _let_stdout_go()
                ctx.exit(CLOSED_PIPE)
            except KeyboardInterrupt:
                print("", file=sys.stderr)
                ctx.exit(INTERRUPTED)
            except (NpmixError, MemoryError, OSError) as error:
                print(f"npmix: error: {one_line(_explain(error))}", file=sys.stderr)
                ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="npmix %(version)s")
def main():
    """Run Mixtral and its family on a plain CPU: weights in, text out.

    Start with: npmix run "def fibonacci(n):"
    """
