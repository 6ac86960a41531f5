# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Particles in one pass or one after the other: the same numbers, and the right way found by itself."""

import gc
import math
import random
import warnings
import weakref
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_iwae import ImportanceWeightedELBO, exact
from tests.noise import Inject
from tests.statistics import assert_mean

DATA = torch.tensor([0.5, -1.0, 2.0])


def normal(name, loc=0.0, obs=None):
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), 1.0), obs=obs)


def simple_model():
    with pyro.plate("data", 3):
        z = normal("z")
        normal("x", z, obs=DATA)


def simple_guide():
    with pyro.plate("data", 3):
        normal("z", DATA / 2.0)


class Counted:
    """A callable that counts its calls."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.fn(*args, **kwargs)


def ways(num_particles, **options):
    return [ImportanceWeightedELBO(num_particles, vectorize_particles=v, **options) for v in (None, True, False)]


# The same numbers


def test_all_ways_give_the_same_value_for_the_same_noise(double):
    """Wide runs take K rows of noise at once, narrow ones row by row."""
    case = exact.Gaussian(data=DATA.double(), offset=0.7)
    noise = torch.randn(5, 3)

    class Rows(Inject):
        row = 0

        def _pyro_sample(self, msg):
            if msg["name"] == "z" and not msg["done"] and msg["fn"].batch_shape == (3,):
                msg["value"], msg["done"] = msg["fn"].loc + msg["fn"].scale * noise[self.row], True
                self.row += 1
            super()._pyro_sample(msg)

    results = []
    for elbo in ways(5):
        with Rows(noise={"z": noise}) as rows:
            rows.used.add("z")
            results.append(elbo.log_weights(case.model, case.guide).log_weights)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def test_all_ways_agree_in_law(double):
    case = exact.Gaussian(data=torch.zeros(500), offset=1.2)
    for elbo in ways(4):
        draws = torch.cat([elbo.bound(case.model, case.guide) for _ in range(4)])
        assert_mean(draws, case.bound(4)[0])


def test_vectorised_and_sequential_runs_take_their_calls():
    model, guide = Counted(simple_model), Counted(simple_guide)
    for elbo, expected in zip(ways(6), (1, 1, 6), strict=True):
        elbo.loss(model, guide)
        model.calls = guide.calls = 0
        elbo.loss(model, guide)
        assert (model.calls, guide.calls) == (expected, expected)


# Models that cannot be vectorised


def indexing():
    """z[0] is the first element in a narrow run, the first particle in a wide one."""
    with pyro.plate("data", 3):
        z = normal("z")
    with pyro.plate("rest", 2):
        normal("x", z[0], obs=torch.tensor([1.0, 2.0]))


def branching():
    """A Python branch on a latent's value."""
    z = normal("z")
    normal("x", z if z > 0 else 3.0 * z, obs=torch.tensor(1.0))


def folding():
    """view() folds the particles into the elements."""
    with pyro.plate("data", 3):
        z = normal("z")
        normal("x", z.reshape(-1)[:3], obs=DATA)


def summing_all():
    """sum() without a dimension sums over particles too."""
    with pyro.plate("data", 3):
        z = normal("z")
    normal("x", z.sum(), obs=torch.tensor(1.0))


def counting_dimensions_from_the_left():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        normal("x", z.sum(1), obs=DATA)


def prior_guide(model):
    return poutine.block(model, hide=["x"])


def by_hand(model, guide, num_particles, apart):
    """The loss from traces of single particles; ``apart``: each element of the plate has a weight of its own."""
    log_w = []
    for _ in range(num_particles):
        guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        parts = [s["fn"].log_prob(s["value"]) for n, s in model_trace.nodes.items() if n in ("z", "x")]
        parts.append(-guide_trace.nodes["z"]["fn"].log_prob(guide_trace.nodes["z"]["value"]))
        log_w.append(sum(parts) if apart else sum(p.sum() for p in parts))
    return -(torch.stack(log_w).logsumexp(0) - math.log(num_particles)).sum().item()


NARROW = [indexing, branching, folding, summing_all, counting_dimensions_from_the_left]


