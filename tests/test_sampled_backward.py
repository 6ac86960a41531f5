# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Back-propagation through drawn particles: the right ones, the right mean, and no graph for the rest."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormalMessenger
from torch import nn

from pyro_iwae import (
    CIWAE,
    MIWAE,
    PIWAE,
    TVO,
    DoublyReparameterized,
    ImportanceWeightedELBO,
    Pathwise,
    Renyi,
    SampledBackward,
    StickTheLanding,
)
from tests.noise import Inject
from tests.statistics import assert_mean, assert_same_mean

pytestmark = pytest.mark.usefixtures("double")
INNER = [Pathwise(), StickTheLanding(), DoublyReparameterized()]


def slopes(*rows):
    """Weights of each column, normalised."""
    table = torch.tensor(rows, dtype=torch.get_default_dtype()).T
    return table / table.sum(0)


SLOPES = {
    "even": slopes([1] * 7),
    "uneven": slopes([1, 2, 3, 4, 5, 6, 7]),
    "one dominates": slopes([1, 1, 1, 100, 1, 1, 1]),
    "only one": slopes([0, 0, 1, 0, 0, 0, 0]),
    "some are impossible": slopes([0, 3, 0, 2, 0, 1, 1]),
    "two columns": slopes([1, 2, 3, 4, 5, 6, 7], [7, 0, 0, 1, 0, 0, 1]),
    "none is possible": torch.zeros(7, 1),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("draws", [1, 2, 3, 6])
def test_each_particle_stands_for_one_in_the_mean(name, draws):
    """sum of count over draws of k has mean 1 where the slope is not 0."""
    weights, repeats = SLOPES[name], 20_000
    copies = weights.unsqueeze(1).expand(-1, repeats, -1)
    index, count = SampledBackward(draws).draw(copies)
    assert index.shape == count.shape and index.shape[0] <= draws
    stands = torch.zeros_like(copies).scatter_add(0, index, count)
    assert_mean(stands.transpose(0, 1), (weights > 0.0).to(weights.dtype))
    assert bool((stands[weights.unsqueeze(1).expand_as(stands) == 0.0] == 0.0).all())


@pytest.mark.parametrize("name", SLOPES)
def test_the_heaviest_is_always_among_them_and_counts_once(name):
    weights = SLOPES[name]
    copies = weights.unsqueeze(1).expand(-1, 500, -1)
    index, count = SampledBackward(3).draw(copies)
    assert bool((index[0] == weights.argmax(0)).all())
    torch.testing.assert_close(count[0], (weights.amax(0) > 0.0).to(weights.dtype).expand(500, -1))


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_each_distinct_particle_is_run_once(draws):
    """Where one particle holds nearly all of the weight, the others' places are few."""
    weights = slopes([1e-12, 1.0, 1e-12, 1e-12, 1e-12, 1e-12]).expand(6, 50)
    index, count = SampledBackward(draws).draw(weights)
    possible = count > 0.0
    for column in range(50):
        chosen = index[possible[:, column], column].tolist()
        assert len(chosen) == len(set(chosen))
    even = torch.full((4, 50), 0.25)
    index, count = SampledBackward(draws=3).draw(torch.cat([even, torch.zeros(2, 50)]))
    assert index.shape[0] == 3 and bool((count > 0.0).all())
    only = torch.zeros(6, 50)
    only[2] = 1.0
    index, _ = SampledBackward(draws=3).draw(only)
    assert index.shape[0] <= 2


def test_systematic_draws_vary_less_than_independent_ones():
    """A particle of slope v comes out floor(n v) or ceil(n v) times."""
    weights = slopes([1, 1, 1, 1, 1, 3]).unsqueeze(1).expand(-1, 1000, 1)
    index, count = SampledBackward(draws=5).draw(weights)
    times = torch.zeros(6, 1000, 1).scatter_add(0, index, count * weights.gather(0, index) * 4 / 0.625)
    assert bool(((times[:5] == 0.0) | ((times[:5] - 1.0).abs() < 1e-9)).all())


def curve(theta, n):
    with pyro.plate("copies", n):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z.sin() + 0.5 * z, 1.0), obs=torch.tensor(1.1))


