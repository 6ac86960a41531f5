# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""ImportanceResampledGuide among Pyro's handlers and losses, and inside itself.

Under Trace_ELBO the value of a draw is the log-mean-exp of its weights and the gradient that of the bound. Both
are compared with ImportanceWeightedELBO on the same noise, to rounding.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO
from pyro_iwae.exact import Bernoulli, Gamma, Gaussian
from tests.statistics import assert_mean, assert_mean_below

DATA = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)


@pytest.fixture(autouse=True)
def all_in_double(double):
    """Most of these tests compare to rounding."""


def importance_weighted(num_particles, **options):
    """The ELBO with the estimators that the guide uses."""
    return ImportanceWeightedELBO(num_particles, **options)


def param(name, value):
    return pyro.param(name, torch.tensor(value))


# Models and guides with parameters, of every kind


def local_model(x=DATA):
    noise = param("noise", 0.8).exp()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(param("prior", 0.2), 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def local_guide(x=DATA):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(param("slope", 0.3) * x, param("width", -0.2).exp()))


def global_model(x=DATA):
    w = pyro.sample("w", dist.Normal(param("prior", 0.2), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def global_guide(x=DATA):
    w = pyro.sample("w", dist.Normal(param("loc", 0.3), 0.8))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * w + param("slope", 0.3) * x, param("width", -0.2).exp()))


def coin_model(x=DATA):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(param("prior", 0.3)))
        pyro.sample("x", dist.Normal(2.0 * c, 1.0), obs=x)


def coin_guide(x=DATA):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Bernoulli(logits=param("slope", 0.3) * x))


def global_coin_model(x=DATA):
    c = pyro.sample("c", dist.Bernoulli(param("prior", 0.3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(2.0 * c, 1.0), obs=x)


def global_coin_guide(x=DATA):
    pyro.sample("c", dist.Bernoulli(logits=param("logit", 0.3)))


def mixed_model(x=DATA):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(param("prior", 0.3)))
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)


def mixed_guide(x=DATA):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(logits=param("logit", 0.5) * x))
        pyro.sample("z", dist.Normal(param("slope", 0.3) * x + 0.5 * c, 1.0))


def enumerated_model(x=DATA):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        probs = torch.stack([param("prior", 0.3) * z, -z, 0.0 * z], -1).softmax(-1)
        c = pyro.sample("c", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(c.to(z.dtype), 1.0), obs=x)


