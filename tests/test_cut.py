# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Ways through z, told apart in every kind of guide; and what cannot be told apart raises."""

import functools
import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import autoguide as auto
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_iwae import (
    MIWAE,
    OVIS,
    PIWAE,
    VIMCO,
    DoublyReparameterized,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    LogWeights,
    Pathwise,
    SampledBackward,
    StickTheLanding,
)
from tests.statistics import assert_same_mean
from tests.test_autoguides import GUIDES, global_model, local_model, made

pytestmark = pytest.mark.usefixtures("double")
CUTTING = [StickTheLanding(), DoublyReparameterized()]


def parameters():
    return dict(sorted(pyro.get_param_store().named_parameters()))


def gradient_of(loss, params=None):
    params = parameters() if params is None else params
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params.values(), grads, strict=True)]
    )


def randomised(seed=0):
    """Moves all parameters, so that nothing is at its starting point."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters().values():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)


# Guides

QUIET = ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]
FLOWS = [name for name in GUIDES if "Flow" in name or "IAF" in name]
MESSENGERS = [name for name in GUIDES if "Messenger" in name]
DIRECT = [
    "AutoDelta",
    "AutoLaplaceApproximation",
    "AutoStructured",
    "AutoStructured mvn",
]  # parameters reach values without a draw of their own
REPLAYABLE = [name for name in GUIDES if name not in (*FLOWS, *MESSENGERS)]


@pytest.mark.parametrize("name", REPLAYABLE)
@pytest.mark.parametrize("model", [local_model, global_model])
@pytest.mark.filterwarnings("ignore:.*set by their parameters directly")
def test_one_particle_leaves_out_what_log_q_itself_gives(name, model):
    """Sticking the landing minus the pathwise gradient is d log q(z), z held, on the same draw: exactly."""
    guide = made(name, model)
    randomised()
    elbo = ImportanceWeightedELBO(num_particles=1, gradient=StickTheLanding())
    elbo.differentiable_loss(model, guide)  # inspects
    pyro.set_rng_seed(5)
    stuck = gradient_of(elbo.differentiable_loss(model, guide))
    pyro.set_rng_seed(5)
    whole = gradient_of(Trace_ELBO().differentiable_loss(model, guide))
    pyro.set_rng_seed(5)
    drawn = poutine.trace(guide).get_trace()
    for site in drawn.nodes.values():
        if site["type"] == "sample" and not isinstance(base_of(site["fn"]), dist.Delta):
            site["value"] = site["value"].detach()
    held = {n: s["value"] for n, s in drawn.nodes.items() if s["type"] == "sample" and not s["value"].requires_grad}
    with Given(held):
        again = poutine.trace(guide).get_trace()
    log_q = sum(
        s["fn"].log_prob(s["value"]).sum()
        for n, s in again.nodes.items()
        if n in held and s["type"] == "sample" and not isinstance(base_of(s["fn"]), dist.Delta)
    )
    expected = gradient_of(log_q) if torch.is_tensor(log_q) and log_q.requires_grad else 0.0
    torch.testing.assert_close(whole - stuck, torch.zeros_like(whole) + expected, rtol=1e-7, atol=1e-9)
    assert (whole - stuck).abs().max() > 1e-2 if name not in DIRECT else torch.equal(whole, stuck)


def base_of(fn):
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.TransformedDistribution):
        fn = fn.base_dist
    return fn


class Given(poutine.messenger.Messenger):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


@pytest.mark.parametrize("name", [*FLOWS, *MESSENGERS, "AutoGuideList", "AutoStructured"])
@pytest.mark.filterwarnings("ignore:.*Jacobian", "ignore:.*set by their parameters directly")
def test_means_agree_for_guides_of_every_kind(name):
    """Doubly reparameterised and pathwise, two particles, noise of their own."""
    model = global_model
    guide = made(name, model)
    randomised()
    grads = []
    for gradient in (Pathwise(), DoublyReparameterized()):
        elbo = ImportanceWeightedELBO(num_particles=2, gradient=gradient)
        params = parameters()
        chosen = torch.randn(7, sum(p.numel() for p in params.values()), generator=torch.Generator().manual_seed(1))
        rows = [chosen @ gradient_of(elbo.differentiable_loss(model, guide)) for _ in range(150)]
        grads.append(torch.stack(rows))
    assert_same_mean(*grads)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(transforms.planar, 3),
        functools.partial(transforms.affine_autoregressive, 3, hidden_dims=[8]),
        pytest.param(
            functools.partial(transforms.spline_autoregressive, 3, hidden_dims=[8]), marks=pytest.mark.nightly
        ),
        functools.partial(transforms.block_autoregressive, 3, hidden_factors=[4]),
        functools.partial(transforms.affine_coupling, 3, hidden_dims=[8]),
        pytest.param(functools.partial(transforms.spline_coupling, 3, hidden_dims=[8]), marks=pytest.mark.nightly),
        functools.partial(transforms.householder, 3),
    ],
    ids=lambda make: make.func.__name__,
)
@pytest.mark.filterwarnings("ignore:.*Jacobian")
def test_the_posterior_as_a_flow_has_no_gradient(make):
    """The model's prior is the guide itself, so that every weight is 1: no noise in any parameter of the flow."""
    pyro.set_rng_seed(3)
    flow = make()
    frozen = make()
    frozen.load_state_dict(flow.state_dict())
    frozen.requires_grad_(False)

    def law(transform):
        base = dist.Normal(torch.zeros(3), WIDTHS).to_event(1)
        return dist.TransformedDistribution(base, [transform, transforms.AffineTransform(0.5, 2.0, cache_size=1)])

    class Same(dist.TorchDistribution):
        """Density by the flow's own, at the very value that was drawn: no inverse is needed."""

        arg_constraints, support, has_rsample = {}, dist.constraints.real_vector, True

        def __init__(self):
            super().__init__((), (3,))

        def expand(self, shape, _instance=None):
            return self

        def log_prob(self, value):
            return inverse_by_newton(frozen, (value - 0.5) / 2.0) - 3.0 * math.log(2.0)

        def rsample(self, shape=()):
            return law(frozen).rsample(shape)

    def model():
        pyro.sample("z", Same())

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", law(flow))

    for gradient in CUTTING:
        elbo = ImportanceWeightedELBO(num_particles=3, gradient=gradient, vectorize_particles=False)
        loss = elbo.differentiable_loss(model, guide)
        assert loss.item() == pytest.approx(0.0, abs=1e-7)
        grads = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
        assert max(g.abs().max().item() for g in grads if g is not None) < 1e-6
    pathwise = ImportanceWeightedELBO(num_particles=3, vectorize_particles=False).differentiable_loss(model, guide)
    grads = torch.autograd.grad(pathwise, list(flow.parameters()), allow_unused=True)
    assert max(g.abs().max().item() for g in grads if g is not None) > 1e-3


