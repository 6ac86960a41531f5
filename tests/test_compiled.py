# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A recorded step is the step of model and guide on the same random numbers: loss, gradients, and what raises.

Compiling takes seconds, so that most tests run the recording as it is; a few compile it.
"""

import copy
import functools
import gc
import math
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from sklearn.datasets import load_digits
from torch.distributions import constraints

from pyro_iwae import (
    CIWAE,
    MIWAE,
    OVIS,
    PIWAE,
    TVO,
    VIMCO,
    CompiledSVI,
    DoublyReparameterized,
    ImportanceWeightedELBO,
    Pathwise,
    Renyi,
    SampledBackward,
    StickTheLanding,
)
from pyro_iwae import compiled as compiled_module
from pyro_iwae import step as step_module
from pyro_iwae.capture import Graph, capture
from tests.programs import LATENT, programs
from tests.statistics import assert_same_mean
from tests.trees import tree_programs

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)


@pytest.fixture(autouse=True)
def recorded_only(request, monkeypatch):
    """Runs recordings as graphs of single operations, but in tests marked ``compiling``."""
    if "compiling" not in request.fixturenames:
        monkeypatch.setattr(Graph, "compile", lambda self, tensors: None)


@pytest.fixture
def compiling():
    """Has recordings compiled."""


X = torch.tensor([0.3, -1.2, 2.0, 0.7])


def flat_model(x):
    scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def flat_guide(x):
    slope, spread = pyro.param("slope", torch.tensor(0.4)), pyro.param("spread", torch.tensor(-0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, spread.exp()))


def chain_model(x):
    weight = pyro.param("weight", torch.tensor(0.7))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(weight * a, 1.0))
        pyro.sample("x", dist.Normal(b, 0.5), obs=x)


def chain_guide(x):
    p, q = pyro.param("p", torch.tensor([0.3, 0.2])), pyro.param("q", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(p[0] * x, q.exp()))
        pyro.sample("b", dist.Normal(p[1] * a + x, 0.7))


def coin_model(x):
    logit = pyro.param("prior", torch.tensor(0.2))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(logits=logit))
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)


def coin_guide(x):
    logit, loc = pyro.param("logit", torch.tensor(-0.1)), pyro.param("loc", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Bernoulli(logits=logit + x))
        pyro.sample("z", dist.Normal(loc * x, 0.8))


def enumerated_model(x):
    weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + c, 0.5), obs=x)


def gamma_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def gamma_guide(x):
    a = pyro.param("a", torch.tensor(1.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Gamma(a, 1.0))


def rows_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)), obs=x)


def minibatch_model(x):
    loc = pyro.param("prior_loc", torch.tensor(0.1))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def minibatch_guide(x):
    slope = pyro.param("slope", torch.tensor(0.4))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("z", dist.Normal(slope * x[index], 1.0))


def chosen_model(x):
    """A minibatch that was chosen outside: ``subsample`` says which rows it holds."""
    with pyro.plate("data", 12, subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def chosen_guide(x):
    with pyro.plate("data", 12, subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.4)) * x, 1.0))


def sequential_model(x):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def sequential_guide(x):
    slope = pyro.param("slope", torch.tensor(0.4))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(slope * x[i], 1.0))


def masked_model(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0.0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked_guide(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0.0):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.4)) * x, 1.0))


CASES = {
    "flat": (flat_model, flat_guide, {}),
    "flat, one particle": (flat_model, flat_guide, {"num_particles": 1}),
    "flat, one particle, STL": (flat_model, flat_guide, {"num_particles": 1, "gradient": StickTheLanding()}),
    "flat, STL": (flat_model, flat_guide, {"gradient": StickTheLanding()}),
    "flat, DReG": (flat_model, flat_guide, {"gradient": DoublyReparameterized()}),
    "flat, sampled": (flat_model, flat_guide, {"gradient": SampledBackward(draws=3)}),
    "flat, sampled once": (flat_model, flat_guide, {"gradient": SampledBackward(draws=1, inner=Pathwise())}),
    "flat, Renyi": (flat_model, flat_guide, {"objective": Renyi(0.5)}),
    "flat, MIWAE": (flat_model, flat_guide, {"objective": MIWAE(2), "gradient": DoublyReparameterized()}),
    "flat, PIWAE": (flat_model, flat_guide, {"objective": PIWAE(2)}),
    "flat, CIWAE": (flat_model, flat_guide, {"objective": CIWAE(0.5)}),
    "flat, TVO": (flat_model, flat_guide, {"objective": TVO([0.0, 0.3])}),
    "chain": (chain_model, chain_guide, {}),
    "chain, STL": (chain_model, chain_guide, {"gradient": StickTheLanding()}),
    "chain, DReG": (chain_model, chain_guide, {"gradient": DoublyReparameterized()}),
    "chain, sampled": (chain_model, chain_guide, {"gradient": SampledBackward(draws=3)}),
    "coin, OVIS": (coin_model, coin_guide, {}),
    "coin, VIMCO": (coin_model, coin_guide, {"score": VIMCO()}),
    "coin, OVIS, DReG": (coin_model, coin_guide, {"score": OVIS(), "gradient": DoublyReparameterized()}),
    "coin, one particle": (coin_model, coin_guide, {"num_particles": 1}),
    "enumerated": (enumerated_model, flat_guide, {}),
    "enumerated, DReG": (enumerated_model, flat_guide, {"gradient": DoublyReparameterized()}),
    "rejection": (gamma_model, gamma_guide, {}),
    "minibatch": (minibatch_model, minibatch_guide, {}),
    "minibatch from outside": (chosen_model, chosen_guide, {}),
    "sequential plates": (sequential_model, sequential_guide, {}),
    "sequential particles": (flat_model, flat_guide, {"vectorize_particles": False}),
    "sequential particles, DReG": (
        chain_model,
        chain_guide,
        {"vectorize_particles": False, "gradient": DoublyReparameterized()},
    ),
    "masked": (masked_model, masked_guide, {}),
    "masked, DReG": (masked_model, masked_guide, {"gradient": DoublyReparameterized()}),
    "tree": (rows_model, AutoNormal, {"plate_particles": {"data": 3}}),
    "tree, DReG": (rows_model, AutoNormal, {"plate_particles": {"data": 3}, "gradient": DoublyReparameterized()}),
    "tree, STL": (rows_model, AutoNormal, {"plate_particles": {"data": 3}, "gradient": StickTheLanding()}),
    "tree, combined": (rows_model, AutoNormal, {"plate_particles": {"data": 3}, "combine": True}),
    "tree, one by one": (
        rows_model,
        AutoNormal,
        {"plate_particles": {"data": 3}, "vectorize_particles": False},
    ),
    "AutoDelta": (rows_model, AutoDelta, {}),
    "AutoMultivariateNormal": (rows_model, AutoMultivariateNormal, {}),
    "AutoMultivariateNormal, DReG": (rows_model, AutoMultivariateNormal, {"gradient": DoublyReparameterized()}),
    "AutoIAFNormal": (rows_model, AutoIAFNormal, {}),
    "AutoIAFNormal, DReG": (rows_model, AutoIAFNormal, {"gradient": DoublyReparameterized()}),
    "annealed": (poutine.scale(flat_model, scale=0.3), flat_guide, {}),
    "scaled alike": (poutine.scale(flat_model, scale=0.3), poutine.scale(flat_guide, scale=0.3), {}),
}


def guide_of(guide, model):
    return guide(model) if isinstance(guide, type) else guide


def parameters():
    return {n: p.unconstrained() for n, p in pyro.get_param_store().items()}


def losses_and_gradients(elbo, model, guide, batches, seed):
    """Losses, and the gradients of all steps added up; the last random number shows that as many were drawn."""
    pyro.set_rng_seed(seed)
    losses = [elbo.loss_and_grads(model, guide, *batch) for batch in batches]
    grads = {n: p.grad.clone() for n, p in parameters().items() if p.grad is not None}
    for p in parameters().values():
        p.grad = None
    return losses, grads, torch.rand(())


def assert_alike(found, expected, tolerance=2e-5):
    (losses, grads, last), (their_losses, their_grads, their_last) = found, expected
    assert losses == pytest.approx(their_losses, rel=tolerance, abs=tolerance)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=tolerance, atol=tolerance)
    assert last == their_last


def both(**options):
    return (ImportanceWeightedELBO(compile=c, **{"num_particles": 4, **options}) for c in (False, True))


def recordings(elbo):
    return sum(elbo._recorded.cache.made.values())


@pytest.mark.filterwarnings("ignore:guide site '_AutoIAFNormal_latent' draws from a flow whose inverse is slow")
@pytest.mark.parametrize("case", CASES)
def test_recording_is_the_step(case):
    model, guide, options = CASES[case]
    guide = guide_of(guide, model)
    plain, recorded = both(**options)
    batches = [(X,), (X.flip(0),), (2.0 * X.abs() - 0.4,)]
    plain.loss_and_grads(model, guide, X)  # settles what there is to find out, and the parameters
    for p in parameters().values():
        p.grad = None
    recorded.loss_and_grads(model, guide, X)
    for p in parameters().values():
        p.grad = None
    found = losses_and_gradients(recorded, model, guide, batches, 7)
    assert_alike(found, losses_and_gradients(plain, model, guide, batches, 7))
    assert found[1], "there are gradients"
    assert recordings(recorded) == 1


@pytest.mark.parametrize("case", ["flat", "coin, OVIS", "tree, DReG", "flat, sampled"])
def test_compiled_step_is_the_step(case, compiling):
    test_recording_is_the_step(case)


def test_compiled_noise_is_fresh_and_seeded(compiling):
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    elbo.loss_and_grads(flat_model, flat_guide, X)
    pyro.set_rng_seed(3)
    first = [elbo.loss_and_grads(flat_model, flat_guide, X) for _ in range(3)]
    pyro.set_rng_seed(3)
    assert [elbo.loss_and_grads(flat_model, flat_guide, X) for _ in range(3)] == first
    assert len(set(first)) == 3


# Where gradients land


def test_gradients_are_added_to_what_is_there():
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    elbo.loss_and_grads(flat_model, flat_guide, X)
    pyro.set_rng_seed(1)
    for p in parameters().values():
        p.grad = None
    elbo.loss_and_grads(flat_model, flat_guide, X)
    once = {n: p.grad.clone() for n, p in parameters().items()}
    pyro.set_rng_seed(1)
    elbo.loss_and_grads(flat_model, flat_guide, X)
    for name, p in parameters().items():
        torch.testing.assert_close(p.grad, 2.0 * once[name])


def linear_model(x):
    weight = pyro.param("w", torch.zeros(4))
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("linear", (weight * x).sum())  # whose gradient is the data itself


def test_gradients_are_no_views_of_the_data():
    elbo, x = ImportanceWeightedELBO(num_particles=4, compile=True), X.clone()

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    for _ in range(3):
        elbo.loss_and_grads(linear_model, guide, x)
    assert torch.equal(x, X)
    torch.testing.assert_close(pyro.param("w").grad, -3.0 * X)


def trained(elbo, model, guide, batches, seed=5):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(*batch) for batch in batches]
    return losses, {n: p.detach().clone() for n, p in parameters().items()}


def test_svi_trains_alike(compiling):
    batches = [(X + 0.1 * i,) for i in range(30)]
    plain, recorded = both()
    losses, found = trained(recorded, flat_model, flat_guide, batches)
    expected_losses, expected = trained(plain, flat_model, flat_guide, batches)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    assert losses != trained(recorded, flat_model, flat_guide, batches, seed=6)[0]


class Net(PyroModule):
    """A model and guide with every kind of parameter: Pyro's, torch's, a submodule's, a buffer."""

    def __init__(self):
        super().__init__()
        self.noise = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.encoder = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        self.shift = torch.nn.Parameter(torch.tensor(0.1))
        self.register_buffer("unit", torch.tensor(1.0))

    def model(self, x):
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, self.unit))
            pyro.sample("x", dist.Normal(z + self.shift, self.noise), obs=x)

    def guide(self, x):
        pyro.module("net", self)
        loc, log_scale = self.encoder(x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def test_elbo_module_under_torchs_optimiser(compiling):
    results = []
    for recorded in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        net = Net()
        loss = ImportanceWeightedELBO(num_particles=4, compile=recorded)(net.model, net.guide)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        losses = []
        pyro.set_rng_seed(3)
        loss(X)
        pyro.set_rng_seed(3)
        for i in range(10):
            optimizer.zero_grad()
            value = loss(X + 0.1 * i)
            (2.0 * value).backward()  # the slope that comes in counts
            losses.append(value.item())
            optimizer.step()
        results.append((losses, [p.detach().clone() for p in net.parameters()]))
    (losses, found), (expected_losses, expected) = results[1], results[0]
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_module_local_params():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.3))
            self.scale = PyroParam(torch.tensor(0.6), constraint=constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc * x, self.scale))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pyro.settings.context(module_local_params=True):
        results = []
        for recorded in (False, True):
            pyro.set_rng_seed(2)
            guide = Guide()
            svi = SVI(
                model,
                guide,
                pyro.optim.Adam({"lr": 0.05}),
                ImportanceWeightedELBO(num_particles=4, compile=recorded),
            )
            results.append([svi.step(X) for _ in range(8)] + [p.item() for p in guide.parameters()])
        assert not pyro.get_param_store()
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert results[1][-2] != pytest.approx(0.3), "it has moved"