@pytest.mark.parametrize("model", NARROW)
def test_models_that_cannot_be_vectorised_run_sequentially(model, double):
    """Found on the first call, said once with the site's name, and right from there on."""
    counted, guide = Counted(model), prior_guide(model)
    elbo = ImportanceWeightedELBO(num_particles=3)
    with pytest.warns(UserWarning, match="one after the other") as caught:
        elbo.loss(counted, guide)
    assert len(caught) == 1
    assert "'x'" in str(caught[0].message) or "vectorised run failed" in str(caught[0].message)
    assert "vectorize_particles=False" in str(caught[0].message)
    apart = model in (folding, counting_dimensions_from_the_left)  # each element has its own weight
    assert elbo.log_weights(counted, guide).plates == (("data",) if apart else ())
    for seed in range(5):
        counted.calls = 0
        pyro.set_rng_seed(seed)
        loss = elbo.loss(counted, guide)
        assert counted.calls == 3
        pyro.set_rng_seed(seed)
        assert loss == pytest.approx(by_hand(model, guide, 3, apart), rel=1e-12)


@pytest.mark.parametrize("model", [indexing, summing_all, folding])
def test_the_warning_names_the_site(model):
    with pytest.warns(UserWarning, match="site '?x"):
        ImportanceWeightedELBO(num_particles=3).loss(model, prior_guide(model))


def test_the_warning_comes_once_for_a_pair():
    """Also where each minibatch brings sites of other names, and so another verdict."""

    def model():
        for i in pyro.plate("data", 30, subsample_size=2):
            z = normal(f"z_{i}")
            normal(f"x_{i}", z.sum(), obs=torch.tensor(1.0))

    def guide():
        for i in pyro.plate("data", 30, subsample_size=2):
            normal(f"z_{i}")

    elbo = ImportanceWeightedELBO(num_particles=3)
    with pytest.warns(UserWarning, match="one after the other") as caught:
        for _ in range(12):
            elbo.loss(model, guide)
    assert len(caught) == 1


@pytest.mark.parametrize("model", NARROW)
def test_false_asks_nothing_and_warns_of_nothing(model):
    assert math.isfinite(ImportanceWeightedELBO(3, vectorize_particles=False).loss(model, prior_guide(model)))


def test_true_forces():
    """Also where it is wrong."""
    counted, guide = Counted(folding), prior_guide(folding)
    elbo = ImportanceWeightedELBO(3, vectorize_particles=True)
    elbo.loss(counted, guide)
    counted.calls = 0
    elbo.loss(counted, guide)
    assert counted.calls == 1


def test_a_guide_that_cannot_be_vectorised():
    """Its own site is named."""

    def guide():
        with pyro.plate("data", 3):
            u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0), infer={"is_auxiliary": True})
            normal("z", u.reshape(-1)[:3])

    with pytest.warns(UserWarning, match="guide site 'z'"):
        ImportanceWeightedELBO(num_particles=3).loss(simple_model, guide)


