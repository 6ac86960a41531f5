# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Which plates are independent, where scales, masks and constants go."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_iwae import ImportanceWeightedELBO, exact
from tests.statistics import assert_mean, assert_same_mean

pytestmark = pytest.mark.usefixtures("double")
K = 4


def normal(name, loc=0.0, obs=None, **options):
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), 1.0), obs=obs, **options)


def guide_of(model, shift=0.3):
    """The model's own latents, drawn from shifted priors in the same plates."""

    def guide():
        class Shift(poutine.messenger.Messenger):
            def _pyro_sample(self, msg):
                if isinstance(msg["fn"], dist.Normal) and not msg["is_observed"]:
                    msg["fn"] = dist.Normal(msg["fn"].loc + shift, 1.2)

        hidden = poutine.block(model, hide_fn=lambda m: m["type"] == "sample" and m["is_observed"])
        with Shift():
            hidden()

    return guide


class Recorded:
    """Runs a pair once more and sums its log densities by hand, element by element, from wide traces."""

    def __init__(self, model, guide, **options):
        self.model, self.guide, self.traces = model, guide, {}
        self.elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=True, **options)
        self.elbo.log_weights(self._record("model", model), self._record("guide", guide))
        self.weights = self.elbo.log_weights(self._record("model", model), self._record("guide", guide))

    def _record(self, role, fn):
        def run():
            with poutine.trace() as tracer:
                fn()
            self.traces[role] = tracer.trace

        self.__dict__[f"_{role}"] = self.__dict__.get(f"_{role}", run)  # the same callable each time
        return self.__dict__[f"_{role}"]

    def log_prob(self, role, name):
        site = self.traces[role].nodes[name]
        return site["fn"].log_prob(site["value"])

    def log_w(self, *names, particles=-2):
        """log p - log q over these sites; guide sites are those of the same name."""
        total = 0.0
        for name in names:
            total = total + self.log_prob("model", name)
            if name in self.traces["guide"].nodes:
                total = total - self.log_prob("guide", name)
        return total


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-10, atol=1e-10)


# Which plates are independent


def flat(n=3):
    with pyro.plate("data", n):
        z = normal("z")
        normal("x", z, obs=torch.arange(float(n)))


def nested():
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        z = normal("z")
        normal("x", z, obs=torch.ones(2, 3))


def nested_above():
    """The latent is in the outer plate only."""
    with pyro.plate("outer", 2, dim=-2):
        z = normal("z")
        with pyro.plate("inner", 3, dim=-1):
            normal("x", z, obs=torch.ones(2, 3))


def crossed():
    a, b = pyro.plate("a", 2, dim=-1), pyro.plate("b", 3, dim=-2)
    with a:
        u = normal("u")
    with b:
        v = normal("v")
    with a, b:
        normal("x", u + v, obs=torch.ones(3, 2))


def crossed_with_common_outer():
    a, b, outer = pyro.plate("a", 2, dim=-1), pyro.plate("b", 3, dim=-2), pyro.plate("outer", 4, dim=-3)
    with outer, a:
        u = normal("u")
    with outer, b:
        v = normal("v")
    with outer, a, b:
        normal("x", u + v, obs=torch.ones(4, 3, 2))


def sequential():
    for i in pyro.plate("data", 3):
        z = normal(f"z_{i}")
        normal(f"x_{i}", z, obs=torch.tensor(float(i)))


def sequential_in_wide():
    with pyro.plate("wide", 2):
        for i in pyro.plate("narrow", 3):
            z = normal(f"z_{i}")
            normal(f"x_{i}", z, obs=torch.ones(2) * i)


def sequential_below_a_global():
    g = normal("g")
    for i in pyro.plate("data", 3):
        z = normal(f"z_{i}", g)
        normal(f"x_{i}", z, obs=torch.tensor(float(i)))


def two_sequential():
    rows, columns = pyro.plate("rows", 2), pyro.plate("columns", 3)
    for i in rows:
        for j in columns:
            z = normal(f"z_{i}_{j}")
            normal(f"x_{i}_{j}", z, obs=torch.tensor(float(i + j)))


def gap():
    """Dimension -2 is left free."""
    with pyro.plate("outer", 2, dim=-3), pyro.plate("inner", 3, dim=-1):
        z = normal("z")
        normal("x", z, obs=torch.ones(2, 1, 3))


def local_and_global():
    g = normal("g")
    with pyro.plate("data", 3):
        z = normal("z", g)
        normal("x", z, obs=torch.ones(3))


def events():
    """Event dimensions right of the plates."""
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.0), obs=torch.ones(3))


def markov():
    """A chain in time for each series."""
    with pyro.plate("series", 3):
        z = torch.zeros(())
        for t in pyro.markov(range(4)):
            z = normal(f"z_{t}", z)
            normal(f"x_{t}", z, obs=torch.ones(3) * t)


def gate():
    with pyro.plate("data", 3):
        z = normal("z")
        pyro.factor("gate", -(z**2))


