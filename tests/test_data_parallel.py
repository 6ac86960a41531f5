# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Data over processes by DistributedDataParallel, particles over others in a mesh: gradients of all rows and all K."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributed import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from pyro_iwae import DoublyReparameterized, ImportanceWeightedELBO, Pathwise, SampledBackward, StickTheLanding
from pyro_iwae.distributed import Ranks
from tests.noise import SameParticles
from tests.ranks import PAIR

ROWS = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64)


class VAE(PyroModule):
    """Scaled to 12 rows, whatever part of them it is given."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))
        self.decoder = nn.Linear(1, 1)
        self.width = PyroParam(torch.tensor(0.8), dist.constraints.positive)

    @pyro_method
    def model(self, x):
        with pyro.plate("rows", 12, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z.unsqueeze(-1)).squeeze(-1), self.width), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("rows", 12, subsample=x):
            loc, log_scale = self.encoder(x.unsqueeze(-1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def made(options):
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    pyro.settings.set(module_local_params=True)
    vae = VAE()
    return ImportanceWeightedELBO(**options)(vae.model, vae.guide)


def gradients_of(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def averaged(group, options):
    """Gradients under DDP on this process's rows; and those that it has without, averaged by hand."""
    ranks = Ranks(group)
    rows = ROWS.chunk(ranks.size)[ranks.rank]
    found = []
    for wrap in (lambda m: DistributedDataParallel(m, process_group=group), lambda m: m):
        bound = made(options)
        wrapped = wrap(bound)
        for seed in (20, 21, 22):
            pyro.set_rng_seed(seed + 10 * ranks.rank)
            bound.zero_grad()
            wrapped(rows).backward()
        found.append(gradients_of(bound))
    shared, own = found
    return shared, {n: ranks.gather(g).mean(0) for n, g in own.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"num_particles": 5},
        {"num_particles": 1},
        {"num_particles": 6, "chunk_size": 2, "gradient": DoublyReparameterized()},
        {"num_particles": 12, "gradient": SampledBackward(3)},
        pytest.param({"num_particles": 5, "compile": True, "gradient": StickTheLanding()}, marks=pytest.mark.nightly),
        {"num_particles": 1, "plate_particles": {"rows": 4}},
    ],
    ids=str,
)
def test_data_over_processes(processes, options):
    """DDP averages what each process has of its rows, scaled to all: the gradient of all rows."""
    for shared, expected in processes.run(averaged, options, ranks=PAIR):
        assert shared.keys() == expected.keys() and len(shared) == 7
        for name, gradient in shared.items():
            torch.testing.assert_close(gradient, expected[name], msg=name)
            assert gradient.any()


def in_mesh(group, chunk_size):
    """Two parts of the rows by two parts of the particles; and one process with all of both, by hand."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particles"))
    data, particles = (mesh[n].get_local_rank() for n in ("data", "particles"))
    found = []
    for shared in (True, False):
        options = {"num_particles": 7, "chunk_size": chunk_size, "gradient": DoublyReparameterized()}
        group = mesh["particles"] if shared else None
        bound = made({**options, "process_group": group})
        wrapped = DistributedDataParallel(bound, process_group=mesh["data"].get_group()) if shared else bound
        wrapped(ROWS[:6])  # the first look
        pyro.set_rng_seed(100 + 2 * data + particles)
        losses = []
        parts = [ROWS.chunk(2)[data]] if shared else ROWS.chunk(2)
        first, count = (0, 7) if not shared else ((0, 4), (4, 3))[particles]
        bound.zero_grad()
        for rows in parts:
            with SameParticles(count, first):
                loss = wrapped(rows)
                (loss / len(parts)).backward()
                losses.append(loss.item())
        found.append((losses, gradients_of(bound)))
    return *found, data


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_mesh(processes, chunk_size):
    for (losses, shared), (every, expected), data in processes.run(in_mesh, chunk_size):
        assert losses[0] == pytest.approx(every[data], rel=1e-9)
        for name, gradient in shared.items():
            torch.testing.assert_close(gradient, expected[name], msg=name)


def trained_in_mesh(group, sampler_of):
    """Any sampler whose seed is that of the data's part: all of its processes get the same minibatches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particles"))
    data = mesh["data"].get_local_rank()
    bound = made({"num_particles": 6, "process_group": mesh["particles"]})
    wrapped = DistributedDataParallel(bound, process_group=mesh["data"].get_group())
    optimiser = torch.optim.Adam(wrapped.parameters(), lr=0.02)
    dataset = TensorDataset(ROWS)
    if sampler_of == "distributed":
        sampler = DistributedSampler(dataset, 2, data, seed=4)
    else:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(data))
    losses = []
    for epoch in range(30):
        if sampler_of == "distributed":
            sampler.set_epoch(epoch)
        for (rows,) in DataLoader(dataset, batch_size=3, sampler=sampler, drop_last=True):
            optimiser.zero_grad()
            loss = wrapped(rows)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return losses, {n: p.detach().clone() for n, p in bound.named_parameters()}


@pytest.mark.parametrize("sampler_of", ["distributed", "random"])
def test_training_in_a_mesh(processes, sampler_of):
    """Parameters stay alike, bit for bit; losses are alike where rows are, and fall."""
    found = processes.run(trained_in_mesh, sampler_of)
    for _, parameters in found[1:]:
        assert all(torch.equal(p, found[0][1][n]) for n, p in parameters.items())
    assert found[0][0] == found[1][0] != found[2][0] == found[3][0]
    losses = found[0][0]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < sum(losses[:quarter])


def autoguided(group):
    """An autoguide is set up by a first call, and wrapped then."""
    pyro.settings.set(module_local_params=True)
    pyro.set_rng_seed(3)
    ranks = Ranks(group)

    class Regression(PyroModule):
        def forward(self, x):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 12, subsample=x):
                pyro.sample("y", dist.Normal(slope * x, 1.0), obs=2.0 * x)

    model = Regression()
    bound = ImportanceWeightedELBO(1, gradient=Pathwise())(model, AutoNormal(model))
    rows = ROWS.chunk(ranks.size)[ranks.rank]
    bound(rows)
    wrapped = DistributedDataParallel(bound, process_group=group)
    optimiser = torch.optim.Adam(wrapped.parameters(), lr=0.05)
    pyro.set_rng_seed(50 + ranks.rank)
    for _ in range(300):
        optimiser.zero_grad()
        wrapped(rows).backward()
        optimiser.step()
    return {n: p.detach().clone() for n, p in bound.named_parameters()}


def test_rows_below_a_latent_that_they_share(processes):
    """K = 1, each process with rows of its own, scaled: the posterior of all rows."""
    first, second = processes.run(autoguided, ranks=PAIR)
    assert all(torch.equal(p, second[n]) for n, p in first.items())
    (loc,) = (p for n, p in first.items() if "loc" in n)
    precision = 1.0 + float(ROWS.square().sum())
    exact = 2.0 * float(ROWS.square().sum()) / precision
    assert abs(float(loc) - exact) < 0.25  # a tenth of a standard deviation is a twentieth; Adam wanders
