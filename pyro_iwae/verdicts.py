# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The verdict to go by for a call: the one that is known, or a new look at model and guide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pyro_iwae.announcements import announce
from pyro_iwae.handlers import Minibatch
from pyro_iwae.inspection import inspect
from pyro_iwae.particles import Call
from pyro_iwae.structure import Structure, StructureCache
from pyro_iwae.switches import switches
from pyro_iwae.tree import PlateParticles

__all__ = ["Question"]


@dataclass(frozen=True)
class Question:
    """What there is to know before a call is run.

    Attributes:
        call: what to run.
        cache: where the verdicts are kept.
        num_particles: K.
        vectorize: True and False force; None goes by the inspection.
        max_plate_nesting: as for ``Trace_ELBO``.
        warn_of_enumeration: warn where K > 1 samples guide sites that ask for enumeration.
        minibatch: indices that are settled already.
        plate_particles: the plates that have particles of their own.
    """

    call: Call
    cache: StructureCache
    num_particles: int
    vectorize: bool | None
    max_plate_nesting: float
    warn_of_enumeration: bool = True
    minibatch: Minibatch | None = None
    plate_particles: PlateParticles | None = None

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What the verdict is kept by."""
        call = self.call
        plates = tuple((f.name, f.dim) for f in call.enclosing)
        options = self.vectorize, self.max_plate_nesting, self.plate_particles
        return self.cache.key(call.model, call.guide, plates, *options, switches(call.args, call.kwargs))

    @cached_property
    def known(self) -> Structure | None:
        """The verdict that there is, settled or not."""
        known = self.cache.latest(self.key)
        if known is not None and not known.current:
            return self.cache.find(self.key, known.signature) or known
        return known

    def answer(self) -> Structure:
        """The verdict to go by at first."""
        return self.look() if self.known is None or not self.known.settled else self.known

    def look(self) -> Structure:
        """A new one, which is the latest from then on."""
        structure = inspect(
            replace(self.call, drawing=None),
            vectorize=self.vectorize,
            max_plate_nesting=self.max_plate_nesting,
            minibatch=self.minibatch,
            plate_particles=self.plate_particles,
        )
        latest = self.cache.latest(self.key)
        structure = announce(structure, self.num_particles, self.warn_of_enumeration, latest)
        attempts = self.known.attempts + 1 if self.known is not None and self.known.current else 1
        structure = replace(structure, probe=None, attempts=attempts)
        self.cache.store(self.key, structure)
        return structure
