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
from pyro_iwae.piecemeal import Piecemeal
from pyro_iwae.redrawn import Redrawn, _Copies
from tests.noise import SameParticles
from tests.programs import programs
from tests.statistics import assert_same_mean

pytestmark = pytest.mark.usefixtures("double")

K = 12
GAUSSIAN = ("normal", "vector", "detached", "coin", "levels")  # what SameParticles can draw
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


def probable_coins_guide():
    """Whose logits torch works out when they are asked for, and keeps."""
    with pyro.plate("data", 3):
        pyro.sample("c", dist.Bernoulli(pyro.param("q", torch.tensor([0.3, 0.6, 0.5]))))
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
    "coins by probability": (coins_model, probable_coins_guide),
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


@settings(max_examples=max(1, settings().max_examples // 6))
@given(programs(latent_families=GAUSSIAN), st.sampled_from(GRADIENTS[:2]), st.sampled_from([1, 4]))
def test_any_program(program, gradient, size):
    """Random plates, sequential ones too, masks, scales, mixtures, joint and auxiliary guide sites, minibatches."""
    pyro.clear_param_store()
    pair, count = (program.model, program.guide), 7
    elbo = ImportanceWeightedELBO(count, gradient=gradient, chunk_size=size)
    try:
        loss, expected = outcome(ImportanceWeightedELBO(count, gradient=gradient), *pair, count)
    except (ValueError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            outcome(elbo, *pair, count)
        return
    found, gradients = outcome(elbo, *pair, count)
    assert found == pytest.approx(loss, rel=1e-9)
    for name in expected.keys() | gradients.keys():
        one, other = (torch.zeros(()) if g is None else g for g in (expected[name], gradients[name]))
        torch.testing.assert_close(*torch.broadcast_tensors(one, other), rtol=1e-8, atol=1e-8)


# The plate tree


def tree_model():
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(g, pyro.param("width", torch.tensor(0.9))))
        with pyro.plate("inner", 2):
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor([[0.3, -1.0, 0.6], [0.1, 0.2, 0.9]]))


def tree_guide():
    """Latents in a plate given those further out."""
    g = pyro.sample("g", dist.Normal(pyro.param("g_loc", torch.tensor(0.2)), 0.8))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.5 * g + pyro.param("z_loc", torch.zeros(3)), 0.9))
        with pyro.plate("inner", 2):
            pyro.sample("y", dist.Normal(0.3 * z + pyro.param("y_loc", torch.zeros(2, 1)), 1.1))


def mean_field_guide():
    """The same, drawn apart: it can run once."""
    pyro.sample("g", dist.Normal(pyro.param("g_loc", torch.tensor(0.2)), 0.8))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(pyro.param("z_loc", torch.zeros(3)), 0.9))
        with pyro.plate("inner", 2):
            pyro.sample("y", dist.Normal(pyro.param("y_loc", torch.zeros(2, 1)), 1.1))


def scored_guide():
    """Sites without a reparameterised sampler, further out and inside."""
    g = pyro.sample("g", NonreparameterizedNormal(pyro.param("g_loc", torch.tensor(0.2)), 0.8))
    with pyro.plate("data", 3):
        z = pyro.sample("z", NonreparameterizedNormal(0.5 * g + pyro.param("z_loc", torch.zeros(3)), 0.9))
        with pyro.plate("inner", 2):
            pyro.sample("y", dist.Normal(0.3 * z + pyro.param("y_loc", torch.zeros(2, 1)), 1.1))


TREES = {"hierarchical": tree_guide, "mean field": mean_field_guide, "scored": scored_guide}


@pytest.mark.parametrize("score", [OVIS(), VIMCO()], ids=repr)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("guide", TREES)
@pytest.mark.parametrize("particles", [{"data": 3}, {"data": 3, "inner": 4}], ids=str)
def test_plate_tree(guide, gradient, score, particles):
    if guide == "scored" and isinstance(gradient, DoublyReparameterized):
        score = VIMCO()
    options = {"gradient": gradient, "score": score, "plate_particles": particles}
    sizes = (48, 12) if "inner" in particles else (12, 3)
    assert_chunks_are_the_whole(tree_model, TREES[guide], num_particles=7, chunk_sizes=sizes, **options)


