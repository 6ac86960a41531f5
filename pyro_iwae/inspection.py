# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What a trace does not show: whether particles may share one vectorised run, and whether a site mixes elements.

Both are found by running model and guide again, once for each pair of them, with all that is random (generators,
minibatches, buffers) put back afterwards.

Mixing check: give some elements of a plate the latents of another particle and replay. The plate is independent if and
only if no term changes at an element whose own latents stayed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_iwae.crossing import close, cross_elements, enough_particles, first_mixed, other_values, separating
from pyro_iwae.particles import (
    Call,
    Drawn,
    Minibatch,
    Run,
    batch_dim,
    run_particles,
    settable,
    spread_value,
    stacked_latents,
)
from pyro_iwae.plates import IndependentPlate, Layout, Site, candidates, latent_sites, nesting, sample_sites, signature
from pyro_iwae.structure import Structure, plate_key
from pyro_iwae.terms import Term, outer_scale, terms_of
from pyro_iwae.traces import Pair, require_site_shapes

__all__ = ["inspect", "unchanged_state"]

CHECK_PARTICLES = 8  # in a vectorised check; the mixing check of sequential runs makes do with two


@contextmanager
def unchanged_state() -> Iterator[dict[torch.nn.Module, dict[str, Tensor]]]:
    """Puts random generators and module buffers back; yields the modules that were called, with their buffers."""
    rng = get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    seen: dict[torch.nn.Module, dict[str, Tensor]] = {}

    def remember(module: torch.nn.Module, inputs: Any) -> None:
        if module not in seen:
            seen[module] = {n: b.clone() for n, b in module.named_buffers(recurse=False)}

    hook = torch.nn.modules.module.register_module_forward_pre_hook(remember)
    try:
        yield seen
    finally:
        hook.remove()
        set_rng_state(rng)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        with torch.no_grad():
            for module, buffers in seen.items():
                for name, value in buffers.items():
                    getattr(module, name).copy_(value)


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
    with unchanged_state() as modules, poutine.block():
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
        (probe,) = self.particles(1, Run(0, False, False))
        run = Run(self._depth(probe, max_plate_nesting), False, _asks_enumeration(probe))
        self.batch_dims = {n: batch_dim(s) for n, s in latent_sites(probe.guide)}
        if run.enumerated:
            _tables(self.particles(1, run), Layout())  # what cannot be summed out raises here, whatever the run
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
        """The site that is not the same in both ways of running, if any; None also where two like runs differ."""
        count, total = CHECK_PARTICLES, Layout((), wide.particle_dim(CHECK_PARTICLES))
        values = self._values(pairs, wide, count)
        together, alone = _tables(pairs, total), self._replay(pairs, values, narrow, count, Layout())
        together = {k: t for k, t in together.items() if k in alone or k[0] == "model"}
        if together.keys() != alone.keys():
            names = sorted({n for _, n in together.keys() ^ alone.keys()})
            return f"sites {names} appear in only one of a vectorised and a sequential run"
        drawn = [v.dtype for v in values.values() if v.is_floating_point()]
        parameters = [p.dtype for m in self.modules for p in m.parameters() if p.is_floating_point()]
        eps = max((torch.finfo(t).eps for t in drawn + parameters), default=0.0)  # the coarsest on the way
        faulty = [k for k, t in alone.items() if not close(t.value, together[k].value, loose=True, eps=eps)]
        if not faulty:
            return None
        again = self._replay(pairs, values, narrow, count, Layout())
        like = self._replay(pairs, values, wide, count, total)
        for key in faulty:
            if close(alone[key].value, again[key].value) and close(like[key].value, together[key].value, loose=True):
                one, other = torch.broadcast_tensors(together[key].value, alone[key].value)
                worst = int((one - other).abs().nan_to_num(nan=math.inf).argmax())
                return (
                    f"{key[0]} site '{key[1]}' has log density {one[worst].item():.6g} in a vectorised run and "
                    f"{other[worst].item():.6g} in a sequential replay of the same values"
                )
        return None

    # Independence: hybrids of two particles.

    def _independent(self, run: Run, probe: Pair) -> tuple[frozenset[int | str], dict[str, str], bool]:
        found = candidates(probe.model, probe.guide)
        if not found.plates:
            return frozenset(), {}, True
        if not any(True for t in (probe.model, probe.guide) for _ in latent_sites(t)):
            return frozenset(plate_key(p) for p in found.plates), {}, True
        count = enough_particles(math.prod(p.size for p in found.plates))
        count = max(count, CHECK_PARTICLES) if run.vectorized else count
        pairs = self.particles(count, run)
        layout = candidates(pairs[0].model, pairs[0].guide, run.particle_dim(count))
        fault, conclusive = self._mixing_fault(pairs, layout, run, count)
        if fault is None:
            return frozenset(plate_key(p) for p in layout.plates), {}, conclusive
        kept: tuple[IndependentPlate, ...] = ()
        mixed = {}
        for plate in layout.plates:
            fault, _ = self._mixing_fault(pairs, layout.keeping((*kept, plate)), run, count)
            if fault is None:
                kept = (*kept, plate)
            else:
                mixed[plate.name] = fault
        return frozenset(plate_key(p) for p in kept), mixed, True

    def _mixing_fault(self, pairs: list[Pair], layout: Layout, run: Run, count: int) -> tuple[str | None, bool]:
        """The site that mixes elements, if any; and whether the particles differed enough to tell.

        Both replays see the same random numbers, for models with randomness of their own.
        """
        values = self._values(pairs, run, count)
        sites = dict(latent_sites(pairs[0].guide))
        moved = separating((count, *(p.size for p in layout.plates)))
        crossed = {
            n: cross_elements(v, layout.align(moved, sites[n], v), other_values(v, sites[n])) for n, v in values.items()
        }
        seed = get_rng_state()
        before = self._replay(pairs, values, run, count, layout)
        set_rng_state(seed)
        after = self._replay(pairs, crossed, run, count, layout)
        conclusive = all(bool((crossed[n] != v).any()) for n, v in values.items() if settable(sites[n]))
        return first_mixed(before, after, moved), conclusive

    def _replay(
        self, pairs: Sequence[Pair], values: Mapping[str, Tensor], run: Run, count: int, layout: Layout
    ) -> dict[tuple[str, str], Term]:
        """Terms of model and guide at given values of the guide's latents; of the model alone if the guide cannot."""
        sites = dict(latent_sites(pairs[0].guide))
        spread = {n: spread_value(v, sites[n], run) for n, v in values.items()}
        own = {n: v for n, v in spread.items() if settable(sites[n])}
        try:
            return _tables(self.particles(count, run, own), layout)
        except (NotImplementedError, KeyError):  # a flow without an inverse cannot be asked for a density
            together = run.particle_dim(count) is not None
            shaped = {n: v if together else v[0] for n, v in spread.items()}
            pairs = self.particles(count, run, spread, replace(self.call, guide=_stand_in(sites, shaped)))
            return {k: t for k, t in _tables(pairs, layout).items() if k[0] == "model"}

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


def _tables(pairs: Sequence[Pair], layout: Layout) -> dict[tuple[str, str], Term]:
    """Terms by site, particles of sequential runs joined."""
    tables = [{t.key: t for t in terms_of(p, layout, outer_scale(p, layout))} for p in pairs]
    if len(tables) == 1:
        return tables[0]
    return {
        key: Term(*key, torch.cat([t[key].value for t in tables]), term.element, term.plates)
        for key, term in tables[0].items()
        if all(key in t for t in tables)
    }


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
