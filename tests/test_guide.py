# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of ImportanceResampledGuide: their law, their independence, every kind of site, and the module itself."""

import copy
import io
import itertools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import planar
from pyro.infer import Predictive, Trace_ELBO, autoguide, config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy.special import exp1

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO
from pyro_iwae import guide as guide_module
from pyro_iwae.exact import Bernoulli, Gamma, Gaussian
from tests.noise import hermite
from tests.statistics import assert_mean, assert_same_mean

GAMMA = Gamma(shape=1.0)
GAMMA_MEANS = {1: 1.0, 2: 4 / 3, 3: 1.5, 5: 5 / 3, 10: 20 / 11}  # 2 K / (K + 1)
BERNOULLI = {2: 0.640367, 5: 0.650813, 10: 0.654233}


def gammas(size, **plate):
    """Independent copies of the Gamma example in a plate: (model, guide)."""

    def model():
        with pyro.plate("copies", size, **plate):
            pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide():
        with pyro.plate("copies", size, **plate):
            pyro.sample("z", dist.Gamma(1.0, 1.0))

    return model, guide


def global_model(x):
    """The Gamma example as a global latent, and local ones, tied to no data, that the guide gets right."""
    g = pyro.sample("g", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(False), obs=x)


def global_guide(x):
    g = pyro.sample("g", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(g, 1.0))


class Counted:
    """A model or guide that counts its calls."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.fn(*args, **kwargs)


# The law of a draw


@pytest.mark.parametrize("num_particles", GAMMA_MEANS)
def test_mean_of_the_gamma_example(num_particles):
    posterior = ImportanceResampledGuide(GAMMA.model, GAMMA.guide, num_particles)
    assert_mean(posterior.sample(50_000)["z"], GAMMA_MEANS[num_particles])


@pytest.mark.parametrize("num_particles", [2, 3, 5])
def test_whole_law_of_the_gamma_example(num_particles, double):
    """Its distribution function at the deciles of the target, from the density by the trapezoidal rule."""
    grid = torch.linspace(1e-6, 60.0, 24_001)
    mass = GAMMA.resampled_log_density(grid, num_particles).exp() * (grid[1] - grid[0])
    deciles = torch.tensor([0.53, 0.82, 1.10, 1.38, 1.68, 2.02, 2.44, 2.99, 3.89])
    law = torch.stack([mass[grid < d].sum() for d in deciles])
    draws = ImportanceResampledGuide(GAMMA.model, GAMMA.guide, num_particles).sample(50_000)["z"]
    assert_mean((draws.unsqueeze(1) < deciles).double(), law)


@pytest.mark.parametrize("num_particles", BERNOULLI)
def test_law_of_the_bernoulli_example(num_particles):
    example = Bernoulli()
    draws = ImportanceResampledGuide(example.model, example.guide, num_particles).sample(100_000)["z"]
    assert_mean(draws, BERNOULLI[num_particles])


def test_one_particle_is_the_guide():
    posterior = ImportanceResampledGuide(*gammas(100), 1)
    pyro.set_rng_seed(1)
    draws = posterior()["z"]
    pyro.set_rng_seed(1)
    assert (draws == dist.Gamma(1.0, 1.0).expand([100]).sample()).all()


def test_exact_posterior_stays_exact():
    example = Gaussian(data=torch.linspace(-2.0, 2.0, 5), offset=0.0)
    draws = ImportanceResampledGuide(example.model, example.guide, 10).sample(20_000)["z"]
    assert_mean(draws, example.data / 2)
    assert_mean((draws - example.data / 2) ** 2, 0.5)


def test_many_particles_reach_the_posterior():
    """A guide that is off by a standard deviation; the error of K = 400 is far below what the test resolves."""
    example = Gaussian(data=torch.tensor([1.0, -1.0]), offset=1.0)
    draws = ImportanceResampledGuide(example.model, example.guide, 400).sample(2_000)["z"]
    assert_mean(draws, example.data / 2)


@pytest.mark.parametrize("num_particles", [2, 5])
def test_all_sites_of_an_element_take_the_same_particle(num_particles):
    """The weights know only g; z, drawn around it, must come from the same particle."""
    draws = ImportanceResampledGuide(global_model, global_guide, num_particles).sample(50_000, torch.zeros(3))
    assert_mean(draws["g"], GAMMA_MEANS[num_particles])
    around = draws["z"] - draws["g"].unsqueeze(1)
    assert_mean(around, 0.0)
    assert_mean(around**2, 1.0)


def test_elements_select_apart():
    """Centred at the known mean, elements are uncorrelated; one index for all would tie their weights' ranks."""
    draws = ImportanceResampledGuide(*gammas(2), 2).sample(50_000)["z"] - GAMMA_MEANS[2]
    assert_mean(draws, 0.0)
    assert_mean(draws[:, 0] * draws[:, 1], 0.0)


def test_each_element_of_independent_plates_has_its_own_weights():
    """A single weight for all of 100 elements would leave the mean near that of K = 1."""
    draws = ImportanceResampledGuide(*gammas(100), 5).sample(500)["z"]
    assert_mean(draws.flatten(), GAMMA_MEANS[5])


# sample


