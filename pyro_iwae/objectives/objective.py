# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The contract that every objective keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from pyro_iwae.options import as_count
from pyro_iwae.totals import Totals

__all__ = ["Objective"]


class Objective(ABC):
    """A function of the K log weights of each independent element, to be maximised in place of their log-mean-exp.

    Attributes:
        separates: whether the guide's parameters have an objective of their own.
        reference: who introduced it.
    """

    separates: ClassVar[bool] = False
    reference: ClassVar[str]

    def require_count(self, num_particles: int) -> None:
        """Raises ValueError where K does not suit it, before any particle is drawn."""
        as_count("num_particles", num_particles)

    @abstractmethod
    def totals(self, log_weights: Float[Tensor, "particles *plates"]) -> Totals:
        """The objective at all K particles.

        Raises:
            ValueError: where K does not suit it.
        """

    def totals_of_part(self, log_weights: Float[Tensor, "particles *plates"], start: int, count: int) -> Totals:
        """What some of the particles have in it, to be gathered with what the others have.

        Args:
            log_weights: of particles ``start`` and following.
            start: the first one's number.
            count: K.
        """
        return self.totals(log_weights)
