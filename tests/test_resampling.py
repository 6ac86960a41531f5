# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Indices drawn by weight: their law, and what a weight of zero does."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from pyro_iwae.resampling import multinomial
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