EXPECTED = [
    (flat, ("data",), (3,)),
    (nested, ("outer", "inner"), (2, 3)),
    (nested_above, ("outer",), (2,)),
    (crossed, (), ()),
    (crossed_with_common_outer, ("outer",), (4,)),
    (sequential, ("data",), (3,)),
    (sequential_in_wide, ("narrow", "wide"), (3, 2)),
    (sequential_below_a_global, (), ()),
    (two_sequential, ("rows", "columns"), (2, 3)),
    (gap, ("outer", "inner"), (2, 3)),
    (local_and_global, (), ()),
    (events, ("data",), (3,)),
    (markov, ("series",), (3,)),
    (gate, ("data",), (3,)),
]


@pytest.mark.parametrize("model, plates, shape", EXPECTED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("vectorize", [None, False])
def test_independent_plates(model, plates, shape, vectorize):
    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    weights = elbo.log_weights(model, guide_of(model))
    assert weights.plates == plates
    assert weights.log_weights.shape == (K, *shape)
    assert elbo.bound(model, guide_of(model)).shape == shape


@pytest.mark.parametrize("model", [flat, nested, nested_above, crossed, local_and_global, events, markov, gate])
def test_weights_are_the_densities_by_element(model):
    """Summed by hand from the traces of the very run."""
    run = Recorded(model, guide_of(model))
    names = [n for n, s in run.traces["model"].nodes.items() if s["type"] == "sample" and hasattr(s["fn"], "event_dim")]
    total = 0.0
    plates = {"nested": 2, "nested_above": -1}.get(model.__name__, len(run.weights.plates))
    for name in names:
        value = run.log_w(name)
        if plates == -1:  # outer kept, inner summed
            value = value.sum(-1) if value.shape[-1] == 3 else value[..., 0]
        elif plates == 0:
            value = value.flatten(1).sum(-1)
        total = total + value
    close(run.weights.log_weights, total)


def test_sequential_plates_equal_vectorised_ones():
    """The same data and noise, element by element, in a loop."""
    values = torch.randn(3)

    def point_guide(names):
        def guide():
            for name, value in names.items():
                pyro.sample(name, dist.Delta(value))

        return guide

    def wide_guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Delta(values))

    def narrow_guide():
        for i in pyro.plate("data", 3):
            pyro.sample(f"z_{i}", dist.Delta(values[i]))

    elbo = ImportanceWeightedELBO(num_particles=2)
    wide, narrow = elbo.log_weights(flat, wide_guide), elbo.log_weights(sequential, narrow_guide)
    assert wide.plates == narrow.plates == ("data",)
    close(wide.log_weights, narrow.log_weights)


@pytest.mark.parametrize("vectorize", [None, False])
def test_plates_of_two_names_for_the_same_elements(vectorize):
    def model():
        with pyro.plate("za", 3):
            z = normal("z")
        with pyro.plate("xa", 3):
            normal("x", z, obs=torch.ones(3))

    def guide():
        with pyro.plate("qa", 3):
            normal("z", 0.2)

    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    assert elbo.log_weights(model, guide).plates == ("za",)


def test_plates_of_one_dimension_and_two_sizes():
    """What lies in the other plate belongs to no element of the first."""

    def model():
        with pyro.plate("za", 3):
            z = normal("z")
        with pyro.plate("xa", 6):
            normal("x", z.repeat_interleave(2, -1), obs=torch.ones(6))

    def guide():
        with pyro.plate("za", 3):
            normal("z", 0.2)

    assert ImportanceWeightedELBO(num_particles=K).log_weights(model, guide).plates == ()


MIXERS = {
    "flip": lambda z: z.flip(-1),
    "centring": lambda z: z - z.mean(-1, keepdim=True),
    "roll": lambda z: z.roll(1, -1),
    "cumulative sum": lambda z: z.cumsum(-1),
    "numpy": lambda z: torch.as_tensor(z.detach().numpy()[..., ::-1].copy()),
    "swap of two": lambda z: z[..., [1, 0, 2, 3]],
    "softmax": lambda z: z.softmax(-1),
}


def in_place(z):
    result = z.clone()
    result[..., -1] += z[..., :-1].sum(-1)
    return result


MIXERS["in-place sum"] = in_place
PRESERVERS = {
    "numpy round trip": lambda z: torch.as_tensor(z.detach().numpy() * 2.0),
    "in-place write": lambda z: torch.zeros_like(z).copy_(z),
    "flip and back": lambda z: z.flip(-1).flip(-1),
    "index": lambda z: z[..., torch.arange(4)],
}


