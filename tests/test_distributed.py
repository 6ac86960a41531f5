# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Particles shared out over processes: values, gradients and draws are those of one process with the same particles."""

import math
import os
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal, init_to_sample
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from pyro_iwae import (
    OVIS,
    VIMCO,
    DoublyReparameterized,
    Evaluation,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    LogWeights,
    Monitor,
    Pathwise,
    SampledBackward,
    StickTheLanding,
    evaluate,
    gradient_snr,
)
from pyro_iwae.distributed import Ranks
from pyro_iwae.objectives import CIWAE, MIWAE, PIWAE, TVO, Objective, Renyi
from pyro_iwae.totals import LogMean
from tests import test_chunks
from tests.noise import SameParticles
from tests.ranks import ODD, PAIR
from tests.statistics import assert_frequencies, assert_mean, limit
from tests.test_chunks import PAIRS, assert_same, named_parameters

K = 13  # 4, 3, 3 and 3 particles
MODELS = PAIRS | {name: (test_chunks.tree_model, guide) for name, guide in test_chunks.TREES.items()}
GRADIENTS = [Pathwise(), StickTheLanding(), DoublyReparameterized()]
OBJECTIVES = [Renyi(0.5), Renyi(1.0), MIWAE(4), PIWAE(3), CIWAE(0.3), TVO((0.0, 0.4))]


class Indices(Messenger):
    """Keeps the minibatches that are drawn, or gives those that were."""

    def __init__(self, known=None):
        super().__init__()
        self.known, self.found = known, {}

    def _pyro_sample(self, msg):
        if self.known is not None and site_is_subsample(msg) and not msg["done"]:
            msg["value"], msg["done"] = self.known[msg["name"]], True

    def _pyro_post_sample(self, msg):
        if site_is_subsample(msg):
            self.found[msg["name"]] = msg["value"]


def program_of(name):
    test_chunks.NETS.clear()
    pyro.clear_param_store()
    pyro.set_rng_seed(7)  # the same networks in all processes
    return MODELS[name]


