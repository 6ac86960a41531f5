# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient estimators, one per file; ``README.md`` beside this file is the table of them."""

from pyro_iwae.gradients.gradient import Gradient
from pyro_iwae.gradients.pathwise import Pathwise
from pyro_iwae.gradients.vimco import VIMCO

__all__ = ["VIMCO", "Gradient", "Pathwise"]