def mixed(mixer, n=4, where="likelihood"):
    def model():
        with pyro.plate("data", n):
            z = normal("z")
            if where == "likelihood":
                normal("x", mixer(z), obs=torch.arange(float(n)))
            else:
                u = normal("u", mixer(z))
                normal("x", u, obs=torch.arange(float(n)))

    return model


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("where", ["likelihood", "prior"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_site_that_mixes_elements_costs_the_plate_its_independence(name, where, vectorize):
    """Written inside the plate as if it did not."""
    model = mixed(MIXERS[name], where=where)
    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    weights = elbo.log_weights(model, guide_of(model))
    assert weights.plates == () and weights.log_weights.shape == (K,)


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_a_swap_of_any_two_elements_is_found(n, vectorize, unchecked):
    """Of whichever two: every pair of elements comes apart in some hybrid of the mixing check."""
    for i in range(n):
        for j in range(i):
            order = list(range(n))
            order[i], order[j] = j, i
            model = mixed(lambda z, order=order: z[..., order], n)
            elbo = ImportanceWeightedELBO(num_particles=2, vectorize_particles=vectorize)
            assert elbo.log_weights(model, guide_of(model)).plates == (), f"{i} and {j} of {n}"


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("name", PRESERVERS)
def test_what_keeps_elements_apart_is_allowed(name, vectorize):
    model = mixed(PRESERVERS[name])
    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    assert elbo.log_weights(model, guide_of(model)).plates == ("data",)


@pytest.mark.parametrize("vectorize", [None, False])
def test_a_guide_that_mixes_elements(vectorize):
    def guide():
        with pyro.plate("data", 3):
            u = normal("u", infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u.flip(-1), 1.0))

    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    assert elbo.log_weights(flat, guide).plates == ()


def test_one_of_two_plates_is_mixed():
    """The other one keeps its elements."""

    def model():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = normal("z")
            normal("x", z.flip(-1), obs=torch.arange(6.0).reshape(2, 3))

    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, guide_of(model))
    assert weights.plates == ("rows",)


@pytest.mark.parametrize("probability", [0.5, 0.02])
@pytest.mark.parametrize("vectorize", [None, False])
def test_mixing_of_discrete_latents_is_found(probability, vectorize, unchecked):
    """Also where most particles of a check are alike: in the end, and for good, the plate is not independent."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(probability)))
        normal("x", z.sum(-1, keepdim=True), obs=torch.tensor([1.0]))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(torch.tensor(probability)))

    elbo = ImportanceWeightedELBO(num_particles=2, vectorize_particles=vectorize)
    for _ in range(60):
        weights = elbo.log_weights(model, guide)
    assert weights.plates == ()


@pytest.mark.parametrize("seed", range(8))
def test_mixing_of_coins_in_sequential_particles(seed):
    """Two particles of a check can have the same sum by chance; the verdict must not rest on that."""
    pyro.set_rng_seed(seed)

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        normal("x", z.sum(-1, keepdim=True), obs=torch.tensor([1.0]))

    def guide():
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    assert ImportanceWeightedELBO(num_particles=3, vectorize_particles=False).log_weights(model, guide).plates == ()


def coin(name):
    return pyro.sample(name, dist.Bernoulli(torch.tensor(0.5)))


def sum_outside(is_model):
    """The outer plate has one element, which holds two coins."""
    with pyro.plate("outer", 1, dim=-2), pyro.plate("inner", 2, dim=-1):
        z = coin("z")
    if is_model:
        normal("x", z.sum((-1, -2), keepdim=True), obs=torch.tensor([[1.0]]))


def parity_of_the_neighbour(is_model):
    with pyro.plate("data", 3):
        z, y = coin("z"), coin("y")
        if is_model:
            normal("x", (z - y).abs().roll(1, -1), obs=torch.ones(3))


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("program", [sum_outside, parity_of_the_neighbour])
def test_mixing_of_what_two_coins_have_in_common_is_found(program, vectorize):
    """Both turned over have the same parity, and often the same sum."""
    for _ in range(30):
        elbo = ImportanceWeightedELBO(num_particles=2, vectorize_particles=vectorize)
        assert elbo.log_weights(lambda: program(True), lambda: program(False)).plates == ()


RARE = {  # most draws are alike, so that moving an element to another particle's value would move nothing
    "Poisson": lambda: dist.Poisson(torch.tensor(0.05)),
    "geometric": lambda: dist.Geometric(torch.tensor(0.95)),
    "binomials": lambda: dist.Binomial(torch.tensor([1.0, 2.0]), torch.tensor(0.05)),
    "zero-inflated": lambda: dist.ZeroInflatedPoisson(torch.tensor(1.0), gate=torch.tensor(0.9)),
    "negative binomial": lambda: dist.NegativeBinomial(torch.tensor(1.0), torch.tensor(0.05)),
    "beta-binomial": lambda: dist.BetaBinomial(torch.tensor(1.0), torch.tensor(20.0), torch.tensor(3.0)),
    "coins": lambda: dist.Bernoulli(torch.full((2,), 0.05)).to_event(1),
    "one-hot": lambda: dist.OneHotCategorical(torch.tensor([0.96, 0.02, 0.02])),
    "multinomial": lambda: dist.Multinomial(2, torch.tensor([0.98, 0.02])),
}


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("family", RARE)
def test_mixing_of_what_is_seldom_other_than_usual_is_found(family, vectorize):
    fn = RARE[family]
    events = fn().event_dim

    def total(z):
        return (z * torch.arange(1.0, 1.0 + z.shape[-1])).sum(-1) if events else z

    def model():
        with pyro.plate("data", 2):
            z = total(pyro.sample("z", fn()))
            normal("x", z, obs=torch.tensor([0.3, 1.0]))
        normal("y", z.sum(-1, keepdim=True), obs=torch.tensor([1.0]))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", fn())

    for seed in range(10):
        pyro.set_rng_seed(seed)
        elbo = ImportanceWeightedELBO(num_particles=2, vectorize_particles=vectorize)
        assert elbo.log_weights(model, guide).plates == (), seed


class SpikeAndSlab(dist.TorchDistribution):
    """Zero with probability 0.7, else standard Gaussian; the support does not show that values are alike."""

    arg_constraints, support, has_rsample = {}, dist.constraints.real, False

    def __init__(self, batch_shape=()):
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return SpikeAndSlab(batch_shape)

    def sample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        return torch.randn(shape) * (torch.rand(shape) < 0.3)

    def log_prob(self, value):
        return torch.where(value == 0.0, math.log(0.7), math.log(0.3) + dist.Normal(0.0, 1.0).log_prob(value))


@pytest.mark.parametrize("vectorize", [None, False])
def test_each_element_must_have_differed_in_a_conclusive_check(vectorize):
    """Only the first one is seen outside of the plate, and is the same in two particles with probability 1/2."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", SpikeAndSlab())
        normal("y", z[..., :1], obs=torch.tensor([1.0]))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", SpikeAndSlab())

    for seed in range(20):
        pyro.set_rng_seed(seed)
        elbo = ImportanceWeightedELBO(num_particles=2, vectorize_particles=vectorize)
        assert [elbo.log_weights(model, guide).plates for _ in range(5)][-1] == (), seed


