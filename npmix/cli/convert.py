"""`npmix convert` and `npmix verify`: the packed store made and checked, with a progress bar on stderr."""

from pathlib import Path

import click

from ..errors import NpmixError
from .notices import ProgressBar, compile_notice, escaped, resumable_bar, say, size
from .options import threads_option

QUANTS = ("q8", "q6", "q5", "q4", "q3", "q2", "f16")  # a test holds them to those of the conversion


@click.command(short_help="Pack a model's weights into 2 to 8 bits.")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--quant", type=click.Choice(QUANTS), required=True, help="Bits of the experts' weights.")
@click.option("--uniform", is_flag=True, help="Every matrix like the experts, for comparisons.")
@click.option(
    "--importance", metavar="FILE", type=click.Path(path_type=Path), help="What npmix calibrate measured of SRC: it weights errors."
)
@click.option(
    "--second-moments",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Its other file: weights make up for errors before them (q2 to q4).",
)
@click.option("--requantize", is_flag=True, help="SRC may be a packed store: the errors of both roundings add up.")
@click.option("--force", is_flag=True, help="Replace what npmix wrote to DST before.")
@threads_option
@click.option("--quiet", is_flag=True, help="No progress bar.")
def convert(src, dst, quant, uniform, importance, second_moments, requantize, force, threads, quiet):
    """Pack a model's weights into 2 to 8 bits.

    SRC is a Hugging Face folder, DST the packed store to make. q8 packs every matrix into 8 bits; q6 to q2 pack the experts
    into that many and the rest into 8; f16 makes every matrix float16. An interrupted conversion goes on when the same
    command is given again.
    """
    from .. import convert as conversion

    with compile_notice(quiet), resumable_bar(quiet) as bar:
        conversion.convert(
            src, dst, quant, uniform=uniform, importance=importance, second_moments=second_moments, requantize=requantize,
            force=force, threads=threads, progress=lambda done, total, what: bar.update(done, total),
        )  # fmt: skip
    if not quiet:
        total = conversion.info(dst)["total"]
        say(f"{escaped(dst)}: {total['weights']:,} weights in {size(total['bytes'])}, {total['bits_per_weight']:.2f} bits per weight")


@click.command(short_help="Check a packed store against its digests.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="No progress bar.")
def verify(folder, quiet):
    """Check a packed store against its digests.

    Reads every byte of DIR, compares sha256 with the manifest, and looks for NaN and infinite weights. A Hugging Face
    folder has no digests: there only the weights are looked at.
    """
    from ..convert import verify as check

    bar = ProgressBar(quiet)
    try:
        found = check(folder, lambda done, total, what: bar.update(done, total))
    except NpmixError:
        bar.finish()
        raise
    finally:
        bar.finish()
    if found["kind"] == "store":
        print(f"{escaped(folder)}: {found['files']} files match their sha256, all {size(found['bytes'])} of weights are finite")
    else:
        print(f"{escaped(folder)}: no digests to check, all {size(found['bytes'])} of weights are finite")
