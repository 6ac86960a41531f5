# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How K runs of a model and guide happen: vectorised in one plate, or one after the other; always on one minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from torch import Tensor

from pyro_iwae.blocks import model_in_blocks
from pyro_iwae.handlers import EnclosingPlates, Minibatch, particle_plate
from pyro_iwae.plates import Site, latent_sites
from pyro_iwae.traces import Pair, Recording, run_given, run_pair

__all__ = ["Call", "Run", "run_model", "run_particles"]

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
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    enclosing: tuple[CondIndepStackFrame, ...] = ()


@dataclass(frozen=True)
class Run:
    """How particles are run.

    Attributes:
        depth: dimensions taken by the plates of model and guide; the plate of particles comes left of them.
        vectorized: all particles in one pass, or one after the other.
        enumerated: whether the model has sites to be summed out.
    """

    depth: int
    vectorized: bool
    enumerated: bool

    def particle_dim(self, num_particles: int) -> int | None:
        """The dimension of the particles in a trace; None where each trace is one particle."""
        return -self.depth - 1 if self.vectorized and num_particles > 1 else None

    def enumerate_from(self, num_particles: int) -> int | None:
        """The first dimension that is free for enumerated sites; None where there are none."""
        if not self.enumerated:
            return None
        dim = self.particle_dim(num_particles)
        return -1 - self.depth if dim is None else dim - 1


def run_particles(
    call: Call,
    *,
    num_particles: int,
    run: Run,
    minibatch: Minibatch,
    values: Mapping[str, Tensor] | None = None,
    recording: Recording | None = None,
) -> list[Pair]:
    """Runs K particles: one pair of traces if vectorised, else K pairs.

    Args:
        call: what to run.
        num_particles: K.
        run: how.
        minibatch: the indices to share.
        values: values for latents of the guide, each of shape ``(particles, *site shape)``.
        recording: what to record for back-propagation; None is all, and no cut.
    """
    dim = run.particle_dim(num_particles)

    def once(around: Callable[[Program], Program], given: Mapping[str, Tensor] | None) -> Pair:
        return run_pair(
            call.model,
            call.guide,
            call.args,
            call.kwargs,
            around=around,
            values=given,
            enumerate_from=run.enumerate_from(num_particles),
            recording=recording,
            replay=replay,
        )

    outside = EnclosingPlates(call.enclosing)  # within poutine.replay, as plates must be to broadcast
    block, replay = None if recording is None else recording.block, None
    if dim is not None and block is not None and num_particles > block:
        replay = partial(
            model_in_blocks,
            call.model,
            call.args,
            call.kwargs,
            num_particles=num_particles,
            block=block,
            plate=partial(particle_plate, dim=dim, outside=outside),
            dim=dim,
            enumerate_from=run.enumerate_from(num_particles),
        )
    with unchanged_enumeration(), minibatch:
        if dim is not None:
            return [once(particle_plate(num_particles, dim=dim, outside=outside), values)]
        singles = [{n: v[k] for n, v in (values or {}).items()} for k in range(num_particles)]
        return [once(particle_plate(1, dim=None, outside=outside), single) for single in singles]


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
    dim = -run.depth - 1 if run.vectorized else None
    model = particle_plate(num_particles, dim=dim, outside=EnclosingPlates(call.enclosing))(call.model)
    rows: Sequence[Any] = [slice(None)] if dim is not None else range(num_particles)
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
    """Values of the guide's latents, by name, each ``(particles, *site shape)``."""
    dim = run.particle_dim(num_particles)
    return {
        name: stacked_value(
            [p.guide.nodes[name] for p in pairs],
            particle_dim=dim,
            num_particles=num_particles,
            batch_dims=batch_dims.get(name),
        )
        for name, _ in latent_sites(pairs[0].guide)
    }