@pytest.mark.parametrize("vectorize", [None, False])
def test_every_latent_must_have_differed_in_a_conclusive_check(vectorize, unchecked):
    """The one that mixes may be the same in all particles of a check while the other one differs."""

    def model():
        with pyro.plate("data", 2):
            normal("u")
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.1)))
        normal("x", 3.0 * z.sum(-1, keepdim=True), obs=torch.tensor([1.0]))

    def guide():
        with pyro.plate("data", 2):
            normal("u", 0.2)
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.1)))

    for _ in range(8):
        elbo = ImportanceWeightedELBO(num_particles=2, vectorize_particles=vectorize)
        for _ in range(20):
            weights = elbo.log_weights(model, guide)
        assert weights.plates == ()


def test_latents_with_a_support_of_their_own_in_each_element():
    """Their support cannot be listed for all elements at once, so that the check moves values between particles."""
    counts, data = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 2.0])

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Binomial(counts, torch.tensor(0.4)))
            normal("x", z, obs=data)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Binomial(counts, torch.tensor(0.5)))

    weights = ImportanceWeightedELBO(num_particles=5000).log_weights(model, guide)
    assert weights.plates == ("data",)
    for i in range(2):
        z = torch.arange(counts[i] + 1)
        joint = dist.Binomial(counts[i], torch.tensor(0.4)).log_prob(z) + dist.Normal(z, 1.0).log_prob(data[i])
        assert_mean(weights.log_weights[:, i].exp(), joint.logsumexp(0).exp())


# Outside the plates


def test_deterministic_outside():
    def model():
        flat()
        pyro.deterministic("nothing", torch.tensor(1.0))

    assert ImportanceWeightedELBO(num_particles=K).log_weights(model, guide_of(flat)).plates == ("data",)


def test_deterministic_that_mixes():
    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            pyro.deterministic("centred", z - z.mean(-1, keepdim=True))
            normal("x", z, obs=torch.ones(3))
        pyro.deterministic("mean", z.mean(-1))

    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, guide_of(flat))
    assert weights.plates == ("data",)
    assert all(bool((value == 0.0).all()) for value in weights.constant.values())


@pytest.mark.parametrize("vectorize", [None, False])
def test_sites_outside_without_latents_upstream_are_constants(vectorize):
    """Kept apart by the plates that they do lie in, added to the loss once, scaled there, never weighed."""
    observed = torch.tensor([0.3, 0.4])

    def model():
        loc = pyro.param("loc", torch.tensor(0.1))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(2.0))
        with pyro.plate("a", 2, dim=-2):
            pyro.sample("ya", dist.Normal(loc, 1.0), obs=observed.unsqueeze(-1))
            with pyro.plate("b", 3, dim=-1):
                z = normal("z")
                normal("x", z, obs=torch.zeros(2, 3))

    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    weights = elbo.log_weights(model, guide_of(model))
    assert weights.plates == ("a", "b")
    assert set(weights.constant) == {(), ("a",)}
    loc = pyro.param("loc")
    close(weights.constant[()].sum(), dist.Normal(loc, 1.0).log_prob(torch.tensor(2.0)))
    close(weights.constant[("a",)].flatten(), dist.Normal(loc, 1.0).log_prob(observed))
    loss = elbo.differentiable_loss(model, guide_of(model))
    (gradient,) = torch.autograd.grad(loss, pyro.param("loc").unconstrained())
    close(gradient, -(2.0 - 0.1 + (observed - 0.1).sum()))
    pyro.set_rng_seed(4)
    total = elbo.loss(model, guide_of(model))
    pyro.set_rng_seed(4)
    close(-total, elbo.bound(model, guide_of(model)).sum() + sum(v.sum() for v in weights.constant.values()))


