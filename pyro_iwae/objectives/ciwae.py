# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Combination importance weighted: the ELBO and the bound, mixed.

Formula: beta (1/K) sum_k log w_k + (1 - beta) log (1/K) sum_k w_k. beta = 1 is the ELBO, beta = 0 the importance
    weighted bound; it falls as beta grows.
Bound: its mean is a lower bound on the evidence for beta between 0 and 1.
Reference: "Tighter Variational Bounds Are Not Necessarily Better" (Rainforth et al. 2018,
    https://arxiv.org/abs/1802.04537).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from pyro_iwae.objectives.objective import Objective
from pyro_iwae.options import as_number
from pyro_iwae.totals import Gather, LogMean, Mean, Totals

__all__ = ["CIWAE"]


@dataclass(frozen=True)
class CIWAE(Objective):
    """beta times the ELBO plus 1 - beta times the importance weighted bound, of the same particles.

    See "Tighter Variational Bounds Are Not Necessarily Better" (Rainforth et al. 2018,
    https://arxiv.org/abs/1802.04537).

    Args:
        beta: between 0 and 1.

    Raises:
        ValueError: where it is not.

    Example::

        >>> import torch
        >>> CIWAE(0.5).totals(torch.tensor([0.0, 1.0])).value
        tensor(0.5601)
    """

    beta: float

    reference = "Rainforth et al. 2018, arXiv 1802.04537"

    def __post_init__(self) -> None:
        if not 0.0 <= as_number("beta", self.beta) <= 1.0:
            raise ValueError(f"expected beta between 0 (the bound) and 1 (the ELBO), got {self.beta}")

    def totals(self, log_weights: Float[Tensor, "particles *plates"]) -> Totals:
        return _Mixed(self.beta, Mean.of(log_weights), LogMean.of(log_weights))


@dataclass(frozen=True, eq=False)
class _Mixed(Totals):
    beta: float
    elbo: Mean
    bound: LogMean

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.elbo.count

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.beta == 1.0

    def gathered(self, gather: Gather, count: int) -> _Mixed:
        return _Mixed(self.beta, self.elbo.gathered(gather, count), self.bound.gathered(gather, count))

    def _mix(self, elbo: Tensor, bound: Tensor) -> Tensor:
        if self.beta in (0.0, 1.0):  # the other may be -inf
            return elbo if self.beta == 1.0 else bound
        return self.beta * elbo + (1.0 - self.beta) * bound

    @property
    def value(self) -> Float[Tensor, "*plates"]:
        return self._mix(self.elbo.value, self.bound.value)

    def slope(self, log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "particles *plates"]:
        return self._mix(self.elbo.slope(log_weights), self.bound.slope(log_weights))

    def double_slope(
        self, log_weights: Float[Tensor, "particles *plates"], scale: float | Tensor = 1.0
    ) -> Float[Tensor, "particles *plates"]:
        return self._mix(*(part.double_slope(log_weights, scale) for part in (self.elbo, self.bound)))

    def control(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        elbo, bound = (part.control(log_weights, balance=balance) for part in (self.elbo, self.bound))
        return self._mix(elbo, bound)
