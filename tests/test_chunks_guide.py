# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The resampled guide with particles that pass by in chunks: the same law, one particle held."""

import math
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_iwae import ImportanceResampledGuide
from pyro_iwae.resampling import streaming
from tests.noise import SameParticles
from tests.statistics import assert_mean, assert_same_mean, nightly

pytestmark = pytest.mark.usefixtures("double")

K, SIZE = 10, 4
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def local_model(x=X):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + v.sum(-1), 1.0), obs=x)


def local_guide(x=X):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0))
        pyro.sample("v", dist.Normal(0.3 * z.unsqueeze(-1).expand(*z.shape, 2), 0.9).to_event(1))


def once_guide(x=X):
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0))
        pyro.sample("v", dist.Normal(torch.zeros(2), 0.9).to_event(1))


def joint_model():
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(w, 1.0), obs=X)


def joint_guide():
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.8))


def coin_model():
    """One coin in an independent plate, known by enumeration."""
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor([2.0, 0.9]))


def coin_guide():
    with pyro.plate("data", 2):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).sigmoid()))


def enumerated_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + 1.5 * c, 1.0), obs=X)


def enumerated_guide():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0))


def tree_model():
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)


def tree_guide():
    g = pyro.sample("g", dist.Normal(pyro.param("g_loc", torch.tensor(0.2)), 0.8))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(0.5 * g + 0.2, 0.9))


def sequential_model():
    for i in pyro.plate("data", 2):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=X[i])


def sequential_guide():
    for i in pyro.plate("data", 2):
        pyro.sample(f"z_{i}", dist.Normal(0.2, 1.0))


PAIRS = {
    "local": (local_model, local_guide, {}),
    "guide once": (local_model, once_guide, {}),
    "joint": (joint_model, joint_guide, {}),
    "enumerated": (enumerated_model, enumerated_guide, {}),
    "tree": (tree_model, tree_guide, {"plate_particles": {"data": 3}}),
    "sequential": (sequential_model, sequential_guide, {"vectorize_particles": False}),
}


class Noted(ImportanceResampledGuide):
    """Its particles' noise goes by their numbers."""

    @contextmanager
    def _inside(self):
        with super()._inside(), SameParticles(K):
            yield

    @contextmanager
    def _apart(self):
        with super()._apart(), SameParticles(K):
            yield


def both(pair, size=SIZE, kind=ImportanceResampledGuide):
    model, guide, options = PAIRS[pair]
    scale = 3 if "plate_particles" in options else 1
    return [kind(model, guide, K, chunk_size=chunk, **options) for chunk in (None, size * scale)]


def test_streaming_keeps_each_particle_by_its_weight():
    """The law of what is held after each chunk, over many elements at once; weights of 0 are never held."""
    log_weights = torch.tensor([-math.inf, 0.3, -1.0, 1.2, 0.0, -math.inf, 0.7])
    columns = log_weights.unsqueeze(-1).expand(-1, 40_000)
    held, log_sum = torch.zeros(40_000, dtype=torch.long), torch.full((40_000,), -math.inf)
    passed = 0
    for chunk in columns.split([1, 3, 2, 1]):
        index, taken, log_sum = streaming(chunk, log_sum)
        held = torch.where(taken, passed + index, held)
        passed += len(chunk)
        if passed > 1:
            expected = log_weights[:passed].softmax(0)
            assert_mean((held.unsqueeze(-1) == torch.arange(passed)).double(), expected)
            torch.testing.assert_close(log_sum[0], log_weights[:passed].logsumexp(0))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_law_is_that_of_all_particles(size):
    """q_EW(z) of a coin, by enumeration of the guide's draws: 0.650813 for K = 5 (docs: known values)."""
    posterior = ImportanceResampledGuide(coin_model, coin_guide, 5, chunk_size=size)
    draws = posterior.sample(20_000)["z"]
    assert_mean(draws[:, :1], 0.650813)
    assert_same_mean(draws, ImportanceResampledGuide(coin_model, coin_guide, 5).sample(20_000)["z"])


@pytest.mark.parametrize("pair", PAIRS)
def test_draws_have_one_law(pair):
    """First and second moments, of all sites, those that are summed out too."""
    count = 300 if pair == "sequential" else 4000
    draws = [posterior.sample(count) for posterior in both(pair)]
    assert draws[0].keys() == draws[1].keys()
    for name in draws[0]:
        assert draws[0][name].shape == draws[1][name].shape
        for power in (1, 2):
            assert_same_mean(draws[0][name].double() ** power, draws[1][name].double() ** power)


@pytest.mark.parametrize("size", [1, SIZE])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_value_of_a_draw_is_the_bound(pair, size):
    """Of its K particles, whichever is held."""
    values = []
    for posterior in both(pair, size, Noted):
        with torch.no_grad():
            posterior()
            trace = poutine.trace(posterior).get_trace()
            model = poutine.trace(poutine.replay(posterior.model, trace=trace)).get_trace()
        values.append(model.log_prob_sum() - trace.log_prob_sum())
    torch.testing.assert_close(values[1], values[0])


