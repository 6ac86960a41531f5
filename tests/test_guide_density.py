# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The density of the resampled guide: estimates at given draws, and bounds on its ELBO."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import biject_to, planar
from pyro.infer import autoguide
from scipy.special import expn

from pyro_iwae import ImportanceResampledGuide
from pyro_iwae.exact import Bernoulli, Gamma, Gaussian
from tests.statistics import assert_mean, assert_mean_above, assert_mean_below
from tests.test_expectation import normal_above

GAMMA = Gamma(shape=1.0)
GAMMA_ELBOS = {2: -0.170167, 3: -0.082464, 5: -0.032573, 10: -0.008907}  # of q_EW
GAMMA_BOUNDS = {2: -0.270363, 5: -0.103320, 10: -0.050833}  # L_K
BRACKETS = {1: (-0.069, 0.037), 4: (-0.048, -0.014), 16: (-0.037, -0.028)}  # M: B_{5,M} and the upper one


def gammas(size):
    """Independent copies of the Gamma example in a plate: (model, guide)."""

    def program(shape):
        def sites():
            with pyro.plate("copies", size):
                pyro.sample("z", dist.Gamma(shape, 1.0))

        return sites

    return program(2.0), program(1.0)


# log_density


@pytest.mark.parametrize("num_batches", [1, 8])
@pytest.mark.parametrize("num_particles", [2, 5])
def test_density_of_the_gamma_example_is_unbiased(num_particles, num_batches, double):
    """It is K z E_{K-1}(z). Each copy in the plate has companions of its own."""
    z = torch.tensor([0.01, 0.3, 1.0, 2.0, 7.0])
    size = 10_000
    posterior = ImportanceResampledGuide(*gammas(5 * size), num_particles)
    log_density = posterior.log_density({"z": z.repeat(1, size)}, num_batches=num_batches)
    assert log_density.shape == (1, 5 * size)
    density = num_particles * z * torch.as_tensor(expn(num_particles - 1, z.numpy()))
    torch.testing.assert_close(density, GAMMA.resampled_log_density(z, num_particles).exp())
    assert_mean(log_density.exp().reshape(size, 5), density)


@pytest.mark.parametrize("num_particles", [2, 3, 10])
def test_density_where_the_model_excludes_a_draw(num_particles):
    """It is 0, though in some batches all companions are excluded, too; elsewhere it is a number."""
    posterior = ImportanceResampledGuide(*normal_above(1.0), num_particles=num_particles)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*impossible")
        found = posterior.log_density({"z": torch.tensor([-1.0, 1.5])})
    assert float(found[0]) == -math.inf and math.isfinite(float(found[1]))


def test_more_batches_make_it_sharper(double):
    z = torch.full((1, 2_000), 1.0)
    posterior = ImportanceResampledGuide(*gammas(2_000), 3)
    once, often = (posterior.log_density({"z": z}, num_batches=m).exp().var() for m in (1, 16))
    assert often < once / 8


@pytest.mark.parametrize("num_particles", [2, 5])
def test_probability_of_a_discrete_draw(num_particles, double):
    size = 20_000
    example = Bernoulli()

    def model():
        with pyro.plate("copies", size):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.full((size,), 2.0))

    def guide():
        with pyro.plate("copies", size):
            pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.5)))

    posterior = ImportanceResampledGuide(model, guide, num_particles)
    draws = torch.tensor([[0.0], [1.0]]).expand(2, size)
    probability = posterior.log_density({"z": draws}, num_batches=1).exp()
    one = example.resampled(num_particles)
    assert_mean(probability.T, torch.stack([1.0 - one, one]))


