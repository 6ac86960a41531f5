# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Where RenyiELBO(alpha=0) goes wrong: each case shows that it does, by how much, and that we do not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal

from pyro_iwae import ImportanceWeightedELBO, exact
from tests.statistics import assert_mean, assert_mean_above, assert_mean_below, assert_same_mean

pytestmark = pytest.mark.usefixtures("double", "unchecked")


def renyi(num_particles, **options):
    options = {"vectorize_particles": True, "max_plate_nesting": 1} | options
    return RenyiELBO(alpha=0, num_particles=num_particles, **options)


def bounds(elbo, model, guide, draws=150):
    """Minus the loss, drawn anew."""
    elbo.loss(model, guide)
    return torch.tensor([-elbo.loss(model, guide) for _ in range(draws)])


def conjugate(n=10):
    """A record of n observations and a guide one standard deviation off."""
    return exact.Gaussian(data=torch.linspace(-2.0, 2.0, n) + 0.5, offset=1.0)


def test_subsampled_plate():
    """Its scale belongs outside the logarithm; inside, the "bound" is far above the evidence."""
    n, k = 100, 100
    data = 3.0 * torch.randn(n)
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(data)

    def model():
        with pyro.plate("data", n, subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide():
        with pyro.plate("data", n, subsample_size=10) as index:
            pyro.sample("z", dist.Normal(data[index] / 2.0 + math.sqrt(0.5), math.sqrt(0.5)))

    case = exact.Gaussian(data=data, offset=1.0)
    assert_mean(bounds(ImportanceWeightedELBO(num_particles=k), model, guide), case.bound(k).sum())
    assert case.bound(k).sum() < evidence.sum()
    assert_mean_above(bounds(renyi(k, max_plate_nesting=2), model, guide), evidence.sum() + 20.0)


@pytest.mark.parametrize("family", [AutoMultivariateNormal, AutoIAFNormal])
def test_joint_autoguides(family):
    """log q is counted once; RenyiELBO counts it once for each of the ten elements."""
    case, k = conjugate(), 10
    guide = family(case.model)
    guide()
    ours = bounds(ImportanceWeightedELBO(num_particles=k), case.model, guide)
    evidence, elbo = case.log_evidence.sum(), bounds(ImportanceWeightedELBO(num_particles=1), case.model, guide)
    assert_mean_below(ours, evidence)
    assert_mean_above(ours, elbo.mean())
    theirs = bounds(renyi(k), case.model, guide)
    (assert_mean_below if family is AutoMultivariateNormal else assert_mean_above)(
        theirs, elbo.mean() - 20.0 if family is AutoMultivariateNormal else evidence + 20.0
    )


def test_discrete_latent():
    """Its gradient is a constant 0 with RenyiELBO: the guide never trains."""
    k, prior, x = 8, torch.tensor(0.5), torch.tensor(3.0)
    leaf = torch.tensor(0.0, requires_grad=True)
    (slope,) = torch.autograd.grad(exact.Bernoulli(prior=prior, logit=leaf, data=x).bound(k), leaf)
    assert -slope.item() == pytest.approx(-0.1076, abs=5e-5)
    n = 20_000

    def model():
        with pyro.plate("copies", n):
            exact.Bernoulli(prior=prior, data=x).model()

    def guide():
        with pyro.plate("copies", n):
            exact.Bernoulli(logit=pyro.param("logit", torch.zeros(n))).guide()

    for elbo, expected in ((ImportanceWeightedELBO(num_particles=k), -slope), (renyi(k), 0.0)):
        pyro.clear_param_store()
        elbo.loss_and_grads(model, guide)
        gradient = pyro.param("logit").grad
        assert_mean(gradient, expected)
        if isinstance(elbo, RenyiELBO):
            assert bool((gradient == 0.0).all())


def test_deterministic_outside_the_plate():
    """It costs no plate its independence; with RenyiELBO everything gets one weight."""
    case, k = conjugate(), 5

    def model():
        with pyro.plate("data", 10):
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=case.data)
        pyro.deterministic("mean", z.mean(-1))

    elbo = ImportanceWeightedELBO(num_particles=k)
    assert elbo.log_weights(model, case.guide).plates == ("data",)
    assert_mean(bounds(elbo, model, case.guide), case.bound(k).sum())
    assert_mean_below(bounds(renyi(k), model, case.guide, 400), case.bound(k).sum() - 0.5)


def test_latents_and_data_in_plates_of_two_names():
    """Of one dimension and size, with elements that belong together."""
    case, k = conjugate(), 5

    def model():
        with pyro.plate("za", 10):
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0))
        with pyro.plate("xa", 10):
            pyro.sample("x", dist.Normal(z, 1.0), obs=case.data)

    def guide():
        with pyro.plate("za", 10):
            pyro.sample("z", dist.Normal(case.data / 2.0 + math.sqrt(0.5), math.sqrt(0.5)))

    elbo = ImportanceWeightedELBO(num_particles=k)
    assert elbo.log_weights(model, guide).plates == ("za",)
    assert_mean(bounds(elbo, model, guide), case.bound(k).sum())
    assert_mean_below(bounds(renyi(k), model, guide, 400), case.bound(k).sum() - 0.5)


