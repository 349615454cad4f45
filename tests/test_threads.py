"""How many threads a process takes by itself."""

import os

import pytest

from npmix import threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(mask, siblings, files): pretend to run on these CPUs; siblings: cpu -> its core's list; files: of the cgroup."""

    def pretend(mask, siblings=None, files=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(mask), raising=False)
        monkeypatch.setattr(threads, "CPUS", tmp_path / "cpus")
        monkeypatch.setattr(threads, "CGROUP", tmp_path / "cgroup")
        for cpu, text in (siblings or {}).items():
            folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(text + "\n")
        for name, text in (files or {}).items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return threads.default_threads()

    return pretend


def test_physical_cores_of_the_affinity_mask(machine):
    """Two hyper-threads of a core count once; CPUs outside the mask do not count."""
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    assert machine(range(8), siblings) == 4


def test_part_of_the_mask(machine):
    """A mask of three hyper-threads on two cores gives two threads."""
    assert machine([1, 2, 6], {1: "1,5", 2: "2,6", 6: "2,6"}) == 2


def test_unknown_topology(machine):
    """Without the system's word on cores every CPU counts as one."""
    assert machine([0, 3, 5]) == 3


@pytest.mark.parametrize("text, expected", [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 6), ("", 6), ("800000 100000", 6)])
def test_quota_version_2(machine, text, expected):
    """A container's quota limits the threads, rounded up, never below 1."""
    assert machine(range(6), files={"cpu.max": text}) == expected


@pytest.mark.parametrize("quota, expected", [("200000", 2), ("-1", 6), ("10000", 1)])
def test_quota_version_1(machine, quota, expected):
    """The older files of the same quota; -1 means none."""
    assert machine(range(6), files={"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"}) == expected


def test_without_affinity(monkeypatch):
    """A system that has no affinity masks gives at least one thread."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert threads.default_threads() >= 1


def test_this_machine():
    """What the real system says is at least 1 and at most its CPUs."""
    assert 1 <= threads.default_threads() <= os.cpu_count()
