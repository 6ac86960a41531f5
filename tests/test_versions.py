# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A torch or Pyro that is too old is told at import."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_iwae.versions import OLDEST, require_version


def test_the_oldest_are_those_of_the_metadata():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    wanted = config["options"]["install_requires"].split()
    assert {f"{package}>={version}" for package, version in OLDEST.items()} <= set(wanted)


@pytest.mark.parametrize("version", ["2.6", "2.6.1", "2.13.0+cpu", "3.0.0", "2.14.0a0+git12", "2.10.0rc1"])
def test_what_is_new_enough(version):
    require_version("torch", version)


@pytest.mark.parametrize("version", ["2.5.1", "1.13.1", "0.4", "2.5.0+cu121"])
def test_what_is_too_old(version):
    with pytest.raises(ImportError, match=r"expected torch >= 2.6, got .*pip install --upgrade 'torch>=2.6'"):
        require_version("torch", version)


@pytest.mark.parametrize("module", ["torch", "pyro"])
def test_it_is_told_before_anything_else_fails(module):
    """Also where what an old version lacks is imported by name."""
    code = f"""
import {module}, torch.fx.experimental.proxy_tensor as tensors
{module}.__version__ = "1.0"
del tensors.make_fx
import pyro_iwae
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "ImportError: pyro_iwae expected" in found.stderr.splitlines()[-1]