# What a recording holds for


def test_new_shapes_dtypes_and_numbers_are_recorded_anew():
    def model(x, shift=0.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x, shift=0.0):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope.to(x) * x, 1.0))

    plain, recorded = both()
    calls = [((X,), {}), ((X[:2],), {}), ((X.double(),), {}), ((X,), {"shift": 1.0}), ((X,), {"shift": 2.0})]
    for expected_count, (args, kwargs) in enumerate(calls, 1):
        for _ in range(2):
            pyro.set_rng_seed(9)
            expected = plain.loss_and_grads(model, guide, *args, **kwargs)
            recorded.loss_and_grads(model, guide, *args, **kwargs)
            pyro.set_rng_seed(9)
            assert recorded.loss_and_grads(model, guide, *args, **kwargs) == pytest.approx(expected, rel=1e-5)
        assert recordings(recorded) == expected_count
    recorded.num_particles = 8
    recorded.loss_and_grads(model, guide, X)
    assert recordings(recorded) == len(calls) + 1
    recorded.loss_and_grads(model, guide, X, shift=X.new_tensor(3.0))
    recorded.loss_and_grads(model, guide, X, shift=X.new_tensor(4.0))
    assert recordings(recorded) == len(calls) + 2, "a tensor is an input, by keyword too"