def structured(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("v", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", 3, dim=-2):
        pyro.sample("a", dist.MultivariateNormal(w.unsqueeze(-1).expand((*w.shape, 2)), torch.eye(2)))
        with pyro.plate("columns", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(w, 1.0))
            pyro.deterministic("c", b**2)
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)


STRUCTURED_SHAPES = {"w": (), "v": (2,), "a": (3, 1, 2), "b": (3, 4)}


def structured_guide(x):
    with poutine.block(hide=["x", "c"]):
        structured(x)


@pytest.mark.parametrize("num_particles", [1, 6])
@pytest.mark.parametrize("num_draws", [1, 7])
def test_shapes_of_draws(num_draws, num_particles):
    posterior = ImportanceResampledGuide(structured, structured_guide, num_particles)
    draws = posterior.sample(num_draws, torch.zeros(3, 4))
    assert {n: v.shape[1:] for n, v in draws.items()} == STRUCTURED_SHAPES
    assert all(v.shape[0] == num_draws and not v.requires_grad for v in draws.values())


def test_shapes_of_independent_elements():
    posterior = ImportanceResampledGuide(*gammas(3, dim=-2), 4)
    assert posterior.sample(7)["z"].shape == (7, 3, 1)


def test_draws_in_passes_are_independent_too(monkeypatch, double):
    posterior = ImportanceResampledGuide(*gammas(2), 3)
    posterior.sample(1)
    monkeypatch.setattr(guide_module, "NUMBERS_PER_PASS", 3 * 2 * 100)
    draws = posterior.sample(1001)["z"]
    assert draws.shape == (1001, 2)
    assert draws.unique().numel() == draws.numel()


def test_same_seed_same_draws():
    posterior = ImportanceResampledGuide(structured, structured_guide, 6)
    pyro.set_rng_seed(3)
    first = posterior.sample(20, torch.zeros(3, 4))
    pyro.set_rng_seed(3)
    again = posterior.sample(20, torch.zeros(3, 4))  # the first call looks at the model, this one does not
    assert all((first[n] == again[n]).all() for n in STRUCTURED_SHAPES)


def test_draws_are_not_made_in_a_loop():
    """The first call also looks at the model, without and within a plate of draws."""
    calls = {}
    for num_draws in (10, 1000):
        model, guide = Counted(structured), Counted(structured_guide)
        posterior = ImportanceResampledGuide(model, guide, 100)
        posterior.sample(num_draws, torch.zeros(3, 4))
        calls[num_draws] = model.calls, guide.calls
        model.calls = guide.calls = 0
        posterior.sample(num_draws, torch.zeros(3, 4))
        assert max(model.calls, guide.calls) <= 2
    assert all(many - few <= 8 for few, many in zip(calls[10], calls[1000], strict=True))  # the check grows as a log


def test_draws_are_looked_at_by_two():
    """A look takes many runs; only the draws themselves are run with all of them."""
    sizes = []

    def watched(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            sizes.append(z.numel())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    posterior = ImportanceResampledGuide(watched, guide, num_particles=5)
    assert posterior.sample(1000, torch.zeros(3))["z"].shape == (1000, 3)
    assert len(sizes) > 5 and [size for size in sizes if size > 1000] == [1000 * 5 * 3]


def test_sample_leaves_no_sites_outside():
    posterior = ImportanceResampledGuide(*gammas(2), 3)
    trace = poutine.trace(posterior.sample).get_trace(5)
    assert [n for n, s in trace.nodes.items() if s["type"] == "sample"] == []


def test_float32_networks_on_float64_data_run_in_one_pass():
    """Their log densities are float64 numbers with errors of float32; no reason to run particles one by one."""
    net = torch.nn.Sequential(torch.nn.Linear(10, 100), torch.nn.Tanh(), torch.nn.Linear(100, 64))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))

    for size in (1, 3, 32):
        posterior = ImportanceResampledGuide(model, guide, 5)
        assert posterior.sample(2, torch.randn(size, 64).double())["z"].shape == (2, size, 10)


def branching_model():
    z = pyro.sample("z", dist.Gamma(2.0, 1.0))
    return "large" if z > 1.0 else "small"


def branching_guide():
    pyro.sample("z", dist.Gamma(1.0, 1.0))


def test_model_that_does_not_vectorise():
    posterior = ImportanceResampledGuide(branching_model, branching_guide, 2)
    with pytest.warns(UserWarning, match="one after the other"):
        draws = posterior.sample(600)["z"]
    assert draws.shape == (600,)
    assert_mean(draws, GAMMA_MEANS[2])


def test_sequential_on_request():
    posterior = ImportanceResampledGuide(branching_model, branching_guide, 2, vectorize_particles=False)
    assert_mean(posterior.sample(600)["z"], GAMMA_MEANS[2])


def test_sites_that_come_and_go_with_the_particle():
    """With K = 2, q_EW(b = 1) = 1/4 + 1/2 E[z / (1 + z)] for z ~ Exp(1)."""

    def model():
        if pyro.sample("b", dist.Bernoulli(0.5)) == 1:
            pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide():
        if pyro.sample("b", dist.Bernoulli(0.5)) == 1:
            pyro.sample("z", dist.Gamma(1.0, 1.0))

    posterior = ImportanceResampledGuide(model, guide, 2, vectorize_particles=False)
    draws = [posterior() for _ in range(2000)]
    assert all(("z" in d) == (d["b"] == 1) for d in draws)
    assert_mean(torch.stack([d["b"] for d in draws]), 0.25 + 0.5 * (1.0 - math.e * exp1(1.0)))


# Predictive


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_has_the_law(parallel):
    posterior = ImportanceResampledGuide(*gammas(50), 3)
    draws = Predictive(gammas(50)[0], guide=posterior, num_samples=100, parallel=parallel)()["z"]
    assert draws.shape == (100, 50)
    assert_mean(draws.flatten(), GAMMA_MEANS[3])


@pytest.mark.parametrize("parallel", [False, True])
def test_draws_of_predictive_are_independent(parallel, double):
    """Draws from one batch of particles would repeat, and would be correlated where they do not."""
    posterior = ImportanceResampledGuide(*gammas(50), 2)
    draws = Predictive(gammas(50)[0], guide=posterior, num_samples=60, parallel=parallel)()["z"]
    assert draws.unique().numel() == draws.numel()
    centred = draws - GAMMA_MEANS[2]
    assert_mean((centred[0::2] * centred[1::2]).flatten(), 0.0)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_with_global_latents_above_a_plate(parallel):
    posterior = ImportanceResampledGuide(global_model, global_guide, 3)
    draws = Predictive(global_model, guide=posterior, num_samples=500, parallel=parallel)(torch.zeros(4))
    assert {n: v.flatten(1).shape[1] for n, v in draws.items()} == {"g": 1, "z": 4, "x": 4}
    g = draws["g"].reshape(500, 1)
    assert_mean(g, GAMMA_MEANS[3])
    assert_mean(draws["z"] - g, 0.0)


