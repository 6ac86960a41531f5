# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Expectations under the resampled guide by weighting."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_iwae import ImportanceResampledGuide, LogWeights
from pyro_iwae.exact import Bernoulli, Gamma
from pyro_iwae.expectation import WeightedMean
from pyro_iwae.plates import IndependentPlate, Layout
from tests.statistics import assert_mean, assert_mean_below, assert_same_mean

K = 6
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def local_model(x=X):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(z.unsqueeze(-1).expand((*z.shape, 2)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(v.sum(-1), 1.0), obs=x)


def local_guide(x=X):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.5 * x, 1.0))
        pyro.sample("v", dist.Normal(z.unsqueeze(-1).expand((*z.shape, 2)), 1.0).to_event(1))


def global_model(x=X):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_guide(x=X):
    w = pyro.sample("w", dist.Normal(0.2, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * w, 1.0))


def nested_model(x=X):
    with pyro.plate("rows", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))


def nested_guide(x=X):
    with pyro.plate("rows", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.5, 1.0))


def sequential_model(x=X):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def sequential_guide(x=X):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(0.5, 1.0))


def by_hand(model, guide, depth, kept):
    """K particles on the same noise: (values without the dims of a trace, weights (K, *kept dims))."""
    with pyro.plate("particles", K, dim=-depth - 1):
        guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    log_w = torch.zeros((K,) + (1,) * depth)
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample" and site["log_prob"].dim():
                log_prob = site["log_prob"]
                summed = [d for d in range(-depth, 0) if d not in kept]
                log_w = log_w + sign * (log_prob.sum(summed, keepdim=True) if summed else log_prob)
    return {n: s["value"] for n, s in guide_trace.nodes.items() if s["type"] == "sample"}, log_w.softmax(0)


