"""Laws of the package's surface: small, sorted, lazy."""

import subprocess
import sys
import time

import pytest

import npmix

HEAVY = {"numba", "llvmlite", "sentencepiece", "safetensors", "numpy", "torch", "transformers"}


def test_surface():
    """`__all__` is sorted and every name in it can be had; others are an AttributeError."""
    assert npmix.__all__ == sorted(npmix.__all__)
    for name in npmix.__all__:
        assert getattr(npmix, name) is not None and name in dir(npmix)
    assert issubclass(npmix.errors.InputError, npmix.NpmixError)
    with pytest.raises(AttributeError, match="nothing"):
        npmix.nothing  # noqa: B018


def test_import_is_light():
    """`import npmix` loads nothing heavy and takes less than 0.3 s (the best of three, the interpreter included)."""
    code = f"import sys, npmix; print(*sorted({HEAVY!r} & set(sys.modules)))"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert done.stdout.strip() == ""
    assert min(times) < 0.3
