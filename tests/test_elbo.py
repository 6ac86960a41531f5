# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""ImportanceWeightedELBO: known values, one particle is Trace_ELBO, and a loss like any other of Pyro's."""

import copy
import inspect
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import nn

from pyro_iwae import VIMCO, ImportanceWeightedELBO, LogWeights, Pathwise, exact
from tests.statistics import assert_mean, assert_mean_below, assert_same_mean

DATA = torch.tensor([0.5, -1.2, 2.0, 0.1])


def in_plate(program, n):
    """n independent copies of a program, each its own element: n draws of its bound in one call."""

    def copies():
        with pyro.plate("copies", n, dim=-1):
            program()

    return copies


# Known values


@pytest.mark.parametrize(
    "num_particles, value", [(1, -0.577216), (2, -0.270363), (5, -0.103320), (10, -0.050833), (50, -0.010033)]
)
def test_gamma(num_particles, value, double):
    """L_K = digamma(K a) - log(K a), variance trigamma(K a)."""
    case, n = exact.Gamma(), 40_000
    assert case.bound(num_particles).item() == pytest.approx(value, abs=5e-7)
    bounds = ImportanceWeightedELBO(num_particles=num_particles).bound(in_plate(case.model, n), in_plate(case.guide, n))
    assert_mean(bounds, value)
    assert_mean((bounds - value) ** 2, case.variance(num_particles))


@pytest.mark.parametrize("shape", [0.7, 3.0])
def test_gamma_of_other_shapes(shape, double):
    case, n = exact.Gamma(shape=shape), 20_000
    bounds = ImportanceWeightedELBO(num_particles=4).bound(in_plate(case.model, n), in_plate(case.guide, n))
    assert_mean(bounds, case.bound(4))


@pytest.mark.parametrize("num_particles, value", [(2, -2.205117), (5, -2.204311), (10, -2.204046)])
def test_bernoulli(num_particles, value, double):
    case, n = exact.Bernoulli(), 40_000
    assert case.bound(num_particles).item() == pytest.approx(value, abs=5e-7)
    assert case.log_joint().logsumexp(0).item() == pytest.approx(-2.203782, abs=5e-7)
    bounds = ImportanceWeightedELBO(num_particles=num_particles).bound(in_plate(case.model, n), in_plate(case.guide, n))
    assert_mean(bounds, value)


@pytest.mark.parametrize("offset, gap", [(0.5, -0.01395), (1.0, -0.07372), (2.0, -0.52954)])
@pytest.mark.parametrize("vectorize", [True, False])
def test_gaussians_some_deviations_apart(offset, gap, vectorize, double):
    case = exact.Gaussian(data=torch.linspace(-3.0, 3.0, 20_000), offset=offset)
    assert (case.bound(10) - case.log_evidence)[0].item() == pytest.approx(gap, abs=5e-6)
    elbo = ImportanceWeightedELBO(num_particles=10, vectorize_particles=vectorize)
    assert_mean(elbo.bound(case.model, case.guide) - case.log_evidence, gap)


def test_loss_is_minus_the_sum_over_elements(double, unchecked):
    case = exact.Gaussian(data=DATA.double(), offset=1.0)
    elbo = ImportanceWeightedELBO(num_particles=3)
    losses = torch.tensor([elbo.loss(case.model, case.guide) for _ in range(200)])
    assert_mean(losses, -case.bound(3).sum())


def test_one_weight_for_a_hierarchy(double):
    """A global latent leaves no independent plate: one joint weight for 100 elements loses nats at K = 64."""
    mu = torch.randn(())
    case = exact.HierarchicalGaussian(data=mu + math.sqrt(2.0) * torch.randn(100), spread=1.46)
    n, elbo = 400, ImportanceWeightedELBO(num_particles=64)
    weights = elbo.log_weights(in_rows(case.model, n), in_rows(case.guide, n))
    assert weights.plates == ("rows",)
    assert_mean(weights.log_weights.mean(0), case.elbo)
    assert_mean_below(weights.bound(), case.log_evidence - 4.0)
    assert_same_mean(weights.bound(), simulated_hierarchy(case, 64, n))
    assert elbo.log_weights(case.model, case.guide).plates == ()


def in_rows(program, n):
    """Independent copies along a dimension left of the program's own plate."""

    def copies():
        with pyro.plate("rows", n, dim=-2):
            program()

    return copies