def test_sequential_plate_tree():
    options = {"vectorize_particles": False, "plate_particles": {"data": 3}}
    assert_chunks_are_the_whole(tree_model, mean_field_guide, num_particles=3, chunk_sizes=(3,), **options)


@pytest.mark.parametrize("objective", [Renyi(0.5), CIWAE(0.3)], ids=repr)
def test_plate_tree_with_another_objective(objective):
    options = {"objective": objective, "plate_particles": {"data": 3}}
    assert_chunks_are_the_whole(tree_model, tree_guide, num_particles=7, chunk_sizes=(12,), **options)


def test_a_plates_own_particles_stay_together():
    elbo = ImportanceWeightedELBO(7, plate_particles={"data": 3, "inner": 4}, chunk_size=11)
    with pytest.raises(ValueError, match=r"chunk_size >= 12, the particles of plate 'inner' .* Write chunk_size=12"):
        elbo.loss(tree_model, tree_guide)


def test_combined_particles_are_not_cut():
    with pytest.raises(NotImplementedError, match="combine=True weighs every combination"):
        ImportanceWeightedELBO(7, plate_particles={"data": 3}, combine=True, chunk_size=100)


def test_the_records_of_all_chunks_are_joined():
    """Children, scores and constants too."""
    whole, chunked = (ImportanceWeightedELBO(7, plate_particles={"data": 3}, chunk_size=s) for s in (None, 12))
    with torch.no_grad():
        for elbo in (whole, chunked):
            elbo.loss(tree_model, scored_guide)
        records = []
        for elbo in (whole, chunked):
            with SameParticles(7):
                records.append(elbo.log_weights(tree_model, scored_guide))
    for one, other in zip(*(r.nodes() for r in records), strict=True):
        assert one.plates == other.plates and one.scale == other.scale
        torch.testing.assert_close(one.numbers(), other.numbers())


# Randomness and counting inside the model


class Masks(nn.Module):
    """Dropout that can be told which masks to use."""

    def __init__(self):
        super().__init__()
        self.drawn, self.given = [], None

    def forward(self, x):
        mask = (torch.rand(x.shape) < 0.7).to(x) if self.given is None else self.given
        self.drawn.append(mask)
        return x * mask


def test_dropout_is_replayed():
    masks = Masks()

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net("decoder", 2, 1)(masks(z)).squeeze(-1), 1.0), obs=data())

    chunked, whole = ImportanceWeightedELBO(K, chunk_size=5), ImportanceWeightedELBO(K)
    with warnings.catch_warnings():
        found = outcome(chunked, model, flat_guide)
        first, second = masks.drawn[-6:-3], masks.drawn[-3:]
        torch.testing.assert_close(first, second)
        whole.loss(model, flat_guide)
        masks.given = torch.cat(second)
        with SameParticles(K):
            for p in parameters():
                p.grad = None
            loss = whole.loss_and_grads(model, flat_guide)
    assert_same(found, (loss, {n: p.grad for n, p in named_parameters().items()}))


def test_dropout_of_the_guide_is_replayed():
    """In a guide that runs for each chunk; one that runs once draws one mask, as in a run of all K."""
    drop = nn.Dropout(0.5)

    def guide():
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.3)), 0.8))
            pyro.sample("b", dist.Normal(drop(a * pyro.param("slope", torch.tensor(0.4))), 0.9))

    elbo = ImportanceWeightedELBO(K, chunk_size=5)
    elbo.loss_and_grads(chain_model, guide)