def enumerated_global_model(x=DATA):
    c = pyro.sample("c", dist.Bernoulli(param("prior", 0.3)), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def markov_model(x=DATA):
    """Two sequences; their states are summed out, their noise is not."""
    z = pyro.sample("z", dist.Normal(param("prior", 0.2), 1.0))
    move = torch.stack([param("stay", 1.0), -param("stay", 1.0)])
    with pyro.plate("sequences", 2):
        state = 0
        for t in pyro.markov(range(3)):
            sign = 1.0 - 2.0 * torch.as_tensor(state).to(z.dtype)
            probs = (move * sign.unsqueeze(-1)).softmax(-1)
            state = pyro.sample(f"s_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(2.0 * state + z, 1.0), obs=x[t] * torch.ones(2))


def markov_guide(x=DATA):
    pyro.sample("z", dist.Normal(param("loc", 0.3), 0.8))


def subsampled_model(x=DATA):
    with pyro.plate("data", len(x), subsample_size=2) as i:
        z = pyro.sample("z", dist.Normal(param("prior", 0.2), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def subsampled_guide(x=DATA):
    with pyro.plate("data", len(x), subsample_size=2) as i:
        pyro.sample("z", dist.Normal(param("slope", 0.3) * x[i], param("width", -0.2).exp()))


def sequential_model(x=DATA):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(param("prior", 0.2), 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def sequential_guide(x=DATA):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(param("slope", 0.3) * x[i], 0.8))


def nested_model(x=DATA):
    with pyro.plate("rows", 2, dim=-2):
        r = pyro.sample("r", dist.Normal(param("prior", 0.2), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(r, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))


def nested_guide(x=DATA):
    with pyro.plate("rows", 2, dim=-2):
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(param("slope", 0.3) * x + 0.2 * r, 0.8))


def masked_model(x=DATA):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0.0):
        z = pyro.sample("z", dist.Normal(param("prior", 0.2), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked_guide(x=DATA):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0.0):
        pyro.sample("z", dist.Normal(param("slope", 0.3) * x, 0.8))


def constant_model(x=DATA):
    """Data that no latent reaches: inside the plate, outside, and in another plate."""
    pyro.sample("y", dist.Normal(param("prior", 0.2), 1.0), obs=torch.tensor(1.5))
    with pyro.plate("others", 2):
        pyro.sample("v", dist.Normal(param("prior", 0.2), 1.0), obs=torch.ones(2))
    local_model(x)


def vector_model(x=DATA):
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(param("prior", 0.2), 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:2])


def vector_guide(x=DATA):
    with pyro.plate("data", 2):
        loc = param("slope", 0.3) * x[:2].unsqueeze(-1)
        pyro.sample("z", dist.MultivariateNormal(loc.expand(2, 3), torch.eye(3)))


def auxiliary_guide(x=DATA):
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(param("slope", 0.3) * x, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(2.0 * u, -math.log(2.0) * torch.ones_like(u)))


def unsized_model(x=DATA):
    with pyro.plate("data", dim=-1):
        z = pyro.sample("z", dist.Normal(param("prior", 0.2).expand(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def unsized_guide(x=DATA):
    with pyro.plate("data", dim=-1):
        pyro.sample("z", dist.Normal(param("slope", 0.3) * x, 0.8))


def tempered_model(x=DATA):
    with poutine.scale(scale=0.25):
        local_model(x)


def tempered_guide(x=DATA):
    with poutine.scale(scale=0.25):
        local_guide(x)


PROGRAMS = {
    "local": (local_model, local_guide),
    "global": (global_model, global_guide),
    "coin": (coin_model, coin_guide),
    "global coin": (global_coin_model, global_coin_guide),
    "mixed": (mixed_model, mixed_guide),
    "enumerated": (enumerated_model, local_guide),
    "enumerated global": (enumerated_global_model, local_guide),
    "enumerated chain": (markov_model, markov_guide),
    "subsampled": (subsampled_model, subsampled_guide),
    "sequential": (sequential_model, sequential_guide),
    "nested": (nested_model, nested_guide),
    "masked": (masked_model, masked_guide),
    "constant": (constant_model, local_guide),
    "vector": (vector_model, vector_guide),
    "unsized": (unsized_model, unsized_guide),
    "auxiliary": (local_model, auxiliary_guide),
    "scaled alike": (tempered_model, tempered_guide),
    "tempered": (tempered_model, local_guide),
}
SAMPLED = {n: p for n, p in PROGRAMS.items() if "enumerated" not in n}


def loss_and_gradients(elbo, model, guide, seed):
    """Loss and every parameter's gradient, from a store and a random stream of their own."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide)
    return loss, {n: p.grad for n, p in pyro.get_param_store().named_parameters()}


def assert_equal_losses(result, expected):
    assert result[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
    assert result[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(result[1][name], gradient, rtol=1e-7, atol=1e-9, msg=name)


# The value of a draw is the log-mean-exp of its weights, its gradient that of the bound


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("name", PROGRAMS)
def test_trace_elbo_is_the_bound(name, num_particles):
    model, guide = PROGRAMS[name]
    posterior = ImportanceResampledGuide(model, guide, num_particles)
    if num_particles > 1:
        elbo = importance_weighted(num_particles)
    else:
        elbo = TraceEnum_ELBO(max_plate_nesting=1) if "enumerated" in name else Trace_ELBO()
    for seed in range(3):
        expected = loss_and_gradients(elbo, model, guide, seed)
        assert_equal_losses(loss_and_gradients(Trace_ELBO(), model, posterior, seed), expected)
    assert any(g.abs().max() > 1e-3 for g in expected[1].values())


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ["local", "global", "coin", "sequential", "subsampled"])
def test_particles_one_by_one(name, vectorize):
    """However the inner particles are run."""
    model, guide = PROGRAMS[name]
    posterior = ImportanceResampledGuide(model, guide, 3, vectorize_particles=vectorize)
    elbo = importance_weighted(3, vectorize_particles=vectorize)
    expected = loss_and_gradients(elbo, model, guide, 1)
    assert_equal_losses(loss_and_gradients(Trace_ELBO(), model, posterior, 1), expected)


def in_plate(fn, size, dim):
    def program():
        with pyro.plate("outermost", size, dim=dim):
            fn()

    return program


@pytest.mark.parametrize("name", PROGRAMS)
def test_vectorized_trace_elbo_is_the_mean_of_bounds(name):
    """Each outer particle has K inner ones of its own; the same noise as in a plate of copies of model and guide."""
    model, guide = PROGRAMS[name]
    depth = {"nested": 2, "sequential": 0}.get(name, 1)
    posterior = ImportanceResampledGuide(model, guide, 3)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=depth)
    copies = in_plate(model, 5, -depth - 1), in_plate(guide, 5, -depth - 1)
    expected = loss_and_gradients(importance_weighted(3), *copies, 1)
    expected = expected[0] / 5, {n: g / 5 for n, g in expected[1].items()}
    assert_equal_losses(loss_and_gradients(elbo, model, posterior, 1), expected)


OTHER_ELBOS = {
    "mean field": TraceMeanField_ELBO(),
    "graph": TraceGraph_ELBO(),
    "enumerating": TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False),
}


@pytest.mark.parametrize("elbo", OTHER_ELBOS)
@pytest.mark.parametrize("name", SAMPLED)
def test_other_elbos_agree(name, elbo):
    """TraceMeanField_ELBO asks for KL divergences, TraceGraph_ELBO and TraceEnum_ELBO weigh terms apart."""
    model, guide = PROGRAMS[name]
    posterior = ImportanceResampledGuide(model, guide, 3)
    expected = loss_and_gradients(Trace_ELBO(), model, posterior, 1)
    assert_equal_losses(loss_and_gradients(OTHER_ELBOS[elbo], model, posterior, 1), expected)


@pytest.mark.parametrize("name", ["enumerated", "enumerated global", "enumerated chain"])
def test_traceenum_elbo_does_not_sum_out_again(name):
    """The guide draws the enumerated sites itself."""
    model, guide = PROGRAMS[name]
    posterior = ImportanceResampledGuide(model, guide, 3)
    expected = loss_and_gradients(Trace_ELBO(), model, posterior, 1)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    assert_equal_losses(loss_and_gradients(elbo, model, posterior, 1), expected)


def test_enumeration_outside_goes_on():
    """TraceEnum_ELBO sums out another site of model and guide, before and after the inner run's own enumeration."""
    posterior = ImportanceResampledGuide(enumerated_model, local_guide, 3)
    prior, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.3, 0.3, 0.4])
    likelihoods = dist.Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(0.5))

    def other_site(probs, name):
        k = pyro.sample(name, dist.Categorical(probs), infer={"enumerate": "parallel"})
        return k.to(torch.get_default_dtype())

    def model():
        before = other_site(prior, "before")
        pyro.sample("y_before", dist.Normal(before, 1.0), obs=torch.tensor(0.5))
        enumerated_model()
        after = other_site(prior, "after")
        pyro.sample("y_after", dist.Normal(after, 1.0), obs=torch.tensor(0.5))
        summed = other_site(prior, "summed")
        pyro.sample("y_summed", dist.Normal(summed, 1.0), obs=torch.tensor(0.5))

    def guide():
        other_site(q, "before")
        posterior()
        other_site(q, "after")

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    bound, _ = loss_and_gradients(importance_weighted(3), enumerated_model, local_guide, 1)
    own = (q * (prior.log() + likelihoods - q.log())).sum()
    expected = bound - 2.0 * own - (prior.log() + likelihoods).logsumexp(0)
    assert loss_and_gradients(elbo, model, guide, 1)[0] == pytest.approx(expected.item())


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_emitted_site_has_a_score_term(name):
    """Trace_ELBO leaves guide-only sites out of the cost that multiplies it."""
    trace = poutine.trace(ImportanceResampledGuide(*PROGRAMS[name], 3)).get_trace()
    trace.compute_score_parts()
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            assert is_identically_zero(site["score_parts"].score_function)


def test_gradient_of_discrete_latents_is_unbiased():
    """d L_5 / d logit of the Bernoulli example, 0.0069682, in a plate of independent copies."""
    logit = torch.tensor(0.5, requires_grad=True)
    size = 100_000

    def model():
        with pyro.plate("copies", size):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.full((size,), 2.0))

    logits = logit.detach().expand(size).clone().requires_grad_()

    def guide():
        with pyro.plate("copies", size):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    Trace_ELBO().differentiable_loss(model, ImportanceResampledGuide(model, guide, 5)).backward()
    exact = Bernoulli(logit=logit).bound(5)
    exact.backward()
    assert logit.grad == pytest.approx(0.0069682, abs=1e-6)
    assert_mean(-logits.grad, logit.grad)


@pytest.mark.parametrize("num_particles", [2, 5])
def test_mean_of_trace_elbo_is_the_bound_of_the_gamma_example(num_particles):
    model, guide = gammas(20_000)
    posterior = ImportanceResampledGuide(model, guide, num_particles)
    guide_trace = poutine.trace(posterior).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    model_trace.compute_log_prob(), guide_trace.compute_log_prob()
    density = guide_trace.nodes["_importance_density_z"]["log_prob"]
    assert_mean(model_trace.nodes["z"]["log_prob"] - density, Gamma(shape=1.0).bound(num_particles))


# SVI


class Amortised(PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(-0.5))
        self.log_width = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_width.exp()))