def outcome(elbo, model, guide, num_particles, first=0, indices=None, method="loss_and_grads", looks=2):
    """Loss, gradients and minibatches, on particles that go by their numbers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "particles are run one after the other")
        warnings.filterwarnings("ignore", "all .* particles are impossible")
        (elbo.loss if looks else elbo.loss_and_grads)(model, guide)
        for p in named_parameters().values():
            p.grad = None
        with Indices(indices) as seen, SameParticles(num_particles, first, looks):
            loss = getattr(elbo, method)(model, guide)
            if method == "differentiable_loss":
                (2.0 * loss).backward()
    gradients = {n: p.grad for n, p in named_parameters().items()}
    if method == "differentiable_loss":
        gradients = {n: None if g is None else g / 2.0 for n, g in gradients.items()}
    return (torch.as_tensor(loss).item(), gradients), seen.found


def compare(group, pair, num_particles, every, methods=("loss_and_grads",), looks=2):
    """Each set of options: in all processes of the group, and in one."""
    ranks = Ranks(group)
    start, stop = ranks.share(num_particles)
    sizes = []
    for options in every:
        for method in methods:
            model, guide = program_of(pair)
            pyro.set_rng_seed(10 + ranks.rank)
            shared = ImportanceWeightedELBO(num_particles, process_group=group, **options)
            found, indices = outcome(shared, model, guide, stop - start, start, method=method, looks=looks)
            found = found[0], {n: None if g is None else g.clone() for n, g in found[1].items()}
            options = {n: v for n, v in options.items() if n != "chunk_size"}
            alone = ImportanceWeightedELBO(num_particles, **options)
            expected, _ = outcome(alone, model, guide, num_particles, indices=indices, looks=looks)
            assert_same(found, expected)
            sizes.append(stop - start)
    return sizes


@pytest.mark.parametrize("pair", PAIRS)
def test_every_model_and_gradient(processes, pair):
    """Loss and gradient of four processes with 4, 3, 3 and 3 particles are those of one with 13."""
    ways = [{"gradient": g} for g in GRADIENTS] + [{"chunk_size": 1}]
    sizes = processes.run(compare, pair, K, ways)
    assert [s[0] for s in sizes] == [4, 3, 3, 3]


@pytest.mark.parametrize("pair", ["network", "coins", "one weight for all", "enumerated", "sequential", "hierarchical"])
def test_one_particle_beside_two(processes, pair):
    """Traces without a dimension of particles in three processes, with one in the first; and one in each."""
    options = {"plate_particles": {"data": 3}} if pair == "hierarchical" else {"score": VIMCO()}
    ways = [{"gradient": g, **options} for g in GRADIENTS]
    assert [s[0] for s in processes.run(compare, pair, 5, ways, ("loss_and_grads",), None)] == [2, 1, 1, 1]
    processes.run(compare, pair, 4, ways[:1], ("loss_and_grads",), None)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_objective(processes, objective):
    """Groups of MIWAE and PIWAE lie across processes, which have 5, 4 and 3 of 12 particles, or 6 and 6."""
    ways = [{"objective": objective, "gradient": g} for g in GRADIENTS]
    processes.run(compare, "chain", 12, ways, ranks=PAIR)
    scores = [{"objective": objective, "score": s} for s in (OVIS(), VIMCO())]
    processes.run(compare, "coins", 12, [*scores, {**scores[0], "chunk_size": 1}], ranks=ODD)


def test_differentiable_loss_and_a_subgroup(processes):
    """The loss can be scaled, and hands out the sum; the process that is no part of the group takes no part."""
    methods = ("differentiable_loss", "loss_and_grads")
    sizes = processes.run(compare, "network", 11, [{"gradient": DoublyReparameterized()}], methods, ranks=ODD)
    assert [s[0] for s in sizes] == [4, 4, 3]


@pytest.mark.parametrize("guide", test_chunks.TREES)
def test_plate_tree(processes, guide):
    ways = [
        {"plate_particles": {"data": 3}},
        {"plate_particles": {"data": 3, "inner": 4}, "gradient": DoublyReparameterized(), "score": VIMCO()},
        {"plate_particles": {"data": 3}, "chunk_size": 3},
    ]
    processes.run(compare, guide, 6, ways, ranks=PAIR)


# A small model whose evidence is known


X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model(x):
    m = pyro.param("m", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    a = pyro.param("a", torch.tensor(0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x, pyro.param("s", torch.tensor(0.9), constraint=dist.constraints.positive)))


def evidence(x):
    return dist.Normal(0.3, math.sqrt(2.0)).log_prob(x)


def trained(group, steps, options, seed):
    if seed is not None:
        pyro.set_rng_seed(seed)
    elbo = ImportanceWeightedELBO(10, process_group=group, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(X) for _ in range(steps)]
    return losses, {n: p.detach() for n, p in pyro.get_param_store().items()}, torch.rand(())


@pytest.mark.parametrize("seed", [None, 0])
def test_processes_stay_alike_and_repeat(processes, seed):
    """Bit for bit, whether they were seeded alike or not; and particles differ."""
    first = processes.run(trained, 20, {}, seed)
    for losses, parameters, _ in first[1:]:
        assert losses == first[0][0] and parameters == first[0][1]
    assert len(set(first[0][0])) == 20
    assert (len({float(after) for _, _, after in first}) == 1) == (seed == 0)  # what each has for itself
    again = processes.run(trained, 20, {}, seed)
    assert again[0] == first[0]
    chunked = processes.run(trained, 20, {"chunk_size": 2}, seed)
    assert chunked[0][0] != first[0][0] and chunked[2][:2] == chunked[0][:2]


def sampled(group, draws, count, particles):
    """Gradients of the same particles, of which some are drawn for back-propagation; and that of all."""
    ranks = Ranks(group)
    start, stop = ranks.share(particles)
    gradients = []
    for gradient in [SampledBackward(draws)] * count + [DoublyReparameterized()]:
        pyro.set_rng_seed(1000 + len(gradients))
        elbo = ImportanceWeightedELBO(particles, process_group=group, gradient=gradient)
        (_, found), _ = outcome(elbo, lambda: model(X), lambda: guide(X), stop - start, start)
        gradients.append(torch.stack([found[n] for n in ("a", "m", "s")]))
    return torch.stack(gradients)


def test_sampled_backward(processes):
    """Each process draws among its own: exact where it draws all, right on average where not."""
    gradients = processes.run(sampled, 6, 2, 12, ranks=PAIR)[0]
    torch.testing.assert_close(gradients[:2], gradients[-1:].expand(2, -1))
    gradients, others = processes.run(sampled, 2, 100, 20, ranks=PAIR)
    assert torch.equal(gradients, others)
    assert_mean(gradients[:-1], gradients[-1])
    assert (gradients[:-1].std(0) > 0.0).all()


def values_of(group):
    shared = ImportanceWeightedELBO(7, process_group=group, chunk_size=2)
    found = shared.bound(model, guide, X), shared.log_weights(model, guide, X), shared.loss(model, guide, X)
    tree = ImportanceWeightedELBO(7, process_group=group, plate_particles={"data": 3})
    return *found, tree.log_weights(lambda: test_chunks.tree_model(), test_chunks.mean_field_guide)


def test_values(processes):
    """Bound, weights and loss of all K, in all processes, without a graph."""
    found = processes.run(values_of)
    for bound, weights, loss, tree in found:
        assert torch.equal(bound, found[0][0]) and loss == found[0][2]
        assert isinstance(weights, LogWeights) and weights.log_weights.shape == (7, 3)
        assert torch.equal(weights.log_weights, found[0][1].log_weights)
        assert len(weights.log_weights.unique()) == 21  # no particle twice
        assert not bound.requires_grad and not weights.log_weights.requires_grad
        assert tree.children[0].log_weights.shape[:2] == (3, 7)
    torch.testing.assert_close(weights.bound(), weights.log_weights.logsumexp(0) - math.log(7))


# Draws

COINS = torch.tensor([0.3, 0.8])  # q
CLEAR = torch.tensor([[0.2, 0.7], [0.9, 0.1]])  # p(x | z = 0), p(x | z = 1)


def coin_model():
    with pyro.plate("coins", 2):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("x", torch.where(z == 1.0, CLEAR[1], CLEAR[0]).log())


def coin_guide():
    with pyro.plate("coins", 2):
        pyro.sample("z", dist.Bernoulli(COINS))


def probability_of_heads(num_particles):
    """Of a draw of q_EW, by enumeration of how many of the K particles are heads."""
    tails, heads = 0.5 * CLEAR[0] / (1 - COINS), 0.5 * CLEAR[1] / COINS
    total = torch.zeros(2)
    for n in range(num_particles + 1):
        chance = math.comb(num_particles, n) * COINS**n * (1 - COINS) ** (num_particles - n)
        total += chance * n * heads / (n * heads + (num_particles - n) * tails)
    return total


def draws_of_coins(group, num_particles, chunk_size, count):
    posterior = ImportanceResampledGuide(
        coin_model, coin_guide, num_particles, chunk_size=chunk_size, process_group=group
    )
    drawn = posterior.sample(count)["z"]
    inside = Predictive(coin_model, guide=posterior, num_samples=50, parallel=True)()["z"]
    alone = torch.stack([posterior()["z"] for _ in range(3)])
    return drawn, inside, alone


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_law_of_draws(processes, chunk_size):
    """Each is heads as often as q_EW of all K says, not as q_EW of one process's particles; all get the same."""
    found = processes.run(draws_of_coins, 5, chunk_size, 4000)
    for drawn in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn, found[0], strict=True))
    drawn, inside, alone = found[0]
    expected = probability_of_heads(5)
    for element in range(2):
        heads = int(drawn[:, element].sum())
        chances = torch.tensor([1 - expected[element], expected[element]])
        assert_frequencies(torch.tensor([4000 - heads, heads]), chances)
        few = probability_of_heads(2)[element]  # what a process with two of them would draw
        assert abs(heads / 4000 - few) > limit(4000) * math.sqrt(few * (1 - few) / 4000)
    assert inside.shape == (50, 1, 2) or inside.shape == (50, 2)
    assert alone.shape == (3, 2)


