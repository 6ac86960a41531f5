# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What a trace does not show: whether particles may share one vectorised run, and whether a site mixes elements.

Both are found by running model and guide again, once for each pair of them, with all that is random (generators,
minibatches, buffers) put back afterwards.

A plate is independent if and only if no log density changes at an element whose own latents stay while those of others
are moved. Particles can share a run only if they pass the same check.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_iwae.branching import Branching
from pyro_iwae.crossing import close, enough_particles, roughly_close, site_values
from pyro_iwae.densities import varies_along
from pyro_iwae.drawn import settable
from pyro_iwae.graphless import graph_if
from pyro_iwae.handlers import Minibatch
from pyro_iwae.particles import Call, Run, batch_dim
from pyro_iwae.plates import (
    IndependentPlate,
    Layout,
    candidates,
    latent_sites,
    nesting,
    plate_key,
    sample_sites,
    signature,
)
from pyro_iwae.state import unchanged_state
from pyro_iwae.structure import Structure
from pyro_iwae.terms import terms_of
from pyro_iwae.traces import Pair, require_site_shapes
from pyro_iwae.tree import CHANGING_SITES, PlateParticles
from pyro_iwae.trial import CHECK_PARTICLES, Trial

__all__ = ["inspect"]


def inspect(
    call: Call,
    *,
    vectorize: bool | None,
    max_plate_nesting: float = math.inf,
    minibatch: Minibatch | None = None,
    plate_particles: PlateParticles | None = None,
) -> Structure:
    """Runs model and guide a few times, leaving no trace of it, and returns the verdict.

    Args:
        call: what to run.
        vectorize: True and False force; None finds out.
        max_plate_nesting: as for ``Trace_ELBO``; infinity finds out.
        minibatch: indices that are settled already.
        plate_particles: the plates that are to have particles of their own.
    """
    with poutine.block(), unchanged_state(call.model, call.guide) as modules:
        shared = Minibatch()
        shared.indices.update({} if minibatch is None else minibatch.indices)
        return _Inspection(Trial(call, modules, shared)).verdict(vectorize, max_plate_nesting, plate_particles)