@pytest.mark.parametrize("local", [False, True])
def test_training_moves_module_parameters(local):
    """Through SVI, and through ELBOModule and an optimiser of torch; from -0.5 most of the way to the exact 0.5."""
    x = torch.linspace(-2.0, 2.0, 20)
    example = Gaussian(data=x)

    def model(x):
        example.model()

    with pyro.settings.context(module_local_params=local):
        guide = Amortised()
        posterior = ImportanceResampledGuide(model, guide, 5)
        if local:
            loss = Trace_ELBO()(model, posterior)
            optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)

            def step():
                optimizer.zero_grad()
                loss(x).backward()
                optimizer.step()
        else:
            svi = SVI(model, posterior, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())

            def step():
                svi.step(x)

        for _ in range(200):
            step()
    assert guide.slope > 0.25


@pytest.mark.parametrize("vectorize", [False, True])
def test_svi_moves_param_store_parameters(vectorize):
    posterior = ImportanceResampledGuide(local_model, local_guide, 5)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorize)
    svi = SVI(local_model, posterior, pyro.optim.Adam({"lr": 0.05}), elbo)
    svi.step()
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    assert set(before) == {"noise", "prior", "slope", "width"}
    svi.step()
    assert all((p != before[n]).all() for n, p in pyro.get_param_store().items())


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_svi_trains_an_autoguide(kind):
    model = Gaussian(data=torch.tensor([1.0, -2.0])).model
    posterior = ImportanceResampledGuide(model, kind(model, init_scale=0.5), 5)
    svi = SVI(model, posterior, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = torch.tensor([svi.step() for _ in range(500)])
    assert_mean_below(losses[100:] - losses[0], 0.0)


# Handlers outside do not reach the inner run


def around(name):
    other = {"x": torch.full((4,), 50.0)}
    return {
        "trace": lambda fn: lambda: poutine.trace(fn).get_trace(),
        "mask": lambda fn: poutine.mask(fn, mask=False),
        "condition on data": lambda fn: poutine.condition(fn, data=other),
        "do to data": lambda fn: poutine.do(fn, data=other),
        "uncondition": poutine.uncondition,
        "block": poutine.block,
        "scale": lambda fn: poutine.scale(fn, scale=100.0),
        "lift": lambda fn: poutine.lift(fn, prior=dist.Normal(50.0, 1.0)),
        "infer_config": lambda fn: poutine.infer_config(fn, lambda site: {"enumerate": "parallel"}),
    }[name]


HANDLERS = ["trace", "mask", "condition on data", "do to data", "uncondition", "block", "scale", "lift", "infer_config"]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", HANDLERS)
def test_inner_run_does_not_see(name, first):
    """The same noise gives the same draws, whether the handler is there or not, from the first call on."""
    posterior, other = (ImportanceResampledGuide(local_model, local_guide, 5) for _ in range(2))
    if not first:
        posterior(), other()
    draws = []

    def remembered():
        draws.append(posterior())

    pyro.set_rng_seed(2)
    around(name)(remembered)()
    pyro.set_rng_seed(2)
    assert (draws[0]["z"] == other()["z"]).all()


def test_parameters_reach_the_inner_run():
    """A handler of parameters does, as the optimiser's must."""
    posterior = ImportanceResampledGuide(local_model, local_guide, 1)
    data = {"slope": torch.tensor(1000.0), "width": torch.tensor(-20.0)}
    data |= {"noise": torch.tensor(0.0), "prior": torch.tensor(0.0)}
    draw = poutine.substitute(posterior, data=data)()
    torch.testing.assert_close(draw["z"], 1000.0 * DATA)


def test_trace_holds_the_draw_and_its_density_only():
    trace = poutine.trace(ImportanceResampledGuide(global_model, global_guide, 5)).get_trace()
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}
    assert set(sites) == {"w", "z", "data", "_importance_density_w"}
    assert [f.name for f in sites["z"]["cond_indep_stack"]] == ["data"]
    assert sites["w"]["cond_indep_stack"] == sites["data"]["cond_indep_stack"] == ()
    assert {n for n, s in trace.nodes.items() if s["type"] == "param"} >= {"loc", "slope", "width", "prior"}
    trace.compute_log_prob()
    assert sites["z"]["log_prob_sum"] == sites["w"]["log_prob_sum"] == 0.0


