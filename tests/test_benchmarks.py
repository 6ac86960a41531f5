# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Every benchmark runs. What it measures is for people to read, not for tests to judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def run(script, *options):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "error", str(script), "--smoke", *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_there_are_benchmarks():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_smoke(script, tmp_path):
    """It prints a table, and results go where they are told to go."""
    before = {p: p.stat().st_mtime_ns for p in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in p.parts}
    done = run(script, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "|---|" in done.stdout
    result = json.loads((tmp_path / f"{script.stem}.json").read_text())
    assert {"date", "commit", "machine", "versions"} <= result.keys()
    assert (tmp_path / f"{script.stem}.md").read_text().strip() == done.stdout.strip()
    after = {p: p.stat().st_mtime_ns for p in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in p.parts}
    assert after == before


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_smoke_writes_nothing_of_its_own(script):
    before = {p: p.stat().st_mtime_ns for p in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in p.parts}
    done = run(script)
    assert done.returncode == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in p.parts}
    assert after == before
