"""Fixtures of the command line's tests: a tiny random model with its tokenizer, and the command in this process."""

import pytest
from click.testing import CliRunner
from make import tiny_hf

from npmix import cli


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Hugging Face folder of a random model whose text is any bytes at all."""
    return tiny_hf(tmp_path_factory.mktemp("tiny") / "model", tokenizer=True)


@pytest.fixture(scope="session")
def npmix_command():
    """Call the command with arguments; returns click's result: exit_code, stdout, stderr."""

    def call(*arguments, **options):
        return CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False, **options)

    return call
