# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Every benchmark runs. What it measures is for people to read, not for tests to judge."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
GATE = {"asked", "precision"}  # the headline figures; the others, for minutes, every night


def run(script, *options):
    """Runs it as a test would have it run, and sees that it changes nothing beside itself."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before = kept()
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--smoke", *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|-+\|", done.stdout)  # a table
    assert kept() == before
    return done.stdout


def kept():
    """When each file of the benchmarks and their results was last written."""
    files = (p for p in (ROOT / "benchmarks").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {path: path.stat().st_mtime_ns for path in files}


def test_there_are_benchmarks():
    assert SCRIPTS


def test_nothing_is_kept_of_a_smoke_run():
    """Unless it is told where; what is shared between benchmarks sees to it."""
    run(next(script for script in SCRIPTS if script.stem == "importance"))


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=() if s.stem in GATE else pytest.mark.nightly) for s in SCRIPTS],
    ids=lambda script: script.stem,
)
def test_results_go_where_they_are_told_to_go(script, tmp_path):
    printed = run(script, "--output", str(tmp_path))
    result = json.loads((tmp_path / f"{script.stem}.json").read_text())
    assert {"date", "commit", "machine", "versions"} <= result.keys()
    assert (tmp_path / f"{script.stem}.md").read_text().strip() == printed.strip()


def test_peak_memory_is_measured():
    """A step of many particles takes more than a step of two; in a process of its own, whatever ran before."""
    script = next(script for script in SCRIPTS if script.stem == "gradients")
    command = [sys.executable, str(script), "--peak", "Pathwise", "2000", "--smoke"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
