# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The report says what the ELBO will do, in the ELBO's own words, and changes nothing."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam

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
    assert plate.own_particles and "plate_particles={'data': 10}" in plate.advice


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


def test_one_warning_for_all_sites_of_a_scale():
    def model():
        for t in range(4):
            with poutine.scale(scale=0.1):
                pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def guide():
        for t in range(4):
            pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))

    (warning,) = preflight(model, guide).warnings
    assert "poutine.scale of 0.1 at" in warning and all(f"'z_{t}'" in warning for t in range(4))


def test_data_that_have_no_density():
    """What the ELBO raises, preflight says."""
    data = DATA.where(DATA > 0, torch.nan)
    report = preflight(local_model, local_guide, data)
    with pytest.raises(ValueError, match="NaN at model site 'x'|no log density at site 'x'") as error:
        ImportanceWeightedELBO(num_particles=10).loss(local_model, local_guide, data)
    assert report.problems == (str(error.value),) and not report.ok


def test_a_density_of_plus_infinity():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(torch.inf))

    report = preflight(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    assert len(report.problems) == 1 and "+inf at model site 'f'" in report.problems[0]


def test_what_the_elbo_warns_of():
    def model():
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("f", torch.tensor(-torch.inf))

    def guide():
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    enumeration, impossible = preflight(model, guide).warnings
    assert "['z'] ask for enumeration" in enumeration
    assert "all 10 particles are impossible" in impossible and "'f'" in impossible


def test_sites_that_handlers_leave_behind_are_deterministic():
    def model():
        pyro.sample("z", dist.Normal(1.0, 2.0))

    centred = poutine.reparam(model, config={"z": LocScaleReparam(0.0)})
    roles = {s.name: s.role for s in preflight(centred, lambda: pyro.sample("z_decentered", dist.Normal(0.0, 1.0)))}
    assert roles == {"z_decentered": "latent", "z": "deterministic"}


def test_advice_for_an_autoguide_that_factorises_already():
    """Its latent outside the plate is the model's own."""
    (plate,) = preflight(global_model, AutoNormal(global_model), DATA).plates
    assert plate.prevented_by == "mu" and "AutoNormal" not in plate.advice


def test_models_that_take_gradients():
    def guide():
        loc = pyro.param("loc", torch.tensor(1.0))
        (slope,) = torch.autograd.grad(loc**2, loc)
        pyro.sample("z", dist.Normal(slope, 1.0))

    assert preflight(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), guide).ok


def test_leaves_random_numbers_as_they_were():
    before = torch.get_rng_state()
    preflight(local_model, local_guide, DATA, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_refuses_what_cannot_be_called():
    with pytest.raises(TypeError, match="guide"):
        preflight(local_model, None, DATA)


def test_crossed_plates_and_what_is_weighed_jointly():
    def rows_and_columns(observed):
        users, items = pyro.plate("users", 2, dim=-2), pyro.plate("items", 4, dim=-1)
        with users:
            u = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0))
        with items:
            v = pyro.sample("v", dist.Normal(torch.tensor(0.0), 1.0))
        if observed:
            with users, items:
                pyro.sample("x", dist.Normal(u + v, 1.0), obs=torch.ones(2, 4))

    def model():
        rows_and_columns(observed=True)

    def guide():
        rows_and_columns(observed=False)

    before = torch.get_rng_state()
    report = preflight(model, guide)
    assert (torch.get_rng_state() == before).all()
    users, items = report.plates
    assert items.own_particles and "plate_particles={'items': 10}" in items.advice
    assert not users.own_particles
    assert "latents ['u'] of plate 'users' are weighed jointly" in users.advice and "site 'x'" in users.advice
    assert users.advice in str(report)


@pytest.mark.parametrize("relaxed", [True, False])
def test_a_density_for_a_discrete_latent_is_told(relaxed):
    """The values of a straight-through draw lie in the support, so that nothing else would say it."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(2.0))

    def guide():
        fn = dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor(0.5))
        pyro.sample("z", fn if relaxed else dist.Bernoulli(0.5))

    found = [w for w in preflight(model, guide).warnings if "'z' is discrete in the model (Bernoulli)" in w]
    assert len(found) == relaxed
    if relaxed:
        with pytest.warns(UserWarning, match="RelaxedBernoulliStraightThrough.*bounds nothing.*score-function"):
            ImportanceWeightedELBO(num_particles=4).loss(model, guide)
