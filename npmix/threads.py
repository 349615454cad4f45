"""How many threads a process should use: the physical cores it may really run on.

One hard fact: hyper-threads share the units and the caches that kernels fill, so a second thread on a
core brings nothing; and a container's quota is not in the affinity mask.
"""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """Physical cores in the affinity mask, at most the cgroup's CPU quota, at least 1."""
    try:
        cpus = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return max(1, (os.cpu_count() or 1) // (2 if os.name == "nt" else 1))
    cores = {_core(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota()))


def _core(cpu: int) -> str:
    try:
        return (CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """CPUs of the cgroup's quota, rounded up; without one a number no machine reaches."""
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (CGROUP / quota).read_text().split()
            if period:
                words.append((CGROUP / period).read_text().strip())
            if int(words[0]) > 0:
                return max(1, -(-int(words[0]) // int(words[1])))
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return 1 << 20
