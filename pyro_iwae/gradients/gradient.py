# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The contracts that gradient estimators keep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.gradients.coefficients import Coefficients
from pyro_iwae.logweights import LogWeights
from pyro_iwae.reach import Reach
from pyro_iwae.totals import LogMean, Totals

__all__ = ["Gradient", "PathGradient", "ScoreGradient"]


class Gradient(ABC):
    """Turns log weights into a surrogate whose ``backward()`` is the estimator of the objective's gradient.

    A class is either a contract or a leaf. What an estimator promises is data on it, and the tests hold it to that:
    ``unbiased`` for K > 1, what it ``needs`` of a guide site, and its ``reference``.
    """

    unbiased: ClassVar[bool]
    needs: ClassVar[str]
    reference: ClassVar[str]

    @abstractmethod
    def surrogate(self, weights: LogWeights, totals: Totals) -> Float[Tensor, "*plates"]:
        """Builds the surrogate.

        Args:
            weights: the particles at hand, with their graph.
            totals: the objective at *all* K particles, of which ``weights`` may be a part.

        Returns:
            One value per independent element, shape ``(*plates)``. Its gradient is the estimator, its value means
            nothing: sum_k v_k log w_k, for one, is never below the bound.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PathGradient(Gradient):
    """An estimator for the parameters of the model and for reparameterised guide sites (``gradient=``).

    Attributes:
        cuts: whether it tells the ways through z apart, so that the weights must come with a ``Cut``.
    """

    cuts: ClassVar[bool]

    @abstractmethod
    def coefficients(self, weights: LogWeights, totals: Totals) -> Coefficients:
        """What multiplies each particle's part in the gradient."""

    def surrogate(self, weights: LogWeights, totals: Totals) -> Float[Tensor, "*plates"]:
        """Builds the surrogate from the coefficients."""
        return self.coefficients(weights, totals).surrogate(weights)


class ScoreGradient(Gradient):
    """An estimator for the guide sites that have no reparameterised sampler (``score=``)."""

    balances: ClassVar[bool]  # the slope of log q inside the weights, by a constant in the control

    def surrogate(self, weights: LogWeights, totals: Totals) -> Float[Tensor, "*plates"]:
        """Builds sum_k (f - f_[-k]) log q(z_k); 0 where the guide has no such site.

        The ``- v_k`` part is that of log q inside the weights, which comes with the path gradient. For K = 1 that
        part has mean zero and is taken out, as ``Trace_ELBO`` does.

        Raises:
            NotImplementedError: where such a site lies in a plate with particles of its own, and the objective is not
                the importance weighted bound.
        """
        objective = totals.guide
        surrogate = torch.zeros_like(objective.value)
        if weights.score is not None and weights.score_log_q is not None:
            balance = weights.score_scale if self.balances else 0.0
            advantage = objective.advantage(weights.log_weights, balance=balance)
            surrogate = surrogate + (advantage * weights.score).sum(0)
            if objective.count == 1:
                surrogate = surrogate + (objective.slope(weights.log_weights) * weights.score_log_q).sum(0)
        scored = any(node.score is not None for node in weights.nodes() if node is not weights)
        whole = totals if isinstance(totals, LogMean) and totals.is_bound else None
        for reach in Reach.of(weights, whole).below() if scored else ():
            node = reach.node
            if node.score is not None and node.score_log_q is not None:
                _require_bound(totals)
                value = self._in_plate(reach, node.score, node.score_log_q)
                value = value.sum(list(range(value.dim() - len(node.plates))))
                surrogate = surrogate + replace(node, scale=1.0).summed(value, weights.plates)
        return surrogate

    def _in_plate(self, reach: Reach, score: Tensor, score_log_q: Tensor) -> Tensor:
        """The same for a plate's own particles: the bound at the root minus that without the particle."""
        node, slope = reach.node, reach.slope
        if reach.count == 1 and not node.shared:  # the element's own value is all that depends on it
            value = node.log_weights.detach().nan_to_num(neginf=0.0)
            return slope * (value * score + score_log_q)
        log_left = reach.log_rest
        if not self.balances and node.num_particles > 1:  # the companions' mean takes the particle's place
            log_left = torch.logaddexp(log_left, reach.log_others - math.log(node.num_particles - 1))
        advantage = -log_left
        if self.balances and reach.count > 1:
            advantage = advantage + (1.0 - node.score_scale) * math.log1p(-1.0 / reach.count)
        alone = log_left == -math.inf  # no control then: it must not depend on the particle
        advantage = torch.where(alone, reach.value.nan_to_num(neginf=0.0), reach.scale * advantage)
        return advantage * score


def _require_bound(totals: Totals) -> None:
    if not totals.is_bound:
        raise NotImplementedError(
            "plate_particles has no score-function gradient in plates for another objective than the importance "
            "weighted bound: write objective=None, or reparameterise the plates' sites"
        )
