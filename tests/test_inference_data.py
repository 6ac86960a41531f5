# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What ArviZ is given: draws, weights and log likelihood against closed forms and densities by hand."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from torch.distributions import Bernoulli, Categorical, Normal

from pyro_iwae import ImportanceResampledGuide, to_inference_data
from pyro_iwae.exact import HierarchicalGaussian
from tests.statistics import assert_mean, limit

az = pytest.importorskip("arviz")
X = torch.tensor([0.5, 1.0, 1.5, -0.4], dtype=torch.float64)
OLD = az.__version__.startswith("0.")


def model(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def guide(x):
    pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), 0.6))


def group(found, name):
    """A group's variables, as an xarray dataset in 0.x and 1.x alike."""
    return found[name] if OLD else found[name].to_dataset()


def flat(found, name, site):
    """Draws of a site, chains after one another."""
    value = group(found, name)[site].values
    return torch.as_tensor(value.reshape(-1, *value.shape[2:]))


def has(found, name):
    return name in (found.groups() if OLD else found.children)


def test_conjugate_draws_weights_and_log_likelihood():
    posterior = ImportanceResampledGuide(model, guide, num_particles=50)
    found = to_inference_data(posterior, X, num_draws=2000)
    mu = flat(found, "posterior", "mu")
    assert group(found, "posterior")["mu"].dims == ("chain", "draw")
    assert group(found, "posterior")["mu"].shape == (4, 500)
    mean, variance = X.sum() / 5, 1 / 5
    assert_mean(mu, mean)
    assert_mean((mu - mean) ** 2, variance)

    each = Normal(mu.unsqueeze(1), 1.0).log_prob(X)
    log_p = Normal(0.0, 1.0).log_prob(mu) + each.sum(1)
    assert torch.allclose(flat(found, "log_likelihood", "x"), each)
    assert torch.allclose(flat(found, "sample_stats", "lp"), log_p)
    log_q = Normal(mean, 0.6).log_prob(mu)
    assert torch.allclose(flat(found, "sample_stats", "log_weight"), log_p - log_q)
    assert group(found, "log_likelihood")["x"].dims == ("chain", "draw", "rows")
    assert np.array_equal(group(found, "observed_data")["x"].values, X.numpy())
    assert found.attrs["inference_library"] == "pyro_iwae"
    assert found.attrs["num_particles"] == 50


def test_loo_and_summary_are_those_of_the_conjugate_model():
    posterior = ImportanceResampledGuide(model, guide, num_particles=50)
    found = to_inference_data(posterior, X, num_draws=4000)
    rest = X.sum() - X  # of each point, the others
    exact = Normal(rest / 4, math.sqrt(1.0 + 1 / 4)).log_prob(X)
    loo = az.loo(found, pointwise=True)
    each = torch.as_tensor(np.asarray(loo.loo_i if OLD else loo.elpd_i))
    inverse = (-flat(found, "log_likelihood", "x")).exp()
    error = inverse.std(0) / inverse.mean(0) / math.sqrt(len(inverse))  # of log mean, by the delta method
    assert bool(((each - exact).abs() < limit(4000, 4) * error).all())
    table = az.summary(found, round_to="none") if OLD else az.summary(found, round_to=None)
    mean = float(table.loc["mu", "mean"])
    assert abs(mean - float(X.sum() / 5)) < limit(4000) * math.sqrt(0.2 / 4000)
    assert abs(float(table.loc["mu", "sd"]) - math.sqrt(0.2)) < limit(4000) * math.sqrt(0.2 / 8000)


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ's own
def test_plots_run_on_it():
    import matplotlib.pyplot as plt

    found = to_inference_data(ImportanceResampledGuide(model, guide, num_particles=5), X, num_draws=200)
    if OLD:
        axes = az.plot_forest(found, var_names=["mu"])
        assert len(axes) == 1
        az.plot_posterior(found)
    else:
        az.plot_forest(found, var_names=["mu"])
        az.plot_dist(found)
    plt.close("all")