@pytest.mark.parametrize("vectorize", [True, False])
def test_one_minibatch_for_all_particles(vectorize):
    """RenyiELBO, run particle by particle, weighs particles of different data against each other."""
    minibatches = []

    def model():
        with pyro.plate("data", 50, subsample_size=5) as index:
            minibatches.append(tuple(index.tolist()))
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(5))

    def guide():
        with pyro.plate("data", 50, subsample_size=5) as index:
            minibatches.append(tuple(index.tolist()))
            pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))

    elbo = ImportanceWeightedELBO(num_particles=6, vectorize_particles=vectorize)
    elbo.loss(model, guide)
    minibatches.clear()
    elbo.loss(model, guide)
    assert len(minibatches) == (2 if vectorize else 12) and len(set(minibatches)) == 1
    first = minibatches[0]
    elbo.loss(model, guide)
    assert minibatches[-1] != first, "a fresh one at each step"
    minibatches.clear()
    renyi(6, vectorize_particles=False).loss(model, guide)
    assert len(set(minibatches)) == 6


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_all_weights_of_an_element_impossible():
    """The bound is -inf with zero gradient, and a warning; RenyiELBO spoils every gradient with NaN."""

    def model():
        loc = pyro.param("theta", torch.zeros(3))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.factor("gate", torch.where(torch.tensor([True, False, False]), -math.inf, z * 0.0))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.ones(3)), 1.0))

    gradients = {}
    for elbo in (ImportanceWeightedELBO(num_particles=4), renyi(4)):
        pyro.clear_param_store()
        if isinstance(elbo, RenyiELBO):
            elbo.loss_and_grads(model, guide)
        else:
            with pytest.warns(UserWarning, match="'gate'"):
                assert elbo.loss_and_grads(model, guide) == math.inf
        gradients[type(elbo)] = pyro.param("theta").grad, pyro.param("loc").grad
    for gradient in gradients[ImportanceWeightedELBO]:
        assert gradient[0] == 0.0 and bool(gradient.isfinite().all()) and bool((gradient[1:] != 0.0).all())
    assert all(bool(gradient.isnan().any()) for gradient in gradients[RenyiELBO])


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.filterwarnings("ignore:Trace_ELBO found sample sites configured for enumeration")
def test_enumerated_model_site():
    """Summed out inside the weight; RenyiELBO draws it from the prior and leaves the prior in the weight."""
    x, weights = torch.tensor(1.0), torch.tensor([0.3, 0.7])
    loc, width = torch.tensor([-1.0, 1.0]), 0.7
    n, k = 4000, 5

    def model():
        with pyro.plate("copies", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(n), width))
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + loc[c], 1.0), obs=x.expand(n))

    def guide():
        with pyro.plate("copies", n):
            pyro.sample("z", dist.Normal(torch.zeros(n), width))

    z = width * torch.randn(k, 20_000)
    log_w = torch.logaddexp(*[weights[c].log() + dist.Normal(z + loc[c], 1.0).log_prob(x) for c in (0, 1)])
    truth = log_w.logsumexp(0) - math.log(k)
    ours = ImportanceWeightedELBO(num_particles=k).bound(model, guide)
    assert_same_mean(ours, truth)
    theirs = renyi(k).loss(model, guide)
    assert -theirs / n < ours.mean() - 0.2, "the prior's log density, about -0.6, is not cancelled"


def test_elbo_module():
    """``elbo(model, guide)(data)`` works; RenyiELBO has no differentiable_loss."""
    case = exact.Gaussian(data=torch.zeros(3), offset=torch.tensor(1.0, requires_grad=True))
    loss = ImportanceWeightedELBO(num_particles=4)(case.model, case.guide)()
    loss.backward()
    assert case.offset.grad != 0.0
    with pytest.raises(AttributeError, match="differentiable_loss"):
        renyi(4)(case.model, case.guide)()


def test_one_object_for_a_deeper_model():
    """The guessed nesting is the pair's; RenyiELBO keeps the first guess, and plates collide."""

    def deep(observed=True):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2, 3))

    def deep_guide():
        deep(observed=False)

    shallow = conjugate()
    ours = ImportanceWeightedELBO(num_particles=4)
    theirs = renyi(4, max_plate_nesting=math.inf)
    for elbo in (ours, theirs):
        elbo.loss(shallow.model, shallow.guide)
    assert ours.bound(deep, deep_guide).shape == (2, 3)
    assert ours.bound(shallow.model, shallow.guide).shape == (10,)
    with pytest.raises(ValueError, match="collide"):
        theirs.loss(deep, deep_guide)
