# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Log evidence from the log weights of one batch of particles: bounds for a ladder of K, jackknife, multilevel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.options import as_counts, require_log_weights
from pyro_iwae.totals import LogMean

__all__ = ["LEVEL_RATE", "bounds", "correction", "draw_level", "jackknife", "jackknives", "level_probability"]

LEVEL_RATE = 2.0**-1.5  # between 1/2, where the cost, and 1/4, where the variance would be infinite
LARGEST = 8  # weights that the jackknife of order 2 treats one by one
TERMS = 18  # of a series in (1 / LARGEST)^n, to the rounding of float64
LARGE = 256
TERMS_OF_SMALL = 7  # likewise in (1 / LARGE)^n


def bounds(log_weights: Float[Tensor, "particles *plates"], ks: Sequence[int]) -> dict[int, Float[Tensor, "*plates"]]:
    """Log-mean-exp of k particles for each k of a ladder, averaged over the blocks of k that there are.

    Each is an unbiased estimate of L_k; all come from the same particles.

    Args:
        log_weights: in nats, shape ``(particles, *plates)``.
        ks: from 1 to the number of particles.

    Returns:
        By k, shape ``(*plates)``.

    Raises:
        TypeError: where these are no floating point numbers, or ks no whole numbers.
        ValueError: where there is no particle, or a k is below 1 or above their number.

    Example::

        >>> bounds(torch.tensor([0.0, 1.0]), [1, 2])
        {1: tensor(0.5000), 2: tensor(0.6201)}
    """
    log_weights, ks = require_log_weights(log_weights), as_counts("ks", ks)
    if max(ks, default=1) > len(log_weights):
        raise ValueError(f"expected ks up to {len(log_weights)}, the number of particles, got {max(ks)}")
    found: dict[int, Tensor] = {}
    sums = {1: log_weights}  # log-sum-exp of each block, by its size
    for k in sorted(ks):
        size = max(s for s in sums if k % s == 0)  # from the largest blocks that fit in, so that work halves
        blocks = sums[size]
        count = log_weights.shape[0] // k
        if k > size:
            blocks = blocks[: count * (k // size)].unflatten(0, (count, k // size)).logsumexp(1)
        sums[k] = blocks
        found[k] = (blocks - math.log(k)).mean(0)
    return found


def jackknife(log_weights: Float[Tensor, "particles *plates"], order: int) -> Float[Tensor, "*plates"]:
    """The bound freed of its leading bias, of which O(K^-(order + 1)) is left; no bound any more, it can overshoot.

    sum_{j=0..m} c_j Lbar_{K-j} with c_j = (-1)^j (K-j)^m / ((m-j)! j!) and Lbar_{K-j} the mean over *all* subsets of
    K - j particles. See "Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
    Variational Inference" (Nowozin 2018, https://openreview.net/forum?id=HyZoi-WRb).

    Args:
        log_weights: in nats, shape ``(particles, *plates)``, more than ``order`` of them.
        order: m, 1 or 2.

    Returns:
        Shape ``(*plates)``. Not finite where only ``order`` particles are possible at all.

    Raises:
        TypeError: where these are no floating point numbers.
        ValueError: where the order is another, or there are too few particles.

    Example::

        >>> jackknife(torch.tensor([0.0, 1.0, 2.0]), order=1)
        tensor(1.4776)
    """
    log_weights = require_log_weights(log_weights)
    count = log_weights.shape[0]
    if order not in (1, 2):
        raise ValueError(f"expected order 1 or 2, got {order}")
    if count <= order:
        raise ValueError(f"expected more than {order} particles for a jackknife of order {order}, got {count}")
    return jackknives(log_weights, [order])[order]


def jackknives(
    log_weights: Float[Tensor, "particles *plates"], orders: Sequence[int]
) -> dict[int, Float[Tensor, "*plates"]]:
    """:func:`jackknife` of several orders, with the shares of the weights worked out once."""
    count, found = log_weights.shape[0], {}
    exact = log_weights.detach().double()
    totals = LogMean.of(exact)
    share, others = totals.log_shares(exact)
    # How far the mean over subsets lies above the bound, to first order -log(K / (K - j)); so it cancels here, not
    # between terms of the size of the bound itself.
    without_one = others.mean(0)
    if 1 in orders:
        found[1] = totals.value - (count - 1) * (without_one + math.log(count / (count - 1)))
    if 2 in orders:
        without_two = 2.0 * without_one + _pairs(exact, totals, share.sub_(others))
        found[2] = (
            totals.value
            - (count - 1) ** 2 * (without_one + math.log(count / (count - 1)))
            + (count - 2) ** 2 / 2.0 * (without_two + math.log(count / (count - 2)))
        )
    impossible = totals.value == -math.inf  # then so is each subset
    return {m: torch.where(impossible, -math.inf, value).to(log_weights) for m, value in found.items()}


def _pairs(log_weights: Tensor, totals: LogMean, log_odds: Tensor) -> Tensor:
    """Mean over pairs of log(1 - v_i - v_j) - log(1 - v_i) - log(1 - v_j) = log(1 - u_i u_j), with u = v / (1 - v).

    In O(K): for all but the largest weights the logarithm's series goes by power sums of u, the fewer the smaller u.
    """
    count = log_weights.shape[0]
    top, large = min(LARGEST, count), min(LARGE, count)
    largest, place = log_weights.topk(large, 0)
    odds, small = log_odds.gather(0, place), log_odds.scatter_(0, place, -math.inf)
    rest = torch.cat([largest[top:], log_weights.scatter(0, place, -math.inf).logsumexp(0, keepdim=True)]).logsumexp(0)
    total = _among_largest(largest[:top], rest, totals)
    if count > top:
        alone, middle = odds[:top], odds[top:]
        scale = torch.cat([middle, small.amax(0, keepdim=True)]).amax(0)  # u <= 1 / LARGEST for these
        scale = torch.where(scale == -math.inf, 0.0, scale)
        sums = _power_sums((middle - scale).exp_(), TERMS)
        for n, further in enumerate(_power_sums(small.sub_(scale).exp_(), TERMS_OF_SMALL if count > large else 0)):
            sums[n] = sums[n] + further
        for n in range(1, TERMS + 1):
            met = (n * (alone + scale)).exp().sum(0)  # can be infinite where it meets nothing
            total = total - torch.where(sums[n - 1] == 0.0, 0.0, met * sums[n - 1]) / n
            if 2 * n <= TERMS:
                total = total - (2 * n * scale).exp() * (sums[n - 1] ** 2 - sums[2 * n - 1]) / (2 * n)
    return total / (count * (count - 1) / 2)


def _power_sums(values: Tensor, most: int) -> list[Tensor]:
    """Sums over particles of the first powers."""
    power, sums = values.clone(), []
    for n in range(most):
        sums.append(power.sum(0))
        if n < most - 1:
            power.mul_(values)
    return sums


def _among_largest(largest: Tensor, rest: Tensor, totals: LogMean) -> Tensor:
    """The sum over pairs of the largest, each from what is left without the two."""
    parts = torch.cat([largest, rest.unsqueeze(0)])
    pairs = torch.combinations(torch.arange(len(largest), device=rest.device))

    def left(gone: Tensor) -> Tensor:
        """Share of all but the ones in each row."""
        without = parts.expand(len(gone), *parts.shape).scatter(
            1, gone.reshape(*gone.shape, *(1,) * rest.dim()).expand(*gone.shape, *rest.shape), -math.inf
        )
        return without.logsumexp(1) - totals.log_sum

    alone = left(torch.arange(len(largest), device=rest.device).unsqueeze(1))
    return (left(pairs) - alone[pairs].sum(1)).sum(0)


def level_probability(level: int) -> float:
    """(1 - r) r^level with r = 2^-1.5.

    Example::

        >>> sum(level_probability(level) for level in range(100))
        1.0
    """
    return (1.0 - LEVEL_RATE) * LEVEL_RATE**level


def draw_level() -> int:
    """A level of the multilevel estimate at random, from torch's generator."""
    return int((-torch.rand(())).log1p() / math.log(LEVEL_RATE))  # of a number above 0


def correction(first: Float[Tensor, "*plates"], second: Float[Tensor, "*plates"]) -> Float[Tensor, "*plates"]:
    """Lhat of two sets of n particles together minus the mean of each set's own; its mean is L_2n - L_n.

    With n = n0 2^level, over the level's probability, it makes the bound with n0 particles an unbiased estimate of the
    log evidence. See "On Multilevel Monte Carlo Unbiased Gradient Estimation for Deep Latent Variable Models" (Shi and
    Cornish 2021, https://proceedings.mlr.press/v130/shi21d.html).

    Args:
        first: log-sum-exp of one set of log weights, in nats.
        second: of the other set, of the same size.

    Returns:
        Shape ``(*plates)``; 0 where every particle is impossible, inf where all of one set are.
    """
    whole = torch.logaddexp(first, second) - math.log(2.0)
    return torch.where(whole == -math.inf, 0.0, whole - (first + second) / 2.0)
