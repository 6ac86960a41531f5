# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Pathwise gradient: that of the objective itself, with the noise held.

Formula: sum_k v_k d log w_k, with v the normalised weights and d the total derivative.
Bias: none, for the parameters of the model and for reparameterised guide sites. For other sites it is the
    ``- v_k d log q(z_k)`` part, to which a score-function estimator adds the rest.
Cost: one backward pass through all K particles. The signal-to-noise ratio of the guide's gradient falls as
    1 / sqrt(K) (Rainforth et al. 2018, https://arxiv.org/abs/1802.04537).
Reference: "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov 2016, https://arxiv.org/abs/1509.00519).
"""

from __future__ import annotations

from pyro_iwae.gradients.coefficients import Coefficients
from pyro_iwae.gradients.gradient import PathGradient
from pyro_iwae.logweights import LogWeights
from pyro_iwae.totals import Totals

__all__ = ["Pathwise"]


class Pathwise(PathGradient):
    """The gradient of log-mean-exp itself: sum_k v_k d log w_k.

    See "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov 2016, https://arxiv.org/abs/1509.00519).

    Example::

        >>> import torch
        >>> weights = LogWeights(torch.zeros(4, 3, requires_grad=True))
        >>> Pathwise().surrogate(weights, weights.totals()).sum().backward()
        >>> weights.log_weights.grad[0]
        tensor([0.2500, 0.2500, 0.2500])
    """

    unbiased = True
    needs = "a reparameterised site"
    reference = "Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519"
    cuts = False

    def coefficients(self, weights: LogWeights, totals: Totals) -> Coefficients:
        """v_k for every way."""
        model = totals.slope(weights.log_weights)
        guide = model if totals.guide is totals else totals.guide.slope(weights.log_weights)
        return Coefficients(model=model, path=guide, log_q=guide, score=guide)
