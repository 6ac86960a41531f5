# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Multiply importance weighted: the mean of M bounds.

Formula: (1/M) sum_m log (M/K) sum_{k in group m} w_k, over M groups of K / M particles each. M = 1 is the importance
    weighted bound, M = K the ELBO. It falls as M grows.
Bound: its mean is the importance weighted bound of K / M particles; M groups make value and gradient less noisy.
Reference: "Tighter Variational Bounds Are Not Necessarily Better" (Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh
    2018, https://arxiv.org/abs/1802.04537).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.objectives.objective import Objective
from pyro_iwae.options import as_count
from pyro_iwae.totals import Gather, LogMean, Totals

__all__ = ["MIWAE", "Groups", "require_groups"]


@dataclass(frozen=True)
class MIWAE(Objective):
    """The mean of M importance weighted bounds, each of K / M of the particles.

    ``num_particles`` is K, all of them: ``ImportanceWeightedELBO(64, objective=MIWAE(8))`` averages eight bounds of
    eight particles each.

    See "Tighter Variational Bounds Are Not Necessarily Better" (Rainforth et al. 2018,
    https://arxiv.org/abs/1802.04537).

    Args:
        groups: M, which must divide K.

    Raises:
        TypeError: where it is not a whole number.
        ValueError: where it is below 1, or does not divide K.

    Example::

        >>> import torch
        >>> MIWAE(2).totals(torch.tensor([0.0, 1.0, 2.0, 2.0])).value
        tensor(1.3101)
    """

    groups: int

    reference = "Rainforth et al. 2018, arXiv 1802.04537"

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", as_count("groups", self.groups))

    def require_count(self, num_particles: int) -> None:
        require_groups(self.groups, num_particles)

    def totals(self, log_weights: Float[Tensor, "particles *plates"]) -> Totals:
        return Groups.of(log_weights, self.groups)

    def totals_of_part(self, log_weights: Float[Tensor, "particles *plates"], start: int, count: int) -> Totals:
        return Groups.of_part(log_weights, self.groups, start, count)


def require_groups(groups: int, count: int) -> None:
    """Raises ValueError where K particles cannot be divided into so many groups."""
    if count % groups:
        raise ValueError(
            f"expected num_particles to be a multiple of the {groups} groups, got {count}; each group has "
            "num_particles / groups particles"
        )


@dataclass(frozen=True, eq=False)
class Groups(Totals):
    """The mean of M log-mean-exps, of consecutive particles each.

    Attributes:
        each: totals of the groups, shape ``(groups, *plates)``.
        groups: M.
        start: the first of the particles that it is asked about.
        stop: the one after the last.
    """

    each: LogMean
    groups: int
    start: int
    stop: int

    @classmethod
    def of(cls, log_weights: Float[Tensor, "particles *plates"], groups: int) -> Groups:
        """Totals of all particles.

        Raises:
            ValueError: where they cannot be divided into so many groups.
        """
        count = log_weights.shape[0]
        require_groups(groups, count)
        # (particles, *plates) as (particles of a group, groups, *plates)
        split = log_weights.unflatten(0, (groups, -1)).transpose(0, 1)
        return cls(LogMean.of(split), groups, 0, count)

    @classmethod
    def of_part(cls, log_weights: Float[Tensor, "particles *plates"], groups: int, start: int, count: int) -> Groups:
        """Totals of particles ``start`` and following among ``count``; the others are impossible as yet."""
        everyone = log_weights.new_full((count, *log_weights.shape[1:]), -math.inf)
        everyone[start : start + len(log_weights)] = log_weights.detach()
        return cls.of(everyone, groups)

    def gathered(self, gather: Gather, count: int) -> Groups:
        return replace(self, each=self.each.gathered(gather, self.each.count), start=0, stop=count)

    def part(self, start: int, stop: int) -> Groups:
        return replace(self, start=start, stop=stop)

    @property
    def count(self) -> int:  # type: ignore[override]
        """Particles in each group: with one there is no other to compare with."""
        return self.each.count

    @property
    def value(self) -> Float[Tensor, "*plates"]:
        return self.each.value.mean(0)

    def slope(self, log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "particles *plates"]:
        return self._own(log_weights).slope(log_weights) / self.groups

    def double_slope(
        self, log_weights: Float[Tensor, "particles *plates"], scale: float | Tensor = 1.0
    ) -> Float[Tensor, "particles *plates"]:
        return self._own(log_weights).double_slope(log_weights, scale) / self.groups

    def control(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        raise NotImplementedError("advantage() goes by groups")

    def advantage(
        self, log_weights: Float[Tensor, "particles *plates"], *, balance: float | Tensor = 0.0
    ) -> Float[Tensor, "particles *plates"]:
        """Only a particle's own group depends on it."""
        return self._own(log_weights).advantage(log_weights, balance=balance) / self.groups

    def _own(self, log_weights: Tensor) -> LogMean:
        """Totals of the group that each particle is in, shape ``(particles, *plates)``."""
        if log_weights.shape[0] != self.stop - self.start:
            raise ValueError(
                f"expected particles {self.start} to {self.stop}, got {log_weights.shape[0]}; groups are told by "
                "position, write totals.part(start, stop)"
            )
        group = torch.arange(self.start, self.stop, device=log_weights.device) // self.each.count
        return replace(self.each, largest=self.each.largest[group], rest=self.each.rest[group])