FUNCTIONS = {  # of independent elements: what is asked, and where the weights belong
    "itself": (lambda z: z["z"], lambda w: w),
    "square": (lambda z: z["z"] ** 2, lambda w: w),
    "of two sites": (lambda z: z["z"] * z["v"].mean(-1), lambda w: w),
    "event": (lambda z: z["v"], lambda w: w.unsqueeze(-1)),
    "matrix": (lambda z: z["v"].unsqueeze(-1) * z["v"].unsqueeze(-2), lambda w: w[..., None, None]),
    "event in front": (lambda z: z["v"].transpose(-1, -2), lambda w: w.unsqueeze(1)),
    "both sides": (lambda z: torch.stack([z["v"], z["v"] ** 2], 1), lambda w: w[:, None, :, None]),
    "event as large as the plate": (lambda z: z["z"].unsqueeze(-1) * X, lambda w: w.unsqueeze(-1)),
    "the same in front": (lambda z: z["z"].unsqueeze(1) * X.unsqueeze(-1), lambda w: w.unsqueeze(1)),
    "indicator": (lambda z: (z["z"] > 0.3).double(), lambda w: w),
    "boolean": (lambda z: z["z"] > 0.3, lambda w: w),
    "rounded": (lambda z: z["z"].round().long(), lambda w: w),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_element_by_its_own_weights(name, double):
    fn, place = FUNCTIONS[name]
    posterior = ImportanceResampledGuide(local_model, local_guide, K)
    pyro.set_rng_seed(1)
    values, weights = by_hand(local_model, local_guide, 1, {-1})
    pyro.set_rng_seed(1)
    result = posterior.expectation(fn, num_batches=1)
    torch.testing.assert_close(result, (place(weights) * fn(values)).sum(0))


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z["w"],
        lambda z: z["z"],
        lambda z: z["z"].sum(-1),
        lambda z: z["z"].flip(-1) * z["w"].unsqueeze(-1),
        lambda z: z["w"] > 0.0,
        lambda z: torch.ones(K),
    ],
)
def test_one_weight_for_a_joint_posterior(fn, double):
    """Then fn may mix what it likes."""
    posterior = ImportanceResampledGuide(global_model, global_guide, K)
    pyro.set_rng_seed(1)
    values, weights = by_hand(global_model, global_guide, 1, {})
    pyro.set_rng_seed(1)
    result = posterior.expectation(fn, num_batches=1)
    values["w"] = values["w"].squeeze(-1)
    asked = fn(values)
    torch.testing.assert_close(result, (weights.reshape((K,) + (1,) * (asked.dim() - 1)) * asked).sum(0))


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e7])
def test_small_and_large_values(size, double):
    """Which dimension is the plate's must not depend on the unit of the values."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.1), obs=torch.tensor([-3.0, 0.0, 6.0]))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    posterior = ImportanceResampledGuide(model, guide, 200)

    def at(fn):
        pyro.set_rng_seed(1)
        return posterior.expectation(fn, num_batches=1)

    at(lambda z: z["z"])  # looks at the model
    expected = at(lambda z: z["z"]).mT
    assert torch.allclose(at(lambda z: size * z["z"].mT) / size, expected)


def test_small_values_that_mix_beside_large_ones():
    posterior = ImportanceResampledGuide(local_model, local_guide, 50)
    sizes = torch.ones(len(X))
    sizes[0] = 1e6
    with pytest.raises(ValueError, match="apart"):
        posterior.expectation(lambda z: z["z"] * sizes + z["z"].flip(-1))


def test_nested_plates(double):
    posterior = ImportanceResampledGuide(nested_model, nested_guide, K)
    pyro.set_rng_seed(1)
    values, weights = by_hand(nested_model, nested_guide, 2, {-1, -2})
    pyro.set_rng_seed(1)
    result = posterior.expectation(lambda z: z["z"].unsqueeze(1) ** 2, num_batches=1)
    torch.testing.assert_close(result, (weights * values["z"] ** 2).sum(0).unsqueeze(0))


def test_sequential_plate(double):
    """Each site by the weights of its element."""
    posterior = ImportanceResampledGuide(sequential_model, sequential_guide, K)
    with pyro.plate("particles", K, dim=-1):
        pyro.set_rng_seed(1)
        z = [dist.Normal(0.5, 1.0).expand([K]).sample() for _ in range(3)]
    for i in range(3):
        log_w = dist.Normal(0.0, 1.0).log_prob(z[i]) + dist.Normal(z[i], 1.0).log_prob(X[i])
        weights = (log_w - dist.Normal(0.5, 1.0).log_prob(z[i])).softmax(0)
        pyro.set_rng_seed(1)
        result = posterior.expectation(lambda values, i=i: values[f"z_{i}"], num_batches=1)
        torch.testing.assert_close(result, (weights * z[i]).sum())
    with pytest.raises(ValueError, match="'data'"):
        posterior.expectation(lambda values: values["z_0"] + values["z_1"])


def test_sequential_particles(double):
    """One by one, on noise in another order: the same mean."""
    posterior = ImportanceResampledGuide(global_model, global_guide, 2, vectorize_particles=False)
    other = ImportanceResampledGuide(global_model, global_guide, 2)
    draws = torch.stack([posterior.expectation(lambda z: z["w"], num_batches=1) for _ in range(500)])
    others = torch.stack([other.expectation(lambda z: z["w"], num_batches=1) for _ in range(500)])
    assert_same_mean(draws, others)


def test_batches_are_averaged(double):
    posterior = ImportanceResampledGuide(local_model, local_guide, K)
    pyro.set_rng_seed(1)
    singles = [posterior.expectation(lambda z: z["z"], num_batches=1) for _ in range(4)]
    pyro.set_rng_seed(1)
    torch.testing.assert_close(posterior.expectation(lambda z: z["z"], num_batches=4), sum(singles) / 4)


def gammas(size):
    """Independent copies of the Gamma example in a plate: (model, guide)."""

    def program(shape):
        def sites():
            with pyro.plate("copies", size):
                pyro.sample("z", dist.Gamma(shape, 1.0))

        return sites

    return program(2.0), program(1.0)


@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_unbiased_for_the_mean_of_the_resampled_guide(num_particles):
    posterior = ImportanceResampledGuide(*gammas(50_000), num_particles)
    mean = posterior.expectation(lambda z: z["z"], num_batches=1)
    assert mean.shape == (50_000,)
    assert_mean(mean, Gamma(shape=1.0).resampled_mean(num_particles))


def test_unbiased_for_a_discrete_latent():
    size = 50_000

    def model():
        with pyro.plate("copies", size):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.full((size,), 2.0))

    def guide():
        with pyro.plate("copies", size):
            pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.5)))

    posterior = ImportanceResampledGuide(model, guide, 5)
    assert_mean(posterior.expectation(lambda z: z["z"], num_batches=1), Bernoulli().resampled(5))


def test_enumerated_sites():
    """They are among the values, as they are among the draws of sample."""
    size = 20_000

    def model():
        with pyro.plate("copies", size):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(3.0 * c, 1.0), obs=torch.full((size,), 2.0))

    def guide():
        with pyro.plate("copies", size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = ImportanceResampledGuide(model, guide, 3)
    assert set(posterior.sample(1)) == {"z", "c"}
    assert_mean(posterior.expectation(lambda z: z["c"], num_batches=1), 0.657619)


def test_less_noise_than_resampling():
    """The law of total variance: a draw's variance is that of the weighted mean and more."""
    posterior = ImportanceResampledGuide(*gammas(20_000), 5)
    weighted = posterior.expectation(lambda z: z["z"], num_batches=1) - 5 / 3
    draws = posterior.sample(1)["z"][0] - 5 / 3
    assert_mean_below(weighted**2 - draws**2, 0.0)


