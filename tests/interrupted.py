# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A training run for torchrun, of which one process may be killed on the way; what it ends with is saved.

Not a test by itself: ``torchrun ... tests/interrupted.py FOLDER KILLED_RANK KILLED_AT``.
"""

import datetime
import gc
import os
import signal
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from pyro_iwae import Checkpoint, ImportanceWeightedELBO

STEPS, EVERY = 40, 7
ROWS = torch.linspace(-1.0, 1.5, 20)


def model():
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(ROWS)):
        pyro.sample("y", dist.Normal(slope * ROWS, noise), obs=2.0 * ROWS)


def main(folder, killed_rank, killed_at):
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    pyro.set_rng_seed(5)
    guide, optim = AutoNormal(model), pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99})
    svi = SVI(model, guide, optim, ImportanceWeightedELBO(7, process_group=group))
    checkpoint = Checkpoint(folder / "run.ckpt", model=model, guide=guide, optim=optim, process_group=group)
    start = checkpoint.load()
    for step in range(start, STEPS):
        if first_time and rank == killed_rank and step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        svi.step()
        if (step + 1) % EVERY == 0:
            checkpoint.save(step + 1)
    if rank == 0:
        values = {n: p.detach() for n, p in pyro.get_param_store().items()}
        torch.save({"start": start, "values": values, "next": torch.rand(())}, folder / "end.pt")
    del group, svi, checkpoint
    gc.collect()  # gloo may abort at the end of a process where tensors that it has sent are still alive
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
