"""How much memory a process may use: sizes as people write them, and what machine and control groups say."""

import warnings

import pytest

from npmix import budget
from npmix.errors import InputError

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1024 kB\nMemAvailable:   12582912 kB\nHugePages_Total:       0\n"  # 16 and 12 GiB
STATUS = "Name:\tx\nVmHWM:\t  900 kB\nRssAnon:\t  524288 kB\nRssFile:\t  262144 kB\nRssShmem:\t       1024 kB\nVmPTE:\t  1024 kB\n"
HELD = (512 + 1 + 1) << 20  # of STATUS: what the system cannot take back


@pytest.mark.parametrize(
    "given, expected",
    [("8G", 8 * GIB), ("8g", 8 * GIB), ("8GiB", 8 * GIB), ("8 GB", 8 * GIB), ("1.5G", 3 * GIB // 2), ("512M", GIB // 2), ("2T", 2048 * GIB),
     ("64K", 65536), ("1073741824", GIB), ("0.5", 0.5), ("1", 1.0), (1, 1.0), (0.25, 0.25), (1.0, 1.0), (GIB, GIB), (2e9, 2_000_000_000),
     ("auto", "auto"), (" Auto ", "auto")],
)  # fmt: skip
def test_sizes(given, expected):
    """K, M, G and T are powers of 1,024; a bare number up to 1 is a share and above it bytes; auto is itself."""
    found = budget.parse(given)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "given",
    ["", "G", "8X", "-1G", "0", "0.0", "0G", "0.5B", "1e9", "8G8", "nan", "inf", "٣G", "9" * 16, "9999999999T", "8,5G",
     0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, None, b"8G", [8], 1 << 60],
)  # fmt: skip
def test_what_is_no_size(given):
    """Anything else is refused, with what was found and what is expected."""
    with pytest.raises(InputError, match="expected a size such as"):
        budget.parse(given)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Make this process see a machine of 16 GiB, 12 of them available, with given control groups; groups: path -> files."""

    def make(cgroup="", mounts=(), groups=(), status=STATUS):
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True, exist_ok=True)
        (proc / "meminfo").write_text(MEMINFO)
        (proc / "self" / "status").write_text(status)
        (proc / "self" / "cgroup").write_text(cgroup)
        lines = [f"31 23 0:28 {root} {tmp_path / point} rw,relatime shared:9 - {kind}\n" for root, point, kind in mounts]
        (proc / "self" / "mountinfo").write_text("22 1 0:2 / / rw - ext4 /dev/vda rw\nnonsense\n" + "".join(lines))
        for path, files in dict(groups).items():
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / path / name).write_text(str(text))
        monkeypatch.setattr(budget, "PROC", proc)

    budget._groups.cache_clear()
    yield make
    budget._groups.cache_clear()


def v1(limit, usage, cache=0):
    """The files of a group, version 1."""
    stat = f"cache 77\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache - cache // 2}\ntotal_shmem 5\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


def v2(limit, usage, cache=0, high="max"):
    """The files of a group, version 2."""
    stat = f"anon 3\nfile 99\ninactive_file {cache}\nactive_file 0\n"
    return {"memory.max": limit, "memory.high": high, "memory.current": usage, "memory.stat": stat}


def test_no_control_group(system):
    """Without a limit the machine's own memory counts; what this process holds may stay, a thirty-second is left alone."""
    system()
    assert (budget.total(), budget.available()) == (16 * GIB, 12 * GIB)
    assert budget.own() == HELD + (256 << 20) and budget.own(mapped=200 << 20) == HELD + (56 << 20) and budget.own(GIB) == HELD
    assert budget.permitted() == HELD + 12 * GIB - GIB // 2 == budget.allowance("auto")


V1 = [("/", "mem", "cgroup memory rw,memory"), ("/", "cpu", "cgroup cpu rw,cpu")]
V2 = [("/", "cg", "cgroup2 cgroup2 rw")]


