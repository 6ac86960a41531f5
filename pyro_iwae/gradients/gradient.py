# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The contracts that gradient estimators keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.gradients.coefficients import Coefficients
from pyro_iwae.logweights import LogWeights
from pyro_iwae.totals import Totals

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
        """
        objective = totals.guide
        if weights.score is None or weights.score_log_q is None:
            return torch.zeros_like(objective.value)
        balance = weights.score_scale if self.balances else 0.0
        advantage = objective.advantage(weights.log_weights, balance=balance)
        surrogate = (advantage * weights.score).sum(0)
        if objective.count > 1:
            return surrogate
        return surrogate + (objective.slope(weights.log_weights) * weights.score_log_q).sum(0)
