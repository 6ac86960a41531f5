# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient estimators, one per file; ``README.md`` beside this file is the table of them."""

from pyro_iwae.gradients.coefficients import Coefficients
from pyro_iwae.gradients.doubly_reparameterized import DoublyReparameterized
from pyro_iwae.gradients.gradient import Gradient, PathGradient, ScoreGradient
from pyro_iwae.gradients.ovis import OVIS
from pyro_iwae.gradients.pathwise import Pathwise
from pyro_iwae.gradients.sampled_backward import SampledBackward
from pyro_iwae.gradients.stick_the_landing import StickTheLanding
from pyro_iwae.gradients.vimco import VIMCO

__all__ = [
    "OVIS",
    "VIMCO",
    "Coefficients",
    "DoublyReparameterized",
    "Gradient",
    "PathGradient",
    "Pathwise",
    "SampledBackward",
    "ScoreGradient",
    "StickTheLanding",
]
