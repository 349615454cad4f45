"""The cache of compiled kernels: what is kept, what makes it stale, what it refuses; and that compiling leaves no trace elsewhere."""

import ast
import os
import shutil
import stat
import warnings

import pytest
from kernel_tools import ROOT, child

from npmix.kernels import _jit, cpu

KERNELS = ROOT / "npmix" / "kernels"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache root of this test's own; its folder is chosen anew, and tiles that other tests made are not asked for."""
    root = tmp_path / "cache"
    monkeypatch.setenv("NPMIX_CACHE_DIR", str(root))
    monkeypatch.setattr(_jit, "_before_load", [])
    _jit.cache_dir.cache_clear()
    yield root
    _jit.cache_dir.cache_clear()


def made(text="a"):
    """A fresh dispatcher over one small function."""

    def twice(x):
        return x + x

    return _jit.njit(twice, entry=text)


def counted(function, *args):
    """(result, hits, misses) of a call."""
    before = _jit.cache_counts()
    result = function(*args)
    after = _jit.cache_counts()
    return result, after["hits"] - before["hits"], after["misses"] - before["misses"]


def files(root):
    return sorted(root.glob("kernels-*/*"))


@pytest.mark.compiled
def test_a_second_dispatcher_loads_what_the_first_compiled(cache):
    """One file a (function, variant, signature): a miss, then hits; another variant and another type are misses of their own."""
    assert counted(made(), 3) == (6, 0, 1)
    assert len(files(cache)) == 1
    assert counted(made(), 4) == (8, 1, 0)
    assert counted(made("b"), 4) == (8, 0, 1)
    assert counted(made(), 1.5) == (3.0, 0, 1)
    assert len(files(cache)) == 3
    assert counted(made(), 1.5) == (3.0, 1, 0)


@pytest.mark.compiled
@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "text", "folder"])
def test_a_damaged_file_is_a_miss(cache, damage):
    """A file that is cut, changed in one bit or something else altogether is compiled anew, and mended where that can be."""
    made()(3)
    file = files(cache)[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes({"empty": b"", "short": bytes(data[:100]), "flipped": bytes(data), "text": b"x" * 4096}[damage])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder in the file's place cannot be replaced: it says so
        assert counted(made(), 3) == (6, 0, 1)
    if damage != "folder":
        assert counted(made(), 3) == (6, 1, 0)
    assert [f for f in files(cache) if f != file] == []  # no half-written file stays


@pytest.mark.compiled
def test_listeners_hear_of_misses_only(cache):
    """on_compile names a kernel before it is compiled, not when it is loaded, and not once it is stopped."""
    heard = []
    stop = _jit.on_compile(heard.append)
    made()(3)
    made()(3)
    assert len(heard) == 1 and "twice" in heard[0]
    stop()
    made("other")(3)
    assert len(heard) == 1


def test_the_folder_is_closed_to_others(cache):
    """NPMIX_CACHE_DIR is respected, and the folder below it has mode 0700."""
    folder = _jit.cache_dir()
    assert folder.parent == cache and folder.name.startswith("kernels-")
    if os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_the_cache_lies(tmp_path, monkeypatch):
    """NPMIX_CACHE_DIR, else XDG_CACHE_HOME/npmix, else ~/.cache/npmix; an empty variable counts as none."""
    ask = _jit.cache_dir.__wrapped__
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for npmix, xdg, expected in (
        (tmp_path / "a", tmp_path / "b", tmp_path / "a"),
        ("", tmp_path / "b", tmp_path / "b" / "npmix"),
        ("", "", tmp_path / "home" / ".cache" / "npmix"),
    ):
        monkeypatch.setenv("NPMIX_CACHE_DIR", str(npmix))
        monkeypatch.setenv("XDG_CACHE_HOME", str(xdg))
        assert ask().parent == expected


@pytest.mark.skipif(os.name != "posix", reason="no owners and modes here")
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722, 0o777])
def test_a_folder_others_may_write_is_refused(cache, mode):
    """Entries are pickles: a folder that others may write is not used, with a warning that names it."""
    folder = _jit.cache_dir()
    folder.chmod(mode)
    _jit.cache_dir.cache_clear()
    if mode & 0o022:
        with pytest.warns(UserWarning, match=folder.name):
            assert _jit.cache_dir() is None
    else:
        assert _jit.cache_dir() == folder


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
def test_a_folder_of_another_user_is_refused(cache, monkeypatch):
    """A folder that belongs to somebody else is not used either."""
    assert _jit.cache_dir() is not None
    _jit.cache_dir.cache_clear()
    monkeypatch.setattr(_jit.os, "getuid", lambda: os.stat(cache).st_uid + 1)
    with pytest.warns(UserWarning, match="another user"):
        assert _jit.cache_dir() is None


