# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of a model and guide to look at, each seeing the same random numbers, with latents that are moved about.

Give some elements of a plate the latents of another particle and replay: a site whose log density changes at an element
that kept its own latents mixes the elements. Particles themselves are elements too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_iwae.crossing import (
    close,
    cross_elements,
    first_mixed,
    other_values,
    separating_rounds,
    site_values,
    subsets,
)
from pyro_iwae.drawn import Drawn, settable
from pyro_iwae.handlers import Minibatch
from pyro_iwae.particles import Call, Run, run_particles, spread_value, stacked_latents
from pyro_iwae.plates import Layout, Site, latent_sites
from pyro_iwae.state import get_random_state, moved_slightly, set_random_state
from pyro_iwae.traces import Pair
from pyro_iwae.tree import CHANGING_SITES

__all__ = ["CHECK_PARTICLES", "Trial"]

CHECK_PARTICLES = 8  # in a vectorised run; sequential ones make do with half


class Trial:
    """Runs that share one minibatch."""

    def __init__(self, call: Call, modules: Collection[torch.nn.Module], minibatch: Minibatch) -> None:
        self.call = call
        self.modules = modules
        self.minibatch = minibatch
        self.batch_dims: dict[str, int] = {}
        self.probed: tuple[Any, ...] = ()

    def particles(
        self, count: int, run: Run, values: Mapping[str, Tensor] | None = None, call: Call | None = None
    ) -> list[Pair]:
        return run_particles(call or self.call, num_particles=count, run=run, minibatch=self.minibatch, values=values)

    def mixing_fault(
        self, pairs: list[Pair], layout: Layout, run: Run, names: Collection[str] | None = None
    ) -> tuple[tuple[str, str] | None, bool]:
        """The site that mixes elements, if any; and whether the particles differed enough to tell.

        Args:
            pairs: particles to move elements between.
            layout: the plates whose elements move.
            run: how they were run.
            names: the latents that move; None is all.
        """
        return self._slightly_off(lambda finite: self._crossing_fault(pairs, layout, run, names, finite))

    def reached(self, pairs: list[Pair], run: Run, names: Collection[str]) -> set[tuple[str, str]]:
        """(role, name) of the sites whose density changes, or value in the guide, where these latents change."""
        return self._slightly_off(lambda finite: self._changed(pairs, run, names, finite))

    def _slightly_off(self, look: Callable[[bool], Any]) -> Any:
        """Looks at parameters a little off, if that can be: a coupling that starts at 0 will not stay there."""
        try:
            with moved_slightly(self._parameters()):
                return look(True)
        except Exception:  # such parameters may be impossible; what is wrong with the true ones shows in the next run
            return look(False)

    def _parameters(self) -> list[Tensor]:
        """All that may be trained: parameters in Pyro's store and in modules, that model and guide have touched."""
        found: list[Any] = [p for m in self.modules for p in m.parameters(recurse=False)]
        stored: list[Any] = [s["value"] for t in self.probed for s in t.nodes.values() if s["type"] == "param"]
        found += [p.unconstrained() if hasattr(p, "unconstrained") else p for p in stored]
        return list({id(p): p for p in found if p.is_leaf and p.requires_grad and p.is_floating_point()}.values())

    def _crossing_fault(
        self, pairs: list[Pair], layout: Layout, run: Run, names: Collection[str] | None, finite: bool
    ) -> tuple[tuple[str, str] | None, bool]:
        """All replays see the same random numbers, for models with randomness of their own."""
        values, others, latents = self._values_and_others(pairs, run, names)
        others = {n: o for n, o in others.items() if layout.element(latents[n]) is not None}
        count = self._count(pairs, run)
        sites = {(role, name): site for role, name, site in pairs[0].sites()}
        unmoved = {n for n in others if settable(latents[n])}
        seed = get_random_state()
        before = self.replay(pairs, values, run, count)
        _require_finite(before, finite)
        sizes = [p.size for p in layout.plates]
        for chosen in subsets(values, others, latents, math.prod(sizes)):
            for moved in separating_rounds(count, sizes):
                told = {n: layout.align(moved, latents[n], values[n]) for n in chosen}
                crossed = {n: cross_elements(values[n], told[n], o) for n, o in chosen.items()}
                unmoved -= {n for n in unmoved if _all_moved(values[n], crossed[n], told[n])}
                set_random_state(seed)
                after = self.replay(pairs, {**values, **crossed}, run, count)
                fault = first_mixed(before, after, sites, moved, layout)
                if fault is not None:
                    return fault, True
        return None, not unmoved

    def _changed(self, pairs: list[Pair], run: Run, names: Collection[str], finite: bool) -> set[tuple[str, str]]:
        values, others, latents = self._values_and_others(pairs, run, names)
        count, seed = self._count(pairs, run), get_random_state()
        before, drawn = self._again(pairs, values, run, count)
        _require_finite(before, finite)
        changed: set[tuple[str, str]] = set()
        for chosen in subsets(values, others, latents, 1):
            set_random_state(seed)
            after, moved = self._again(pairs, {**values, **chosen}, run, count)
            if before.keys() != after.keys() or drawn.keys() != moved.keys():
                raise ValueError(CHANGING_SITES)
            changed |= {k for k in before if not close(before[k], after[k])}
            changed |= {("guide", n) for n, v in drawn.items() if not close(v, moved[n])}
        return changed

    def _values_and_others(
        self, pairs: list[Pair], run: Run, names: Collection[str] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Site]]:
        """The particles' latents, what some of them are moved to, and their sites."""
        values = self.values(pairs, run, self._count(pairs, run))
        latents = dict(latent_sites(pairs[0].guide))
        # What follows from other latents is not set, unless the guide cannot be run again: then it moves with any.
        moving = [n for n in values if names is None or n in names or not settable(latents[n])]
        return values, {n: other_values(values[n], latents[n]) for n in moving}, latents

    def _count(self, pairs: Sequence[Pair], run: Run) -> int:
        return CHECK_PARTICLES if run.vectorized else len(pairs)

    def replay(
        self, pairs: Sequence[Pair], values: Mapping[str, Tensor], run: Run, count: int
    ) -> dict[tuple[str, str], Tensor]:
        """Densities in model and guide at given values of the guide's latents; in the model alone if need be."""
        return self._again(pairs, values, run, count)[0]

    def _again(
        self, pairs: Sequence[Pair], values: Mapping[str, Tensor], run: Run, count: int
    ) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
        """Densities at given values, and the values that all latents of the guide have then."""
        sites = dict(latent_sites(pairs[0].guide))
        dim = run.particle_dim(count)
        spread = {n: spread_value(v, sites[n], run) for n, v in values.items()}
        own = {n: v for n, v in spread.items() if settable(sites[n])}
        try:
            again = self.particles(count, run, own)
            return site_values(again, dim), self.values(again, run, count)
        except (NotImplementedError, KeyError):  # a flow without an inverse cannot be asked for a density
            shaped = {n: v[0] if dim is None else v for n, v in spread.items()}
            pairs = self.particles(count, run, spread, replace(self.call, guide=_stand_in(sites, shaped)))
            return {k: v for k, v in site_values(pairs, dim).items() if k[0] == "model"}, dict(values)

    def values(self, pairs: Sequence[Pair], run: Run, count: int) -> dict[str, Tensor]:
        """The guide's latents, by name, each ``(particles, *site shape)``."""
        stacked = stacked_latents(pairs, run=run, num_particles=count, batch_dims=self.batch_dims)
        return {n: v.detach() for n, v in stacked.items()}


def _all_moved(before: Tensor, after: Tensor, told: Tensor) -> bool:
    """Whether each element that was told to move has another value, in at least one of its entries."""
    changed, told = before != after, told.to(before.device)
    inside = [d for d in range(1, told.dim()) if told.shape[d] == 1]
    if inside:
        changed, told = changed.any(inside, keepdim=True), told.any(inside, keepdim=True)
    return bool((changed | ~told).all())


def _require_finite(densities: Mapping[Any, Tensor], finite: bool) -> None:
    if finite and not all(bool(v.isfinite().all()) for v in densities.values()):
        raise ValueError("expected finite densities")


def _stand_in(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> Callable[..., None]:
    """A guide that only holds the sites, each with a value of the right shape; others can be given to it."""

    def guide(*args: Any, **kwargs: Any) -> None:
        for name, site in sites.items():
            pyro.sample(name, Drawn(values[name], event_dim=site["fn"].event_dim), infer=site["infer"])

    return guide
