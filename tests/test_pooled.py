# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Many draws from the same particles: their law, and what is said of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_iwae import ImportanceResampledGuide
from tests.statistics import assert_mean

METHODS = ["multinomial", "systematic", "psis"]
X = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.2))


@pytest.mark.parametrize("method", METHODS)
def test_each_element_has_its_posterior(method):
    posterior = ImportanceResampledGuide(model, guide, num_particles=3000)
    found = [posterior.sample(20, X, method=method)["z"] for _ in range(300)]
    assert found[0].shape == (20, 3)
    means = torch.stack([z.mean(0) for z in found])
    squares = torch.stack([((z - X / 2) ** 2).mean(0) for z in found])
    # q_EW of 3000 particles is the posterior but for 1 / 3000 of a standard deviation, below what this can see
    assert_mean(means, X / 2)
    assert_mean(squares, torch.full((3,), 0.5))


@pytest.mark.parametrize("method", METHODS)
def test_elements_are_drawn_apart(method):
    posterior = ImportanceResampledGuide(model, guide, num_particles=500)
    products = []
    for _ in range(400):
        z = posterior.sample(10, X, method=method)["z"] - X / 2
        products.append((z[:, 0] * z[:, 1]).mean())
    assert_mean(torch.stack(products), 0.0)


def test_draws_without_replacement_differ():
    posterior = ImportanceResampledGuide(model, guide, num_particles=40)
    draws = posterior.sample(30, X, method="without_replacement")
    assert draws.num_distinct.tolist() == [30, 30, 30]
    assert all(len(draws["z"][:, i].unique()) == 30 for i in range(3))
    with pytest.raises(ValueError, match="at most 40 draws without replacement"):
        posterior.sample(41, X, method="without_replacement")


def test_distinct_draws_are_counted_by_element():
    draws = ImportanceResampledGuide(model, guide, num_particles=10).sample(25, X, method="multinomial")
    assert draws.num_distinct.tolist() == [len(draws["z"][:, i].unique()) for i in range(3)]


def test_a_particle_that_carries_the_draws_is_told():
    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + 6.0, 1.0))

    posterior = ImportanceResampledGuide(model, narrow, num_particles=20)
    with pytest.warns(UserWarning, match=r"one particle of 20 carries the draws of \d of 3 independent elements"):
        draws = posterior.sample(100, X, method="systematic")
    assert int(draws.num_distinct.min()) < 10


@pytest.mark.parametrize("vectorize", [None, pytest.param(False, marks=pytest.mark.nightly)])
def test_enumerated_latents_are_drawn_for_each(vectorize):
    @config_enumerate
    def mixture():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z + 2.0 * c, 1.0), obs=torch.tensor(1.5))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = ImportanceResampledGuide(mixture, guide, num_particles=200, vectorize_particles=vectorize)
    repeats = 150 if vectorize is None else 30
    found = [posterior.sample(20, method="systematic") for _ in range(repeats)]
    assert found[0]["c"].shape == (20,)
    odds = dist.Normal(2.0, math.sqrt(2.0)).log_prob(torch.tensor(1.5)) - dist.Normal(0.0, math.sqrt(2.0)).log_prob(
        torch.tensor(1.5)
    )
    shift = torch.stack([d["c"].mean() for d in found]) - odds.sigmoid()
    assert abs(float(shift.mean())) < 6 * float(shift.std()) / math.sqrt(repeats) + 0.01  # 1 / K of bias


def test_plates_with_particles_of_their_own():
    def tree_model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X.float())

    def tree_guide():
        pyro.sample("mu", dist.Normal(0.3, 0.8))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(X.float() / 2, 1.0))

    posterior = ImportanceResampledGuide(tree_model, tree_guide, num_particles=200, plate_particles={"data": 50})
    found = [posterior.sample(10, method="systematic") for _ in range(300)]
    assert found[0]["z"].shape == (10, 3)
    mean = float(X.sum()) / 5  # of mu given x: precision 1 + 3 / 2
    assert_mean(torch.stack([d["mu"].mean() for d in found]), mean)
    assert_mean(torch.stack([d["z"].mean(0) for d in found]), (mean + X) / 2)


def test_what_does_not_go_together():
    posterior = ImportanceResampledGuide(model, guide, num_particles=40, chunk_size=10)
    with pytest.raises(NotImplementedError, match="chunk_size=10"):
        posterior.sample(3, X, method="psis")
    with pytest.raises(ValueError, match="method to be None or one of"):
        posterior.sample(3, X, method="stratified")
