# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Score function against the bound without the particle, for sites that cannot be reparameterised.

Formula: sum_k (-log(1 - v_k) - v_k) d log q(z_k): the control is log (1/K) sum_{j != k} w_j, the bound after w_k is
    left out of its sum. The ``- v_k`` part is the path gradient's; this file adds the rest. d log q is that of the
    unscaled, unmasked log q of *all* such sites of the independent element. Where log q enters the weights with a
    scale s (annealing) that part is - s v_k, and the constant (1 - s) log(1 - 1/K) is added.
Bias: none; the control does not depend on z_k. It is VIMCO's moved by a constant, which takes away what all
    particles' coefficients have in common: with even weights they are of order 1 / K^2 in place of 1 / K.
Cost: none beyond the weights.
K = 1: there are no others; Lhat d log q, as ``Trace_ELBO``.
Reference: "Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds" (Liévin,
    Dittadi, Christensen, Winther 2020, https://arxiv.org/abs/2008.01998), equation 17 with gamma = 0.
"""

from __future__ import annotations

from pyro_iwae.gradients.gradient import ScoreGradient

__all__ = ["OVIS"]


class OVIS(ScoreGradient):
    """Score function with each particle judged against the bound without it.

    See "Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds" (Liévin,
    Dittadi, Christensen, Winther 2020, https://arxiv.org/abs/2008.01998).

    Example::

        >>> import torch
        >>> from pyro_iwae import LogWeights
        >>> score = torch.zeros(2, requires_grad=True)
        >>> weights = LogWeights(torch.zeros(2), score=score, score_log_q=torch.zeros(2))
        >>> OVIS().surrogate(weights, weights.totals()).backward()
        >>> score.grad  # log 2; the path gradient adds -1/2
        tensor([0.6931, 0.6931])
    """

    unbiased = True
    needs = "nothing"
    reference = "Liévin, Dittadi, Christensen, Winther 2020, arXiv 2008.01998"
    balances = True
