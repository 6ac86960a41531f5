# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Sticking the landing: the pathwise gradient without log q's own dependence on its parameters.

Formula: guide sum_k v_k path_k, model sum_k v_k d log p, with path_k the derivative of log w_k through z_k alone, the
    parameters inside log q held.
Bias: none for K = 1, where what is left out has mean zero. For K > 1 it has not: the guide's gradient is biased, and
    its limit for large K is not the bound's.
Cost: the pathwise one, and a backward pass through log q. Its noise vanishes where the guide is the posterior.
Reference: "Sticking the Landing" (Roeder, Wu, Duvenaud 2017, https://arxiv.org/abs/1703.09194).
"""

from __future__ import annotations

from pyro_iwae.gradients.coefficients import Coefficients
from pyro_iwae.gradients.gradient import PathGradient
from pyro_iwae.logweights import LogWeights
from pyro_iwae.totals import Totals

__all__ = ["StickTheLanding"]


class StickTheLanding(PathGradient):
    """Guide gradient sum_k v_k path_k; exact at the posterior for any noise, biased elsewhere for K > 1.

    See "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference" (Roeder, Wu,
    Duvenaud 2017, https://arxiv.org/abs/1703.09194).

    Example::

        >>> from pyro_iwae import ImportanceWeightedELBO
        >>> ImportanceWeightedELBO(num_particles=1, gradient=StickTheLanding()).gradient
        StickTheLanding()
    """

    unbiased = False
    needs = "a reparameterised site"
    reference = "Roeder, Wu, Duvenaud 2017, arXiv 1703.09194"
    cuts = True

    def coefficients(self, weights: LogWeights, totals: Totals) -> Coefficients:
        """v_k, and nothing for log q's own dependence."""
        model = totals.slope(weights.log_weights)
        guide = model if totals.guide is totals else totals.guide.slope(weights.log_weights)
        return Coefficients(model=model, path=guide, log_q=None, score=guide)