def only_global_model(x=None, size=4):
    loc = pyro.sample("loc", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", size, dim=-2), pyro.plate("columns", 5, dim=-1):
        with poutine.mask(mask=torch.tensor(False)):
            return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def only_global_guide(x=None, size=4):
    pyro.sample("loc", dist.Gamma(1.0, 1.0))


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_where_every_latent_is_outside_the_plates(parallel, num_particles):
    """Predictive must find room left of plates in which the guide draws nothing."""
    posterior = ImportanceResampledGuide(only_global_model, only_global_guide, num_particles)
    data = torch.zeros(4, 5)
    draws = Predictive(only_global_model, guide=posterior, num_samples=500, parallel=parallel)(data)
    assert_mean(draws["loc"].flatten(), GAMMA_MEANS[num_particles])
    prediction = Predictive(only_global_model, {"loc": posterior.sample(500, data)["loc"]})(size=2)["x"]
    assert prediction.shape == (500, 2, 5)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_agrees_with_sample(parallel):
    """In a model whose resampled posterior has no closed form: global and local latents, and data."""

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * w, 1.0))

    x = torch.tensor([1.0, 0.0, 2.0])
    posterior = ImportanceResampledGuide(model, guide, 4)
    draws = Predictive(model, guide=posterior, num_samples=1000, parallel=parallel)(x)
    others = posterior.sample(20_000, x)

    def moments(w, z):
        all_latents = torch.cat([w.reshape(-1, 1), z.reshape(-1, 3)], -1)
        return torch.cat([all_latents, (all_latents.unsqueeze(1) * all_latents.unsqueeze(2)).flatten(1)], -1)

    assert_same_mean(moments(draws["w"], draws["z"]), moments(others["w"], others["z"]))


def test_predictive_of_nested_independent_plates(double):
    def nested(shape):
        def program():
            with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 20, dim=-1):
                pyro.sample("z", dist.Gamma(shape, 1.0))

        return program

    posterior = ImportanceResampledGuide(nested(2.0), nested(1.0), 3)
    draws = Predictive(nested(2.0), guide=posterior, num_samples=50, parallel=True)()["z"]
    assert draws.shape == (50, 3, 20)
    assert draws.unique().numel() == draws.numel()
    assert_mean(draws.flatten(), GAMMA_MEANS[3])


