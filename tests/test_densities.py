# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A density worked out before particles are laid in front is the one worked out after."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_iwae import ImportanceWeightedELBO
from pyro_iwae.densities import BROADCASTING, log_prob_of, score_parts_of
from pyro_iwae.handlers import ParticlePlate

ROWS, PARTICLES = 3, 5
ROW = torch.arange(1.0, 1.0 + ROWS)
CASES = [
    lambda: dist.Beta(ROW, 2.0),
    lambda: dist.Cauchy(ROW, 2.0),
    lambda: dist.Dirichlet(torch.ones(ROWS, 2) + ROW.unsqueeze(1)),
    lambda: dist.Exponential(ROW),
    lambda: dist.Gamma(ROW, 2.0),
    lambda: dist.Laplace(ROW, 2.0),
    lambda: dist.MultivariateNormal(torch.zeros(ROWS, 2), torch.eye(2) * ROW.reshape(-1, 1, 1)),
    lambda: dist.Normal(ROW, 2.0),
    lambda: dist.StudentT(ROW, 0.0, 2.0),
    lambda: dist.Normal(ROW.unsqueeze(1), torch.arange(1.0, 3.0)).to_event(1),
]


def traced(fn, value=None):
    """The site of a distribution, with particles in front; drawn, or at a value."""

    def program():
        with pyro.plate("rows", ROWS):
            pyro.sample("z", fn, obs=value)

    trace = poutine.trace(ParticlePlate("particles", PARTICLES, dim=-2)(program)).get_trace()
    return trace.nodes["z"]


def test_every_distribution_is_tried():
    tried = {type(make()) for make in CASES} - {dist.Independent}
    assert tried == set(BROADCASTING)


@pytest.mark.parametrize("make", CASES, ids=lambda make: type(make()).__name__)
def test_densities_are_those_of_the_expanded_distribution(make):
    site = traced(make())
    expected = site["fn"].log_prob(site["value"])
    assert expected.shape == (PARTICLES, ROWS)
    torch.testing.assert_close(log_prob_of(site), expected)
    parts = score_parts_of(dict(traced(make(), site["value"])))
    wanted = site["fn"].score_parts(site["value"])
    torch.testing.assert_close(parts.log_prob, wanted.log_prob)
    for found, right in zip(parts[1:], wanted[1:], strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(right))


@pytest.mark.parametrize("make", CASES, ids=lambda make: type(make()).__name__)
def test_what_is_alike_for_all_particles_still_has_their_dimension(make):
    """Data, whose density no particle changes."""
    fn = make()
    site = traced(fn, fn.sample())
    assert log_prob_of(site).shape == (PARTICLES, ROWS)
    assert log_prob_of(site).stride(0) == 0  # and is not written down for each


class Widening(dist.Normal):
    """A density that needs to know of the particles: it is the wrong one before they are laid in front."""

    def log_prob(self, value):
        return super().log_prob(value) + len(self.batch_shape)


def test_what_is_not_known_to_broadcast_is_left_alone():
    site = traced(Widening(ROW, 2.0))
    assert type(site["fn"]) is Widening
    torch.testing.assert_close(log_prob_of(site), dist.Normal(ROW, 2.0).log_prob(site["value"]) + 2.0)


def test_parameters_are_worked_on_once(monkeypatch):
    """The logarithm of a scale, and of a gamma function, of as many numbers as there are rows."""
    seen = []
    lgamma = torch.lgamma
    monkeypatch.setattr(torch, "lgamma", lambda x: seen.append(x.numel()) or lgamma(x))

    def model():
        with pyro.plate("rows", ROWS):
            pyro.sample("z", dist.Gamma(ROW, 1.0))

    def guide():
        with pyro.plate("rows", ROWS):
            pyro.sample("z", dist.Gamma(ROW + 1.0, 1.0))

    elbo = ImportanceWeightedELBO(num_particles=50)
    elbo.loss(model, guide)
    seen.clear()
    elbo.loss(model, guide)
    assert seen == [ROWS, ROWS]
