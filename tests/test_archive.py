# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A file that is not as it was written is refused, whichever byte it is; what does not count is read as it was."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_iwae import archive

TENSORS = {"w": torch.linspace(-1.0, 1.0, 5), "n": torch.arange(3)}
FACTS = {"kind": "Evaluation", "x": [1, 2.5]}


@pytest.fixture
def path(tmp_path):
    archive.write(tmp_path / "file.npz", TENSORS, FACTS)
    return tmp_path / "file.npz"


def read_or_refuse(path, data):
    """Whether it was read; then it is what was written."""
    path.write_bytes(data)
    try:
        tensors, facts = archive.read(path, kind="Evaluation")
    except ValueError as error:
        assert "expected a" in str(error)
        return False
    assert facts == FACTS and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    return True


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_any_byte_altered(path, mask):
    whole = path.read_bytes()
    read = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= mask
        read += read_or_refuse(path, bytes(changed))
    assert read < len(whole) / 3  # dates, names of systems and the like


def test_cut_anywhere(path):
    whole = path.read_bytes()
    assert not any(read_or_refuse(path, whole[:length]) for length in range(0, len(whole), 3))
    assert read_or_refuse(path, whole)


@pytest.mark.parametrize("case", ["facts", "shape", "dtype", "dropped", "added", "no digest"])
def test_a_whole_file_with_other_contents(path, case):
    """Checksums of a zip file know nothing of it."""
    with np.load(path) as whole:
        arrays = dict(whole)
    if case == "facts":
        arrays["facts"] = np.frombuffer(json.dumps({"kind": "Evaluation", "x": [1, 2.25]}).encode(), dtype=np.uint8)
    elif case == "shape":
        arrays["w"] = arrays["w"].reshape(5, 1)
    elif case == "dtype":
        arrays["n"] = arrays["n"].astype(np.int32)
    elif case == "added":
        arrays["m"] = arrays["n"]
    else:
        del arrays["n" if case == "dropped" else archive.DIGEST]
    np.savez(path, **arrays)
    assert not read_or_refuse(path, path.read_bytes())


def test_what_cannot_be_opened_says_so_itself(tmp_path):
    with pytest.raises(FileNotFoundError):
        archive.read(tmp_path / "none.npz", kind="Evaluation")
    with pytest.raises(IsADirectoryError):
        archive.read(tmp_path, kind="Evaluation")


def test_reading_runs_no_code(tmp_path):
    """An array of objects would be a pickle."""

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(tmp_path / "file.npz", facts=np.array([Runs()], dtype=object))
    with pytest.raises(ValueError, match="cut short, altered or something else"):
        archive.read(tmp_path / "file.npz", kind="Evaluation")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_breaks_off_leaves_the_old_file(path, error):
    whole = path.read_bytes()

    def broken(file):
        file.write(b"half of it")
        raise error

    with pytest.raises(type(error)):
        archive.write_whole(path, broken)
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


KILLED = """
import os, sys
from pyro_iwae import archive

def killed(file):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), 9)

archive.write_whole(sys.argv[1], killed)
"""


def test_a_process_killed_while_it_saves_leaves_the_old_file(path):
    whole = path.read_bytes()
    found = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert found.returncode == -signal.SIGKILL
    assert path.read_bytes() == whole
    archive.write(path, TENSORS, FACTS)  # what it has left beside is in nobody's way
    assert read_or_refuse(path, path.read_bytes())