class _Inspection:
    """One inspection: the runs that it makes share one minibatch."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.call = trial.call
        self.messages: list[str] = []

    def verdict(
        self, vectorize: bool | None, max_plate_nesting: float, plate_particles: PlateParticles | None
    ) -> Structure:
        probe, grad = self._probe()
        self.trial.probed = (probe.model, probe.guide)
        run = Run(self._depth(probe, max_plate_nesting), False, _asks_enumeration(probe))
        self.trial.batch_dims = {n: batch_dim(s) for n, s in latent_sites(probe.guide)}
        with graph_if(grad):
            if run.enumerated:
                (pair,) = self.trial.particles(1, run)
                terms_of(pair, Layout(), None)  # what cannot be summed out raises here, whatever the run
            else:
                require_site_shapes(probe, run.depth)
            if vectorize is not False:
                run = self._vectorized(run, forced=vectorize is True)
            independent, mixed, conclusive = self._independent(run, probe)
            joint: dict[str, str] = {}
            if plate_particles is not None:
                run, joint = self._branched(run, independent, plate_particles, forced=vectorize is True)
                self.messages += dict.fromkeys(joint.values())
        self._warn_of_batch_norm()
        return Structure(
            run=run,
            signature=signature(probe.model, probe.guide),
            independent=independent,
            mixed=mixed,
            joint=joint,
            batch_dims=self.trial.batch_dims,
            conclusive=conclusive,
            numbers=sum(s["value"].numel() for _, _, s in probe.sites()),
            modes=tuple((weakref.ref(m), m.training) for m in self.trial.modules),
            messages=tuple(self.messages),
            probe=probe,
        )

    def _probe(self) -> tuple[Pair, bool]:
        """One run, without a graph, to save memory; with one where model or guide takes gradients of its own."""
        alone = Run(0, False, False)
        try:
            with graph_if(False):
                return self.trial.particles(1, alone)[0], False
        except RuntimeError:
            return self.trial.particles(1, alone)[0], torch.is_grad_enabled()

    def _depth(self, probe: Pair, max_plate_nesting: float) -> int:
        depth = nesting((probe.model, probe.guide))
        if max_plate_nesting == math.inf:
            return depth
        frames = [f for _, _, s in probe.sites() for f in s["cond_indep_stack"] if f.vectorized]
        own = [f for f in frames if f not in self.call.enclosing]
        for frame in own:
            if -frame.dim > max_plate_nesting:
                raise ValueError(
                    f"expected plates within max_plate_nesting={max_plate_nesting} dimensions, got plate "
                    f"'{frame.name}' at dim={frame.dim}; raise max_plate_nesting, or leave it out to have it found"
                )
        return max(depth, int(max_plate_nesting))

    # Vectorisation: a particle's terms must be those of a sequential replay of its values.

    def _vectorized(self, run: Run, *, forced: bool) -> Run:
        wide = Run(run.depth, True, run.enumerated)
        if forced:
            return wide
        try:
            fault = self._vectorization_fault(self.trial.particles(CHECK_PARTICLES, wide), wide, run)
        except Exception as error:  # whatever the model raises: it has just run well without vectorisation
            reason = next(iter(str(error).splitlines()), "")  # the rest is a table of shapes
            fault = f"the vectorised run failed with {type(error).__name__}: {reason}"
        if fault is None:
            return wide
        self._say_sequential(fault)
        return run

    def _say_sequential(self, fault: str) -> None:
        self.messages.append(
            f"particles are run one after the other, because {fault}. Make model and guide broadcast over a plate on "
            "the left of their own (dims counted from the right, as in dim=-1) to have them run in one pass, or pass "
            "vectorize_particles=False to silence this"
        )

    def _vectorization_fault(self, pairs: list[Pair], wide: Run, narrow: Run) -> str | None:
        """What is not the same in both ways of running, if anything; None also where two like runs differ."""
        fault, _ = self.trial.mixing_fault(pairs, Layout((), wide.particle_dims(CHECK_PARTICLES)), wide)
        if fault is not None:
            return f"{fault[0]} site '{fault[1]}' of one particle follows the latents of others in a vectorised run"
        values = self.trial.values(pairs, wide, CHECK_PARTICLES)
        count = CHECK_PARTICLES
        together, alone = (self.trial.replay(pairs, values, run, count) for run in (wide, narrow))
        if together.keys() != alone.keys():
            names = sorted({n for _, n in together.keys() ^ alone.keys()})
            return f"sites {names} appear in only one of a vectorised and a sequential run"
        eps = self._coarsest(values)
        faulty = [k for k, v in alone.items() if not roughly_close(v, together[k], eps)]
        if not faulty:
            return None
        like, again = (self.trial.replay(pairs, values, run, count) for run in (wide, narrow))
        for key in faulty:
            if close(alone[key], again[key]) and roughly_close(like[key], together[key]):
                one, other = together[key].flatten(1).sum(1), alone[key].flatten(1).sum(1)
                worst = int((one - other).abs().nan_to_num(nan=math.inf).argmax())
                one, other = torch.broadcast_tensors(one, other)
                return (
                    f"{key[0]} site '{key[1]}' has log density {one[worst].item():.6g} in a vectorised run and "
                    f"{other[worst].item():.6g} in a sequential replay of the same values"
                )
        return None

    def _coarsest(self, values: Mapping[str, Tensor]) -> float:
        """The coarsest precision that model and guide compute with."""
        drawn = [v.dtype for v in values.values() if v.is_floating_point()]
        parameters = [p.dtype for m in self.trial.modules for p in m.parameters() if p.is_floating_point()]
        return max((torch.finfo(t).eps for t in drawn + parameters), default=0.0)

    # Independence: hybrids of two particles.

    def _independent(self, run: Run, probe: Pair) -> tuple[frozenset[int | str], dict[str, str], bool]:
        found = candidates(probe.model, probe.guide)
        if not found.plates:
            return frozenset(), {}, True
        if not any(True for t in (probe.model, probe.guide) for _ in latent_sites(t)):
            return frozenset(plate_key(p) for p in found.plates), {}, True
        count = (
            CHECK_PARTICLES
            if run.vectorized
            else min(CHECK_PARTICLES // 2, enough_particles(math.prod(p.size for p in found.plates)))
        )
        pairs = self.trial.particles(count, run)
        layout = candidates(pairs[0].model, pairs[0].guide, run.particle_dims(count))
        fault, conclusive = self.trial.mixing_fault(pairs, layout, run)
        if fault is None:
            return frozenset(plate_key(p) for p in layout.plates), {}, conclusive
        kept: tuple[IndependentPlate, ...] = ()
        mixed = {}
        for plate in layout.plates:
            fault, told = self.trial.mixing_fault(pairs, layout.keeping((*kept, plate)), run)
            conclusive &= told
            if fault is None:
                kept = (*kept, plate)
            else:
                mixed[plate.name] = fault[1]
        return frozenset(plate_key(p) for p in kept), mixed, conclusive

    # The plate tree: a site that follows the particles of a plate shows it in a vectorised run, whatever its numbers.

    def _branched(
        self, run: Run, independent: frozenset[int | str], wanted: PlateParticles, *, forced: bool
    ) -> tuple[Run, dict[str, str]]:
        """How particles are run where plates have their own, and why some plates have none."""
        pairs = self.trial.particles(CHECK_PARTICLES if run.vectorized else CHECK_PARTICLES // 2, run)
        branching = Branching(self.trial, pairs, run, independent, wanted)
        if branching.left_out():  # named plates have raised
            self.messages.append(
                f"plate_particles='auto' has no effect: the guide draws nothing inside plates {branching.left_out()}, "
                "only outside; write a guide that draws their latents there (AutoNormal)"
            )
        while True:
            tree, joint = branching.find()
            grown = replace(run, tree=tree)
            if not run.vectorized or not tree.grows:
                return grown, joint
            try:
                shown, fault = self._tree_fault(grown.small(), forced)
            except Exception as error:
                if forced:
                    raise
                reason = next(iter(str(error).splitlines()), "")
                shown, fault = [], f"the vectorised run failed with {type(error).__name__}: {reason}"
            if fault is not None:
                self._say_sequential(fault)
                return replace(grown, vectorized=False), joint
            if not any([branching.learn(tree, node, name) for name, node in shown]):
                return grown, joint

    def _tree_fault(self, run: Run, forced: bool) -> tuple[list[tuple[str, int]], str | None]:
        """Sites that follow particles of a node that they do not belong to; or what is not as in a sequential run."""
        (pair,) = pairs = self.trial.particles(2, run)
        nodes = range(len(run.tree.nodes))
        shown = [
            (name, node)
            for _, name, site in pair.sites()
            for node in set(nodes) - set(run.tree.path(run.tree.home(site)))
            if varies_along(site, run.depth_of(node))
        ]
        if shown or forced:
            return shown, None
        for name, site in latent_sites(pair.guide) if run.tree.combined else ():
            home = run.tree.home(site)
            if any(varies_along(site, run.depth_of(node)) for node in run.tree.path(home)[1:]):
                plate = run.tree.nodes[home].plate
                return [], f"guide site '{name}' of plate '{plate}' is drawn anew for each particle further out"
        together = site_values(pairs, None)
        latents = {n: s["value"].detach() for n, s in latent_sites(pair.guide) if settable(s)}
        for place in ({i: 0 for i in nodes}, {i: 1 for i in nodes}, {i: int(i > 0) for i in nodes}):
            fault = self._place_fault(run, together, latents, pair, place)
            if fault is not None:
                return [], fault
        return [], None

    def _place_fault(
        self,
        run: Run,
        together: Mapping[Any, Tensor],
        latents: Mapping[str, Tensor],
        pair: Pair,
        place: Mapping[int, int],
    ) -> str | None:
        """What differs for one particle of each node, if a second look at both ways of running says so, too."""
        narrow = Run(run.depth, False, run.enumerated)
        events = {n: s["fn"].event_dim for n, s in latent_sites(pair.guide)}

        def here(densities: Tensor) -> Tensor:  # in front is the number of the trace: there is one
            return run.at_place(densities[0], place, 0).unsqueeze(0)

        def single(name: str, value: Tensor) -> Tensor:
            own = self.trial.batch_dims[name] + events[name]
            value = run.at_place(value, place, events[name])
            return value.reshape(1, *value.shape[value.dim() - own :])

        values = {n: single(n, v) for n, v in latents.items()}

        def alone() -> dict[tuple[str, str], Tensor]:
            return site_values(self.trial.particles(1, narrow, values), None)

        found, eps = alone(), self._coarsest(values)
        if found.keys() != together.keys():
            raise ValueError(CHANGING_SITES)
        faulty = [k for k, v in found.items() if not roughly_close(v, here(together[k]), eps)]
        if not faulty:
            return None
        again, like = alone(), site_values(self.trial.particles(2, run, latents), None)
        for key in faulty:
            if close(found[key], again[key]) and roughly_close(like[key], together[key]):
                return (
                    f"{key[0]} site '{key[1]}' has log density {here(together[key]).sum().item():.6g} in a vectorised "
                    f"run with particles of plates, and {found[key].sum().item():.6g} in a run of the same values alone"
                )
        return None

    def _warn_of_batch_norm(self) -> None:
        norms = [m for m in self.trial.modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
        if norms:
            self.messages.append(
                f"{type(norms[0]).__name__} in training mode normalises over the particles and rows that it is given, "
                "so that a particle's weight depends on the others. Use LayerNorm or GroupNorm, or call .eval() on it"
            )


def _asks_enumeration(pair: Pair) -> bool:
    return any(
        s["infer"].get("enumerate") == "parallel"
        for n, s in sample_sites(pair.model)
        if not s["is_observed"] and n not in pair.guide.nodes
    )
