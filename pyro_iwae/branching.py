# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Finds the plate tree: which plates can have particles of their own, inside which, and which sites belong to each.

A plate can if, all else held, no density changes at one of its elements, nor outside of it, where the latents of other
elements are moved. A site belongs to the innermost node whose latents reach it, and all that reach it must lie around
one another. Where plates cross (latents of two plates reach one site, neither plate inside the other) the latents of
one of them move outwards, to be weighed jointly with those around them; as few as possible do.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pyro_iwae.drawn import settable
from pyro_iwae.particles import Run
from pyro_iwae.plates import (
    IndependentPlate,
    Layout,
    Site,
    candidates,
    frame_size,
    label,
    latent_sites,
    plate_key,
    plate_scale,
    sample_sites,
)
from pyro_iwae.terms import enumerated_groups, is_zero
from pyro_iwae.traces import Pair
from pyro_iwae.tree import CHANGING_SITES, Node, PlateParticles, Tree, combine_problem
from pyro_iwae.trial import CHECK_PARTICLES, Trial

__all__ = ["Branching", "Fault"]

PUT_INSIDE = (
    "put it into the plate, element by element (the log densities of rows that belong to elements by an index can be "
    "summed by element, with index_add, and given to pyro.factor there)"
)
Chain = tuple[str, ...]  # plates with particles of their own, from the root to a latent
Kind = frozenset[str]  # all such plates that a latent lies in


@dataclass(frozen=True)
class Plate:
    """A plate that is to have particles of its own: where it lies, how many, and the guide's latents in it."""

    place: IndependentPlate
    count: int
    latents: frozenset[str]


@dataclass(frozen=True)
class Fault:
    """Why latents cannot be weighed apart: those of one of these kinds have to move outwards."""

    kinds: frozenset[Kind]
    reason: str


