# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Indices drawn by weight."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["multinomial"]


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
