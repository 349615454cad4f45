"""tools/compare_out_of_core.py, as far as it needs neither llama.cpp nor a control group of its own: eviction, groups, figures, words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import compare_out_of_core as tool  # noqa: E402
import memory_group  # noqa: E402
from json_lines import PeerError  # noqa: E402

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, drops the page cache")


@linux
def test_what_stays_in_the_page_cache_is_counted(tmp_path):
    """A file just read is in memory, an evicted one is not, and eviction says how much stayed."""
    import disk

    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert disk.cached(path) == 1 << 20
    left = disk.evict([path])
    assert left == disk.cached(path) <= 1 << 20
    if left:
        pytest.skip("this file system keeps files in memory")
    path.read_bytes()
    assert disk.cached(path) == 1 << 20


@linux
def test_rates_are_of_cold_reads(tmp_path):
    """Every method that the system has gives a rate, and leaves nothing in the page cache."""
    import disk

    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(os.urandom(1 << 20))
    rates = disk.sequential_rates(paths, 1 << 18)
    assert "preadv, 2 threads" in rates and all(rate > 0 for rate in rates.values())


def mounted(tmp_path, monkeypatch, version):
    """A folder that looks like the control groups of a version."""
    root = tmp_path / "cgroup"
    root.mkdir()
    kind, options = ("cgroup", "rw,memory") if version == 1 else ("cgroup2", "rw")
    (tmp_path / "mounts").write_text(f"proc /proc proc rw 0 0\n{kind} {root} {kind} {options} 0 0\n")
    (root / "cgroup.controllers").write_text("cpu memory")
    (root / "cgroup.subtree_control").write_text("cpu")
    monkeypatch.setattr(memory_group, "MOUNTS", tmp_path / "mounts")
    return root


@pytest.mark.parametrize(
    "version, limit, most", [(1, "memory.limit_in_bytes", "memory.max_usage_in_bytes"), (2, "memory.max", "memory.peak")]
)
def test_groups_of_both_versions(tmp_path, monkeypatch, version, limit, most):
    """The limit goes into the version's own file, the peak comes from it, and version 2 is told to hand the memory controller down."""
    root = mounted(tmp_path, monkeypatch, version)
    group = memory_group.MemoryGroup("test", 12345)
    assert group.version == version and group.path.parent == root and (group.path / limit).read_text() == "12345"
    (group.path / most).write_text("999\n")
    assert group.peak() == 999 and str(group.path) in group.prefix
    assert ("+memory" in (root / "cgroup.subtree_control").read_text()) == (version == 2)


@pytest.mark.parametrize("version", [1, 2])
def test_a_slower_disk(tmp_path, monkeypatch, version):
    """Bytes a second of a device go where the version wants them; the program is put into every group there is."""
    root = mounted(tmp_path, monkeypatch, version)
    blkio = tmp_path / "blkio"
    blkio.mkdir()
    if version == 1:
        with (tmp_path / "mounts").open("a") as mounts:
            mounts.write(f"cgroup {blkio} cgroup rw,blkio 0 0\n")
    else:
        (root / "cgroup.controllers").write_text("cpu io memory")
    group = memory_group.MemoryGroup("test", 12345, ("254:0", 1000))
    if version == 1:
        assert (group.slow / "blkio.throttle.read_bps_device").read_text() == "254:0 1000" and group.slow.parent == blkio
    else:
        assert (group.path / "io.max").read_text() == "254:0 rbps=1000" and group.slow is None
    subprocess.run([*group.prefix, "true"], check=True)
    procs = [path / "cgroup.procs" for path in ((group.path, group.slow) if version == 1 else (group.path,))]
    assert len({path.read_text() for path in procs}) == 1 and int(procs[0].read_text()) > 0


def test_disk_of_a_file(tmp_path):
    """A whole disk's numbers, or that there is none."""
    try:
        assert re.fullmatch(r"\d+:\d+", memory_group.disk_of(tmp_path))
    except memory_group.NoGroup as error:
        assert "no disk of its own" in str(error)


def test_a_rate_that_is_none():
    with pytest.raises(SystemExit, match="--disk-rate: 0.0, expected"):
        tool.main(["--disk-rate", "0"])