class Network(PyroModule):
    """A Bayesian neural network in the usual way: nn.Linear cannot take a plate of weights."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return normal("y", mean, obs=y)


def test_a_bayesian_network_runs_sequentially(double):
    x, y = torch.randn(5, 2), torch.randn(5)
    model = Network()
    guide = AutoNormal(model)
    guide(x, y)
    elbo = ImportanceWeightedELBO(num_particles=3)
    with pytest.warns(UserWarning, match="one after the other"):
        elbo.loss(model, guide, x, y)
    pyro.set_rng_seed(1)
    loss = elbo.loss(model, guide, x, y)
    pyro.set_rng_seed(1)
    log_w = []
    for _ in range(3):
        guide_trace = poutine.trace(guide).get_trace(x, y)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, y)
        log_w.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
    assert loss == pytest.approx(-(torch.stack(log_w).logsumexp(0) - math.log(3)).item(), rel=1e-12)


def test_the_gradient_of_a_sequential_run():
    """Particle by particle, with parameters of both."""

    def model():
        z = normal("z", pyro.param("theta", torch.tensor(0.3)))
        normal("x", z if z > 0 else 3.0 * z, obs=torch.tensor(1.0))

    def guide():
        normal("z", pyro.param("phi", torch.tensor(-0.2)))

    elbo = ImportanceWeightedELBO(num_particles=4, vectorize_particles=False)
    elbo.loss(model, guide)
    pyro.set_rng_seed(0)
    loss = elbo.differentiable_loss(model, guide)
    params = [pyro.param("theta"), pyro.param("phi")]
    ours = torch.autograd.grad(loss, params)
    pyro.set_rng_seed(0)
    log_w = []
    for _ in range(4):
        z = dist.Normal(params[1], 1.0).rsample()
        log_x = dist.Normal(z if z > 0 else 3.0 * z, 1.0).log_prob(torch.tensor(1.0))
        log_w.append(dist.Normal(params[0], 1.0).log_prob(z) + log_x - dist.Normal(params[1], 1.0).log_prob(z))
    expected = -(torch.stack(log_w).logsumexp(0) - math.log(4))
    torch.testing.assert_close(loss, expected)
    for a, b in zip(ours, torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(a, b)


# One minibatch


@pytest.mark.parametrize("vectorize", [None, True, False])
def test_all_particles_share_one_minibatch(vectorize):
    seen = []

    def model():
        with pyro.plate("data", 30, subsample_size=4) as index:
            seen.append(index.tolist())
            z = normal("z")
            normal("x", z, obs=torch.zeros(4))

    def guide():
        with pyro.plate("data", 30, subsample_size=4) as index:
            seen.append(index.tolist())
            normal("z")

    elbo = ImportanceWeightedELBO(num_particles=5, vectorize_particles=vectorize)
    steps = []
    for _ in range(4):
        elbo.loss(model, guide)
        seen.clear()
        elbo.loss(model, guide)
        assert len({tuple(s) for s in seen}) == 1
        steps.append(tuple(seen[0]))
    assert len(set(steps)) > 1


# Models with randomness of their own


class Dropout(PyroModule):
    def __init__(self, rate=0.5):
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 3), nn.Dropout(rate)

    def forward(self):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            normal("x", self.dropout(self.layer(z)).sum(-1), obs=DATA)


def vector_guide():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.1).to_event(1))


def test_dropout_stays_vectorised_and_independent():
    """Two replays that disagree say nothing against vectorisation, nor against the plate."""
    model = Dropout()
    counted = Counted(model)
    elbo = ImportanceWeightedELBO(num_particles=4)
    for _ in range(5):
        assert elbo.log_weights(counted, vector_guide).plates == ("data",)
    counted.calls = 0
    elbo.loss(counted, vector_guide)
    assert counted.calls == 1
    assert ImportanceWeightedELBO(4).log_weights(model.eval(), vector_guide).plates == ("data",)


def test_dropout_does_not_hide_a_model_that_mixes():
    class Mixing(Dropout):
        def forward(self):
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                normal("x", (self.dropout(self.layer(z)).sum(-1) + z.sum(-1)).flip(-1), obs=DATA)

    assert ImportanceWeightedELBO(num_particles=4).log_weights(Mixing(), vector_guide).plates == ()


def test_a_model_that_draws_noise_outside_pyro():
    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            normal("x", z + 0.1 * torch.randn(z.shape), obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles=4)
    assert elbo.log_weights(model, simple_guide).plates == ("data",)


# What the check leaves behind


def test_the_first_call_draws_the_same_numbers_as_any_other(unchecked):
    """Torch's, numpy's and Python's generators are put back after the check."""

    def model():
        simple_model()
        torch.rand(()), np.random.rand(), random.random()

    elbo = ImportanceWeightedELBO(num_particles=3)
    results = []
    for _ in range(2):
        pyro.set_rng_seed(9)
        results.append((elbo.loss(model, simple_guide), torch.rand(()).item(), np.random.rand(), random.random()))
    assert results[0] == results[1]
    forced = ImportanceWeightedELBO(num_particles=3, vectorize_particles=True)
    pyro.set_rng_seed(9)
    assert forced.loss(model, simple_guide) == results[0][0]


def test_the_check_draws_its_minibatches_in_private():
    """The indices of the first step are those of a seeded later one."""

    def model():
        with pyro.plate("data", 30, subsample_size=4) as index:
            seen.append(tuple(index.tolist()))
            z = normal("z")
            normal("x", z, obs=torch.zeros(4))

    def guide():
        with pyro.plate("data", 30, subsample_size=4):
            normal("z")

    seen, elbo, last = [], ImportanceWeightedELBO(num_particles=3), []
    for _ in range(2):
        pyro.set_rng_seed(1)
        elbo.loss(model, guide)
        last.append(seen[-1])
    assert last[0] == last[1]


