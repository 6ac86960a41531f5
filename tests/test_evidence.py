# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Evidence from weights alone, against sums over all subsets and known values."""

import itertools
import math

import pytest
import torch

from pyro_iwae.evidence import bounds, correction, draw_level, jackknife, level_probability
from pyro_iwae.exact import Gamma
from tests.statistics import assert_mean


def by_subsets(log_weights, order):
    count, total = len(log_weights), 0.0
    for j in range(order + 1):
        coefficient = (-1) ** j * (count - j) ** order / (math.factorial(order - j) * math.factorial(j))
        kept = itertools.combinations(range(count), count - j)
        means = [log_weights[list(s)].logsumexp(0) - math.log(count - j) for s in kept]
        total = total + coefficient * torch.stack(means).mean(0)
    return total


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("count", [3, 4, 8, 9, 10, 25, 60])
@pytest.mark.parametrize("order", [1, 2])
def test_jackknife_is_the_sum_over_subsets(order, count, scale):
    log_weights = torch.randn(count, 5, dtype=torch.float64) * scale - 50.0
    expected = by_subsets(log_weights, order)
    assert torch.allclose(jackknife(log_weights, order), expected, rtol=1e-10, atol=1e-10)


def test_jackknife_where_one_particle_carries_all():
    log_weights = torch.tensor([0.0, -900.0, -901.0, -902.0], dtype=torch.float64)
    assert torch.allclose(jackknife(log_weights, 1), by_subsets(log_weights, 1))
    assert torch.allclose(jackknife(log_weights, 2), by_subsets(log_weights, 2))
    some = torch.tensor([0.0, -1.0, -2.0] + [-math.inf] * 9, dtype=torch.float64)  # impossible ones count
    for order in (1, 2):
        assert torch.allclose(jackknife(some, order), by_subsets(some, order))
    assert jackknife(torch.tensor([0.0, -math.inf, -math.inf]), 1).isinf()


def test_jackknife_does_not_cancel_in_float32():
    log_weights = torch.randn(20_000)
    for order in (1, 2):
        found = jackknife(log_weights, order)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), jackknife(log_weights.double(), order), atol=1e-6)


@pytest.mark.parametrize("count", [5, 10])
def test_jackknife_of_gamma_has_its_known_mean(count):
    log_weights = torch.distributions.Gamma(torch.tensor(1.0).double(), 1.0).sample((count, 100_000)).log()
    known = {5: 0.00411, 10: 0.000923}[count]
    found = jackknife(log_weights, 1)
    bound = [Gamma(shape=torch.tensor(1.0).double()).bound(k) for k in (count, count - 1)]
    assert abs(float(count * bound[0] - (count - 1) * bound[1]) - known) < 1e-5  # of which this is an estimate
    assert_mean(found, count * bound[0] - (count - 1) * bound[1])


def test_jackknife_needs_particles():
    with pytest.raises(ValueError, match="more than 2 particles"):
        jackknife(torch.zeros(2), 2)
    with pytest.raises(ValueError, match="order 1 or 2"):
        jackknife(torch.zeros(9), 3)


def test_bounds_are_means_over_blocks():
    log_weights = torch.randn(23, 2, 3, dtype=torch.float64)
    found = bounds(log_weights, [1, 2, 3, 5, 6, 10, 23])
    for k, value in found.items():
        blocks = [log_weights[i : i + k].logsumexp(0) - math.log(k) for i in range(0, 23 - k + 1, k)]
        assert torch.allclose(value, torch.stack(blocks).mean(0))
    impossible = bounds(torch.full((4, 1), -math.inf), [1, 2, 4])
    assert all(bool((v == -math.inf).all()) for v in impossible.values())


def test_multilevel_is_unbiased():
    """The bound with two particles, corrected, has mean 0 on Gamma, though L_2 is -0.27."""
    found = []
    for _ in range(20_000):
        level = draw_level()
        gamma = torch.distributions.Gamma(torch.tensor(1.0).double(), 1.0)
        base, both = gamma.sample((2,)).log(), gamma.sample((2, 2 * 2**level)).log().logsumexp(1)
        bound = base.logsumexp(0) - math.log(2)
        found.append(bound + correction(*both) / level_probability(level))
    assert_mean(torch.stack(found), 0.0)


def test_levels_have_their_probabilities():
    drawn = torch.tensor([draw_level() for _ in range(20_000)])
    for level in range(4):
        assert_mean((drawn == level).double(), level_probability(level))


def test_correction_of_the_impossible():
    nothing, something = torch.tensor(-math.inf), torch.tensor(0.0)
    assert float(correction(nothing, nothing)) == 0.0
    assert float(correction(something, nothing)) == math.inf
    assert math.isclose(float(correction(something, something)), 0.0, abs_tol=1e-7)


@pytest.mark.parametrize("possible", [3, 5, 8, 11])
def test_jackknife_where_few_particles_are_possible(possible):
    """A far smaller second weight among impossible ones: by brute force over subsets."""
    log_weights = torch.full((12,), -math.inf, dtype=torch.float64)
    log_weights[:possible] = -45.0 * torch.arange(possible)
    assert float(jackknife(log_weights, 2)) == pytest.approx(float(by_subsets(log_weights, 2)), rel=1e-9)
    both = torch.stack([log_weights, torch.full((12,), -math.inf, dtype=torch.float64)], 1)
    for order in (1, 2):
        assert float(jackknife(both, order)[1]) == -math.inf