def test_a_constant_in_a_subsampled_plate_is_scaled():
    """Next to a global latent, whose particles have nothing to do with it."""

    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            normal("x", z, obs=torch.ones(3))
        with pyro.plate("other", 10, subsample_size=5):
            normal("y", obs=torch.ones(5))

    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, guide_of(flat))
    assert weights.plates == ("data",)
    close(sum(v.sum() for v in weights.constant.values()), 10.0 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)))


def test_a_site_outside_that_a_latent_reaches():
    def model():
        with pyro.plate("data", 3):
            z = normal("z")
        normal("x", z.sum(-1, keepdim=True), obs=torch.tensor([1.0]))

    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, guide_of(model))
    assert weights.plates == () and weights.constant == {}


def test_a_plate_without_a_size():
    """Its size is read off the sites."""

    def model():
        with pyro.plate("data", dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            normal("x", z, obs=torch.ones(3))

    def guide():
        with pyro.plate("data", dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.2))

    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, guide)
    assert weights.plates == ("data",) and weights.log_weights.shape == (K, 3) and weights.scale == 1.0
    losses = []
    for elbo in (Trace_ELBO(), ImportanceWeightedELBO(num_particles=1)):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_partly_observed_sites():
    """``obs_mask`` splits a site into an observed and a latent one, each masked where it is not."""
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            x = pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3), obs_mask=mask)
            normal("y", x, obs=torch.zeros(3))

    def guide():
        with pyro.plate("data", 3):
            normal("z", 0.2)
            with poutine.mask(mask=~mask):
                normal("x_unobserved", 0.1)

    run = Recorded(model, guide)
    assert run.weights.plates == ("data",)
    expected = run.log_w("z") + run.log_prob("model", "y")
    expected = expected + torch.where(mask, run.log_prob("model", "x_observed"), run.log_w("x_unobserved"))
    close(run.weights.log_weights, expected)


# Scales


def subsampled(size=12, shown=3, prior_scale=1.0, likelihood_scale=1.0):
    def model():
        with pyro.plate("data", size, subsample_size=shown) as index:
            with poutine.scale(scale=prior_scale):
                z = normal("z")
            with poutine.scale(scale=likelihood_scale):
                normal("x", z, obs=torch.arange(float(size))[index])

    return model


def subsampled_guide(size=12, shown=3, scale=1.0):
    def guide():
        with pyro.plate("data", size, subsample_size=shown), poutine.scale(scale=scale):
            normal("z", 0.4)

    return guide


@pytest.mark.parametrize("vectorize", [None, False])
def test_plate_scale_stays_outside_the_logarithm(vectorize):
    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    run = Recorded(subsampled(), subsampled_guide())
    close(run.weights.log_weights, run.log_w("z", "x"))
    assert run.weights.scale == 4.0 and not run.weights.tempered
    weights = elbo.log_weights(subsampled(), subsampled_guide())
    assert weights.scale == 4.0 and weights.plates == ("data",)
    close(weights.total(weights.bound()), 4.0 * weights.bound().sum())


def test_scales_of_nested_subsampled_plates_multiply():
    def model():
        with pyro.plate("a", 10, subsample_size=2, dim=-2), pyro.plate("b", 9, subsample_size=3, dim=-1):
            z = normal("z")
            normal("x", z, obs=torch.ones(2, 3))

    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, guide_of(model))
    assert weights.scale == pytest.approx(15.0) and weights.log_weights.shape == (K, 2, 3)


def test_a_subsampled_sequential_plate():
    def model():
        for i in pyro.plate("data", 6, subsample_size=2):
            z = normal(f"z_{i}")
            normal(f"x_{i}", z, obs=torch.tensor(float(i)))

    elbo = ImportanceWeightedELBO(num_particles=K)
    for _ in range(4):  # the names of the sites change with the minibatch
        weights = elbo.log_weights(model, guide_of(model))
        assert weights.scale == 3.0 and weights.log_weights.shape == (K, 2) and weights.plates == ("data",)


def test_a_scale_on_some_sites_tempers_inside_the_weight():
    """Annealing: beta on the latent in model and guide, or on the likelihood alone."""
    run = Recorded(subsampled(likelihood_scale=0.3), subsampled_guide())
    close(run.weights.log_weights, run.log_w("z") + 0.3 * run.log_w("x"))
    assert run.weights.scale == 4.0 and run.weights.tempered
    run = Recorded(subsampled(prior_scale=0.3), subsampled_guide(scale=0.3))
    close(run.weights.log_weights, 0.3 * run.log_w("z") + run.log_w("x"))
    assert run.weights.scale == 4.0 and run.weights.tempered


