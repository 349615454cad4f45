"""The one place where kernels are compiled: every switch of Numba with its reason, and our own disk cache.

One hard fact: Numba's own cache keys on a function's file alone, so an edit in `simd.py` would go
unseen in `matmul.py`, and its index file can lose entries when two processes write it. Ours has no
index: one file per (function, variant, signature, CPU), in a folder whose name holds the version of
npmix, of Numba and a hash of all kernel sources.

With NUMBA_DISABLE_JIT=1 kernels run as plain Python on the NumPy twins of the vector operations.
"""

import functools
import hashlib
import os
import stat
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numba
from numba.core import compiler, config
from numba.core.caching import _Cache
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

from . import cpu

DISABLED = bool(config.DISABLE_JIT)
_PROCESS = f"_{os.urandom(6).hex()}"  # Numba numbers functions per process: two cached kernels could share a symbol
_before_load = []  # called before machine code is loaded from the disk cache
_listeners = []  # called with a kernel's name just before it is compiled
_counts = {"hits": 0, "misses": 0}
_unwritable_warned = threading.Event()


def on_compile(listener):
    """Call `listener(name)` before each compilation that the cache could not answer; returns a function that stops it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def before_load(ready):
    """Call `ready()` before each kernel that comes from the disk cache: what it calls by name must be there."""
    _before_load.append(ready)


def cache_counts() -> dict[str, int]:
    """Kernels loaded from the disk cache (hits) and compiled (misses) by this process so far."""
    return dict(_counts)


@functools.lru_cache(maxsize=None)
def cache_dir() -> Path | None:
    """This version's folder for compiled kernels, made with mode 0700, or None when none can be written.

    Below NPMIX_CACHE_DIR, else XDG_CACHE_HOME/npmix, else ~/.cache/npmix. Entries are pickles, so the
    folder must belong to this user and be closed to others.
    """
    root = os.environ.get("NPMIX_CACHE_DIR")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "npmix")
    path = Path(root) / f"kernels-{_source_hash()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
        if hasattr(os, "getuid") and (info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o022):
            raise PermissionError(f"{path} belongs to another user or is writable by others")
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        warnings.warn(f"npmix compiles its kernels anew in every process, the cache cannot be used: {error}", stacklevel=2)
        return None
    return path


def _source_hash() -> str:
    """A hash of what the machine code depends on: kernel sources, versions, the form of the int8 dot, how to prefetch."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in [here.parent / "formats.py", *sorted(here.glob("*.py"))]:  # constants are compiled in
        digest.update(file.read_bytes())
    digest.update(repr((numba.__version__, sys.version_info[:2], sys.implementation.cache_tag, cpu.form(), cpu.prefetching())).encode())
    return digest.hexdigest()[:20]


class _DiskCache(_Cache):
    """Numba's cache interface over single files; an unreadable entry is a miss, a failed write is a warning."""

    def __init__(self, py_func, variant):
        self._name = f"{py_func.__module__.rsplit('.', 1)[-1]}.{py_func.__qualname__}".replace("<locals>.", "")
        self._variant = variant

    @property
    def cache_path(self):
        return str(cache_dir())

    def _file(self, sig, codegen) -> Path | None:
        folder = cache_dir()
        if folder is None:
            return None
        key = repr((self._name, self._variant, str(sig), codegen.magic_tuple()))
        return folder / f"{self._name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.nbc"

    def load_overload(self, sig, target_context):
        target_context.refresh()
        file = self._file(sig, target_context.codegen())
        try:
            payload = file.read_bytes() if file else None
        except OSError:
            payload = None
        if payload is None or len(payload) < 32 or hashlib.sha256(payload[32:]).digest() != payload[:32]:
            _counts["misses"] += 1
            for listener in list(_listeners):
                listener(self._name)
            return None
        import pickle  # Numba's own reduced form of machine code; the folder is ours alone, see cache_dir

        _counts["hits"] += 1
        for ready in _before_load:
            ready()
        return compiler.CompileResult._rebuild(target_context, *pickle.loads(payload[32:]))

    def save_overload(self, sig, data):
        file = self._file(sig, data.codegen)
        if file is None:
            return
        payload = dumps(data._reduce())
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as out:
                temporary = out.name
                out.write(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, file)  # two processes may compile at once: the last whole file stays
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            if not _unwritable_warned.is_set():
                _unwritable_warned.set()
                warnings.warn(f"a compiled kernel was not kept: {error}", stacklevel=2)

    def enable(self):
        pass

    def disable(self):
        pass

    def flush(self):
        pass


def signature(*args) -> tuple:
    """The Numba types of arguments."""
    return tuple(numba.typeof(a) for a in args)


def njit(function=None, *, entry=None, inline=False):
    """Compile `function` at its first call.

    entry: a kernel that Python calls is kept on disk, with all that it calls inside; the text names what its
    closure cells hold, so that the cache can tell two kernels of one source apart. Without it: `Inner`.
    inline: merge the body into its caller before types are inferred. Numba optimises and emits each function as a
    library of its own, with all it calls, over and over along a chain of calls: a phase that is called from one
    place compiles several times faster inside its caller.
    """
    if function is None:
        return functools.partial(njit, entry=entry, inline=inline)
    if DISABLED:
        return function
    cache = None if entry is None else _DiskCache(function, entry)
    function.__qualname__ += _PROCESS
    options = {
        "nogil": True,  # the team's threads run kernels side by side
        "boundscheck": False,  # addresses, not arrays; indices are checked before a kernel sees them
        "error_model": "numpy",  # no branch for division by zero
        "fastmath": False,  # bits must not depend on the compiler's mood; fma is written where it is meant
        "inline": "always" if inline else "never",
        "no_rewrites": True,  # nothing here is an array expression: two passes less
        "_nrt": False,  # nor allocates: no reference counting to take out again
    }
    if cache is None:
        return Inner(function, targetoptions={**options, "nopython": True, **Inner.SHUT})
    dispatcher = numba.njit(**options)(function)
    dispatcher._cache = cache
    return dispatcher


class Inner(CPUDispatcher):
    """A kernel that kernels call: the ways into it from Python and from C, a sixth of all compiling, are left out.

    Python can call it all the same, as tests and tools do: that compiles it anew, with a way in.
    """

    SHUT = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

    def open(self):
        """Have what is compiled from now on a way in; what was compiled without one is forgotten."""
        if self.targetoptions["no_cpython_wrapper"]:
            self._reset_overloads()
            self.targetoptions.update(dict.fromkeys(self.SHUT, False))

    def __call__(self, *args):
        self.open()
        return super().__call__(*args)