def test_scale_outside_multiplies_the_loss():
    posterior = ImportanceResampledGuide(local_model, local_guide, 4)
    model, guide = (poutine.scale(fn, scale=0.1) for fn in (local_model, posterior))
    loss, gradients = loss_and_gradients(Trace_ELBO(), local_model, posterior, 1)
    expected = 0.1 * loss, {n: 0.1 * g for n, g in gradients.items()}
    assert_equal_losses(loss_and_gradients(Trace_ELBO(), model, guide, 1), expected)


def test_scale_inside_and_outside_the_model():
    """A model that is scaled wherever it is used, as scvi-tools does, and a guide likewise."""
    model, guide = (poutine.scale(fn, scale=0.1) for fn in (local_model, local_guide))
    expected = loss_and_gradients(importance_weighted(4), model, guide, 1)
    posterior = ImportanceResampledGuide(model, guide, 4)
    assert_equal_losses(loss_and_gradients(Trace_ELBO(), model, posterior, 1), expected)


def test_enclosing_plate_of_a_larger_program():
    """The guide as a part of a guide: another latent before it, and a plate around it, subsampled."""

    def larger(part):
        def program():
            pyro.sample("u", dist.Normal(param("above", 0.1), 1.0))
            with pyro.plate("groups", 6, subsample_size=3, dim=-2):
                part()

        return program

    posterior = ImportanceResampledGuide(local_model, local_guide, 4)
    loss, _ = loss_and_gradients(Trace_ELBO(), larger(local_model), larger(posterior), 1)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    dist.Normal(0.1, 1.0).sample()

    def grouped(part):
        def program():
            with pyro.plate("groups", 6, subsample_size=3, dim=-2):
                part()

        return program

    expected = importance_weighted(4).loss(grouped(local_model), grouped(local_guide))
    assert loss == pytest.approx(expected, rel=1e-9)