def assert_next_step_alike(plain, recorded, model, guide, *args):
    pyro.set_rng_seed(4)
    expected = plain.loss_and_grads(model, guide, *args)
    pyro.set_rng_seed(4)
    assert recorded.loss_and_grads(model, guide, *args) == pytest.approx(expected, rel=1e-5)
    return expected


def test_one_tensor_in_two_places_is_told_apart():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + X, 1.0), obs=x + 2.0 * y)

    def guide(x, y):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    plain, recorded = both()
    for args in ((X, X), (X, X.flip(0)), (X.clone(), X)):  # X is in the model's closure, too
        recorded.loss_and_grads(model, guide, *args)
        assert_next_step_alike(plain, recorded, model, guide, *args)


@pytest.mark.filterwarnings("ignore:encoder.0.weight was not registered")
def test_parameters_that_are_replaced_or_moved_are_seen():
    plain, recorded = both()
    net = Net()
    recorded.loss_and_grads(net.model, net.guide, X)
    first = assert_next_step_alike(plain, recorded, net.model, net.guide, X)
    net.encoder[0].weight.data = net.encoder[0].weight.data + 1.0
    with torch.no_grad():
        net.unit.mul_(1.5)
    second = assert_next_step_alike(plain, recorded, net.model, net.guide, X)
    assert second != first
    assert recordings(recorded) == 1, "numbers in tensors are read anew"
    net.encoder[0].weight = torch.nn.Parameter(net.encoder[0].weight.detach() - 2.0)
    pyro.clear_param_store()
    recorded.loss_and_grads(net.model, net.guide, X)
    assert assert_next_step_alike(plain, recorded, net.model, net.guide, X) != second
    assert net.encoder[0].weight.grad is not None
    assert recordings(recorded) == 2
    net.encoder[0].weight.requires_grad_(False)
    net.encoder[0].weight.grad = None
    recorded.loss_and_grads(net.model, net.guide, X)
    assert net.encoder[0].weight.grad is None