class Numbered(dist.Normal):
    """Noise that goes by the particle's number, where no handler outside reaches; runs of some number of particles."""

    first, count, passed = 0, 1, 0

    @classmethod
    def begin(cls, first, count):
        cls.first, cls.count, cls.passed = first, count, 0

    def rsample(self, sample_shape=()):
        if len(self.batch_shape) == 1:  # a look, alike in all processes
            return self.loc + self.scale * SameParticles.row("z", 0, self.batch_shape)
        rows = self.batch_shape[0]
        numbers = [self.first + (self.passed + i) % self.count for i in range(rows)]
        type(self).passed += rows
        noise = torch.stack([SameParticles.row("z", n, self.batch_shape[-1:]) for n in numbers])
        return self.loc + self.scale * noise.reshape(self.batch_shape)


def numbered_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", Numbered(0.4 * x, 0.9))


def densities(group, chunk_size):
    """What a draw weighs in Trace_ELBO, on particles that go by their numbers: the bound of all K."""
    found = []
    start, stop = Ranks(group).share(8)
    for first, last, some in ((start, stop, group), (0, 8, None)):
        Numbered.begin(first, last - first)
        posterior = ImportanceResampledGuide(model, numbered_guide, 8, chunk_size=chunk_size, process_group=some)
        found.append(Trace_ELBO().loss(model, posterior, X))
        Numbered.begin(first, last - first)
        found.append(posterior.expectation(lambda z: z["z"] ** 2, X, num_batches=1))
    return found


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_density_of_a_draw_and_expectations(processes, chunk_size):
    for shared, mean, alone, expected in processes.run(densities, chunk_size, ranks=PAIR):
        assert shared == pytest.approx(alone, rel=1e-9)
        torch.testing.assert_close(mean, expected)


