# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Finds the plate tree: which plates can have particles of their own, inside which, and which sites belong to each.

A plate can if, all else held, no density changes at one of its elements, nor outside of it, where the latents of other
elements are moved. A site belongs to the innermost node whose latents reach it, and these nodes must lie inside one
another. Where plates cross (a site that two plates' latents reach, neither plate inside the other) the latents of one
of them move out, to be weighed jointly with those around them; as few as possible do.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pyro_iwae.drawn import settable
from pyro_iwae.particles import Run
from pyro_iwae.plates import IndependentPlate, Layout, Site, candidates, frame_size, label, latent_sites, plate_scale
from pyro_iwae.plates import sample_sites
from pyro_iwae.structure import plate_key
from pyro_iwae.terms import enumerated_dims
from pyro_iwae.traces import Pair
from pyro_iwae.tree import Node, PlateParticles, Tree
from pyro_iwae.trial import Trial

__all__ = ["Branching"]

Chain = tuple[str, ...]  # plates from the root to a latent


@dataclass(frozen=True)
class Fault:
    """Why a tree cannot be: the plates at fault, and what to say."""

    plates: frozenset[str]
    reason: str


class Branching:
    """One search for a tree.

    Args:
        trial: runs to look at.
        pairs: particles of a run without plate particles.
        run: how they were run.
        independent: keys of the plates that are independent at the root.
        wanted: what the user asked for.
    """

    def __init__(
        self, trial: Trial, pairs: list[Pair], run: Run, independent: frozenset[int | str], wanted: PlateParticles
    ) -> None:
        self.trial = trial
        self.pairs = pairs
        self.run = run
        self.independent = independent
        self.wanted = wanted
        self.further: dict[str, set[str]] = {}  # latents that reach a site, as the shape of its density shows
