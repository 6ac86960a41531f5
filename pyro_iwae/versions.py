# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What is said of a torch or Pyro that is too old, before an import somewhere inside fails for it."""

from __future__ import annotations

import re

import pyro
import torch

__all__ = ["OLDEST", "require_version"]

OLDEST = {"torch": "2.6", "pyro-ppl": "1.9"}


def require_version(package: str, version: str) -> None:
    """Raises ImportError where a package is older than the oldest that this one is tested with.

    Args:
        package: its name in the package registry.
        version: that is installed.
    """
    if _numbers(version) < _numbers(OLDEST[package]):
        raise ImportError(
            f"pyro_iwae expected {package} >= {OLDEST[package]}, got {version}; "
            f"write pip install --upgrade '{package}>={OLDEST[package]}'"
        )


def _numbers(version: str) -> list[int]:
    """The release's numbers: 2, 13 of 2.13.0rc1+cpu."""
    return [int(n) for n in re.findall(r"\d+", version)[:2]]


require_version("torch", torch.__version__)
require_version("pyro-ppl", pyro.__version__)
