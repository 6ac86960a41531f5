# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Chunks of particles: values and gradients are those of all K at once, on the same particles."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import autoguide as auto
from torch import nn

from pyro_iwae import (
    OVIS,
    VIMCO,
    DoublyReparameterized,
    ImportanceWeightedELBO,
    Pathwise,
    SampledBackward,
    StickTheLanding,
    gradient_snr,
)
from pyro_iwae.objectives import CIWAE, MIWAE, PIWAE, TVO, Renyi
from tests.noise import SameParticles
from tests.programs import programs

pytestmark = pytest.mark.usefixtures("double")

K = 12
GRADIENTS = [Pathwise(), StickTheLanding(), DoublyReparameterized()]
OBJECTIVES = [None, Renyi(0.5), Renyi(1.0), MIWAE(4), PIWAE(4), CIWAE(0.3), TVO((0.0, 0.4))]


def data(size=3):
    return torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7])[:size]


# Models and guides


def net(name, inputs, outputs):
    """A small network with fixed weights, registered with Pyro."""
    if name not in NETS:
        NETS[name] = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))
    return pyro.module(name, NETS[name])


NETS = {}


@pytest.fixture(autouse=True)
def fresh_networks():
    NETS.clear()


def flat_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net("decoder", 2, 1)(z).squeeze(-1), 1.0), obs=data())


def flat_guide():
    loc, log_scale = net("encoder", 1, 4)(data().unsqueeze(-1)).chunk(2, -1)
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def chain_model():
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, pyro.param("width", torch.tensor(0.7))))
        pyro.sample("x", dist.Normal(b, 1.0), obs=data())


def chain_guide():
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.3)), 0.8))
        pyro.sample("b", dist.Normal(a * pyro.param("slope", torch.tensor(0.4)), pyro.param("s", torch.tensor(0.9))))


def coins_model():
    with pyro.plate("data", 3):
        c = pyro.sample("c", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z * pyro.param("gain", torch.tensor(1.2)), 1.0), obs=data())


def coins_guide():
    logits = net("encoder", 1, 1)(data().unsqueeze(-1)).squeeze(-1)
    with pyro.plate("data", 3):
        pyro.sample("c", dist.Bernoulli(logits=logits))
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.9))


def chained_coins_guide():
    with pyro.plate("data", 3):
        c = pyro.sample("c", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.4))))
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)) + c, 0.9))


def global_model():
    """No independent plate, and terms that no latent reaches."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("apart", dist.Normal(pyro.param("apart_loc", torch.tensor(0.1)), 1.0), obs=torch.tensor(0.4))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), 1.0), obs=data())


def global_guide():
    fn = dist.MultivariateNormal(pyro.param("loc", torch.ones(2)), scale_tril=pyro.param("tril", torch.eye(2)))
    pyro.sample("w", fn)


def constant_model():
    """Terms without latents inside the independent plate's sum."""
    chain_model()
    with pyro.plate("other", 2):
        pyro.sample("y", dist.Normal(pyro.param("y_loc", torch.tensor(0.5)), 1.0), obs=data(2))


def enumerated_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        c = pyro.sample("c", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z.sum(-1) + c * pyro.param("jump", torch.tensor(1.5)), 1.0), obs=data())


def masked_model():
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net("decoder", 2, 1)(z).squeeze(-1), 1.0), obs=data())


def masked_guide():
    loc, log_scale = net("encoder", 1, 4)(data().unsqueeze(-1)).chunk(2, -1)
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def annealed(fn):
    return poutine.scale(fn, scale=0.7)


def minibatch_model():
    with pyro.plate("data", 5, subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net("decoder", 2, 1)(z).squeeze(-1), 1.0), obs=data(5)[rows])


def minibatch_guide():
    with pyro.plate("data", 5, subsample_size=3) as rows:
        loc, log_scale = net("encoder", 1, 4)(data(5)[rows].unsqueeze(-1)).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def impossible_model():
    """Some particles have weight 0, in one element all of them but a few."""
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net("decoder", 2, 1)(z).squeeze(-1), 1.0), obs=data())
        pyro.factor("fence", torch.where(z[..., 0] > torch.tensor([-0.5, 0.0, 0.4]), 0.0, -math.inf))


