# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Doubly reparameterised gradient: what log q's own dependence gives is sent through z as well.

Formula: guide sum_k v_k^2 path_k, model sum_k v_k d log p, with path_k the derivative of log w_k through z_k alone. For
    another objective f of the weights: the guide's coefficient is f'_k - f''_kk, of which v_k - (v_k - v_k^2) is
    one case; with log q scaled by s inside the weight, f'_k - s f''_kk.
Bias: none.
Cost: the pathwise one, and a backward pass through log p to the values of z, and through log q. The signal-to-noise
    ratio of the guide's gradient grows as sqrt(K).
Reference: "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives" (Tucker, Lawson, Gu, Maddison
    2019, https://arxiv.org/abs/1810.04152).
"""

from __future__ import annotations

import torch

from pyro_iwae.gradients.coefficients import Coefficients
from pyro_iwae.gradients.gradient import PathGradient
from pyro_iwae.logweights import LogWeights
from pyro_iwae.totals import Totals

__all__ = ["DoublyReparameterized"]


class DoublyReparameterized(PathGradient):
    """Guide gradient sum_k v_k^2 path_k: unbiased, and the better the more particles.

    It needs more than one site's sampler: no score-function site may depend on a reparameterised one, and what
    scales or masks log q inside the weight must be the same for all sites that it is used for.

    See "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives" (Tucker, Lawson, Gu, Maddison 2019,
    https://arxiv.org/abs/1810.04152).

    Example::

        >>> from pyro_iwae import ImportanceWeightedELBO
        >>> ImportanceWeightedELBO(num_particles=64, gradient=DoublyReparameterized()).gradient
        DoublyReparameterized()
    """

    unbiased = True
    needs = "a reparameterised site, and no score-function site that depends on it"
    reference = "Tucker, Lawson, Gu, Maddison 2019, arXiv 1810.04152"
    cuts = True

    def coefficients(self, weights: LogWeights, totals: Totals) -> Coefficients:
        """v_k for the model, v_k^2 for what goes through z.

        Raises:
            ValueError: where a score-function site depends on a reparameterised one, or sites differ in their scale.
        """
        model, guide = totals.slope(weights.log_weights), totals.guide
        slope = model if guide is totals else guide.slope(weights.log_weights)
        alone = guide.count == 1 or guide.linear  # what log q's own dependence gives at the root has mean zero
        if weights.cut is None or (alone and not weights.children):
            return Coefficients(model=model, path=slope, log_q=None, score=slope)
        if weights.cut.downstream is not None:
            site, below = weights.cut.downstream
            raise ValueError(
                f"DoublyReparameterized needs that no score-function site depends on a reparameterised one; guide site "
                f"'{below}' depends on '{site}', and v_k^2 is biased there. Write gradient=Pathwise(), or draw "
                f"'{below}' before '{site}' or independently of it"
            )
        if weights.cut.scale is None:
            raise ValueError(
                f"DoublyReparameterized needs one number that scales log q of all reparameterised guide sites, got "
                f"several among {sorted(set(weights.cut.ways.names))}, from site to site or within one; put the same "
                "scalar poutine.scale around all of them, or write gradient=Pathwise()"
            )
        path = guide.double_slope(weights.log_weights, weights.cut.scale)
        if guide is not totals or not totals.rising:
            return Coefficients(model=model, path=path, log_q=None, score=slope, converted=True)
        if any(child.shared for child in weights.children) and not totals.is_bound:
            raise NotImplementedError(
                "combine=True has no doubly reparameterised gradient for objectives other than the importance weighted "
                "bound; write combine=False, objective=None, or gradient=Pathwise()"
            )
        ratio = torch.where(slope > 0.0, path / slope, 0.0)
        share = torch.where(slope > 0.0, guide.double_slope(weights.log_weights) / slope, 0.0)
        return Coefficients(model, path, None, slope, ratio=ratio, converted=True, share=share)
