# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The contract that every gradient estimator keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from pyro_iwae.logweights import LogWeights, Totals

__all__ = ["Gradient"]


class Gradient(ABC):
    """Turns log weights into a surrogate whose ``backward()`` is the estimator of the bound's gradient.

    A class is either this contract or a leaf. What an estimator promises is data on it, and the tests hold it to
    that: ``unbiased`` for K > 1, what it ``needs`` of a guide site, and its ``reference``.
    """

    unbiased: ClassVar[bool]
    needs: ClassVar[str]
    reference: ClassVar[str]

    @abstractmethod
    def surrogate(self, weights: LogWeights, totals: Totals) -> Float[Tensor, "*plates"]:
        """Builds the surrogate.

        Args:
            weights: the particles at hand, with their graph.
            totals: totals over *all* K particles, of which ``weights`` may be a part.

        Returns:
            One value per independent element, shape ``(*plates)``. Its gradient is the estimator, its value means
            nothing: sum_k v_k log w_k, for one, is never below the bound.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