def test_buffers_count_each_chunk_once():
    norm = nn.BatchNorm1d(1)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(norm(z.reshape(-1, 1)).reshape(z.shape), 1.0), obs=data())

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0))

    elbo = ImportanceWeightedELBO(K, chunk_size=5, vectorize_particles=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*BatchNorm.*")
        elbo.loss(model, guide)
        before = int(norm.num_batches_tracked)
        elbo.loss_and_grads(model, guide)
    assert int(norm.num_batches_tracked) == before + 3


def test_what_cannot_be_replayed_raises():
    calls = []

    def model():
        calls.extend(calls[:1])
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + len(calls), 1.0), obs=data())

    elbo = ImportanceWeightedELBO(K, chunk_size=5)
    elbo.loss(model, flat_guide)
    calls.append(1)
    with pytest.raises(ValueError, match=r"draw the same particles .* differ by .* nats"):
        elbo.loss_and_grads(model, flat_guide)
    bound = elbo.bound(model, flat_guide).sum()
    with pytest.raises(ValueError, match=r"draw the same particles .* differ by .* nats"):
        bound.backward()


def test_parameters_made_on_the_way_are_found():
    """A parameter that takes its first value at random, in a pair that is known already."""
    elbo = ImportanceWeightedELBO(K, chunk_size=5)

    def model():
        width = pyro.param("width", lambda: torch.rand(()) + 0.5)
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), width).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=data())

    def guide():
        with pyro.plate("data", 3):
            loc = pyro.param("loc", lambda: torch.randn(2))
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    for _ in range(2):
        pyro.clear_param_store()
        assert math.isfinite(elbo.loss_and_grads(model, guide))


def test_a_structure_that_changes_between_steps():
    elbo, wide = ImportanceWeightedELBO(K, chunk_size=5), [False]

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if wide[0]:
                with pyro.plate("more", 2):
                    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.ones(2, 3))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=data())

    for wide[0] in (False, True, False, True):
        elbo.loss(flat_model, flat_guide)
        assert math.isfinite(elbo.loss_and_grads(model, flat_guide))


def test_a_look_that_could_see_nothing_is_repeated():
    """A coin that fell alike in all particles of a look; looks come between chunks then."""

    def model():
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Bernoulli(1e-9))
            pyro.sample("x", dist.Normal(c + pyro.param("p", torch.tensor(0.3)), 1.0), obs=data())

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Bernoulli(pyro.param("q", torch.tensor(1e-9))))

    for _ in range(3):
        elbo = ImportanceWeightedELBO(K, chunk_size=5)
        for _ in range(3):
            assert math.isfinite(elbo.loss_and_grads(model, guide))
            elbo.bound(model, guide).sum().backward()


def test_a_model_that_takes_gradients_of_its_own():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            p = pyro.param("p", torch.tensor(0.5))
            point = z if z.requires_grad else z.detach().requires_grad_()
            (slope,) = torch.autograd.grad((p * point**2).sum(), point, create_graph=True)
            pyro.sample("x", dist.Normal(slope, 1.0), obs=data())

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.9))

    assert_chunks_are_the_whole(model, guide, chunk_sizes=(5,))


def test_without_latents():
    def model():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0), obs=torch.tensor(1.0))

    assert_chunks_are_the_whole(model, lambda: None, chunk_sizes=(5,))


# How the guide runs


def counted(guide):
    calls = []

    def counting(*args):
        calls.append(1)
        return guide(*args)

    return counting, calls


@pytest.mark.parametrize("num_particles, size", [(12, 5), (12, 1), (40, 3)])
def test_the_guide_runs_once(num_particles, size):
    guide, calls = counted(flat_guide)
    elbo = ImportanceWeightedELBO(num_particles, chunk_size=size)
    elbo.loss_and_grads(flat_model, guide)
    calls.clear()
    elbo.loss_and_grads(flat_model, guide)
    assert len(calls) == 1
    with torch.no_grad():
        elbo.log_weights(flat_model, guide)
    assert len(calls) == 2
    elbo.bound(flat_model, guide).sum().backward()
    assert len(calls) == 3


def test_a_guide_that_follows_its_draws_runs_for_each_chunk():
    guide, calls = counted(chain_guide)
    elbo = ImportanceWeightedELBO(12, chunk_size=5)
    elbo.loss_and_grads(chain_model, guide)
    calls.clear()
    elbo.loss_and_grads(chain_model, guide)
    assert len(calls) == 6


