import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "npmix")
MAX_MODEL = 9_000_000  # bytes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by pip from a copy of the sources, without network."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", "."]
    subprocess.run(command, cwd=folder, check=True)
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(folder, environment): the wheel installed outside of the checkout, without its dependencies, in front of everything else."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel], check=True)
    return folder, {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def python(installed, code, cwd):
    """Run code against the installed package, from a folder that holds nothing."""
    return subprocess.run([sys.executable, "-c", code], env=installed[1], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_metadata():
    """Name, entry point, Python and the five packages; the version has one source; pyproject.toml holds the build-system table alone."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["name"] == "npmix" and setup["metadata"]["version"] == "attr: npmix.__version__"
    assert setup["options"]["python_requires"] == ">= 3.10"
    packages = {re.match(r"[\w-]+", line).group() for line in setup["options"]["install_requires"].split("\n") if line}
    assert packages == {"numpy", "numba", "safetensors", "sentencepiece", "click"}
    assert "torch" not in setup["options.extras_require"]["test"]
    tables = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("[")]
    assert tables == ["[build-system]"]


def test_wheel_holds_what_it_should(wheel):
    """Every module, the model, its licence note, the licence and py.typed; no tests, no tools."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "npmix").rglob("*.py")}
    assert modules <= names
    assert {"npmix/py.typed", "npmix/bundled/npmix.json", "npmix/bundled/tokenizer.model"} <= names
    assert [name for name in names if name.startswith("npmix/bundled/LICENSE")]
    assert [name for name in names if re.search(r"\.dist-info/.*LICENSE$", name)]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"npmix"}


def test_bundled_model_is_small(wheel):
    """The model takes at most 9 MB."""
    with zipfile.ZipFile(wheel) as archive:
        assert 0 < sum(i.file_size for i in archive.infolist() if i.filename.startswith("npmix/bundled/")) <= MAX_MODEL


def test_installed_package_is_used(installed, tmp_path):
    """Outside of the checkout the installed package answers, by its command and by `python -m npmix`."""
    where = python(installed, "import npmix; print(npmix.__file__, npmix.__version__)", tmp_path).split()
    assert Path(where[0]).is_relative_to(installed[0])
    script = next((installed[0] / "bin").glob("npmix*"), None) or installed[0] / "Scripts" / "npmix.exe"
    for command in ([script], [sys.executable, "-m", "npmix"]):
        out = subprocess.run([*command, "--version"], env=installed[1], cwd=tmp_path, check=True, capture_output=True, text=True)
        assert out.stdout == f"npmix {where[1]}\n"


def test_installed_model_is_whole(installed, tmp_path):
    """`npmix info` and the digests of the bundled model, from the installed package."""
    code = "import npmix.generate as g, npmix.convert as c; print(c.verify(g.BUNDLED)['kind'], g.BUNDLED)"
    kind, folder = python(installed, code, tmp_path).split()
    assert kind == "store" and Path(folder).is_relative_to(installed[0])


@pytest.mark.compiled
def test_installed_command_prints_text(installed, tmp_path):
    """`npmix run "def fibonacci(n):"` streams text with nothing but the package."""
    command = [sys.executable, "-m", "npmix", "run", "-n", "16", "def fibonacci(n):"]
    out = subprocess.run(command, env=installed[1], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert out.stdout.strip() and "tok/s" in out.stderr