def test_param_store_that_is_cleared_is_seen():
    plain, recorded = both()
    recorded.loss_and_grads(flat_model, flat_guide, X)
    pyro.clear_param_store()
    recorded.loss_and_grads(flat_model, flat_guide, X)
    assert pyro.param("slope").grad is not None
    assert_next_step_alike(plain, recorded, flat_model, flat_guide, X)


class Dropping(torch.nn.Module):
    """Dropout in the model, batch norm in the guide's network."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        self.decoder = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def model(self, x):
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]).squeeze(-1), 1.0), obs=x)

    def guide(self, x):
        loc, log_scale = self.encoder(x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


@pytest.mark.filterwarnings("ignore:.*BatchNorm", *(["ignore:the compiled step and the recording"] if OLD else []))
def test_dropout_and_running_means_are_those_of_the_step(compiling):
    results = []
    for recorded in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        net = Dropping()
        elbo = ImportanceWeightedELBO(num_particles=4, compile=recorded)
        elbo.loss_and_grads(net.model, net.guide, X)
        before = [b.clone() for b in net.buffers()]
        pyro.set_rng_seed(3)
        losses = [elbo.loss_and_grads(net.model, net.guide, X) for _ in range(3)]
        net.eval()
        losses.append(elbo.loss_and_grads(net.model, net.guide, X))
        losses.append(elbo.loss_and_grads(net.model, net.guide, X))
        results.append((losses, [b - a for a, b in zip(before, net.buffers(), strict=True)]))
    assert results[1][0][:3] == pytest.approx(results[0][0][:3], rel=1e-5)
    assert results[1][0][3:] != results[1][0][:2]
    for found, expected in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(found, expected)
    assert bool(results[0][1][0].any())


def test_annealing_by_a_tensor():
    def model(x, beta):
        with poutine.scale(scale=beta):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data_", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, beta):
        with poutine.scale(scale=beta):
            flat_guide(x)

    plain, recorded = both()
    for beta in torch.linspace(0.1, 0.9, 5):
        recorded.loss_and_grads(model, guide, X, beta)
        assert_next_step_alike(plain, recorded, model, guide, X, beta)
    assert recordings(recorded) == 1
    for _ in range(5):  # at 1 the weights are no longer tempered: another way through the code
        assert_next_step_alike(plain, recorded, model, guide, X, torch.tensor(1.0))
    assert recordings(recorded) == 2


def test_a_number_that_changes_unseen_is_found(monkeypatch):
    monkeypatch.setattr(step_module, "CHECKS", (3,))
    weight = [1.0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, weight[0]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    for _ in range(3):
        elbo.loss_and_grads(model, flat_guide, X)
    weight[0] = 1.01
    with pytest.raises(RuntimeError, match=r"recapture\(\)"):
        elbo.loss_and_grads(model, flat_guide, X)
    elbo.recapture()
    plain = ImportanceWeightedELBO(num_particles=4)
    elbo.loss_and_grads(model, flat_guide, X)
    assert_next_step_alike(plain, elbo, model, flat_guide, X)


def test_pythons_own_random_numbers_are_refused():
    import random

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0 + random.random()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="random or numpy.random"):
            for _ in range(11):
                elbo.loss_and_grads(model, flat_guide, X)


def test_recordings_are_limited(monkeypatch):
    monkeypatch.setattr(compiled_module, "MOST_RECORDINGS", 2)
    plain, recorded = both()
    for beta in (0.1, 0.2):
        recorded.loss_and_grads(poutine.scale(flat_model, scale=beta), flat_guide, X)
    with pytest.warns(UserWarning, match="recorded 2 times"):
        recorded.loss_and_grads(flat_model, flat_guide, X[:3])
        recorded.loss_and_grads(flat_model, flat_guide, X[:2])
        recorded.loss_and_grads(flat_model, flat_guide, X[:1])
    assert_next_step_alike(plain, recorded, flat_model, flat_guide, X[:1])


def test_scales_put_on_anew_are_no_other_models_scales():
    plain, recorded = both()
    for beta in (0.1, 0.2, 0.1):
        recorded.loss_and_grads(poutine.scale(flat_model, scale=beta), flat_guide, X)
        assert_next_step_alike(plain, recorded, poutine.scale(flat_model, scale=beta), flat_guide, X)


def test_recordings_are_forgotten_with_their_model():
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    net = Net()
    elbo.loss_and_grads(net.model, net.guide, X)
    assert elbo._recorded.cache.recorded
    gone = weakref.ref(net)
    pyro.clear_param_store()
    del net
    gc.collect()
    assert gone() is None
    assert not elbo._recorded.cache.recorded
    assert not copy.deepcopy(elbo)._recorded.cache.recorded


# What cannot be recorded, and what raises


@pytest.mark.parametrize(
    "reads",
    [
        lambda z: 1.0 if z.sum() > 0.0 else 2.0,
        lambda z: 1.0 + abs(z.sum().item()),
        lambda z: 1.0 + abs(float(z.detach().cpu().numpy().sum())),
        lambda z: 1.0 + abs(z.detach().tolist()[0]),
        lambda z: 1.0 + abs(int(pyro.param("bare", torch.tensor(1.0)))),
    ],
    ids=["if", "item", "numpy", "tolist", "a parameter"],
)
def test_numbers_read_out_of_tensors_are_refused(reads):
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        scale = reads(z)
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)
        pyro.factor("uses", pyro.param("bare", torch.tensor(1.0)))

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(4)), 1.0).to_event(1))

    elbo = ImportanceWeightedELBO(num_particles=4, compile=True, vectorize_particles=False)
    with pytest.raises(NotImplementedError, match=r"scale = reads|lambda z.*test_compiled.py, line") as raised:
        elbo.loss_and_grads(model, guide, X)
    assert "compile=False" in str(raised.value)


def test_generators_of_the_models_own_are_refused():
    def model(x):
        fixed = torch.randn(len(x), generator=torch.Generator(x.device).manual_seed(0), device=x.device)
        flat_model(x + fixed)

    with pytest.raises(NotImplementedError, match="Generator of its own"):
        ImportanceWeightedELBO(num_particles=4, compile=True).loss_and_grads(model, flat_guide, X)


def test_handlers_around_the_step_are_refused():
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    with poutine.scale(scale=0.1), pytest.raises(NotImplementedError, match="ScaleMessenger"):
        elbo.loss_and_grads(flat_model, flat_guide, X)
    with pyro.poutine.block(), pyro.poutine.trace(param_only=True) as seen:
        elbo.loss_and_grads(flat_model, flat_guide, X)
        elbo.loss_and_grads(flat_model, flat_guide, X)
    assert set(seen.trace.nodes) >= {"scale", "slope", "spread"}
    torch.testing.assert_close(seen.trace.nodes["scale"]["value"], pyro.param("scale").detach())


def test_arguments_of_unknown_kind_are_refused():
    class Batch:
        x = X

    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    with pytest.raises(TypeError, match="got Batch"):
        elbo.loss_and_grads(lambda b: flat_model(b.x), lambda b: flat_guide(b.x), Batch())
    with pytest.raises(TypeError, match="gradients to parameters, not to arguments"):
        elbo.loss_and_grads(flat_model, flat_guide, X.clone().requires_grad_())


def test_nested_arguments():
    def model(batch):
        flat_model(batch["x"][0])

    def guide(batch):
        flat_guide(batch["x"][0])

    plain, recorded = both()
    recorded.loss_and_grads(model, guide, {"x": [X, None], "name": "a"})
    assert_next_step_alike(plain, recorded, model, guide, {"x": [X + 1.0, None], "name": "a"})
    assert recordings(recorded) == 1


def test_faults_have_the_errors_of_the_step(compiling):
    recorded = ImportanceWeightedELBO(num_particles=4, compile=True)
    recorded.loss_and_grads(flat_model, flat_guide, X)
    before = {n: p.grad.clone() for n, p in parameters().items()}
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="NaN at model site"):
        recorded.loss_and_grads(flat_model, flat_guide, torch.tensor([0.1, math.nan, 0.2, 0.3]))
    for name, p in parameters().items():
        assert torch.equal(p.grad, before[name])
    pyro.get_param_store()["slope"].data.fill_(math.nan)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="NaN at"):
        recorded.loss_and_grads(flat_model, flat_guide, X)


def walled_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z > x, 0.0, -math.inf))


def test_impossible_particles(compiling):
    plain, recorded = both(num_particles=8)
    recorded.loss_and_grads(walled_model, flat_guide, -X.abs() - 1.0)
    for p in parameters().values():
        p.grad = None
    for seed in range(5):
        batches = [(-X.abs(),)]
        found = losses_and_gradients(recorded, walled_model, flat_guide, batches, seed)
        assert_alike(found, losses_and_gradients(plain, walled_model, flat_guide, batches, seed))
    assert recordings(recorded) == 1
    far = torch.tensor([-1.0, -1.0, 100.0, -1.0])
    with pytest.warns(UserWarning, match="particles are impossible"):
        assert recorded.loss_and_grads(walled_model, flat_guide, far) == math.inf
    for p in parameters().values():
        assert p.grad is None or not bool(p.grad.isnan().any())


def nan_slope_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        wall = pyro.param("wall", torch.tensor(1.0))
        inside = (z > x) * wall
        pyro.factor("log of zero", inside.log())


def test_nan_gradients_have_the_error_of_the_step():
    plain, recorded = both(num_particles=8)
    far = torch.full((4,), -50.0)
    recorded.loss_and_grads(nan_slope_model, flat_guide, far)
    near = torch.full((4,), 0.0)
    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match="gradient of parameter") as expected:
        plain.loss_and_grads(nan_slope_model, flat_guide, near)
    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match="gradient of parameter") as found:
        recorded.loss_and_grads(nan_slope_model, flat_guide, near)
    assert str(found.value) == str(expected.value)


def test_without_a_compiler_the_recording_runs(compiling, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr("torch._inductor.compile", fails)
    plain, recorded = both()
    with pytest.warns(UserWarning, match=r"recorded and not compiled.*no working C\+\+ compiler"):
        recorded.loss_and_grads(flat_model, flat_guide, X)
    assert_next_step_alike(plain, recorded, flat_model, flat_guide, X)


def test_a_long_recording_says_how_long_it_will_take(compiling, monkeypatch):
    monkeypatch.setattr("pyro_iwae.capture.LARGE", 20)
    monkeypatch.setattr(Graph, "_compiled", lambda self, inputs, options: self.module)
    plain, recorded = both()
    with pytest.warns(UserWarning, match=r"a graph of \d+ operations.*minutes to compile.*one pass"):
        recorded.loss_and_grads(flat_model, flat_guide, X)
    assert_next_step_alike(plain, recorded, flat_model, flat_guide, X)


def test_a_compiler_that_errs_is_not_trusted(compiling, monkeypatch):
    def wrong(module, inputs, options):
        return lambda *tensors: [1.01 * t for t in module(*tensors)]

    monkeypatch.setattr("torch._inductor.compile", wrong)
    plain, recorded = both()
    with pytest.warns(UserWarning, match="gave different numbers"):
        recorded.loss_and_grads(flat_model, flat_guide, X)
    assert_next_step_alike(plain, recorded, flat_model, flat_guide, X)


def test_no_gradient_wanted_is_no_recording():
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    with torch.no_grad():
        elbo.differentiable_loss(flat_model, flat_guide, X)
    elbo.loss(flat_model, flat_guide, X)
    assert recordings(elbo) == 0


def test_lifted_parameters():
    """A model whose weights are latents of a PyroModule."""

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.weight, 1.0), obs=x)

    model = Regression()
    guide = AutoNormal(model)
    plain, recorded = both()
    recorded.loss_and_grads(model, guide, X)
    assert_next_step_alike(plain, recorded, model, guide, X)


def test_guide_lists():
    guide = AutoGuideList(rows_model)
    guide.append(AutoNormal(poutine.block(rows_model, expose=["loc"])))
    guide.append(AutoNormal(poutine.block(rows_model, expose=["z"])))
    plain, recorded = both()
    recorded.loss_and_grads(rows_model, guide, X)
    assert_next_step_alike(plain, recorded, rows_model, guide, X)


def test_guide_enumeration_with_one_particle_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.1))), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.0, 1.0))

    elbo = ImportanceWeightedELBO(num_particles=1, compile=True)
    with pytest.raises(NotImplementedError, match="TraceEnum_ELBO"):
        elbo.loss_and_grads(coin_model, guide, X)
    assert ImportanceWeightedELBO(num_particles=1).loss(coin_model, guide, X) == pytest.approx(
        TraceEnum_ELBO(max_plate_nesting=1).loss(coin_model, guide, X), rel=1.0
    )


def as_recorded(recorded, plain, program):
    """Compares gradients and losses of three steps of a random program."""
    try:
        recorded.loss_and_grads(program.model, program.guide)
    except ValueError:  # what the step itself refuses
        with pytest.raises(ValueError):
            plain.loss_and_grads(program.model, program.guide)
        return
    except NotImplementedError:  # the indices of a minibatch are numbers to loop over
        assert any(p.dim is None and p.shown for p in program.plates)
        return
    for p in parameters().values():
        p.grad = None
    batches = [(), (), ()]
    found = losses_and_gradients(recorded, program.model, program.guide, batches, program.seed)
    assert_alike(found, losses_and_gradients(plain, program.model, program.guide, batches, program.seed), 1e-8)


def with_fixed_data(program, draws):
    """The same program, whose data are drawn once, and not by a generator of its own in every run."""
    fixed = getattr(program, draws)()

    def parameters_and_data():
        store = pyro.get_param_store()
        return {n: pyro.param(_stored(n)) if _stored(n) in store else v for n, v in fixed.items()}

    object.__setattr__(program, draws, parameters_and_data)
    return program


def _stored(name):
    """A parameter's name in the store: data have none."""
    return name if name.startswith(("q_", "x_")) else f"p_{name}"