def further_of_guide(group):
    posterior = ImportanceResampledGuide(coin_model, coin_guide, 5, process_group=group)
    values = {"z": torch.tensor([[0.0, 0.0], [1.0, 1.0]])}
    density = torch.stack([posterior.log_density(values, num_batches=4) for _ in range(100)])
    interval = posterior.elbo_interval(num_batches=4, num_replicates=100)
    tree = ImportanceResampledGuide(
        test_chunks.tree_model, test_chunks.mean_field_guide, 5, plate_particles={"data": 3}, process_group=group
    )
    drawn = tree.sample(7)
    return density, list(interval), interval.lower_error, drawn, list(tree.elbo_interval(num_batches=2))


def test_density_and_interval(processes):
    """The density is that of q_EW of all K; so is the bracket around its ELBO."""
    found = processes.run(further_of_guide, ranks=PAIR)
    density, (lower, upper), error, drawn, inside = found[0]
    assert torch.equal(density, found[1][0]) and torch.equal(lower, found[1][1][0])
    assert all(torch.equal(drawn[n], found[1][3][n]) for n in drawn)
    assert torch.equal(inside[0], found[1][4][0])
    heads = probability_of_heads(5)
    assert_mean(density.exp(), torch.stack([1 - heads, heads]))
    joint = 0.5 * CLEAR
    chances = torch.stack([1 - heads, heads])
    exact = (chances * (joint.log() - chances.log())).sum(0)
    assert (lower < exact + limit(100) * error).all() and (upper > exact - limit(100) * error).all()
    assert (upper - lower < 0.1 + limit(100) * error).all()


def refusals_of_guide(group):
    found = []
    posterior = ImportanceResampledGuide(model, guide, 7, process_group=group)
    for call in (
        lambda: posterior(X)["z"].sum().backward(),
        lambda: posterior.sample(3, X, method="systematic"),
        lambda: ImportanceResampledGuide(model, guide, 3, process_group=group),
        lambda: posterior.expectation(lambda z: z["z"], X),
        lambda: ImportanceResampledGuide(
            varying_model, varying_guide, 12, process_group=group, vectorize_particles=False
        ).sample(4),
    ):
        with pytest.raises((NotImplementedError, ValueError)) as error:
            call()
        found.append(str(error.value))
    return found


def varying_model():
    if bool(pyro.sample("c", dist.Bernoulli(0.5))):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def varying_guide():
    if bool(pyro.sample("c", dist.Bernoulli(0.5))):
        pyro.sample("z", dist.Normal(0.3, 1.0))


def test_refusals_of_the_guide(processes):
    for found in processes.run(refusals_of_guide):
        assert "ImportanceResampledGuide(process_group=...) has no gradient" in found[0]
        assert "method='systematic' holds all particles in one process" in found[1]
        assert "expected num_particles >= 4, one for each process" in found[2]
        assert "expected num_particles >= 8, two for each process" in found[3]
        assert "needs the same latents in all particles" in found[4]


# Evaluations


def evaluated(group, options, path=None):
    return evaluate(model, guide, X, process_group=group, save_to=path, progress=False, **options)


