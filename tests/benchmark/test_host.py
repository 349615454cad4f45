from npmix.benchmark import anonymous_memory, peak_memory


def test_memory_figures():
    """Peak memory is at least what is anonymous now (both known on Linux)."""
    anonymous, peak = anonymous_memory(), peak_memory()
    assert anonymous is None or 1 << 20 < anonymous <= peak
