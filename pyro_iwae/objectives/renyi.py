# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The variational Rényi bound.

Formula: 1 / (1 - alpha) log (1/K) sum_k w_k^(1 - alpha). alpha = 0 is the importance weighted bound, alpha = 1 the
    ELBO, alpha = -inf in the limit the largest weight. It falls as alpha grows. The power mean of order p, as an
    objective, is this one with alpha = 1 - p.
Bound: for alpha >= 0 its mean is a lower bound on the evidence; for alpha < 0 it can lie above.
Reference: "Rényi Divergence Variational Inference" (Li & Turner 2016, https://arxiv.org/abs/1602.02311).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from pyro_iwae.objectives.objective import Objective
from pyro_iwae.options import as_number
from pyro_iwae.totals import LogMean, Mean, Totals

__all__ = ["Renyi"]


@dataclass(frozen=True)
class Renyi(Objective):
    """1 / (1 - alpha) log (1/K) sum_k w_k^(1 - alpha), between the ELBO (alpha = 1) and the bound (alpha = 0).

    See "Rényi Divergence Variational Inference" (Li & Turner 2016, https://arxiv.org/abs/1602.02311).

    Args:
        alpha: the order, 1 or at least 0.001 away from it (rounding would swamp the rest), and within a million of it
            (all but one weight would vanish).

    Raises:
        ValueError: where alpha is none of these.

    Example::

        >>> import torch
        >>> Renyi(0.5).totals(torch.tensor([0.0, 1.0])).value
        tensor(0.5619)
    """

    alpha: float

    reference = "Li & Turner 2016, arXiv 1602.02311"

    def __post_init__(self) -> None:
        power = 1.0 - as_number("alpha", self.alpha)
        if not abs(power) <= 1e6 or 0.0 < abs(power) < 1e-3:
            raise ValueError(
                "expected alpha to be 1, or at least 0.001 away from it and within a million of it, got "
                f"{self.alpha}; Renyi(1.0) is the ELBO"
            )

    def totals(self, log_weights: Float[Tensor, "particles *plates"]) -> Totals:
        return Mean.of(log_weights) if self.alpha == 1.0 else LogMean.of(log_weights, 1.0 - self.alpha)