def simulated_hierarchy(case, num_particles, n):
    """The same bound by plain torch."""
    x, count = case.data, len(case.data)
    mean = x.sum() / (count + 2)
    q_mu = torch.distributions.Normal(mean, case.spread / math.sqrt(1 + count))
    q_z = torch.distributions.Normal((mean + x) / 2.0, case.spread * math.sqrt(0.5))
    mu, z = q_mu.sample((num_particles, n)), q_z.sample((num_particles, n))
    normal = torch.distributions.Normal
    log_p = normal(0.0, 1.0).log_prob(mu) + normal(mu.unsqueeze(-1), 1.0).log_prob(z).sum(-1)
    log_p = log_p + normal(z, 1.0).log_prob(x).sum(-1)
    return (log_p - q_mu.log_prob(mu) - q_z.log_prob(z).sum(-1)).logsumexp(0) - math.log(num_particles)


# One particle is Trace_ELBO, value and gradient


def gaussian_model(data=DATA):
    loc = pyro.param("prior_loc", torch.tensor(0.3))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=data)


def gaussian_guide(data=DATA, family=dist.Normal):
    loc = pyro.param("loc", torch.tensor([0.1, 0.2, 0.3, 0.4]))
    scale = pyro.param("scale", torch.tensor(0.9), constraint=dist.constraints.positive)
    with pyro.plate("data", len(data)):
        pyro.sample("z", family(loc, scale))


def detached_guide():
    gaussian_guide(family=NonreparameterizedNormal)


def mixed_model():
    g = pyro.sample("g", dist.Normal(pyro.param("prior_loc", torch.tensor(0.3)), 1.0))
    with pyro.plate("data", len(DATA)):
        c = pyro.sample("c", dist.Bernoulli(logits=g))
        z = pyro.sample("z", dist.Normal(g + c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)


def mixed_guide():
    g = pyro.sample("g", dist.Normal(pyro.param("g_loc", torch.tensor(0.1)), 0.8))
    with pyro.plate("data", len(DATA)):
        c = pyro.sample("c", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(4)) + g))
        pyro.sample("z", dist.Normal(pyro.param("z_locs", torch.zeros(4)) + c, 0.9))


def subsampled(program):
    """In a minibatch of two, with local parameters."""

    def run():
        role = "model" if program is gaussian_model else "guide"
        full = pyro.param("locs", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        with pyro.plate("data", 4, subsample_size=2) as index:
            if role == "guide":
                pyro.sample("z", dist.Normal(full[index], 0.8))
            else:
                z = pyro.sample("z", dist.Normal(pyro.param("prior_loc", torch.tensor(0.3)), 1.0))
                pyro.sample("x", dist.Normal(z, 0.7), obs=DATA[index])

    return run


def around(handler, program):
    return lambda: handler(program)()


def only_data():
    pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(4)), 1.0).to_event(1), obs=DATA)


MASK = torch.tensor([True, False, True, True])
PAIRS = {
    "reparameterised": (gaussian_model, gaussian_guide),
    "score function": (gaussian_model, detached_guide),
    "mixed": (mixed_model, mixed_guide),
    "subsampled": (subsampled(gaussian_model), subsampled(gaussian_guide)),
    "scaled": tuple(poutine.scale(f, scale=0.1) for f in (gaussian_model, gaussian_guide)),
    "model scaled": (poutine.scale(gaussian_model, scale=0.1), detached_guide),
    "masked": tuple(poutine.mask(f, mask=MASK) for f in (gaussian_model, detached_guide)),
    "no latents": (only_data, lambda: None),
}


def loss_and_gradients(elbo, model, guide, seed=3):
    pyro.set_rng_seed(seed)
    pyro.get_param_store().clear()
    loss = elbo.loss_and_grads(model, guide)
    grads = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
    return loss, {n: torch.zeros(()) if g is None else g.clone() for n, g in grads.items()}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("vectorize", [None, True, False])
def test_one_particle_is_trace_elbo(name, vectorize, double):
    model, guide = PAIRS[name]
    expected, gradients = loss_and_gradients(Trace_ELBO(), model, guide)
    elbo = ImportanceWeightedELBO(num_particles=1, vectorize_particles=vectorize)
    for _ in range(2):
        loss, ours = loss_and_gradients(elbo, model, guide)
        assert loss == pytest.approx(expected, rel=1e-12)
        assert ours.keys() == gradients.keys()
        for site, gradient in gradients.items():
            torch.testing.assert_close(ours[site], gradient, rtol=1e-10, atol=1e-12)
    assert name == "no latents" or any(bool((g != 0).any()) for g in gradients.values())
    pyro.set_rng_seed(3)
    assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-12)