class Branching:
    """One search for a tree.

    Args:
        trial: runs to look at.
        pairs: particles of a run in which no plate has particles of its own.
        run: how they were run.
        independent: the plates that are independent at the root.
        wanted: what the user asked for.

    Raises:
        ValueError: where there is no such plate, or it holds no latents, or there is nothing to combine.
    """

    def __init__(
        self, trial: Trial, pairs: list[Pair], run: Run, independent: frozenset[int | str], wanted: PlateParticles
    ) -> None:
        self.trial, self.pairs, self.run, self.wanted = trial, pairs, run, wanted
        self.independent = independent
        self.root = self._layout(lambda site: True).keeping_keys(independent)
        known = [{(role, name) for role, name, _ in pair.sites()} for pair in pairs]
        if any(found != known[0] for found in known):
            raise ValueError(CHANGING_SITES)
        drawn = latent_sites(pairs[0].guide)
        self.latents = {name: site for name, site in drawn if settable(site)}
        self.plates = self._plates()
        self.kinds = {n: frozenset(p for p, plate in self.plates.items() if n in plate.latents) for n in self.latents}
        groups = {kind: [n for n, k in self.kinds.items() if k == kind] for kind in self.kinds.values()}
        self.reached: dict[Kind, set[str]] = {}
        self.drawn_given: dict[Kind, set[str]] = {}  # guide sites alone
        for kind, names in groups.items():
            changed = trial.reached(pairs, run, names)
            self.reached[kind] = {name for _, name in changed} | set(names)
            self.drawn_given[kind] = {name for role, name in changed if role == "guide"}
        self.checked: dict[tuple[frozenset[str], Chain], Layout | Fault] = {}

    # What was asked for

    def _plates(self) -> dict[str, Plate]:
        known = dict(self._known_plates())
        counts = self.wanted.counts
        if counts is None:
            return {n: Plate(p, self.wanted.every, self._within(p)) for n, p in self._owning(known).items()}
        for name, _ in counts:
            if name not in known:
                raise ValueError(f"expected plate_particles to name plates of the model, {sorted(known)}, got '{name}'")
        found = {name: Plate(known[name], count, self._within(known[name])) for name, count in counts}
        for name, plate in found.items():
            self._require_latents(name, plate)
            same = [n for n, p in found.items() if n != name and p.latents == plate.latents]
            if same:
                raise ValueError(
                    f"plates '{name}' and '{same[0]}' hold the same latents {sorted(plate.latents)}, whose particles "
                    "have one number; name one of the plates in plate_particles"
                )
        inner = {n: [p for p, plate in found.items() if n in plate.latents] for n in self.latents}
        for name, plate in found.items():
            if all(any(found[p].latents < plate.latents for p in inner[n] if p != name) for n in plate.latents):
                raise ValueError(
                    f"plate '{name}' holds no latents but those of plates inside it that have particles of their own, "
                    "too; leave it out of plate_particles"
                )
        return found

    def _known_plates(self) -> Iterator[tuple[str, IndependentPlate]]:
        dims = self.run.particle_dims(CHECK_PARTICLES)
        for _, _, site in self.pairs[0].sites():
            for frame in site["cond_indep_stack"]:
                if not (frame.vectorized and frame.dim in dims):
                    size, scale = frame_size(frame, site), plate_scale(frame)
                    yield frame.name, IndependentPlate(frame.name, frame.dim, size, scale)

    def _within(self, plate: IndependentPlate) -> frozenset[str]:
        """The latents in a plate: by its name, or by its dimension and size where the guide has names of its own."""
        known = {f.name for _, s in sample_sites(self.pairs[0].model) for f in s["cond_indep_stack"]}

        def holds(site: Site) -> bool:
            frame = plate.frame_of(site)
            return any(f.name == plate.name for f in site["cond_indep_stack"]) or (
                frame is not None and frame.name not in known
            )

        return frozenset(n for n, site in self.latents.items() if holds(site))

    def _owning(self, known: Mapping[str, IndependentPlate]) -> dict[str, IndependentPlate]:
        """The plates that are innermost for some latent, one of those that hold the same; not the independent ones."""
        held = {name: self._within(plate) for name, plate in known.items()}
        named = {held[n]: n for n in known if held[n] and plate_key(known[n]) not in self.independent}
        smallest = {min((h for h in named if n in h), key=len, default=frozenset()) for n in self.latents}
        return {named[h]: known[named[h]] for h in smallest if h}

    def _require_latents(self, name: str, plate: Plate) -> None:
        if plate.latents:
            return
        follow = [
            n for n, s in latent_sites(self.pairs[0].guide) if not settable(s) and plate.place.frame_of(s) is not None
        ]
        detail = f", only sites {follow} that follow from draws outside it" if follow else ""
        raise ValueError(
            f"expected the guide to draw latents in plate '{name}', got none{detail}; leave the plate out of "
            "plate_particles, or write a guide that draws them there (AutoNormal)"
        )

    def left_out(self) -> list[str]:
        """Plates that the model draws in, neither independent nor with latents of the guide, where none has such."""
        if self.plates:
            return []
        known = dict(self._known_plates())
        drawn = [s for _, s in latent_sites(self.pairs[0].model) if s["infer"].get("_enumerate_dim") is None]
        names = {f.name for s in drawn for f in s["cond_indep_stack"] if f.name in known}
        return sorted(name for name in names if plate_key(known[name]) not in self.independent)

    # The search

    def find(self) -> tuple[Tree, dict[str, str]]:
        """The tree, and why latents of some plates are weighed jointly with those around them, by plate."""
        tried: set[tuple[tuple[Kind, Chain], ...]] = set()
        order = itertools.count()
        nothing: dict[Kind, str] = {}
        heap = [(0, 0, next(order), chains, nothing) for chains in self._starts()]
        while heap:
            moves, numbers, _, chains, reasons = heapq.heappop(heap)
            key = tuple(sorted(chains.items(), key=repr))
            if key in tried:
                continue
            tried.add(key)
            found = self._grow(chains)
            if not isinstance(found, Fault):
                return found, self._moved(chains, reasons)
            for kind in sorted(found.kinds, key=sorted):
                size = sum(self.latents[n]["value"].numel() for n, k in self.kinds.items() if k == kind)
                further = {**chains, kind: chains[kind][:-1]}
                why = {**reasons, kind: found.reason}
                heapq.heappush(heap, (moves + 1, numbers + size, next(order), further, why))
        raise AssertionError("a tree of the root alone is always right")

    def _starts(self) -> Iterator[dict[Kind, Chain]]:
        """Chains by every order of the plates in which a plate comes before those inside it."""
        parts: list[list[dict[Kind, Chain]]] = [[{frozenset(): ()}]]
        for plates in self._sharing():
            kinds = [kind for kind in set(self.kinds.values()) if kind and kind <= plates]
            orders = [{kind: tuple(n for n in names if n in kind) for kind in kinds} for names in self._orders(plates)]
            parts.append([chains for i, chains in enumerate(orders) if chains not in orders[:i]])
        for choice in itertools.product(*parts):
            yield {kind: chain for chains in choice for kind, chain in chains.items()}

    def _sharing(self) -> list[Kind]:
        """The plates, those that hold latents together in one set."""
        found: list[Kind] = []
        for kind in filter(None, set(self.kinds.values())):
            found = [*(f for f in found if not f & kind), kind.union(*(f for f in found if f & kind))]
        return found

    def _orders(self, plates: Kind) -> Iterator[Chain]:
        for names in itertools.permutations(sorted(plates)):
            held = [self.plates[n].latents for n in names]
            if not any(later > held[i] for i in range(len(held)) for later in held[i + 1 :]):
                yield names

    def _moved(self, chains: Mapping[Kind, Chain], reasons: Mapping[Kind, str]) -> dict[str, str]:
        """By plate whose latents have moved outwards: one message for all that moved for one reason."""
        found: dict[str, str] = {}
        for reason in dict.fromkeys(reasons.values()):
            parts = {}
            for plate in sorted(
                {p for kind, why in reasons.items() if why == reason for p in kind - set(chains[kind])}
            ):
                kinds = [k for k, why in reasons.items() if why == reason and plate in k - set(chains[k])]
                parts[plate] = f"{sorted(n for n, k in self.kinds.items() if k in kinds)} of plate '{plate}'"
            message = (
                f"latents {' and '.join(parts.values())} are weighed jointly with those outside and have no particles "
                f"of their own: {reason}"
            )
            found |= {plate: message for plate in parts if plate not in found}
        return found

    def learn(self, tree: Tree, node: int, name: str) -> bool:
        """Takes it that latents of a node reach a site; whether that is news."""
        kinds = {kind for latent, kind in self.kinds.items() if tree.home(self.latents[latent]) == node}
        news = any(name not in self.reached[kind] for kind in kinds)
        for kind in kinds:
            self.reached[kind].add(name)
        return news

    # One candidate

    def _grow(self, chains: Mapping[Kind, Chain]) -> Tree | Fault:
        order = sorted({c for c in chains.values() if c})  # each before those inside it, and these before the next
        numbers = {(): 0, **{c: i + 1 for i, c in enumerate(order)}}
        parents = {c: max((p for p in numbers if p == c[: len(p)] and p != c), key=len) for c in order}
        around = {c: {c} for c in numbers}
        for c in order:
            around[c] |= around[parents[c]]
        homes = self._homes(chains, around)
        if isinstance(homes, Fault):
            return homes
        layouts: dict[Chain, Layout] = {(): self.root}
        for c in order:
            inside = frozenset(n for n, kind in self.kinds.items() if c in around[chains[kind]])
            layout = self._layout_of(c, inside, layouts[parents[c]])
            if isinstance(layout, Fault):
                return layout
            layouts[c] = layout
        outside = self._outside(chains, homes, layouts)
        if outside is not None:
            return outside
        self._require_combinable(chains, around)
        nodes = [Node()] + [
            Node(c[-1], numbers[parents[c]], self.plates[c[-1]].count, frozenset(map(plate_key, layouts[c].plates)))
            for c in order
        ]
        return Tree(tuple(nodes), {name: numbers[c] for name, c in homes.items()}, self.wanted.combined)

    def _homes(self, chains: Mapping[Kind, Chain], around: Mapping[Chain, set[Chain]]) -> dict[str, Chain] | Fault:
        """The innermost chain that reaches each site, by label."""
        sites = {name: site for _, name, site in self.pairs[0].sites()}
        reaching = {name: {chains[k] for k, names in self.reached.items() if name in names} for name in sites}
        for group in enumerated_groups(self.pairs[0]):
            together = set[Chain]().union(*(reaching[name] for name in group))
            reaching.update({name: together for name in group})
        homes: dict[str, Chain] = {}
        for name, site in sites.items():
            found = reaching[name] | {homes.get(label(name, site), ())}
            inner = max(found, key=len)
            apart = [(a, b) for a, b in itertools.permutations(found, 2) if a not in around[b] and b not in around[a]]
            if apart:
                return self._crossing(name, chains, *min(apart, key=lambda pair: (pair[0][-1] == pair[1][-1], pair)))
            homes[label(name, site)] = inner
        for name, kind in self.kinds.items():
            inner = homes[label(name, self.latents[name])]
            if inner != chains[kind]:
                return Fault(
                    frozenset(k for k, c in chains.items() if c == inner),
                    f"the guide draws site '{name}' given latents of plate '{inner[-1]}', inside which it does not lie",
                )
        return homes

    def _crossing(self, name: str, chains: Mapping[Kind, Chain], one: Chain, other: Chain) -> Fault:
        def latents(chain: Chain) -> list[str]:
            kinds = [k for k, c in chains.items() if c == chain and name in self.reached[k]]
            return sorted(n for n, kind in self.kinds.items() if kind in kinds)

        return Fault(
            frozenset(k for k, c in chains.items() if c in (one, other)),
            f"site '{name}' depends on latents {latents(one)} of plate '{one[-1]}' and on {latents(other)} of plate "
            f"'{other[-1]}', neither of which lies inside the other",
        )

    def _layout_of(self, chain: Chain, inside: frozenset[str], parent: Layout) -> Layout | Fault:
        """The columns of a node: its parent's and its own plate, and all else that holds the latents inside it."""
        if (inside, chain) not in self.checked:
            self.checked[inside, chain] = self._check(chain, inside, parent)
        return self.checked[inside, chain]

    def _check(self, chain: Chain, inside: frozenset[str], parent: Layout) -> Layout | Fault:
        whole = self._layout(lambda site: site["name"] in inside)
        plate = self.plates[chain[-1]].place
        least = whole.keeping_keys({plate_key(plate), *map(plate_key, parent.plates)})
        fault, _ = self.trial.mixing_fault(self.pairs, whole, self.run, inside)
        if fault is None:
            return whole
        fault, _ = self.trial.mixing_fault(self.pairs, least, self.run, inside)
        if fault is not None:
            return Fault(
                frozenset(self.kinds[name] for name in inside),
                f"{fault[0]} site '{fault[1]}' depends on them and lies outside plate '{plate.name}', or mixes its "
                f"elements; {PUT_INSIDE}",
            )
        for further in whole.plates:
            if further not in least.plates:
                wider = whole.keeping([*least.plates, further])
                if self.trial.mixing_fault(self.pairs, wider, self.run, inside)[0] is None:
                    least = wider
        return least

    def _layout(self, holds: Callable[[Site], bool]) -> Layout:
        dims = self.run.particle_dims(CHECK_PARTICLES)
        return candidates(self.pairs[0].model, self.pairs[0].guide, dims, holds)

    def _outside(
        self, chains: Mapping[Kind, Chain], homes: Mapping[str, Chain], layouts: Mapping[Chain, Layout]
    ) -> Fault | None:
        """A site that belongs to a node and does not lie in all of its plates."""
        together = {name for group in enumerated_groups(self.pairs[0]) for name in group}
        for _, name, site in self.pairs[0].sites():
            chain = homes[label(name, site)]
            if chain and layouts[chain].element(site) is None and not is_zero(site):
                reason = f"site '{name}' depends on them and lies outside plate '{chain[-1]}'; {PUT_INSIDE}"
                if name in together:
                    reason = (
                        f"site '{name}' is summed out together with sites of plate '{chain[-1]}' and lies outside it; "
                        "sample it in the guide, or move it into the plate"
                    )
                return Fault(frozenset(k for k, c in chains.items() if c == chain), reason)
        return None

    def _require_combinable(self, chains: Mapping[Kind, Chain], around: Mapping[Chain, set[Chain]]) -> None:
        """Raises where a draw that is to serve all particles further out depends on them."""
        if not self.wanted.combined:
            return
        for name, kind in self.kinds.items():
            for other in self.kinds.values():
                chain, outer = chains[kind], chains[other]
                if chain and outer != chain and outer in around[chain] and name in self.drawn_given[other]:
                    raise ValueError(combine_problem(name, chain[-1]))
