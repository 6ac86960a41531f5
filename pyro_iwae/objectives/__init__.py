# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Objectives in place of the importance weighted bound, one per file."""

from pyro_iwae.objectives.ciwae import CIWAE
from pyro_iwae.objectives.miwae import MIWAE
from pyro_iwae.objectives.objective import Objective
from pyro_iwae.objectives.piwae import PIWAE
from pyro_iwae.objectives.renyi import Renyi
from pyro_iwae.objectives.tvo import TVO

__all__ = ["CIWAE", "MIWAE", "PIWAE", "TVO", "Objective", "Renyi"]