def mixture_model():
    weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=dist.constraints.simplex)
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(DATA)):
        c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(g + z + 2.0 * c, 1.0), obs=DATA)


def mixture_guide():
    pyro.sample("g", dist.Normal(pyro.param("g_loc", torch.tensor(0.1)), 0.8))
    with pyro.plate("data", len(DATA)):
        pyro.sample("z", dist.Normal(pyro.param("z_locs", torch.zeros(4)), 0.9))


def enumerated_guide():
    pyro.sample("g", dist.Normal(pyro.param("g_loc", torch.tensor(0.1)), 0.8))
    with pyro.plate("data", len(DATA)):
        probs = pyro.param("probs", torch.tensor([0.4, 0.6]), constraint=dist.constraints.simplex)
        pyro.sample("c", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample("z", dist.Normal(pyro.param("z_locs", torch.zeros(4)), 0.9))


@pytest.mark.parametrize("guide", [mixture_guide, enumerated_guide])
def test_one_particle_with_enumeration_is_traceenum_elbo(guide, double):
    """Sites summed out in the model, and a guide's exact expectation."""
    exact_elbo = TraceEnum_ELBO(max_plate_nesting=1)
    expected, gradients = loss_and_gradients(exact_elbo, mixture_model, guide)
    elbo = ImportanceWeightedELBO(num_particles=1)
    for _ in range(2):
        loss, ours = loss_and_gradients(elbo, mixture_model, guide)
        assert loss == pytest.approx(expected, rel=1e-12)
        for site, gradient in gradients.items():
            torch.testing.assert_close(ours[site], gradient, rtol=1e-10, atol=1e-12)
        pyro.set_rng_seed(3)
        assert elbo.loss(mixture_model, guide) == pytest.approx(expected, rel=1e-12)
        pyro.set_rng_seed(3)
        assert elbo.differentiable_loss(mixture_model, guide).item() == pytest.approx(expected, rel=1e-12)
    if guide is mixture_guide:
        pyro.set_rng_seed(3)
        weights = elbo.log_weights(mixture_model, guide)
        assert -weights.total(weights.bound()).item() == pytest.approx(expected, rel=1e-12)


def test_one_particle_without_parameters_of_enumeration_on_another_pair():
    """Whether sites are enumerated belongs to the pair: one object serves both kinds."""
    elbo = ImportanceWeightedELBO(num_particles=1)
    for model, guide in ((mixture_model, mixture_guide), (gaussian_model, gaussian_guide)) * 2:
        reference = TraceEnum_ELBO(max_plate_nesting=1) if model is mixture_model else Trace_ELBO()
        expected, _ = loss_and_gradients(reference, model, guide)
        assert loss_and_gradients(elbo, model, guide)[0] == pytest.approx(expected, rel=1e-6)


# A loss like any other


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("vectorize", [None, False])
def test_all_losses_are_one(name, num_particles, vectorize, double):
    """loss, loss_and_grads, differentiable_loss, ELBOModule and the bound agree on the same noise."""
    model, guide = PAIRS[name]
    elbo = ImportanceWeightedELBO(num_particles=num_particles, vectorize_particles=vectorize)
    if name == "subsampled" and num_particles > 1:
        assert elbo.log_weights(model, guide).plates == ("data",)
    values = []
    for method in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss, lambda m, g: elbo(m, g)()):
        pyro.set_rng_seed(5)
        values.append(torch.as_tensor(method(model, guide)).item())
    pyro.set_rng_seed(5)
    weights = elbo.log_weights(model, guide)
    values.append(-weights.total(weights.bound()).item())
    assert values == pytest.approx([values[0]] * 5, rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_both_losses_are_one(name, double):
    model, guide = PAIRS[name]
    elbo = ImportanceWeightedELBO(num_particles=4)
    _, expected = loss_and_gradients(elbo, model, guide)
    for _, parameter in pyro.get_param_store().named_parameters():
        parameter.grad = None
    pyro.set_rng_seed(3)
    elbo.differentiable_loss(model, guide).backward()
    for site, parameter in pyro.get_param_store().named_parameters():
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, expected[site], rtol=1e-10, atol=1e-12)