def test_plates_name_dimensions_in_front_of_events():
    data = torch.arange(24.0).reshape(3, 4, 2) / 10.0

    def nested(x):
        with pyro.plate("inner", 4, dim=-1) as inner, pyro.plate("outer", 3, dim=-2):
            pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            both = pyro.sample("both", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
            pyro.sample("x", dist.Normal(both, 1.0).to_event(1), obs=x)
        with pyro.plate("alone", 4, dim=-2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.ones(4, 1))
        assert len(inner) == 4

    def of_nested(x):
        with pyro.plate("inner", 4, dim=-1), pyro.plate("outer", 3, dim=-2):
            pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("both", dist.MultivariateNormal(x / 2, 0.6 * torch.eye(2)))

    posterior = ImportanceResampledGuide(nested, of_nested, num_particles=5)
    names = {"inner": ["a", "b", "c", "d"]}
    found = to_inference_data(
        posterior, data, num_draws=8, num_chains=2, coords=names, dims={"both": ["outer", "inner", "axis"]}
    )
    both, pair = group(found, "posterior")["both"], group(found, "posterior")["pair"]
    assert both.dims == ("chain", "draw", "outer", "inner", "axis")
    assert both.shape == (2, 4, 3, 4, 2)
    assert pair.dims[:4] == ("chain", "draw", "outer", "inner")
    assert list(both["inner"].values) == ["a", "b", "c", "d"]
    assert list(both["outer"].values) == [0, 1, 2]
    likelihood = group(found, "log_likelihood")
    assert likelihood["x"].dims == ("chain", "draw", "outer", "inner")
    assert likelihood["y"].dims[2] == "alone"
    expected = Normal(flat(found, "posterior", "both"), 1.0).log_prob(data).sum(-1)
    assert torch.allclose(flat(found, "log_likelihood", "x"), expected, atol=1e-5)
    stats = group(found, "sample_stats")["log_weight"]
    assert stats.dims == ("chain", "draw", "outer", "inner")
    assert group(found, "observed_data")["x"].dims[:2] == ("outer", "inner")
    # elements apart, without the site that none of the latents reaches
    log_p = expected + Normal(0.0, 1.0).log_prob(flat(found, "posterior", "both")).sum(-1)
    log_q = Normal(data / 2, math.sqrt(0.6)).log_prob(flat(found, "posterior", "both")).sum(-1)
    assert torch.allclose(torch.as_tensor(stats.values.reshape(8, 3, 4)), log_p - log_q, atol=1e-4)
    pair_p = Normal(0.0, 1.0).log_prob(flat(found, "posterior", "pair")).sum((-1, -2, -3))
    lp = log_p.sum((-1, -2)) + pair_p + 4 * Normal(0.0, 1.0).log_prob(torch.tensor(1.0))
    assert torch.allclose(flat(found, "sample_stats", "lp"), lp, atol=1e-3)


def loop(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    for i in pyro.plate("rows", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])


def test_a_sequential_plate_gives_a_point_for_each_site():
    posterior = ImportanceResampledGuide(loop, guide, num_particles=5)
    found = to_inference_data(posterior, X, num_draws=16)
    mu = flat(found, "posterior", "mu")
    for i in range(4):
        assert torch.allclose(flat(found, "log_likelihood", f"x_{i}"), Normal(mu, 1.0).log_prob(X[i]))
    log_p = Normal(0.0, 1.0).log_prob(mu) + Normal(mu.unsqueeze(1), 1.0).log_prob(X).sum(1)
    assert torch.allclose(flat(found, "sample_stats", "lp"), log_p)


def test_one_by_one_is_the_same():
    posterior = ImportanceResampledGuide(model, guide, num_particles=5, vectorize_particles=False)
    found = to_inference_data(posterior, X, num_draws=16)
    mu = flat(found, "posterior", "mu")
    each = Normal(mu.unsqueeze(1), 1.0).log_prob(X)
    assert torch.allclose(flat(found, "log_likelihood", "x"), each)
    log_p = Normal(0.0, 1.0).log_prob(mu) + each.sum(1)
    assert torch.allclose(flat(found, "sample_stats", "log_weight"), log_p - Normal(X.sum() / 5, 0.6).log_prob(mu))


def test_more_draws_than_one_pass_takes():
    posterior = ImportanceResampledGuide(model, guide, num_particles=2)
    found = to_inference_data(posterior, X, num_draws=1100, num_chains=1)
    mu = flat(found, "posterior", "mu")
    assert len(mu) == 1100
    assert torch.allclose(flat(found, "log_likelihood", "x"), Normal(mu.unsqueeze(1), 1.0).log_prob(X))


@pytest.mark.parametrize("plate_particles", [None, {"data": 8}])
def test_a_hierarchy(plate_particles):
    exact = HierarchicalGaussian(data=X)
    posterior = ImportanceResampledGuide(exact.model, exact.guide, num_particles=8, plate_particles=plate_particles)
    found = to_inference_data(posterior, num_draws=40)
    mu, z = flat(found, "posterior", "mu"), flat(found, "posterior", "z")
    assert group(found, "posterior")["z"].dims == ("chain", "draw", "data")
    each = Normal(z, 1.0).log_prob(X)
    assert torch.allclose(flat(found, "log_likelihood", "x"), each)
    log_p = Normal(0.0, 1.0).log_prob(mu) + (Normal(mu.unsqueeze(1), 1.0).log_prob(z) + each).sum(1)
    assert torch.allclose(flat(found, "sample_stats", "lp"), log_p)
    if plate_particles is None:
        mean = X.sum() / (len(X) + 2)
        log_q = Normal(mean, 1 / math.sqrt(5)).log_prob(mu) + Normal((mean + X) / 2, math.sqrt(0.5)).log_prob(z).sum(1)
        assert torch.allclose(flat(found, "sample_stats", "log_weight"), log_p - log_q)


def test_enumerated_latents_are_drawn_and_given():
    @config_enumerate
    def mixed(x):
        low = pyro.sample("low", dist.Normal(-1.0, 1.0))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.7))
            pyro.sample("x", dist.Normal(low + 2.0 * k, 1.0), obs=x)

    def of_mixed(x):
        pyro.sample("low", dist.Normal(-1.0, 0.5))

    x = X.float()
    found = to_inference_data(ImportanceResampledGuide(mixed, of_mixed, num_particles=5), x, num_draws=40)
    low, k = flat(found, "posterior", "low"), flat(found, "posterior", "k")
    assert k.shape == (40, 4)
    assert group(found, "posterior")["k"].dims == ("chain", "draw", "rows")
    assert set(k.unique().tolist()) == {0.0, 1.0}
    each = Normal(low.unsqueeze(1) + 2.0 * k, 1.0).log_prob(x)
    assert torch.allclose(flat(found, "log_likelihood", "x"), each)
    log_p = Normal(-1.0, 1.0).log_prob(low) + (Bernoulli(0.7).log_prob(k) + each).sum(1)
    assert torch.allclose(flat(found, "sample_stats", "lp"), log_p, atol=1e-5)
    # weighed with k summed out
    both = torch.stack([Normal(low.unsqueeze(1) + 2.0 * j, 1.0).log_prob(x) + math.log((0.3, 0.7)[j]) for j in (0, 1)])
    log_p = Normal(-1.0, 1.0).log_prob(low) + both.logsumexp(0).sum(1)
    log_weight = log_p - Normal(-1.0, 0.5).log_prob(low)
    assert torch.allclose(flat(found, "sample_stats", "log_weight"), log_weight, atol=1e-5)


