# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Every autoguide of Pyro: its plates, its weights against a sum by hand, and training steps."""

import functools
import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer import autoguide as auto

from pyro_iwae import ImportanceWeightedELBO
from tests.statistics import assert_same_mean

pytestmark = pytest.mark.usefixtures("double")


def data():
    return torch.tensor([0.5, -1.0, 2.0])


def local_model():
    """Every latent in one plate."""
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data())


def global_model():
    """Global latents with constrained supports above local ones."""
    s = pyro.sample("s", dist.LogNormal(torch.tensor(0.0), 0.5))
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), s))
        pyro.sample("x", dist.Normal(z + w[..., 0], 1.0), obs=data())


def flow(*args):
    return lambda model: auto.AutoNormalizingFlow(model, functools.partial(transforms.iterated, *args))


def guide_list(model):
    """Local latents by AutoNormal, global ones by AutoDiagonalNormal and AutoDelta."""
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(poutine.block(model, expose=["z"])))
    if model is global_model:
        guide.append(auto.AutoDiagonalNormal(poutine.block(model, expose=["s"])))
        guide.append(auto.AutoDelta(poutine.block(model, expose=["w"])))
    return guide


LOCAL = ("data",)  # each element is on its own
JOINT = ()  # one latent outside every plate
GUIDES = {
    "AutoNormal": (auto.AutoNormal, LOCAL),
    "AutoDelta": (auto.AutoDelta, LOCAL),
    "AutoDiagonalNormal": (auto.AutoDiagonalNormal, JOINT),
    "AutoMultivariateNormal": (auto.AutoMultivariateNormal, JOINT),
    "AutoLowRankMultivariateNormal": (auto.AutoLowRankMultivariateNormal, JOINT),
    "AutoIAFNormal": (auto.AutoIAFNormal, JOINT),
    "AutoNormalizingFlow": (flow(1, transforms.spline_autoregressive), JOINT),
    "AutoNormalizingFlow without inverse": (flow(1, transforms.block_autoregressive), JOINT),
    "AutoNormalizingFlow planar": (flow(2, transforms.planar), JOINT),
    "AutoGuideList": (guide_list, LOCAL),
    "AutoStructured": (
        lambda model: auto.AutoStructured(model, conditionals="normal", dependencies="linear"),
        JOINT,
    ),
    "AutoStructured mvn": (lambda model: auto.AutoStructured(model, conditionals="mvn"), JOINT),
    "AutoGaussian": (auto.AutoGaussian, JOINT),
    "AutoLaplaceApproximation": (auto.AutoLaplaceApproximation, JOINT),
    "AutoNormalMessenger": (auto.AutoNormalMessenger, LOCAL),
    "AutoHierarchicalNormalMessenger": (auto.AutoHierarchicalNormalMessenger, LOCAL),
    "AutoRegressiveMessenger": (auto.AutoRegressiveMessenger, LOCAL),
}
BOTH = pytest.mark.parametrize("model", [local_model, global_model])


def made(name, model):
    guide = GUIDES[name][0](model)
    guide()
    return guide


def traces(model, guide):
    if isinstance(guide, auto.AutoMessenger):  # runs both together
        guide()
        model_trace, guide_trace = guide.get_traces()
    else:
        guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return model_trace, guide_trace