def two_latents():
    a = pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.3)), 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    return pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(0.7))


def guide_for(*names):
    def guide():
        for name in names:
            pyro.sample(name, dist.Normal(pyro.param(f"q_{name}", torch.tensor(0.2)), 0.8))

    return guide


HANDLED = {
    "condition": (lambda: poutine.condition(two_latents, data={"b": torch.tensor(1.0)}), guide_for("a")),
    "do": (lambda: poutine.do(two_latents, data={"b": torch.tensor(1.0)}), guide_for("a", "b")),
    "uncondition": (lambda: poutine.uncondition(two_latents), guide_for("a", "b", "x")),
    "lift": (lambda: poutine.lift(two_latents, prior={"a_loc": dist.Normal(0.0, 2.0)}), guide_for("a", "b", "a_loc")),
    "reparam": (
        lambda: poutine.reparam(two_latents, config={"b": LocScaleReparam(0.0)}),
        guide_for("a", "b_decentered"),
    ),
    "scale": (lambda: poutine.scale(two_latents, scale=0.3), poutine.scale(guide_for("a", "b"), scale=0.3)),
    "block and trace": (lambda: poutine.trace(poutine.block(two_latents, hide=["none"])), guide_for("a", "b")),
    "seed": (lambda: two_latents, pyro.poutine.seed(guide_for("a", "b"), rng_seed=3)),
    "substitute": (lambda: two_latents, poutine.substitute(guide_for("a", "b"), data={"q_a": torch.tensor(-0.5)})),
}


@pytest.mark.parametrize("name", HANDLED)
def test_handlers_around_model_or_guide(name, double):
    """One particle as Trace_ELBO, and three as the densities of three traces, on the same noise."""
    make, guide = HANDLED[name]
    model, scale = make(), 0.3 if name == "scale" else 1.0
    losses = []
    for elbo in (Trace_ELBO(), ImportanceWeightedELBO(num_particles=1)):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    elbo = ImportanceWeightedELBO(num_particles=3, vectorize_particles=False)
    elbo.loss(model, guide)
    pyro.set_rng_seed(2)
    loss = elbo.loss(model, guide)
    pyro.set_rng_seed(2)
    log_w = []
    for _ in range(3):
        guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        log_w.append((model_trace.log_prob_sum() - guide_trace.log_prob_sum()) / scale)
    expected = -scale * (torch.stack(log_w).logsumexp(0) - math.log(3)).item()
    assert loss == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(ImportanceWeightedELBO(num_particles=3).loss_and_grads(model, guide))


def test_gradients_are_added():
    """loss_and_grads adds to .grad, as Trace_ELBO does."""
    elbo = ImportanceWeightedELBO(num_particles=3)
    grads = []
    for _ in range(2):
        pyro.set_rng_seed(2)
        elbo.loss_and_grads(gaussian_model, gaussian_guide)
        grads.append(pyro.param("loc").unconstrained().grad.clone())
    torch.testing.assert_close(grads[1], 2.0 * grads[0])


def test_without_gradients():
    elbo = ImportanceWeightedELBO(num_particles=3)
    with torch.no_grad():
        assert math.isfinite(elbo.loss(gaussian_model, gaussian_guide))
        assert not elbo.bound(gaussian_model, gaussian_guide).requires_grad
    assert elbo.bound(gaussian_model, gaussian_guide).requires_grad


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_without_gradients_raises(off, compiled):
    """A step that trains nothing would pass for one that does."""
    elbo = ImportanceWeightedELBO(num_particles=3, compile=compiled)
    svi = SVI(gaussian_model, gaussian_guide, Adam({"lr": 0.1}), elbo)
    with off(), pytest.raises(RuntimeError, match=r"expected gradients to be on .* svi.evaluate_loss"):
        svi.step()
    with torch.no_grad():
        assert math.isfinite(svi.evaluate_loss())
    assert math.isfinite(svi.step())