def test_masked_points_count_nothing():
    seen = torch.tensor([True, False, True, True])

    def masked(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    found = to_inference_data(ImportanceResampledGuide(masked, guide, num_particles=5), X, num_draws=16)
    expected = Normal(flat(found, "posterior", "mu").unsqueeze(1), 1.0).log_prob(X) * seen
    assert torch.allclose(flat(found, "log_likelihood", "x"), expected)


def test_a_scale_and_a_factor_are_no_data():
    def scaled(x):
        with poutine.scale(scale=3.0):
            model(x)
            pyro.factor("f", x.new_tensor(2.0))

    def of_scaled(x):
        with poutine.scale(scale=3.0):
            guide(x)

    found = to_inference_data(ImportanceResampledGuide(scaled, of_scaled, num_particles=5), X, num_draws=16)
    assert list(group(found, "log_likelihood")) == ["x"]
    assert torch.allclose(
        flat(found, "log_likelihood", "x"), Normal(flat(found, "posterior", "mu").unsqueeze(1), 1.0).log_prob(X)
    )


def test_without_data_there_is_no_log_likelihood():
    def prior():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    found = to_inference_data(ImportanceResampledGuide(prior, prior, num_particles=2), num_draws=16)
    assert not has(found, "log_likelihood")
    assert not has(found, "observed_data")
    assert torch.allclose(flat(found, "sample_stats", "log_weight"), torch.zeros(16))


def test_discrete_data_and_latents():
    def counted(y):
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("y", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.9])[k]), obs=y)

    def of_counted(y):
        pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))

    y = torch.tensor(1.0)
    found = to_inference_data(ImportanceResampledGuide(counted, of_counted, num_particles=3), y, num_draws=20)
    k = flat(found, "posterior", "k")
    log_p = Bernoulli(torch.tensor([0.1, 0.5, 0.9])[k]).log_prob(y)
    assert torch.allclose(flat(found, "log_likelihood", "y"), log_p)
    log_q = Categorical(torch.tensor([0.2, 0.3, 0.5])).log_prob(k)
    assert torch.allclose(flat(found, "sample_stats", "log_weight"), log_p - math.log(3) - log_q)


