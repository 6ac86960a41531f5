# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The wheel, and the commands of the Makefile, from a path with a space."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ["setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "MANIFEST.in"]


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
