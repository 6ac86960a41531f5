# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How K runs of a model and guide happen: vectorised in one plate, or one after the other; always on one minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from torch import Tensor

from pyro_iwae.blocks import model_in_blocks
from pyro_iwae.drawn import settable
from pyro_iwae.handlers import EnclosingPlates, Minibatch, particle_plates
from pyro_iwae.plates import Site, latent_sites
from pyro_iwae.traces import Pair, Recording, run_given, run_pair
from pyro_iwae.tree import Tree

__all__ = ["Call", "Run", "run_model", "run_particles", "runs_of"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """What is run.

    Attributes:
        model: the model.
        guide: the guide.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        enclosing: plates, entered further out, to run in.
        drawing: what is run in the guide's place, if anything: its distributions, where they are known already.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    enclosing: tuple[CondIndepStackFrame, ...] = ()
    drawing: Program | None = None


@dataclass(frozen=True)
class Run:
    """How particles are run.

    Attributes:
        depth: dimensions taken by the plates of model and guide; the plates of particles come left of them.
        vectorized: all particles in one pass, or one after the other.
        enumerated: whether the model has sites to be summed out.
        tree: which plates have particles of their own.
    """

    depth: int
    vectorized: bool
    enumerated: bool
    tree: Tree = field(default_factory=Tree)

    def is_wide(self, num_particles: int) -> bool:
        """Whether traces have dimensions of particles; if not, each trace is one particle."""
        return self.vectorized and (num_particles > 1 or self.tree.grows)

    def small(self) -> Run:
        """The same with two particles in each node, to look at."""
        nodes = tuple(replace(node, count=2) for node in self.tree.nodes)
        return replace(self, tree=replace(self.tree, nodes=nodes))

    def depth_of(self, node: int) -> int:
        """The dimension of a node's particles."""
        return -self.depth - 1 - node

    def at_place(self, value: Tensor, place: Mapping[int, int], events: int) -> Tensor:
        """What belongs to one particle of each node, out of a value of a run of all."""
        for node in sorted(place, reverse=True):  # the leftmost first
            dim = self.depth_of(node) - events
            if value.dim() >= -dim:
                value = value.select(dim, place[node] if value.shape[dim] > 1 else 0)
        return value

    def particle_dims(self, num_particles: int, node: int = 0) -> tuple[int, ...]:
        """The dimensions of a node's particles and of those further out in a trace; none where it is one particle."""
        return tuple(self.depth_of(i) for i in self.tree.path(node)) if self.is_wide(num_particles) else ()

    def particle_dim(self, num_particles: int) -> int | None:
        """The dimension of the particles of the root."""
        return self.depth_of(0) if self.is_wide(num_particles) else None

    def width(self, num_particles: int) -> int:
        """Dimensions taken by plates and particles."""
        return self.depth + (len(self.tree.nodes) if self.is_wide(num_particles) else 0)

    def enumerate_from(self, num_particles: int) -> int | None:
        """The first dimension that is free for enumerated sites; None where there are none."""
        return -1 - self.width(num_particles) if self.enumerated else None

    def plates(self, num_particles: int, *, guide: bool) -> list[tuple[int, int, Callable[[Site], bool]]]:
        """The plates of particles: size, dimension, and the sites that have them."""
        tree = self.tree

        def holds(node: int) -> Callable[[Site], bool]:
            if guide and tree.combined:  # particles that serve all those further out are drawn once
                return lambda site: tree.home(site) == node
            return lambda site: node in tree.path(tree.home(site))

        return [(count, self.depth_of(i), holds(i)) for i, count in enumerate(tree.counts(num_particles))]


def run_particles(
    call: Call,
    *,
    num_particles: int,
    run: Run,
    minibatch: Minibatch,
    values: Mapping[str, Tensor] | None = None,
    sites: Mapping[str, Site] | None = None,
    recording: Recording | None = None,
) -> list[Pair]:
    """Runs K particles: one pair of traces if vectorised, else K pairs, or one for each leaf of the plate tree.

    Args:
        call: what to run.
        num_particles: K.
        run: how.
        minibatch: the indices to share.
        values: values for latents of the guide, each of shape ``(particles, *site shape)`` as a run wants them; where
            plates have particles of their own, ``(*particles, *site shape)`` of the latent's node.
        sites: the sites of these values, where plates have particles of their own; without them values are taken as a
            run wants them.
        recording: what to record for back-propagation; None is all, and no cut.
    """
    outside = EnclosingPlates(call.enclosing)  # within poutine.replay, as plates must be to broadcast
    wide = run.is_wide(num_particles)
    around, around_guide = (
        particle_plates(
            run.plates(num_particles, guide=guide) if wide else (), outside, spreads=guide or not run.tree.combined
        )
        for guide in (False, True)
    )
    once = partial(
        run_pair,
        call.model,
        call.guide if call.drawing is None else call.drawing,
        call.args,
        call.kwargs,
        around=around,
        around_guide=around_guide,
        enumerate_from=run.enumerate_from(num_particles),
        recording=recording,
        replay=_in_blocks(call, run, num_particles, recording, outside) if wide else None,
    )
    with unchanged_enumeration(), minibatch:
        values, sites = values or {}, sites or {}
        if wide and run.tree.grows:
            spread = {n: _spread_in_tree(v, sites[n], run) if n in sites else v for n, v in values.items()}
            return [once(values=spread)]
        if wide:
            return [once(values=values)]
        if run.tree.grows:
            return _one_by_one(once, run.tree, num_particles, values, sites)
        singles = [{n: v[k] for n, v in values.items()} for k in range(num_particles)]
        return [replace(once(values=single), place={0: k}) for k, single in enumerate(singles)]


def _in_blocks(
    call: Call, run: Run, num_particles: int, recording: Recording | None, outside: EnclosingPlates
) -> Callable[[Trace], Trace] | None:
    """What runs the model in blocks of particles, if that is asked for."""
    block = None if recording is None else recording.block
    if block is None or num_particles <= block:
        return None
    dim = -run.depth - 1
    return partial(
        model_in_blocks,
        call.model,
        call.args,
        call.kwargs,
        num_particles=num_particles,
        block=block,
        plate=lambda size: particle_plates(run.plates(size, guide=False), outside),
        dim=dim,
        enumerate_from=run.enumerate_from(num_particles),
    )


def _one_by_one(
    once: Callable[..., Pair],
    tree: Tree,
    num_particles: int,
    values: Mapping[str, Tensor],
    sites: Mapping[str, Site],
) -> list[Pair]:
    """A run for each leaf of the plate tree, on values that earlier runs have drawn for the particles around it."""
    drawn: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    homes = {n: tree.home(sites[n]) for n in values}
    for name, home in homes.items():
        drawn.update({(name, index): values[name][index] for index in tree.grid(home, num_particles)})
    pairs = []
    for place in _places(tree, tree.counts(num_particles)):

        def particle(node: int, place: Mapping[int, int] = place) -> tuple[int, ...]:
            return (place[node],) if tree.combined else tuple(place[i] for i in tree.path(node))

        given = {n: drawn[n, particle(home)] for n, home in homes.items() if (n, particle(home)) in drawn}
        pair = replace(once(values=given), place=place)
        for name, site in latent_sites(pair.guide):
            if settable(site):
                homes[name] = tree.home(site)
                drawn.setdefault((name, particle(homes[name])), site["value"])
        pairs.append(pair)
    return pairs


def _places(tree: Tree, counts: Sequence[int], node: int = 0) -> list[dict[int, int]]:
    """Particles of each node such that every one is met in every one around it; nodes side by side go together."""
    inside = [_places(tree, counts, child) for child in tree.children(node)]
    most = max((len(places) for places in inside), default=1)
    rows = [{k: v for places in inside for k, v in places[j % len(places)].items()} for j in range(most)]
    return [{node: i, **row} for i in range(counts[node]) for row in rows]


def runs_of(pairs: Sequence[Pair], run: Run, node: int, num_particles: int) -> list[Pair]:
    """The runs that hold a node's particles, in the order of its log weights."""
    if run.vectorized or not run.tree.grows:
        return list(pairs)
    path = run.tree.path(node)
    first: dict[tuple[int, ...], Pair] = {}
    for pair in pairs:
        first.setdefault(tuple(pair.place[i] for i in path), pair)
    return [first[index] for index in run.tree.grid(node, num_particles)]


def run_model(
    call: Call, values: Mapping[str, Tensor], *, num_particles: int, run: Run, minibatch: Minibatch
) -> list[Trace]:
    """Runs the model alone at given latents, as one vectorised run, or K sequential ones.

    Args:
        call: what to run.
        values: the guide's latents by name, each ``(particles, *site shape)`` as a run wants them.
        num_particles: K.
        run: how; vectorised whatever K is, if at all.
        minibatch: the indices to share.
    """
    plates = run.plates(num_particles, guide=False) if run.vectorized else ()
    model = particle_plates(plates, EnclosingPlates(call.enclosing))(call.model)
    rows: Sequence[Any] = [slice(None)] if run.vectorized else range(num_particles)
    with unchanged_enumeration(), minibatch:
        return [
            run_given(model, {n: v[row] for n, v in values.items()}, call.args, call.kwargs, run.enumerate_from(2))
            for row in rows
        ]


@contextmanager
def unchanged_enumeration() -> Iterator[None]:
    """Lets an enumeration further out go on where it was."""
    allocator = dict(vars(_ENUM_ALLOCATOR))
    try:
        yield
    finally:
        vars(_ENUM_ALLOCATOR).clear()
        vars(_ENUM_ALLOCATOR).update(allocator)


def batch_dim(site: Site) -> int:
    """Batch dimensions of the site's value."""
    return len(site["fn"].batch_shape)


def stacked_value(
    sites: Sequence[Site], *, particle_dim: int | None, num_particles: int, batch_dims: int | None = None
) -> Tensor:
    """A site's values in K particles, shape ``(particles, *site shape)``, the site's shape as without particles."""
    if particle_dim is None:
        return torch.stack([s["value"] for s in sites])
    (site,) = sites
    value, event_dim = site["value"], site["fn"].event_dim
    missing = -particle_dim + event_dim - value.dim()
    if missing > 0:  # the same for all particles
        value = value.reshape((1,) * missing + value.shape)
    if value.shape[0] == 1:
        value = value.expand(num_particles, *value.shape[1:])
    if batch_dims is None:
        batch_dims = -min(
            (f.dim for f in site["cond_indep_stack"] if f.vectorized and f.dim != particle_dim), default=0
        )
    return value.reshape(value.shape[:1] + value.shape[-particle_dim - batch_dims :])


def spread_value(value: Tensor, site: Site, run: Run) -> Tensor:
    """The opposite: ``(particles, *site shape)`` as a vectorised run wants it."""
    if not run.vectorized:
        return value
    event_dim = site["fn"].event_dim
    batch = value.dim() - 1 - event_dim
    return value.reshape(value.shape[:1] + (1,) * (run.depth - batch) + value.shape[1:])


def stacked_latents(
    pairs: Sequence[Pair], *, run: Run, num_particles: int, batch_dims: Mapping[str, int]
) -> dict[str, Tensor]:
    """Values of the guide's latents, by name, each ``(*particles, *site shape)``; its node's particles come first."""
    found = {}
    for name, site in latent_sites(pairs[0].guide):
        node = run.tree.home(site)
        same: list[Site] = [p.guide.nodes[name] for p in runs_of(pairs, run, node, num_particles)]
        if run.tree.grows:
            found[name] = _stacked_in_tree(same, run, node, num_particles, batch_dims[name])
        else:
            dim = run.particle_dim(num_particles)
            found[name] = stacked_value(
                same, particle_dim=dim, num_particles=num_particles, batch_dims=batch_dims.get(name)
            )
    return found


def _spread_in_tree(value: Tensor, site: Site, run: Run) -> Tensor:
    """``(*particles, *site shape)`` as a run of all particles wants it."""
    path, events = run.tree.path(run.tree.home(site)), site["fn"].event_dim
    own = value.shape[len(path) :]
    lead = dict(zip((run.depth_of(i) for i in path), value.shape, strict=False))
    width = run.depth_of(path[0])
    batch = [lead.get(d, 1) for d in range(width, -(len(own) - events))]
    return value.reshape(*batch, *own)


def _stacked_in_tree(sites: Sequence[Site], run: Run, node: int, num_particles: int, batch_dims: int) -> Tensor:
    shape, events = run.tree.shape(node, num_particles), sites[0]["fn"].event_dim
    if not run.vectorized:
        rows = torch.stack([site["value"] for site in sites])
        return rows.reshape(*shape, *rows.shape[1:])
    value = sites[0]["value"]
    width = run.width(num_particles) + events
    value = value.reshape((1,) * (width - value.dim()) + value.shape)
    own = value.shape[width - batch_dims - events :]
    dims = [width + run.depth_of(i) - events for i in run.tree.path(node)]
    return value.reshape(*(value.shape[d] for d in dims), *own).expand(*shape, *own)