@pytest.mark.compiled
def test_without_a_place_kernels_compile_in_memory(tmp_path, monkeypatch):
    """A cache that cannot be made (here: below a file) is one warning, and kernels work."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NPMIX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    _jit.cache_dir.cache_clear()
    try:
        with pytest.warns(UserWarning, match="anew in every process") as caught:
            assert counted(made(), 3) == (6, 0, 1) and counted(made(), 3) == (6, 0, 1)
        assert len(caught) == 1
    finally:
        _jit.cache_dir.cache_clear()


@pytest.mark.compiled
def test_a_full_disk_is_one_warning(cache, monkeypatch):
    """A kernel that cannot be written is used all the same; the first one says so, and nothing half-written stays."""

    class Full:
        def __init__(self, file):
            self._file, self.name = file, file.name

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def write(self, data):
            raise OSError(28, "No space left on device")

    real = _jit.tempfile.NamedTemporaryFile
    _jit.cache_dir()
    monkeypatch.setattr(_jit.tempfile, "NamedTemporaryFile", lambda **options: Full(real(**options)))
    monkeypatch.setattr(_jit, "_unwritable_warned", _jit.threading.Event())
    with pytest.warns(UserWarning, match="No space left") as caught:
        assert made()(3) == 6 and made("b")(3) == 6
    assert len(caught) == 1 and files(cache) == []


def imported_from_outside():
    """The modules of the package that kernels import from outside their folder; exceptions are no part of machine code."""
    found = set()
    for file in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 1 and node.module != "errors":
                found.add(ROOT / "npmix" / f"{node.module.replace('.', '/')}.py")
    return found


def test_the_hash_covers_every_source(tmp_path, monkeypatch):
    """An edit of any file that kernels are made of, formats.py included, gives another folder; so do Numba's version and the form."""
    copy = tmp_path / "npmix"
    shutil.copytree(ROOT / "npmix", copy, ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    monkeypatch.setattr(_jit, "__file__", str(copy / "kernels" / "_jit.py"))
    hashes = [_jit._source_hash()]
    assert _jit._source_hash() == hashes[0]
    sources = [*KERNELS.glob("*.py"), *imported_from_outside()]
    assert ROOT / "npmix" / "formats.py" in sources
    for source in sources:
        with open(copy / source.relative_to(ROOT / "npmix"), "a") as file:
            file.write("\n# edited\n")
        hashes.append(_jit._source_hash())
    monkeypatch.setattr(_jit.numba, "__version__", "0.0")
    hashes.append(_jit._source_hash())
    monkeypatch.setattr(cpu, "form", lambda: "another")
    hashes.append(_jit._source_hash())
    assert len(set(hashes)) == len(hashes)


TWICE = """
import numpy as np
from npmix.formats import packed_bytes
from npmix.kernels import rounding
from npmix.kernels._jit import cache_counts
out = np.zeros(packed_bytes("q4", 16, 64, 128), np.uint8)
assert rounding.round_rows(np.ones((16, 64), np.float32), "q4", 128, out) == 0
print(cache_counts())
"""


@pytest.mark.compiled
def test_a_second_process_compiles_nothing(tmp_path):
    """Two processes, one cache: the second has no miss. (The forward pass itself: `test_forms.py`.)"""
    assert child(TWICE, tmp_path).stdout.strip() == "{'hits': 0, 'misses': 1}"
    assert child(TWICE, tmp_path).stdout.strip() == "{'hits': 1, 'misses': 0}"


LONG = "        x = (x * factor) % 1000003 + (x >> 1)\n" * 60  # too long to be merged into its caller
TIMES = f"""
import sys
from npmix.kernels._jit import cache_counts, njit
def made(factor):
    @njit
    def inner(x):
{LONG}        return x
    def outer(x):
        return inner(x) + inner(x + 1)
    return njit(outer, entry=str(factor))
print([made(int(factor))(7) for factor in sys.argv[1:]], cache_counts()["misses"])
"""


@pytest.mark.compiled
def test_kernels_of_two_processes_meet_in_a_third(tmp_path):
    """Kernels that different processes compiled keep their own code when one process loads both: no symbol of theirs is shared."""
    three, five = (child(TIMES, tmp_path, factor).stdout.split("]")[0][1:] for factor in (3, 5))
    assert child(TIMES, tmp_path, 3, 5).stdout.strip() == f"[{three}, {five}] 0" and three != five


def ways_in(kernel):
    """How many of a kernel's functions in its machine code are for calls from Python or C."""
    (compiled,) = kernel.overloads.values()
    names = compiled.fndesc.llvm_cpython_wrapper_name, compiled.fndesc.llvm_cfunc_wrapper_name
    return sum(name in compiled.library.get_llvm_str() for name in names)


@pytest.mark.compiled
def test_an_inner_kernel_has_a_way_in_once_python_asks(cache):
    """A kernel without an entry is compiled without ways in for its callers, but Python may call it before and after; results stay."""
    inner = _jit.njit(lambda x: x * 3 + 1)
    outer = _jit.njit(lambda x: inner(x) + inner(x + 1), entry="outer")
    assert outer(2) == 17 and ways_in(inner) == 0 and ways_in(outer) == 2
    assert inner(2) == 7 and ways_in(inner) == 2
    another = _jit.njit(lambda x: inner(x) - 1, entry="another")
    assert another(2) == 6 and outer(2) == 17 and inner(2.0) == 7.0


UNTOUCHED = """
import os, signal, threading, warnings
import numba, numpy as np
from numba.core import config
def state():
    names = sorted(n for n in dir(config) if n.isupper() and not callable(getattr(config, n)))
    return {n: repr(getattr(config, n)) for n in names}, np.geterr(), np.get_printoptions(), list(warnings.filters), \\
        signal.getsignal(signal.SIGINT), dict(os.environ), threading.active_count(), numba.get_num_threads()
before = state()
import npmix.kernels.entry, npmix.kernels.rounding, npmix.kernels.team, npmix.kernels.ceilings
assert state() == before, "importing"
from npmix.kernels.rows import rms_norm
x = np.ones(32, np.float32)
at = x.__array_interface__["data"][0]
rms_norm(at, at, 32, 32, np.float32(1e-5), at)
from npmix.kernels import _jit
assert _jit.njit(lambda v: v + 1, entry="x")(1) == 2
assert state() == before, "compiling"
print("untouched")
"""


def test_no_global_state_is_changed(tmp_path):
    """Importing and compiling kernels changes no setting of Numba or NumPy, no warning filter, no signal handler, no environment
    variable, and starts no thread."""
    disabled = os.environ.get("NUMBA_DISABLE_JIT")
    assert "untouched" in child(UNTOUCHED, tmp_path, NUMBA_DISABLE_JIT=disabled).stdout