def test_two_of_them_in_one_guide():
    def part(name):
        def model():
            z = pyro.sample(name, dist.Normal(0.0, 1.0))
            with pyro.plate(f"data_{name}", 4):
                pyro.sample(f"x_{name}", dist.Normal(z, 1.0), obs=DATA)

        def guide():
            pyro.sample(name, dist.Normal(0.3, 1.0))

        return model, guide

    parts = [part("a"), part("b")]
    posteriors = [ImportanceResampledGuide(*p, 3) for p in parts]
    draws = []

    def guide():
        draws.append({**posteriors[0](), **posteriors[1]()})

    def model():
        parts[0][0](), parts[1][0]()

    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(model, guide)
    assert set(draws[0]) == {"a", "b"}
    pyro.set_rng_seed(1)
    first = Trace_ELBO().loss(parts[0][0], posteriors[0])
    assert loss == pytest.approx(first + Trace_ELBO().loss(parts[1][0], posteriors[1]))


# replay and condition


@pytest.mark.parametrize("name", sorted(SAMPLED.keys() - {"auxiliary"}))
def test_replay_gives_the_values_of_the_trace(name):
    posterior = ImportanceResampledGuide(*PROGRAMS[name], 3)
    first = poutine.trace(posterior).get_trace()
    again = poutine.trace(poutine.replay(posterior, trace=first)).get_trace()
    names = [n for n, s in first.nodes.items() if s["type"] == "sample" and not s["is_observed"]]
    for n in names:
        assert (again.nodes[n]["value"] == first.nodes[n]["value"]).all()
    assert again.log_prob_sum().isfinite()
    assert again.log_prob_sum() != first.log_prob_sum()  # other companions


