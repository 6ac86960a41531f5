# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What the look at a model and guide finds where it is hard to see, and what it leaves behind."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, preflight
from tests.test_vectorization import Counted


def normal(name, loc=0.0, scale=1.0, obs=None):
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), scale), obs=obs)


def plates_of(model, guide, **options):
    return ImportanceWeightedELBO(num_particles=3, **options).log_weights(model, guide).plates


# A small change in a large sum


@pytest.mark.parametrize("spread", [1.0, 0.01, 0.001])
def test_particles_that_mix_under_much_data(spread):
    """The mean over particles moves 20,000 densities a little each, and their sum by less than rounding might."""
    data = torch.linspace(-2.0, 2.0, 20_000)

    def model():
        z = normal("z")
        with pyro.plate("data", len(data)):
            normal("x", z.mean(), obs=data)

    with pytest.warns(UserWarning, match=r"model site 'x' of one particle follows the latents of others"):
        ImportanceWeightedELBO(num_particles=3).loss(model, lambda: normal("z", 0.0, spread))


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("spread", [1.0, 0.01, 0.001])
def test_elements_that_mix_under_much_data(spread, vectorize):
    data = torch.linspace(-2.0, 2.0, 20_000)

    def model():
        with pyro.plate("groups", 4):
            z = normal("z")
            with pyro.plate("data", len(data)):
                normal("x", z - z.mean(-1, keepdim=True), obs=data.unsqueeze(-1))

    def guide():
        with pyro.plate("groups", 4):
            normal("z", 0.0, spread)

    assert plates_of(model, guide, vectorize_particles=vectorize) == ()


class Gated(nn.Module):
    """A coupling behind a gate that is closed at first, as in ReZero."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def model(self):
        with pyro.plate("data", 3):
            z = normal("z")
            normal("x", z + self.gate * z.mean(-1, keepdim=True), obs=torch.ones(3))


def gated_by_param():
    gate = pyro.param("gate", torch.tensor(0.0))
    with pyro.plate("data", 3):
        z = normal("z")
        normal("x", z + gate * z.mean(-1, keepdim=True), obs=torch.ones(3))


def local_guide():
    with pyro.plate("data", 3):
        normal("z", pyro.param("loc", torch.zeros(3)))


@pytest.mark.parametrize("vectorize", [None, False])
def test_a_coupling_that_starts_at_zero(vectorize):
    gated = Gated()
    for model in (gated.model, gated_by_param):
        assert plates_of(model, local_guide, vectorize_particles=vectorize) == ()
    assert gated.gate == 0.0 == pyro.param("gate") and (pyro.param("loc") == 0.0).all()


def test_a_fixed_coupling_of_zero_couples_nothing():
    gated = Gated().requires_grad_(False)
    assert plates_of(gated.model, local_guide) == ("data",)


class Edge(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def model(self):
        if self.weight.max() > 1.0:
            raise ValueError("too large")
        with pyro.plate("data", 3):
            normal("x", self.weight * normal("z"), obs=torch.ones(3))


def test_parameters_at_the_edge_of_what_is_possible():
    """A little off is impossible here; the check then looks at the parameters as they are."""
    edge = Edge()
    for _ in range(5):  # the direction is drawn
        assert plates_of(edge.model, local_guide) == ("data",)
        assert (edge.weight == 1.0).all()


def test_parameters_are_put_back_and_a_waiting_graph_stays_valid():
    gated = Gated()
    waiting = (gated.gate + 2.0) ** 2
    ImportanceWeightedELBO(num_particles=3).loss(gated.model, local_guide)
    waiting.backward()
    assert gated.gate == 0.0 and gated.gate.grad == 4.0


# State


def test_first_draws_do_not_repeat_the_random_numbers_of_new_parameters():
    def guide():
        loc = pyro.param("loc", lambda: torch.randn(3))
        with pyro.plate("data", 3):
            normal("z", loc)

    def model():
        with pyro.plate("data", 3):
            normal("z")

    for look in (preflight, ImportanceWeightedELBO(num_particles=2).loss):
        pyro.clear_param_store()
        look(model, guide)
        trace = poutine.trace(guide).get_trace()
        noise = trace.nodes["z"]["value"] - pyro.param("loc")
        assert not torch.isclose(noise, pyro.param("loc"), atol=1e-4).any()


def test_random_state_is_put_back_where_parameters_are_there():
    look = ImportanceWeightedELBO(num_particles=2)
    pyro.set_rng_seed(1)
    first = look.bound(gated_by_param, local_guide)
    pyro.set_rng_seed(1)
    assert torch.equal(look.bound(gated_by_param, local_guide), first)


class Owner(nn.Module):
    """Counts in a buffer of its own, which no call of a module shows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(0))

    def model(self):
        self.calls += 1
        self.cache = torch.zeros(len(self.cache) + 1)
        normal("z")

    def guide(self):
        normal("z")


def test_buffers_of_the_module_behind_a_method():
    owner = Owner()
    ImportanceWeightedELBO(num_particles=2).loss(owner.model, owner.guide)
    assert owner.calls == 1 and owner.cache.shape == (1,)
    wrapped = poutine.scale(owner.model, scale=1.0)
    ImportanceWeightedELBO(num_particles=2).loss(wrapped, owner.guide)
    assert owner.calls == 2


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:LazyBatchNorm1d in training")
@pytest.mark.filterwarnings("ignore:BatchNorm1d in training", "ignore:particles are run one after the other")
def test_lazy_modules():
    norm = nn.LazyBatchNorm1d()

    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            normal("x", norm(z.reshape(-1, 1)).reshape(z.shape), obs=torch.ones(3))

    assert ImportanceWeightedELBO(num_particles=2).loss(model, local_guide) > 0.0