def test_a_scale_around_model_and_guide_alike_multiplies_the_loss():
    model, guide = (poutine.scale(f, scale=0.3) for f in (subsampled(), subsampled_guide()))
    run = Recorded(model, guide)
    close(run.weights.log_weights, run.log_w("z", "x"))
    assert run.weights.scale == pytest.approx(1.2) and not run.weights.tempered
    elbo = ImportanceWeightedELBO(num_particles=K)
    pyro.set_rng_seed(0)
    weights = elbo.log_weights(model, guide)
    pyro.set_rng_seed(0)
    close(-elbo.loss(model, guide), 1.2 * weights.bound().sum())


def test_what_adds_nothing_needs_no_scale():
    """A deterministic or masked site outside the scale that all others share."""

    def model():
        with pyro.plate("data", 3):
            with poutine.scale(scale=0.3):
                z = normal("z")
                normal("x", z, obs=torch.ones(3))
            pyro.deterministic("twice", 2.0 * z)
            with poutine.mask(mask=False):
                normal("y", z, obs=torch.ones(3))

    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, poutine.scale(guide_of(flat), scale=0.3))
    assert weights.scale == pytest.approx(0.3) and not weights.tempered


def test_a_scale_around_the_model_alone_tempers():
    run = Recorded(poutine.scale(subsampled(), scale=0.3), subsampled_guide())
    log_p = run.log_prob("model", "z") + run.log_prob("model", "x")
    close(run.weights.log_weights, 0.3 * log_p - run.log_prob("guide", "z"))
    assert run.weights.tempered and run.weights.scale == 4.0


def test_a_scale_by_element():
    """A tensor that scales each element's own terms alike multiplies that element's bound."""
    factors = torch.tensor([1.0, 2.0, 5.0])
    model, guide = (poutine.scale(f, scale=factors) for f in (flat, guide_of(flat)))
    weights = ImportanceWeightedELBO(num_particles=K).log_weights(model, guide)
    assert not weights.tempered
    close(weights.total(weights.bound()), (factors * weights.bound()).sum())
    pyro.set_rng_seed(2)
    ours = ImportanceWeightedELBO(num_particles=1).loss(model, guide)
    pyro.set_rng_seed(2)
    assert ours == pytest.approx(Trace_ELBO().loss(model, guide))


@pytest.mark.parametrize("owns", [True, False])
@pytest.mark.parametrize("vectorize", [None, True, False])
def test_a_subsampled_plate_below_a_global_latent_is_refused(owns, vectorize):
    """With more than one particle; the message names the plate and what to write instead."""

    def model():
        g = normal("g")
        with pyro.plate("batch", 20, subsample_size=5):
            z = normal("z", g) if owns else g
            normal("x", z, obs=torch.ones(5))

    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    remedy = r"num_particles=1, plate_particles=\{'batch': K\}" if owns else r"num_particles=1, or .*full data"
    for method in (elbo.loss, elbo.loss_and_grads, elbo.log_weights, elbo.bound):
        with pytest.raises(ValueError, match=rf"plate 'batch'.*shows 5 of its 20 elements(.|\n)*{remedy}"):
            method(model, guide_of(model))
    one = ImportanceWeightedELBO(num_particles=1)
    pyro.set_rng_seed(6)
    ours = one.loss(model, guide_of(model))
    pyro.set_rng_seed(6)
    assert ours == pytest.approx(Trace_ELBO().loss(model, guide_of(model)))
    pyro.set_rng_seed(6)
    weights = one.log_weights(model, guide_of(model))
    assert -weights.total(weights.bound()).item() == pytest.approx(ours)


def test_a_subsampled_plate_whose_elements_mix_is_refused():
    def model():
        with pyro.plate("batch", 20, subsample_size=5):
            z = normal("z")
            normal("x", z.flip(-1), obs=torch.ones(5))

    with pytest.raises(ValueError, match="plate 'batch'"):
        ImportanceWeightedELBO(num_particles=K).loss(model, guide_of(model))


def test_an_enumerated_global_above_a_subsampled_plate_is_refused():
    def model():
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
        z = normal("z")
        with pyro.plate("batch", 20, subsample_size=5):
            normal("x", z + c, obs=torch.ones(5))

    for particles in (1, K):
        with pytest.raises(ValueError, match="scale"):
            ImportanceWeightedELBO(num_particles=particles).loss(model, guide_of(flat_z))


def flat_z():
    normal("z")


# Masks


@pytest.mark.parametrize("vectorize", [None, False])
def test_masked_elements_add_nothing(vectorize):
    mask = torch.tensor([True, False, True])

    def masked(program):
        def run():
            with poutine.mask(mask=mask):
                program()

        return run

    run = Recorded(masked(flat), masked(guide_of(flat)))
    close(run.weights.log_weights, torch.where(mask, run.log_w("z", "x"), 0.0))
    elbo = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize)
    bound = elbo.bound(masked(flat), masked(guide_of(flat)))
    assert bound[1] == 0.0 and bool((bound[[0, 2]] != 0.0).all())
    assert elbo.log_weights(masked(flat), masked(guide_of(flat))).plates == ("data",)


