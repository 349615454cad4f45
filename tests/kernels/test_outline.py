"""Tiles as machine functions of their own: what happens when making one does not come to its end."""

import numpy as np
import pytest
from kernel_tools import memory

from npmix.kernels import outline
from npmix.kernels._jit import njit
from npmix.kernels.simd import i64, load, op, store, vector, void


@pytest.mark.compiled
def test_an_interrupted_tile_is_compiled_again(monkeypatch):
    """An interrupt while a tile is compiled leaves nothing behind: the next caller compiles it, and it does its work."""

    @outline.outlined
    def copy_once(lines):
        def emit(builder, source, target, unused):
            store(builder, load(builder, source, vector("i8", 64)), target)

        return op(void, (i64,) * 3, None)(emit)

    tile, make = copy_once(1), outline._with_arguments

    def interrupted(*args):
        monkeypatch.setattr(outline, "_with_arguments", make)
        raise KeyboardInterrupt

    monkeypatch.setattr(outline, "_with_arguments", interrupted)
    given, out = memory(np.arange(64, dtype=np.uint8)), memory(np.zeros(64, np.uint8))
    with pytest.raises(KeyboardInterrupt):
        njit(lambda a, b, c: tile(a, b, c))(given.at, out.at, 0)
    njit(lambda a, b, c: tile(a, b, c))(given.at, out.at, 0)
    assert (out.array == given.array).all() and out.intact()
    outline._tiles.pop()
