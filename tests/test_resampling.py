# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Indices drawn by weight: their law, and what a weight of zero does."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from pyro_iwae.resampling import count_distinct, multinomial, several, systematic, without_replacement
from tests.statistics import assert_mean

LOG_WEIGHTS = torch.tensor([-1.0, 2.0, 0.5, -math.inf, 1.9])


def test_draws_by_weight():
    index = multinomial(LOG_WEIGHTS.unsqueeze(1).expand(-1, 50_000))
    assert_mean(one_hot(index, 5), LOG_WEIGHTS.softmax(0))


def test_columns_are_drawn_apart():
    """Each column has its own law, and the joint law of two columns is the product of theirs."""
    log_weights = torch.randn(3, 2)
    index = multinomial(log_weights.unsqueeze(1).expand(-1, 50_000, -1))
    left, right = one_hot(index, 3).unbind(1)
    law = log_weights.softmax(0)
    assert_mean(left, law[:, 0])
    assert_mean(right, law[:, 1])
    assert_mean(left.unsqueeze(2) * right.unsqueeze(1), torch.outer(law[:, 0], law[:, 1]))


def test_never_takes_a_particle_of_weight_zero():
    index = multinomial(LOG_WEIGHTS.unsqueeze(1).expand(-1, 100_000))
    assert (index != 3).all()


def test_takes_some_particle_where_none_is_possible():
    index = multinomial(torch.full((4, 100), -math.inf))
    assert ((index >= 0) & (index < 4)).all()


def test_one_particle_is_always_taken():
    assert (multinomial(torch.randn(1, 100)) == 0).all()


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_only_ratios_of_weights_matter(shift):
    """The weights themselves are 0 or infinite here."""
    log_weights = torch.randn(6, 1000, dtype=torch.float64)
    state = torch.random.get_rng_state()
    index = multinomial(log_weights)
    torch.random.set_rng_state(state)
    assert (multinomial(log_weights + shift) == index).all()


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 4)])
def test_one_index_for_each_column(shape):
    index = multinomial(torch.randn(shape, requires_grad=True))
    assert index.shape == shape[1:]
    assert index.dtype == torch.int64


# Several draws from the same particles


@pytest.mark.parametrize("draw", [several, systematic])
def test_each_of_several_draws_is_by_weight(draw):
    log_weights = torch.stack([LOG_WEIGHTS, LOG_WEIGHTS.flip(0)], 1).unsqueeze(2).expand(-1, -1, 20_000)
    index = draw(log_weights, 3)
    assert index.shape == (3, 2, 20_000)
    law = LOG_WEIGHTS.softmax(0)
    for i in range(3):
        assert_mean(one_hot(index[i, 0], 5), law)
        assert_mean(one_hot(index[i, 1], 5), law.flip(0))
    assert not bool((index[:, 0] == 3).any())


def test_several_draws_are_independent():
    index = several(LOG_WEIGHTS.unsqueeze(1).expand(-1, 50_000), 2)
    law = LOG_WEIGHTS.softmax(0)
    assert_mean(one_hot(index[0], 5).unsqueeze(2) * one_hot(index[1], 5).unsqueeze(1), torch.outer(law, law))


def test_systematic_draws_are_as_many_as_expected():
    log_weights = torch.randn(50, 1000)
    counts = one_hot(systematic(log_weights, 20), 50).sum(0).T
    assert bool(((counts - 20 * log_weights.softmax(0)).abs() < 1.0).all())


def test_systematic_draws_of_two_elements_are_independent_of_each_other():
    """In the order of the cumulated weights the same draws would meet again and again."""
    log_weights = torch.tensor([3.0, 2.0, 0.0]).reshape(3, 1, 1).expand(-1, 2, 20_000)
    index = systematic(log_weights, 8)
    law = torch.tensor([3.0, 2.0, 0.0]).softmax(0)
    for i in (0, 5):
        pair = one_hot(index[i, 0], 3).unsqueeze(2) * one_hot(index[i, 1], 3).unsqueeze(1)
        assert_mean(pair, torch.outer(law, law))


def test_draws_without_replacement():
    index = without_replacement(LOG_WEIGHTS.unsqueeze(1).expand(-1, 50_000), 2)
    law = LOG_WEIGHTS.softmax(0)
    assert_mean(one_hot(index[0], 5), law)
    second = sum(law[i] * law * (torch.arange(5) != i) / (1.0 - law[i]) for i in range(5))
    assert_mean(one_hot(index[1], 5), second)
    assert bool((index[0] != index[1]).all())
    with pytest.raises(ValueError, match="at most 4 draws without replacement"):
        without_replacement(LOG_WEIGHTS, 5)


def test_several_of_the_impossible_are_some():
    for draw in (several, systematic):
        index = draw(torch.full((4, 100), -math.inf), 3)
        assert ((index >= 0) & (index < 4)).all()


def test_distinct_draws_are_counted():
    index = torch.tensor([[0, 1], [3, 1], [0, 1], [2, 1]])
    assert count_distinct(index).tolist() == [3, 1]