WIDTHS = torch.tensor([0.6, 1.0, 1.7], dtype=torch.float64)


def inverse_by_newton(flow, y):
    """log density at y of a normal pushed through a flow, differentiable by y."""
    x = y.detach().clone()
    for _ in range(100):
        jacobian = torch.autograd.functional.jacobian(flow._call, x)
        x = x - torch.linalg.solve(jacobian, flow._call(x) - y.detach())
    jacobian = torch.autograd.functional.jacobian(flow._call, x).detach()
    x = x + torch.linalg.solve(jacobian, y - flow._call(x).detach())
    image = flow(x)
    return dist.Normal(0.0, WIDTHS).log_prob(x).sum() - flow.log_abs_det_jacobian(x, image).sum()


SQUASHED = {
    "tanh": lambda a: dist.TransformedDistribution(dist.Normal(4.0 + a, 3.0), [transforms.TanhTransform(cache_size=1)]),
    "sigmoid": lambda a: dist.TransformedDistribution(
        dist.Normal(10.0 + a, 5.0), [transforms.SigmoidTransform(cache_size=1)]
    ),
    "stick breaking": lambda a: dist.TransformedDistribution(
        dist.Normal(4.0 + a.expand(3), 8.0).to_event(1), [transforms.StickBreakingTransform(cache_size=1)]
    ),
}


@pytest.mark.parametrize("gradient", [*CUTTING, SampledBackward(2)], ids=repr)
@pytest.mark.parametrize("name", SQUASHED)
def test_what_a_flow_remembers_is_not_lost_where_its_inverse_rounds(gradient, name):
    """float32, saturated: the density at the draw is that of Trace_ELBO, to rounding."""
    torch.set_default_dtype(torch.float32)
    a = torch.tensor(0.1, requires_grad=True)

    def guide():
        pyro.sample("z", SQUASHED[name](a))

    model = plain_model(guide_law(SQUASHED[name]))
    losses = []
    for chosen in (Pathwise(), gradient):
        elbo = ImportanceWeightedELBO(20, gradient=chosen, vectorize_particles=True)
        elbo.loss(model, guide)
        pyro.set_rng_seed(8)
        losses.append(elbo.differentiable_loss(model, guide))
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5, abs=1e-5)
    assert bool(torch.autograd.grad(losses[1], a)[0].isfinite())