class Normalised(PyroModule):
    """A model with running statistics."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.register_buffer("calls", torch.tensor(0))

    def forward(self):
        self.calls += 1
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            mean = self.norm(z.reshape(-1, 4)).reshape(z.shape)
            normal("x", mean.sum(-1), obs=DATA)


def batch_guide():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.1).to_event(1))


@pytest.mark.filterwarnings("ignore:.*(BatchNorm|one after the other)")
def test_buffers_are_as_after_one_run():
    """Running statistics, counters and buffers of the model itself: the check does not train BatchNorm."""
    torch.manual_seed(0)
    model = Normalised(nn.BatchNorm1d(4))
    elbo = ImportanceWeightedELBO(num_particles=5, vectorize_particles=True)
    elbo.loss(model, batch_guide)
    assert model.norm.num_batches_tracked == 1
    assert model.calls == 1
    mean = model.norm.running_mean.clone()
    elbo.loss(model, batch_guide)
    assert model.norm.num_batches_tracked == 2 and not torch.equal(mean, model.norm.running_mean)


def test_batch_norm_in_training_warns_and_in_evaluation_does_not():
    model = Normalised(nn.BatchNorm1d(4))
    elbo = ImportanceWeightedELBO(num_particles=5)
    with pytest.warns(UserWarning) as caught:
        elbo.loss(model, batch_guide)
    assert sum("BatchNorm1d in training mode" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo.loss(model, batch_guide)  # once
        model.eval()
        weights = ImportanceWeightedELBO(num_particles=5).log_weights(model, batch_guide)
        assert weights.plates == ("data",)
        assert elbo.log_weights(model, batch_guide).plates == ("data",), "training mode is part of the verdict's key"


@pytest.mark.filterwarnings("ignore:.*(BatchNorm|one after the other)")
@pytest.mark.parametrize("held", ["methods", "closures"])
def test_evaluation_mode_is_seen_through_methods_and_closures(held):
    """``SVI(vae.model, vae.guide, ...)``: what matters is the mode of the layers that are called."""

    class Autoencoder(Normalised):
        def model(self):
            self.forward()

        def guide(self):
            batch_guide()

    both = Autoencoder(nn.BatchNorm1d(4))
    model, guide = (both.model, both.guide) if held == "methods" else (lambda: both(), batch_guide)
    elbo = ImportanceWeightedELBO(num_particles=5)
    for training, plates in ((True, ()), (False, ("data",)), (True, ()), (False, ("data",))):
        both.train(training)
        assert elbo.log_weights(model, guide).plates == plates


def test_layer_norm_is_welcome():
    weights = ImportanceWeightedELBO(num_particles=5).log_weights(Normalised(nn.LayerNorm(4)), batch_guide)
    assert weights.plates == ("data",)


def test_the_check_adds_no_gradient_and_no_handler_sees_it():
    pyro.param("theta", torch.tensor(0.3))

    def model():
        with pyro.plate("data", 3):
            z = normal("z", pyro.param("theta", torch.tensor(0.3)))
            normal("x", z, obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles=3)
    with poutine.trace() as tracer:
        elbo.loss(poutine.block(model), poutine.block(simple_guide))
    assert list(tracer.trace.nodes) == []
    assert pyro.param("theta").unconstrained().grad is None


# The verdict is kept


def checks(elbo, model, guide):
    """Calls of the model beyond the one of a vectorised step."""
    counted = model if isinstance(model, Counted) else None
    before = counted.calls
    elbo.loss(counted, guide)
    return counted.calls - before - 1


def test_the_verdict_is_taken_once():
    model, elbo = Counted(simple_model), ImportanceWeightedELBO(num_particles=3)
    assert checks(elbo, model, simple_guide) > 0
    assert [checks(elbo, model, simple_guide) for _ in range(5)] == [0] * 5
    assert checks(elbo, model, Counted(simple_guide)) > 0, "another guide, another verdict"


class Methods:
    """Model and guide as bound methods: a new object at each access."""

    def __init__(self):
        self.calls = 0

    def model(self):
        self.calls += 1
        simple_model()

    def guide(self):
        simple_guide()


@dataclass
class Unhashable:
    """As any dataclass that compares by value."""

    calls: int = 0

    def model(self):
        self.calls += 1
        simple_model()

    def guide(self):
        simple_guide()

    def __call__(self):
        self.model()


class Slotted:
    """Cannot be referenced weakly."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        simple_model()

    model, guide = __call__, staticmethod(simple_guide)


@pytest.mark.parametrize("kind", [Methods, Unhashable, Slotted])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_verdict_on_bound_methods_is_kept(kind, num_particles):
    """However they hash, and whether or not they can be referenced weakly."""
    held, elbo = kind(), ImportanceWeightedELBO(num_particles=num_particles)
    elbo.loss(held.model, held.guide)
    held.calls = 0
    gc.collect()
    for _ in range(5):
        elbo.loss(held.model, held.guide)
    assert held.calls == 5