def test_missing_data_behind_a_mask():
    """NaN in data that a mask or a MaskedDistribution hides does no harm."""
    x = torch.tensor([0.5, math.nan, 1.0])
    seen = ~x.isnan()

    def model():
        with pyro.plate("data", 3):
            z = normal("z", pyro.param("loc", torch.tensor(0.0)))
            with poutine.mask(mask=seen):
                normal("x", z, obs=torch.where(seen, x, 0.0))

    elbo = ImportanceWeightedELBO(num_particles=K)
    assert math.isfinite(elbo.loss_and_grads(model, guide_of(model)))
    assert bool(pyro.param("loc").unconstrained().grad.isfinite())


def test_a_masked_distribution():
    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            pyro.sample("x", dist.Normal(z, 1.0).mask(torch.tensor([True, False, True])), obs=torch.ones(3))

    run = Recorded(model, guide_of(model))
    close(run.weights.log_weights, run.log_w("z", "x"))
    close(run.weights.log_weights[:, 1], run.log_w("z")[:, 1])


def test_mask_false_leaves_a_site_out():
    def model():
        with pyro.plate("data", 3):
            z = normal("z")
            with poutine.mask(mask=False):
                normal("x", z, obs=torch.ones(3))

    run = Recorded(model, guide_of(model))
    close(run.weights.log_weights, run.log_w("z"))


# Factors, auxiliary sites, models without latents


def test_a_factor_is_a_term_of_the_weight():
    run = Recorded(gate, guide_of(gate))
    z = run.traces["guide"].nodes["z"]["value"]
    close(run.weights.log_weights, run.log_w("z") - z**2)


def test_a_factor_in_the_guide():
    """With or without rsample, its value is subtracted like any log q."""

    def guide():
        with pyro.plate("data", 3):
            z = normal("z", 0.1)
            pyro.factor("extra", 0.5 * z, has_rsample=True)

    run = Recorded(flat, guide)
    z = run.traces["guide"].nodes["z"]["value"]
    close(run.weights.log_weights, run.log_w("z", "x") - 0.5 * z)


def test_auxiliary_guide_sites_are_latents_too():
    """Inside the plate its density is subtracted; outside, it ties the elements together."""

    def inside():
        with pyro.plate("data", 3):
            u = normal("u", infer={"is_auxiliary": True})
            normal("z", u)

    def outside():
        u = normal("u", infer={"is_auxiliary": True})
        with pyro.plate("data", 3):
            normal("z", u)

    run = Recorded(flat, inside)
    assert run.weights.plates == ("data",)
    close(run.weights.log_weights, run.log_w("z", "x") - run.log_prob("guide", "u"))
    run = Recorded(flat, outside)
    assert run.weights.plates == ()
    close(run.weights.log_weights, run.log_w("z", "x").sum(-1) - run.log_prob("guide", "u").squeeze(-1))


@pytest.mark.parametrize("num_particles", [1, K])
@pytest.mark.parametrize("subsample", [None, 2])
def test_models_without_latents(num_particles, subsample):
    """The bound is the log likelihood, and so is its gradient; data plates are scaled as ever."""
    x = torch.tensor([0.2, 0.5, 1.0, 2.0])

    def model():
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", 4, subsample_size=subsample) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    def guide():
        pass

    elbo = ImportanceWeightedELBO(num_particles=num_particles)
    assert elbo.log_weights(model, guide).plates == ("data",)
    results = []
    for loss in (elbo, Trace_ELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        results.append((loss.loss_and_grads(model, guide), pyro.param("loc").grad.item()))
    assert results[0] == pytest.approx(results[1], rel=1e-12)


@pytest.mark.parametrize("num_particles", [1, K])
def test_a_model_and_guide_without_any_site(num_particles):
    elbo = ImportanceWeightedELBO(num_particles=num_particles)
    assert elbo.loss(lambda: None, lambda: None) == pytest.approx(0.0, abs=1e-12)
    assert elbo.loss_and_grads(lambda: None, lambda: None) == pytest.approx(0.0, abs=1e-12)


def test_an_empty_minibatch_or_single_element():
    case = exact.Gaussian(data=torch.tensor([1.0]), offset=0.5)
    elbo = ImportanceWeightedELBO(num_particles=K)
    assert elbo.bound(case.model, case.guide).shape == (1,)


# Enumerated model sites


def mixture(sequentially=False):
    def model():
        weights = torch.tensor([0.2, 0.3, 0.5])
        with pyro.plate("data", 2):
            z = normal("z")
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            normal("x", z + c, obs=torch.tensor([0.5, 2.0]))

    return model


@pytest.mark.parametrize("vectorize", [None, True, False])
def test_enumerated_sites_are_summed_out_inside_the_weight(vectorize):
    values = torch.tensor([0.3, -0.4])

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(values, 1e-9))

    weights = ImportanceWeightedELBO(num_particles=K, vectorize_particles=vectorize).log_weights(mixture(), guide)
    assert weights.plates == ("data",)
    mixing, x = torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([0.5, 2.0])
    likelihood = (mixing[:, None] + dist.Normal(values + torch.arange(3.0)[:, None], 1.0).log_prob(x)).logsumexp(0)
    prior = dist.Normal(0.0, 1.0).log_prob(values)
    log_q = -0.5 * math.log(2.0 * math.pi) - math.log(1e-9)  # at the centre; its own noise is chi-squared
    noise = weights.log_weights - (prior + likelihood - log_q)
    assert bool((noise > -1e-6).all()) and bool((noise < 20.0).all())


