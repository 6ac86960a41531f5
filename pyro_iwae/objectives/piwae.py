# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Partially importance weighted: the tight bound for the model, the mean of M looser ones for the guide.

Formula: the model's parameters follow log (1/K) sum_k w_k, the guide's MIWAE with M groups of the same particles.
Bound: its value is the importance weighted bound of K particles. It is no gradient of one function: parameters that
    model and guide share get both parts.
Reference: "Tighter Variational Bounds Are Not Necessarily Better" (Rainforth et al. 2018,
    https://arxiv.org/abs/1802.04537).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from pyro_iwae.objectives.miwae import Groups, require_groups
from pyro_iwae.objectives.objective import Objective
from pyro_iwae.options import as_count
from pyro_iwae.totals import Gather, LogMean, Totals

__all__ = ["PIWAE"]


@dataclass(frozen=True)
class PIWAE(Objective):
    """The importance weighted bound of K particles for the model, :class:`MIWAE` of the same particles for the guide.

    The guide's are parameters by which its values z are drawn. A parameter that enters the weights beside that (a
    point estimate, as in ``AutoDelta``, or a flow written as a ``Delta``) counts as the model's.

    See "Tighter Variational Bounds Are Not Necessarily Better" (Rainforth et al. 2018,
    https://arxiv.org/abs/1802.04537).

    Args:
        groups: M, which must divide K.

    Raises:
        TypeError: where it is not a whole number.
        ValueError: where it is below 1, or does not divide K.

    Example::

        >>> import torch
        >>> totals = PIWAE(2).totals(torch.tensor([0.0, 1.0, 2.0, 2.0]))
        >>> totals.value, totals.guide.value
        (tensor(1.5313), tensor(1.3101))
    """

    groups: int

    reference = "Rainforth et al. 2018, arXiv 1802.04537"

    @property
    def separates(self) -> bool:  # type: ignore[override]
        return self.groups > 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", as_count("groups", self.groups))

    def require_count(self, num_particles: int) -> None:
        require_groups(self.groups, num_particles)

    def totals(self, log_weights: Float[Tensor, "particles *plates"]) -> Totals:
        whole = LogMean.of(log_weights)
        if self.groups == 1:
            return whole
        return _Parted(whole.largest, whole.rest, whole.count, own=Groups.of(log_weights, self.groups))

    def totals_of_part(self, log_weights: Float[Tensor, "particles *plates"], start: int, count: int) -> Totals:
        whole = LogMean.of(log_weights)
        if self.groups == 1:
            return whole
        own = Groups.of_part(log_weights, self.groups, start, count)
        return _Parted(whole.largest, whole.rest, whole.count, own=own)


@dataclass(frozen=True, eq=False)
class _Parted(LogMean):
    own: Totals | None = None

    @property
    def guide(self) -> Totals:
        return self if self.own is None else self.own

    def gathered(self, gather: Gather, count: int) -> _Parted:
        whole = super().gathered(gather, count)
        own = None if self.own is None else self.own.gathered(gather, count)
        return _Parted(whole.largest, whole.rest, count, own=own)

    def part(self, start: int, stop: int) -> _Parted:
        return self if self.own is None else replace(self, own=self.own.part(start, stop))