def test_two_objects_of_one_class_have_verdicts_of_their_own():
    class Switch:
        def __init__(self, mixes):
            self.mixes = mixes

        def model(self):
            with pyro.plate("data", 3):
                z = normal("z")
                normal("x", z.flip(-1) if self.mixes else z, obs=DATA)

    elbo, apart, together = ImportanceWeightedELBO(num_particles=3), Switch(False), Switch(True)
    for _ in range(2):
        assert elbo.log_weights(apart.model, simple_guide).plates == ("data",)
        assert elbo.log_weights(together.model, simple_guide).plates == ()


def test_closures_made_anew_are_looked_at_anew():
    elbo = ImportanceWeightedELBO(num_particles=3)
    for mixes in (False, True, False, True):

        def model(mixes=mixes):
            with pyro.plate("data", 3):
                z = normal("z")
                normal("x", z.flip(-1) if mixes else z, obs=DATA)

        assert elbo.log_weights(model, simple_guide).plates == (() if mixes else ("data",))
        del model


def test_unhashable_callables():
    held = Unhashable()
    elbo = ImportanceWeightedELBO(num_particles=3)
    assert elbo.log_weights(held, simple_guide).plates == ("data",)


def test_the_verdict_is_taken_anew_when_plates_change():
    """A plate that comes and goes, and one that changes its dimension."""
    state = {"rows": False, "dim": -1}

    def sites(observe):
        if state["rows"]:
            with pyro.plate("rows", 2, dim=-2), pyro.plate("data", 3, dim=-1):
                z = normal("z")
                if observe:
                    normal("x", z, obs=torch.zeros(2, 3))
        else:
            with pyro.plate("data", 3, dim=state["dim"]):
                z = normal("z")
                if observe:
                    normal("x", z, obs=torch.zeros(3, *[1] * (-state["dim"] - 1)))

    def model():
        sites(True)

    def guide():
        sites(False)

    elbo = ImportanceWeightedELBO(num_particles=4)
    for rows, dim, plates, shape in [
        (False, -1, ("data",), (4, 3)),
        (True, -1, ("rows", "data"), (4, 2, 3)),
        (False, -1, ("data",), (4, 3)),
        (False, -2, ("data",), (4, 3)),
        (False, -1, ("data",), (4, 3)),
        (True, -1, ("rows", "data"), (4, 2, 3)),
    ]:
        state.update(rows=rows, dim=dim)
        weights = elbo.log_weights(model, guide)
        assert weights.plates == plates and weights.log_weights.shape == shape


def test_the_verdict_is_taken_anew_when_sites_change():
    state = {"mixes": False}

    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            normal("x", z, obs=DATA)
            if state["mixes"]:
                normal("y", z.flip(-1), obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles=4)
    for mixes in (False, True, False):
        state["mixes"] = mixes
        assert elbo.log_weights(model, simple_guide).plates == (() if mixes else ("data",))


@pytest.mark.parametrize("sizes", [(3, 5, 2), (10, 1, 10)])
def test_data_of_another_size_needs_no_new_verdict(sizes):
    """The last minibatch of an epoch is smaller; only a single element is a case of its own."""
    calls = []

    def model(x):
        calls.append(1)
        with pyro.plate("data", len(x)):
            z = normal("z")
            normal("x", z, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            normal("z", x / 2.0)

    elbo = ImportanceWeightedELBO(num_particles=3)
    elbo.loss(model, guide, torch.zeros(sizes[0]))
    for size in sizes * 2:
        elbo.loss(model, guide, torch.zeros(size))
    calls.clear()
    for size in sizes:
        assert elbo.bound(model, guide, torch.zeros(size)).shape == (size,)
    assert len(calls) == len(sizes)


def test_the_verdict_dies_with_the_model():
    """No ELBO keeps a model or its data alive, and a new object at the old address is looked at anew."""
    elbo = ImportanceWeightedELBO(num_particles=3)
    for kind in (Dropout, Methods):
        held = kind()
        model, guide = (held, vector_guide) if kind is Dropout else (held.model, held.guide)
        elbo.loss(model, guide)
        last = weakref.ref(held)
        del held, model, guide
        gc.collect()
        assert last() is None
    assert not elbo._structures._latest and not elbo._structures._verdicts


def test_one_particle_keeps_no_model_alive_either():
    def enumerating():
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            normal("x", c, obs=DATA)

    class Held:
        def model(self):
            enumerating()

        def guide(self):
            pass

    elbo, held = ImportanceWeightedELBO(num_particles=1), Held()
    elbo.loss(held.model, held.guide)
    last = weakref.ref(held)
    del held
    gc.collect()
    assert last() is None
