# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The plate tree: which plates have particles of their own, inside which, and which sites belong to each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_iwae.options import as_count, require_switch
from pyro_iwae.plates import Site, label

__all__ = ["CHANGING_SITES", "Node", "PlateParticles", "Tree", "combine_problem"]


@dataclass(frozen=True)
class PlateParticles:
    """What a user asked for.

    Attributes:
        counts: plates and their particles; None for every plate that owns latents.
        every: the count of such plates.
        combined: whether a plate's particles serve all particles further out.
    """

    counts: tuple[tuple[str, int], ...] | None
    every: int = 1
    combined: bool = False

    @property
    def most(self) -> int:
        """The largest count."""
        return self.every if self.counts is None else max(count for _, count in self.counts)

    @classmethod
    def of(cls, option: Any, *, num_particles: int, combine: bool = False) -> PlateParticles | None:
        """From the options ``plate_particles`` and ``combine``.

        Raises:
            TypeError: where one has the wrong type.
            ValueError: where a count is below 1, or there is nothing to combine.
        """
        require_switch("combine", combine)
        if option is None:
            if combine:
                raise ValueError(
                    "combine=True reuses the particles of plates, but no plate has any; write "
                    "plate_particles={'data': 64}, or combine=False"
                )
            return None
        if isinstance(option, str) and option == "auto":
            return cls(None, num_particles, combine)
        if not isinstance(option, Mapping) or not all(isinstance(name, str) for name in option):
            raise TypeError(
                "expected plate_particles to be a dict from names of plates to numbers of particles, as in "
                f"{{'data': 64}}, or 'auto', got {option!r}"
            )
        counts = {name: as_count(f"plate_particles['{name}']", count) for name, count in option.items()}
        return cls(tuple(sorted(counts.items())), 1, combine) if counts else None


@dataclass(frozen=True)
class Node:
    """A plate with particles of its own, inside each particle of its parent; or the root.

    Attributes:
        plate: its name; empty for the root.
        parent: number of the parent node; None for the root.
        count: particles inside each particle of the parent; of the root it is the caller's.
        keys: the plates (dimension of a vectorised one, name of a sequential one) whose elements have a weight each.
    """

    plate: str = ""
    parent: int | None = None
    count: int = 1
    keys: frozenset[int | str] = frozenset()


@dataclass(frozen=True)
class Tree:
    """All nodes: the root first, each followed by those inside it.

    Attributes:
        nodes: the nodes.
        homes: the node that each site belongs to, by label; a site that no latent reaches belongs to the root.
        combined: whether every particle of a node serves all particles further out.
    """

    nodes: tuple[Node, ...] = (Node(),)
    homes: Mapping[str, int] = field(default_factory=dict)
    combined: bool = False

    @property
    def grows(self) -> bool:
        """Whether there is more than the root."""
        return len(self.nodes) > 1

    @property
    def plates(self) -> list[str]:
        """Plates that have particles of their own."""
        return [node.plate for node in self.nodes[1:]]

    def path(self, node: int) -> tuple[int, ...]:
        """The node and those around it, the root last."""
        parent = self.nodes[node].parent
        return (node,) if parent is None else (node, *self.path(parent))

    def children(self, node: int) -> list[int]:
        """The nodes right inside."""
        return [i for i, n in enumerate(self.nodes) if n.parent == node]

    def inside(self, node: int) -> set[int]:
        """The node and all inside it."""
        return {i for i in range(len(self.nodes)) if node in self.path(i)}

    def home(self, site: Site) -> int:
        """The node that a site belongs to.

        Raises:
            ValueError: where it was not there when the tree was made.
        """
        if not self.grows:
            return 0
        name = label(site["name"], site)
        if name not in self.homes:
            raise ValueError(CHANGING_SITES)
        return self.homes[name]

    def counts(self, num_particles: int) -> tuple[int, ...]:
        """Particles of each node inside one of its parent's."""
        return (num_particles, *(n.count for n in self.nodes[1:]))

    def shape(self, node: int, num_particles: int) -> tuple[int, ...]:
        """Particles of the node and of those around it."""
        counts = self.counts(num_particles)
        return tuple(counts[i] for i in self.path(node))

    def most(self, num_particles: int) -> int:
        """Particles of the fullest node, in all: 1 where there is one of everything."""
        return max(math.prod(self.shape(i, num_particles)) for i in range(len(self.nodes)))

    def grid(self, node: int, num_particles: int) -> Iterator[tuple[int, ...]]:
        """Indices of the node's particles, in the order of its log weights: own, then those further out."""
        return itertools.product(*(range(n) for n in self.shape(node, num_particles)))


CHANGING_SITES = (
    "expected model and guide to have the same sites and plates in every run, as plate_particles needs, got different "
    "ones in two runs with the same arguments; leave plate_particles out"
)


def combine_problem(name: str, plate: str) -> str:
    """What to say of a guide site that is to be drawn once, and depends on what is drawn often."""
    return (
        f"combine=True draws the latents of plate '{plate}' once for all particles further out, but the guide draws "
        f"site '{name}' given latents outside the plate, or anew for each of these; write combine=False, or a guide "
        f"that draws '{name}' independently of them"
    )