def same_particles_evaluated(group, options):
    found = []
    for first, count, some in ((*Ranks(group).share(12), group), (0, 12, None)):
        Numbered.begin(first, count - first)
        found.append(evaluate(model, numbered_guide, X, process_group=some, progress=False, **options))
    return found


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_evaluation_of_the_same_particles(processes, chunk_size):
    options = {"num_particles": 12, "num_replicates": 2, "ks": [1], "chunk_size": chunk_size}
    for shared, alone in processes.run(same_particles_evaluated, options, ranks=ODD):
        for name in ("log_evidence", "elbo", "ess", "khat"):
            torch.testing.assert_close(getattr(shared, name), getattr(alone, name))
        torch.testing.assert_close(shared.bounds[12], alone.bounds[12])


def test_evaluation_is_right_and_the_same_in_all(processes):
    """Against the exact evidence; every figure, bit for bit."""
    first, *others = processes.run(evaluated, {"num_particles": 30, "num_replicates": 150})
    for found, error in ((first.log_evidence, first.std_error), (first.unbiased, first.unbiased_error)):
        assert ((found - evidence(X)).abs() < limit(150, 3) * error).all()
    for other in others:
        assert first.seed == other.seed
        for name, value in first.parts[0].values.items():
            assert torch.equal(value, other.parts[0].values[name]), name
        assert torch.equal(first.parts[0].tail, other.parts[0].tail)
    replicates = first.parts[0].values["log mean"]
    assert len(replicates.unique()) == replicates.numel()


def resumed(group, path, plan):
    """Runs that go on from one file, from the same seed."""
    for replicates in plan:
        pyro.set_rng_seed(3)
        found = evaluated(group, {"num_particles": 9, "num_replicates": replicates, "target_ess": 40.0}, path)
    return found, os.path.exists(path)


def test_evaluation_goes_on_from_the_first_process_file(processes, tmp_path):
    broken = processes.run(resumed, str(tmp_path / "broken.npz"), (2, 6), ranks=PAIR)
    whole = processes.run(resumed, str(tmp_path / "whole.npz"), (6,), ranks=PAIR)
    for (one, _), (other, _) in zip(broken, whole, strict=True):
        assert torch.equal(one.log_evidence, other.log_evidence) and torch.equal(one.khat, other.khat)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.npz", "whole.npz"]
    assert (broken[0][0].ess >= 40.0).all()
    loaded = Evaluation.load(tmp_path / "whole.npz")
    assert torch.equal(loaded.log_evidence, whole[0][0].log_evidence)


ROWS = torch.linspace(-2.0, 2.0, 11, dtype=torch.float64)


def exact_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + 0.3) / 2.0, math.sqrt(0.5)))


def rows_evaluated(group, padded):
    dataset = TensorDataset(ROWS)
    ranks = Ranks(group)
    if padded:
        sampler = DistributedSampler(dataset, ranks.size, ranks.rank, shuffle=False)
        loader = DataLoader(dataset, batch_size=3, sampler=sampler)
    else:
        rows = torch.arange(11).chunk(ranks.size)[ranks.rank]
        loader = DataLoader(Subset(dataset, rows.tolist()), batch_size=3)
    own = evaluate(model, exact_guide, data=loader, num_particles=5, num_replicates=2, progress=False)
    return own.gathered(group)


def batches_evaluated(group):
    loader = DataLoader(TensorDataset(ROWS), batch_size=4)
    return evaluate(
        model, exact_guide, data=loader, num_particles=5, num_replicates=2, progress=False, process_group=group
    )


def test_rows_over_processes(processes):
    """Each row once, in order; and all rows with particles shared out. The guide is the posterior."""
    for found in (*processes.run(rows_evaluated, False, ranks=ODD), *processes.run(batches_evaluated, ranks=PAIR)):
        torch.testing.assert_close(found.log_evidence, evidence(ROWS))
        assert found.total.log_evidence == pytest.approx(float(evidence(ROWS).sum()))
    (kind, (name, message, _)), *_ = processes.outcomes(rows_evaluated, True, ranks=ODD)
    assert (kind, name) == ("error", "UserWarning") and "1 of 11 rows are in several processes" in message


def uneven_batches(group):
    rows = ROWS[: 8 + 2 * Ranks(group).rank]
    return evaluate(model, exact_guide, data=rows.split(4), num_particles=5, progress=False, process_group=group)


def other_rows(group):
    rows = ROWS if Ranks(group).rank == 0 else ROWS.flip(0)
    return evaluate(model, exact_guide, data=[rows], num_particles=5, progress=False, process_group=group)