def test_a_guide_that_begins_to_follow_its_draws():
    follows = [False]

    def guide():
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.3)), 0.8))
            pyro.sample("b", dist.Normal(a if follows[0] else pyro.param("b_loc", torch.tensor(0.1)), 0.9))

    elbo = ImportanceWeightedELBO(12, chunk_size=5)
    elbo.loss_and_grads(chain_model, guide)
    follows[0] = True
    found = outcome(elbo, chain_model, guide)
    assert_same(found, outcome(ImportanceWeightedELBO(12), chain_model, guide))


def logits():
    return torch.tensor([[0.3, -0.2, 0.8], [0.1, 0.5, -0.4]])


DISTRIBUTIONS = {
    "Normal": lambda p: dist.Normal(p, (0.5 * p).exp()),
    "LogNormal": lambda p: dist.LogNormal(p, (0.5 * p).exp()),
    "Independent": lambda p: dist.Normal(p, p.exp()).to_event(1),
    "masked": lambda p: dist.Normal(p, p.exp()).mask(torch.tensor([True, False, True])),
    "expanded": lambda p: dist.Normal(p, p.exp()).expand([4, 2, 3]),
    "Bernoulli": lambda p: dist.Bernoulli(logits=p),
    "Categorical": lambda p: dist.Categorical(logits=p),
    "OneHotCategorical": lambda p: dist.OneHotCategorical(probs=p.softmax(-1)),
    "Poisson": lambda p: dist.Poisson(p.exp()),
    "Gamma": lambda p: dist.Gamma(p.exp(), 1.0 + p.exp()),
    "Beta": lambda p: dist.Beta(p.exp(), 1.0 + p.exp()),
    "Dirichlet": lambda p: dist.Dirichlet(p.exp()),
    "StudentT": lambda p: dist.StudentT(2.0 + p.exp(), p, p.exp()),
    "VonMises": lambda p: dist.VonMises(p, p.exp()),
    "MultivariateNormal": lambda p: dist.MultivariateNormal(p, scale_tril=torch.diag_embed(p.exp())),
    "LowRankMultivariateNormal": lambda p: dist.LowRankMultivariateNormal(p, p.unsqueeze(-1), p.exp()),
    "RelaxedBernoulli": lambda p: dist.RelaxedBernoulli(torch.tensor(0.7), logits=p),
    "affine": lambda p: dist.TransformedDistribution(
        dist.Normal(p, p.exp()), [dist.transforms.AffineTransform(p, 1.0 + p.exp()), dist.transforms.ExpTransform()]
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_are_cut_from_what_made_them(name):
    """Density, its gradient and that of a draw are the same through the leaves, chunk after chunk."""
    source = logits().requires_grad_()
    fn = DISTRIBUTIONS[name](source)
    site = {"name": "z", "fn": fn, "infer": {}, "cond_indep_stack": (), "scale": 1.0, "mask": None}
    cut, gradients = Redrawn((site,), {}).cut(), Piecemeal()
    (expected,) = torch.autograd.grad(sum(density_and_draw(fn, seed) for seed in range(2)), source, retain_graph=True)
    for seed in range(2):
        copy = poutine.trace(cut).get_trace().nodes["z"]["fn"]
        gradients.add(density_and_draw(copy, seed))
    assert cut.leaves and all(leaf.grad_fn is None for leaf in cut.leaves)
    cut.send_back(gradients)
    gradients.delivered(torch.zeros(())).backward()
    torch.testing.assert_close(source.grad, expected)


def density_and_draw(fn, seed):
    torch.manual_seed(seed)
    value = fn.rsample() if fn.has_rsample else fn.sample()
    return fn.log_prob(value.detach()).sum() + (value.square().sum() if fn.has_rsample else 0.0)


def test_what_hides_a_computation_is_not_cut():
    """A flow given a network's output, a point that follows from something, and anything unknown."""
    source = torch.ones(2, requires_grad=True)
    flow = dist.transforms.conditional_affine_autoregressive(2, 1).condition(source[:1])
    assert not _Copies.can_copy(dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [flow]))
    assert not _Copies.can_copy(dist.Delta(source).to_event(1))
    hidden = dist.Normal(source, 1.0)
    hidden.network = lambda: source
    assert not _Copies.can_copy(hidden)
    assert _Copies.can_copy(dist.Normal(source, 1.0).to_event(1))


# What users do with it


def test_the_loss_is_a_tensor_like_any_other():
    """It can be scaled and added to others, and gives torch's optimisers the same steps."""
    steps = []
    for size in (None, 5):
        pyro.clear_param_store()
        torch.manual_seed(0)
        encoder, decoder = (nn.Linear(1, 4), nn.Linear(2, 1))

        class Model(pyro.nn.PyroModule):
            def __init__(self, decoder=decoder):
                super().__init__()
                self.decoder = decoder

            def forward(self):
                with pyro.plate("data", 3):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.decoder(z).squeeze(-1), 1.0), obs=data())

        class Guide(pyro.nn.PyroModule):
            def __init__(self, encoder=encoder):
                super().__init__()
                self.encoder = encoder

            def forward(self):
                loc, log_scale = self.encoder(data().unsqueeze(-1)).chunk(2, -1)
                with pyro.plate("data", 3):
                    pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        module = ImportanceWeightedELBO(K, chunk_size=size)(Model(), Guide())
        module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            with SameParticles(K):
                (2.0 * module() + sum(p.square().sum() for p in module.parameters())).backward()
            optimizer.step()
        steps.append([p.detach().clone() for p in module.parameters()])
    torch.testing.assert_close(steps[1], steps[0])