def guide_law(make):
    shape = make(torch.tensor(0.0)).event_shape
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)) if shape != (4,) else dist.Dirichlet(torch.ones(4))


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
def test_a_slow_inverse_is_said_once(gradient):
    guide = made("AutoIAFNormal", global_model)
    elbo = ImportanceWeightedELBO(num_particles=2, gradient=gradient)
    with pytest.warns(UserWarning, match=r"'_AutoIAFNormal_latent'.*6 backward passes.*Pathwise"):
        elbo.loss_and_grads(global_model, guide)
    elbo.loss_and_grads(global_model, guide)  # warnings are errors here
    ImportanceWeightedELBO(num_particles=2).loss_and_grads(global_model, guide)
    quiet = made("AutoMultivariateNormal", global_model)
    ImportanceWeightedELBO(num_particles=2, gradient=gradient).loss_and_grads(global_model, quiet)


def partly_structured(model):
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(poutine.block(model, expose=["z"])))
    guide.append(auto.AutoStructured(poutine.block(model, expose=["s", "w"])))
    guide()
    return guide


@pytest.mark.parametrize("name", [*DIRECT, "AutoGaussian", "AutoGuideList", "partly structured"])
def test_parameters_beside_every_draw_are_said_once(name):
    """Sites that parameters reach directly: the gradient is the pathwise one there, and no less right."""
    guide = partly_structured(global_model) if name == "partly structured" else made(name, global_model)
    elbo = ImportanceWeightedELBO(num_particles=2, gradient=DoublyReparameterized())
    with pytest.warns(UserWarning, match="set by their parameters directly"):
        elbo.loss_and_grads(global_model, guide)
    elbo.loss_and_grads(global_model, guide)


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_said_of_guides_that_draw_with_all_their_parameters(name):
    ImportanceWeightedELBO(2, gradient=DoublyReparameterized()).loss_and_grads(global_model, made(name, global_model))


class Remembering(dist.TorchDistribution):
    """As Pyro wraps zuko's flows: it draws and knows the density at once, and keeps that by the very value."""

    arg_constraints, support, has_rsample = {}, dist.constraints.real, True

    def __init__(self, base):
        self.base, self.known = base, {}
        super().__init__(base.batch_shape, base.event_shape)

    def rsample(self, sample_shape=()):
        value = self.base.rsample(sample_shape)
        self.known[value] = self.base.log_prob(value)
        return value

    def log_prob(self, value):
        return self.known[value] if value in self.known else self.base.log_prob(value)

    def expand(self, batch_shape, _instance=None):
        return Remembering(self.base.expand(batch_shape))


@pytest.mark.parametrize("gradient", [*CUTTING, SampledBackward(2)], ids=repr)
def test_a_flow_that_keeps_densities_by_value(gradient):
    """What it kept is that of the draw, not of the leaf: it is asked again, and differentiable there."""
    found = []
    for wrap in (lambda fn: fn, Remembering):
        loc = torch.full((3,), 0.3, requires_grad=True)

        def guide(wrap=wrap, loc=loc):
            with pyro.plate("data", 3):
                pyro.sample("z", wrap(dist.Normal(loc, 0.8)))

        elbo = ImportanceWeightedELBO(5, gradient=gradient)
        elbo.loss(local_model, guide)
        pyro.set_rng_seed(2)
        found.append(torch.autograd.grad(elbo.differentiable_loss(local_model, guide), loc)[0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
@pytest.mark.parametrize("make", [auto.AutoNormal, auto.AutoDiagonalNormal, auto.AutoMultivariateNormal])
def test_autoguides_at_the_exact_posterior_have_no_gradient(gradient, make):
    """z ~ N(0, 1), x ~ N(z, 1): the posterior is N(x / 2, 1 / 2), set by hand."""
    guide = make(local_model, init_loc_fn=auto.initialization.init_to_value(values={"z": data_of() / 2.0}))
    guide()
    with torch.no_grad():
        for name, p in pyro.get_param_store().named_parameters():
            if "scale" in name and "tril" not in name:
                pyro.param(name).unconstrained().copy_(transforms.biject_to(dist.constraints.softplus_positive).inv(
                    torch.full(p.shape, 0.5**0.5)))  # fmt: skip
    loss = ImportanceWeightedELBO(4, gradient=gradient).differentiable_loss(local_model, guide)
    assert gradient_of(loss).abs().max() < 1e-10
    pathwise = ImportanceWeightedELBO(4).differentiable_loss(local_model, guide)
    assert gradient_of(pathwise).abs().max() > 1e-3


def data_of():
    return torch.tensor([0.5, -1.0, 2.0])


def test_where_parameters_may_live():
    """pyro.param, pyro.module, PyroModule: one and the same gradient."""
    data = torch.tensor([0.5, -1.0, 2.0])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def by_param():
        loc = pyro.param("loc", torch.full((3,), 0.3))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, scale))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.full((3,), 0.3))
            self.log_scale = nn.Parameter(torch.tensor(0.7).log())

    net = Net()

    def by_module():
        pyro.module("net", net)
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(net.loc, net.log_scale.exp()))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.full((3,), 0.3))
            self.scale = PyroParam(torch.tensor(0.7), dist.constraints.positive)

        def forward(self):
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(self.loc, self.scale))

    class Sampled(PyroModule):
        """The latent is an attribute."""

        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.full((3,), 0.3))
            self.scale = PyroParam(torch.tensor(0.7), dist.constraints.positive)

        @PyroSample
        def z(self):
            return dist.Normal(self.loc, self.scale)

        def forward(self):
            with pyro.plate("data", 3):
                return self.z

    for gradient in CUTTING:
        found = []
        for guide in (by_param, by_module, Guide(), Sampled()):
            pyro.clear_param_store()
            elbo = ImportanceWeightedELBO(num_particles=4, gradient=gradient)
            elbo.loss(model, guide)
            pyro.set_rng_seed(1)
            loss = elbo.differentiable_loss(model, guide)
            found.append(gradient_of(loss))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


