# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""LogWeights and Totals against brute force."""

import math
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_iwae.logweights import LogWeights
from pyro_iwae.totals import LogMean

INF = math.inf
COLUMNS = {
    "ordinary": [0.3, -1.2, 2.0, 0.1],
    "ties": [1.0, 1.0, 1.0, -2.0],
    "all equal": [-3.0, -3.0, -3.0],
    "two": [0.0, 1.0],
    "one dominates": [0.0, -40.0, -45.0, -41.0],
    "one dominates beyond float64": [0.0, -900.0, -950.0, -2000.0],
    "some impossible": [-INF, 0.5, -INF, 0.1],
    "one possible": [-INF, -7.0, -INF],
    "far from zero": [-1e5, -1e5 + 3.0, -1e5 - 2.0],
}


def brute_log_mean(column):
    """log-mean-exp of a list of floats in exact arithmetic on the exponents that matter."""
    top = max(column, default=-INF)
    if top == -INF:
        return -INF
    return top + math.log(math.fsum(math.exp(value - top) for value in column)) - math.log(len(column))


def column_of(name):
    return torch.tensor(COLUMNS[name], dtype=torch.float64)


@pytest.mark.parametrize("name", COLUMNS)
def test_bound_is_log_mean_exp(name):
    expected = brute_log_mean(COLUMNS[name])
    column = column_of(name)
    assert LogWeights(column).bound().item() == pytest.approx(expected, rel=1e-14, abs=1e-14)
    assert LogMean.of(column).value.item() == pytest.approx(expected, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("name", COLUMNS)
def test_log_mean_of_others_is_brute_force(name):
    """Also for the particle that carries nearly all of the weight, where 1 - v is 0 in floating point."""
    values = COLUMNS[name]
    expected = [brute_log_mean(values[:k] + values[k + 1 :]) for k in range(len(values))]
    got = LogMean.of(column_of(name)).control(column_of(name)).tolist()
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", COLUMNS)
def test_weights_are_normalised(name):
    values = COLUMNS[name]
    top = brute_log_mean(values) + math.log(len(values))
    weights = LogWeights(column_of(name)).weights
    assert weights.tolist() == pytest.approx([math.exp(v - top) for v in values], rel=1e-10, abs=1e-300)
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_totals_of_blocks_are_those_of_the_whole(name, size):
    column = column_of(name)
    whole = LogMean.of(column)
    blocks = [LogMean.of(block) for block in column.split(size)]
    for merged in (reduce(LogMean.merge, blocks), reduce(LogMean.merge, reversed(blocks))):
        assert merged.count == whole.count == len(column)
        assert merged.largest == whole.largest
        torch.testing.assert_close(merged.rest, whole.rest, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(merged.control(column), whole.control(column), rtol=1e-12, atol=1e-12)


log_weight = st.floats(-800.0, 800.0) | st.just(-INF) | st.sampled_from([0.0, 1.0])
block = st.lists(st.lists(log_weight, min_size=2, max_size=2), min_size=1, max_size=4)


@given(block, block, block)
def test_merge_is_associative_and_commutative(a, b, c):
    whole = LogMean.of(torch.tensor(a + b + c, dtype=torch.float64))
    x, y, z = (LogMean.of(torch.tensor(part, dtype=torch.float64)) for part in (a, b, c))
    for merged in (x.merge(y).merge(z), x.merge(y.merge(z)), z.merge(x).merge(y)):
        assert merged.count == whole.count
        assert torch.equal(merged.largest, whole.largest)
        torch.testing.assert_close(merged.rest, whole.rest, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.value, whole.value, rtol=1e-12, atol=1e-12)


@given(block.filter(lambda rows: len(rows) > 1))
def test_log_mean_of_others_for_random_weights(rows):
    values = torch.tensor(rows, dtype=torch.float64)
    got = LogMean.of(values).control(values)
    for k in range(len(rows)):
        for e in range(2):
            expected = brute_log_mean([row[e] for i, row in enumerate(rows) if i != k])
            assert got[k, e].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_totals_hold_no_graph():
    column = torch.randn(4, 3, requires_grad=True)
    totals = LogMean.of(column)
    for value in (totals.largest, totals.rest, totals.value, totals.control(column)):
        assert not value.requires_grad
    assert not LogWeights(column).weights.requires_grad


def test_gradient_of_the_bound_is_the_weights():
    column = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weights = LogWeights(column)
    (gradient,) = torch.autograd.grad(weights.bound().sum(), column)
    torch.testing.assert_close(gradient, weights.weights)


def test_all_impossible_is_minus_infinity_with_zero_gradient():
    """One element is impossible, its neighbour is not touched by it."""
    column = torch.tensor([[-INF, 0.0], [-INF, 1.0], [-INF, -INF]], requires_grad=True)
    weights = LogWeights(column)
    bound = weights.bound()
    assert bound[0] == -INF
    assert bound[1].item() == pytest.approx(brute_log_mean([0.0, 1.0, -INF]))
    (gradient,) = torch.autograd.grad(bound.sum(), column)
    assert gradient[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert gradient[:, 1].sum().item() == pytest.approx(1.0)
    assert weights.weights[:, 0].tolist() == [0.0, 0.0, 0.0]


def test_total_scales_elements_and_adds_constants_once():
    column = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    constant = {(): torch.tensor(7.0), ("data",): torch.tensor([0.5, 0.25])}
    per_element = torch.tensor([1.0, 10.0])
    assert LogWeights(column, ("data",), 3.0, constant).total(per_element) == 3.0 * 11.0 + 7.75
    by_element = torch.tensor([1.0, 2.0])
    assert LogWeights(column, ("data",), by_element, constant).total(per_element) == 1.0 + 20.0 + 7.75
    assert LogWeights(column, ("data",)).total(per_element) == 11.0


def test_shapes_and_names():
    weights = LogWeights(torch.zeros(6, 2, 3), plates=("a", "b"))
    assert weights.num_particles == 6
    assert weights.bound().shape == (2, 3)
    assert weights.weights.shape == (6, 2, 3)
    assert LogWeights(torch.zeros(4)).bound().shape == ()


def test_slopes_under_totals_over_more_particles():
    """Chunks: the shares of all chunks under the merged totals are the weights of the whole."""
    column = torch.randn(6, 2, dtype=torch.float64)
    totals = reduce(LogMean.merge, [LogMean.of(chunk) for chunk in column.split(2)])
    shares = torch.cat([totals.slope(chunk) for chunk in column.split(2)])
    torch.testing.assert_close(shares, LogWeights(column).weights)
