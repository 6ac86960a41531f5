# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Where a subsampled plate may stand: its scale must not come inside the logarithm of more than one particle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_iwae.drawn import settable
from pyro_iwae.plates import Layout, Site, is_subsampled, latent_sites
from pyro_iwae.terms import weighed_sites
from pyro_iwae.traces import Pair
from pyro_iwae.tree import Tree

__all__ = ["require_full_plates", "subsampled_inside", "subsampling_problem"]

Subsampled = tuple[Site, CondIndepStackFrame, set[int]]


def require_full_plates(pair: Pair, layouts: Sequence[Layout], tree: Tree, num_particles: int) -> None:
    """Raises where a subsampled plate is not independent and particles would go inside its scale."""
    problem = subsampling_problem(pair, layouts, tree, num_particles)
    if problem is not None:
        raise ValueError(problem)


def subsampling_problem(
    pair: Pair, layouts: Sequence[Layout], tree: Tree | None = None, num_particles: int = 2
) -> str | None:
    """What is wrong, and what to write instead, for a subsampled plate below a latent; None if nothing is."""
    tree = Tree() if tree is None else tree
    counts, found = tree.counts(num_particles), list(subsampled_inside(pair, layouts, tree))
    for site, frame, around in found:
        if any(counts[node] > 1 for node in around):
            return (
                f"plate '{frame.name}' (site '{site['name']}') shows {frame.size} of its {frame.full_size} elements, "
                "and is not independent: latents outside it, or a site that mixes its elements, tie them. With more "
                "than one particle its scale would sit inside the logarithm and the loss would be no bound; "
                + _subsampling_remedy(pair, layouts, tree, counts, found)
            )
    return None


def subsampled_inside(pair: Pair, layouts: Sequence[Layout], tree: Tree) -> Iterator[Subsampled]:
    """Sites in subsampled plates, and the nodes inside whose logarithm the plate's scale stands: with one particle."""
    if not any(True for t in (pair.model, pair.guide) for _ in latent_sites(t)):
        return
    if not any(is_subsampled(f) for _, _, s in pair.sites() for f in s["cond_indep_stack"]):
        return
    for i, layout in enumerate(layouts):
        for site in filter(layout.holds, weighed_sites(pair, layouts[0])):
            for frame in filter(is_subsampled, site["cond_indep_stack"]):
                # It is outside the weights of the nodes whose elements are the plate's.
                yield (
                    site,
                    frame,
                    {n for n in tree.path(i) if all(p.frame_of(site) != frame for p in layouts[n].plates)},
                )


def _subsampling_remedy(
    pair: Pair, layouts: Sequence[Layout], tree: Tree, counts: Sequence[int], found: Sequence[Subsampled]
) -> str:
    ones = set[int]().union(*(around for _, _, around in found))
    wanted: dict[str, int | str] = {n.plate: 1 if i in ones else n.count for i, n in enumerate(tree.nodes) if i}
    wanted.update(dict.fromkeys(_without_particles(pair, layouts, found), "K"))
    text = "{" + ", ".join(f"'{plate}': {count}" for plate, count in wanted.items()) + "}"
    full = "give it the full data (no subsample_size)"
    if all(count == 1 for count in wanted.values()):
        return f"write num_particles=1, or {full}"
    if counts[0] == 1:
        return f"write plate_particles={text}, or {full}"
    return (
        f"write num_particles=1, or {full}; num_particles=1, plate_particles={text} gives the latents of the plate "
        "particles of their own, inside the scale's sum"
    )


def _without_particles(pair: Pair, layouts: Sequence[Layout], found: Sequence[Subsampled]) -> list[str]:
    """Subsampled plates that own latents and could have particles of these: the innermost ones."""
    known = {p.name for layout in layouts[1:] for p in layout.plates}
    latents = {n: {f.name for f in s["cond_indep_stack"]} for n, s in latent_sites(pair.guide) if settable(s)}
    held = {f.name: {n for n, plates in latents.items() if f.name in plates} for _, f, _ in found}
    free = {name: names for name, names in held.items() if names and name not in known}
    return [name for name, names in free.items() if not any(other < names for other in free.values())]