def test_hooks_of_parameters_see_the_whole_gradient_once():
    """As clipping and averaging over processes need it."""
    results = []
    for size in (None, 5):
        NETS.clear()
        pyro.clear_param_store()
        torch.manual_seed(0)
        net("encoder", 1, 4), net("decoder", 2, 1)
        seen = []
        for n, p in NETS["decoder"].named_parameters():
            p.register_hook(lambda g, n=n, seen=seen: (seen.append((n, g.clone())), g.clamp(-0.1, 0.1))[1])
        found = outcome(ImportanceWeightedELBO(K, chunk_size=size), flat_model, flat_guide)
        assert len(seen) == 4
        results.append((found, dict(seen)))
    assert_same(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


def test_svi_and_trace_elbo_agree_on_one_particle():
    torch.manual_seed(1)
    svi = SVI(flat_model, flat_guide, pyro.optim.Adam({"lr": 0.01}), loss=ImportanceWeightedELBO(1, chunk_size=1))
    pyro.set_rng_seed(0)
    loss = svi.step()
    NETS.clear()
    pyro.clear_param_store()
    torch.manual_seed(1)
    other = SVI(flat_model, flat_guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
    pyro.set_rng_seed(0)
    assert loss == pytest.approx(other.step())


def test_a_graph_from_outside():
    weight = torch.ones(3, requires_grad=True)

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + x, 1.0), obs=data())

    def guide(x):
        flat_guide()

    with pytest.raises(ValueError, match=r"Compute it inside model or guide, detach it, or pass retain_graph=True"):
        ImportanceWeightedELBO(K, chunk_size=5).loss_and_grads(model, guide, weight.square())
    gradients = []
    for size in (None, 5):
        weight.grad = None
        elbo = ImportanceWeightedELBO(K, chunk_size=size, retain_graph=True)
        x = weight.square()
        elbo.loss(model, guide, x)
        with SameParticles(K):
            elbo.loss_and_grads(model, guide, x)
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("objective", [None, Renyi(0.5), MIWAE(4)], ids=repr)
def test_the_bound_keeps_its_graph(objective):
    """Made again chunk by chunk, dropout too: backward() gives what the loss gives."""
    drop = nn.Dropout(0.4)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(drop(net("decoder", 2, 1)(z)).squeeze(-1), 1.0), obs=data())

    elbo = ImportanceWeightedELBO(K, chunk_size=5, objective=objective)
    elbo.loss_and_grads(model, flat_guide)
    results = []
    for method in ("loss", "bound"):
        for p in parameters():
            p.grad = None
        pyro.set_rng_seed(7)
        if method == "loss":
            value = elbo.loss_and_grads(model, flat_guide)
        else:
            bound = elbo.bound(model, flat_guide)
            value = -bound.sum().item()
            state = torch.get_rng_state()
            (-bound.sum()).backward()
            assert torch.equal(state, torch.get_rng_state())
        results.append((value, {n: p.grad for n, p in named_parameters().items()}))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("method", ["loss", "loss_and_grads", "bound"])
