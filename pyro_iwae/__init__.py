# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Importance weighted inference for Pyro.

After "Reinterpreting Importance-Weighted Autoencoders" (Cremer, Morris, Duvenaud 2017,
https://arxiv.org/abs/1704.02916). Importing the package changes nothing in torch or Pyro.
"""

from pyro_iwae.elbo import ImportanceWeightedELBO
from pyro_iwae.gradients import VIMCO, Pathwise
from pyro_iwae.guide import ImportanceResampledGuide
from pyro_iwae.logweights import LogWeights
from pyro_iwae.preflight import preflight

__version__ = "0.1.0"

__all__ = [
    "VIMCO",
    "ImportanceResampledGuide",
    "ImportanceWeightedELBO",
    "LogWeights",
    "Pathwise",
    "preflight",
]
