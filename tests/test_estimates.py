# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Figures from replicates, their errors and intervals."""

import math

import pytest
import torch
from scipy import stats

from pyro_iwae.density import replicate_bracket
from pyro_iwae.estimates import Estimate, student_quantile
from pyro_iwae.exact import Gamma
from tests.statistics import assert_mean, nightly


def test_students_quantiles_are_those_of_scipy():
    for freedom in range(1, 200):
        for p in (0.001, 0.4, 0.6, 0.975, 0.9995):
            assert math.isclose(student_quantile(p, freedom), stats.t.ppf(p, freedom), rel_tol=1e-9)
    assert math.isnan(student_quantile(0.975, 0))


def test_mean_and_interval():
    replicates = torch.randn(7, 2, 3, dtype=torch.float64)
    found = Estimate.mean(replicates)
    error = replicates.std(0) / math.sqrt(7)
    assert torch.allclose(found.value, replicates.mean(0))
    assert torch.allclose(found.std_error, error)
    low, high = found.interval(0.9)
    width = stats.t.ppf(0.95, 6) * error
    assert torch.allclose(high - found.value, width)
    assert torch.allclose(found.value - low, width)
    total = found.summed()
    assert torch.allclose(total.std_error, replicates.sum((1, 2)).std() / math.sqrt(7))


def test_elements_with_fewer_replicates():
    full, short = torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    padded = torch.stack([full, torch.cat([short, torch.full((2,), math.nan).double()])], 1)
    for make in (Estimate.mean, Estimate.log_mean):
        together = make(padded)
        for i, alone in enumerate((full, short)):
            expected = make(alone)
            assert torch.allclose(together.value[i], expected.value)
            assert torch.allclose(together.std_error[i], expected.std_error)
            assert all(
                torch.allclose(a[i], b) for a, b in zip(together.interval(0.8), expected.interval(0.8), strict=True)
            )


def test_log_mean_is_the_jackknife_by_hand():
    replicates = torch.randn(5, dtype=torch.float64)

    def log_mean(values):
        return values.logsumexp(0) - math.log(len(values))

    without = torch.stack([log_mean(replicates[[j for j in range(5) if j != i]]) for i in range(5)])
    found = Estimate.log_mean(replicates)
    assert torch.allclose(found.value, 5 * log_mean(replicates) - 4 * without.mean())
    assert torch.allclose(found.std_error, ((without - without.mean()) ** 2).sum().mul(4 / 5).sqrt())


def test_what_one_replicate_or_none_says():
    one = Estimate.mean(torch.tensor([[1.0]]))
    assert float(one.value) == 1.0
    assert one.std_error.isnan().all()
    impossible = Estimate.log_mean(torch.full((4,), -math.inf))
    assert float(impossible.value) == -math.inf
    assert impossible.std_error.isnan()
    assert float(Estimate.mean(torch.full((4,), -math.inf)).value) == -math.inf


def test_joined_and_added():
    parts = [Estimate.mean(torch.randn(n, m, dtype=torch.float64)) for n, m in ((5, 2), (3, 4))]
    joined = Estimate.joined(parts, 0)
    assert torch.allclose(joined.value, torch.cat([p.value for p in parts]))
    assert torch.allclose(joined.std_error, torch.cat([p.std_error for p in parts]))
    added = Estimate.added([p.summed() for p in parts])
    error = sum(p.summed().std_error ** 2 for p in parts).sqrt()
    assert torch.allclose(added.value, joined.value.sum())
    assert torch.allclose(added.std_error, error)
    assert int(added.count) == 3


def by_hand(drawn, own, others, count):
    rows, lower, upper = range(len(drawn)), [], []
    for r in rows:
        fresh = [1 / (math.exp(drawn[r]) + math.exp(others[m])) for m in rows if m != r]
        upper.append(-math.log(count / len(fresh) * sum(fresh)))
        lower.append(-math.log(count / len(rows) * (sum(fresh) + 1 / math.exp(own[r]))))
    return sum(lower) / len(rows), sum(upper) / len(rows)


def test_the_bracket_by_hand():
    batches = torch.randn(6, 4, dtype=torch.float64)
    drawn, own, others = batches[:, 1], batches.logsumexp(1), batches[:, 1:].logsumexp(1)
    whole, without = replicate_bracket(drawn, own, others, num_particles=4)
    expected = by_hand(drawn.tolist(), own.tolist(), others.tolist(), 4)
    assert torch.allclose(whole, torch.tensor(expected, dtype=torch.float64))
    for i in range(6):
        kept = [j for j in range(6) if j != i]
        rows = [v[kept].tolist() for v in (drawn, own, others)]
        assert torch.allclose(without[:, i], torch.tensor(by_hand(*rows, 4), dtype=torch.float64))
    missing = torch.full((2,), math.nan, dtype=torch.float64)
    padded = [torch.cat([v, missing]) for v in (drawn, own, others)]
    again, shorter = replicate_bracket(*padded, num_particles=4)
    assert torch.allclose(again, whole)
    assert torch.allclose(shorter[:, :6], without)
    assert bool(shorter[:, 6:].isnan().all())


@pytest.mark.parametrize(("batches", "lower", "upper"), [(1, -0.069, 0.037), (4, -0.048, -0.014), (16, -0.037, -0.028)])
def test_the_bracket_on_gamma_has_its_known_values(batches, lower, upper):
    """B_{5, M} and the upper bound, around ELBO[q_EW] = -0.0326."""
    gamma, found = Gamma(shape=1.0), []
    assert math.isclose(float(gamma.bound(5)), -0.10332, abs_tol=1e-5)
    for _ in range(nightly(4000 // batches)):
        weights = torch.distributions.Gamma(torch.tensor(1.0).double(), 1.0).sample((batches + 1, 5, 16)).log()
        index = (weights - torch.empty_like(weights).exponential_().log()).argmax(1, keepdim=True)
        drawn = weights.gather(1, index).squeeze(1)
        bracket, _ = replicate_bracket(drawn, weights.logsumexp(1), weights[:, 1:].logsumexp(1), num_particles=5)
        found.append(bracket.mean(-1))
    found = torch.stack(found)
    known = torch.tensor([lower, upper], dtype=torch.float64)  # to three digits
    assert_mean(found, found.mean(0).clamp(known - 6e-4, known + 6e-4))


def test_numbers_as_text():
    one, none = torch.tensor(1), torch.zeros(1)
    number = Estimate(torch.tensor(-1.23456), torch.tensor([0.5]), torch.tensor(2))
    assert number.text() == "-1.235 ± 0.500" and number.text(8) == "  -1.235 ± 0.500"
    assert Estimate(torch.tensor(-math.inf), none, one).text(6) == "  -inf"
    for value in (math.nan, math.inf):
        assert Estimate(torch.tensor(value), none, one).text() == "not defined"
