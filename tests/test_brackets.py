# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Both bounds on ELBO[q_EW] in two dimensions, against quadrature: the target of the paper's figures, K = 10.

A sum of eight normalised Gaussians, so that the evidence is 8, and q = N(0, e I), which is not fitted to it.
"""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_iwae import ImportanceResampledGuide, evaluate
from tests.statistics import assert_mean, assert_mean_above, assert_mean_below, limit

K, COPIES = 10, 300
MEANS = torch.tensor([(1, 3), (3, 0), (1, 1), (-3, -1), (-1, -3), (2, 2), (-2, -2), (0, 0)], dtype=torch.float64)
SCALES = torch.tensor([math.exp(0.005)] * 5 + [math.exp(0.5)] * 3, dtype=torch.float64)


def model():
    each = dist.Normal(MEANS, SCALES.unsqueeze(-1)).to_event(1)
    with pyro.plate("copies", COPIES):
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(8, dtype=torch.float64)), each))
        pyro.factor("eight", torch.tensor(math.log(8.0), dtype=torch.float64))


def guide():
    with pyro.plate("copies", COPIES):
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), math.exp(0.5)).to_event(1))


@functools.cache
def exact(step=0.1, width=0.05, count=2**16):
    """L_K, ELBO[q_EW] and the integral of q_EW: z on a grid, and sums of weights by convolution of their law."""
    line = torch.arange(-14.0, 14.0 + step / 2, step, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_p = (-(z.unsqueeze(1) - MEANS).square().sum(-1) / (2 * SCALES**2) - 2 * SCALES.log()).logsumexp(1)
    log_p -= math.log(2 * math.pi)
    log_q = -z.square().sum(1) / (2 * math.e) - math.log(2 * math.pi) - 1.0
    weight, mass = (log_p - log_q).exp(), log_q.exp() * step**2
    inside = weight < (count - 2) * width
    assert float(mass[~inside].sum()) < 1e-7
    place = weight[inside] / width
    low = place.floor()
    law = torch.zeros(count, dtype=torch.float64)
    law.index_add_(0, low.long(), mass[inside] * (1.0 - place + low))  # shared out so that the mean stays
    law.index_add_(0, low.long() + 1, mass[inside] * (place - low))
    frequencies = torch.fft.rfft(law, 2 * count)
    of_others, of_all = (torch.fft.irfft(frequencies**n, 2 * count)[:count] for n in (K - 1, K))
    sums = torch.arange(count, dtype=torch.float64) * width
    bound = (of_all[1:] * (sums[1:] / K).log()).sum()

    nodes = torch.logspace(-12, math.log10(float(weight.max())) + 0.1, 4000, dtype=torch.float64)
    inverse = torch.stack([(of_others / (v + sums)).sum() for v in nodes])  # E[1 / (w + S)] by w
    at = np.interp((log_p - log_q).numpy(), nodes.log().numpy(), inverse.log().numpy())
    log_density = log_p + math.log(K) + torch.as_tensor(at)
    share = log_density.exp() * step**2
    return float(bound), float((share * (log_p - log_density)).sum()), float(share.sum())


def test_the_quadrature_is_right():
    bound, resampled, integral = exact()
    assert abs(integral - 1.0) < 1e-5
    finer = exact(step=0.08, width=0.04, count=2**17)
    assert abs(bound - finer[0]) < 1e-5
    assert abs(resampled - finer[1]) < 1e-5
    assert bound + 0.05 < resampled < math.log(8.0) - 0.02  # further apart than what is told apart below


def assert_held(lower, upper, slack):
    """By bounds of as many independent copies: L_K < lower <= ELBO[q_EW] <= upper < log evidence."""
    bound, resampled, _ = exact()
    wide = limit(COPIES) / math.sqrt(COPIES)
    assert lower.shape == upper.shape == (COPIES,)
    assert_mean_above(lower, bound)
    assert float(lower.mean() - wide * lower.std()) < resampled < float(upper.mean() + wide * upper.std())
    assert_mean_below(upper, math.log(8.0) + slack)
    for side in (lower, upper):
        assert abs(float(side.mean()) - resampled) < wide * float(side.std()) + slack


def test_evaluate_holds_it_from_both_sides():
    found = evaluate(model, guide, num_particles=K, num_replicates=60, progress=False)
    assert_mean(found.bounds[K], exact()[0])
    assert_mean(found.log_evidence, math.log(8.0))
    assert_held(*found.elbo_resampled, slack=2e-3)  # with so many companions the bounds have all but met
    assert float((found.elbo_resampled[1] - found.elbo_resampled[0]).mean()) < 2e-3
    low, high = (found.total.estimate(f"elbo_resampled {side}") for side in ("lower", "upper"))
    for side in (low, high):
        assert abs(float(side.value) / COPIES - exact()[1]) < limit(60) * float(side.std_error) / COPIES + 2e-3


@pytest.mark.parametrize(("num_batches", "num_replicates"), [(1, 100), (60, 2)])
def test_the_guide_holds_it_from_both_sides(num_batches, num_replicates):
    posterior = ImportanceResampledGuide(model, guide, num_particles=K)
    found = posterior.elbo_interval(num_batches=num_batches, num_replicates=num_replicates)
    few = num_batches == 1
    assert_held(found.lower, found.upper, slack=0.05 if few else 2e-3)
    assert few == (float((found.upper - found.lower).mean()) > 0.01)  # one batch of companions holds it loosely