def test_replay_of_a_guide_whose_density_is_not_known():
    """An auxiliary draw of a hand-written guide cannot be found from the model's latents."""
    posterior = ImportanceResampledGuide(*PROGRAMS["auxiliary"], 3)
    trace = poutine.trace(posterior).get_trace()
    with pytest.raises(NotImplementedError, match=r"\['u'\]"):
        poutine.replay(posterior, trace=trace)()


@pytest.mark.parametrize("name", ["enumerated", "enumerated global"])
def test_replay_of_enumerated_sites(name):
    """The log density at replayed values goes with them: p(x, z, c) - density is a bound's value at any c."""
    model, guide = PROGRAMS[name]
    posterior = ImportanceResampledGuide(model, guide, 3)
    first = poutine.trace(posterior).get_trace()
    again = poutine.trace(poutine.replay(posterior, trace=first)).get_trace()
    for n in ("z", "c"):
        assert (again.nodes[n]["value"] == first.nodes[n]["value"]).all()
    flipped = first.copy()
    flipped.nodes["c"]["value"] = 1 - first.nodes["c"]["value"].clamp(max=1)
    values = []
    for trace in (first, flipped):
        pyro.set_rng_seed(4)
        guide_trace = poutine.trace(poutine.replay(posterior, trace=trace)).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        values.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)


def gammas(size):
    """Independent copies of the Gamma example in a plate: (model, guide)."""

    def program(shape):
        def sites():
            with pyro.plate("copies", size):
                pyro.sample("z", dist.Gamma(shape, 1.0))

        return sites

    return program(2.0), program(1.0)


@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("handler", ["replay", "condition", "do"])
def test_density_at_given_values(handler, num_particles):
    """Averaged over the companions it is the density of q_EW, and the given values enter the trace."""
    z = torch.tensor([0.01, 0.3, 1.0, 2.0, 7.0])
    size = 10_000
    posterior = ImportanceResampledGuide(*gammas(5 * size), num_particles)
    given = {"z": z.repeat(size)}
    if handler == "replay":
        trace = poutine.trace(poutine.condition(gammas(5 * size)[0], data=given)).get_trace()
        trace.nodes["z"]["is_observed"] = False
        handled = poutine.replay(posterior, trace=trace)
    else:
        handled = getattr(poutine, handler)(posterior, data=given)
    trace = poutine.trace(handled).get_trace()
    trace.compute_log_prob()
    if handler != "do":
        assert (trace.nodes["z"]["value"] == given["z"]).all()
    density = trace.nodes["_importance_density_z"]["log_prob"].exp().reshape(size, 5)
    assert_mean(density, Gamma(shape=1.0).resampled_log_density(z, num_particles).exp())


def test_density_at_a_given_value_that_is_often_drawn():
    """A handler may set the very value that was selected, and its companions are not those of a selected draw."""
    coin = Bernoulli(logit=-1.5)
    handled = poutine.condition(ImportanceResampledGuide(coin.model, coin.guide, 2), {"z": torch.tensor(1.0)})
    sites = [poutine.trace(handled).get_trace().nodes["_importance_density_z"] for _ in range(500)]
    assert_mean(torch.stack([s["fn"].log_prob(s["value"]).exp() for s in sites]), coin.resampled(2))