@pytest.mark.filterwarnings("ignore:BatchNorm1d in training mode")
def test_dropout_and_batch_norm_in_the_guide():
    """The guide runs once, so that z and log q have one and the same mask."""
    data = torch.randn(8, 4)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))

    def model():
        with pyro.plate("data", 8):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=data)

    def guide():
        pyro.module("encoder", encoder)
        loc = encoder(data).squeeze(-1)
        with pyro.plate("data", 8):
            pyro.sample("z", dist.Normal(loc, 0.5))

    elbos = [ImportanceWeightedELBO(3, gradient=g) for g in (Pathwise(), *CUTTING, SampledBackward(3))]
    values = []
    for elbo in elbos:
        elbo.loss(model, guide)
        encoder[1].reset_running_stats()
        pyro.set_rng_seed(9)
        values.append((elbo.loss_and_grads(model, guide), encoder[1].num_batches_tracked.item()))
    assert values == [(pytest.approx(values[0][0]), 1)] * 4


def test_the_same_seed_gives_the_same_particles_under_every_gradient():
    def guide():
        loc = pyro.param("loc", torch.tensor(0.2))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 0.8))

    losses = []
    for gradient in (Pathwise(), *CUTTING, SampledBackward(2)):
        elbo = ImportanceWeightedELBO(6, gradient=gradient)
        elbo.loss(local_model, guide)
        pyro.set_rng_seed(4)
        losses.append(elbo.loss_and_grads(local_model, guide))
    assert losses == [pytest.approx(losses[0])] * 4


@pytest.mark.parametrize("gradient", [Pathwise(), *CUTTING, SampledBackward(2)], ids=repr)
@pytest.mark.parametrize("num_particles", [1, 30])
def test_without_gradients(gradient, num_particles):
    """A validation loop: the value alone."""
    elbo = ImportanceWeightedELBO(num_particles, gradient=gradient)
    guide = made("AutoNormal", local_model)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert not elbo.differentiable_loss(local_model, guide).requires_grad
            assert not elbo(local_model, guide)().requires_grad
            assert math.isfinite(elbo.loss(local_model, guide))
    assert elbo.log_weights(local_model, guide).cut is None


def test_a_graph_can_be_used_twice():
    """retain_graph, and both autograd.grad and backward."""
    guide = made("AutoNormal", local_model)
    elbo = ImportanceWeightedELBO(6, gradient=DoublyReparameterized(), retain_graph=True)
    loss = elbo.differentiable_loss(local_model, guide)
    first, second = gradient_of(loss), gradient_of(loss)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("gradient", [*CUTTING, SampledBackward(3)], ids=repr)
def test_training_with_svi(gradient):
    """Ends at the posterior of a conjugate model."""
    data = torch.tensor([0.5, -1.0, 2.0])
    guide = auto.AutoNormal(local_model)
    svi = SVI(local_model, guide, pyro.optim.Adam({"lr": 0.05}), ImportanceWeightedELBO(8, gradient=gradient))
    for _ in range(400):
        svi.step()
    # For K > 1 any guide near the posterior is nearly optimal; sticking the landing is exact there.
    posterior = ImportanceResampledGuide(local_model, guide, num_particles=200)
    torch.testing.assert_close(guide.median()["z"], data / 2.0, atol=0.15, rtol=0.0)
    assert posterior.elbo_interval().lower.sum() <= dist.Normal(0.0, 2**0.5).log_prob(data).sum() + 0.05