@pytest.mark.parametrize("vectorize", [None, True, False])
def test_seeded_runs_repeat(vectorize):
    """Also the first one, on which the pair is inspected."""
    elbo = ImportanceWeightedELBO(num_particles=5, vectorize_particles=vectorize)
    losses = []
    for _ in range(3):
        pyro.set_rng_seed(11)
        losses.append([elbo.loss(mixed_model, mixed_guide) for _ in range(3)])
    fresh = ImportanceWeightedELBO(num_particles=5, vectorize_particles=vectorize)
    pyro.set_rng_seed(11)
    losses.append([fresh.loss(mixed_model, mixed_guide) for _ in range(3)])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_precision_is_that_of_the_data(dtype, num_particles):
    """Without any change of torch's default."""
    case = exact.Gaussian(data=DATA.to(dtype), offset=torch.tensor(0.5, dtype=dtype, requires_grad=True))
    elbo = ImportanceWeightedELBO(num_particles=num_particles)
    assert elbo.bound(case.model, case.guide).dtype == dtype
    loss = elbo.differentiable_loss(case.model, case.guide)
    assert loss.dtype == dtype
    loss.backward()
    assert case.offset.grad.dtype == dtype and case.offset.grad.isfinite()


def test_svi_trains(unchecked):
    """From far outside the tolerance to inside it: model and guide parameters both arrive at their optimum."""
    data = 2.0 + math.sqrt(2.0) * torch.randn(300)

    def model():
        loc = pyro.param("m", torch.tensor(-1.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide():
        slope, shift = pyro.param("slope", torch.tensor(1.5)), pyro.param("shift", torch.tensor(-1.0))
        scale = pyro.param("width", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(slope * data + shift, scale))

    def distances():
        best = {"m": data.mean(), "slope": 0.5, "shift": data.mean() / 2.0, "width": math.sqrt(0.5)}
        return torch.stack([(pyro.param(name) - value).abs() for name, value in best.items()]).detach()

    optimiser = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
    svi = SVI(model, guide, optimiser, loss=ImportanceWeightedELBO(num_particles=4))
    first = svi.step()
    assert bool((distances() > 0.8).all())
    for _ in range(250):
        last = svi.step()
    evidence = dist.Normal(data.mean(), math.sqrt(2.0)).log_prob(data).sum().item()
    assert bool((distances() < 0.2).all()), distances()
    assert first > 100.0 - evidence
    assert -last == pytest.approx(evidence, abs=10.0)
    assert isinstance(svi.evaluate_loss(), float)


def test_svi_trains_discrete_latents(unchecked):
    """A score function gradient finds the posterior's mode from the wrong side."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(4.0 * z, 1.0), obs=torch.tensor([4.0, 0.0, 4.0]))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.tensor([-1.0, 1.0, -1.0]))))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=ImportanceWeightedELBO(num_particles=4))
    for _ in range(60):
        svi.step()
    assert (pyro.param("logits").sign() == torch.tensor([1.0, -1.0, 1.0])).all()


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = PyroSample(dist.Normal(0.0, 1.0))
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.noise = PyroParam(torch.tensor(0.5), dist.constraints.positive)

    def forward(self, x, y=None):
        mean = self.slope * x + self.shift
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("num_particles", [1, 6])
def test_torch_optimisers_through_elbo_module(local, num_particles, unchecked):
    """Also with ``module_local_params``: parameters are those of the modules, trained by plain torch."""
    with pyro.settings.context(module_local_params=local):
        x = torch.linspace(-1.0, 1.0, 30)
        y = 2.0 * x + 0.3
        model = Regression()
        guide = AutoNormal(model)
        loss_fn = ImportanceWeightedELBO(num_particles=num_particles)(model, guide)
        loss_fn(x, y)
        names = {n for n, _ in loss_fn.named_parameters()}
        assert any("guide" in n for n in names) and any("noise" in n for n in names)
        optimiser = torch.optim.Adam(loss_fn.parameters(), lr=0.05)
        assert abs(guide.median()["slope"].item() - 2.0) > 1.0
        for _ in range(120):
            optimiser.zero_grad()
            loss = loss_fn(x, y)
            loss.backward()
            optimiser.step()
        assert guide.median()["slope"].item() == pytest.approx(2.0, abs=0.6)
        assert (len(pyro.get_param_store()) == 0) == local


def test_every_keyword_of_trace_elbo():
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (ImportanceWeightedELBO, Trace_ELBO))
    assert set(theirs) <= set(ours)
    assert list(ours)[: len(theirs)] == list(theirs), "positional use of Trace_ELBO's keywords works too"
    elbo = ImportanceWeightedELBO(
        num_particles=3,
        max_plate_nesting=2,
        vectorize_particles=True,
        strict_enumeration_warning=False,
        ignore_jit_warnings=True,
        jit_options={"check_trace": True},
        retain_graph=True,
        tail_adaptive_beta=-0.5,
    )
    assert isinstance(elbo, ELBO)
    assert elbo.max_plate_nesting == 2 and elbo.num_particles == 3 and elbo.retain_graph is True
    assert math.isfinite(elbo.loss_and_grads(mixed_model, mixed_guide))
    with pytest.warns(DeprecationWarning, match="max_plate_nesting"):
        assert ImportanceWeightedELBO(max_iarange_nesting=3).max_plate_nesting == 3
    assert ImportanceWeightedELBO().num_particles == 10
    for name in ("jit_options", "ignore_jit_warnings"):
        assert name in ImportanceWeightedELBO.__doc__


def test_retain_graph_is_passed_on():
    """A graph from outside the loss can be used again, or not."""
    start = torch.tensor(0.5, requires_grad=True)

    def guide():
        pyro.param("any", torch.tensor(0.0))
        with pyro.plate("data", len(DATA)):
            pyro.sample("z", dist.Normal(shift, 1.0))

    for retain in (True, None):
        shift = start.exp()
        elbo = ImportanceWeightedELBO(num_particles=2, retain_graph=retain)
        elbo.loss_and_grads(gaussian_model, guide)
        if retain:
            shift.backward()
        else:
            with pytest.raises(RuntimeError, match="second time"):
                shift.backward()


class Counting:
    """Counts the calls of a model and guide."""

    def __init__(self, model, guide):
        self.calls = {"model": 0, "guide": 0}
        self.model, self.guide = self.counted("model", model), self.counted("guide", guide)

    def counted(self, role, fn):
        def run(*args, **kwargs):
            self.calls[role] += 1
            return fn(*args, **kwargs)

        return run

    def since(self, act):
        self.calls.update(model=0, guide=0)
        act()
        return dict(self.calls)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("vectorize", [None, True, False])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_a_step_runs_no_more_than_that_of_trace_elbo(name, vectorize, num_particles):
    """After the first call: one run for all particles if vectorised, else one for each."""
    counting = Counting(*PAIRS[name])
    theirs = Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorize is not False, max_plate_nesting=2)
    theirs = counting.since(lambda: theirs.loss_and_grads(counting.model, counting.guide))
    elbo = ImportanceWeightedELBO(num_particles=num_particles, vectorize_particles=vectorize)
    elbo.loss_and_grads(counting.model, counting.guide)
    elbo.bound(counting.model, counting.guide)
    for method in (elbo.loss_and_grads, elbo.loss, elbo.differentiable_loss, elbo.bound):
        ours = counting.since(lambda method=method: method(counting.model, counting.guide))
        assert ours["model"] <= theirs["model"] and ours["guide"] <= theirs["guide"], method


def test_one_object_for_models_of_any_depth():
    """The guessed nesting belongs to the pair."""

    def deep():
        with pyro.plate("a", 2, dim=-3), pyro.plate("b", 3, dim=-2), pyro.plate("c", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if pyro.poutine.runtime.am_i_wrapped():
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2, 3, 2))

    deep_guide = poutine.block(deep, hide=["x"])
    elbo = ImportanceWeightedELBO(num_particles=4)
    case = exact.Gaussian(data=DATA)
    for _ in range(2):
        assert elbo.bound(case.model, case.guide).shape == (4,)
        assert elbo.bound(deep, deep_guide).shape == (2, 3, 2)
    assert elbo.max_plate_nesting == math.inf, "nothing is stored on the object"


def test_log_weights_and_bound():
    """Shapes, names and scale of what .log_weights and .bound return."""
    elbo = ImportanceWeightedELBO(num_particles=6)
    weights = elbo.log_weights(gaussian_model, gaussian_guide)
    assert isinstance(weights, LogWeights)
    assert weights.log_weights.shape == (6, 4) and weights.plates == ("data",)
    assert weights.scale == 1.0 and weights.constant == {} and not weights.tempered
    assert elbo.bound(gaussian_model, gaussian_guide).shape == (4,)
    weights = elbo.log_weights(mixed_model, mixed_guide)
    assert weights.log_weights.shape == (6,) and weights.plates == ()
    assert elbo.bound(mixed_model, mixed_guide).shape == ()
    weights = elbo.log_weights(*PAIRS["subsampled"])
    assert weights.log_weights.shape == (6, 2) and weights.scale == 2.0
    assert elbo.bound(*PAIRS["subsampled"]).shape == (2,)


def test_bound_is_differentiable():
    """For reparameterised guides the bound's own graph is the pathwise gradient."""
    elbo = ImportanceWeightedELBO(num_particles=6)
    elbo.loss(gaussian_model, gaussian_guide)
    params = [p for _, p in pyro.get_param_store().named_parameters()]
    pyro.set_rng_seed(1)
    ours = torch.autograd.grad(elbo.bound(gaussian_model, gaussian_guide).sum(), params)
    pyro.set_rng_seed(1)
    loss = torch.autograd.grad(-elbo.differentiable_loss(gaussian_model, gaussian_guide), params)
    for a, b in zip(ours, loss, strict=True):
        torch.testing.assert_close(a, b)


def test_arguments_reach_model_and_guide():
    data = torch.tensor([3.0, 4.0])

    def model(x, *, width):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, width))
            pyro.sample("x", dist.Normal(z, width), obs=x)

    def guide(x, *, width):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2.0, width / math.sqrt(2.0)))

    elbo = ImportanceWeightedELBO(num_particles=3)
    for width in (1.0, 2.0):
        expected = dist.Normal(0.0, width * math.sqrt(2.0)).log_prob(data)
        torch.testing.assert_close(elbo.bound(model, guide, data, width=width), expected)
        assert -elbo.loss(model, guide, data, width=width) == pytest.approx(expected.sum().item(), rel=1e-5)
        assert -elbo(model, guide)(data, width=width).item() == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles(remake):
    elbo = ImportanceWeightedELBO(num_particles=5, max_plate_nesting=2, gradient=Pathwise(), score=VIMCO())
    pyro.set_rng_seed(2)
    elbo.loss(gaussian_model, gaussian_guide)
    expected = elbo.loss(gaussian_model, gaussian_guide)
    other = remake(elbo)
    assert other.num_particles == 5 and other.max_plate_nesting == 2
    pyro.set_rng_seed(2)
    other.loss(gaussian_model, gaussian_guide)
    assert other.loss(gaussian_model, gaussian_guide) == expected
    module = remake(elbo(nn.Linear(1, 1), nn.Linear(1, 1))) if remake is not copy.copy else None
    assert module is None or module.elbo.num_particles == 5


