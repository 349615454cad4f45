"""Tiles as machine functions of their own: compiled once, kept on disk, and called by name.

One hard fact: Numba optimises a function together with all that it calls, anew at every level of a chain of calls, so a
tile deep inside would be compiled once a level. A tile that is only a name to its callers is compiled once; the call
costs a few of the tile's ten thousand cycles.
"""

import functools
import inspect

from . import cpu
from ._jit import DISABLED, before_load, njit
from .simd import add_symbol, call, i64, op, scalar, void

_tiles = []  # every outlined tile of this process, in order


class _Tile:
    """One tile: its symbol holds the form it is compiled for, which a failed proof may change."""

    def __init__(self, name, inner):
        self.name, self.inner, self._registered = name, inner, {}
        if not _tiles:
            before_load(register_all)
        _tiles.append(self)

    @property
    def symbol(self):
        return f"npmix.{self.name}.{cpu.form()}"

    def register(self):
        """Compile the tile or load it, and make its address known to LLVM under its symbol."""
        symbol = self.symbol
        if symbol in self._registered:
            return
        self._registered[symbol] = None  # loading it asks for all tiles again
        try:
            function, signature = _with_arguments(self.inner, self.name), (i64,) * self.inner.arity
            function.compile(signature)
            result = function.overloads[signature]
            add_symbol(symbol, result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))
        except BaseException:  # an interrupt, say: LLVM ends the process over a symbol that is not there
            del self._registered[symbol]
            raise
        self._registered[symbol] = function  # its machine code lives as long as this


def _with_arguments(tile, name):
    """A kernel that only calls the tile: Numba reads the number of arguments off the source."""
    makers = {
        3: lambda a, b, c: tile(a, b, c),
        7: lambda a, b, c, d, e, f, g: tile(a, b, c, d, e, f, g),
        8: lambda a, b, c, d, e, f, g, h: tile(a, b, c, d, e, f, g, h),
        9: lambda a, b, c, d, e, f, g, h, i: tile(a, b, c, d, e, f, g, h, i),
    }
    function = makers[tile.arity]
    function.__qualname__ = function.__name__ = "tile"
    return njit(function, entry=name)


def register_all():
    """Before machine code that may call tiles by name is loaded."""
    for tile in list(_tiles):
        tile.register()


def outlined(make):
    """Decorate a function (name, ...) -> operation on addresses that returns nothing: callers get one that calls it by name.

    The original operation, to emit in place, is its attribute `inner`.
    """

    names = inspect.signature(make)

    def wrapped(*args):
        bound = names.bind(*args)
        bound.apply_defaults()
        return tile(*bound.args)

    @functools.lru_cache(maxsize=None)
    def tile(*args):
        inner = make(*args)
        if DISABLED:
            return inner
        own = _Tile(".".join([make.__name__, *map(str, args)]), inner)

        def emit(builder, *values):
            own.register()
            call(builder, own.symbol, scalar("void"), *values)

        made = op(void, (i64,) * inner.arity, inner.twin)(emit)
        made.inner = inner
        return made

    return wrapped