# One particle


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
def test_one_particle_with_score_sites(gradient):
    """K = 1 has the mean gradient of Trace_ELBO, and less noise where the guide is reparameterised."""
    n = 40_000

    def gradients(elbo):
        logit, loc = (torch.full((n,), v, requires_grad=True) for v in (0.4, 0.2))

        def model():
            with pyro.plate("copies", n):
                b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))
                z = pyro.sample("z", dist.Normal(b, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.2))

        def guide():
            with pyro.plate("copies", n):
                b = pyro.sample("b", dist.Bernoulli(logits=logit))
                pyro.sample("z", dist.Normal(loc + b, 0.9))

        return torch.stack(torch.autograd.grad(elbo.differentiable_loss(model, guide), [logit, loc]), -1)

    assert_same_mean(gradients(ImportanceWeightedELBO(1, gradient=gradient)), gradients(Trace_ELBO()))


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
def test_one_particle_with_an_enumerated_guide_site_raises(gradient):
    def model():
        pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))

    def guide():
        logit = pyro.param("logit", torch.tensor(0.2))
        pyro.sample("b", dist.Bernoulli(logits=logit), infer={"enumerate": "parallel"})

    with pytest.raises(NotImplementedError, match=r"\['b'\].*TraceEnum_ELBO.*Pathwise"):
        ImportanceWeightedELBO(1, gradient=gradient).loss_and_grads(model, guide)
    elbo = ImportanceWeightedELBO(3, gradient=gradient, strict_enumeration_warning=False)
    assert math.isfinite(elbo.loss_and_grads(model, guide))  # sampled


def test_guide_enumerated_sites_are_exact_at_one_particle_and_sampled_above():
    n = 20_000
    logits = torch.full((n,), 0.5, requires_grad=True)

    def model():
        with pyro.plate("copies", n):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("copies", n):
            pyro.sample("z", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    (exact,) = torch.autograd.grad(ImportanceWeightedELBO(1).differentiable_loss(model, guide), logits)
    assert exact.std() < 1e-12  # no noise
    for score in (VIMCO(), OVIS(), None):
        elbo = ImportanceWeightedELBO(5, score=score, strict_enumeration_warning=False)
        (sampled,) = torch.autograd.grad(-elbo.differentiable_loss(model, guide), logits)
        assert sampled.std() > 1e-3
        z = (sampled.mean() - 0.0069682) / (sampled.std() / n**0.5)
        assert abs(z) < 5.5


# What cannot be right raises


def loss_of(model, guide, gradient, num_particles=3, **options):
    return ImportanceWeightedELBO(num_particles, gradient=gradient, **options).differentiable_loss(model, guide)


def plain_model(fn):
    def model():
        pyro.sample("z", fn)

    return model


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda a: dist.Uniform(torch.tensor(0.0), a),
        lambda a: dist.Uniform(torch.zeros(2), a.expand(2)).to_event(1),
        lambda a: dist.TransformedDistribution(
            dist.Uniform(torch.tensor(0.0), 1.0), [transforms.AffineTransform(torch.tensor(0.0), a)]
        ),
        lambda a: dist.Pareto(a, torch.tensor(2.0)),
        lambda a: dist.TransformedDistribution(
            dist.Logistic(torch.tensor(0.0), 1.0),
            [transforms.SigmoidTransform(), transforms.AffineTransform(torch.tensor(0.0), a)],
        ),
        lambda a: dist.TransformedDistribution(
            dist.Normal(torch.tensor(0.0), 1.0),
            [transforms.LeakyReLUTransform(), transforms.AffineTransform(a, 1.0)],
        ),
        lambda a: dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), a).to_event(1),
            [transforms.LeakyReLUTransform(), transforms.affine_coupling(2, hidden_dims=[3])],
        ),
        lambda a: dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), a).to_event(1),
            [transforms.neural_autoregressive(2, hidden_dims=[4], activation="LeakyReLU")],
        ),
    ],
    ids=[
        "Uniform",
        "two Uniforms",
        "a scaled Uniform",
        "Pareto",
        "a squashed Logistic",
        "a kink that moves",
        "a kink below a coupling",
        "a kink inside a network",
    ],
)
def test_a_support_that_moves_raises(gradient, make):
    a = torch.tensor(0.9, requires_grad=True)
    shape = make(a).event_shape
    model = plain_model(dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))

    def guide():
        pyro.sample("z", make(a))

    with pytest.raises(ValueError, match=r"support does not move.*site 'z'.*Pathwise"):
        loss_of(model, guide, gradient)
    assert loss_of(model, guide, Pathwise()).requires_grad


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda a: dist.Gamma(a, a),
        lambda a: dist.LogNormal(a, 0.5),
        lambda a: dist.Beta(a, 1.0),
        lambda a: dist.TransformedDistribution(dist.Beta(a, 1.0), [transforms.SigmoidTransform().inv]),
        lambda a: dist.Kumaraswamy(a, torch.tensor(1.5)),
        lambda a: dist.TransformedDistribution(dist.Normal(a, 1.0), [transforms.LeakyReLUTransform()]),
        lambda a: dist.TransformedDistribution(
            dist.Normal(a, 1.0), [transforms.SigmoidTransform(), transforms.AffineTransform(-1.0, 2.0)]
        ),
        lambda a: dist.TransformedDistribution(
            dist.Normal(a, 1.0), [transforms.ExpTransform(), transforms.AffineTransform(0.0, a)]
        ),
        lambda a: dist.TransformedDistribution(
            dist.Exponential(torch.tensor(1.0)), [transforms.AffineTransform(0.0, a)]
        ),
    ],
    ids=[
        "Gamma",
        "LogNormal",
        "Beta",
        "logit of Beta",
        "Kumaraswamy",
        "a kink that stays",
        "a fixed interval",
        "a scaled LogNormal",
        "a scaled Exponential",
    ],
)
def test_a_support_that_stays_does_not_raise(gradient, make):
    a = torch.tensor(0.9, requires_grad=True)

    def guide():
        pyro.sample("z", make(a))

    loss = loss_of(guide_as_model(make), guide, gradient)
    assert bool(torch.autograd.grad(loss, a)[0].isfinite())