@pytest.mark.usefixtures("double")
@settings(max_examples=max(1, settings().max_examples // 12))
@given(
    programs(latent_families=[f for f in LATENT if f != "onehot"]),  # drawing one reads numbers
    st.sampled_from([Pathwise(), StickTheLanding(), DoublyReparameterized(), SampledBackward(draws=2)]),
    st.sampled_from([VIMCO(), OVIS()]),
)
def test_random_programs_are_recorded(program, gradient, score):
    note(program)
    pyro.clear_param_store()
    pyro.set_rng_seed(program.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, recorded = both(num_particles=3, gradient=gradient, score=score)
        as_recorded(recorded, plain, with_fixed_data(program, "parameters"))


@pytest.mark.usefixtures("double")
@settings(max_examples=max(1, settings().max_examples // 40))
@given(tree_programs(), st.sampled_from([Pathwise(), StickTheLanding(), DoublyReparameterized()]))
def test_random_trees_are_recorded(program, gradient):
    note(program)
    pyro.clear_param_store()
    pyro.set_rng_seed(program.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, recorded = both(num_particles=2, gradient=gradient, plate_particles=program.plate_particles)
        as_recorded(recorded, plain, with_fixed_data(program, "numbers"))


def hooked_training(recorded, way):
    pyro.clear_param_store()
    elbo = ImportanceWeightedELBO(num_particles=4, compile=recorded)
    elbo.loss_and_grads(flat_model, flat_guide, X)
    slope, seen = pyro.param("slope").unconstrained(), []
    slope.grad = None
    handle = slope.register_hook(lambda g: seen.append(g.item()) or 2.0 * g)
    pyro.set_rng_seed(3)
    for _ in range(3):
        if way == "differentiable_loss":
            elbo.differentiable_loss(flat_model, flat_guide, X).backward()
        else:
            elbo.loss_and_grads(flat_model, flat_guide, X)
    handle.remove()
    elbo.loss_and_grads(flat_model, flat_guide, X)
    return [*seen, slope.grad.item()]


@pytest.mark.parametrize("way", ["differentiable_loss", "loss_and_grads"])
def test_hooks_run_once_at_each_step(way):
    assert hooked_training(True, way) == pytest.approx(hooked_training(False, way), rel=1e-4)


def lone_model():
    pyro.sample("z", dist.Normal(1.0, 1.0))


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_parameters_that_change_their_kind_are_seen(change, compiling):
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(1))

        def forward(self):
            pyro.module("guide", self)
            pyro.sample("z", dist.Normal(self.loc.sum(), 1.0))

    guide, (plain, recorded) = Guide(), both()
    recorded.loss_and_grads(lone_model, guide)
    guide.loc.grad = None
    guide.loc.data = torch.full((1,), 0.3, dtype=torch.double) if change == "dtype" else torch.full((3,), 0.1)
    recorded.loss_and_grads(lone_model, guide)
    guide.loc.grad = None
    assert_next_step_alike(plain, recorded, lone_model, guide)
    assert recordings(recorded) == 2


def test_strides_that_change_are_seen(compiling):
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))

        def forward(self):
            pyro.module("guide", self)
            pyro.sample("z", dist.Normal((self.loc * torch.tensor([0.1, 0.2, -0.3])).sum(), 1.0))

    guide, (plain, recorded) = Guide(), both()
    recorded.loss_and_grads(lone_model, guide)
    guide.loc.grad = None
    guide.loc.data = guide.loc.data.t().contiguous().t()  # the same numbers, in another order in memory
    recorded.loss_and_grads(lone_model, guide)
    guide.loc.grad = None
    assert_next_step_alike(plain, recorded, lone_model, guide)
    assert recordings(recorded) == 2


class Counting(torch.nn.Module):
    """A guide that counts its runs, in a buffer, in one that starts as None, or in an attribute."""

    def __init__(self, way):
        super().__init__()
        self.way, self.loc = way, torch.nn.Parameter(torch.zeros(()))
        if way == "attribute":
            self.runs = torch.tensor(0.0)
        else:
            self.register_buffer("runs", torch.tensor(0.0) if way == "buffer" else None)

    def forward(self):
        self.runs = torch.tensor(1.0) if self.runs is None else self.runs + 1.0
        pyro.sample("z", dist.Normal(self.loc + 0.0 * self.runs, 1.0))


@pytest.mark.parametrize("way", ["buffer", "buffer that starts as None", "attribute"])
@pytest.mark.parametrize("kind", [CompiledSVI, SVI])
def test_what_each_run_replaces_is_refused(kind, way):
    guide, optim = Counting(way), pyro.optim.SGD({"lr": 0.1})
    pyro.module("guide", guide)
    svi = kind(lone_model, guide, optim, ImportanceWeightedELBO(4, compile=kind is SVI))
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"'runs' of Counting is replaced in each.*self\.runs\.add_"):
            svi.step()
    assert guide.loc == 0.0 and (way != "buffer" or guide.runs == 0.0)


def test_what_each_run_replaces_unread_is_no_matter():
    """A cache, and what somebody puts in its place."""

    class Guide(Counting):
        def forward(self):
            self.runs = self.loc * 2.0
            pyro.sample("z", dist.Normal(self.runs, 1.0))

    guide, (plain, recorded) = Guide("attribute"), both()
    recorded.loss_and_grads(lone_model, guide)
    guide.runs = torch.tensor(5.0)
    assert_next_step_alike(plain, recorded, lone_model, guide)
    assert recordings(recorded) == 1


NORMALS = {
    "bare": lambda x: torch.empty(2, 3).normal_() + x,
    "written out": lambda x: torch.empty(2, 3, dtype=torch.float64).normal_(0, 1) + x,
    "with mean": lambda x: torch.empty(2, 3).normal_(2.0, 0.5) + x,
    "mean alone": lambda x: torch.empty(2, 3).normal_(2.0) + x,
    "by keyword": lambda x: torch.empty(2, 3).normal_(std=0.1) + x,
    "over zeros": lambda x: torch.zeros(2, 3).normal_() + x,
    "used before": lambda x: (lambda e: e.shape[0] + e.zero_() + e.normal_() + x)(torch.empty(2, 3)),
    "used after": lambda x: (lambda e: (e.normal_(), e.mul(2.0) + e + x)[1])(torch.empty(2, 3)),
    "into a view": lambda x: (lambda e: (e[0].normal_(), e[1].normal_(), e + x)[2])(torch.empty(2, 3)),
    "twice": lambda x: (lambda e: (e.normal_(), e.normal_(), e + x)[2])(torch.empty(2, 3)),
    "randn": lambda x: torch.randn(2, 3) + x,
    "in a product": lambda x: torch.empty(2, 3).normal_() @ x.expand(3, 3),
}


RANDN = "bare", "written out", "used after", "randn", "twice", "in a product"


def test_calls_by_way_of_python_are_not_compiled_as_calls_from_c(compiling, caplog, monkeypatch):
    """They would be slower, and a logger would say so of each."""
    import torch._inductor as inductor

    compile_, done = inductor.compile, []

    def noted(module, inputs, options):
        compiled = compile_(module, inputs, options=options)
        done.append(options.get("cpp_wrapper", False))
        return compiled

    monkeypatch.setattr(inductor, "compile", noted)

    def model():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide():
        pyro.sample("z", dist.Gamma(pyro.param("shape", torch.tensor(3.0)), 1.0))

    plain, recorded = both()
    recorded.loss_and_grads(model, guide)
    recorded.loss_and_grads(flat_model, flat_guide, X)
    assert done == [False, True]
    assert "c-shim" not in caplog.text
    assert_next_step_alike(plain, recorded, model, guide)


@pytest.mark.parametrize("case", NORMALS)
def test_normal_draws_are_those_of_the_program(case, compiling):
    x = torch.tensor([1.0, 2.0, 3.0])
    graph = capture(lambda: [NORMALS[case](x)], [x])
    torch.manual_seed(3)
    expected = NORMALS[case](x), torch.rand(())
    for _ in range(2):
        torch.manual_seed(3)
        found = graph([x])[0], torch.rand(())
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if graph.compiled is None else 1e-6)
        graph.compile([x])
        assert graph.compiled is not None
    draws = [str(n.target) for n in graph.module.graph.nodes]
    assert ("aten.randn.default" in draws) == (case in RANDN)


def test_what_only_python_can_call_is_compiled_too(compiling, monkeypatch):
    import torch._inductor as inductor

    asked = []

    def picky(module, inputs, options):
        asked.append(options.get("cpp_wrapper", False))
        if options.get("cpp_wrapper"):
            raise NotImplementedError("an operation without a C++ name")
        return compile_(module, inputs, options=options)

    compile_ = inductor.compile
    monkeypatch.setattr(inductor, "compile", picky)
    plain, recorded = both()
    recorded.loss_and_grads(flat_model, flat_guide, X)
    assert asked == [True, False]
    assert_next_step_alike(plain, recorded, flat_model, flat_guide, X)


def test_a_parameter_that_is_unfrozen_is_seen():
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    elbo.loss(flat_model, flat_guide, X)
    slope = pyro.param("slope").unconstrained()
    slope.requires_grad_(False)
    elbo.loss_and_grads(flat_model, flat_guide, X)
    assert slope.grad is None
    slope.requires_grad_(True)
    elbo.loss_and_grads(flat_model, flat_guide, X)
    assert slope.grad is not None


def test_a_parameter_that_comes_in_is_found(monkeypatch):
    monkeypatch.setattr(step_module, "CHECKS", (3,))
    wanted = [False]

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0)) if wanted[0] else 0.0
        flat_model(x + shift)

    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    for _ in range(3):
        elbo.loss_and_grads(model, flat_guide, X)
    wanted[0] = True
    with pytest.raises(RuntimeError, match=r"recapture\(\)"):
        elbo.loss_and_grads(model, flat_guide, X)


