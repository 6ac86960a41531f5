# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The wheel, and the commands of the Makefile, from a path with a space."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    "setup.cfg",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "requirements.lock",
]


@pytest.fixture
def copy(tmp_path):
    """The sources alone, in a folder with a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "pyro_iwae", folder / "pyro_iwae", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_wheel(copy):
    """Typed, with the table of estimators, and nothing besides the package."""
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    result = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"pyro_iwae/py.typed", "pyro_iwae/gradients/README.md", "pyro_iwae/elbo.py"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pyro_iwae"}
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert all(f"Provides-Extra: {extra}" in metadata for extra in ("examples", "arviz", "docs", "test"))
    for name in ("torch", "pyro-ppl", "numpy", "matplotlib", "tqdm", "jaxtyping"):
        assert f"Requires-Dist: {name}" in metadata


def built(folder, what):
    """A distribution, built as an index would get it."""
    build = f"from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, check=True, env=environment)
    (found,) = (folder / "dist").iterdir()
    return found


def contents(archive):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return {name: opened.read(name) for name in opened.namelist()}
    with tarfile.open(archive) as opened:
        files = {m.name: opened.extractfile(m) for m in opened.getmembers() if m.isfile()}
        return {name: file.read() for name, file in files.items()}


@pytest.mark.parametrize("what", ["wheel", "sdist"])
def test_builds_are_reproducible(copy, tmp_path, what):
    """The same files byte by byte, from sources in another folder; the wheel itself, too."""
    other = tmp_path / "elsewhere"
    shutil.copytree(copy, other)
    one, two = built(copy, what), built(other, what)
    assert one.name == two.name
    assert contents(one) == contents(two)
    if what == "wheel":
        assert one.read_bytes() == two.read_bytes()


LEFT_BEHIND = [
    "docs/_build/html/index.html",
    "docs/gallery/digits.rst",
    "docs/sg_execution_times.rst",
    "tests/.hypothesis/examples/0a",
    "tests/__pycache__/test_elbo.pyc",
    "tests/.pytest_cache/README.md",
    "examples/posterior.npz",
    ".venv/bin/python",
]


def test_source_distribution(copy):
    """All that `make test` reads, and nothing that was built, run or is of one machine."""
    for folder in ("tests", "docs", "examples", "benchmarks", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "_build", "gallery", ".hypothesis", "*.npz", "sg_*")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "CHANGELOG.md", copy)
    for name in LEFT_BEHIND:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("of one run")
    names = {name.split("/", 1)[1] for name in contents(built(copy, "sdist"))}
    wanted = {"LICENSE", "README.md", "Makefile", "constraints.txt", "requirements.lock", "tests/conftest.py"}
    assert wanted | {"docs/index.rst", "tools/lock.py", "pyro_iwae/py.typed", "examples/digits_vae.py"} <= names
    assert names & set(LEFT_BEHIND) == set()
    suffixes = {".py", ".rst", ".md", ".txt", ".cfg", ".toml", ".lock", ".typed", ".cff", ".in", ".svg", ".png", ".css"}
    suffixes |= {".json", ".csv", ".inv", ".html", ".js", ".bib", ""}
    odd = sorted(n for n in names if Path(n).suffix not in suffixes or "__pycache__" in n or ".venv" in n)
    assert [n for n in odd if not n.startswith("pyro_iwae.egg-info")] == []


def entries(name):
    """Package and version of each line that pins one."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


def test_the_lock_is_that_of_the_constraints():
    """Every package but torch, in the same version, each file by a hash."""
    pinned, locked = entries("constraints.txt"), entries("requirements.lock")
    assert {n: v for n, v in pinned.items() if n != "torch"} == locked
    blocks = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    markers = re.compile(r"^([\w.-]+)==\S+ *; *(.*?) *\\?$", re.MULTILINE)
    found = [dict(markers.findall((ROOT / name).read_text())) for name in ("constraints.txt", "requirements.lock")]
    assert found[0] == found[1]


def test_each_licence_is_stated():
    page = (ROOT / "docs" / "dependencies.rst").read_text()
    for name, version in entries("constraints.txt").items():
        assert re.search(rf"\* - {re.escape(name)}\n     - {re.escape(version)}\n     - \S", page), name


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_installs_once(copy, target):
    def plan():
        result = subprocess.run(["make", "-n", target], cwd=copy, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "-m venv .venv" in plan() and "pip install" in plan()
    done = copy / ".venv" / {"demo": "installed-examples", "test": "installed-all"}[target]
    done.parent.mkdir()
    done.touch()
    assert "pip install" not in plan() and "-m venv" not in plan()
    later = time.time() + 10
    os.utime(copy / "setup.cfg", (later, later))
    assert "pip install" in plan()  # new requirements