def test_has_no_graph_and_leaves_no_sites():
    posterior = ImportanceResampledGuide(*gammas(3), 5)
    trace = poutine.trace(posterior.expectation).get_trace(lambda z: z["z"])
    assert not trace.nodes["_RETURN"]["value"].requires_grad
    assert [n for n, s in trace.nodes.items() if s["type"] == "sample"] == []


def test_sees_the_model_s_latents_only():
    def guide():
        u = pyro.sample("u", dist.Exponential(1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u))

    seen = []
    ImportanceResampledGuide(Gamma(shape=1.0).model, guide, 5).expectation(lambda z: seen.append(set(z)) or z["z"])
    assert all(names == {"z"} for names in seen)


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z["z"].flip(-1),
        lambda z: z["z"].mean(-1),
        lambda z: z["z"] - z["z"].mean(-1, keepdim=True),
        lambda z: z["z"].cumsum(-1),
        lambda z: z["z"][..., :2],
        lambda z: z["z"].mean(-1, keepdim=True),
        lambda z: z["z"][..., 0],
    ],
    ids=["flip", "mean", "centred", "sum so far", "some", "mean kept", "one"],
)
def test_function_that_mixes_elements(fn):
    posterior = ImportanceResampledGuide(local_model, local_guide, K)
    with pytest.raises(ValueError, match="'data'"):
        posterior.expectation(fn)


@pytest.mark.parametrize(
    "fn",
    [lambda z: z["z"].mean(0), lambda z: z["z"].sum(), lambda z: 1.0, lambda z: z, lambda z: z["z"][:2]],
    ids=["mean", "total", "number", "dict", "some"],
)
def test_function_that_drops_the_particles(fn):
    posterior = ImportanceResampledGuide(local_model, local_guide, K)
    with pytest.raises(ValueError, match=rf"\({K}, ...\)"):
        posterior.expectation(fn)


# Which dimension of a result is which plate's must not rest on particles that happen to be alike

DATA = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
DRAWN = {"counts": lambda shape: torch.poisson(torch.full(shape, 0.3)), "numbers": torch.randn}
SQUARE = {  # results with other dimensions of the same sizes as the plates
    "value": lambda z: z,
    "behind": lambda z: torch.stack([z, 2.0 * z], -1),
    "in front": lambda z: torch.stack([z, 2.0 * z], 1),
    "large": lambda z: (z.unsqueeze(-1) > torch.tensor([1.0, 0.5])).double(),
}
PLACE = {"behind": -1, "large": -1, "in front": 1}  # where such a result has a dimension that is not a plate's


TABLE = Layout((IndependentPlate("rows", -2, 2, 1.0), IndependentPlate("data", -1, 2, 1.0)))


