# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Log weights from -1e30 to 1e30, K to 1e6, half precision: against numbers of 60 digits."""

import decimal
import itertools
import math
from decimal import Decimal

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_iwae import (
    CIWAE,
    MIWAE,
    OVIS,
    PIWAE,
    TVO,
    VIMCO,
    DoublyReparameterized,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    LogWeights,
    Pathwise,
    Renyi,
    SampledBackward,
    StickTheLanding,
    evaluate,
)
from pyro_iwae.diagnostics import ess, pareto_khat, psis
from pyro_iwae.evidence import bounds, correction, jackknife
from pyro_iwae.parts import Drawn, Part, figures
from pyro_iwae.totals import LogMean

DIGITS = decimal.Context(prec=60, Emin=-(10**17), Emax=10**17, traps=[])
COLUMNS = {
    "ordinary": [0.3, -1.2, 2.0, 0.1, -0.5, 1.7],
    "huge": [1e30, 1e30, -1e30, 3.0, -2.0, 0.0],
    "huge and alike": [1e30] * 6,
    "tiny and alike": [-1e30] * 6,
    "far below": [-1e30, -1e30 / 2, -1e30 / 4, -2e29, -3e29, -4e29],
    "one has nearly all": [0.0, -40.0, -41.0, -43.0, -60.0, -80.0],
    "one has all but 1e-43": [5.0, -95.0, -96.0, -95.5, -97.0, -99.0],
    "two share nearly all": [0.0, 0.0, -50.0, -60.0, -70.0, -90.0],
    "hardly any difference": [1.0, 1.0 + 2**-20, 1.0 - 2**-21, 1.0, 1.0 + 2**-22, 1.0 + 2**-19],
    "large offset": [-12345.0, -12346.5, -12344.25, -12350.0, -12345.5, -12347.0],
    "some impossible": [0.5, -math.inf, 2.0, -math.inf, -1.0, 0.25],
    "one possible": [-math.inf, -math.inf, 2.0, -math.inf, -math.inf, -math.inf],
    "below the smallest number": [-800.0, -2000.0, -1200.0, -900.0, -5000.0, -810.0],
}
K = 6
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def digits():
    with decimal.localcontext(DIGITS):
        yield


