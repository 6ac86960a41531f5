# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A log weight taken apart: log q of the reparameterised sites, and all else, both evaluated at leaves.

So the ways by which a parameter reaches it can be told apart: through a density directly, or through z.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from pyro_iwae.ways import Ways

__all__ = ["Cut"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What an estimator needs beside the log weights to treat the ways through z by themselves.

    Attributes:
        ways: the values that were cut, of all nodes of the plate tree.
        rest: the part of the node's own log weights that is neither ``log_q`` nor that of score-function sites,
            ``(particles, *plates)``: log p, and what the guide adds without drawing (a flow written by hand).
        log_q: log q of the node's cut sites as it enters the weights, ``(particles, *plates)``.
        scale: the one scale that multiplies ``log_q`` inside the weights; None where sites differ in it.
        downstream: a cut site and a score-function site whose law depends on it, if there are such.
    """

    ways: Ways
    rest: Float[Tensor, "particles *plates"]
    log_q: Float[Tensor, "particles *plates"]
    scale: float | Tensor | None
    downstream: tuple[str, str] | None