class Encoder(PyroModule):
    """An amortised guide of the Gaussian example, a standard deviation off."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[torch.nn.Linear](1, 1)
        with torch.no_grad():
            self.net.weight.fill_(0.5)
            self.net.bias.fill_(0.5)
        self.width = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(self.net(x.unsqueeze(-1)).squeeze(-1), self.width))


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.noise = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("prior_loc", torch.tensor(0.0))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0))
            return pyro.sample("x", dist.Normal(z, self.noise), obs=x)


@pytest.mark.parametrize("parallel", [False, True])
def test_amortised_guide_on_new_data_of_another_size(parallel):
    """Every size in turn, one element included: the verdict on the first size must not stay."""
    posterior = ImportanceResampledGuide(Decoder(), Encoder(), 200)
    for size in (5, 2, 1, 7) if parallel else (5, 1):
        x = torch.linspace(-1.0, 2.0, size)
        draws = Predictive(posterior.model, guide=posterior, num_samples=400, parallel=parallel)(x)["z"]
        assert draws.shape == (400, size)
        assert_mean(draws, x / 2)
        assert posterior.sample(3, x)["z"].shape == (3, size)


# Every kind of plate and site


def test_subsampled_plate_shows_its_minibatch_once():
    model, guide = gammas(10, subsample_size=4)
    posterior = ImportanceResampledGuide(model, guide, 3)
    posterior()
    for _ in range(5):
        trace = poutine.trace(posterior).get_trace()
        assert [n for n in trace.nodes if "copies" in n] == ["copies"]
        indices = trace.nodes["copies"]["value"]
        assert indices.unique().numel() == 4
        assert trace.nodes["z"]["value"].shape == (4,)
        assert trace.nodes["z"]["scale"] == 2.5
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
        assert (replayed.nodes["copies"]["value"] == indices).all()


def test_sequential_plate():
    def program(shape):
        def sites():
            for i in pyro.plate("copies", 3):
                pyro.sample(f"z_{i}", dist.Gamma(shape, 1.0))

        return sites

    posterior = ImportanceResampledGuide(program(2.0), program(1.0), 3)
    draws = posterior.sample(20_000)
    assert set(draws) == {"z_0", "z_1", "z_2"}
    draws = torch.stack(list(draws.values()), -1) - GAMMA_MEANS[3]
    assert_mean(draws, 0.0)
    assert_mean(draws[:, :1] * draws[:, 1:], 0.0)
    parallel = Predictive(program(2.0), guide=posterior, num_samples=1000, parallel=True)()
    assert_mean(torch.stack(list(parallel.values()), -1), GAMMA_MEANS[3])


def test_subsampled_sequential_plate():
    """The sites of each minibatch have other names."""

    def program(shape):
        def sites():
            for i in pyro.plate("copies", 5, subsample_size=2):
                pyro.sample(f"z_{i}", dist.Gamma(shape, 1.0))

        return sites

    posterior = ImportanceResampledGuide(program(2.0), program(1.0), 3)
    draws = [posterior() for _ in range(400)]
    assert {n for d in draws for n in d} == {f"z_{i}" for i in range(5)}
    assert all(len(d) == 2 for d in draws)
    assert_mean(torch.stack([torch.stack(list(d.values())) for d in draws]), GAMMA_MEANS[3])


def test_sequential_plate_within_a_vectorised_one():
    def program(shape):
        def sites():
            with pyro.plate("rows", 4):
                for i in pyro.plate("columns", 2):
                    pyro.sample(f"z_{i}", dist.Gamma(shape, 1.0))

        return sites

    posterior = ImportanceResampledGuide(program(2.0), program(1.0), 3)
    draws = torch.stack(list(posterior.sample(5_000).values()), -1)
    assert draws.shape == (5_000, 4, 2)
    assert_mean(draws, GAMMA_MEANS[3])
    trace = poutine.trace(posterior).get_trace()
    assert trace.nodes["z_1"]["value"].shape == (4,)
    assert_mean(Predictive(program(2.0), guide=posterior, num_samples=500, parallel=True)()["z_1"], GAMMA_MEANS[3])


def test_plates_of_latents_and_data_under_two_names():
    def model(x):
        with pyro.plate("za", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("xa", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("za", 3):
            pyro.sample("z", dist.Normal(x / 2 + math.sqrt(0.5), math.sqrt(0.5)))

    x = torch.tensor([0.0, 1.0, -3.0])
    posterior = ImportanceResampledGuide(model, guide, 200)
    assert_mean(posterior.sample(1000, x)["z"], x / 2)
    draws = Predictive(model, guide=posterior, num_samples=500, parallel=True)(x)
    assert_mean(draws["z"], x / 2)


def test_discrete_sites_in_a_plate():
    x = torch.tensor([2.0, -1.0, 1.0])

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.5)))

    expected = torch.stack([Bernoulli(data=value).resampled(2) for value in x])
    posterior = ImportanceResampledGuide(model, guide, 2)
    assert_mean(posterior.sample(50_000, x)["z"], expected)
    draws = Predictive(model, guide=posterior, num_samples=5000, parallel=True)(x)["z"]
    assert_mean(draws, expected)


@pytest.mark.parametrize("size", [1, 3])
def test_plates_further_left(size):
    def program(shape):
        def sites():
            with pyro.plate("copies", size, dim=-3):
                pyro.sample("z", dist.Gamma(shape, 1.0))

        return sites

    posterior = ImportanceResampledGuide(program(2.0), program(1.0), 3)
    for count in (1, 5):
        assert posterior.sample(count)["z"].shape == (count, size, 1, 1)
        for parallel in (True, False):
            draws = Predictive(program(2.0), guide=posterior, num_samples=count, parallel=parallel)()
            assert draws["z"].shape == (count, size, 1, 1)


def test_sites_of_a_guide_that_ask_for_enumeration():
    """More than one particle samples them, and says so once."""

    @config_enumerate
    def guide():
        pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.5)))

    posterior = ImportanceResampledGuide(Bernoulli().model, guide, 2)
    with pytest.warns(UserWarning, match="ask for enumeration"):
        posterior.sample(1)
    assert_mean(posterior.sample(50_000)["z"], BERNOULLI[2])


def test_partly_observed_data():
    """obs_mask makes two sites of one, a latent among them."""
    x, known = torch.tensor([1.0, 7.0, -0.5]), torch.tensor([True, False, True])

    def model(x, known):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=known)

    def guide(x, known):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=~known):
            pyro.sample("x_unobserved", dist.Normal(loc, 1.0))

    posterior = ImportanceResampledGuide(model, guide, 300)
    draws = posterior.sample(1000, x, known)
    assert_mean(draws["loc"], 0.5 / 3.0)
    assert_mean(draws["x_unobserved"][:, 1] - draws["loc"], 0.0)
    draws = Predictive(model, guide=posterior, num_samples=10, parallel=True)(x, known)
    assert (draws["x"][:, known] == x[known]).all() and (draws["x"][:, 1] != 7.0).all()


def test_reparameterised_model():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    model = poutine.reparam(model, config={"z": LocScaleReparam(0.0)})
    posterior = ImportanceResampledGuide(model, autoguide.AutoNormal(model), 5)
    draws = posterior.sample(4)
    assert {n: v.shape for n, v in draws.items()} == {"loc": (4,), "z_decentered": (4, 3)}
    draws = Predictive(model, guide=posterior, num_samples=6, parallel=True)()
    torch.testing.assert_close(draws["z"], draws["loc"].reshape(6, 1) + draws["z_decentered"])


class BayesianRegression(PyroModule):
    """Weights by PyroSample, in a layer that does not broadcast."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        return mean


@pytest.mark.parametrize("vectorize", [None, False])
def test_bayesian_layer(vectorize):
    """Predictive must not give the weights a dimension that the layer cannot take."""
    model = BayesianRegression()
    posterior = ImportanceResampledGuide(model, autoguide.AutoNormal(model), 3, vectorize_particles=vectorize)
    x, y = torch.randn(4, 2), torch.randn(4)
    with pytest.warns(UserWarning, match="one after the other") if vectorize is None else nullcontext():
        draws = posterior.sample(5, x, y)
    assert {n: v.shape for n, v in draws.items()} == {"linear.weight": (5, 1, 2), "linear.bias": (5, 1)}
    assert Predictive(model, draws)(x)["y"].shape == (5, 4)
    draws = Predictive(model, guide=posterior, num_samples=5)(x, y)
    assert draws["linear.weight"].numel() == 10 and draws["y"].shape == (5, 4)
    assert Trace_ELBO().loss(model, posterior, x, y) > 0.0


def test_keyword_arguments(double):
    def model(*, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(*, x):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    posterior, x = ImportanceResampledGuide(model, guide, 3), torch.tensor(100.0)
    assert posterior(x=x)["z"] > 40.0
    assert posterior.sample(2, x=x)["z"].min() > 40.0
    assert posterior.expectation(lambda z: z["z"], x=x) > 40.0
    torch.testing.assert_close(posterior.elbo_interval(x=x).lower, dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))
    log_density = dist.Normal(50.0, math.sqrt(0.5)).log_prob(torch.tensor([51.0]))
    torch.testing.assert_close(posterior.log_density({"z": torch.tensor([51.0])}, x=x), log_density)


def test_deterministic_and_auxiliary_sites_are_not_emitted():
    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.deterministic("twice", 2.0 * z)

    def guide():
        u = pyro.sample("u", dist.Exponential(1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u))

    posterior = ImportanceResampledGuide(model, guide, 3)
    assert set(posterior()) == {"z"}
    trace = poutine.trace(posterior).get_trace()
    assert not {"u", "twice"} & set(trace.nodes)
    assert_mean(posterior.sample(20_000)["z"], GAMMA_MEANS[3])
    draws = Predictive(model, guide=posterior, num_samples=100, parallel=True, return_sites=("z", "twice"))()
    torch.testing.assert_close(draws["twice"], 2.0 * draws["z"])