def test_evaluation_of_other_rows_is_refused(processes):
    for _, message in processes.errors(uneven_batches, ranks=PAIR):
        assert "expected the same number of batches of data" in message and "got others on rank 1" in message
    for _, message in processes.errors(other_rows, ranks=PAIR):
        assert "expected the same data" in message


def measured(group):
    elbo = ImportanceWeightedELBO(6, process_group=group)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    monitor = Monitor(model, guide, elbo, every=2)
    for _ in range(4):
        svi.step(X)
        monitor(X)
    snr = gradient_snr(elbo, model, guide, X, num_replicates=20, progress=False)
    record = monitor.records[-1]
    return record.step, record.bound, record.ess, record.snr_guide, snr.guide, snr.model


def test_what_measures_training_shares_particles_too(processes):
    """A monitor and the gradient's signal-to-noise ratio: the same figures in all processes."""
    found = processes.run(measured, ranks=PAIR)
    assert found[0] == found[1] and found[0][0] == 4


def made_on_the_way(group):
    """Parameters that begin at random, in the first call; processes have other seeds."""

    def rows():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        bend = pyro.param("bend", lambda: torch.randn(2))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(slope * X + bend.sum(), 1.0), obs=X)

    draw = AutoLowRankMultivariateNormal(rows)
    svi = SVI(rows, draw, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(5, process_group=group))
    for _ in range(12):
        svi.step()
    return {n: p.detach() for n, p in pyro.get_param_store().items()}


def test_parameters_that_are_made_on_the_way_begin_alike(processes):
    first, *others = processes.run(made_on_the_way)
    assert len(first) == 4
    for other in others:
        assert all(torch.equal(p, other[n]) for n, p in first.items())


def rows_resumed(group, folder):
    """Each process has a file of its own for its rows; the second run goes on from these."""
    rank, rows = Ranks(group).rank, ROWS.chunk(Ranks(group).size)[Ranks(group).rank]
    for replicates in (2, 5):
        own = evaluate(
            model,
            guide,
            data=rows.split(2),
            num_particles=4,
            num_replicates=replicates,
            save_to=f"{folder}/{rank}.npz",
            progress=False,
        )
    return own.gathered(group)


def test_rows_over_processes_go_on_from_their_own_files(processes, tmp_path):
    first, second = processes.run(rows_resumed, str(tmp_path), ranks=PAIR)
    assert torch.equal(first.log_evidence, second.log_evidence) and first.log_evidence.shape == (11,)
    assert (first.replicates == 5).all()
    loaded = Evaluation.load(tmp_path / "0.npz") + Evaluation.load(tmp_path / "1.npz")
    assert torch.equal(loaded.log_evidence, first.log_evidence)
    assert len(set(first.parts[0].seeds + first.parts[-1].seeds)) == 10


def minibatch_drawn(group):
    """Rows that the model saw, and draws."""
    rows = set()

    def some():
        with pyro.plate("rows", 12, subsample_size=3) as index:
            rows.add(tuple(index.tolist()))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=10.0 * index.double())

    def draw():
        with pyro.plate("rows", 12, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(10.0 * index.double(), 0.3))

    posterior = ImportanceResampledGuide(some, draw, 8, process_group=group)
    posterior.sample(1)  # the looks see others
    rows.clear()
    drawn = posterior.sample(20)["z"]
    seen = set(rows)
    mean = posterior.expectation(lambda z: z["z"], num_batches=1)
    return seen, drawn, mean


def test_draws_of_a_minibatch(processes):
    """Processes have other seeds, and draw for the same rows."""
    (rows, drawn, mean), (others, again, same) = processes.run(minibatch_drawn, ranks=PAIR)
    assert rows == others and len(rows) == 1
    assert torch.equal(drawn, again) and torch.equal(mean, same)
    ((first, second, third),) = rows
    torch.testing.assert_close(drawn.mean(0), 10.0 * torch.tensor([first, second, third]).double(), atol=1.0, rtol=0.1)


def replaced(group, chunk_size):
    """The density of a value that a handler has set: its companions are all particles but the first."""
    found, values = [], {"z": torch.tensor([0.1, -0.3, 0.9])}
    start, stop = Ranks(group).share(8)
    for first, last, some in ((start, stop, group), (0, 8, None)):
        Numbered.begin(first, last - first)
        posterior = ImportanceResampledGuide(model, numbered_guide, 8, chunk_size=chunk_size, process_group=some)
        posterior(X)
        Numbered.begin(first, last - first)
        trace = poutine.trace(poutine.condition(posterior, values)).get_trace(X)
        found.append(trace.nodes["_importance_density_z"]["fn"].log_factor.detach())
    return found


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_density_of_a_value_from_outside(processes, chunk_size):
    for shared, alone in processes.run(replaced, chunk_size, ranks=PAIR):
        torch.testing.assert_close(shared, alone)