def test_modules_and_tensors_that_are_replaced_are_seen():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)
            self.shift = torch.tensor(0.1)

        def forward(self, x):
            loc = self.net(x[:, None]).squeeze(-1) + self.shift
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0))

    guide, (plain, recorded) = Guide(), both()
    recorded.loss_and_grads(flat_model, guide, X)
    guide.net = torch.nn.Linear(1, 1)
    recorded.loss_and_grads(flat_model, guide, X)
    assert guide.net.weight.grad is not None
    guide.shift = torch.tensor(5.0)
    recorded.loss_and_grads(flat_model, guide, X)
    assert_next_step_alike(plain, recorded, flat_model, guide, X)


def test_a_copy_has_options_of_its_own():
    first = ImportanceWeightedELBO(num_particles=1, compile=True)
    first.loss_and_grads(flat_model, flat_guide, X)
    second = copy.copy(first)
    second.num_particles = 500
    losses = [second.loss_and_grads(flat_model, flat_guide, X) for _ in range(20)]
    others = [first.loss_and_grads(flat_model, flat_guide, X) for _ in range(20)]
    assert torch.tensor(losses).std() < 0.3 * torch.tensor(others).std()


def test_partials_are_models_like_others():
    def model(loc, scale, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(loc, scale)), 1.0), obs=x)

    plain, recorded = both()
    for loc in (0.0, 3.0):
        partial = functools.partial(model, loc, 1.0)
        recorded.loss_and_grads(partial, flat_guide, X)
        assert_next_step_alike(plain, recorded, partial, flat_guide, X)


