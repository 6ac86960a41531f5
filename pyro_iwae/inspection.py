# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What a trace does not show: whether particles may share one vectorised run, and whether a site mixes elements.

Both are found by running model and guide again, once for each pair of them, with all that is random (generators,
minibatches, buffers) put back afterwards.

Mixing check: give some elements of a plate the latents of another particle and replay. The plate is independent if and
only if no log density changes at an element whose own latents stayed. Particles can share a run only if they pass the
same check.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_iwae.crossing import (
    close,
    cross_elements,
    enough_particles,
    first_mixed,
    other_values,
    roughly_close,
    separating_rounds,
    site_values,
)
from pyro_iwae.drawn import Drawn, settable
from pyro_iwae.handlers import Minibatch
from pyro_iwae.particles import Call, Run, batch_dim, run_particles, spread_value, stacked_latents
from pyro_iwae.plates import IndependentPlate, Layout, Site, candidates, latent_sites, nesting, sample_sites, signature
from pyro_iwae.state import get_random_state, moved_slightly, set_random_state, unchanged_state
from pyro_iwae.structure import Structure, plate_key
from pyro_iwae.terms import terms_of
from pyro_iwae.traces import Pair, require_site_shapes

__all__ = ["inspect"]

CHECK_PARTICLES = 8  # in a vectorised run; sequential ones make do with half


def inspect(
    call: Call, *, vectorize: bool | None, max_plate_nesting: float = math.inf, minibatch: Minibatch | None = None
) -> Structure:
    """Runs model and guide a few times, leaving no trace of it, and returns the verdict.

    Args:
        call: what to run.
        vectorize: True and False force; None finds out.
        max_plate_nesting: as for ``Trace_ELBO``; infinity finds out.
        minibatch: indices that are settled already.
    """
    with poutine.block(), unchanged_state(call.model, call.guide) as modules:
        inspection = _Inspection(call, modules)
        inspection.minibatch.indices.update({} if minibatch is None else minibatch.indices)
        return inspection.verdict(vectorize, max_plate_nesting)


