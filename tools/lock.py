# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Writes ``requirements.lock`` and ``docs/dependencies.rst`` from ``constraints.txt``: hashes, and licences.

Run it after a version in ``constraints.txt`` has changed, where all that ``make test`` and ``make bench`` want is
installed: hashes are those that the package index gives for every file of the release, licences what metadata state.
"""

from __future__ import annotations

import configparser
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
JSON = "application/vnd.pypi.simple.v1+json"
UNLOCKED = {"torch"}  # its builds for CPUs and GPUs come from several indexes, with hashes of their own
HEAD = """# Written by tools/lock.py from constraints.txt: every file of each release, by its hash.
# Without torch, whose builds for CPUs and GPUs come from several indexes.
"""
PAGE = """Dependencies and their licences
===============================

What is needed at run time is {needed}. All that development installs besides is below, in the versions that
``constraints.txt`` pins; ``requirements.lock`` has the hash of every file. ``make locked`` makes an environment from
these files alone, ``make audit`` asks for known vulnerabilities in them. Written by ``tools/lock.py``.

.. list-table::
   :header-rows: 1

   * - Package
     - Version
     - Licence
"""


def pinned() -> dict[str, tuple[str, str]]:
    """Version and environment marker by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = [re.fullmatch(r"([\w.-]+)==(\S+)(?: *; *(.*))?", line) for line in lines if line and line[0] != "#"]
    return {row[1].lower(): (row[2], row[3] or "") for row in rows if row is not None}


def hashes(name: str, version: str) -> list[str]:
    """The SHA-256 of every file of the release in the index."""
    address = f"https://pypi.org/simple/{name}/"
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Accept": JSON}), timeout=60) as answer:
        files = json.load(answer)["files"]
    stems = (f"-{version}-", f"-{version}.tar.gz", f"-{version}.zip")
    found = {f["hashes"]["sha256"] for f in files if any(stem in f["filename"] for stem in stems)}
    if not found:
        raise ValueError(f"expected files of {name} {version} in the index, got none")
    return sorted(found)


def licence(name: str) -> str:
    """As the installed package states it."""
    found = metadata.metadata(name)
    if "License-Expression" in found:
        return found["License-Expression"]
    kinds = [c.split("::")[-1].strip() for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    text = found["License"].strip().splitlines() if "License" in found else []
    stated = ", ".join(k for k in kinds if k != "OSI Approved") or (text[0] if text else "")
    if not stated:
        raise ValueError(f"expected {name} to state its licence, got nothing; look it up")
    return stated


def main() -> None:
    packages = pinned()
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda n: hashes(n, packages[n][0]), packages)
        found = dict(zip(packages, tqdm(asked, total=len(packages), unit="package"), strict=True))
    entries = []
    for name, (version, marker) in packages.items():
        if name not in UNLOCKED:
            condition = f" ; {marker}" if marker else ""
            lines = [f"--hash=sha256:{h}" for h in found[name]]
            entries.append(" \\\n    ".join([f"{name}=={version}{condition}", *lines]))
    (ROOT / "requirements.lock").write_text(HEAD + "\n".join(entries) + "\n")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = ", ".join(config["options"]["install_requires"].split())
    rows = [f"   * - {n}\n     - {v}\n     - {licence(n)}\n" for n, (v, _) in packages.items()]
    (ROOT / "docs" / "dependencies.rst").write_text(PAGE.format(needed=needed) + "".join(rows))


if __name__ == "__main__":
    main()
