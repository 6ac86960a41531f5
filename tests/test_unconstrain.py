# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Auxiliary latents of autoguides at given values: what the guide drew is found again from what it made of it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide

from pyro_iwae.unconstrain import auxiliary_values

AUTOGUIDES = [
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
]


def model():
    """Latents of many supports, inside and outside a plate, with and without event dimensions."""
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(4)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("unit", dist.Beta(2.0, 2.0))
        pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))


def drawn_by(guide, count):
    """The guide's (latents of the model, auxiliary latents), with the draws in front."""
    traces = [poutine.trace(guide).get_trace() for _ in range(count)]
    sites = {n: s for n, s in traces[0].nodes.items() if s["type"] == "sample" and n != "data"}
    stacked = {n: torch.stack([t.nodes[n]["value"] for t in traces]).detach() for n in sites}
    auxiliary = {n: stacked.pop(n) for n, s in sites.items() if s["infer"].get("is_auxiliary")}
    return stacked, auxiliary


def assert_finds(guide, values, auxiliary):
    found = auxiliary_values(guide, values)
    assert found.keys() == auxiliary.keys()
    for name, value in auxiliary.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_finds_what_the_guide_drew(kind, double):
    guide = kind(model)
    guide()
    assert_finds(guide, *drawn_by(guide, 5))


def test_goes_through_the_parts_of_a_list(double):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["real", "positive"])))
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, hide=["real", "positive"])))
    guide()
    assert_finds(guide, *drawn_by(guide, 5))


def test_leaves_out_what_it_was_not_given():
    guide = autoguide.AutoNormal(model)
    guide()
    assert auxiliary_values(guide, {"positive": torch.tensor([0.5, 2.0])}).keys() == {"positive_unconstrained"}


def test_other_guides_have_none():
    def guide():
        pyro.sample("real", dist.Normal(0.0, 1.0))

    values = {"real": torch.zeros(2)}
    assert auxiliary_values(guide, values) == {}
    point = autoguide.AutoDelta(poutine.block(model, expose=["real"]))
    point()
    assert auxiliary_values(point, values) == {}