def guide_as_model(make):
    return plain_model(make(torch.tensor(1.1)))


def test_a_sampler_by_rejection_is_left_to_the_pathwise_and_score_parts():
    rate = torch.tensor(1.3, requires_grad=True)
    model = plain_model(dist.Exponential(torch.tensor(2.0)))

    def guide():
        pyro.sample("z", RejectionExponential(rate, torch.tensor(0.5)))

    grads = []
    for gradient in (Pathwise(), DoublyReparameterized()):
        pyro.set_rng_seed(2)
        elbo = ImportanceWeightedELBO(4, gradient=gradient, vectorize_particles=False)
        grads.append(torch.autograd.grad(elbo.differentiable_loss(model, guide), rate)[0])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
def test_a_resampled_guide_raises(gradient):
    posterior = ImportanceResampledGuide(local_model, made("AutoNormal", local_model), num_particles=3)
    with pytest.raises(NotImplementedError, match=r"'z' of a resampled one.*Pathwise"):
        loss_of(local_model, posterior, gradient)


CHANGES = {
    "guide mul_": (lambda z: z.mul_(2.0), True),
    "guide clamp_": (lambda z: z.clamp_(min=0.0), True),
    "guide set item": (lambda z: z.__setitem__((..., 0), 0.0), True),
    "model add": (lambda z: z.add_(1.0), False),
}


@pytest.mark.parametrize("gradient", [*CUTTING, SampledBackward(2)], ids=repr)
@pytest.mark.parametrize("name", CHANGES)
def test_a_value_that_is_changed_in_place_raises(gradient, name):
    change, in_guide = CHANGES[name]
    loc = torch.tensor(0.3, requires_grad=True)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            if not in_guide:
                change(z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    def guide():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(loc.expand(3), 0.7))
            if in_guide:
                change(z)

    with pytest.raises(ValueError, match=r"'z' to stay as it was drawn.*in place"):
        loss_of(model, guide, gradient, vectorize_particles=True).backward()


@pytest.mark.parametrize("gradient", CUTTING, ids=repr)
@pytest.mark.parametrize("family", [dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough])
def test_a_straight_through_draw_raises(gradient, family):
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    fn = family(torch.tensor(0.5), logits=logits)
    fn = fn if fn.event_dim else fn.to_event(1)

    def guide():
        pyro.sample("z", fn)

    with pytest.raises(NotImplementedError, match=r"straight-through one at guide site 'z'.*Pathwise"):
        loss_of(plain_model(fn), guide, gradient)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_mask_inside_an_event(vectorize):
    """dist.Normal(...).mask(m).to_event(1): the mask is along the event, not along the plate."""
    loc, mask = torch.zeros(8, 3, requires_grad=True), torch.tensor([True, True, False])

    def model():
        with pyro.plate("data", 8):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(mask).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask).to_event(1), obs=torch.ones(8, 3))

    def guide():
        with pyro.plate("data", 8):
            pyro.sample("z", dist.Normal(loc, 0.8).mask(mask).to_event(1))

    for gradient in (*CUTTING, SampledBackward(2)):
        (slope,) = torch.autograd.grad(loss_of(model, guide, gradient, vectorize_particles=vectorize), loc)
        assert bool((slope[:, 2] == 0.0).all()) and bool((slope[:, :2] != 0.0).all())