def test_a_warning_where_all_are_impossible(method):
    """Once, of all K, with the site."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net("decoder", 2, 1)(z).squeeze(-1), 1.0), obs=data())
            pyro.factor("fence", torch.tensor([0.0, -math.inf, 0.0]))

    elbo = ImportanceWeightedELBO(K, chunk_size=5)
    with pytest.warns(UserWarning, match="all .* particles are impossible"):
        elbo.loss(model, flat_guide)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        getattr(elbo, method)(model, flat_guide)
    (message,) = [str(w.message) for w in found if "impossible" in str(w.message)]
    assert message.startswith("all 12 particles") and "'fence'" in message and "1 of 3" in message


def test_impossible_chunks_are_no_warning():
    """Where other chunks hold possible particles."""
    assert_chunks_are_the_whole(impossible_model, flat_guide, chunk_sizes=(1, 3))


def test_nan_in_a_gradient_raises():
    """And names a parameter of the guide that has run once, too."""

    def steep():
        with pyro.plate("data", 50):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("gate", (z * (z > 0.0)).log())

    def steep_guide():
        with pyro.plate("data", 50):
            pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.5)), 1.0))

    def gated():
        theta = pyro.param("theta", torch.tensor(1.0))
        with pyro.plate("data", 50):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("gate", (theta * (z > 0.0)).log())

    elbo = ImportanceWeightedELBO(30, chunk_size=7)
    with pytest.raises(ValueError, match=r"gradient of parameter 'theta' is NaN.*'gate'"):
        elbo.loss_and_grads(gated, steep_guide)
    with pytest.raises(ValueError, match=r"gradient of parameter 'phi' is NaN.*'gate'"):
        elbo.loss_and_grads(steep, steep_guide)
    assert all(p.grad is None or not p.grad.isnan().any() for p in parameters())


def test_subsampled_plates_that_are_not_independent_are_refused_whatever_the_chunk():
    """A chunk of one particle is no run of one particle."""

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample_size=3) as rows:
            pyro.sample("x", dist.Normal(w, 1.0), obs=data(5)[rows])

    def guide():
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    for method in ("loss", "loss_and_grads", "bound"):
        with pytest.raises(ValueError, match="is not independent"):
            getattr(ImportanceWeightedELBO(K, chunk_size=1), method)(model, guide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype):
    torch.set_default_dtype(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    whole = outcome(ImportanceWeightedELBO(K), flat_model, flat_guide)
    assert_same(outcome(ImportanceWeightedELBO(K, chunk_size=5), flat_model, flat_guide), whole, tolerance)


def test_signal_to_noise():
    elbo = ImportanceWeightedELBO(40, chunk_size=15, gradient=DoublyReparameterized())
    snr = gradient_snr(elbo, flat_model, flat_guide, num_replicates=20, progress=False)
    assert snr.guide > 0.0 and snr.model > 0.0


def test_sampled_backward_runs_the_model_in_chunks():
    """The model without a graph; the guide's values are there for all."""
    sizes = []

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            sizes.append(z.shape[0])
            pyro.sample("x", dist.Normal(net("decoder", 2, 1)(z).squeeze(-1), 1.0), obs=data())

    elbo = ImportanceWeightedELBO(30, chunk_size=5, gradient=SampledBackward(4))
    elbo.loss_and_grads(model, flat_guide)
    sizes.clear()
    elbo.loss_and_grads(model, flat_guide)
    assert sizes[:6] == [5] * 6 and len(sizes) == 7 and sizes[6] <= 4
    sizes.clear()
    elbo.loss(model, flat_guide)
    assert [size for size in sizes if size != 2] == [5] * 6  # two are for a look


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"chunk_size": 0}, ValueError, "expected chunk_size >= 1, got 0"),
        ({"chunk_size": 2.5}, TypeError, "expected chunk_size to be a whole number, got 2.5"),
        ({"chunk_size": True}, TypeError, "expected chunk_size to be a whole number"),
        ({"chunk_size": 3, "gradient": SampledBackward(4)}, ValueError, "chunk_size >= 4, the particles that Sampled"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        ImportanceWeightedELBO(K, **options)


class Held:
    """Counts the bytes that graphs keep for their backward passes, and the most that were kept at once."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        return Kept(self, tensor)

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


class Kept:
    def __init__(self, held, tensor):
        self.held, self.tensor = held, tensor
        held.now += tensor.numel() * tensor.element_size()
        held.most = max(held.most, held.now)

    def __del__(self):
        self.held.now -= self.tensor.numel() * self.tensor.element_size()


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("pair", ["network", "chain"])
@pytest.mark.parametrize("method", ["loss_and_grads", "differentiable_loss"])
def test_graphs_hold_one_chunk(pair, gradient, method):
    model, guide = PAIRS[pair]
    held = {}
    for count, size in ((10, None), (300, 10), (300, None)):
        elbo = ImportanceWeightedELBO(count, chunk_size=size, gradient=gradient)
        elbo.loss_and_grads(model, guide)
        with Held() as found:
            getattr(elbo, method)(model, guide)
        held[count, size] = found.most
    assert held[300, 10] < 1.3 * held[10, None] < 0.2 * held[300, None]


def wrapped_by_a_draw(handler):
    """Model and guide in which what is around one site follows another's draw."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with handler(a):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(0.5))

    def guide():
        a = pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.1)), 1.0))
        with handler(a):
            pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.3)), 1.0))

    return model, guide


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "handler",
    [lambda a: poutine.mask(mask=a > 0.0), lambda a: poutine.scale(scale=a.detach().sigmoid())],
    ids=["mask", "scale"],
)
def test_masks_and_scales_that_follow_a_draw(handler, size):
    model, guide = wrapped_by_a_draw(handler)
    if size != 2:  # which is for looks
        assert_chunks_are_the_whole(model, guide, chunk_sizes=(size,), num_particles=6)
    losses = [
        torch.tensor([elbo.loss(model, guide) for _ in range(400)])
        for elbo in (ImportanceWeightedELBO(6, chunk_size=size), ImportanceWeightedELBO(6))
    ]
    assert_same_mean(*losses)


