"""`npmix run --ram`: the same text under a budget, what was read in the figures, the line while it waits."""

import json
import re

import pytest
from test_notices import Screen

from npmix.cli.notices import DiskNotice
from npmix.store.disk_stats import DiskStats

PROMPT = ("-n", 5, "def f")
BUDGET = ("--ram", "2G", "--context", 64)


@pytest.mark.compiled
def test_the_text_of_any_budget(npmix_command):
    """--ram and --load change no character on stdout; the figures on stderr say what was read."""
    plain = npmix_command("run", *PROMPT)
    figures = r", read [\d.]+ [kM]?B, \d+ % of experts were in memory(, \d+ % of guesses right)?, waited [\d.]+ s for the disk"
    for load in ((), ("--load", "read"), ("--load", "map")):
        found = npmix_command("run", *BUDGET, *load, *PROMPT)
        assert found.stdout == plain.stdout
        assert re.search(figures, found.stderr.splitlines()[-1])
    assert not re.search(figures, plain.stderr)


@pytest.mark.compiled
def test_json_has_the_figures(npmix_command):
    """--json: "disk" is an object of numbers under a budget, else null."""
    found = json.loads(npmix_command("run", *BUDGET, "--json", *PROMPT).stdout)["disk"]
    assert found["experts"] == found["capacity"] == 32 and found["hits"] + found["misses"] > 0
    assert set(found) >= {"bytes_read", "guesses_right", "guesses_wrong", "waited_s", "rate", "share_of_rate"}
    assert json.loads(npmix_command("run", "--json", *PROMPT).stdout)["disk"] is None


@pytest.mark.parametrize("ram, message", [("16M", "the least that would do is"), ("many", "ram is 'many'"), ("9999T", "ram is")])
def test_budgets_that_cannot_be(npmix_command, ram, message):
    """A budget too small, none at all, or larger than the machine: one line, exit code 1."""
    result = npmix_command("run", "--ram", ram, *PROMPT)
    assert result.exit_code == 1 and result.stdout == "" and message in result.stderr
    assert re.fullmatch(r"npmix: error: [^\n]+\n", result.stderr)


def test_line_behind_the_text_on_a_terminal():
    """Nothing in the first second; then a note behind the cursor, which goes back to where it was; gone before text comes."""
    now = [0.0]
    screen = Screen(True)
    notice = DiskNotice(lambda: now[0], screen)
    for now[0] in (0.1, 0.5, 0.9):
        notice.waiting(DiskStats(bytes_read=1_000_000))
    assert screen.getvalue() == ""
    now[0] = 2.1
    notice.waiting(DiskStats(bytes_read=3_000_000))
    assert screen.getvalue() == "\x1b7\x1b[?7l [reading experts: 2.0 MB in 2 s]\x1b[K\x1b[?7h\x1b8"
    notice.arrived()
    assert screen.getvalue().endswith("\x1b8\x1b[K")


def test_lines_elsewhere():
    """In a file: a line every ten seconds of waiting, none otherwise."""
    now = [0.0]
    screen = Screen(False)
    notice = DiskNotice(lambda: now[0], screen)
    for now[0] in (1.0, 9.0, 10.5, 12.0, 21.0):
        notice.waiting(DiskStats(bytes_read=int(now[0] * 1e9)))
    assert screen.getvalue() == "npmix: reading experts: 9.50 GB in 10 s\nnpmix: reading experts: 20.00 GB in 20 s\n"
    notice.arrived()
    assert len(screen.getvalue().splitlines()) == 2