def gaussian_chain(scales=(1.0, 1.0), masks=(True, True), observed=True):
    """Two latents in model and guide alike, each with its own scale and mask."""
    log_scale = torch.zeros((), requires_grad=True)

    def model():
        with poutine.scale(scale=scales[0]), poutine.mask(mask=torch.tensor(masks[0])):
            a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
        with poutine.scale(scale=scales[1]), poutine.mask(mask=torch.tensor(masks[1])):
            b = pyro.sample("b", dist.Normal(a, 1.0))
        mean = a + b if observed else a
        pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(0.7))

    def guide():
        with poutine.scale(scale=scales[0]), poutine.mask(mask=torch.tensor(masks[0])):
            pyro.sample("a", dist.Normal(torch.tensor(0.2), log_scale.exp()))
        with poutine.scale(scale=scales[1]), poutine.mask(mask=torch.tensor(masks[1])):
            pyro.sample("b", dist.Normal(torch.tensor(0.3), log_scale.exp()))

    return model, guide, log_scale


def test_scales_that_differ_raise():
    model, guide, _ = gaussian_chain(scales=(0.5, 0.25))
    with pytest.raises(ValueError, match=r"one number that scales log q.*'a', 'b'"):
        loss_of(model, guide, DoublyReparameterized())
    loss_of(model, guide, StickTheLanding())
    loss_of(model, guide, DoublyReparameterized(), num_particles=1)
    model, guide, _ = gaussian_chain(scales=(0.5, 0.5))
    loss_of(model, guide, DoublyReparameterized())


def test_a_masked_value_that_reaches_the_weights_raises():
    model, guide, _ = gaussian_chain(masks=(True, False))
    with pytest.raises(ValueError, match=r"site 'b' is masked there and reaches them.*Pathwise"):
        loss_of(model, guide, DoublyReparameterized())
    model, guide, log_scale = gaussian_chain(masks=(True, False), observed=False)
    loss = loss_of(model, guide, DoublyReparameterized())
    assert bool(torch.autograd.grad(loss, log_scale)[0] != 0.0)
    loss_of(*gaussian_chain(masks=(True, False))[:2], DoublyReparameterized(), num_particles=1)


def test_a_masked_value_that_reaches_a_sum_to_one_does_not_raise():
    """The coin follows z and is seen nowhere: summed out it is 1, and what rounding leaves of a slope is none."""
    known = torch.tensor([[True], [False]])
    loc = torch.tensor([[0.3], [-0.4]], requires_grad=True)

    def latents(at, scale):
        with pyro.plate("rows", 2, dim=-2), poutine.mask(mask=known):
            return pyro.sample("z", dist.Normal(at, scale))

    def model():
        z = latents(torch.zeros(2, 1), 1.0)
        pyro.sample("c", dist.Bernoulli(logits=z.sum(-2, keepdim=True)), infer={"enumerate": "parallel"})

    def guide():
        latents(loc, 0.7)

    for seed in range(20):
        pyro.set_rng_seed(seed)
        loss = loss_of(model, guide, DoublyReparameterized(), num_particles=7)
        assert bool(torch.autograd.grad(loss, loc)[0][0] != 0.0)


def test_weights_without_a_cut_raise():
    weights = LogWeights(torch.zeros(3, requires_grad=True))
    for gradient in CUTTING:
        with pytest.raises(ValueError, match="log weights with a cut"):
            gradient.surrogate(weights, weights.totals())


def test_the_pathwise_gradient_of_a_moving_support_for_an_objective_in_parts():
    """The guide's part of PIWAE is MIWAE, on the same draws: nothing of log q is left out, so that nothing raises."""
    b = torch.tensor(2.0, requires_grad=True)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Uniform(-b, torch.tensor(3.0)).expand([3]))

    found = []
    for objective in (PIWAE(2), MIWAE(2)):
        pyro.set_rng_seed(4)
        found.append(torch.autograd.grad(loss_of(local_model, guide, Pathwise(), 4, objective=objective), b)[0])
    torch.testing.assert_close(found[0], found[1])