def test_model_without_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    posterior = ImportanceResampledGuide(model, lambda x: None, 3)
    x = torch.tensor([1.0, 2.0])
    assert posterior(x) == {}
    assert posterior.sample(5, x) == {}
    assert ImportanceResampledGuide(lambda: None, lambda: None, 3).sample(5) == {}
    assert Trace_ELBO().loss(model, posterior, x) == pytest.approx(-dist.Normal(0.0, 1.0).log_prob(x).sum())


def test_impossible_elements_give_no_nan():
    """Where no particle is possible a draw is one of the particles, and its value under Trace_ELBO -inf."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(torch.tensor([True, False]), -math.inf, 0.0) + 0.0 * z)

    def guide():
        loc = pyro.param("loc", torch.tensor([0.0, 1.0]))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(loc, 1.0))

    posterior = ImportanceResampledGuide(model, guide, 5)
    with pytest.warns(UserWarning, match="impossible"):
        draws = posterior.sample(1000)["z"]
    assert draws.isfinite().all()
    with pytest.warns(UserWarning, match="impossible"):
        trace = poutine.trace(posterior).get_trace()
    assert not trace.log_prob_sum().isnan()
    with pytest.warns(UserWarning, match="impossible"):
        assert Trace_ELBO().loss(model, posterior) == math.inf
    with pytest.warns(UserWarning, match="impossible"):
        assert posterior.expectation(lambda z: z["z"], num_batches=2)[1].isfinite()
    with pytest.warns(UserWarning, match="impossible"):
        lower, upper = posterior.elbo_interval(num_batches=2, num_replicates=2)
    assert lower[0] == -math.inf
    assert lower[1].isfinite() and upper[1].isfinite()


# Enumerated sites of the model


def mixture_model(x):
    """The class depends on z, and the data on the class."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(logits=2.0 * z), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(3.0 * c, 1.0), obs=x)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5, 1.0))


def mixture_law(x, num_particles, order=64):
    """q_EW(c = 1) by Gauss-Hermite quadrature over the particles."""
    noise, mass = hermite(num_particles, order)
    z = noise.unsqueeze(-1) + 0.5  # particles, nodes, data
    on = -torch.nn.functional.softplus(-2.0 * z) + dist.Normal(3.0, 1.0).log_prob(x)
    off = -torch.nn.functional.softplus(2.0 * z) + dist.Normal(0.0, 1.0).log_prob(x)
    log_w = torch.logaddexp(on, off) + dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.5, 1.0).log_prob(z)
    of_particle = (on - torch.logaddexp(on, off)).exp()
    return (mass.unsqueeze(-1) * (log_w.softmax(0) * of_particle).sum(0)).sum(0)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_law_of_enumerated_sites(num_particles, double):
    x = torch.tensor([2.0, 1.0, -0.5])
    posterior = ImportanceResampledGuide(mixture_model, mixture_guide, num_particles)
    draws = posterior.sample(50_000, x)
    assert {n: v.shape for n, v in draws.items()} == {"z": (50_000, 3), "c": (50_000, 3)}
    expected = mixture_law(x, num_particles)
    assert_mean(draws["c"], expected)
    parallel = Predictive(mixture_model, guide=posterior, num_samples=5000, parallel=True)(x)
    assert_mean(parallel["c"], expected)


def test_law_of_enumerated_sites_drawn_one_by_one():
    x = torch.tensor([2.0, 1.0, -0.5])
    posterior = ImportanceResampledGuide(mixture_model, mixture_guide, 2)
    draws = Predictive(mixture_model, guide=posterior, num_samples=400)(x)
    assert_mean(draws["c"].reshape(400, 3), mixture_law(x.double(), 2))


