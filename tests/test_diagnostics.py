# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""ESS, distinct draws, Pareto's khat and smoothed weights."""

import math

import arviz
import numpy as np
import pytest
import torch

from pyro_iwae.diagnostics import (
    ess,
    expected_distinct,
    khat_needs,
    khat_threshold,
    pareto_khat,
    psis,
    tail_khat,
    tail_length,
)
from pyro_iwae.evidence import bounds
from pyro_iwae.resampling import multinomial
from tests.statistics import assert_mean


def test_ess_by_hand():
    weights = torch.tensor([[1.0, 0.0, 0.2], [1.0, 0.0, 0.3], [1.0, 5.0, 0.5]])
    assert torch.allclose(ess(weights.log()), torch.tensor([3.0, 1.0, 1.0 / (0.04 + 0.09 + 0.25)]))
    assert float(ess(torch.full((4,), -math.inf))) == 0.0
    assert torch.allclose(ess(weights.log() + 1e4), ess(weights.log()), rtol=1e-2)  # of weights up to a factor


def test_more_than_half_precision_can_count():
    """65,504 is the largest number of float16, 256 the last of bfloat16 after which not every one is there."""
    for dtype in (torch.float16, torch.bfloat16):
        alike = torch.zeros(100_000, dtype=dtype)
        assert float(ess(alike)) == 100_000.0
        assert math.isclose(float(expected_distinct(alike, 5)), 5.0, rel_tol=1e-3)
        assert float(bounds(alike, [100_000])[100_000]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_weight_gives_no_figure(wrong):
    """And not that of another set of weights, be it an impossible one."""
    columns = torch.stack([torch.zeros(200), torch.zeros(200), torch.full((200,), -math.inf)], 1)
    columns[5, 0] = wrong
    for found in (ess(columns), expected_distinct(columns, 3), pareto_khat(columns), psis(columns)[1]):
        assert found.isnan().tolist() == [True, False, False]


def test_distinct_draws_are_those_of_draws():
    log_weights = torch.randn(6, 2)
    drawn = torch.stack([torch.stack([multinomial(log_weights) for _ in range(4)]) for _ in range(2000)])
    found = torch.tensor([[len(set(d[:, i].tolist())) for i in range(2)] for d in drawn], dtype=torch.float64)
    assert_mean(found, expected_distinct(log_weights, 4))
    assert float(expected_distinct(torch.full((4,), -math.inf), 4)) == 0.0
    assert float(expected_distinct(torch.tensor([0.0, -math.inf]), 9)) == 1.0


@pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="ArviZ 1.x has it under another name")
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("count", [26, 100, 225, 226, 1000, 20_000])
def test_khat_and_smoothed_weights_are_those_of_arviz(count, scale):
    log_weights = torch.randn(count, 3, dtype=torch.float64) * scale - 1e3
    with np.errstate(over="ignore"):  # in weights of the fit that are then 0
        expected, khat = arviz.psislw(log_weights.T.numpy())
    smoothed, found = psis(log_weights)
    np.testing.assert_allclose(found.numpy(), khat, rtol=1e-9)
    np.testing.assert_allclose(smoothed.T.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(pareto_khat(log_weights), found)
    assert torch.allclose(smoothed.exp().sum(0), torch.ones(3, dtype=torch.float64))
    largest = log_weights.topk(tail_length(count) + 1, 0).values
    assert torch.equal(tail_khat(largest, [tail_length(count)] * 3), found)


def test_khat_of_a_pareto_law_is_its_shape():
    for shape in (0.3, 0.7, 1.2):
        found = pareto_khat(-shape * torch.rand(100_000, 20, dtype=torch.float64).log())
        assert abs(float(found.mean()) - shape) < 0.05  # the fit draws it towards 1/2


def test_where_there_is_no_tail():
    assert bool((pareto_khat(torch.zeros(1000, 2)) == -math.inf).all())  # as light as can be
    assert float(pareto_khat(torch.randn(20))) == math.inf  # four weights
    assert float(pareto_khat(torch.tensor([0.0] + [-math.inf] * 999))) == math.inf
    assert float(pareto_khat(torch.full((1000,), -math.inf))) == math.inf
    alone = torch.tensor([0.0] + [-math.inf] * 999)
    assert torch.equal(psis(alone)[0], alone)  # what cannot be fitted stays


def test_the_threshold():
    assert khat_threshold(1) == -math.inf
    assert khat_threshold(10) == 0.0
    assert math.isclose(khat_threshold(1000), 2 / 3)
    assert khat_threshold(10**9) == 0.7
    assert math.isclose(khat_needs(khat_threshold(500)), 500)
    assert khat_needs(1.0) == khat_needs(math.inf) == math.inf
    assert math.isnan(khat_needs(math.nan))
    assert [tail_length(n) for n in (26, 225, 226)] == [6, 45, 46]
