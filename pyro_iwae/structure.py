# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The verdict on a model and guide, and where verdicts are kept."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import _bound_partial
from pyro.poutine.scale_messenger import ScaleMessenger

from pyro_iwae.particles import Run
from pyro_iwae.plates import Layout, Site, candidates, plate_key, signature
from pyro_iwae.traces import Pair

__all__ = ["Structure", "StructureCache"]

MOST_KEYS = 256
MOST_ATTEMPTS = 4  # for discrete latents that happen to be the same in all particles of a check


@dataclass(frozen=True)
class Structure:
    """The verdict on a model and guide.

    Attributes:
        run: how particles are run.
        signature: the sites and plates for which the verdict holds.
        independent: keys of the independent plates: the dimension of a vectorised one, the name of a sequential one.
        joint: for each plate that could not have particles of its own, why.
        mixed: for each plate that contains every latent but is not independent, the site that prevents it.
        batch_dims: batch dimensions of each latent's value in a run without particles.
        conclusive: False where the particles of the check were all alike, so that it could see nothing.
        attempts: inspections so far of these sites and plates.
        modes: the modules that ran, held weakly, and whether each was in training.
        numbers: how many numbers the values in one run's traces hold, a measure of its memory.
        messages: what to warn of, once.
        probe: traces of one run without particles.
    """

    run: Run
    signature: tuple[Any, ...]
    independent: frozenset[int | str] = frozenset()
    mixed: Mapping[str, str] = field(default_factory=dict)
    joint: Mapping[str, str] = field(default_factory=dict)
    batch_dims: Mapping[str, int] = field(default_factory=dict)
    conclusive: bool = True
    attempts: int = 1
    modes: tuple[tuple[Any, bool], ...] = ()
    numbers: int = 0
    messages: tuple[str, ...] = ()
    probe: Pair | None = None

    @property
    def current(self) -> bool:
        """Whether all modules are in the mode that they were in."""
        return all(m() is None or m().training is mode for m, mode in self.modes)

    @property
    def settled(self) -> bool:
        """Whether to go by this verdict, or to look again: at chance, or at modules whose mode has changed since."""
        return self.current and (self.conclusive or self.attempts >= MOST_ATTEMPTS)

    def layouts(self, pair: Pair, num_particles: int) -> list[Layout]:
        """Where the columns of each node of the plate tree lie in these traces; the root first."""
        tree, found = self.run.tree, list[Layout]()
        every = self._particle_dims(num_particles)
        for i, node in enumerate(tree.nodes):
            inside = tree.inside(i) if tree.grows else {0}
            layout = candidates(pair.model, pair.guide, every, partial(self._holds, inside))
            layout = layout.keeping_keys(self.independent if i == 0 else node.keys)
            known = {} if node.parent is None else {plate_key(p): p for p in found[node.parent].plates}
            plates = tuple(known.get(plate_key(p), p) for p in layout.plates)
            dims, holds = self.run.particle_dims(num_particles, i), partial(self._holds, {i})
            found.append(Layout(plates, dims, holds))
        return found

    def _holds(self, nodes: set[int], site: Site) -> bool:
        return self.run.tree.home(site) in nodes

    def layout(self, pair: Pair, num_particles: int) -> Layout:
        """Where the columns of the root lie."""
        return self.layouts(pair, num_particles)[0]

    def _particle_dims(self, num_particles: int) -> tuple[int, ...]:
        nodes = range(len(self.run.tree.nodes))
        return tuple({d for i in nodes for d in self.run.particle_dims(num_particles, i)})

    def signature_of(self, pair: Pair, num_particles: int) -> tuple[Any, ...]:
        """The sites and plates of these traces, to compare with those of the verdict."""
        return signature(pair.model, pair.guide, self._particle_dims(num_particles))

    def describes(self, pair: Pair, num_particles: int) -> bool:
        """Whether sites and plates are those of the verdict."""
        return self.signature_of(pair, num_particles) == self.signature


class StructureCache:
    """Verdicts by model and guide, held no longer than these; forgotten in copies and pickles."""

    def __init__(self) -> None:
        self._watched: dict[int, Any] = {}
        self._verdicts: dict[Any, dict[tuple[Any, ...], list[Structure]]] = {}
        self._latest: dict[Any, Structure] = {}
        self.newest: Structure | None = None
        self.said: set[str] = set()  # what was warned of apart from the verdicts
        self.recorded: dict[Any, Any] = {}  # steps that were recorded, by model and guide and all that they hang on
        self.made: dict[Any, int] = {}  # how many were made
        self.redraws: dict[Any, bool] = {}  # whether the guide's distributions can be drawn from again
        self.enumerated: dict[Any, int] = {}  # nesting of the pairs that one particle leaves to TraceEnum_ELBO

    def __reduce__(self) -> tuple[type[StructureCache], tuple[()]]:
        return StructureCache, ()

    def key(self, *parts: Any) -> tuple[Any, ...]:
        """A key that keeps no model or guide alive, told apart by identity however they compare or hash."""
        return tuple(self._identity(p) if callable(p) else p for p in parts)

    def _identity(self, fn: Any) -> tuple[Any, ...]:
        # A scale or mask is often put on anew at each step (annealing), and changes neither values nor what they reach.
        wrapped: Any = fn.func if isinstance(fn, _bound_partial) else None
        if isinstance(wrapped, partial) and len(wrapped.args) == 2:
            handler, inner = wrapped.args
            if type(handler) in (ScaleMessenger, MaskMessenger):
                return (*self._identity(inner), type(handler))
        # A bound method is a new object at each access, so that the object behind it is what counts.
        function = getattr(fn, "__func__", None)
        owner = fn if function is None else fn.__self__
        if id(owner) not in self._watched:
            cache = weakref.ref(self)
            number = id(owner)

            def forget(dead: Any) -> None:  # before the number can be given to another object
                kept = cache()
                if kept is not None:
                    kept._forget(number)

            try:
                self._watched[number] = weakref.ref(owner, forget)
            except TypeError:  # not weakly referable: kept alive, which is safe too
                self._watched[number] = owner
        return id(owner), function

    def _forget(self, number: int) -> None:
        self._watched.pop(number, None)
        for kept in (self._latest, self._verdicts, self.enumerated, self.recorded, self.made, self.redraws):
            for key in [k for k in kept if any(isinstance(p, tuple) and p[:1] == (number,) for p in k)]:
                del kept[key]

    def latest(self, key: tuple[Any, ...]) -> Structure | None:
        """The verdict last used for this key."""
        return self._latest.get(key)

    def find(self, key: tuple[Any, ...], signature: tuple[Any, ...]) -> Structure | None:
        """The verdict for these sites and plates, and for the modes that modules are in."""
        return next((s for s in self._verdicts.get(key, {}).get(signature, ()) if s.current), None)

    def doubt(self) -> None:
        """Has each verdict taken anew at its next call: other data may mix elements that these did not."""
        self._verdicts.clear()
        self._latest = {k: replace(s, conclusive=False, attempts=0) for k, s in self._latest.items()}

    def store(self, key: tuple[Any, ...], structure: Structure) -> None:
        """Keeps a verdict and makes it the latest."""
        if key not in self._latest and len(self._latest) >= MOST_KEYS:  # arguments that are never the same twice
            self._latest.clear()
            self._verdicts.clear()
        known = self._verdicts.setdefault(key, {})
        if len(known) >= 64:  # a model that never looks the same twice
            known.clear()
        others = [s for s in known.get(structure.signature, ()) if s is not structure and not s.current]
        known[structure.signature] = [structure, *others[:7]]
        self._latest[key] = self.newest = structure