def test_enumerated_sites_fit_the_chosen_particle():
    """c is drawn given the z that was selected: where z is far out, c follows it."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("c", dist.Bernoulli(logits=1e4 * z), infer={"enumerate": "parallel"})

    def guide():
        pyro.sample("z", dist.Normal(1.0, 10.0))

    draws = ImportanceResampledGuide(model, guide, 5).sample(1000)
    clear = draws["z"].abs() > 0.01
    assert (draws["c"][clear] == (draws["z"][clear] > 0)).all()


@pytest.mark.parametrize("num_particles", [1, 4])
def test_hidden_markov_model(num_particles):
    """Enumerated states within pyro.markov beside a continuous latent; smoothing law by enumeration."""
    x = torch.tensor([0.3, 2.1, 1.4])
    move = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    @config_enumerate(default="parallel")
    def model(x):
        pyro.sample("z", dist.Gamma(2.0, 1.0))
        state = 0
        for t in pyro.markov(range(3)):
            state = pyro.sample(f"s_{t}", dist.Categorical(pyro.ops.indexing.Vindex(move)[state]))
            pyro.sample(f"x_{t}", dist.Normal(2.0 * state, 1.0), obs=x[t])

    def guide(x):
        pyro.sample("z", dist.Gamma(1.0, 1.0))

    joint = {}
    for path in itertools.product((0, 1), repeat=3):
        steps = zip((0, *path[:2]), path, x, strict=True)
        joint[path] = math.exp(sum(move[a, b].log() + dist.Normal(2.0 * b, 1.0).log_prob(y) for a, b, y in steps))
    law = torch.tensor(list(joint.values())) / sum(joint.values())

    draws = ImportanceResampledGuide(model, guide, num_particles).sample(20_000, x)
    path = draws["s_0"] * 4 + draws["s_1"] * 2 + draws["s_2"]
    assert_mean(torch.nn.functional.one_hot(path, 8), law)
    assert_mean(draws["z"], 2 * num_particles / (num_particles + 1))


# The module


def test_holds_model_and_guide():
    posterior = ImportanceResampledGuide(Decoder(), Encoder(), 4)
    names = {n for n, _ in posterior.named_parameters()}
    assert names == {"model.noise", "guide.net.weight", "guide.net.bias", "guide.width_unconstrained"}


def test_state_dict_round_trip():
    first, second = (ImportanceResampledGuide(Decoder(), Encoder(), 4) for _ in range(2))
    with torch.no_grad():
        first.guide.net.bias.fill_(3.0)
    x = torch.zeros(2)
    second.sample(1, x)
    second.load_state_dict(first.state_dict())
    pyro.set_rng_seed(5)
    draws = first.sample(10, x)["z"]
    pyro.set_rng_seed(5)
    assert (second.sample(10, x)["z"] == draws).all()


def assert_same_draws(posterior, other, *args):
    pyro.set_rng_seed(5)
    draws = posterior.sample(10, *args)
    pyro.set_rng_seed(5)
    others = other.sample(10, *args)
    assert draws.keys() == others.keys() and all((draws[n] == others[n]).all() for n in draws)


@pytest.mark.parametrize("used", [False, True])
def test_deepcopy_is_a_module_of_its_own(used):
    posterior = ImportanceResampledGuide(Decoder(), Encoder(), 4)
    x = torch.zeros(2)
    if used:
        posterior.sample(1, x)
    other = copy.deepcopy(posterior)
    assert_same_draws(posterior, other, x)
    with torch.no_grad():
        other.guide.net.bias.fill_(100.0)
    assert posterior.sample(10, x)["z"].max() < 50.0 < other.sample(10, x)["z"].min()


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoNormalMessenger])
def test_save_and_load_with_an_autoguide(kind):
    posterior = ImportanceResampledGuide(regression, kind(regression), 4)
    x = torch.zeros(2)
    posterior(x)
    file = io.BytesIO()
    torch.save(posterior, file)
    file.seek(0)
    assert_same_draws(posterior, torch.load(file, weights_only=False), x)
    assert_same_draws(posterior, copy.deepcopy(posterior), x)


@pytest.mark.parametrize("used", [False, True])
def test_save_and_load(used):
    posterior = ImportanceResampledGuide(Decoder(), Encoder(), 4)
    x = torch.zeros(2)
    if used:
        posterior.sample(1, x)
    file = io.BytesIO()
    torch.save(posterior, file)
    file.seek(0)
    assert_same_draws(posterior, torch.load(file, weights_only=False), x)


def test_save_and_load_with_plain_functions():
    posterior = ImportanceResampledGuide(global_model, global_guide, 4)
    x = torch.zeros(2)
    posterior.sample(1, x)
    file = io.BytesIO()
    torch.save(posterior, file)
    file.seek(0)
    assert_same_draws(posterior, torch.load(file, weights_only=False), x)


def test_another_dtype():
    posterior = ImportanceResampledGuide(Decoder(), Encoder(), 4)
    x = torch.zeros(2)
    assert posterior.sample(3, x)["z"].dtype == torch.float32
    posterior.double()
    assert posterior.sample(3, x.double())["z"].dtype == torch.float64
    assert posterior(x.double())["z"].dtype == torch.float64
    assert posterior.expectation(lambda z: z["z"], x.double()).dtype == torch.float64


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_another_device(device):
    posterior = ImportanceResampledGuide(Decoder(), Encoder(), 4).to(device)
    x = torch.zeros(2, device=device)
    draws = posterior.sample(3, x)
    assert draws["z"].device.type == device
    assert posterior.log_density(draws, x, num_batches=2).device.type == device
    assert posterior.expectation(lambda z: z["z"], x).device.type == device
    assert posterior.elbo_interval(x, num_batches=2, num_replicates=2).lower.device.type == device
    assert Predictive(posterior.model, guide=posterior, num_samples=3, parallel=True)(x)["z"].device.type == device
    Trace_ELBO().differentiable_loss(posterior.model, posterior, x).backward()
    assert posterior.guide.net.bias.grad.device.type == device


def test_training_mode_reaches_model_and_guide():
    posterior = ImportanceResampledGuide(Decoder(), Encoder(), 4)
    posterior.eval()
    assert not posterior.model.training and not posterior.guide.training


# Autoguides inside


def regression(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, s))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def autoguide_list(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["w", "s"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["z"])))
    return guide


def structured_autoguide(model):
    kinds = {"w": "normal", "s": "normal", "z": "mvn"}
    return autoguide.AutoStructured(model, conditionals=kinds, dependencies={"z": {"w": "linear"}})


AUTOGUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoNormalizingFlow": lambda model: autoguide.AutoNormalizingFlow(model, planar),
    "AutoGuideList": autoguide_list,
    "AutoStructured": structured_autoguide,
    "AutoGaussian": autoguide.AutoGaussian,
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "AutoDelta": autoguide.AutoDelta,
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
    "AutoRegressiveMessenger": autoguide.AutoRegressiveMessenger,
}


@pytest.mark.parametrize("first", ["forward", "sample", "parallel"])
@pytest.mark.parametrize("name", AUTOGUIDES)
def test_autoguides(name, first):
    """Whatever is asked of it first, also before the autoguide has seen its model."""
    posterior = ImportanceResampledGuide(regression, AUTOGUIDES[name](regression), 5)
    x = torch.tensor([0.5, 1.0, -1.0])
    shapes = {"w": (), "s": (), "z": (3,)}

    def forward():
        assert {n: v.shape for n, v in posterior(x).items()} == shapes

    def sample():
        assert {n: v.shape for n, v in posterior.sample(7, x).items()} == {n: (7, *s) for n, s in shapes.items()}

    def parallel():
        for flag in (True, False):
            draws = Predictive(regression, guide=posterior, num_samples=7, parallel=flag)(x)
            assert draws["z"].reshape(7, 3).isfinite().all()
            assert {v.reshape(7, -1).shape[1] for v in (draws["w"], draws["s"])} == {1}

    def elbo():
        loss = Trace_ELBO().differentiable_loss(regression, posterior, x)
        loss.backward()
        gradients = [p.grad for p in posterior.parameters()]
        assert gradients and all(g is not None and g.isfinite().all() for g in gradients)

    def expectation():
        assert posterior.expectation(lambda z: z["z"], x).shape == (3,)

    asked = {f.__name__: f for f in (forward, sample, parallel, elbo, expectation)}
    asked.pop(first)()
    for ask in asked.values():
        ask()


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoDelta])
def test_autoguide_shapes_do_not_depend_on_the_first_call(kind):
    """A first call inside a plate of draws must not give the guide's parameters that plate's dimension."""
    x = torch.tensor([0.5, 1.0, -1.0])
    shapes = []
    for first in ("forward", "sample", "plate"):
        posterior = ImportanceResampledGuide(regression, kind(regression), 5)
        if first == "forward":
            posterior(x)
        elif first == "sample":
            posterior.sample(3, x)
        else:
            with pyro.plate("mine", 6, dim=-2):
                posterior(x)
        shapes.append({n: p.shape for n, p in posterior.named_parameters()})
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]


@pytest.mark.parametrize("vectorize", [None, False])
def test_flow_without_an_inverse(vectorize):
    """Its density is known at its own draws, and only until its next draw."""
    guide = autoguide.AutoNormalizingFlow(regression, planar)
    x = torch.tensor([0.5, 1.0, -1.0])
    posterior = ImportanceResampledGuide(regression, guide, 5, vectorize_particles=vectorize)
    assert {n: v.shape for n, v in posterior.sample(7, x).items()} == {"w": (7,), "s": (7,), "z": (7, 3)}
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(regression, posterior, x)
    pyro.set_rng_seed(1)
    elbo = ImportanceWeightedELBO(5, vectorize_particles=vectorize)
    assert loss == pytest.approx(elbo.loss(regression, guide, x), rel=1e-5)


def test_autoguide_of_discrete_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDiscreteParallel(poutine.block(model, expose=["c"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["z"])))
    posterior, x = ImportanceResampledGuide(model, guide, 5), torch.tensor([0.5, 1.0, -1.0])
    with pytest.warns(UserWarning, match="ask for enumeration"):
        draw = posterior(x)
    assert {n: v.shape for n, v in draw.items()} == {"c": (3,), "z": (3,)}
    Trace_ELBO().differentiable_loss(model, posterior, x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in posterior.parameters())


def test_autoguide_from_a_state_dict():
    x = torch.tensor([0.5, 1.0, -1.0])
    posterior, other = (ImportanceResampledGuide(regression, autoguide.AutoNormal(regression), 5) for _ in range(2))
    posterior(x), other(x)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(torch.randn_like(parameter))
    other.load_state_dict(posterior.state_dict())
    assert_same_draws(posterior, other, x)
    assert_same_draws(posterior, copy.deepcopy(posterior), x)


# Bad input


@pytest.mark.parametrize("bad", [0, -1])
def test_num_particles_too_small(bad):
    with pytest.raises(ValueError, match="num_particles >= 1"):
        ImportanceResampledGuide(GAMMA.model, GAMMA.guide, bad)


@pytest.mark.parametrize("bad", [True, 2.5, "4", None, torch.tensor([2, 3])])
def test_num_particles_not_a_number(bad):
    with pytest.raises(TypeError, match="num_particles"):
        ImportanceResampledGuide(GAMMA.model, GAMMA.guide, bad)


def test_num_particles_as_other_integers():
    assert ImportanceResampledGuide(GAMMA.model, GAMMA.guide, torch.tensor(4)).num_particles == 4


def test_not_callable():
    with pytest.raises(TypeError, match="model"):
        ImportanceResampledGuide(None, GAMMA.guide)
    with pytest.raises(TypeError, match="guide"):
        ImportanceResampledGuide(GAMMA.model, 3)


def test_bad_numbers_of_draws_and_batches():
    posterior = ImportanceResampledGuide(GAMMA.model, GAMMA.guide, 2)
    for error, bad in ((ValueError, 0), (TypeError, 2.5), (TypeError, True)):
        with pytest.raises(error, match="num_draws"):
            posterior.sample(bad)
        with pytest.raises(error, match="num_batches"):
            posterior.expectation(lambda z: z["z"], num_batches=bad)
        with pytest.raises(error, match="num_batches"):
            posterior.log_density({"z": torch.ones(2)}, num_batches=bad)
        with pytest.raises(error, match="num_batches"):
            posterior.elbo_interval(num_batches=bad)
    with pytest.raises(ValueError, match="num_replicates >= 2"):
        posterior.elbo_interval(num_replicates=1)


def test_latents_that_do_not_match():
    posterior = ImportanceResampledGuide(GAMMA.model, lambda: None, 2)
    for call in (posterior, lambda: posterior.sample(3), posterior.elbo_interval):
        with pytest.raises(ValueError, match="'z' of the model is absent from the guide"):
            call()
    extra = ImportanceResampledGuide(lambda: None, GAMMA.guide, 2)
    with pytest.raises(ValueError, match="'z' of the guide is absent"):
        extra.sample(3)


def test_non_independent_subsample_needs_one_particle():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2) as i:
            pyro.sample("x", dist.Normal(w, 1.0), obs=torch.zeros(10)[i])

    def guide():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'data'"):
        ImportanceResampledGuide(model, guide, 2)()
    assert ImportanceResampledGuide(model, guide, 1).sample(3)["w"].shape == (3,)


def test_clash_with_the_name_of_the_density():
    def model():
        pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.factor("_importance_density_z", torch.tensor(0.0))

    with pytest.raises(ValueError, match="rename it"):
        ImportanceResampledGuide(model, GAMMA.guide, 2)()


def test_elements_counted_from_the_left_need_single_draws():
    """A sum over all dimensions ties the draws of a plate together; that must not go unseen."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z.sum() ** 2 * -0.1)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = ImportanceResampledGuide(model, guide, 2, vectorize_particles=False)
    with pytest.raises(ValueError, match="plate 'draws'"), pyro.plate("draws", 5, dim=-2):
        posterior()
    assert posterior.sample(4)["z"].shape == (4, 3)