def test_scales_put_on_anew_at_each_step_are_limited(monkeypatch):
    monkeypatch.setattr(compiled_module, "MOST_RECORDINGS", 3)
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    with pytest.warns(UserWarning, match="recorded 3 times"):
        for i in range(5):
            elbo.loss_and_grads(poutine.scale(flat_model, scale=0.1 + 0.1 * i), flat_guide, X)
    assert recordings(elbo) == 3


@pytest.mark.filterwarnings("ignore:.*BatchNorm")
def test_a_step_that_the_model_runs_counts_once():
    net = Dropping()
    elbo = ImportanceWeightedELBO(num_particles=4, compile=True)
    elbo.loss_and_grads(net.model, net.guide, X)
    count = net.encoder[1].num_batches_tracked
    before = int(count)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="NaN at"):
        elbo.loss_and_grads(net.model, net.guide, X * math.nan)
    assert int(count) == before + 1


@pytest.mark.parametrize("case", ["flat, DReG", "coin, OVIS", "tree"])
def test_mean_loss_and_gradient_are_those_of_the_step(case):
    """With noise of their own."""
    model, guide, options = CASES[case]
    guide = guide_of(guide, model)
    draws = []
    for elbo in both(**options):
        elbo.loss_and_grads(model, guide, X)
        rows = []
        for _ in range(300):
            for p in parameters().values():
                p.grad = None
            loss = elbo.loss_and_grads(model, guide, X)
            grads = [p.grad.flatten() for _, p in sorted(parameters().items()) if p.grad is not None]
            rows.append(torch.cat([torch.tensor([loss]), *grads]))
        draws.append(torch.stack(rows))
    assert_same_mean(*draws)


class DigitsVAE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(64, 30), torch.nn.Tanh(), torch.nn.Linear(30, 10))
        self.decoder = torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.Tanh(), torch.nn.Linear(30, 64))

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("digits", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(16, logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        loc, log_scale = self.encoder(x / 16.0).chunk(2, -1)
        with pyro.plate("digits", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.nightly
def test_the_training_curve_on_digits_is_the_same(compiling):
    digits = torch.as_tensor(load_digits().data, dtype=torch.get_default_dtype())[:512]
    curves = []
    for recorded in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        vae = DigitsVAE()
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), ImportanceWeightedELBO(5, compile=recorded))
        svi.evaluate_loss(digits[:64])
        pyro.set_rng_seed(3)
        curves.append([sum(svi.step(batch) for batch in digits.split(64)) / len(digits) for _ in range(8)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[1][-1] < curves[1][0] - 10.0, "it has learnt"
