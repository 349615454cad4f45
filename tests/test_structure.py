"""The house of the project, read from the source by AST: nothing is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "npmix"

# The first part of a module's name below npmix -> its layer. Imports go down, or stay inside a layer.
LAYERS = {
    "config": 0, "errors": 0, "formats": 0, "budget": 0,
    "quant": 1, "kernels": 1,
    "checkpoint": 2,
    "store": 3,
    "model": 4, "tokenizer": 4, "chat": 4, "sampling": 4, "convert": 4, "threads": 4,
    "budgeted": 5, "engine": 5, "generate": 5, "stream": 5, "planner": 5,
    "benchmark": 6, "calibrate": 6, "evaluation": 6,
    "cli": 7, "__main__": 7,
}  # fmt: skip
APART = {("quant", "kernels"), ("kernels", "quant"), ("checkpoint", "model"), ("store", "model"), ("model", "checkpoint")}
PACKAGES = {"numpy", "numba", "llvmlite", "safetensors", "sentencepiece", "click"}
ONLY_IN = {
    "numba": "kernels/",
    "llvmlite": "kernels/",
    "safetensors": ("checkpoint/", "store/"),
    "sentencepiece": "tokenizer.py",
    "click": "cli/",
}
LLVMLITE = {"kernels/simd.py", "kernels/cpu.py"}

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(), str(file)) for file in FILES}


def relative(file):
    return file.relative_to(PACKAGE).as_posix()


def module_name(file):
    """npmix.kernels.simd, npmix.cli"""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imported(file):
    """(module's full name, whether at the top of the file) for every import of the file."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    top = {id(node) for node in TREES[file].body}
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            for name in node.names:
                full = f"{base}.{name.name}"
                yield (full if full in MODULES else base), id(node) in top


def part(module):
    """The layer's member a module belongs to: npmix.kernels.simd -> kernels."""
    return module.split(".")[1] if "." in module else ""


def test_every_file_has_its_layer():
    """Each module of the package stands in the table of layers, and the table names no module that is not there."""
    parts = {part(name) for name in MODULES} - {""}
    assert parts == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_go_down(file):
    """A module imports from its own layer or from lower ones; quant and kernels, model and checkpoint never meet."""
    own = part(module_name(file))
    for name, _ in imported(file):
        if name.split(".")[0] != "npmix":
            continue
        other = part(name)
        if own == "" or other in ("", own):  # the package itself is lazy and holds the version
            continue
        assert LAYERS[other] <= LAYERS[own], f"{relative(file)} imports {name}"
        assert (own, other) not in APART, f"{relative(file)} imports {name}"


def test_no_cycles():
    """Following the imports of any module, at its top or inside its functions, never leads back to it."""
    graph = {name: {n for n, _ in imported(file) if n in MODULES and n != name} for name, file in MODULES.items()}
    for name in graph:
        graph[name].discard("npmix")  # for __version__; the package imports nothing at its top
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(path.pop())

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_outside_packages(file):
    """The five packages and the standard library, each only where it belongs."""
    for name, _ in imported(file):
        first = name.split(".")[0]
        if first == "npmix" or first in sys.stdlib_module_names:
            continue
        assert first in PACKAGES, f"{relative(file)} imports {name}"
        if first in ONLY_IN:
            assert relative(file).startswith(ONLY_IN[first]), f"{relative(file)} imports {name}"
        if first == "llvmlite":
            assert relative(file) in LLVMLITE


@pytest.mark.parametrize("name", ["npmix", "npmix.cli"])
def test_light_modules_stay_light(name):
    """What `import npmix` and `npmix --help` load imports only click, the errors and each other at its top."""
    for other, top in imported(MODULES[name]):
        first = other.split(".")[0]
        if top and first == "npmix":
            assert other in ("npmix", "npmix.errors", "npmix.cli.interrupts")
        elif top:
            assert first not in PACKAGES - {"click"}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_njit_is_called_in_one_place(file):
    """numba's njit, jit, vectorize and prange appear in kernels/_jit.py alone; kernels take njit from there."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numba":
            assert not {"njit", "jit", "vectorize", "guvectorize", "prange"} & {n.name for n in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "numba":
            assert node.attr not in ("njit", "jit", "vectorize", "guvectorize", "prange") or relative(file) == "kernels/_jit.py"
        if isinstance(node, ast.keyword) and node.arg == "fastmath":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_sizes(file):
    """No file over 400 lines, no line over 150 characters, no function over 60 lines (in kernels 90)."""
    lines = file.read_text().splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines), default=0) <= 150
    limit = 90 if relative(file).startswith("kernels/") else 60
    for node in ast.walk(TREES[file]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= limit, f"{relative(file)}: {node.name}"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_docstrings(file):
    """Every module that holds code opens with what it is for."""
    if TREES[file].body:
        assert ast.get_docstring(TREES[file])


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_plain_python(file):
    """No metaclass, no exec or eval, no bare except; at import nothing is done but definitions."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ClassDef):
            assert not [k for k in node.keywords if k.arg == "metaclass"]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval", "compile", "__import__")
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
    for node in TREES[file].body:
        assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{relative(file)}:{node.lineno} works at import"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{relative(file)}:{node.lineno} works at import"


def test_cli_imports_heavy_things_inside_commands():
    """Modules of the command line import from below only inside functions, the errors apart."""
    for name, file in MODULES.items():
        if part(name) != "cli":
            continue
        for other, top in imported(file):
            if top and other.split(".")[0] == "npmix" and part(other) not in ("", "cli"):
                assert other == "npmix.errors", f"{relative(file)} imports {other} at its top"


def test_package_never_imports_tools():
    """npmix imports neither tools nor tests nor torch."""
    for file in FILES:
        for name, _ in imported(file):
            assert name.split(".")[0] not in ("tools", "tests", "make", "torch", "transformers")
