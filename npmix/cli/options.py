"""Options that several commands share, and the checks that click's types do not make."""

import math
import sys

import click

from ..errors import InputError


class Number(click.ParamType):
    """A finite float within bounds: click's FloatRange lets NaN through, and NaN would reach the sampler."""

    name = "x"

    def __init__(self, low, high=math.inf, above=False):
        self.low, self.high, self.above = low, high, above

    def convert(self, value, param, ctx):
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        inside = self.low < number if self.above else self.low <= number
        if not inside or not number <= self.high or math.isinf(number):
            bound = f"{'above' if self.above else 'at least'} {self.low:g}"
            limit = "" if math.isinf(self.high) else f" and at most {self.high:g}"
            self.fail(f"{value} is out of range: expected {bound}{limit}.", param, ctx)
        return number


class Numbers(click.ParamType):
    """Whole numbers within bounds, with commas between: 16,512. The value is a tuple in rising order, each once."""

    name = "n,n"

    def __init__(self, low: int, high: int = 1 << 24):
        self.low, self.high = low, high

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no whole number, nor several with commas between.", param, ctx)
        for number in numbers:
            if not self.low <= number <= self.high:
                self.fail(f"{number} is out of range: expected {self.low} to {self.high}.", param, ctx)
        return tuple(sorted(set(numbers)))


class Choices(click.ParamType):
    """Some of a few words, with commas between: q3,q4. The value is a tuple in the order of the words, each once."""

    name = "x,x"

    def __init__(self, words):
        self.words = tuple(words)

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        given = value.split(",")
        for word in given:
            if word not in self.words:
                self.fail(f"{word!r} is none of {', '.join(self.words)}; several with commas between.", param, ctx)
        return tuple(word for word in self.words if word in given)


def model_option(command):
    """-m: the folder of the model."""
    help = "Hugging Face folder or packed store.  [default: the bundled model]"
    return click.option("-m", "--model", metavar="PATH", help=help)(command)


def threads_option(command):
    """--threads, the same everywhere."""
    help = "Threads to compute with.  [default: physical cores]"
    return click.option("--threads", metavar="N", type=click.IntRange(1, 1024), help=help)(command)


def engine_options(command):
    """How the engine is laid out."""
    context = "Positions of the KV cache.  [default: the model's maximum, at most 4096]"
    for option in (
        click.option("--kv", type=click.Choice(["f16", "f32", "q8"]), default="f16", show_default=True, help="Numbers in the KV cache."),
        click.option("--chunk", metavar="N", type=click.IntRange(1), help="Prompt tokens computed at a time."),
        click.option("--context", metavar="N", type=click.IntRange(1), help=context),
    ):
        command = option(command)
    return threads_option(command)


def memory_options(command):
    """How much memory may be used, and how weights get into it."""
    ram = "Memory for everything, as 8G, 0.5 (of what there is) or auto; experts that do not fit are read when wanted."
    load = "Map the weights or copy them.  [default: map, with --ram read]"
    command = click.option("--load", type=click.Choice(["map", "read"]), help=load)(command)
    return click.option("--ram", metavar="SIZE", help=ram)(command)


def utf8(data: bytes, where: str) -> str:
    """Bytes as text; an InputError names the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{where} is not UTF-8: byte {data[e.start]:#04x} at offset {e.start}; expected text in UTF-8") from None


def read_text(path) -> str:
    """A text file, or standard input for "-"."""
    return utf8(sys.stdin.buffer.read(), "standard input") if str(path) == "-" else utf8(path.read_bytes(), str(path))


def model_path(given):
    """The folder to open: the one given, else the bundled model's."""
    from ..generate import BUNDLED

    return given or BUNDLED