def structured(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("v", dist.Dirichlet(torch.tensor([1.0, 2.0])))
    with pyro.plate("rows", 3, dim=-2):
        pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("columns", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def structured_guide(x):
    w = pyro.sample("w", dist.Normal(0.5, 1.0))
    pyro.sample("v", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", 3, dim=-2):
        pyro.sample("a", dist.Normal(w.unsqueeze(-1), 1.5).expand((*w.shape, 2)).to_event(1))
        with pyro.plate("columns", 4, dim=-1):
            pyro.sample("b", dist.Normal(0.3 * w, 1.0))


def hierarchical(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchical_guide(x):
    w = pyro.sample("w", dist.Normal(0.5, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * w, 1.0))


def guide_log_density(guide, draws, *args):
    """log q of a hand-written guide at draws, one by one."""
    count = len(next(iter(draws.values())))
    conditioned = [poutine.condition(guide, {n: v[s] for n, v in draws.items()}) for s in range(count)]
    return torch.stack([poutine.trace(c).get_trace(*args).log_prob_sum() for c in conditioned])


@pytest.mark.parametrize("num_draws", [1, 6])
@pytest.mark.parametrize("vectorize", [None, False])
def test_density_of_one_particle_is_the_guide_s(vectorize, num_draws, double):
    """At draws as sample returns them, whatever their shapes."""
    x = torch.randn(3, 4)
    posterior = ImportanceResampledGuide(structured, structured_guide, 1, vectorize_particles=vectorize)
    draws = posterior.sample(num_draws, x)
    log_density = posterior.log_density(draws, x, num_batches=2)
    torch.testing.assert_close(log_density, guide_log_density(structured_guide, draws, x))


def test_density_of_one_particle_in_independent_plates(double):
    """One value for each element."""
    example = Gaussian(data=torch.linspace(-1.0, 1.0, 3), offset=0.5)
    posterior = ImportanceResampledGuide(example.model, example.guide, 1)
    draws = posterior.sample(6)
    q = dist.Normal(example.data / 2.0 + 0.5 * math.sqrt(0.5), math.sqrt(0.5))
    torch.testing.assert_close(posterior.log_density(draws, num_batches=1), q.log_prob(draws["z"]))


def test_density_at_the_exact_posterior(double):
    """All weights are equal: whatever K and the companions, it is the guide's."""
    example = Gaussian(data=torch.linspace(-1.0, 1.0, 3))
    posterior = ImportanceResampledGuide(example.model, example.guide, 7)
    draws = {"z": torch.randn(6, 3)}
    expected = dist.Normal(example.data / 2.0, math.sqrt(0.5)).log_prob(draws["z"])
    torch.testing.assert_close(posterior.log_density(draws, num_batches=2), expected)


def assert_normalised(posterior, log_q, *args):
    """E_q[ density / q ] = 1: one draw of the guide, and companions of its own, at a time."""
    one = ImportanceResampledGuide(posterior.model, posterior.guide, 1)
    ratios = []
    for _ in range(400):
        draw = one.sample(1, *args)
        ratios.append(posterior.log_density(draw, *args, num_batches=1) - log_q(draw))
    assert_mean(torch.cat(ratios).exp(), 1.0)


def test_density_of_global_and_local_latents_is_normalised(double):
    x = torch.tensor([0.5, -1.0, 2.0])
    posterior = ImportanceResampledGuide(hierarchical, hierarchical_guide, 3)
    assert_normalised(posterior, lambda draws: guide_log_density(hierarchical_guide, draws, x), x)


def test_density_in_sequential_plates(double):
    def program(shape):
        def sites():
            for i in pyro.plate("copies", 3):
                pyro.sample(f"z_{i}", dist.Gamma(shape, 1.0))

        return sites

    posterior = ImportanceResampledGuide(program(2.0), program(1.0), 1)
    draws = posterior.sample(5)
    log_density = posterior.log_density(draws, num_batches=1)
    torch.testing.assert_close(log_density, -torch.stack([draws[f"z_{i}"] for i in range(3)], 1))


def mixture(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(3.0 * c + z, 1.0), obs=x)


def test_density_of_enumerated_sites(double):
    """With the guide of one particle: q(z) p(c | z, x) at draws of both, q(z) at draws of z alone."""
    x = torch.tensor([2.0, -1.0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2, 1.0))

    posterior = ImportanceResampledGuide(mixture, guide, 1)
    draws = posterior.sample(50, x)
    assert {n: v.shape for n, v in draws.items()} == {"z": (50, 2), "c": (50, 2)}
    log_q = dist.Normal(0.2, 1.0).log_prob(draws["z"])
    on = math.log(0.3) + dist.Normal(3.0 + draws["z"], 1.0).log_prob(x)
    off = math.log(0.7) + dist.Normal(draws["z"], 1.0).log_prob(x)
    of_class = torch.where(draws["c"] == 1, on, off) - torch.logaddexp(on, off)
    torch.testing.assert_close(posterior.log_density(draws, x), log_q + of_class)
    torch.testing.assert_close(posterior.log_density({"z": draws["z"]}, x), log_q)


def test_density_has_no_graph():
    loc = torch.tensor(0.5, requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(loc, 1.0))

    posterior = ImportanceResampledGuide(model, model, 3)
    assert not posterior.log_density({"z": torch.zeros(2)}).requires_grad
    assert not posterior.elbo_interval().lower.requires_grad


def regression(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, s))
        pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)


X = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
SHAPES = {"w": (), "s": (), "z": (3,)}


def unconstrained(draws):
    """The draws before the guide's transforms, in one vector each, and log |d unconstrained / d value|."""
    supports = {"w": dist.constraints.real, "s": dist.constraints.positive, "z": dist.constraints.positive}
    flat, log_jacobian = [], 0.0
    for name, support in supports.items():
        transform = biject_to(support)
        before = transform.inv(draws[name])
        terms = transform.log_abs_det_jacobian(before, draws[name])
        log_jacobian = log_jacobian - terms.reshape(len(terms), -1).sum(-1)
        flat.append(before.reshape(len(before), -1))
    return torch.cat(flat, -1), log_jacobian


def messenger_log_density(guide, draws):
    """By replay of the guide, which draws its latents as they are."""
    rows = [{n: v[k] for n, v in draws.items()} for k in range(len(draws["w"]))]
    traces = [poutine.trace(poutine.condition(guide, row)).get_trace(X) for row in rows]
    return torch.stack([t.log_prob_sum(lambda name, site: name in SHAPES) for t in traces])


def auto_normal_log_density(guide, draws):
    locs = torch.cat([getattr(guide.locs, n).reshape(-1) for n in SHAPES])
    scales = torch.cat([getattr(guide.scales, n).reshape(-1) for n in SHAPES])
    before, log_jacobian = unconstrained(draws)
    return dist.Normal(locs, scales).log_prob(before).sum(-1) + log_jacobian


def continuous_log_density(guide, draws):
    before, log_jacobian = unconstrained(draws)
    return guide.get_posterior().log_prob(before) + log_jacobian


AUTOGUIDES = {
    "normal": (autoguide.AutoNormal, auto_normal_log_density),
    "diagonal normal": (autoguide.AutoDiagonalNormal, continuous_log_density),
    "multivariate normal": (autoguide.AutoMultivariateNormal, continuous_log_density),
    "low rank normal": (autoguide.AutoLowRankMultivariateNormal, continuous_log_density),
    "autoregressive flow": (autoguide.AutoIAFNormal, continuous_log_density),
    "messenger": (autoguide.AutoNormalMessenger, messenger_log_density),
    "hierarchical messenger": (autoguide.AutoHierarchicalNormalMessenger, messenger_log_density),
}


def trained_a_little(kind):
    guide = kind(regression)
    guide(X)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("num_draws", [1, 5])
@pytest.mark.parametrize("name", AUTOGUIDES)
def test_density_of_one_particle_of_an_autoguide(name, num_draws, double):
    kind, log_density = AUTOGUIDES[name]
    guide = trained_a_little(kind)
    posterior = ImportanceResampledGuide(regression, guide, 1)
    draws = posterior.sample(num_draws, X)
    with torch.no_grad():
        torch.testing.assert_close(posterior.log_density(draws, X), log_density(guide, draws))


def test_density_of_an_autoguide_list(double):
    guide = autoguide.AutoGuideList(regression)
    guide.append(autoguide.AutoNormal(poutine.block(regression, expose=["w", "s"])))
    guide.append(autoguide.AutoNormal(poutine.block(regression, expose=["z"])))
    guide(X)
    posterior = ImportanceResampledGuide(regression, guide, 1)
    draws = posterior.sample(5, X)
    locs = torch.cat([guide[0].locs.w.reshape(1), guide[0].locs.s.reshape(1), guide[1].locs.z])
    before, log_jacobian = unconstrained(draws)
    expected = dist.Normal(locs, 0.1).log_prob(before).sum(-1) + log_jacobian
    torch.testing.assert_close(posterior.log_density(draws, X), expected.detach())


def helped_guide(x):
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("w", dist.Normal(u, 1.0))
    pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Gamma(2.0, 1.0))


def test_density_that_is_not_known(double):
    posterior = ImportanceResampledGuide(regression, helped_guide, 3)
    draws = posterior.sample(2, X)
    with pytest.raises(NotImplementedError, match=r"\['u'\].*density.*is not known"):
        posterior.log_density(draws, X)


def structured_autoguide(model):
    kinds = {"w": "normal", "s": "normal", "z": "mvn"}
    return autoguide.AutoStructured(model, conditionals=kinds, dependencies={"z": {"w": "linear"}})


UNKNOWN = {
    "flow": lambda model: autoguide.AutoNormalizingFlow(model, planar),
    "structured": structured_autoguide,
    "gaussian": autoguide.AutoGaussian,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_density_of_an_autoguide_that_is_not_known(name, double):
    guide = UNKNOWN[name](regression)
    guide(X)
    posterior = ImportanceResampledGuide(regression, guide, 3)
    draws = posterior.sample(2, X)
    assert {n: v.shape for n, v in draws.items()} == {n: (2, *s) for n, s in SHAPES.items()}
    with pytest.raises(NotImplementedError, match="density"):
        posterior.log_density(draws, X)


def test_density_of_a_point_estimate(double):
    """There is none at other values than the point itself."""
    guide = autoguide.AutoDelta(regression)
    posterior = ImportanceResampledGuide(regression, guide, 3)
    draws = posterior.sample(2, X)
    with pytest.raises(ValueError, match="Delta"):
        posterior.log_density({n: v + 0.01 for n, v in draws.items()}, X)


def test_density_needs_all_latents(double):
    posterior = ImportanceResampledGuide(structured, structured_guide, 2)
    draws = posterior.sample(2, torch.zeros(3, 4))
    del draws["b"]
    with pytest.raises(NotImplementedError, match=r"\['b'\]"):
        posterior.log_density(draws, torch.zeros(3, 4))
    guide = trained_a_little(autoguide.AutoMultivariateNormal)
    with pytest.raises((NotImplementedError, ValueError), match="'z'"):
        ImportanceResampledGuide(regression, guide, 2).log_density({"w": X, "s": X}, X)


def test_density_at_unknown_latents(double):
    posterior = ImportanceResampledGuide(GAMMA.model, GAMMA.guide, 2)
    with pytest.raises(ValueError, match="'y'"):
        posterior.log_density({"z": torch.ones(2), "y": torch.ones(2)})


# elbo_interval


def brackets(num_particles, num_batches):
    """B_{K,M} of the Gamma example with a = 1 and the upper one, by quadrature.

    E log X = integral over u of exp(-e^u) - E exp(-e^u X), with X the sum of 1 / (w + S_m): given w its terms are
    independent. All on logarithmic grids, by the trapezoidal rule.
    """
    u = torch.linspace(-25.0, 12.0, 371, dtype=torch.float64)
    log_w = torch.linspace(-18.0, 4.5, 226, dtype=torch.float64).unsqueeze(1)
    log_s = torch.linspace(-9.0, 4.7, 138, dtype=torch.float64)
    w, s = log_w.exp(), log_s.exp()
    others = (-s + (num_particles - 1) * log_s - math.lgamma(num_particles - 1)).exp() * (log_s[1] - log_s[0])
    own = (-w + log_w).exp() * (log_w[1] - log_w[0])
    selected = num_particles * own * others * w / (w + s)  # joint law of the draw's weight and its companions' sum
    lower, upper = [], []
    for point in u:
        kernel = (-point.exp() / (w + s)).exp()
        fresh = (kernel * others).sum(1)
        lower.append(((selected * kernel).sum(1) * fresh**num_batches).sum())
        upper.append((selected.sum(1) * fresh**num_batches).sum())
    step = u[1] - u[0]
    means = [(((-u.exp()).exp() - torch.stack(values)) * step).sum() for values in (lower, upper)]
    return (
        math.log((num_batches + 1) / num_particles) - means[0].item(),
        math.log(num_batches / num_particles) - means[1].item(),
    )


@pytest.mark.parametrize("num_batches", BRACKETS)
def test_brackets_of_the_gamma_example(num_batches, double):
    """B_{5,M} as known to three figures, to more by quadrature, and as drawn."""
    lower, upper = brackets(5, num_batches)
    assert (lower, upper) == pytest.approx(BRACKETS[num_batches], abs=6e-4)
    interval = ImportanceResampledGuide(*gammas(20_000), 5).elbo_interval(num_batches=num_batches, num_replicates=2)
    assert_mean(interval.lower, lower)
    assert_mean(interval.upper, upper)


def test_brackets_close():
    lower, upper = brackets(5, 2_000)
    assert lower == pytest.approx(GAMMA_ELBOS[5], abs=1e-3)
    assert upper == pytest.approx(GAMMA_ELBOS[5], abs=1e-3)


@pytest.mark.parametrize("num_particles", GAMMA_ELBOS)
def test_interval_holds_the_elbo_of_the_resampled_guide(num_particles):
    """And its lower end lies above the importance weighted bound."""
    posterior = ImportanceResampledGuide(*gammas(50_000), num_particles)
    lower, upper = posterior.elbo_interval(num_batches=2, num_replicates=2)
    assert lower.shape == upper.shape == (50_000,)
    assert_mean_below(lower, GAMMA_ELBOS[num_particles])
    assert_mean_above(upper, GAMMA_ELBOS[num_particles])
    assert_mean_above(lower, GAMMA.bound(num_particles))


def test_known_bounds():
    for num_particles, value in GAMMA_BOUNDS.items():
        assert GAMMA.bound(num_particles) == pytest.approx(value, abs=1e-6)


def test_standard_errors(double):
    """Their squares are unbiased for the variance of what they belong to."""
    lower, upper = brackets(5, 2)
    interval = ImportanceResampledGuide(*gammas(20_000), 5).elbo_interval(num_batches=2, num_replicates=4)
    assert_mean((interval.lower - lower) ** 2 - interval.lower_error**2, 0.0)
    assert_mean((interval.upper - upper) ** 2 - interval.upper_error**2, 0.0)


def test_interval_at_the_exact_posterior(double):
    example = Gaussian(data=torch.linspace(-1.0, 1.0, 3))
    interval = ImportanceResampledGuide(example.model, example.guide, 4).elbo_interval(num_batches=3)
    for value in interval:
        torch.testing.assert_close(value, example.log_evidence)
    assert interval.lower_error.abs().max() < 1e-12


def test_interval_of_one_particle_is_its_elbo(double):
    """Both ends are then the mean log weight."""
    posterior = ImportanceResampledGuide(*gammas(20_000), 1)
    lower, upper = posterior.elbo_interval(num_batches=3, num_replicates=2)
    torch.testing.assert_close(lower, upper)
    assert_mean(lower, GAMMA.bound(1))


def test_interval_of_a_joint_posterior_is_one():
    posterior = ImportanceResampledGuide(structured, structured_guide, 4)
    interval = posterior.elbo_interval(torch.zeros(3, 4), num_batches=2)
    assert interval.lower.shape == interval.upper_error.shape == ()
    assert interval.lower.isfinite() and interval.lower < interval.upper


def test_interval_of_minibatches_is_unscaled(double):
    example = Gaussian(data=torch.zeros(10))

    def model():
        with pyro.plate("data", 10, subsample_size=4) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=example.data[i])

    def guide():
        with pyro.plate("data", 10, subsample_size=4):
            pyro.sample("z", dist.Normal(torch.zeros(4), math.sqrt(0.5)))

    lower, upper = ImportanceResampledGuide(model, guide, 3).elbo_interval(num_batches=2)
    torch.testing.assert_close(lower, example.log_evidence[:4])
    torch.testing.assert_close(upper, example.log_evidence[:4])


# Tempered weights


def scaled(fn, scale=0.5):
    return poutine.scale(fn, scale=scale)


@pytest.mark.parametrize("which", ["model", "guide"])
def test_tempered_weights_are_refused(which):
    model, guide = gammas(3)
    model, guide = (scaled(model), guide) if which == "model" else (model, scaled(guide))
    posterior = ImportanceResampledGuide(model, guide, 2)
    with pytest.raises(ValueError, match="log_density got weights tempered"):
        posterior.log_density({"z": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="elbo_interval got weights tempered"):
        posterior.elbo_interval()
    assert posterior.sample(2)["z"].shape == (2, 3)


def test_scale_around_both_is_no_temper(double):
    """Densities are then those without the scale, on the same noise."""
    model, guide = gammas(3)
    posterior, other = (
        ImportanceResampledGuide(model, guide, 2),
        ImportanceResampledGuide(scaled(model), scaled(guide), 2),
    )
    draws = posterior.sample(4)
    for ask in (lambda p: p.log_density(draws), lambda p: p.elbo_interval().lower, lambda p: p.sample(4)["z"]):
        pyro.set_rng_seed(1)
        expected = ask(posterior)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(ask(other), expected)


@pytest.mark.parametrize("plate_particles", [None, {"data": 3}])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: {**d, "mu": d["mu"][:, None]}, r"site 'mu' in shape \(5,\).*got \(5, 1\)"),
        (lambda d: {**d, "z": d["z"][:, None]}, r"site 'z' in shape \(5, 3\).*got \(5, 1, 3\)"),
        (lambda d: {**d, "z": d["z"][:2]}, r"site 'z' in shape \(5, 3\).*got \(2, 3\)"),
        (lambda d: {"mu": d["mu"]}, r"every latent of the model, got none for \['z'\]"),
    ],
)
def test_draws_of_other_shapes_raise(plate_particles, change, problem):
    def program(observed):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    posterior = ImportanceResampledGuide(
        lambda: program(True), lambda: program(False), 4, plate_particles=plate_particles
    )
    draws = posterior.sample(5)
    assert posterior.log_density(draws).shape == (5,)
    with pytest.raises((ValueError, NotImplementedError), match=problem):
        posterior.log_density(change(draws))
