# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The report says what the ELBO will do, in the ELBO's own words, and changes nothing."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_iwae import ImportanceWeightedELBO, preflight

DATA = torch.tensor([0.3, -1.2, 0.8, 2.0])


def local_model(x, subsample_size=None):
    with pyro.plate("data", len(x), subsample_size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def local_guide(x, subsample_size=None):
    with pyro.plate("data", len(x), subsample_size):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def global_model(x, subsample_size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def global_guide(x, subsample_size=None):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    local_guide(x, subsample_size)


def test_independent_plate_and_sites():
    report = preflight(local_model, local_guide, DATA)
    assert report.ok and not report.warnings
    (plate,) = report.plates
    assert (plate.name, plate.size, plate.independent, plate.prevented_by) == ("data", 4, True, None)
    z, x = report
    assert (z.name, z.where, z.role, z.plates, z.reparameterized) == ("z", "both", "latent", ("data",), True)
    assert (x.name, x.where, x.role, x.reparameterized) == ("x", "model", "observed", None)
    assert "independent" in str(report) and "nothing will raise" in str(report)


def test_roles_of_sites():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.deterministic("twice", 2 * z)
        pyro.factor("f", -z)

    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Bernoulli(torch.sigmoid(u)))

    sites = {s.name: s for s in preflight(model, guide)}
    assert sites["z"].reparameterized is False
    assert sites["c"].enumerated and sites["c"].where == "model"
    assert sites["twice"].role == "deterministic" and sites["f"].role == "factor"
    assert sites["u"].auxiliary and sites["u"].where == "guide" and sites["u"].reparameterized


def test_names_the_latent_outside():
    report = preflight(global_model, global_guide, DATA)
    assert report.ok
    (plate,) = report.plates
    assert not plate.independent and plate.prevented_by == "mu" and "more particles" in plate.advice


def test_names_the_joint_latent_of_an_autoguide():
    (plate,) = preflight(local_model, AutoMultivariateNormal(local_model), DATA).plates
    assert not plate.independent and "latent" in plate.prevented_by and "AutoNormal" in plate.advice


def test_names_the_site_that_mixes():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    (plate,) = preflight(model, local_guide, DATA).plates
    assert not plate.independent and plate.prevented_by == "x" and "mixes" in plate.advice


@pytest.mark.parametrize(
    "model, guide, args",
    [
        (global_model, global_guide, (DATA, 2)),  # subsampled below a latent
        (local_model, global_guide, (DATA,)),  # a latent that the model lacks
        (global_model, local_guide, (DATA,)),  # a latent that the guide lacks
    ],
)
def test_problems_are_the_errors(model, guide, args):
    report = preflight(model, guide, *args)
    assert not report.ok and "will raise" in str(report)
    with pytest.raises(ValueError) as raised:
        ImportanceWeightedELBO(num_particles=4).loss(model, guide, *args)
    assert str(raised.value) in report.problems


def test_subsampled_independent_plate_is_fine():
    report = preflight(local_model, local_guide, DATA, 2)
    assert report.ok and report.plates[0].independent and report.plates[0].full_size == 4


def test_warns_of_a_scale_on_the_data_alone():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=10.0):
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + torch.zeros(4), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    (warning,) = preflight(model, guide, DATA).warnings
    assert "'x'" in warning and "overshoots" in warning
    assert not preflight(poutine.scale(local_model, 0.5), poutine.scale(local_guide, 0.5), DATA).warnings


def test_warns_of_latents_that_are_tempered_alone():
    def model(x):
        with poutine.scale(scale=0.1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[0])

    (warning,) = preflight(model, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), DATA).warnings
    assert "model site 'z'" in warning and "no evidence" in warning


def test_leaves_random_numbers_as_they_were():
    before = torch.get_rng_state()
    preflight(local_model, local_guide, DATA, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_refuses_what_cannot_be_called():
    with pytest.raises(TypeError, match="guide"):
        preflight(local_model, None, DATA)
