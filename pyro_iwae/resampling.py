# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Indices drawn by weight, at once or while particles pass by."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["multinomial", "streaming"]


def multinomial(log_weights: Float[Tensor, "particles *plates"]) -> Int[Tensor, "*plates"]:
    """Draws one particle for each independent element, k with probability w_k / sum_j w_j.

    By the Gumbel-max trick, which needs no normalisation, and never takes a particle of weight 0 (unless all are).

    Args:
        log_weights: unnormalised log weights in nats, shape ``(particles, *plates)``.

    Returns:
        Indices, shape ``(*plates)``.

    Example::

        >>> multinomial(torch.tensor([-torch.inf, 0.0]))
        tensor(1)
    """
    log_weights = log_weights.detach()
    exponential = torch.empty_like(log_weights).exponential_()
    return (log_weights - exponential.log()).argmax(0)


def streaming(
    log_weights: Float[Tensor, "particles *plates"], log_sum: Float[Tensor, "*plates"]
) -> tuple[Int[Tensor, "*plates"], Bool[Tensor, "*plates"], Float[Tensor, "*plates"]]:
    """Draws one particle for each independent element among particles that pass by in chunks, which are not kept.

    After each chunk the particle that is held is k with probability w_k / sum_j w_j, over all that have passed.

    Args:
        log_weights: of a chunk, unnormalised, in nats, shape ``(particles, *plates)``.
        log_sum: log-sum-exp of all that have passed before, shape ``(*plates)``; -inf before the first chunk.

    Returns:
        The chunk's own draw, whether it takes the place of the particle that is held, and the new log-sum-exp; each of
        shape ``(*plates)``.

    Example::

        >>> streaming(torch.tensor([-torch.inf, 0.0]), torch.tensor(-torch.inf))
        (tensor(1), tensor(True), tensor(0.))
    """
    own = log_weights.detach().logsumexp(0)
    total = torch.logaddexp(log_sum, own)
    share = torch.where(total == -torch.inf, 0.0, (own - total).exp())
    return multinomial(log_weights), torch.rand_like(share) < share, total