def test_a_scale_that_the_guide_computes():
    def model():
        with pyro.plate("data", 3), poutine.scale(scale=pyro.param("w", torch.tensor(0.5)) * 1.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data_", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data())

    def guide():
        with pyro.plate("data", 3), poutine.scale(scale=pyro.param("w", torch.tensor(0.5)) * 1.0):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.9))

    assert_chunks_are_the_whole(model, guide)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_draw_that_the_guide_hands_over_as_an_attribute(size):
    """The model would see the draw of another run, were the guide not run for each chunk."""
    handed = {}

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(handed["z"], 1.0), obs=torch.tensor(0.5))

    def guide():
        handed["z"] = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    losses = [
        torch.tensor([elbo.loss(model, guide) for _ in range(400)])
        for elbo in (ImportanceWeightedELBO(6, chunk_size=size), ImportanceWeightedELBO(6))
    ]
    assert_same_mean(*losses)


@pytest.mark.parametrize("method", ["loss_and_grads", "loss"])
def test_plates_of_the_guide_that_grow_between_steps(method):
    deep = [False]

    def sites(obs):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)) if obs is None else 0.0, 1.0))
            if deep[0]:
                with pyro.plate("inner", 2):
                    pyro.sample("w", dist.Normal(pyro.param("w_loc", torch.tensor(0.2)) if obs is None else 0.0, 1.0))
            if obs is not None:
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    elbo = ImportanceWeightedELBO(6, chunk_size=3)
    for deep[0] in (False, True, False):
        getattr(elbo, method)(lambda: sites(data()), lambda: sites(None))
    model, guide = (lambda: sites(data())), (lambda: sites(None))
    for deep[0] in (False, True):
        getattr(elbo, method)(model, guide)
    found = outcome(elbo, model, guide, 6)
    assert_same(found, outcome(ImportanceWeightedELBO(6), model, guide, 6))