def test_a_guide_of_unknown_density_gives_the_rest():
    pyro.set_rng_seed(0)

    def two(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu.sum(-1), 1.0), obs=x)

    def opaque(x):
        aux = pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Normal(aux.unsqueeze(-1) * torch.ones(2), 1.0).to_event(1))

    posterior = ImportanceResampledGuide(two, opaque, num_particles=5)
    with pytest.warns(UserWarning, match="lp and log_weight are left out: .*aux"):
        found = to_inference_data(posterior, X.float(), num_draws=16)
    assert not has(found, "sample_stats")
    assert flat(found, "log_likelihood", "x").shape == (16, 4)
    known = ImportanceResampledGuide(two, AutoIAFNormal(two), num_particles=5)
    assert has(to_inference_data(known, X.float(), num_draws=16), "sample_stats")


def test_seeded_draws_repeat_and_the_model_is_left_alone():
    posterior = ImportanceResampledGuide(model, AutoNormal(model), num_particles=5)
    posterior.guide(X.float())
    before = {n: v.clone() for n, v in pyro.get_param_store().items()}
    pyro.set_rng_seed(3)
    one = to_inference_data(posterior, X.float(), num_draws=16)
    pyro.set_rng_seed(3)
    two = to_inference_data(posterior, X.float(), num_draws=16)
    assert torch.equal(flat(one, "posterior", "mu"), flat(two, "posterior", "mu"))
    assert all(torch.equal(v, before[n]) for n, v in pyro.get_param_store().items())
    assert flat(one, "posterior", "mu").dtype == torch.float32


def test_a_part_of_the_data_is_refused():
    def subsampled(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x), subsample_size=2) as i:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[i])

    posterior = ImportanceResampledGuide(subsampled, guide, num_particles=5)
    with pytest.raises(ValueError, match=r"plate 'rows' subsampled \(site 'x'\).*Pass all data"):
        to_inference_data(posterior, X, num_draws=16)


def test_what_it_cannot_take(monkeypatch):
    posterior = ImportanceResampledGuide(model, guide, num_particles=5)
    with pytest.raises(TypeError, match=r"ImportanceResampledGuide\(model, guide, num_particles=64\), got function"):
        to_inference_data(guide, X)
    with pytest.raises(ValueError, match="num_chains=4, got 10; write num_draws=8"):
        to_inference_data(posterior, X, num_draws=10)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install pyro-iwae\[arviz\]"):
        to_inference_data(posterior, X)


def test_arviz_1_takes_groups_by_name(monkeypatch):
    """It needs Python 3.12; this is the call that its 1.3.0 was tried with."""

    def from_dict(groups, *, coords, dims, attrs):
        return groups, coords, dims, attrs

    monkeypatch.setitem(sys.modules, "arviz", SimpleNamespace(__version__="1.3.0", from_dict=from_dict))
    posterior = ImportanceResampledGuide(model, guide, num_particles=5)
    groups, coords, dims, attrs = to_inference_data(posterior, X, num_draws=16)
    assert list(groups) == ["posterior", "sample_stats", "log_likelihood", "observed_data"]
    assert groups["log_likelihood"]["x"].shape == (4, 4, 4)
    assert coords == {"rows": [0, 1, 2, 3]}
    assert dims["x"] == ["rows"]
    assert attrs == {"/": {"inference_library": "pyro_iwae", "num_particles": 5}}


def test_one_number_observed_in_a_plate():
    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(0.5, 1.0))

    found = to_inference_data(ImportanceResampledGuide(model, guide, 5), num_draws=40)
    assert found.observed_data["x"].values.tolist() == [1.0, 1.0, 1.0]
    assert dict(found.log_likelihood.sizes)["rows"] == 3


def test_no_latents_no_draws():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="needs latents to draw"):
        to_inference_data(ImportanceResampledGuide(model, lambda: None, 5), num_draws=8)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_names_of_event_dimensions_and_half_precision():
    """Of what was observed, too; NumPy has no bfloat16."""
    x = torch.ones(3, 2, dtype=torch.bfloat16)

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(mu[..., None], torch.ones(2, dtype=x.dtype)).to_event(1), obs=x)

    def guide():
        pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)))

    posterior = ImportanceResampledGuide(model, guide, num_particles=3)
    found = to_inference_data(posterior, num_draws=40, dims={"x": ["rows", "pixel"]})
    assert dict(found.observed_data.sizes) == {"rows": 3, "pixel": 2}
    assert found.posterior["mu"].dtype == np.float32