def curve_guide(loc, log_scale, n):
    with pyro.plate("copies", n):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def curve_gradients(elbo, n, noise=None):
    """Gradient of each copy by theta, loc and log_scale."""
    p = [torch.full((n,), v, requires_grad=True) for v in (0.7, 0.3, -0.2)]
    with Inject(noise={} if noise is None else {"z": noise}):
        loss = elbo.differentiable_loss(lambda: curve(p[0], n), lambda: curve_guide(p[1], p[2], n))
    return torch.stack(torch.autograd.grad(loss, p), -1), loss


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_given_the_particles_the_mean_is_the_inner_gradient(inner, draws):
    """The same five particles in 20,000 copies, each with draws of its own."""
    n = 20_000
    noise = torch.randn(5, 1).expand(5, n)
    (expected, loss) = curve_gradients(ImportanceWeightedELBO(5, gradient=inner), n, noise)
    elbo = ImportanceWeightedELBO(5, gradient=SampledBackward(draws, inner))
    sampled, sampled_loss = curve_gradients(elbo, n, noise)
    assert sampled_loss.item() == pytest.approx(loss.item())  # the value is of all particles
    assert sampled[:, 0].std() > 0.0
    assert_mean(sampled, expected[0])


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_enough_draws_are_the_inner_gradient(inner):
    noise = torch.randn(5, 3)
    expected, _ = curve_gradients(ImportanceWeightedELBO(5, gradient=inner), 3, noise)
    elbo = ImportanceWeightedELBO(5, gradient=SampledBackward(5, inner))
    torch.testing.assert_close(curve_gradients(elbo, 3, noise)[0], expected)


@pytest.mark.parametrize("vectorize", [True, False])
def test_more_particles_than_one_pass_holds(vectorize):
    """40 particles in passes of 16: the same mean as all at once."""
    n, options = (20_000, {}) if vectorize else (300, {})
    elbos = [
        ImportanceWeightedELBO(40, gradient=g, vectorize_particles=vectorize, **options)
        for g in (DoublyReparameterized(), SampledBackward(3))
    ]
    full, sampled = (curve_gradients(elbo, n)[0] for elbo in elbos)
    assert_same_mean(sampled, full)


class Hidden(nn.Module):
    """A decoder that counts how many particles it sees with a graph, and without."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), nn.Dropout(dropout)
        self.with_graph, self.without = [], []

    def forward(self, z):
        (self.with_graph if torch.is_grad_enabled() else self.without).append(z.shape[:-1].numel())
        return self.layer(self.drop(z))


def hidden_pair(decoder, sizes=3):
    loc = nn.Parameter(torch.zeros(sizes, 2))

    def model():
        pyro.module("decoder", decoder)
        with pyro.plate("data", sizes):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=torch.ones(sizes, 2))

    def guide():
        with pyro.plate("data", sizes):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide, loc


def test_only_drawn_particles_have_a_graph():
    """K = 100: all run without one, at most 4 with one, at most 16 at a time."""
    decoder = Hidden()
    model, guide, loc = hidden_pair(decoder)
    elbo = ImportanceWeightedELBO(100, gradient=SampledBackward(draws=4))
    elbo.loss(model, guide)  # inspects
    decoder.with_graph.clear(), decoder.without.clear()
    elbo.loss_and_grads(model, guide)
    assert sum(decoder.without) == 100 * 3 and max(decoder.without) <= 16 * 3
    assert sum(decoder.with_graph) <= 4 * 3
    assert loc.grad is not None and bool((loc.grad != 0.0).any())
    assert bool((decoder.layer.weight.grad != 0.0).any())


class Counting(nn.Module):
    """An encoder that counts its calls, with dropout."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.calls = nn.Linear(2, 2), nn.Dropout(0.5), 0

    def forward(self, x):
        self.calls += 1
        return self.drop(self.layer(x))


def test_the_guide_runs_once_for_all_particles():
    """One pass through a heavy encoder, one dropout mask; and the value is that of every other gradient."""
    encoder, decoder, data = Counting(), Hidden(), torch.randn(3, 2)

    def model():
        hidden_pair(decoder)[0]()

    def guide():
        pyro.module("encoder", encoder)
        loc = encoder(data)
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    losses = []
    for gradient in (Pathwise(), SampledBackward(4)):
        elbo = ImportanceWeightedELBO(100, gradient=gradient)
        elbo.loss(model, guide)
        encoder.calls = 0
        pyro.set_rng_seed(5)
        losses.append(elbo.loss_and_grads(model, guide))
        assert encoder.calls == 1
    assert losses[0] == pytest.approx(losses[1])