def mean_of(fn, z, chunk_size):
    """The mean of fn over particles of standard Gaussian latents, chunk by chunk; and their weights."""
    with poutine.trace() as tracer, pyro.plate("rows", 2, dim=-2), pyro.plate("data", 2, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    log_weights = dist.Normal(1.5 * z, 1.0).log_prob(DATA)
    mean = WeightedMean(lambda values: fn(values["z"]))
    for some, column in zip(z.split(chunk_size), log_weights.split(chunk_size), strict=True):
        weights = LogWeights(column, ("rows", "data"))
        mean.add({"z": some}, {"z": tracer.trace.nodes["z"]}, weights, TABLE)
    return mean.value, log_weights.softmax(0)


@pytest.mark.parametrize("chunk_size", [2, 4, 6])
@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("family", DRAWN)
def test_particles_that_are_alike(family, name, chunk_size, double):
    """Right, or refused: particles of a chunk that all give one value do not show what belongs where."""
    fn, refused = SQUARE[name], 0
    for seed in range(100):
        pyro.set_rng_seed(seed)
        z = DRAWN[family]((K, 2, 2))
        try:
            found, weights = mean_of(fn, z, chunk_size)
        except ValueError as error:
            assert chunk_size < K and "pass a larger chunk_size" in str(error)
            refused += 1
            continue
        weights = weights.unsqueeze(PLACE[name]) if name in PLACE else weights
        torch.testing.assert_close(found, (weights * fn(z)).sum(0))
    assert refused <= 50


def test_chunks_that_show_nothing_are_refused(double):
    """One value in each chunk, another in the next: each way to lay the weights along the result gives another mean."""
    z = torch.cat([torch.zeros(2, 2, 2), torch.ones(4, 2, 2)])
    with pytest.raises(ValueError, match="pass a larger chunk_size"):
        mean_of(SQUARE["behind"], z, 2)
    found, weights = mean_of(SQUARE["value"], z, 2)  # there is one way only
    torch.testing.assert_close(found, (weights * z).sum(0))


def test_coin_in_a_minibatch_of_a_sequential_plate(double):
    """All but one particle alike: the two elements of the sequential plate must not be taken for each other."""

    def program(is_model):
        data, inner = pyro.plate("data", 2, dim=-2), pyro.plate("inner", 1, dim=-1)
        for i in pyro.plate("rows", 2):
            with data:
                y = pyro.sample(f"y_{i}", dist.Normal(0.0, 1.0))
                with inner:
                    z = pyro.sample(f"z_{i}", dist.Bernoulli(torch.tensor(0.5)))
                if is_model:
                    pyro.sample(f"x_{i}", dist.Normal(y + 1.5 * z, 1.0), obs=torch.tensor([[0.5 + i], [1.0 - i]]))

    posterior = ImportanceResampledGuide(lambda: program(True), lambda: program(False), 5)
    for seed in range(100):
        pyro.set_rng_seed(seed)
        calls = []
        found = posterior.expectation(lambda z, calls=calls: calls.append(z) or z["z_1"], num_batches=1)
        y, z = calls[0]["y_1"], calls[0]["z_1"]
        weights = dist.Normal(y + 1.5 * z, 1.0).log_prob(torch.tensor([[1.5], [0.0]])).softmax(0)
        torch.testing.assert_close(found, (weights * z).sum(0))


def normal_above(low):
    """A normal latent of which the model excludes what lies below: (model, guide)."""

    def guide():
        return pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    def model():
        pyro.factor("above", torch.where(guide() > low, 0.0, -math.inf))

    return model, guide


@pytest.mark.parametrize("options", [{}, {"chunk_size": 5}, {"vectorize_particles": False}])
def test_a_function_that_is_not_finite_where_particles_are_impossible(options):
    """E[log z | z > 0] of a normal, -(gamma + log 2) / 2, though half of the particles have no logarithm."""
    posterior = ImportanceResampledGuide(*normal_above(0.0), num_particles=20, **options)
    found = torch.stack([posterior.expectation(lambda z: z["z"].log(), num_batches=1) for _ in range(100)])
    assert_mean(found, -(0.5772156649 + math.log(2.0)) / 2.0)
    once = posterior.expectation(lambda z: torch.where(z["z"] > 0.0, math.inf, 0.0), num_batches=1)
    assert float(once) == math.inf  # what is infinite where there is weight stays so