def test_errors_leave_the_host_as_it_was():
    """After an error inside the inner run Pyro's handlers and random numbers go on as if nothing had happened."""

    def broken():
        pyro.sample("z", dist.Gamma(2.0, 1.0))
        raise RuntimeError("broken")

    posterior = ImportanceResampledGuide(broken, GAMMA.guide, 2)
    for call in (posterior, lambda: posterior.sample(3), posterior.elbo_interval):
        with pytest.raises(RuntimeError, match="broken"):
            call()
    assert ImportanceWeightedELBO(2).loss(GAMMA.model, GAMMA.guide) is not None


class Autoencoder(torch.nn.Module):
    """Model and guide are its methods, as in many a script."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        self.decoder.bias.data.fill_(0.3)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.unsqueeze(-1)).squeeze(-1), 1.0))


def test_holds_the_modules_that_its_model_and_guide_are_methods_of():
    vae = Autoencoder()
    for posterior in (
        ImportanceResampledGuide(vae.model, vae.guide, 3),
        ImportanceResampledGuide(poutine.scale(vae.model, scale=1.0), vae.guide, 3),
    ):
        assert {id(p) for p in posterior.parameters()} == {id(p) for p in vae.parameters()}
        assert len(posterior.state_dict()) == 4
        posterior.eval()
        assert not vae.encoder.training
        vae.train()
    copied = copy.deepcopy(posterior.to(torch.float64))
    draws = copied.sample(5, torch.zeros(2, dtype=torch.float64))["z"]
    assert draws.dtype == torch.float64 == vae.decoder.weight.dtype
    assert copied.guide.__self__ is not vae and copied.guide.__self__ in list(copied.modules())
    with torch.no_grad():
        copied.guide.__self__.encoder.bias += 100.0
    assert posterior.sample(50, torch.zeros(2, dtype=torch.float64))["z"].abs().max() < 50.0
    other = Autoencoder().double()
    ImportanceResampledGuide(other.model, other.guide, 3).load_state_dict(
        ImportanceResampledGuide(vae.model, vae.guide, 3).state_dict()
    )
    assert torch.equal(other.encoder.weight, vae.encoder.weight)


def test_a_module_is_held_once():
    modules = Decoder(), Encoder()
    posterior = ImportanceResampledGuide(*modules, 3)
    assert len(list(posterior.parameters())) == sum(len(list(m.parameters())) for m in modules)
    assert not any(name.startswith("owners") for name in posterior.state_dict())


def test_parameters_from_outside_reach_every_method():
    """poutine.substitute and the like act on parameters; samples stay hidden."""

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.01))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = ImportanceResampledGuide(model, guide, 2)
    posterior()
    with poutine.substitute(data={"loc": torch.tensor(3.0)}), poutine.mask(mask=False), poutine.trace() as seen:
        found = posterior.sample(4)["z"].mean(), posterior.expectation(lambda z: z["z"]), posterior()["z"]
    assert all(2.8 < value < 3.2 for value in found)
    assert [n for n, s in seen.trace.nodes.items() if s["type"] == "sample" and n != "z"] == ["_importance_density_z"]


def test_all_draws_of_a_call_are_of_one_minibatch(monkeypatch):
    """Whatever the number of passes that they take."""
    x = torch.arange(100.0)

    def model():
        with pyro.plate("data", 100, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(x[rows], 0.01))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide():
        with pyro.plate("data", 100, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows], 0.01))

    for vectorize in (True, False):
        posterior = ImportanceResampledGuide(model, guide, 3, vectorize_particles=vectorize)
        monkeypatch.setattr(guide_module, "NUMBERS_PER_PASS", 3 * 6 * 5)
        draws = posterior.sample(23)["z"]
        assert draws.shape == (23, 2) and (draws.round() == draws[0].round()).all()
        mean = posterior.expectation(lambda z: z["z"], num_batches=10)
        assert torch.allclose(mean, mean.round(), atol=0.05)
    assert not torch.equal(posterior.sample(1)["z"].round(), posterior.sample(1)["z"].round())  # another call, another


def test_predictions_at_other_inputs():
    """Draws know the data; the model then runs at new inputs without any."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    def guide(x, y=None):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    posterior = ImportanceResampledGuide(model, guide, 100)
    draws = posterior.sample(20_000, x, y)
    for parallel in (True, False):
        few = {"w": draws["w"][: 2000 if parallel else 200]}
        new = Predictive(model, posterior_samples=few, parallel=parallel)(torch.tensor([-1.0, 3.0, 0.0]))["y"]
        assert_mean(
            new, torch.tensor([-1.0, 3.0, 0.0]) * posterior.expectation(lambda z: z["w"], x, y, num_batches=500)
        )
    with pytest.raises(ValueError, match=r"called without its data(?s:.*)posterior_samples=posterior.sample"):
        posterior(x)


