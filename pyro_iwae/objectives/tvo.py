# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The thermodynamic variational objective: a left Riemann sum along the way from guide to posterior.

Formula: sum_j (beta_{j+1} - beta_j) sum_k v_k^(j) log w_k, where v^(j) are the weights w^beta_j, normalised, and the
    last beta is 1. The slope of log (1/K) sum_k w_k^beta in beta is sum_k v_k log w_k and grows with beta, so that
    the sum lies between the ELBO (one interval) and the importance weighted bound (ever finer ones), particle by
    particle.
Bound: its mean is a lower bound on the evidence. The gradient here is that of this function of K particles, without
    bias; the paper's own estimator aims at K = inf.
Reference: "The Thermodynamic Variational Objective" (Masrani, Le, Wood 2019, https://arxiv.org/abs/1907.00031).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.objectives.objective import Objective
from pyro_iwae.options import as_number
from pyro_iwae.totals import Gather, LogMean, Totals, finite_origin

__all__ = ["TVO"]


@dataclass(frozen=True)
class TVO(Objective):
    """The thermodynamic variational objective, between the ELBO and the importance weighted bound.

    See "The Thermodynamic Variational Objective" (Masrani, Le, Wood 2019, https://arxiv.org/abs/1907.00031).

    Args:
        betas: left ends of the intervals, rising from 0 and below 1; the last interval ends at 1. ``(0.0,)`` is the
            ELBO.

    Raises:
        ValueError: where they are not.

    Example::

        >>> import torch
        >>> TVO((0.0, 0.5)).totals(torch.tensor([0.0, 1.0])).value
        tensor(0.5612)
    """

    betas: Sequence[float]

    reference = "Masrani, Le, Wood 2019, arXiv 1907.00031"

    def __post_init__(self) -> None:
        if not isinstance(self.betas, Iterable) or isinstance(self.betas, str):
            raise TypeError(f"expected betas to be several numbers, as in (0.0, 0.5), got {self.betas!r}")
        betas = tuple(as_number("betas", b) for b in self.betas)
        if not betas or betas[0] != 0.0 or not all(a < b for a, b in pairwise((*betas, 1.0))):
            raise ValueError(f"expected betas that rise from 0 and stay below 1, got {tuple(self.betas)}")
        object.__setattr__(self, "betas", betas)

    def totals(self, log_weights: Float[Tensor, "particles *plates"]) -> Totals:
        ends = (*self.betas, 1.0)
        parts = [_Tilted.of(log_weights, beta) for beta in self.betas]
        return _Riemann(tuple(b - a for a, b in pairwise(ends)), parts, LogMean.of(log_weights))


@dataclass(frozen=True, eq=False)
class _Tilted:
    """m = sum_k v_k log w_k with v_k in proportion to w_k^beta, and its derivatives; m is kept over the largest."""

    beta: float
    shares: LogMean
    largest: Tensor
    mean: Tensor

    @classmethod
    def of(cls, log_weights: Tensor, beta: float) -> _Tilted:
        log_weights = log_weights.detach()
        largest = log_weights.amax(0)
        relative = log_weights - finite_origin(largest)
        if beta == 0.0:
            return cls(beta, LogMean.of(torch.zeros_like(log_weights)), largest, relative.mean(0))
        shares = LogMean.of(log_weights, beta)
        finite = torch.where(log_weights == -math.inf, 0.0, relative)  # 0 * -inf is NaN
        mean = (shares.slope(log_weights) * finite).sum(0)
        return cls(beta, shares, largest, torch.where(largest == -math.inf, -math.inf, mean))

    @property
    def origin(self) -> Tensor:
        """What the mean is measured from."""
        return finite_origin(self.largest)

    @property
    def value(self) -> Tensor:
        return self.origin + self.mean

    def gathered(self, gather: Gather, count: int) -> _Tilted:
        whole = replace(self, shares=self.shares.gathered(gather, count), largest=gather(self.largest).amax(0))
        share = whole.shares.share(self.shares)
        part = torch.where(share == 0.0, 0.0, share * (self.mean + (self.origin - whole.origin)))  # 0 * -inf is NaN
        impossible = (whole.largest == -math.inf) & (self.beta != 0.0)
        return replace(whole, mean=torch.where(impossible, -math.inf, gather(part).sum(0)))

    def _share_and_pull(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """v_k, and u_k = 1 + beta (log w_k - m), so that dm / dlog w_k = v_k u_k; 0 for impossible particles."""
        impossible = log_weights == -math.inf
        if self.beta == 0.0:
            share, pull = self.shares.slope(torch.zeros_like(log_weights)), torch.ones_like(log_weights)
        else:
            share = self.shares.slope(log_weights)
            pull = 1.0 + self.beta * (log_weights - self.origin - self.mean)
        return torch.where(impossible, 0.0, share), torch.where(impossible, 0.0, pull)

    def slope(self, log_weights: Tensor) -> Tensor:
        share, pull = self._share_and_pull(log_weights)
        return share * pull

    def curvature(self, log_weights: Tensor) -> Tensor:
        share, pull = self._share_and_pull(log_weights)
        return self.beta * share * (pull + 1.0 - 2.0 * share * pull)


@dataclass(frozen=True, eq=False)
class _Riemann(Totals):
    widths: tuple[float, ...]
    parts: Sequence[_Tilted]
    bound: LogMean

    rising = False

    def gathered(self, gather: Gather, count: int) -> _Riemann:
        return _Riemann(
            self.widths, [p.gathered(gather, count) for p in self.parts], self.bound.gathered(gather, count)
        )

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return len(self.parts) == 1  # the ELBO

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.bound.count

    @property
    def value(self) -> Float[Tensor, "*plates"]:
        return _sum(width * part.value for width, part in zip(self.widths, self.parts, strict=True))

    def slope(self, log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "particles *plates"]:
        log_weights = log_weights.detach()
        return _sum(width * part.slope(log_weights) for width, part in zip(self.widths, self.parts, strict=True))

    def double_slope(
        self, log_weights: Float[Tensor, "particles *plates"], scale: float | Tensor = 1.0
    ) -> Float[Tensor, "particles *plates"]:
        log_weights = log_weights.detach()
        bends = _sum(width * part.curvature(log_weights) for width, part in zip(self.widths, self.parts, strict=True))
        return self.slope(log_weights) - scale * bends

    def control(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        """The importance weighted bound of the others: near to this objective, and free of particle k."""
        return self.bound.control(log_weights)


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
