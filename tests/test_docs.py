# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The README's code runs; links into other projects name what exists there; broken links between pages are found."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INVENTORIES = sorted((ROOT / "docs/inventories").glob("*.txt"))


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import check_links

    return check_links.broken


def test_readme_runs(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "preflight: nothing will raise" in done.stdout and "log p(x) = " in done.stdout


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:docs|examples|benchmarks|pyro_iwae)/[\w/]+\.(?:rst|md|py|png)", text))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def named(path):
    """Each entry of an inventory: name and kind, and where its page describes it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        name, kind, priority, place, shown = line.split()
        assert (kind in ("py:class", "py:function"), priority, shown) == (True, "1", "-")
        page, anchor = place.split("#")
        assert page.endswith(".html")
        yield name, name if anchor == "$" else anchor


@pytest.mark.parametrize("path", INVENTORIES, ids=lambda p: p.stem)
def test_inventories_name_what_exists(path):
    for name, anchor in named(path):
        module, attribute = anchor.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute), name


def test_broken_links_are_found(broken, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here">1</a><a href="#gone">2</a><a href="deep/b.html#there">3</a>'
        '<a href="deep/b.html#nowhere">4</a><a href="missing.html">5</a><img src="missing.png">'
        '<a href="https://pyro.ai/x">6</a><a href="deep/b.html">7</a>'
    )
    (tmp_path / "deep/b.html").write_text('<p id="there"><a href="../a.html#here">1</a>')
    assert broken(tmp_path) == [
        f"a.html: {link}" for link in ("#gone", "deep/b.html#nowhere", "missing.html", "missing.png")
    ]