def test_without_groups_it_says_so(tmp_path, monkeypatch):
    """Neither version mounted, or no right to make a group: one line that says what is missing, and nothing is made."""
    (tmp_path / "mounts").write_text("proc /proc proc rw 0 0\n")
    monkeypatch.setattr(memory_group, "MOUNTS", tmp_path / "mounts")
    with pytest.raises(SystemExit, match="control groups"):
        tool.main(["--work", str(tmp_path / "work")])
    root = mounted(tmp_path, monkeypatch, 1)
    root.rename(tmp_path / "gone")
    with pytest.raises(SystemExit, match="cannot be made"):
        tool.main(["--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def run(*seconds, **more):
    return {
        "tokens": list(seconds),
        "load_seconds": 1.0,
        "peak": 2 << 30,
        "read": 10**9 * len(seconds),
        "logits": ["a"] * len(seconds),
        **more,
    }


STATISTICS = {"hits": 30, "misses": 10, "missed_bytes": 10**9, "bytes_read": 14 * 10**8, "guesses_right": 6, "guesses_wrong": 4}


def test_ratio_is_over_the_tokens_both_came_to(capsys):
    """A run cut short is compared over its own number of tokens, the bound comes from missed bytes and the disk's rate."""
    row = {"limit": 4 << 30, "disk_rate": 1e9, "llamacpp": run(2.0, 2.0), "not guessing": run(1.0, 1.0, 6.0, statistics=STATISTICS)}
    row["guessing"] = run(0.5, 0.5, 4.0, statistics=STATISTICS)
    first, second = list(tool.table([row]))[1:]
    for words in (
        " 4 ",
        "guessing",
        "0.600 (0.500)",
        "0.500 (0.400)",
        " 4.00 ",
        "(2.50)",
        "3.000",
        "20 %",
        "75 %",
        "6 of 10",
        "1.00/1.00",
        "2.00/2.00",
        "3/2",
    ):
        assert words in first, words
    assert "2.00" in second and "not guessing" in second
    tool.report([row], {"model": "a synthetic model", "machine": {"cpu": "x"}, "threads": 2, "cgroup": 1})
    printed = capsys.readouterr().out
    assert "synthetic" in printed and "same bits" in printed
    row["guessing"]["logits"] = ["b"] * 3
    tool.report([row], {"model": "a synthetic model", "machine": {"cpu": "x"}, "threads": 2, "cgroup": 1})
    assert "DIFFER" in capsys.readouterr().out


def test_share_of_the_later_tokens():
    """The second half alone: its own seconds against its own missed bytes; unknown where nobody asked halfway."""
    halfway = {"tokens": 2, "hits": 5, "misses": 8, "missed_bytes": 8 * 10**8, "bytes_read": 9 * 10**8}
    found = run(5.0, 5.0, 0.5, 0.5, statistics=STATISTICS, halfway=halfway)  # 200 MB later
    assert tool.later_share(found, 1e9) == pytest.approx(0.2)
    assert tool.later_share(run(1.0, statistics=STATISTICS), 1e9) is None


def test_settings_that_do_not_load_are_not_tried_with_less_memory(monkeypatch):
    """The fastest settings of those that load are taken; one that failed is left out from there on."""
    comparison = object.__new__(tool.Comparison)
    comparison.settings, comparison.llamacpp, calls = dict(tool.LLAMACPP), None, []

    def cold(program, limit, options, tokens=None):
        calls.append((limit, options))
        if options["repack"]:
            return {"tokens": [], "error": "ended", "killed": 1}
        return run(1.0 if "mode" in options else 2.0)

    comparison.cold = cold
    assert comparison.best_of_llamacpp(8)["settings"] == "read into memory"
    calls.clear()
    comparison.best_of_llamacpp(4)
    assert calls and not any(options["repack"] for _, options in calls)


def test_a_program_that_fails_is_a_row_of_words(tmp_path, monkeypatch):
    """A worker that ends leaves an error in the row and no group behind; the table shows it in words."""
    mounted(tmp_path, monkeypatch, 1)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(memory_group.MemoryGroup, "prefix", [])
    monkeypatch.setattr(memory_group.MemoryGroup, "killed", lambda self: 1)
    monkeypatch.setattr(memory_group.MemoryGroup, "close", lambda self: None)
    found = tool.Program(str(script), "npmix_worker.py", "numba", tmp_path, 2).run([1, 2], 1 << 30, {}, 5.0)
    assert "npmix_worker ended" in found["error"]
    row = {"limit": 1 << 30, "disk_rate": 1e9, "guessing": found, "not guessing": found}
    assert all("out of memory" in line for line in list(tool.table([row]))[1:])


def test_what_was_made_is_removed_when_it_fails(tmp_path, monkeypatch):
    """Files the tool made go again, whatever happens; what was there before stays."""
    mounted(tmp_path, monkeypatch, 1)
    monkeypatch.setattr(memory_group.MemoryGroup, "close", lambda self: None)

    def refuse(python, path, config):
        path.write_text("half")
        assert config["dim"] == 64 and json.dumps(config)
        raise PeerError("no gguf here")

    monkeypatch.setattr(tool, "write_gguf", refuse)
    small = {"dim": 64, "hidden": 96, "heads": 4, "kv-heads": 2, "head-dim": 16, "experts": 4, "vocab": 384, "positions": 512, "layers": 2}
    with pytest.raises(SystemExit, match="no gguf here"):
        tool.main(["--work", str(tmp_path / "work"), *(f"--{name}={value}" for name, value in small.items())])
    assert list((tmp_path / "work").iterdir()) == []
