# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Density of q_EW and bounds on its ELBO, from log weights alone."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.resampling import multinomial
from pyro_iwae.totals import LogMean

__all__ = ["drawn_bracket", "elbo_bracket", "log_density", "replicate_bracket"]


def log_density(
    log_p: Float[Tensor, "draws *plates"],
    log_weights: Float[Tensor, "draws batches *plates"],
    companions: Float[Tensor, "batches *plates"],
    *,
    num_particles: int,
) -> Float[Tensor, "draws *plates"]:
    """log p(x, z) + log K - log M + logsumexp_m( -log(w(z) + S_m) ): unbiased for the density itself.

    Args:
        log_p: log p(x, z) at the draws.
        log_weights: log w at the draws, in each batch: where plates have particles of their own, companions differ.
        companions: log S_m, the log-sum-exp of K - 1 fresh log weights in each of M batches.
        num_particles: K.

    Returns:
        Estimate of log q_EW at each draw, in nats; -inf where the model excludes the draw.

    Example::

        >>> log_density(torch.zeros(1), torch.zeros(1, 3), torch.full((3,), -torch.inf), num_particles=1)  # K = 1 is q
        tensor([0.])
    """
    inverse = -torch.logaddexp(log_weights, companions.unsqueeze(0))
    found = log_p + math.log(num_particles / companions.shape[0]) + inverse.logsumexp(1)
    return torch.where(log_p == -math.inf, -math.inf, found)  # also where all companions are impossible, too


def elbo_bracket(batches: Float[Tensor, "batches particles *plates"]) -> Float[Tensor, "2 *plates"]:
    """Lower and upper bound on ELBO[q_EW] from M + 1 independent batches of K log weights.

    Each batch gives a draw with its own companions' sum S_0, and K - 1 fresh companions (its first particle left out,
    whichever was drawn) for the draws of the other batches. Over draws, the mean of
    -log( K/(M+1) sum_{m=0..M} 1/(w + S_m) ) is a lower bound in expectation, that without m = 0 an upper one.

    Args:
        batches: log weights, in nats.

    Returns:
        Both bounds, stacked.
    """
    num_batches, num_particles = batches.shape[0] - 1, batches.shape[1]
    index = torch.stack([multinomial(b) for b in batches])
    drawn = batches.gather(1, index.unsqueeze(1)).squeeze(1)
    with_own = -batches.logsumexp(1)
    fresh = -torch.logaddexp(drawn.unsqueeze(1), batches[:, 1:].logsumexp(1).unsqueeze(0))  # (draw, batch, *plates)
    same = torch.eye(len(batches), dtype=torch.bool, device=batches.device)
    fresh = fresh.masked_fill(same.reshape(same.shape + (1,) * (fresh.dim() - 2)), -math.inf).logsumexp(1)
    upper = math.log(num_batches / num_particles) - fresh
    lower = math.log((num_batches + 1) / num_particles) - torch.logaddexp(with_own, fresh)
    return torch.stack([lower.mean(0), upper.mean(0)])


def drawn_bracket(
    with_own: Float[Tensor, "*plates"], fresh: Float[Tensor, "batches *plates"], *, num_particles: int
) -> Float[Tensor, "2 *plates"]:
    """The same for one draw, from log sums of K weights that hold the draw's.

    Args:
        with_own: among the companions that it was drawn with.
        fresh: among the companions of M batches.
        num_particles: K.

    Returns:
        Both bounds, stacked.
    """
    num_batches, fresh = fresh.shape[0], (-fresh).logsumexp(0)
    upper = math.log(num_batches / num_particles) - fresh
    lower = math.log((num_batches + 1) / num_particles) - torch.logaddexp(-with_own, fresh)
    return torch.stack([lower, upper])


def replicate_bracket(
    drawn: Float[Tensor, "batches *plates"],
    with_own: Float[Tensor, "batches *plates"],
    others: Float[Tensor, "batches *plates"],
    *,
    num_particles: int,
) -> tuple[Float[Tensor, "2 *plates"], Float[Tensor, "2 batches *plates"]]:
    """The same as :func:`elbo_bracket` from what is kept of each batch, and the bounds without each batch.

    Args:
        drawn: log weight of the particle that the batch's own weights have drawn; NaN where an element has no such
            batch.
        with_own: log-sum-exp of the batch's K weights.
        others: log-sum-exp of K - 1 of them, the same ones whichever was drawn.
        num_particles: K.

    Returns:
        Both bounds, stacked, and both bounds without each batch, NaN where there is none, or fewer than three.
    """
    there = ~drawn.isnan()
    count = there.sum(0)
    pair = there.unsqueeze(0) & there.unsqueeze(1)
    pair &= ~torch.eye(len(drawn), dtype=torch.bool, device=drawn.device).reshape(
        pair.shape[:2] + (1,) * (drawn.dim() - 1)
    )
    fresh = -torch.logaddexp(drawn.unsqueeze(0), others.unsqueeze(1))  # (companions' batch, draw, *plates)
    fresh = torch.where(pair, fresh, -math.inf)
    totals = LogMean.of(fresh)

    def bracket(inverse: Tensor, batches: Tensor, kept: Tensor) -> Tensor:
        upper = ((batches - 1.0) / num_particles).log() - inverse
        lower = (batches / num_particles).log() - torch.logaddexp(-with_own, inverse)
        both = torch.where(kept, torch.stack([lower, upper]), 0.0)
        return both.sum(-drawn.dim()) / batches

    whole = bracket(totals.log_sum, count, there)
    without = totals.log_sum + totals.log_shares(fresh)[1]  # (left out, draw, *plates)
    reduced = torch.stack([bracket(row, count - 1, keep) for row, keep in zip(without, pair, strict=True)], 1)
    return whole, torch.where(there & (count > 2), reduced, math.nan)