class SelfContained(Autoencoder):
    """Holds its own posterior, as a LightningModule might."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(3))
        self.posterior = ImportanceResampledGuide(self.model, self.guide, 4)


def test_a_posterior_may_be_a_part_of_its_owner():
    vae = SelfContained()
    assert not vae.eval().posterior.training and vae.train().posterior.training
    assert not vae.posterior.eval().training and not vae.encoder.training
    assert vae.to(torch.float64).decoder.weight.dtype == torch.float64
    assert "SelfContained" in repr(vae)
    other = SelfContained().double()
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.encoder.weight, vae.encoder.weight)
    assert len(list(vae.posterior.parameters())) == len(list(vae.parameters())) == 4
    assert vae.posterior.sample(5, torch.zeros(2, dtype=torch.float64))["z"].shape == (5, 2)
    copied = copy.deepcopy(vae)
    assert copied.posterior.model.__self__ is copied


def test_buffers_that_do_not_change_are_not_written_to():
    """They may be views of one number, or part of a graph that waits for its backward pass."""
    vae = SelfContained()
    waiting = (vae.decoder.weight * vae.scale).sum()
    ImportanceWeightedELBO(num_particles=3).loss(vae.model, vae.guide, torch.zeros(2))
    waiting.backward()
    assert (vae.decoder.weight.grad == 3.0).all()
