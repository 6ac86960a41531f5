# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Particles over processes on GPUs: gloo between two processes on one GPU, NCCL where there are two."""

import datetime
import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro.infer import SVI
from torch import multiprocessing

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, evaluate
from pyro_iwae.distributed import Ranks

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="no GPU")


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    slope = pyro.param("slope", x.new_tensor(-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.9))


def worker(rank, backend, folder):
    torch.cuda.set_device(rank % GPUS)
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    group = torch.distributed.group.WORLD
    pyro.set_rng_seed(rank)
    x = torch.linspace(-1.0, 2.0, 5, device="cuda")
    found = {}
    for name, options in (("whole", {}), ("chunks", {"chunk_size": 3})):
        pyro.clear_param_store()
        elbo = ImportanceWeightedELBO(9, process_group=group, **options)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        losses = [svi.step(x) for _ in range(200)]
        found[name] = [losses, pyro.param("slope").item()]
    posterior = ImportanceResampledGuide(model, guide, 9, process_group=group)
    found["draws"] = posterior.sample(5, x)["z"].tolist()
    result = evaluate(model, guide, x, num_particles=100, num_replicates=8, process_group=group, progress=False)
    found["evidence"] = [result.total.log_evidence, result.total.std_error]
    assert Ranks(group).device.type == ("cuda" if backend == "nccl" else "cpu")
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "backend",
    ["gloo", pytest.param("nccl", marks=pytest.mark.skipif(GPUS < 2, reason="NCCL needs a GPU for each process"))],
)
def test_on_gpus(backend, tmp_path):
    """The same in both processes; the slope goes to the posterior's, a half; the evidence is the exact one."""
    multiprocessing.spawn(worker, (backend, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert abs(first["whole"][1] - 0.5) < 0.35 and abs(first["chunks"][1] - 0.5) < 0.35
    exact = float(torch.distributions.Normal(0.0, 2.0**0.5).log_prob(torch.linspace(-1.0, 2.0, 5)).sum())
    estimate, error = first["evidence"]
    assert abs(estimate - exact) < 12.0 * error + 1e-4  # Student's t with 7 degrees of freedom, one in 10^5
