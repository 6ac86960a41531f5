# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A run of which one process is killed goes on under torchrun, and ends as one that was never interrupted."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.interrupted import EVERY, STEPS

ROOT = Path(__file__).parents[1]


def ended(folder, killed_rank=-1, killed_at=-1):
    """What a run of two processes ends with."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Or processes that are started again may meet the addresses of those that are gone (docs/distributed).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    script = [str(ROOT / "tests/interrupted.py"), str(folder), str(killed_rank), str(killed_at)]
    done = subprocess.run(
        [sys.executable, *torchrun, *script], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return ended(tmp_path_factory.mktemp("runs") / "unbroken")


@pytest.mark.nightly
@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_run_goes_on(unbroken, tmp_path, attempt):
    """Killed at a random step, in a random process; parameters and random numbers are the same, bit for bit."""
    chance = random.Random(torch.initial_seed() + attempt)
    killed_rank, killed_at = chance.randrange(2), chance.randrange(1, STEPS)
    found = ended(tmp_path / "broken", killed_rank, killed_at)
    where = f"rank {killed_rank} killed at step {killed_at}"
    assert found["start"] == killed_at // EVERY * EVERY, where
    assert unbroken["start"] == 0
    assert found["values"].keys() == unbroken["values"].keys() and len(found["values"]) == 3
    for name, value in unbroken["values"].items():
        assert torch.equal(found["values"][name], value), (name, where)
    assert torch.equal(found["next"], unbroken["next"]), where
