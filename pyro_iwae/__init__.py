# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Importance weighted inference for Pyro.

After "Reinterpreting Importance-Weighted Autoencoders" (Cremer, Morris, Duvenaud 2017,
https://arxiv.org/abs/1704.02916). Importing the package changes nothing in torch or Pyro.
"""

import pyro_iwae.versions  # noqa: F401  first: raises where torch or Pyro is too old for what follows

# isort: split
from pyro_iwae.checkpoint import Checkpoint
from pyro_iwae.citation import citation
from pyro_iwae.compiled_svi import CompiledSVI
from pyro_iwae.elbo import ImportanceWeightedELBO
from pyro_iwae.evaluating import evaluate
from pyro_iwae.evaluation import Evaluation
from pyro_iwae.gradient_snr import gradient_snr
from pyro_iwae.gradients import OVIS, VIMCO, DoublyReparameterized, Pathwise, SampledBackward, StickTheLanding
from pyro_iwae.guide import ImportanceResampledGuide
from pyro_iwae.inference_data import to_inference_data
from pyro_iwae.logweights import LogWeights
from pyro_iwae.monitor import Monitor
from pyro_iwae.objectives import CIWAE, MIWAE, PIWAE, TVO, Renyi
from pyro_iwae.preflight import preflight
from pyro_iwae.tradeoff import Tradeoff, tradeoff

__version__ = "0.1.0"

__all__ = [
    "CIWAE",
    "MIWAE",
    "OVIS",
    "PIWAE",
    "TVO",
    "VIMCO",
    "Checkpoint",
    "CompiledSVI",
    "DoublyReparameterized",
    "Evaluation",
    "ImportanceResampledGuide",
    "ImportanceWeightedELBO",
    "LogWeights",
    "Monitor",
    "Pathwise",
    "Renyi",
    "SampledBackward",
    "StickTheLanding",
    "Tradeoff",
    "citation",
    "evaluate",
    "gradient_snr",
    "preflight",
    "to_inference_data",
    "tradeoff",
]