@pytest.mark.parametrize("local", [True, False])
def test_enumeration_with_one_particle_is_traceenum(local):
    """log_weights at K = 1 goes through the same contraction as at any K."""

    def model():
        g = normal("g")
        c = 0.0 if local else pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
        with pyro.plate("data", 2, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(torch.tensor([0.3, 0.6])), infer={"enumerate": "parallel"})
            with pyro.plate("inner", 3, dim=-2):
                normal("x", g + c + d, obs=torch.ones(3, 2))

    guide = guide_of(lambda: normal("g"))
    pyro.set_rng_seed(0)
    expected = TraceEnum_ELBO(max_plate_nesting=2).loss(model, guide)
    elbo = ImportanceWeightedELBO(num_particles=1)
    pyro.set_rng_seed(0)
    weights = elbo.log_weights(model, guide)
    assert weights.plates == ()
    assert -weights.total(weights.bound()).item() == pytest.approx(expected, rel=1e-12)


def test_a_markov_chain_of_enumerated_sites():
    """A hidden Markov model's forward algorithm, inside the weight of a global latent."""
    transition, x = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0.1, 1.2, 0.9, -0.3])

    def model():
        z = normal("z")
        c = torch.tensor(0)
        for t in pyro.markov(range(4)):
            c = pyro.sample(f"c_{t}", dist.Categorical(transition[c]), infer={"enumerate": "parallel"})
            normal(f"x_{t}", z * c, obs=x[t])

    drawn = []

    def guide():
        drawn.append(normal("z", 0.2).detach())

    wide = ImportanceWeightedELBO(num_particles=K, vectorize_particles=True).log_weights(model, guide)
    for k in range(K):
        z = drawn[-1][k]
        alpha = torch.tensor([0.0, -math.inf])
        for t in range(4):
            alpha = (alpha.unsqueeze(-1) + transition.log()).logsumexp(0)
            alpha = alpha + dist.Normal(z * torch.arange(2.0), 1.0).log_prob(x[t])
        expected = alpha.logsumexp(0) + dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.2, 1.0).log_prob(z)
        close(wide.log_weights[k], expected)


# Plates side by side that share a dimension and a size


def test_enumerated_sites_of_two_plates_are_summed_out_apart():
    x, y = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.5, -0.7])

    def model():
        with pyro.plate("one", 3):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * c, 1.0), obs=x)
        with pyro.plate("other", 3):
            d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.6)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(d - 1.0, 1.0), obs=y)

    def guide():
        with pyro.plate("one", 3):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))  # the prior: a weight is the likelihood

    def two(weight, data, low, high):
        low, high = (dist.Normal(loc, 1.0).log_prob(data) for loc in (low, high))
        return torch.logaddexp(math.log(1 - weight) + low, math.log(weight) + high)

    elbo = ImportanceWeightedELBO(4)
    elbo.log_weights(model, guide)
    pyro.set_rng_seed(1)
    weights = elbo.log_weights(model, guide)
    pyro.set_rng_seed(1)
    z = torch.randn(4, 3)
    expected = two(0.3, x, z, z + 2.0) + two(0.6, y, torch.tensor(-1.0), torch.tensor(0.0))
    torch.testing.assert_close(weights.log_weights, expected)


def both_subsampled(rows):
    data = {"one": torch.linspace(-1, 2, 10), "other": torch.linspace(-2, 1, 40)}

    def program(observed):
        for name, x in data.items():
            with pyro.plate(name, len(x), rows) as i:
                z = pyro.sample(f"z_{name}", dist.Normal(torch.tensor(0.0), 1.0))
                if observed:
                    pyro.sample(f"x_{name}", dist.Normal(z, 1.0), obs=x[i])

    return lambda: program(True), lambda: program(False)


def test_plates_that_show_as_many_of_different_numbers_keep_their_scales():
    """Five of ten and five of forty: no element of one belongs to an element of the other."""
    with pytest.raises(ValueError, match=r"plate 'one'.*shows 5 of its 10.*plate_particles={'one': K, 'other': K}"):
        ImportanceWeightedELBO(3).loss(*both_subsampled(5))
    elbo = ImportanceWeightedELBO(1, plate_particles={"one": 3, "other": 3})
    pairs = ((both_subsampled(None), 500), (both_subsampled(5), 1500))
    whole, part = (torch.tensor([elbo.loss(*pair) for _ in range(count)]) for pair, count in pairs)
    assert_same_mean(part, whole)