class _Inspection:
    """One inspection: the runs that it makes share one minibatch."""

    def __init__(self, call: Call, modules: Mapping[torch.nn.Module, Any]) -> None:
        self.call = call
        self.modules = modules
        self.minibatch = Minibatch()
        self.messages: list[str] = []

    def verdict(self, vectorize: bool | None, max_plate_nesting: float) -> Structure:
        probe, grad = self._probe()
        self.probed = (probe.model, probe.guide)
        run = Run(self._depth(probe, max_plate_nesting), False, _asks_enumeration(probe))
        self.batch_dims = {n: batch_dim(s) for n, s in latent_sites(probe.guide)}
        with torch.set_grad_enabled(grad):
            if run.enumerated:
                (pair,) = self.particles(1, run)
                terms_of(pair, Layout(), None)  # what cannot be summed out raises here, whatever the run
            else:
                require_site_shapes(probe, run.depth)
            if vectorize is not False:
                run = self._vectorized(run, forced=vectorize is True)
            independent, mixed, conclusive = self._independent(run, probe)
        self._warn_of_batch_norm()
        return Structure(
            run=run,
            signature=signature(probe.model, probe.guide),
            independent=independent,
            mixed=mixed,
            batch_dims=self.batch_dims,
            conclusive=conclusive,
            numbers=sum(s["value"].numel() for _, _, s in probe.sites()),
            modes=tuple((weakref.ref(m), m.training) for m in self.modules),
            messages=tuple(self.messages),
            probe=probe,
        )

    def _probe(self) -> tuple[Pair, bool]:
        """One run, without a graph, to save memory; with one where model or guide takes gradients of its own."""
        alone = Run(0, False, False)
        try:
            with torch.no_grad():
                return self.particles(1, alone)[0], False
        except RuntimeError:
            return self.particles(1, alone)[0], torch.is_grad_enabled()

    def particles(
        self, count: int, run: Run, values: Mapping[str, Tensor] | None = None, call: Call | None = None
    ) -> list[Pair]:
        return run_particles(call or self.call, num_particles=count, run=run, minibatch=self.minibatch, values=values)

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
            fault = self._vectorization_fault(self.particles(CHECK_PARTICLES, wide), wide, run)
        except Exception as error:  # whatever the model raises: it has just run well without vectorisation
            reason = next(iter(str(error).splitlines()), "")  # the rest is a table of shapes
            fault = f"the vectorised run failed with {type(error).__name__}: {reason}"
        if fault is None:
            return wide
        self.messages.append(
            f"particles are run one after the other, because {fault}. Make model and guide broadcast over a plate on "
            "the left of their own (dims counted from the right, as in dim=-1) to have them run in one pass, or pass "
            "vectorize_particles=False to silence this"
        )
        return run

    def _vectorization_fault(self, pairs: list[Pair], wide: Run, narrow: Run) -> str | None:
        """What is not the same in both ways of running, if anything; None also where two like runs differ."""
        fault, _ = self._mixing_fault(pairs, Layout((), wide.particle_dim(CHECK_PARTICLES)), wide)
        if fault is not None:
            return f"{fault[0]} site '{fault[1]}' of one particle follows the latents of others in a vectorised run"
        values = self._values(pairs, wide, CHECK_PARTICLES)
        count = CHECK_PARTICLES
        together, alone = (self._replay(pairs, values, run, count) for run in (wide, narrow))
        if together.keys() != alone.keys():
            names = sorted({n for _, n in together.keys() ^ alone.keys()})
            return f"sites {names} appear in only one of a vectorised and a sequential run"
        eps = self._coarsest(values)
        faulty = [k for k, v in alone.items() if not roughly_close(v, together[k], eps)]
        if not faulty:
            return None
        like, again = (self._replay(pairs, values, run, count) for run in (wide, narrow))
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
        parameters = [p.dtype for m in self.modules for p in m.parameters() if p.is_floating_point()]
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
        pairs = self.particles(count, run)
        layout = candidates(pairs[0].model, pairs[0].guide, run.particle_dim(count))
        fault, conclusive = self._mixing_fault(pairs, layout, run)
        if fault is None:
            return frozenset(plate_key(p) for p in layout.plates), {}, conclusive
        kept: tuple[IndependentPlate, ...] = ()
        mixed = {}
        for plate in layout.plates:
            fault, _ = self._mixing_fault(pairs, layout.keeping((*kept, plate)), run)
            if fault is None:
                kept = (*kept, plate)
            else:
                mixed[plate.name] = fault[1]
        return frozenset(plate_key(p) for p in kept), mixed, True

    def _mixing_fault(self, pairs: list[Pair], layout: Layout, run: Run) -> tuple[tuple[str, str] | None, bool]:
        """The site that mixes elements, if any; and whether the particles differed enough to tell.

        At parameters a little off, if that can be: a coupling that starts at 0 will not stay there.
        """
        try:
            with moved_slightly(self._parameters()):
                return self._crossing_fault(pairs, layout, run, finite=True)
        except Exception:  # such parameters may be impossible; what is wrong with the true ones shows in the next run
            return self._crossing_fault(pairs, layout, run, finite=False)

    def _parameters(self) -> list[Tensor]:
        """All that may be trained: parameters in Pyro's store and in modules, that model and guide have touched."""
        found: list[Any] = [p for m in self.modules for p in m.parameters(recurse=False)]
        stored: list[Any] = [s["value"] for t in self.probed for s in t.nodes.values() if s["type"] == "param"]
        found += [p.unconstrained() if hasattr(p, "unconstrained") else p for p in stored]
        return list({id(p): p for p in found if p.is_leaf and p.requires_grad and p.is_floating_point()}.values())

    def _crossing_fault(
        self, pairs: list[Pair], layout: Layout, run: Run, *, finite: bool
    ) -> tuple[tuple[str, str] | None, bool]:
        """All replays see the same random numbers, for models with randomness of their own."""
        count = CHECK_PARTICLES if run.vectorized else len(pairs)
        values = self._values(pairs, run, count)
        latents = dict(latent_sites(pairs[0].guide))
        others = {n: other_values(v, latents[n]) for n, v in values.items()}
        sites = {(role, name): site for role, name, site in pairs[0].sites()}
        unmoved = {n for n in values if settable(latents[n])}
        seed = get_random_state()
        before = self._replay(pairs, values, run, count)
        if finite and not all(bool(v.isfinite().all()) for v in before.values()):
            raise ValueError("expected finite densities")
        for moved in separating_rounds(count, [p.size for p in layout.plates]):
            crossed = {n: cross_elements(v, layout.align(moved, latents[n], v), others[n]) for n, v in values.items()}
            unmoved -= {n for n in unmoved if bool((crossed[n] != values[n]).any())}
            set_random_state(seed)
            after = self._replay(pairs, crossed, run, count)
            fault = first_mixed(before, after, sites, moved, layout)
            if fault is not None:
                return fault, True
        return None, not unmoved

    def _replay(
        self, pairs: Sequence[Pair], values: Mapping[str, Tensor], run: Run, count: int
    ) -> dict[tuple[str, str], Tensor]:
        """Densities in model and guide at given values of the guide's latents; in the model alone if need be."""
        sites = dict(latent_sites(pairs[0].guide))
        dim = run.particle_dim(count)
        spread = {n: spread_value(v, sites[n], run) for n, v in values.items()}
        own = {n: v for n, v in spread.items() if settable(sites[n])}
        try:
            return site_values(self.particles(count, run, own), dim)
        except (NotImplementedError, KeyError):  # a flow without an inverse cannot be asked for a density
            shaped = {n: v[0] if dim is None else v for n, v in spread.items()}
            pairs = self.particles(count, run, spread, replace(self.call, guide=_stand_in(sites, shaped)))
            return {k: v for k, v in site_values(pairs, dim).items() if k[0] == "model"}

    def _values(self, pairs: Sequence[Pair], run: Run, count: int) -> dict[str, Tensor]:
        stacked = stacked_latents(pairs, run=run, num_particles=count, batch_dims=self.batch_dims)
        return {n: v.detach() for n, v in stacked.items()}

    def _warn_of_batch_norm(self) -> None:
        norms = [m for m in self.modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
        if norms:
            self.messages.append(
                f"{type(norms[0]).__name__} in training mode normalises over the particles and rows that it is given, "
                "so that a particle's weight depends on the others. Use LayerNorm or GroupNorm, or call .eval() on it"
            )


def _stand_in(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> Callable[..., None]:
    """A guide that only holds the sites, each with a value of the right shape; others can be given to it."""

    def guide(*args: Any, **kwargs: Any) -> None:
        for name, site in sites.items():
            pyro.sample(name, Drawn(values[name], event_dim=site["fn"].event_dim), infer=site["infer"])

    return guide


def _asks_enumeration(pair: Pair) -> bool:
    return any(
        s["infer"].get("enumerate") == "parallel"
        for n, s in sample_sites(pair.model)
        if not s["is_observed"] and n not in pair.guide.nodes
    )
