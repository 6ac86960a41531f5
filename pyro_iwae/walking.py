# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Walks through the plate tree: a particle at the root, one inside it for each element of a plate, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor

from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import runs_of
from pyro_iwae.plates import Layout, Site
from pyro_iwae.resampling import multinomial
from pyro_iwae.terms import model_log_density
from pyro_iwae.weighing import Particles

__all__ = ["Stand", "chosen", "log_density", "walks"]


@dataclass(frozen=True)
class Stand:
    """Where walks stand at one node: the particle of each element there, and those further out that it lies in.

    Attributes:
        node: the node, with the walks as a plate in front of its own.
        place: numbers of particles, ``(walks, *plates)``, the node's own first, the root's last.
    """

    node: LogWeights
    place: list[Int[Tensor, "walks *plates"]]


def walks(root: LogWeights, index: Int[Tensor, "walks *plates"]) -> list[Stand]:
    """Starts at particles of the root and draws by weight inside them; one stand for each node, as the tree counts.

    Args:
        root: the weights.
        index: the root's particle of each walk and element.
    """
    return _inside(Stand(_widened(root, len(index)), [index]))


def _inside(stand: Stand) -> list[Stand]:
    found = [stand]
    for child in stand.node.children:
        shape = child.log_weights.shape[1 + len(stand.place) :]
        outer = [child.laid(index, stand.node.plates).expand(shape) for index in stand.place]
        given = _at(child.log_weights.movedim(0, len(outer)), outer)
        found += _inside(Stand(child, [multinomial(given), *outer]))
    return found


def _widened(node: LogWeights, count: int) -> LogWeights:
    """The node with as many walks, a plate in front of its own."""
    first = node.log_weights.dim() - len(node.plates)
    children = tuple(_widened(child, count) for child in node.children)
    log_weights = _repeated(node.log_weights, first, count)
    return LogWeights(log_weights, plates=("", *node.plates), scale=node.scale, children=children)


def _repeated(value: Tensor, dim: int, count: int) -> Tensor:
    return value.unsqueeze(dim).expand(*value.shape[:dim], count, *value.shape[dim:])


def _at(values: Tensor, place: Sequence[Tensor]) -> Tensor:
    """Takes what belongs to a place out of ``(*particles, ..., *further)``."""
    for i in reversed(range(len(place))):  # the root first: it has the most particles, and memory goes with them
        values = values.gather(i, place[i].expand(*values.shape[:i], 1, *values.shape[i + 1 :])).squeeze(i)
    return values


def log_density(particles: Particles, stands: Sequence[Stand]) -> Tensor:
    """log p(x, z) where walks stand, by element of the root, ``(walks, *plates)``; scaled inside it."""
    root, run = particles.weights, particles.structure.run
    total = root.log_weights.new_zeros(())
    for i, (layout, stand) in enumerate(zip(particles.layouts, stands, strict=True)):
        first, count = len(stand.place), len(stand.place[0])
        shape = stand.node.log_weights.shape
        runs = runs_of(particles.pairs, run, i, root.num_particles)
        log_p = model_log_density(runs, layout, particles.common, (*shape[:first], *shape[first + 1 :]))
        value = _at(_repeated(log_p, first, count), stand.place)
        here = replace(stand.node, scale=layout.scale / particles.layout.scale)
        total = total + here.summed(value, ("", *root.plates))
    return total


def chosen(value: Tensor, stand: Stand, layout: Layout, site: Site) -> Tensor:
    """Takes what walks carry of a latent, ``(walks, *site shape)``, out of ``(*particles, *site shape)``."""
    first, count = len(stand.place), len(stand.place[0])
    value = _repeated(value, first, count)
    where = [layout.align(index, site, value[(0,) * first]) for index in stand.place]
    for i in reversed(range(first)):
        index = where[i].reshape((1,) * (i + 1) + where[i].shape)
        value = value.gather(i, index.expand(*value.shape[:i], 1, *value.shape[i + 1 :])).squeeze(i)
    return value