@pytest.mark.parametrize(
    "cgroup, mounts, groups, whole, free",
    [
        ("4:memory:/a/b\n1:cpu:/\n0::/\n", V1, {"mem/a/b": v1(4 * GIB, GIB, GIB // 2)}, 4 * GIB, 7 * GIB // 2),
        ("4:memory:/a/b\n", V1, {"mem/a/b": v1(1 << 62, 5), "mem/a": v1(6 * GIB, 5 * GIB)}, 6 * GIB, GIB),
        ("4:hugetlb,memory:/docker/1\n", [("/docker/1", "mem", "cgroup memory rw,memory")], {"mem": v1(2 * GIB, GIB)}, 2 * GIB, GIB),
        ("4:memory:/other\n", [("/docker/1", "mem", "cgroup memory rw,memory")], {"mem": v1(2 * GIB, GIB)}, 2 * GIB, GIB),
        ("0::/\n", V2, {"cg": v2(3 * GIB, 2 * GIB, GIB)}, 3 * GIB, 2 * GIB),
        ("0::/a/b/c\n", V2, {"cg/a/b": v2(8 * GIB, GIB), "cg/a": v2("max", GIB), "cg/a/b/c": v2("max", 9)}, 8 * GIB, 7 * GIB),
        ("0::/a\n", V2, {"cg/a": v2(8 * GIB, GIB, 0, 5 * GIB)}, 5 * GIB, 4 * GIB),
        ("0::/../../x\n", V2, {"cg": v2(3 * GIB, GIB)}, 3 * GIB, 2 * GIB),
        ("0::/a\n", V2, {"cg/a": v2(3 * GIB, 4 * GIB)}, 3 * GIB, 0),
        ("4:memory:/a\n0::/a\n", V1 + V2, {"mem/a": v1(5 * GIB, GIB), "cg/a": {"cgroup.procs": ""}}, 5 * GIB, 4 * GIB),
        ("0::/a\n", V2, {"cg/a": v2(64 * GIB, GIB)}, 16 * GIB, 12 * GIB),
        ("0::/a\n", V2, {"cg/a": {**v2(4 * GIB, GIB), "memory.stat": "damaged\n\nfile x y\n"}}, 4 * GIB, 3 * GIB),
        ("0::/a\n", V2, {"cg/a": v2("x y", "")}, 16 * GIB, 12 * GIB),
        ("nonsense\n::\n", V2, {}, 16 * GIB, 12 * GIB),
    ],
    ids=["v1", "v1 of a parent", "container v1", "elsewhere v1", "container v2", "v2 of a parent", "high", "outside", "over", "hybrid",
         "loose", "no stat", "damaged", "nonsense"],
)  # fmt: skip
def test_control_groups(system, cgroup, mounts, groups, whole, free):
    """The least limit and the least room of all groups around the process count, versions 1 and 2; their file pages are free."""
    system(cgroup, mounts, groups)
    assert (budget.total(), budget.available()) == (whole, free)


def test_escaped_mount_point(system):
    """A mount point with a blank, which mountinfo writes as an octal number, is found."""
    system("0::/\n", [("/", "c\\040g", "cgroup2 cgroup2 rw")], {"c g": v2(3 * GIB, GIB)})
    assert budget.total() == 3 * GIB


def test_a_limit_that_changes(system):
    """Limits are read anew each time: a budget can shrink while a program runs."""
    system("0::/a\n", V2, {"cg/a": v2(8 * GIB, GIB)})
    before = budget.permitted()
    system("0::/a\n", V2, {"cg/a": v2(4 * GIB, GIB)})
    assert before - budget.permitted() == 4 * GIB - GIB // 8  # the margin shrinks too


def test_allowance(system):
    """A size or share counts as given where it can be had; above what there is it is refused, above what is free now cut with a warning."""
    system("0::/a\n", V2, {"cg/a": v2(8 * GIB, 2 * GIB)})
    now = HELD + 6 * GIB - GIB // 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget.allowance("4G") == 4 * GIB and budget.allowance(0.5) == 4 * GIB and budget.allowance("auto") == now
    for too_much in ("7G", 1.0, 8 * GIB):
        with pytest.warns(UserWarning, match="8.00 GiB|7.00 GiB"):
            assert budget.allowance(too_much) == now
    with pytest.raises(InputError, match=r"ram is 9\.00 GiB, this machine or its control group has 8\.00 GiB"):
        budget.allowance("9G")


def test_this_machine():
    """What the real system says holds together: some memory is free, and this process takes more than 1 MiB and less than all."""
    assert 0 < budget.available() <= budget.total()
    assert 1 << 20 < budget.own() < budget.total() and budget.permitted() <= budget.total()


def test_own_counts_what_is_taken():
    """Memory that this process takes and touches is counted, and may stay: what is permitted does not sink by it."""
    before, size = budget.own(), 64 << 20
    taken = bytearray(b"x") * size
    assert size - (4 << 20) < budget.own() - before < size + (4 << 20)
    del taken


def test_other_systems(monkeypatch, tmp_path):
    """Without /proc the memory there is comes from sysconf; where that is missing too a size counts and nothing else."""
    monkeypatch.setattr(budget, "PROC", tmp_path)
    pages = {"SC_PHYS_PAGES": 4096, "SC_PAGE_SIZE": 1 << 20}
    monkeypatch.setattr(budget.os, "sysconf", pages.__getitem__, raising=False)
    assert (budget.total(), budget.available()) == (4 * GIB, 3 * GIB) and budget.own() > 1 << 20
    monkeypatch.delattr(budget.os, "sysconf")
    for ram in ("auto", 0.5):
        with pytest.raises(InputError, match="does not say how much memory"):
            budget.allowance(ram)
    assert budget.allowance("8G") == 8 * GIB