def test_models_that_take_gradients_of_their_own():
    """The look goes without graphs, unless model or guide needs one."""

    def guide():
        loc = pyro.param("loc", torch.zeros(3))
        (slope,) = torch.autograd.grad((2.0 * loc).sum(), loc)
        with pyro.plate("data", 3):
            normal("z", loc + slope)

    assert plates_of(local_model, guide) == ("data",)  # and no warning
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        ImportanceWeightedELBO(num_particles=3).loss(local_model, guide)


def local_model():
    with pyro.plate("data", 3):
        normal("x", normal("z"), obs=torch.ones(3))


# How often model and guide run


def test_the_second_step_runs_each_once():
    model, guide = Counted(local_model), Counted(local_guide)
    elbo = ImportanceWeightedELBO(num_particles=3)
    elbo.loss(model, guide)
    model.calls = guide.calls = 0
    elbo.loss(model, guide)
    assert (model.calls, guide.calls) == (1, 1)


def test_train_and_eval_in_turns():
    """Each mode is looked at once."""
    dropout = nn.Dropout(0.5)

    def model():
        with pyro.plate("data", 3):
            normal("x", dropout(normal("z")), obs=torch.ones(3))

    counted, elbo = Counted(model), ImportanceWeightedELBO(num_particles=3)
    runs = []
    for mode in (True, False, True, False, True):
        dropout.train(mode)
        counted.calls = 0
        elbo.loss(counted, local_guide)
        runs.append(counted.calls)
    assert min(runs[:2]) > 1 and runs[2:] == [1, 1, 1]


def test_a_handler_put_on_anew_at_each_step():
    """As annealing does; another kind of handler is another model."""
    model, elbo = Counted(local_model), ImportanceWeightedELBO(num_particles=3)
    runs = []
    for scale in (0.1, 0.2, 0.3, 0.4):
        model.calls = 0
        elbo.loss(poutine.scale(model, scale=scale), poutine.scale(local_guide, scale=scale))
        runs.append(model.calls)
    assert runs[0] > 1 and runs[1:] == [1, 1, 1]
    model.calls = 0
    elbo.loss(poutine.mask(model, mask=torch.tensor(True)), local_guide)
    assert model.calls > 1


def test_handlers_that_change_values_are_looked_at_each():
    """The coupling is closed at one value of g and open at another."""

    def model():
        g = normal("g")
        with pyro.plate("data", 2):
            z = normal("z")
            normal("x", z + g * z.flip(-1), obs=torch.ones(2))

    def guide():
        with pyro.plate("data", 2):
            normal("z")

    elbo = ImportanceWeightedELBO(num_particles=3)
    found = []
    for g in (0.0, 2.0):
        conditioned = poutine.condition(model, data={"g": torch.tensor(g)})
        found.append(elbo.log_weights(conditioned, guide).plates)
    assert found == [("data",), ()]


# Masks on one side


def half_masked(known):
    with pyro.plate("data", 3):
        normal("x", obs=None) if known is None else pyro.sample(
            "x", dist.Normal(torch.zeros(3), 1.0), obs=torch.ones(3), obs_mask=known
        )


def test_a_latent_masked_in_the_model_alone():
    known = torch.tensor([True, False, True])

    def unmasked():
        with pyro.plate("data", 3):
            normal("x_unobserved", torch.zeros(3))

    def masked():
        with pyro.plate("data", 3), poutine.mask(mask=~known):
            normal("x_unobserved", torch.zeros(3))

    def model():
        half_masked(known)

    with pytest.warns(UserWarning, match="'x_unobserved' is masked in the model and not alike in the guide"):
        ImportanceWeightedELBO(num_particles=3).loss(model, unmasked)
    assert "x_unobserved" in preflight(model, unmasked).warnings[0]
    assert preflight(model, masked).warnings == ()
    bound = ImportanceWeightedELBO(num_particles=3).bound(model, masked)
    expected = dist.Normal(torch.zeros(3), 1.0).log_prob(torch.ones(3)) * known
    assert torch.allclose(bound, expected, atol=1e-6)


def test_a_factor_in_place_of_a_prior():
    """Masking the whole prior is an idiom, not a mistake."""

    def model():
        with poutine.mask(mask=False):
            z = normal("z")
        pyro.factor("prior", -z.abs() - torch.tensor(2.0).log())

    assert preflight(model, lambda: normal("z")).warnings == ()


# What the resampled guide does with structure that follows the latents


def branching():
    n = 0
    while pyro.sample(f"c_{n}", dist.Bernoulli(0.5)).item() == 1 and n < 5:
        normal(f"z_{n}")
        n += 1
    normal("x", float(n), obs=torch.tensor(2.0))


def branching_guide():
    n = 0
    while pyro.sample(f"c_{n}", dist.Bernoulli(0.6)).item() == 1 and n < 5:
        normal(f"z_{n}")
        n += 1


def test_latents_that_come_and_go_cannot_be_stacked():
    posterior = ImportanceResampledGuide(branching, branching_guide, 5, vectorize_particles=False)
    with pytest.raises(ValueError, match="same latents of the same shapes in every draw"):
        posterior.sample(40)
    with pytest.raises(ValueError, match="same latents in every particle"):
        posterior.expectation(lambda z: z["c_0"])
    assert {len(posterior()) for _ in range(40)} > {1}
