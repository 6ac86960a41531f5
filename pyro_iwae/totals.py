# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What an estimator must know of *all* K particles: the objective's value there, and how it moves with each weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Gather", "LogMean", "Mean", "Totals", "finite_origin"]

Gather = Callable[[Tensor], Tensor]  # what each process has, along a new first dimension


class Totals(ABC):
    """An objective f(log w_1, ..., log w_K) at all K particles, in nats; detached.

    The particles that it is asked about may be a part of the K.
    """

    count: int
    rising: bool = True  # f grows with every weight, by slopes that sum to 1
    linear: bool = False  # in the log weights

    @property
    def is_bound(self) -> bool:
        """Whether f is the importance weighted bound itself."""
        return False

    @property
    @abstractmethod
    def value(self) -> Float[Tensor, "*plates"]:
        """f itself."""

    @abstractmethod
    def slope(self, log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "particles *plates"]:
        """df / dlog w_k; 0 for impossible particles."""

    @abstractmethod
    def double_slope(
        self, log_weights: Float[Tensor, "particles *plates"], scale: float | Tensor = 1.0
    ) -> Float[Tensor, "particles *plates"]:
        """df / dlog w_k - scale d²f / dlog w_k², which is v_k^2 for the importance weighted bound.

        What d log w_k is multiplied with along the ways through z_k, once log q's own dependence on its parameters,
        which enters log w_k with that scale, is sent there too (doubly reparameterised).
        """

    @abstractmethod
    def control(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        """f without particle k, which is therefore independent of it, K > 1.

        Args:
            log_weights: of the particles to be left out, each in turn.
            balance: 0 puts the mean of the others in the particle's place. s moves f by a constant that balances
                the slope of log q where that enters the weights with scale s: with even weights df of particle k is
                then hardly more than s times its slope. 1 just leaves the particle out of the sum, for p = 1.
        """

    @property
    def guide(self) -> Totals:
        """The objective of the guide's parameters, where it is not that of the model's."""
        return self

    def part(self, start: int, stop: int) -> Totals:
        """The same objective, to be asked about particles ``start`` to ``stop``; only groups tell these apart."""
        return self

    @abstractmethod
    def gathered(self, gather: Gather, count: int) -> Totals:
        """The objective at all K particles, of which each process has a part; the same in each.

        Args:
            gather: puts what each process has along a new first dimension.
            count: K.
        """

    def advantage(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        """f minus its control: what multiplies d log q(z_k). A control that is not finite counts as 0, as it may."""
        value = self.value.expand(log_weights.shape)
        if self.count > 1:
            control = self.control(log_weights, balance=balance)
            value = value - control.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, eq=False)
class LogMean(Totals):
    """log (1/K) sum_k w_k^p, divided by the power p; the importance weighted bound for p = 1.

    The sum is kept in two parts, the largest term and the rest as a share of it, so that the sum *without* any one
    particle is exact also for the particle that carries nearly all of the weight, and weights are exact also where
    their logarithms are large: -1e6 nats for an image, in single precision, round to 0.06.

    Attributes:
        largest: the largest p log w of each independent element, shape ``(*plates)``.
        rest: the log-sum-exp of all the others over the largest, shape ``(*plates)``; at most log (K - 1).
        count: K, the number of particles.
        power: p, not 0.
    """

    largest: Float[Tensor, "*plates"]
    rest: Float[Tensor, "*plates"]
    count: int
    power: float = 1.0

    @classmethod
    def of(cls, log_weights: Float[Tensor, "particles *plates"], power: float = 1.0) -> LogMean:
        """Totals of one block of particles."""
        terms = log_weights.detach() if power == 1.0 else log_weights.detach() * power
        return cls(*_largest_and_rest(terms), terms.shape[0], power)

    def merge(self, other: LogMean) -> LogMean:
        """Totals of two blocks of particles together; associative and commutative."""
        largest = torch.maximum(self.largest, other.largest)
        origin, smaller = finite_origin(largest), torch.minimum(self.largest, other.largest)
        rests = [part.rest + (part.largest - origin) for part in (self, other)]
        rest = torch.logaddexp(torch.logaddexp(*rests), smaller - origin)
        return LogMean(largest, rest, self.count + other.count, self.power)

    def gathered(self, gather: Gather, count: int) -> LogMean:
        parts = gather(torch.stack([self.largest, self.rest]))
        largest, others = _largest_and_rest(parts[:, 0])
        inside = (parts[:, 1] + (parts[:, 0] - finite_origin(largest))).logsumexp(0)
        return LogMean(largest, torch.logaddexp(others, inside), count, self.power)

    @property
    def is_bound(self) -> bool:
        return self.power == 1.0 or self.count == 1

    @cached_property
    def log_excess(self) -> Float[Tensor, "*plates"]:
        """Log-sum-exp over all particles, over the largest."""
        return torch.logaddexp(self.rest, torch.zeros_like(self.rest))

    @cached_property
    def log_sum(self) -> Float[Tensor, "*plates"]:
        """Log-sum-exp over all particles."""
        return self.largest + self.log_excess

    @cached_property
    def value(self) -> Float[Tensor, "*plates"]:
        return (self.largest + (self.log_excess - math.log(self.count))) / self.power

    def slope(self, log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "particles *plates"]:
        return torch.where(self.largest.isinf(), 0.0, self._log_share(log_weights.detach() * self.power).exp())

    def share(self, block: LogMean) -> Float[Tensor, "*plates"]:
        """The share of the sum that a block of the particles has; 0 where all are impossible."""
        found = (block.largest - finite_origin(self.largest) + (block.log_excess - self.log_excess)).exp()
        return torch.where(self.largest.isinf(), 0.0, found)

    def _log_share(self, terms: Tensor) -> Tensor:
        return terms - finite_origin(self.largest) - self.log_excess

    def double_slope(
        self, log_weights: Float[Tensor, "particles *plates"], scale: float | Tensor = 1.0
    ) -> Float[Tensor, "particles *plates"]:
        share, scale = self.slope(log_weights), scale * self.power
        return share * ((1.0 - scale) + scale * share)  # v - s (v - v^2) without cancellation

    def log_shares(
        self, log_weights: Float[Tensor, "particles *plates"]
    ) -> tuple[Float[Tensor, "particles *plates"], Float[Tensor, "particles *plates"]]:
        """Logarithms of the slope and of 1 - slope, the latter right to rounding also where the slope is almost 1."""
        terms = log_weights.detach() * self.power
        share = torch.where(self.largest.isinf(), -math.inf, self._log_share(terms))
        others = torch.log1p(-share.clamp(max=-math.log(2.0)).exp())  # any but the largest has at most half
        others = torch.where((terms == self.largest) & self.largest.isfinite(), self.rest - self.log_excess, others)
        return share, others

    def control(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        others = self.log_sum + self.log_shares(log_weights)[1]
        log_mean = others - math.log(self.count - 1)
        return (log_mean + balance * self.power * math.log1p(-1.0 / self.count)) / self.power

    def advantage(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        """-log (1 - v_k), and what is the same for all particles: no difference of two large numbers."""
        alone = self.value.expand(log_weights.shape).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.count == 1:
            return alone
        others, one = self.log_shares(log_weights)[1], math.log1p(-1.0 / self.count)
        exact = (one - others) / self.power - balance * one
        return torch.where(others.isfinite() & self.largest.isfinite(), exact, alone)


def _largest_and_rest(terms: Tensor) -> tuple[Tensor, Tensor]:
    """The largest along the first dimension, and the log-sum-exp of all others over it, of ties all but one.

    Not by ``max(dim)``, which starts threads whatever the size: in a forked process it would wait for ever.
    """
    largest = terms.amax(0)
    is_largest = terms == largest
    others = torch.where(is_largest, -math.inf, terms - finite_origin(largest)).logsumexp(0)
    ties = is_largest.sum(0, dtype=terms.dtype) - 1.0
    return largest, torch.logaddexp(others, torch.where(largest.isinf(), 0.0, ties).log())


def finite_origin(largest: Tensor) -> Tensor:
    """What to measure from: the largest, or 0 where there is none."""
    return torch.where(largest.isinf(), 0.0, largest)


@dataclass(frozen=True, eq=False)
class Mean(Totals):
    """(1/K) sum_k log w_k: the ELBO, from K particles.

    Attributes:
        total: sum of the log weights, shape ``(*plates)``.
        count: K.
    """

    total: Float[Tensor, "*plates"]
    count: int
    linear = True

    @classmethod
    def of(cls, log_weights: Float[Tensor, "particles *plates"]) -> Mean:
        """Totals of one block of particles."""
        return cls(log_weights.detach().sum(0), log_weights.shape[0])

    def gathered(self, gather: Gather, count: int) -> Mean:
        return Mean(gather(self.total).sum(0), count)

    @property
    def value(self) -> Float[Tensor, "*plates"]:
        return self.total / self.count

    def slope(self, log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "particles *plates"]:
        return torch.where(log_weights.detach() == -math.inf, 0.0, log_weights.new_tensor(1.0 / self.count))

    def double_slope(
        self, log_weights: Float[Tensor, "particles *plates"], scale: float | Tensor = 1.0
    ) -> Float[Tensor, "particles *plates"]:
        return self.slope(log_weights)

    def control(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        """The mean of the others: there is no logarithm around it, and nothing to balance."""
        return (self.total - log_weights.detach()) / (self.count - 1)