def test_condition_makes_a_site_observed():
    posterior = ImportanceResampledGuide(global_model, global_guide, 5)
    trace = poutine.trace(poutine.condition(posterior, data={"w": torch.tensor(0.7)})).get_trace()
    assert trace.nodes["w"]["is_observed"] and trace.nodes["w"]["value"] == 0.7
    assert not trace.nodes["z"]["is_observed"]
    assert trace.log_prob_sum().isfinite()


def test_values_that_a_handler_chose_are_returned():
    posterior = ImportanceResampledGuide(global_model, global_guide, 5)
    draw = poutine.condition(posterior, data={"w": torch.tensor(0.7)})()
    assert draw["w"] == 0.7


# Subsampled plates


def minibatch_program(example, size, offset):
    def model():
        with pyro.plate("data", len(example.data), subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=example.data[i])

    def guide():
        with pyro.plate("data", len(example.data), subsample_size=size) as i:
            pyro.sample("z", dist.Normal(example.data[i] / 2.0 + offset, math.sqrt(0.5)))

    return model, guide


def test_minibatches_of_an_exact_guide():
    """The loss is that of the minibatch, scaled, whatever the noise; on average that of the full data."""
    example = Gaussian(data=torch.linspace(-2.0, 3.0, 10))
    model, guide = minibatch_program(example, 4, 0.0)
    posterior = ImportanceResampledGuide(model, guide, 3)
    posterior()
    losses = []
    for seed in range(400):
        pyro.set_rng_seed(seed)
        losses.append(Trace_ELBO().loss(model, posterior))
        pyro.set_rng_seed(seed)
        indices = posterior_minibatch(posterior)
        assert losses[-1] == pytest.approx(-2.5 * example.log_evidence[indices].sum().item())
    assert_mean(torch.tensor(losses), -example.log_evidence.sum())


def posterior_minibatch(posterior):
    return poutine.trace(posterior).get_trace().nodes["data"]["value"]


def test_minibatch_given_from_outside():
    """Indices that a handler outside has chosen are those of the inner run."""
    example = Gaussian(data=torch.linspace(-2.0, 3.0, 10))
    model, guide = minibatch_program(example, 4, 0.0)
    posterior = ImportanceResampledGuide(model, guide, 3)
    posterior()
    chosen = poutine.Trace()
    chosen.add_node("data", **poutine.trace(model).get_trace().nodes["data"])
    indices = chosen.nodes["data"]["value"]
    guide_trace = poutine.trace(poutine.replay(posterior, trace=chosen)).get_trace()
    assert (guide_trace.nodes["data"]["value"] == indices).all()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    value = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
    torch.testing.assert_close(value, 2.5 * example.log_evidence[indices].sum())


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceGraph_ELBO()])
def test_minibatch_of_model_and_guide_is_one(elbo):
    """With an exact guide and two kinds of data a loss is one of three; draws for other data would be far off."""
    example = Gaussian(data=torch.tensor([0.0] * 5 + [100.0] * 5))
    model, guide = minibatch_program(example, 2, 0.0)
    posterior = ImportanceResampledGuide(model, guide, 3)
    possible = [-5.0 * (c * example.log_evidence[-1] + (2 - c) * example.log_evidence[0]) for c in range(3)]
    losses = [elbo.loss(model, posterior) for _ in range(30)]
    assert all(any(loss == pytest.approx(p.item()) for p in possible) for loss in losses)
    assert len({round(loss) for loss in losses}) == 3


# Inside other ELBOs and other resampled guides

NESTABLE = ["local", "global", "nested", "masked", "vector", "scaled alike"]


@pytest.mark.parametrize("name", NESTABLE)
def test_inside_an_importance_weighted_elbo(name):
    """3 outer particles of 2 inner ones are 6, on the same noise: value and gradient."""
    model, guide = PROGRAMS[name]
    posterior = ImportanceResampledGuide(model, guide, 2)
    for seed in range(3):
        expected = loss_and_gradients(importance_weighted(6), model, guide, seed)
        assert_equal_losses(loss_and_gradients(importance_weighted(3), model, posterior, seed), expected)