def test_num_particles_can_be_changed():
    """As for Pyro's own ELBOs, K is a public attribute."""
    elbo = ImportanceWeightedELBO(num_particles=2)
    for count in (2, 9, 1, 5):
        elbo.num_particles = count
        assert elbo.log_weights(gaussian_model, gaussian_guide).log_weights.shape == (count, 4)
        assert math.isfinite(elbo.loss_and_grads(gaussian_model, gaussian_guide))


def test_more_particles_tighten_the_bound(double):
    """L_K grows with K towards the evidence (shown for steps large against the error)."""
    case = exact.Gaussian(data=torch.zeros(20_000), offset=1.5)
    means = []
    for count in (1, 3, 30):
        bounds = ImportanceWeightedELBO(num_particles=count).bound(case.model, case.guide)
        assert_mean(bounds, case.bound(count)[0])
        means.append(case.bound(count)[0].item())
        assert_mean_below(bounds, case.log_evidence[0])
    assert means[0] + 0.3 < means[1] < means[2] - 0.2


@pytest.mark.parametrize("num_particles", [1, 4])
def test_factors_in_the_guide_outside_of_plates(num_particles):
    """No latent reaches them: a constant of the loss, with the guide's sign, as for Trace_ELBO."""

    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("shift", torch.tensor(0.7))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("weight", pyro.param("w", torch.tensor(2.5)), has_rsample=True)

    assert Trace_ELBO().loss(model, guide) == pytest.approx(2.5 - 0.7)
    elbo = ImportanceWeightedELBO(num_particles=num_particles)
    weights = elbo.log_weights(model, guide)
    assert weights.plates == ("data",)
    assert elbo.loss_and_grads(model, guide) == pytest.approx(2.5 - 0.7)
    assert pyro.param("w").grad.item() == 1.0