def sampled_first(group):
    """A guide that begins at a random place, first met by draws, and in a plate."""

    def rows():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(slope * X, 1.0), obs=X)

    found = []
    for inside in (False, True):
        pyro.clear_param_store()
        posterior = ImportanceResampledGuide(rows, AutoNormal(rows, init_loc_fn=init_to_sample), 8, process_group=group)
        if inside:
            found.append(Predictive(rows, guide=posterior, num_samples=5, parallel=True)()["slope"])
        else:
            found.append(posterior.sample(5)["slope"])
    return found


def test_a_guide_that_is_first_met_by_draws_begins_alike(processes):
    first, second = processes.run(sampled_first, ranks=PAIR)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


class Scaled(Objective):
    """An objective of a user's own, which prints as an address."""

    reference = "none"

    def __init__(self, power):
        self.power = power

    def totals(self, log_weights):
        return LogMean.of(log_weights, self.power)


def own_objective(group, apart):
    elbo = ImportanceWeightedELBO(6, process_group=group, objective=Scaled(0.5 + apart * Ranks(group).rank))
    return elbo.loss(model, guide, X)


def test_options_are_told_by_what_they_hold(processes):
    assert len(set(processes.run(own_objective, 0.0, ranks=PAIR))) == 1
    for _, message in processes.errors(own_objective, 0.1, ranks=PAIR):
        assert "expected the same options" in message


def normalised(group):
    """Batch statistics of each process's own particles."""
    pyro.set_rng_seed(1)
    norm = torch.nn.BatchNorm1d(1)

    def rows(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(norm(z.reshape(-1, 1)).reshape(z.shape), 1.0), obs=x)

    pyro.set_rng_seed(10 + Ranks(group).rank)
    elbo = ImportanceWeightedELBO(6, process_group=group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BatchNorm1d in training mode")
        warnings.filterwarnings("ignore", "particles are run one after the other")
        for _ in range(3):
            elbo.loss_and_grads(rows, guide, X)
    norm.eval()
    found = evaluate(rows, guide, X, num_particles=10, process_group=group, progress=False)
    return norm.running_mean, norm.num_batches_tracked, found.total.log_evidence


def test_buffers_are_the_first_process_s(processes):
    first, second = processes.run(normalised, ranks=PAIR)
    assert torch.equal(first[0], second[0]) and first[0].any() and torch.equal(first[1], second[1])
    assert first[2] == second[2]


def outside(group, retain):
    """What is computed outside of model and guide, for two steps."""
    scale = torch.tensor(0.5, requires_grad=True)
    slope = scale * 0.8

    def draw(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.9))

    elbo = ImportanceWeightedELBO(6, process_group=group, retain_graph=retain)
    for _ in range(2):
        elbo.loss_and_grads(model, draw, X)
    return scale.grad


def test_retain_graph(processes):
    first, second = processes.run(outside, True, ranks=PAIR)
    assert torch.equal(first, second) and first != 0.0
    for _, message in processes.errors(outside, None, ranks=PAIR):
        assert "pass retain_graph=True" in message


def half_possible(group):
    def halved():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("fence", torch.where(z > 0.0, 0.0, -math.inf))

    elbo = ImportanceWeightedELBO(64, process_group=group)
    return [elbo.loss(halved, lambda: pyro.sample("z", dist.Normal(0.0, 1.0))) for _ in range(12)]


def test_a_look_at_one_particle_warns_of_nothing(processes):
    """Of 64 some are possible, whatever the one is that all look at; warnings are errors here."""
    first, second = processes.run(half_possible, ranks=PAIR)
    assert first == second


def test_the_group_of_a_guide_can_be_taken_away():
    posterior = ImportanceResampledGuide(model, guide, 4)
    assert posterior.process_group is None
    posterior.process_group = None
    assert posterior(X)["z"].shape == (3,)
    with pytest.raises(ValueError, match="expected torch.distributed to be set up"):
        posterior.process_group = object()
