# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Score function against the mean of the others, for sites that cannot be reparameterised.

Formula: sum_k (Lhat - Lhat_[-k] - v_k) d log q(z_k), with Lhat_[-k] the bound after w_k is replaced by the mean of
    the K - 1 others. Its ``- v_k`` part is the path gradient's; this file adds the rest. d log q is that of
    the unscaled, unmasked log q of *all* such sites of the independent element.
Bias: none. Lhat_[-k] does not depend on z_k, so it has mean zero against the score; without any control the
    estimator is right too, and far noisier.
Cost: none beyond the weights.
K = 1: there are no others; Lhat d log q, as ``Trace_ELBO``.
Reference: "Variational inference for Monte Carlo objectives" (Mnih & Rezende 2016,
    https://arxiv.org/abs/1602.06725), with the arithmetic mean in place of their geometric one.
"""

from __future__ import annotations

from pyro_iwae.gradients.gradient import ScoreGradient

__all__ = ["VIMCO"]


class VIMCO(ScoreGradient):
    """Score function with each particle judged against the mean of the others.

    See "Variational inference for Monte Carlo objectives" (Mnih & Rezende 2016, https://arxiv.org/abs/1602.06725).

    Example::

        >>> import torch
        >>> from pyro_iwae import LogWeights
        >>> score = torch.zeros(2, requires_grad=True)
        >>> weights = LogWeights(torch.zeros(2), score=score, score_log_q=torch.zeros(2))
        >>> VIMCO().surrogate(weights, weights.totals()).backward()
        >>> score.grad
        tensor([0., 0.])
    """

    unbiased = True
    needs = "nothing"
    reference = "Mnih & Rezende 2016, arXiv 1602.06725"
    balances = False