def log_densities(trace):
    return [s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample" and hasattr(s["fn"], "event_dim")]


def by_hand(model, guide, num_particles, plates):
    """log p - log q of particles one by one: for each element, or of everything at once, log q counted once."""
    log_w = []
    for _ in range(num_particles):
        model_trace, guide_trace = traces(model, guide)
        parts = log_densities(model_trace), log_densities(guide_trace)
        if plates:
            log_w.append(sum(parts[0]) - sum(parts[1]))
        else:
            log_w.append(sum(p.sum() for p in parts[0]) - sum(p.sum() for p in parts[1]))
    return torch.stack(log_w)


@BOTH
@pytest.mark.parametrize("name", GUIDES)
def test_weights_equal_a_sum_by_hand(name, model):
    """On the same noise; and the plates are as expected, vectorised or not, without a warning."""
    guide, plates = made(name, model), GUIDES[name][1] if model is local_model else JOINT
    elbo = ImportanceWeightedELBO(num_particles=4, vectorize_particles=False)
    assert elbo.log_weights(model, guide).plates == plates
    pyro.set_rng_seed(1)
    weights = elbo.log_weights(model, guide)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(weights.log_weights, by_hand(model, guide, 4, plates))
    wide = ImportanceWeightedELBO(num_particles=4).log_weights(model, guide)
    assert wide.plates == plates and wide.log_weights.shape == weights.log_weights.shape
    assert bool(wide.log_weights.isfinite().all())


@BOTH
@pytest.mark.parametrize("name", GUIDES)
def test_one_particle_is_trace_elbo(name, model):
    guide = made(name, model)
    losses = []
    for elbo in (Trace_ELBO(), ImportanceWeightedELBO(num_particles=1)):
        pyro.set_rng_seed(2)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@BOTH
@pytest.mark.parametrize("name", GUIDES)
def test_particles_run_in_one_pass(name, model):
    """None of these needs sequential particles; a step after the first runs the model once."""
    calls = []

    def counted():
        calls.append(1)
        model()

    guide = made(name, counted if name != "AutoGuideList" else model)
    elbo = ImportanceWeightedELBO(num_particles=4)
    elbo.loss(counted, guide)
    calls.clear()
    elbo.loss(counted, guide)
    assert len(calls) == 1


@BOTH
@pytest.mark.parametrize("name", GUIDES)
def test_svi_steps(name, model):
    """From a guide that has not been called yet; every parameter gets a finite gradient, and moves."""
    guide = GUIDES[name][0](model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(num_particles=3))
    assert math.isfinite(svi.step())
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    for _ in range(3):
        assert math.isfinite(svi.step())
    after = dict(pyro.get_param_store().named_parameters())
    assert before and all(bool(p.isfinite().all()) for p in after.values())
    still = [n for n, p in before.items() if torch.equal(p, after[n])]
    assert len(still) < len(before) / 2, still


@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "AutoIAFNormal", "AutoStructured", "AutoGaussian"])
@BOTH
def test_vectorised_bound_has_the_mean_of_one_by_hand(name, model):
    """With fresh noise, K = 3 in one pass, against particles weighed by hand: log q is counted once."""
    guide, n = made(name, model), 2000

    def rows(program, count):
        return pyro.plate("rows", count, dim=-2)(program)

    weights = ImportanceWeightedELBO(num_particles=3).log_weights(rows(model, n), rows(guide, n))
    assert weights.plates == ("rows",)
    parts = [log_densities(trace) for trace in traces(rows(model, 3 * n), rows(guide, 3 * n))]
    log_p, log_q = (sum(value.expand(3 * n, -1).sum(-1) for value in values) for values in parts)
    assert_same_mean(weights.bound(), (log_p - log_q).reshape(3, n).logsumexp(0) - math.log(3))


def test_laplace_approximation_after_training():
    guide = auto.AutoLaplaceApproximation(global_model)
    svi = SVI(global_model, guide, pyro.optim.Adam({"lr": 0.05}), ImportanceWeightedELBO(num_particles=2))
    for _ in range(20):
        svi.step()
    normal = guide.laplace_approximation()
    weights = ImportanceWeightedELBO(num_particles=5).log_weights(global_model, normal)
    assert weights.plates == () and weights.log_weights.std() > 0.0


def mixture_model():
    loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", 3):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(loc + 2.0 * c, 1.0), obs=data())


def mixture_guide():
    guide = auto.AutoGuideList(mixture_model)
    guide.append(auto.AutoNormal(poutine.block(mixture_model, expose=["loc"])))
    guide.append(auto.AutoDiscreteParallel(poutine.block(mixture_model, expose=["c"])))
    return guide


def test_auto_discrete_parallel():
    """One particle: TraceEnum_ELBO's exact sum, value and gradient. More: sampled, with one warning."""
    guide = mixture_guide()
    guide()
    results = []
    for elbo in (TraceEnum_ELBO(max_plate_nesting=1), ImportanceWeightedELBO(num_particles=1)):
        pyro.set_rng_seed(3)
        loss = elbo.differentiable_loss(mixture_model, guide)
        params = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
        results.append((loss.detach(), *torch.autograd.grad(loss, params)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    elbo = ImportanceWeightedELBO(num_particles=3)
    with pytest.warns(UserWarning, match=r"\['c'\] ask for enumeration") as caught:
        elbo.loss(mixture_model, guide)
    assert len(caught) == 1
    elbo.loss(mixture_model, guide)
    quiet = ImportanceWeightedELBO(num_particles=3, strict_enumeration_warning=False)
    svi = SVI(mixture_model, guide, pyro.optim.Adam({"lr": 0.01}), quiet)
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_subsampled_amortised_autoguide():
    """AutoNormal with local parameters in minibatches: one minibatch for all particles, the plate's scale outside."""
    x = torch.randn(20)

    def model():
        with pyro.plate("data", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def create_plates():
        return pyro.plate("data", 20, subsample_size=5)

    guide = auto.AutoNormal(model, create_plates=create_plates)
    elbo = ImportanceWeightedELBO(num_particles=6)
    weights = elbo.log_weights(model, guide)
    assert weights.plates == ("data",) and weights.log_weights.shape == (6, 5) and weights.scale == 4.0
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    first = sum(svi.step() for _ in range(10))
    for _ in range(40):
        svi.step()
    assert sum(svi.step() for _ in range(10)) < first