def saved_bytes(elbo, model, guide):
    """What the graph of one loss keeps for its backward pass, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        elbo.differentiable_loss(model, guide)
    return sum(kept.values())


def test_memory_is_about_that_of_the_drawn_particles():
    decoder = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 40))

    def model():
        pyro.module("decoder", decoder)
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=torch.ones(3, 40))

    guide = hidden_pair(Hidden())[1]
    sizes = {}
    for name, elbo in {
        "sampled": ImportanceWeightedELBO(500, gradient=SampledBackward(8)),
        "full": ImportanceWeightedELBO(500, gradient=DoublyReparameterized()),
        "of eight": ImportanceWeightedELBO(8, gradient=DoublyReparameterized()),
    }.items():
        elbo.loss(model, guide)
        sizes[name] = saved_bytes(elbo, model, guide)
    assert sizes["sampled"] < 0.15 * sizes["full"]
    assert sizes["full"] > 20 * sizes["of eight"]


def test_constants_keep_their_gradient():
    """A term outside every plate, which no latent reaches, depends on a parameter of the model."""
    level = torch.tensor(0.3, requires_grad=True)

    def model():
        pyro.sample("y", dist.Normal(level, 1.0), obs=torch.tensor(2.0))
        curve(torch.tensor(0.0), 4)

    def guide():
        curve_guide(torch.zeros((), requires_grad=True), torch.zeros(()), 4)

    (slope,) = torch.autograd.grad(
        -ImportanceWeightedELBO(20, gradient=SampledBackward(3)).differentiable_loss(model, guide), level
    )
    assert slope.item() == pytest.approx(1.7)


@pytest.mark.parametrize("score", [None])
def test_discrete_sites_beside_and_enumerated_ones(score):
    """The score-function part goes through all K; enumerated sites are summed out again at the drawn particles."""
    n = 30_000

    def gradients(gradient):
        logit, loc = (torch.full((n,), v, requires_grad=True) for v in (0.4, 0.2))

        def model():
            with pyro.plate("copies", n):
                b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))
                z = pyro.sample("z", dist.Normal(b, 1.0))
                c = pyro.sample("c", dist.Bernoulli(logits=z), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + c, 1.0), obs=torch.tensor(1.2))

        def guide():
            with pyro.plate("copies", n):
                b = pyro.sample("b", dist.Bernoulli(logits=logit))
                pyro.sample("z", dist.Normal(loc + b, 0.9))

        elbo = ImportanceWeightedELBO(12, gradient=gradient, score=score)
        return torch.stack(torch.autograd.grad(elbo.differentiable_loss(model, guide), [logit, loc]), -1)

    assert_same_mean(gradients(SampledBackward(3)), gradients(DoublyReparameterized()))


@pytest.mark.parametrize("objective", [Renyi(0.5), CIWAE(0.3), MIWAE(4)], ids=repr)
def test_other_objectives(objective):
    """Drawn by the objective's own slopes."""
    n = 20_000
    elbos = [
        ImportanceWeightedELBO(12, gradient=g, objective=objective)
        for g in (DoublyReparameterized(), SampledBackward(4))
    ]
    full, sampled = (curve_gradients(elbo, n)[0] for elbo in elbos)
    assert_same_mean(sampled, full)


@pytest.mark.parametrize("objective", [PIWAE(2), TVO((0.0, 0.3))], ids=repr)
def test_objectives_without_one_slope_to_draw_by(objective):
    elbo = ImportanceWeightedELBO(20, gradient=SampledBackward(4), objective=objective)
    with pytest.raises(ValueError, match="SampledBackward draws particles by the objective's slopes"):
        curve_gradients(elbo, 3)


def test_a_model_with_randomness_of_its_own_raises():
    decoder = Hidden(dropout=0.5)
    model, guide, _ = hidden_pair(decoder)
    elbo = ImportanceWeightedELBO(20, gradient=SampledBackward(4))
    with pytest.raises(ValueError, match=r"run again at the same latents.*dropout"):
        elbo.loss_and_grads(model, guide)
    decoder.eval()
    assert math.isfinite(elbo.loss_and_grads(model, guide))


def test_a_guide_that_runs_the_model_with_it_raises():
    def model():
        curve(torch.tensor(0.0), 3)

    guide = AutoNormalMessenger(model)
    with pytest.raises(NotImplementedError, match="AutoNormalMessenger, which runs both together"):
        ImportanceWeightedELBO(20, gradient=SampledBackward(4)).loss_and_grads(model, guide)


def test_impossible_particles():
    """Weight 0 is never drawn, an element without any possible particle has no gradient."""
    loc = torch.zeros(3, requires_grad=True)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.full((3,), 0.5), 1.0))
            pyro.factor("wall", torch.where(z > torch.tensor([0.0, 100.0, -100.0]), 0.0, -math.inf))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 1.0))

    elbo = ImportanceWeightedELBO(30, gradient=SampledBackward(4))
    with pytest.warns(UserWarning, match="impossible"):
        elbo.loss(model, guide)
        elbo.loss_and_grads(model, guide)
    assert bool(loc.grad.isfinite().all()) and loc.grad[1] == 0.0 and loc.grad[0] != 0.0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"draws": 0}, ValueError, "draws >= 1"),
        ({"draws": 2.0}, TypeError, "draws to be a whole number"),
        ({"draws": True}, TypeError, "draws to be a whole number"),
        ({"inner": "dreg"}, TypeError, "inner to be"),
        ({"inner": SampledBackward()}, TypeError, "inner to be"),
    ],
)
def test_arguments(arguments, error, message, unchecked):
    with pytest.raises(error, match=message):
        SampledBackward(**arguments)
