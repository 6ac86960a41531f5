# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Masks: those of enumerated sites, and those that handlers put around a resampled guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_value

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO
from tests.statistics import assert_mean, assert_mean_above, assert_same_mean

pytestmark = pytest.mark.usefixtures("double")

TRANSITION = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
LENGTHS = torch.tensor([3, 1])


def hmm(lengths):
    """Sequences of unequal lengths, as in Pyro's own example: what lies behind the end is masked."""
    pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("sequences", 2):
        x = 0
        for t in pyro.markov(range(3)):
            with poutine.mask(mask=t < lengths):
                x = pyro.sample(f"x_{t}", dist.Categorical(TRANSITION[x]), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Normal(x.to(TRANSITION), 1.0), obs=torch.tensor([0.5, 1.0]))


def prior(lengths):
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("vectorize", [True, False])
def test_masked_enumerated_sites_sum_to_one(vectorize):
    """Every weight is the evidence here, for any number of particles, and that is what TraceEnum_ELBO says."""
    exact = TraceEnum_ELBO(max_plate_nesting=1).loss(hmm, prior, LENGTHS)
    for num_particles in (1, 2, 5):
        elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
        assert elbo.loss(hmm, prior, LENGTHS) == pytest.approx(exact)


def mixture():
    """A masked coin above an observation that is not masked: its prior still counts."""
    probs = pyro.param("probs", torch.tensor([0.1, 0.9]))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=torch.tensor(False)):
        c = pyro.sample("c", dist.Categorical(probs), infer={"enumerate": "parallel"})
    pyro.sample("x", dist.Normal(z + 3.0 * c, 1.0), obs=torch.tensor(3.0))


def standard_normal():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def joint():
    """log p(x, c), z integrated out."""
    c = torch.arange(2.0)
    return torch.tensor([0.1, 0.9]).log() + dist.Normal(3.0 * c, 2.0**0.5).log_prob(torch.tensor(3.0))


def test_a_masked_coin_above_an_observation():
    weights = ImportanceWeightedELBO(num_particles=50_000).log_weights(mixture, standard_normal).log_weights
    assert_mean(weights.exp(), joint().logsumexp(0).exp())


def test_draws_of_a_masked_coin():
    """q_EW of one particle: c given x and a z from the guide."""
    posterior = ImportanceResampledGuide(mixture, standard_normal, 1)
    draws = posterior.sample(20_000)
    likelihood = dist.Normal(draws["z"].unsqueeze(-1) + torch.tensor([0.0, 3.0]), 1.0).log_prob(torch.tensor(3.0))
    share = (likelihood + torch.tensor([0.1, 0.9]).log()).softmax(-1)[:, 1]
    assert_mean(draws["c"].double() - share, 0.0)
    few = {name: value[:20] for name, value in draws.items()}
    log_q = dist.Normal(0.0, 1.0).log_prob(few["z"])
    log_c = torch.where(few["c"] == 1, share[:20], 1.0 - share[:20]).log()
    assert torch.allclose(posterior.log_density(few, num_batches=1), log_q + log_c)


def test_trace_elbo_of_draws_of_a_masked_coin_is_the_bound():
    posterior, elbo = ImportanceResampledGuide(mixture, standard_normal, 4), ImportanceWeightedELBO(4)
    losses = []
    for loss in (elbo.loss, lambda model, guide: Trace_ELBO().loss(model, posterior)):
        loss(mixture, standard_normal)  # looks at the model
        pyro.set_rng_seed(5)
        losses.append(loss(mixture, standard_normal))
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)


def test_a_masked_coin_that_is_replaced_has_the_density_of_one_that_is_drawn():
    """The mask leaves its prior out of the model outside, and so out of the factor, on both ways."""
    posterior = ImportanceResampledGuide(mixture, standard_normal, 1)
    trace = poutine.trace(posterior).get_trace()
    values = {"z": trace.nodes["z"]["value"] + 1e-9, "c": trace.nodes["c"]["value"]}
    again = poutine.trace(poutine.condition(posterior, data=values)).get_trace()
    drawn, replaced = (t.nodes["_importance_density_z"]["fn"].log_factor for t in (trace, again))
    assert torch.allclose(drawn, replaced, atol=1e-6)


# Handlers outside


def gamma():
    pyro.sample("z", dist.Gamma(4.0, 1.0))


AUTOGUIDES = [
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoStructured,
    autoguide.AutoGaussian,
]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("kind", AUTOGUIDES, ids=lambda kind: kind.__name__)
def test_predictive_with_autoguides_of_constrained_latents(kind, parallel):
    """Predictive masks what its guide does; an autoguide that hears of it leaves out the Jacobian in its weights."""
    guide = kind(gamma, init_loc_fn=init_to_value(values={"z": torch.tensor(3.0)}), init_scale=0.8)
    posterior = ImportanceResampledGuide(gamma, guide, 300)  # near enough to the posterior for so many draws
    draws = Predictive(gamma, guide=posterior, num_samples=1000 if parallel else 400, parallel=parallel)()["z"]
    assert_mean(draws.flatten(), 4.0)


@pytest.mark.parametrize("parallel", [True, False])
def test_models_that_ask_for_the_mask(parallel):
    """Pyro's idiom for costly terms that nobody will read."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if poutine.get_mask() is not False:
            pyro.factor("tilt", 2.0 * z)

    posterior = ImportanceResampledGuide(model, standard_normal, 50)
    draws = Predictive(model, guide=posterior, num_samples=2000 if parallel else 500, parallel=parallel)()["z"]
    assert_same_mean(draws.flatten(), posterior.sample(4000)["z"])
    assert_mean_above(draws.flatten(), 1.0)