def unbroadcast_model():
    """Particles run one after the other."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.reshape(2).sum(), 1.0), obs=torch.tensor(0.5))


def unbroadcast_guide():
    loc = pyro.param("loc", torch.tensor([0.3, -0.2]))
    z = pyro.sample("z", dist.Normal(loc, 0.9).to_event(1))
    assert z.shape == (2,)


def flow_guide():
    transform = dist.transforms.AffineTransform(pyro.param("shift", torch.tensor(0.3)), 0.9)
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [transform]))
        pyro.sample("b", dist.Normal(a, pyro.param("s", torch.tensor(0.9))))


PAIRS = {
    "network": (flat_model, flat_guide),
    "chain": (chain_model, chain_guide),
    "one weight for all": (global_model, global_guide),
    "constants": (constant_model, chain_guide),
    "enumerated": (enumerated_model, flat_guide),
    "masked": (masked_model, masked_guide),
    "annealed": (annealed(flat_model), annealed(flat_guide)),
    "minibatch": (minibatch_model, minibatch_guide),
    "impossible particles": (impossible_model, flat_guide),
    "sequential": (unbroadcast_model, unbroadcast_guide),
    "transformed": (chain_model, flow_guide),
    "coins": (coins_model, coins_guide),
    "coins above": (coins_model, chained_coins_guide),
}


# What is compared


def outcome(elbo, model, guide, num_particles=K, method="loss_and_grads"):
    """Loss and gradients on particles that go by their numbers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "particles are run one after the other")
        elbo.loss(model, guide)  # the look at model and guide, and their parameters
        for p in parameters():
            p.grad = None
        pyro.set_rng_seed(3)  # minibatches
        with SameParticles(num_particles):
            loss = getattr(elbo, method)(model, guide)
            if method == "differentiable_loss":
                loss.backward()
    return torch.as_tensor(loss).item(), {n: p.grad for n, p in named_parameters().items()}


def named_parameters():
    store = pyro.get_param_store()
    return {n: store[n].unconstrained() for n in store}


def parameters():
    return named_parameters().values()


def assert_same(found, expected, tolerance=1e-9):
    loss, gradients = found
    assert loss == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            torch.testing.assert_close(gradients[name], gradient, rtol=tolerance, atol=tolerance, msg=name)
    assert any(g is not None and g.any() for g in gradients.values())


def assert_chunks_are_the_whole(model, guide, *, chunk_sizes=(5, 1), num_particles=K, **options):
    whole = outcome(ImportanceWeightedELBO(num_particles, **options), model, guide, num_particles)
    for size in chunk_sizes:
        elbo = ImportanceWeightedELBO(num_particles, chunk_size=size, **options)
        assert_same(outcome(elbo, model, guide, num_particles), whole)
        assert_same(outcome(elbo, model, guide, num_particles, "differentiable_loss"), whole)


# Laws: every estimator and objective on every pair


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_gradient(pair, gradient):
    model, guide = PAIRS[pair]
    assert_chunks_are_the_whole(model, guide, gradient=gradient)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("pair", ["network", "chain", "coins"])
def test_every_objective(pair, gradient, objective):
    model, guide = PAIRS[pair]
    assert_chunks_are_the_whole(model, guide, chunk_sizes=(5,), gradient=gradient, objective=objective)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("score", [OVIS(), VIMCO()], ids=repr)
@pytest.mark.parametrize("pair", ["coins", "coins above"])
def test_every_score_estimator(pair, score, objective):
    model, guide = PAIRS[pair]
    assert_chunks_are_the_whole(model, guide, chunk_sizes=(5,), score=score, objective=objective)


@pytest.mark.parametrize("size", [1, 4, 5, 6, 11, 12, 13])
def test_every_size(size):
    assert_chunks_are_the_whole(flat_model, flat_guide, chunk_sizes=(size,))


@pytest.mark.parametrize("count, size, sizes", [(12, 5, [4, 4, 4]), (10, 4, [4, 3, 3]), (7, 4, [4, 3])])
def test_chunks_are_as_few_and_as_alike_as_can_be(count, size, sizes):
    seen = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen.append(z.numel())

    elbo = ImportanceWeightedELBO(count, chunk_size=size)
    elbo.loss(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    seen.clear()
    elbo.loss(model, model_guide := (lambda: pyro.sample("z", dist.Normal(0.0, 1.0))))
    seen.clear()
    elbo.loss(model, model_guide)
    assert seen == sizes
    assert_chunks_are_the_whole(flat_model, flat_guide, chunk_sizes=(size,), num_particles=count)


@pytest.mark.parametrize(
    "make",
    [
        auto.AutoNormal,
        auto.AutoDiagonalNormal,
        auto.AutoMultivariateNormal,
        auto.AutoHierarchicalNormalMessenger,
        auto.AutoNormalMessenger,
    ],
)
@pytest.mark.parametrize("gradient", [Pathwise(), DoublyReparameterized()], ids=repr)
def test_autoguides(make, gradient):
    guide = make(chain_model)
    guide()
    assert_chunks_are_the_whole(chain_model, guide, chunk_sizes=(5,), gradient=gradient)


@settings(max_examples=40)
@given(programs(), st.sampled_from(GRADIENTS[:2]), st.integers(0, 1))
def test_any_program(program, gradient, place):
    """Random plates, sequential ones too, masks, scales, mixtures, joint and auxiliary guide sites, minibatches."""
    pyro.clear_param_store()
    try:
        whole = outcome(ImportanceWeightedELBO(5, gradient=gradient), program.model, program.guide, 5)
    except (ValueError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            outcome(
                ImportanceWeightedELBO(5, gradient=gradient, chunk_size=(1, 3)[place]), program.model, program.guide, 5
            )
        return
    elbo = ImportanceWeightedELBO(5, gradient=gradient, chunk_size=(1, 3)[place])
    found = outcome(elbo, program.model, program.guide, 5)
    assert found[0] == pytest.approx(whole[0], rel=1e-9)
    for name, gradient in whole[1].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-8)