def test_an_objective_in_parts_says_that_it_cuts():
    def guide():
        with pyro.plate("data", 3):
            pyro.sample(
                "z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=torch.zeros(3).requires_grad_())
            )

    with pytest.raises(NotImplementedError, match=r"site 'z'.*any objective but PIWAE"):
        loss_of(local_model, guide, Pathwise(), 4, objective=PIWAE(2))
    assert loss_of(local_model, guide, Pathwise(), 4, objective=PIWAE(1)).requires_grad


TORCHS_OWN = {  # torch puts an Independent of its own around the base, which has no event_dim
    "spline_coupling": functools.partial(transforms.spline_coupling, 2, hidden_dims=[4]),
    "planar": functools.partial(transforms.planar, 2),
    "stick breaking": transforms.StickBreakingTransform,
}


@pytest.mark.parametrize("name", TORCHS_OWN)
@pytest.mark.filterwarnings("ignore:.*Jacobian")
def test_flows_over_a_base_without_events(name):
    """The same draws, densities and gradients as over a base whose dimension is declared to be an event."""
    pyro.set_rng_seed(5)
    flow = [TORCHS_OWN[name]()]
    loc = torch.zeros(2, 2, requires_grad=True)
    params = [loc, *(p for t in flow if isinstance(t, nn.Module) for p in t.parameters())]
    event = dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), flow).event_shape
    target = (
        dist.Dirichlet(torch.full(event, 2.0))
        if name == "stick breaking"
        else dist.Normal(torch.zeros(event), 1.0).to_event(1)
    )

    def model():
        with pyro.plate("data", 2):
            pyro.sample("z", target)

    for gradient in [*CUTTING, SampledBackward(2)]:
        found = []
        for base in (dist.Normal(loc, 1.0), dist.Normal(loc, 1.0).to_event(1)):

            def guide(base=base):
                with pyro.plate("data", 2):
                    pyro.sample("z", dist.TransformedDistribution(base, flow))

            pyro.set_rng_seed(6)
            grads = torch.autograd.grad(loss_of(model, guide, gradient, 4), params, allow_unused=True)
            found.append([g for g in grads if g is not None])
        assert found[0]
        torch.testing.assert_close(found[0], found[1])


def test_pathwise_needs_a_cut_only_where_the_guide_has_its_own_objective():
    guide = made("AutoNormal", local_model)
    assert loss_of(local_model, guide, Pathwise(), 4, objective=PIWAE(2)).requires_grad


def masked_away(unit, factor):
    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, unit))
        pyro.factor("f", factor(z / unit))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.2 * unit))
        with poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(loc, unit))

    return model, guide


@pytest.mark.parametrize("unit", [1.0, 1e5])  # in small units its rounding is not to be told from a slope: refused
def test_a_masked_value_that_reaches_the_weights_by_rounding_alone(unit):
    """A coin that is summed out adds log 1, whatever its odds."""
    elbo = ImportanceWeightedELBO(num_particles=4, gradient=DoublyReparameterized())
    for _ in range(5):
        elbo.loss_and_grads(
            *masked_away(unit, lambda z: torch.logaddexp(torch.nn.functional.logsigmoid(z), (-z).sigmoid().log()))
        )


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_a_masked_value_that_does_reach_the_weights_is_refused_in_any_unit(unit):
    elbo = ImportanceWeightedELBO(num_particles=4, gradient=DoublyReparameterized())
    with pytest.raises(ValueError, match="site 'z' is masked there and reaches them"):
        elbo.loss_and_grads(*masked_away(unit, lambda z: -0.5 * z**2))


def test_a_masked_value_beside_a_tight_one_is_refused():
    """The slope of 3 that it has is small beside a million."""

    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1e-6))
        pyro.factor("f", -0.5 * (z - 3.0) ** 2)

    def guide():
        with poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        pyro.sample("y", dist.Normal(0.0, 1e-6))

    with pytest.raises(ValueError, match="site 'z' is masked there and reaches them"):
        ImportanceWeightedELBO(4, gradient=DoublyReparameterized()).loss_and_grads(model, guide)


@pytest.mark.parametrize("alone", [False, True], ids=["beside another", "alone"])
def test_a_masked_value_near_zero_that_reaches_the_weights_is_refused(alone):
    """In nats it hardly matters where it falls; its parameter's slope is 1 all the same."""

    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = 0.0 if alone else pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.factor("f", -0.5 * (z - 1.0) ** 2 + y)

    def guide():
        with poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1e-7))
        if not alone:
            pyro.sample("y", dist.Normal(0.0, 1.0))

    elbo = ImportanceWeightedELBO(num_particles=4, gradient=DoublyReparameterized())
    with pytest.raises(ValueError, match="site 'z' is masked there and reaches them"):
        elbo.loss_and_grads(model, guide)