@pytest.fixture
def precision(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield dtype
    torch.set_default_dtype(before)


def exact(column):
    return [Decimal(float(x)) for x in column]


def log_sum(column):
    top = max(column)
    return top + sum((x - top).exp() for x in column if x.is_finite()).ln() if top.is_finite() else top


def log_mean(column):
    return log_sum(column) - Decimal(len(column)).ln()


def shares(column, power=Decimal(1)):
    possible = [x * power for x in column]
    return [(x - log_sum(possible)).exp() if x.is_finite() else Decimal(0) for x in possible]


def without(column, *gone):
    return [x for i, x in enumerate(column) if i not in gone]


def assert_near(found, wanted, dtype, *, size=None):
    """To rounding of the larger of the result and what it is made of."""
    found, eps = torch.as_tensor(found), torch.finfo(dtype).eps
    for a, b in zip(found.flatten().tolist(), [float(w) for w in wanted], strict=True):
        if math.isinf(b):
            assert a == b
        else:
            assert abs(a - b) <= 16 * eps * max(abs(b), 0.0 if size is None else size, 1.0 if size is None else 0.0)


# Values and derivatives of the objectives


def pieces(column, groups):
    each = len(column) // groups
    return [column[i * each : (i + 1) * each] for i in range(groups)]


def tilted(column, beta):
    share = shares(column, beta)
    return sum((v * x for v, x in zip(share, column, strict=True) if v != 0), start=Decimal(0))


def tvo_slope(column, betas):
    column = [x - max(column) for x in column]  # or 60 digits were too few
    widths = [b - a for a, b in zip(betas, [*betas[1:], Decimal(1)], strict=True)]
    slopes = [Decimal(0)] * len(column)
    for beta, width in zip(betas, widths, strict=True):
        share, mean = shares(column, beta), tilted(column, beta)
        for k, (v, x) in enumerate(zip(share, column, strict=True)):
            slopes[k] += width * v * (1 + beta * (x - mean)) if v != 0 else 0
    return slopes


def tvo(column, betas):
    widths = [b - a for a, b in zip(betas, [*betas[1:], Decimal(1)], strict=True)]
    return sum(width * tilted(column, beta) for beta, width in zip(betas, widths, strict=True))


HALF, QUARTER = Decimal("0.5"), Decimal("0.25")
BETAS = [Decimal(0), QUARTER, HALF]
VALUES = {
    "bound": (None, log_mean, shares),
    "groups": (
        MIWAE(2),
        lambda x: sum(map(log_mean, pieces(x, 2))) / 2,
        lambda x: [v / 2 for piece in pieces(x, 2) for v in shares(piece)],
    ),
    "combined": (
        CIWAE(0.25),
        lambda x: QUARTER * sum(x) / len(x) + (1 - QUARTER) * log_mean(x),
        lambda x: [QUARTER / len(x) + (1 - QUARTER) * v for v in shares(x)],
    ),
    "Renyi": (Renyi(0.5), lambda x: log_mean([HALF * y for y in x]) / HALF, lambda x: shares(x, HALF)),
    "partial": (PIWAE(2), log_mean, shares),
    "thermodynamic": (TVO((0.0, 0.25, 0.5)), lambda x: tvo(x, BETAS), lambda x: tvo_slope(x, BETAS)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("column", COLUMNS)
def test_objectives(column, name, dtype):
    objective, value, slope = VALUES[name]
    log_weights = torch.tensor(COLUMNS[column], dtype=dtype)
    numbers = exact(log_weights)
    if name in ("combined", "thermodynamic", "groups") and not all(x.is_finite() for x in numbers):
        return  # means of log weights: test_objectives.test_impossible_particles
    totals = LogMean.of(log_weights) if objective is None else objective.totals(log_weights)
    size = max(abs(float(x)) for x in numbers if x.is_finite())
    assert_near(totals.value, [value(numbers)], dtype, size=size)
    found = totals.slope(log_weights)
    # A share's error is that of its logarithm; the slopes of a mean of log weights grow with these.
    eps = torch.finfo(dtype).eps
    for a, b in zip(found.tolist(), map(float, slope(numbers)), strict=True):
        assert math.isfinite(a)
        assert abs(a - b) <= 16 * eps * (1.0 + min(size, 1e5)) * abs(b) + 1e-37 or size > 1e6
        assert size <= 1e6 or abs(a - b) < 1e-6 * (1.0 + abs(b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("column", COLUMNS)
def test_totals_of_parts(column, size, dtype):
    """Of chunks, one after the other; of processes, together."""
    log_weights = torch.tensor(COLUMNS[column], dtype=dtype)
    parts = [LogMean.of(part) for part in log_weights.split(size)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    # what each process gives to be gathered is asked for by its first part alone
    stacked = torch.stack([torch.stack([part.largest, part.rest]) for part in parts])
    gathered = parts[0].gathered(lambda _: stacked, K)
    share = shares(exact(log_weights))
    expected = torch.tensor([float(v) for v in share], dtype=dtype)
    for whole in (merged, gathered):
        assert whole.count == K
        tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-13, "atol": 1e-37}
        torch.testing.assert_close(whole.slope(log_weights), expected, **tolerance)
        found = torch.stack([whole.share(part) for part in parts])
        torch.testing.assert_close(found, torch.stack([e.sum() for e in expected.split(size)]), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", COLUMNS)
def test_bound_as_users_ask_for_it_and_its_gradient(column, dtype):
    log_weights = torch.tensor(COLUMNS[column], dtype=dtype, requires_grad=True)
    bound = LogWeights(log_weights).bound()
    numbers = exact(log_weights.detach())
    size = max(abs(float(x)) for x in numbers if x.is_finite())
    assert_near(bound.detach(), [log_mean(numbers)], dtype, size=size)
    (gradient,) = torch.autograd.grad(bound, log_weights)
    expected = torch.tensor([float(v) for v in shares(numbers)], dtype=dtype)
    torch.testing.assert_close(gradient, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-37)


# 1 - v near 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", COLUMNS)
def test_what_a_particle_adds_to_the_others(column, dtype):
    """VIMCO's and OVIS's advantage: log of the mean with it, less that of the others alone."""
    log_weights = torch.tensor(COLUMNS[column], dtype=dtype)
    numbers, totals = exact(log_weights), LogMean.of(torch.tensor(COLUMNS[column], dtype=dtype))
    size = max(abs(float(x)) for x in numbers if x.is_finite())
    for balance in (0.0, 1.0):
        found = totals.advantage(log_weights, balance=balance)
        wanted = []
        for k in range(K):
            control = log_mean(without(numbers, k)) + Decimal(balance) * (Decimal(K - 1) / Decimal(K)).ln()
            wanted.append(log_mean(numbers) - (control if control.is_finite() else 0))
            found_control = totals.control(log_weights, balance=balance)[k]
            assert_near(found_control, [control], dtype, size=size)
        assert_near(found, wanted, dtype, size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", COLUMNS)
def test_doubly_reparameterised_share(column, dtype):
    """v - s (v - v^2), where v is near 1 or far below any number."""
    log_weights = torch.tensor(COLUMNS[column], dtype=dtype)
    share = shares(exact(log_weights))
    for scale in (1.0, 0.5):
        found = LogMean.of(log_weights).double_slope(log_weights, scale)
        wanted = torch.tensor([float(v - Decimal(scale) * (v - v * v)) for v in share], dtype=dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype == torch.float32 else 1e-9, atol=1e-30)


def by_subsets(column, order):
    count, total = Decimal(len(column)), Decimal(0)
    for j in range(order + 1):
        part = [log_mean(without(column, *gone)) for gone in itertools.combinations(range(len(column)), j)]
        weight = (-1) ** j * (count - j) ** order / (math.factorial(order - j) * math.factorial(j))
        total += weight * sum(part) / len(part)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("column", COLUMNS)
def test_jackknife(column, order, dtype):
    """Coefficients to 18 that cancel; relative to what remains, where weights hardly differ, too."""
    log_weights = torch.tensor(COLUMNS[column], dtype=dtype)
    numbers = exact(log_weights)
    found, wanted = jackknife(log_weights, order), by_subsets(numbers, order)
    if column == "one possible":  # what is left without it is impossible
        assert not math.isfinite(float(found))
        return
    size = max(abs(float(x)) for x in numbers if x.is_finite())
    assert_near(found, [wanted], dtype, size=max(size, 1.0))
    bias, exact_bias = float(found.double() - LogMean.of(log_weights.double()).value), wanted - log_mean(numbers)
    if dtype == torch.float64 and size < 1e6:
        assert bias == pytest.approx(float(exact_bias), rel=1e-6, abs=1e-12 * max(size, 1.0))


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-4, 1.0, 30.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e30])
def test_correction_of_the_multilevel_estimate(spread, offset):
    first = torch.tensor([0.0, 1.0, -1.0, 0.3], dtype=torch.float64) * spread + offset
    second = torch.tensor([0.4, -1.0, 0.7, 0.0], dtype=torch.float64) * spread + offset
    found = correction(first.logsumexp(0), second.logsumexp(0))
    a, b = log_sum(exact(first)), log_sum(exact(second))
    top = max(a, b)
    wanted = top + ((a - top).exp() + (b - top).exp()).ln() - Decimal(2).ln() - (a + b) / 2
    assert float(found) == pytest.approx(float(wanted), rel=1e-9, abs=1e-15 * (1.0 + 16 * max(spread, abs(offset))))
    assert float(found) >= -1e-12 * (1.0 + abs(offset))  # a log mean of two is not below their mean


# Many particles


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-6, 1.0, 12.0])
def test_a_million_particles(spread, dtype):
    generator = torch.Generator().manual_seed(1)
    log_weights = (torch.randn(1_000_000, generator=generator, dtype=torch.float64) * spread - 700.0).to(dtype)
    top = float(log_weights.max())
    weights = [math.exp(x - top) for x in log_weights.tolist()]
    total = math.fsum(weights)
    expected = top + math.log(total) - math.log(len(weights))
    eps = torch.finfo(dtype).eps
    assert float(LogWeights(log_weights).bound()) == pytest.approx(expected, abs=700 * 4 * eps)
    assert float(LogMean.of(log_weights).value) == pytest.approx(expected, abs=700 * 4 * eps)
    parts = [LogMean.of(part) for part in log_weights.split(999)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    # A thousand merges, each with the rounding of a number of the size of 700.
    assert float(merged.value) == pytest.approx(expected, abs=700 * 40 * eps)
    size = total**2 / math.fsum(w * w for w in weights)
    assert float(ess(log_weights)) == pytest.approx(size, rel=2e3 * eps + 1e-6)
    assert float(LogWeights(log_weights).weights.double().sum()) == pytest.approx(1.0, abs=1e3 * eps)
    wanted = expected + 0.5 * (1.0 / size - 1.0 / len(weights))  # to first order in 1 / K
    if spread <= 1.0:
        assert float(jackknife(log_weights, 1)) == pytest.approx(wanted, abs=700 * 4 * eps + 1e-8)
    assert set(bounds(log_weights, [1, 1000, 1_000_000])) == {1, 1000, 1_000_000}
    assert all(math.isfinite(float(v)) for v in bounds(log_weights, [1, 1000, 1_000_000]).values())
    assert not math.isnan(float(pareto_khat(log_weights)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", COLUMNS)
def test_reports_are_finite(column, dtype):
    """ESS between 1 and K, smoothed weights that keep their sum; khat is inf where it cannot be told."""
    log_weights = torch.tensor(COLUMNS[column] * 10, dtype=dtype)
    assert 1.0 - 1e-5 <= float(ess(log_weights)) <= 60.0 * (1.0 + 1e-5)
    assert not math.isnan(float(pareto_khat(log_weights)))
    smoothed = psis(log_weights)
    smoothed = smoothed[0] if isinstance(smoothed, tuple) else smoothed
    assert not bool(smoothed.isnan().any())


@pytest.mark.parametrize("column", COLUMNS)
def test_ess_of_an_evaluation(column):
    """From what is kept of each replicate, in any offset."""
    halves = torch.tensor(COLUMNS[column], dtype=torch.float64).reshape(2, 3)
    drawn = [Part.of("", None, i, Drawn(half, ()), figures(half, [1, 3])) for i, half in enumerate(halves)]
    (share,) = (shares(exact(halves.flatten())),)
    assert float((drawn[0] + drawn[1]).ess()) == pytest.approx(float(1 / sum(v * v for v in share)), rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e15, -1e20, 1e30])
def test_ess_of_an_evaluation_with_an_offset(offset):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", offset + 0.0 * z)

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    result = evaluate(model, guide, num_particles=64, num_replicates=4, progress=False)
    assert float(result.ess) == pytest.approx(256.0)


# Training


def extreme(size, score):
    """One latent of which the model thinks a slope of ``size``; the gradient is known to be finite."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", pyro.param("a", torch.tensor(1.0)) * size * torch.tanh(z))

    def guide():
        normal = dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0)
        pyro.sample("z", normal.has_rsample_(not score))

    return model, guide


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options, objective",
    [
        (options, objective)
        for options in (
            {"gradient": Pathwise()},
            {"gradient": StickTheLanding()},
            {"gradient": DoublyReparameterized()},
            {"score": VIMCO()},
            {"score": OVIS()},
        )
        for objective in (None, MIWAE(2), CIWAE(0.3), PIWAE(2), Renyi(0.5), TVO((0.0, 0.5)))
        if objective is None or not isinstance(options.get("score"), OVIS)  # which is for the bound itself
    ],
    ids=repr,
)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e3, 1e8, 1e15])
def test_no_gradient_is_nan(size, options, objective, precision):
    """It is at most the size of the log weights and their slopes."""
    pyro.set_rng_seed(2)
    model, guide = extreme(size, "score" in options)
    elbo = ImportanceWeightedELBO(num_particles=4, objective=objective, **options)
    for _ in range(5):
        loss = elbo.loss_and_grads(model, guide)
        assert abs(loss) <= 10.0 + 2.0 * size
        for _, parameter in pyro.get_param_store().named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
            parameter.grad = None


# Half precision


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8))
        self.encoder = nn.Linear(8, 4)

    def model(self, x):
        pyro.module("decoder", self.layers)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.layers(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.1 * loc, (0.1 * log_scale).exp()).to_event(1))


@pytest.mark.filterwarnings("ignore:the compiled step and the recording")  # which round differently: it is said
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(half, compiled):
    """Layers in half precision, weights in single: values to half's rounding of what the layers give."""
    decoder, x = Decoder(), torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    elbo = ImportanceWeightedELBO(num_particles=200, compile=compiled)

    def asked():
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(decoder.model, decoder.guide, x)
        gradients = [p.grad.clone() for p in decoder.parameters()]
        decoder.zero_grad()
        return loss, torch.cat([g.flatten() for g in gradients]), elbo.log_weights(decoder.model, decoder.guide, x)

    asked()
    loss, gradient, weights = asked()
    with torch.autocast("cpu", dtype=half):
        asked()
        half_loss, half_gradient, half_weights = asked()
    assert weights.log_weights.dtype == half_weights.log_weights.dtype == torch.float32
    eps = torch.finfo(half).eps
    assert half_loss != loss and half_loss == pytest.approx(loss, rel=16 * eps)
    assert bool(half_gradient.isfinite().all())
    assert float((half_gradient - gradient).norm() / gradient.norm()) < max(32 * eps, 0.125)


@pytest.mark.parametrize("gradient", [Pathwise(), DoublyReparameterized(), SampledBackward(draws=2)], ids=repr)
@pytest.mark.parametrize("chunk_size", [None, 20])
def test_autocast_trains_every_layer(gradient, chunk_size):
    """Also those that ran without a graph inside of the same block, as in an inspection or a chunk.

    An older PyTorch would take the casts that autocast keeps of such a run: none are kept.
    """
    decoder, x, kept = Decoder(), torch.randn(5, 8, generator=torch.Generator().manual_seed(3)), []

    def looked_at(program):
        def run(x):
            kept.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
            return program(x)

        return run

    pair = looked_at(decoder.model), looked_at(decoder.guide)
    elbo = ImportanceWeightedELBO(num_particles=60, gradient=gradient, chunk_size=chunk_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        elbo.loss(*pair, x)
        evaluate(*pair, x, num_particles=10, num_replicates=2, progress=False)
        ImportanceResampledGuide(*pair, 5).sample(2, x)
        elbo.loss_and_grads(*pair, x)
        assert torch.is_autocast_cache_enabled()
    assert set(kept) == {(False, False), (True, True)}
    for parameter in decoder.parameters():
        assert parameter.grad is not None and float(parameter.grad.norm()) > 1e-3


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_averaged_in_single(half):
    """Where all of a model computes in half precision: K numbers of 3 digits lose no more in their mean."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=half), torch.ones((), dtype=half)))
        pyro.sample("x", dist.Normal(z, torch.ones((), dtype=half)), obs=torch.ones((), dtype=half))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=half), torch.ones((), dtype=half)))

    elbo = ImportanceWeightedELBO(num_particles=100_000)  # more than half precision can count
    pyro.set_rng_seed(0)
    exact_value = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0)))
    assert float(elbo.bound(model, guide)) == pytest.approx(exact_value, abs=0.02)
    assert -elbo.loss_and_grads(model, guide) == pytest.approx(exact_value, abs=0.02)
    alike = LogWeights(torch.ones(100_000, dtype=half))
    assert float(alike.bound()) == pytest.approx(1.0) and float(alike.totals().value) == pytest.approx(1.0)
    assert float(alike.weights.sum()) == pytest.approx(1.0, rel=1e-4)


def test_evaluation_and_draws_under_autocast():
    decoder, x = Decoder(), torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_particles": 50, "num_replicates": 2, "progress": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = evaluate(decoder.model, decoder.guide, x, **options)
        draws = ImportanceResampledGuide(decoder.model, decoder.guide, 20).sample(10, x)
    assert bool(result.log_evidence.isfinite().all())
    assert draws["z"].shape == (10, 5, 2) and bool(draws["z"].isfinite().all())
