"""What the whole suite shares: the two markers, and a kernel cache that outlives a test but not the checkout's user.

One hard fact: a skipped test must have a reason that the environment gives: torch or transformers not installed, or
NUMBA_DISABLE_JIT set; nothing else is skipped here.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests/make.py, for all folders of tests

JIT_DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell that starts us in the background; programs that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def has_transformers() -> bool:
    """Whether the oracle is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "mistral_common"))


def pytest_collection_modifyitems(items):
    """Skip what this environment cannot run."""
    without_oracle = pytest.mark.skip(reason="needs torch and transformers: pip install '.[dev]'")
    without_jit = pytest.mark.skip(reason="needs compiled kernels, NUMBA_DISABLE_JIT is set")
    oracle = has_transformers()
    for item in items:
        if "transformers" in item.keywords and not oracle:
            item.add_marker(without_oracle)
        if "compiled" in item.keywords and JIT_DISABLED:
            item.add_marker(without_jit)


@pytest.fixture(scope="session")
def mixtral():
    """Mixtral's own tokenizer, which the package mistral-common (extra "dev") brings; tests that use it are marked `transformers`."""
    import mistral_common

    from npmix.tokenizer import Tokenizer

    return Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