@pytest.mark.parametrize("name", NESTABLE)
def test_inside_another_resampled_guide(name):
    model, guide = PROGRAMS[name]
    inner = ImportanceResampledGuide(model, guide, 2)
    outer = ImportanceResampledGuide(model, inner, 3)
    for seed in range(3):
        expected = loss_and_gradients(importance_weighted(6), model, guide, seed)
        assert_equal_losses(loss_and_gradients(Trace_ELBO(), model, outer, seed), expected)


@pytest.mark.parametrize("vectorize", [None, False])
def test_law_inside_another_resampled_guide(vectorize):
    """Resampling 3 draws that were resampled from 2 particles each is resampling 6: mean 12 / 7."""
    model, guide = gammas(5_000)
    inner = ImportanceResampledGuide(model, guide, 2, vectorize_particles=vectorize)
    outer = ImportanceResampledGuide(model, inner, 3, vectorize_particles=vectorize)
    assert_mean(outer()["z"], 12 / 7)
    assert_mean(outer.sample(2)["z"].flatten(), 12 / 7)
    assert_mean(outer.expectation(lambda z: z["z"], num_batches=1), 12 / 7)


def test_value_inside_an_importance_weighted_elbo():
    """L_6 of the Gamma example, and exp of the bound unbiased for the evidence, which is 1."""
    model, guide = gammas(20_000)
    posterior = ImportanceResampledGuide(model, guide, 2)
    bound = ImportanceWeightedELBO(3).bound(model, posterior)
    assert bound.shape == (20_000,)
    assert_mean(bound, Gamma(shape=1.0).bound(6))
    assert_mean(bound.exp(), 1.0)


@pytest.mark.parametrize("name", ["coin", "mixed", "enumerated", "enumerated chain", "sequential", "auxiliary"])
def test_value_of_other_programs_inside_others(name):
    """Where the gradient is estimated in another way, the value is the same still."""
    model, guide = PROGRAMS[name]
    inner = ImportanceResampledGuide(model, guide, 2)
    outer = ImportanceResampledGuide(model, inner, 3)
    for seed in range(3):
        expected, _ = loss_and_gradients(importance_weighted(6), model, guide, seed)
        assert loss_and_gradients(importance_weighted(3), model, inner, seed)[0] == pytest.approx(expected)
        assert loss_and_gradients(Trace_ELBO(), model, outer, seed)[0] == pytest.approx(expected)


@pytest.mark.parametrize("outer", ["importance weighted", "resampled"])
def test_gradient_of_discrete_latents_inside_others(outer):
    """d L_6 / d logit of the Bernoulli example for a poor guide, in a plate of copies.

    A score term of the inner bounds alone, weighed by the outer weights, would give 0.468 in place of 0.232.
    """
    size = 20_000
    logit = torch.tensor(-2.0, requires_grad=True)
    logits = logit.detach().expand(size).clone().requires_grad_()

    def model():
        with pyro.plate("copies", size):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.full((size,), 2.0))

    def guide():
        with pyro.plate("copies", size):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    inner = ImportanceResampledGuide(model, guide, 2)
    if outer == "resampled":
        loss = Trace_ELBO().differentiable_loss(model, ImportanceResampledGuide(model, inner, 3))
    else:
        loss = importance_weighted(3).differentiable_loss(model, inner)
    loss.backward()
    Bernoulli(logit=logit).bound(6).backward()
    assert_mean(-logits.grad, logit.grad)


def test_vectorized_trace_elbo_around_a_nested_one():
    inner = ImportanceResampledGuide(local_model, local_guide, 2)
    outer = ImportanceResampledGuide(local_model, inner, 3)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    loss, gradients = loss_and_gradients(elbo, local_model, outer, 1)
    copies = in_plate(local_model, 5, -2), in_plate(local_guide, 5, -2)
    expected, expected_gradients = loss_and_gradients(importance_weighted(6), *copies, 1)
    assert loss == pytest.approx(expected / 5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient / 5)


def test_predictive_of_a_nested_one():
    model, guide = gammas(40)
    outer = ImportanceResampledGuide(model, ImportanceResampledGuide(model, guide, 2), 3)
    for parallel in (True, False):
        draws = Predictive(model, guide=outer, num_samples=50, parallel=parallel)()["z"]
        assert draws.unique().numel() == draws.numel()
        assert_mean(draws.flatten(), 12 / 7)
