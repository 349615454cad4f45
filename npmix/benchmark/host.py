"""What a measurement ran on, what it ran, and how much memory this process took.

One hard fact: mapped weights count as resident but not as anonymous; only the second cannot be given back to the system.
"""

import os
import platform
import sys
from pathlib import Path


def peak_memory() -> int | None:
    """Most bytes this process had resident so far, mapped weights included; None where the system does not tell."""
    found = _status("VmHWM")
    if found is None and sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = peak if sys.platform == "darwin" else peak * 1024
    return found


def anonymous_memory() -> int | None:
    """Bytes resident now that no file backs (Linux); None elsewhere."""
    return _status("RssAnon")


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:  # no Linux
        pass
    return None


def weight_formats(source) -> str:
    """The weight formats of the matrices, the largest share first: "q4 group 128 (97 %), q8 group 128 (3 %)"."""
    sums: dict[str, int] = {}
    for name in source.names():
        tensor = source.tensor(name)
        if len(tensor.shape) == 2 and not name.endswith("router"):
            key = f"{tensor.format} group {tensor.group}" if tensor.group else tensor.format
            sums[key] = sums.get(key, 0) + tensor.shape[0] * tensor.shape[1]
    whole = sum(sums.values())
    return ", ".join(f"{key} ({100 * n / whole:.0f} %)" for key, n in sorted(sums.items(), key=lambda item: -item[1]))


def machine() -> dict:
    """What this runs on, in words and numbers."""
    from importlib.metadata import version

    from .. import __version__
    from ..kernels.cpu import form

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:  # no Linux
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "int8_form": form(),
        "python": platform.python_version(),
        "numba": version("numba"),
        "npmix": __version__,
    }