@pytest.mark.parametrize("pair", ["local", "guide once", "joint", "tree"])
def test_the_value_at_latents_that_a_handler_chose(pair):
    """They take the place of the first particle."""
    values = []
    for posterior in both(pair, kind=Noted):
        with torch.no_grad():
            chosen = {n: 0.3 * torch.ones_like(v) for n, v in posterior().items()}
            trace = poutine.trace(poutine.condition(posterior, chosen)).get_trace()
            values.append(trace.nodes["_importance_density_" + next(iter(chosen))]["fn"].log_factor)
    torch.testing.assert_close(values[1], values[0])


@pytest.mark.parametrize("pair", ["local", "guide once", "joint", "enumerated", "tree"])
def test_predictive(pair):
    model = PAIRS[pair][0]
    whole, chunked = both(pair)
    found = [Predictive(model, guide=g, num_samples=4000, parallel=True)() for g in (whole, chunked)]
    for name in found[0].keys() & {"z", "v", "w", "c", "g"}:
        assert_same_mean(found[0][name].double(), found[1][name].double())
    one_by_one = Predictive(model, guide=chunked, num_samples=3)()
    assert one_by_one.keys() == found[1].keys()


def test_the_network_runs_once_for_all_chunks():
    calls = []

    def guide(x=X):
        calls.append(1)
        once_guide()

    posterior = ImportanceResampledGuide(local_model, guide, K, chunk_size=SIZE)
    with torch.no_grad():
        posterior()
        calls.clear()
        posterior()
    assert len(calls) == 1


FUNCTIONS = {
    "local": lambda z: z["z"] ** 2,
    "guide once": lambda z: z["v"].transpose(-1, -2),
    "joint": lambda z: z["w"],
    "tree": lambda z: z["g"],
    "sequential": lambda z: z["z_0"],
}


@pytest.mark.parametrize("pair", FUNCTIONS)
def test_expectation(pair):
    whole, chunked = (posterior.expectation(FUNCTIONS[pair], num_batches=1) for posterior in both(pair, kind=Noted))
    torch.testing.assert_close(chunked, whole)


def test_expectation_by_chunks_of_one():
    """Of one particle fn does not tell its dimensions: two are run then."""
    found = []
    for posterior in both("local", 1):
        found.append(torch.stack([posterior.expectation(FUNCTIONS["local"], num_batches=1) for _ in range(300)]))
    assert_same_mean(*found)


@pytest.mark.parametrize("pair", ["local", "joint", "sequential", pytest.param("tree", marks=pytest.mark.nightly)])
def test_the_interval(pair):
    """Within six standard errors, which chance exceeds once in 10^8."""
    replicates = 30 if pair == "sequential" else nightly(200)
    whole, chunked = (p.elbo_interval(num_batches=4, num_replicates=replicates) for p in both(pair))
    for name in ("lower", "upper"):
        one, other = getattr(whole, name), getattr(chunked, name)
        error = (getattr(whole, f"{name}_error") ** 2 + getattr(chunked, f"{name}_error") ** 2).sqrt()
        assert bool(((one - other).abs() < (8 if pair == "sequential" else 6) * error).all())


@pytest.mark.parametrize("pair", ["local", "joint"])
def test_the_density(pair):
    draws = ImportanceResampledGuide(*PAIRS[pair][:2], K).sample(5)
    found = [p.log_density(draws, num_batches=3) for p in both(pair, kind=Noted)]
    torch.testing.assert_close(found[1], found[0])


def test_draws_have_no_gradient_and_say_so():
    posterior = ImportanceResampledGuide(local_model, local_guide, K, chunk_size=SIZE)
    draw = posterior()
    assert draw["z"].requires_grad
    with pytest.raises(NotImplementedError, match=r"no gradient: .* write ImportanceWeightedELBO\(num_particles=K"):
        draw["z"].sum().backward()
    svi = SVI(local_model, posterior, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
    with pytest.raises(NotImplementedError, match="leave chunk_size out"):
        svi.step()
    chosen = {n: v.detach() + 0.1 for n, v in draw.items()}
    trace = poutine.trace(poutine.condition(posterior, chosen)).get_trace()
    with pytest.raises(NotImplementedError, match="leave chunk_size out"):
        trace.log_prob_sum().backward()


def test_without_parameters_a_draw_is_a_plain_tensor():
    posterior = ImportanceResampledGuide(coin_model, coin_guide, K, chunk_size=SIZE)
    assert not posterior()["z"].requires_grad
    with torch.no_grad():
        assert not ImportanceResampledGuide(local_model, local_guide, K, chunk_size=SIZE)()["z"].requires_grad


def test_an_autoguide():
    """With auxiliary latents, which are no part of a draw."""
    guide = AutoNormal(local_model)
    posterior = ImportanceResampledGuide(local_model, guide, K, chunk_size=SIZE)
    draws = posterior.sample(4000)
    assert draws.keys() == {"z", "v"}
    assert_same_mean(draws["z"], ImportanceResampledGuide(local_model, guide, K).sample(4000)["z"])


def test_a_warning_where_all_are_impossible():
    def fenced():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("fence", torch.where(z > 99.0, 0.0, -math.inf))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = ImportanceResampledGuide(fenced, guide, K, chunk_size=SIZE)
    with pytest.warns(UserWarning, match=r"all 10 particles are impossible .* 3 of 3 .* 'fence'"):
        posterior()


@pytest.mark.parametrize("size, error", [(0, ValueError), (2.5, TypeError)])
def test_options(size, error):
    with pytest.raises(error, match="expected chunk_size"):
        ImportanceResampledGuide(local_model, local_guide, K, chunk_size=size)
