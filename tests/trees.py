# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Random hierarchical models whose plates have particles of their own, and the bound by loops over all of these.

The reference takes what the guide drew, runs model and guide once for each combination of particles, and sums
``site["fn"].log_prob`` over elements one by one. Particles are told by their numbers: all counts differ.
"""

import itertools
import math
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal

from tests.naive import Substitute

COUNTS = (2, 3, 4, 5)  # of the root, and of named plates as they come: never two alike


@dataclass(frozen=True)
class Latent:
    """``above``: whether prior and guide depend on the nearest latent further out."""

    name: str
    family: str  # normal, detached (no rsample), coin
    above: bool
    guided: bool


@dataclass(frozen=True)
class Seen:
    """An observation; mixture is a coin summed out above a Gaussian, hidden one that alone follows latents."""

    name: str
    family: str  # normal, mixture, hidden
    follows: bool  # the nearest latent further out


@dataclass(frozen=True)
class Plate:
    """A plate with what is in it; ``count`` is the number of its particles, None where it has none of its own."""

    name: str
    size: int
    dim: int | None
    count: int | None
    latents: tuple
    seen: tuple
    inner: tuple = ()
    shown: int | None = None

    @property
    def elements(self):
        return self.shown or self.size

    @property
    def key(self):
        """Vectorised plates of one dimension, size and scale are one: their elements can belong together."""
        return self.name if self.dim is None else (self.dim, self.elements, self.size)

    def all_latents(self):
        return [*self.latents, *(latent for plate in self.inner for latent in plate.all_latents())]

    def below(self):
        """All plates inside, each after those around it."""
        return [p for plate in self.inner for p in (plate, *plate.below())]


@dataclass(frozen=True, eq=False)
class TreeProgram:
    """Model and guide; ``root`` is a plate of one element that is not there."""

    root: Plate
    seed: int = 0
    tape: list = field(default_factory=list, compare=False, repr=False)

    @property
    def plate_particles(self):
        return {p.name: p.count for p in self.root.below() if p.count}

    def numbers(self):
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for plates in self.paths():
            shape = [p.size for p in plates[1:]]
            for item in (*plates[-1].latents, *plates[-1].seen):
                found[item.name] = pyro.param(f"p_{item.name}", torch.randn((), generator=generator))
                found[f"q_{item.name}"] = pyro.param(f"q_{item.name}", torch.randn(shape, generator=generator))
                found[f"x_{item.name}"] = torch.randn(shape, generator=generator)
        return found

    def paths(self, plates=None):
        """Every plate with those around it."""
        plates = (self.root,) if plates is None else plates
        yield plates
        for inner in plates[-1].inner:
            yield from self.paths((*plates, inner))

    # Running

    def model(self):
        self._run(self.numbers(), is_model=True)

    def guide(self):
        with poutine.trace() as tracer:
            self._run(self.numbers(), is_model=False)
        drawn = {n: s for n, s in tracer.trace.nodes.items() if s["type"] == "sample"}
        self.tape.append({n: s["value"] for n, s in drawn.items()})

    def _run(self, numbers, is_model):
        self._inside((self.root,), {}, {}, numbers, is_model, {})

    def _inside(self, path, index, nearest, numbers, is_model, plates):
        plate, nearest = path[-1], dict(nearest)
        suffix = "".join(f"_{i}" for p, i in index.items() if p.dim is None)
        for latent in plate.latents:
            above = nearest.get("z")
            nearest["z"] = self._draw(latent, latent.name + suffix, above, path, index, numbers, is_model)
        if is_model:
            for seen in plate.seen:
                self._observe(
                    seen, seen.name + suffix, nearest.get("z") if seen.follows else None, path, index, numbers
                )
        for inner in plate.inner:
            if inner.dim is None:
                if inner.name not in plates:
                    plates[inner.name] = pyro.plate(inner.name, inner.size, inner.shown)
                for i in plates[inner.name]:
                    self._inside((*path, inner), {**index, inner: int(i)}, nearest, numbers, is_model, plates)
            else:
                with pyro.plate(inner.name, inner.size, inner.shown, dim=inner.dim) as rows:
                    self._inside((*path, inner), {**index, inner: rows}, nearest, numbers, is_model, plates)

    @staticmethod
    def _rows(value, path, index):
        """An array by plate, at these elements, with the plates' dimensions where they belong."""
        dims = []
        for plate in path[1:]:
            if plate.dim is None:
                value = value.select(len(dims), index[plate])
            else:
                value = value.index_select(len(dims), torch.as_tensor(index[plate]))
                dims.append(plate.dim)
        shape = [1] * -min(dims, default=0)
        for dim, size in zip(dims, value.shape, strict=True):
            shape[dim] = size
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        return value.permute(order).reshape(shape)

    def _draw(self, latent, name, above, path, index, numbers, is_model):
        if is_model:
            loc = numbers[latent.name] + (0.7 * above if latent.above and above is not None else 0.0)
        else:
            own = self._rows(numbers[f"q_{latent.name}"], path, index)
            loc = own + (0.5 * above if latent.guided and above is not None else 0.0)
        if latent.family == "coin":
            return pyro.sample(name, dist.Bernoulli(logits=loc))
        law = NonreparameterizedNormal if latent.family == "detached" and not is_model else dist.Normal
        return pyro.sample(name, law(loc, torch.tensor(1.0 if is_model else 0.8)))

    def _observe(self, seen, name, above, path, index, numbers):
        data = self._rows(numbers[f"x_{seen.name}"], path, index)
        loc = numbers[seen.name] + (0.0 if above is None else above)
        if seen.family != "normal":
            side = pyro.sample(f"c{name}", dist.Bernoulli(logits=0.3 * loc), infer={"enumerate": "parallel"})
            loc = (numbers[seen.name] if seen.family == "hidden" else loc) + 1.5 * side
        pyro.sample(name, dist.Normal(loc, 1.0), obs=data)


# The reference


@dataclass(frozen=True)
class Node:
    """A plate with particles of its own (or the root): the unnamed plates that belong to it, and nodes inside."""

    plate: Plate
    around: tuple  # plates outside and this one
    mine: tuple  # plates whose sites are weighed here
    children: tuple

    def nodes(self):
        yield self
        for child in self.children:
            yield from child.nodes()


def node_of(plate, around):
    around = (*around, plate)
    mine, children = [around], []

    def visit(inner, path):
        if inner.count:
            children.append(node_of(inner, path))
            return
        mine.append((*path, inner))
        for further in inner.inner:
            visit(further, (*path, inner))

    for inner in plate.inner:
        visit(inner, around)
    return Node(plate, around, tuple(mine), tuple(children))


def columns(node):
    """Plates that hold all latents of the node and of those inside it."""
    paths = [path[1:] for n in node.nodes() for path in n.mine if path[-1].latents]
    if len(node.around) == 1:  # what is summed out is a latent, too; further in it belongs to the latents it follows
        paths += [p[1:] for n in node.nodes() for p in n.mine if any(s.family != "normal" for s in p[-1].seen)]
    keys = [{p.key for p in path} for path in paths]
    return [p for p in paths[0] if all(p.key in held for held in keys)] if paths else list(node.around[1:])


@dataclass(frozen=True)
class Changed:
    """A particle that is taken out of its node, or replaced by the mean of its companions."""

    node: str
    element: dict
    place: dict
    replaced: bool

    def is_at(self, node, element, place):
        return node == self.node and element == self.element and all(place[n] == i for n, i in self.place.items())


class Reference:
    """The bound by loops, with the graph of the guide's draws."""

    def __init__(self, program, num_particles, combine=False):
        self.program, self.combine = program, combine
        self.tree = node_of(program.root, ())
        self.counts = {n.plate.name: n.plate.count or num_particles for n in self.tree.nodes()}
        self.homes = {item.name: node for node in self.tree.nodes() for path in node.mine for item in path[-1].latents}
        parents = {child: node for node in self.tree.nodes() for child in node.children}
        self.items, self.constants = {node: [] for node in self.tree.nodes()}, []
        for node in self.tree.nodes():
            for path in node.mine:
                for item in (*path[-1].latents, *path[-1].seen):
                    self._place(item, path, node, parents)
        self.minibatch = {n: v for n, v in program.tape[0].items() if n.endswith("_idx") or n in self._plate_names()}
        self.runs, self.known = {}, {}

    def _place(self, item, path, node, parents):
        """Where a site is weighed: at the innermost node in all of whose elements it lies; else once, for itself."""
        while node is not None and not {p.key for p in columns(node)} <= {p.key for p in path[1:]}:
            node = parents.get(node)
        (self.constants if node is None else self.items[node]).append((item, path))

    def _plate_names(self):
        return {p.name for p in self.program.root.below()}

    def path_of(self, node):
        """Names of the nodes around a node, and its own."""
        named = [p.name for p in node.around if p.count or p is self.program.root]
        return tuple(named)

    def value(self, name, place):
        """What the guide drew for a latent in a particle of each node."""
        home = self.homes[name.split("_")[0]]
        path = (home.plate.name,) if self.combine else self.path_of(home)
        if len(self.program.tape) > 1:
            return self._of_runs(name, path, place)
        value = self.program.tape[0][name]
        depth = self.depth
        lead = value.dim() - depth
        for position in range(max(lead, 0)):
            size = value.shape[position]
            owner = next((n for n in path if self.counts[n] == size), None)
            if size > 1:
                assert owner is not None, (name, value.shape, path)
                value = value.narrow(position, place[owner], 1)
        return value.reshape(value.shape[max(lead, 0) :]) if lead > 0 else value

    @property
    def depth(self):
        used = [p for path in self.program.paths() if path[-1].latents or path[-1].seen for p in path[1:]]
        return -min((p.dim for p in used if p.dim is not None), default=0)

    def _of_runs(self, name, path, place):
        """One after the other: the first run in which each node around is at its place, told by the draws."""
        runs = self.program.tape
        for node in path:
            own = sorted(n for n in self.all_names() if self.homes[n.split("_")[0]].plate.name == node)
            if not own:  # a root without latents: as many runs for each of its particles
                size = len(runs) // self.counts[node]
                runs = runs[place[node] * size : (place[node] + 1) * size]
                continue
            keys = [tuple(id(run[n]) for n in own) for run in runs]  # what is reused is one tensor
            distinct = list(dict.fromkeys(keys))
            assert len(distinct) == self.counts[node], (node, len(distinct), self.counts[node])
            runs = [run for run, key in zip(runs, keys, strict=True) if key == distinct[place[node]]]
        return runs[0][name]

    def all_names(self):
        return [n for n in self.program.tape[0] if n.split("_")[0] in self.homes]

    def traces(self, place):
        key = tuple(sorted(place.items()))
        if key not in self.runs:
            values = {n: self.value(n, place) for n in self.all_names()} | self.minibatch
            tape = list(self.program.tape)
            found = []
            for fn in (self.program.model, self.program.guide):
                with poutine.trace() as tracer, Substitute(values):
                    fn()
                found.append(tracer.trace)
            self.program.tape[:] = tape
            self.runs[key] = found
        return self.runs[key]

    def bound(self, changed=None):
        """The bound, and by element of the root."""
        per_element, plates = [], columns(self.tree)
        model, guide = self.traces(dict.fromkeys(self.counts, 0))
        total = sum((self._log_density(item, path, {}, model, guide) for item, path in self.constants), torch.zeros(()))
        for element in self._elements(plates):
            value = self._log_mean(self.tree, element, {}, changed)
            per_element.append(value)
            total = total + self._scale(plates) * value
        return total, per_element

    def surrogate(self, score="balanced"):
        """Its gradient is that of the bound: pathwise, and the other sites by the bound without each particle."""
        total, _ = self.bound()
        surrogate = total
        for node in self.tree.nodes():
            drawn = [(i, path) for i, path in self.items[node] if getattr(i, "family", "") in ("detached", "coin")]
            names = (node.plate.name,) if self.combine else self.path_of(node)
            for element in self._elements(columns(node)) if drawn else ():
                for index in itertools.product(*(range(self.counts[n]) for n in names)):
                    place = dict(zip(names, index, strict=True))
                    _, guide = self.traces({**dict.fromkeys(self.counts, 0), **place})
                    log_q = sum(self._term(guide, item.name, path, element) for item, path in drawn)
                    without, _ = self.bound(Changed(node.plate.name, element, place, score == "mean"))
                    if self.counts[node.plate.name] == 1:  # the root's one: its element's bound, and no -v_k part
                        own = self._log_mean(node, element, {}).detach()
                        surrogate = surrogate + (own + 1.0) * log_q
                    else:
                        surrogate = surrogate + (total - without).detach() * log_q
        return surrogate

    @staticmethod
    def _elements(plates):
        for index in itertools.product(*(range(p.elements) for p in plates)):
            yield dict(zip([p.key for p in plates], index, strict=True))

    @staticmethod
    def _scale(plates):
        return math.prod(p.size / p.elements for p in plates)

    def _log_mean(self, node, element, place, changed=None):
        """log (1/M) sum_m w_m; ``changed``: a particle that is left out, or the mean of the others in its place."""
        weights, gone = [], []
        for m in range(self.counts[node.plate.name]):
            here = {**place, node.plate.name: m}
            weights.append(self._weight(node, element, here, changed))
            gone.append(changed is not None and changed.is_at(node.plate.name, element, here))
        kept = torch.stack([w for w, out in zip(weights, gone, strict=True) if not out] or [torch.tensor(-math.inf)])
        total = kept.logsumexp(0)
        if any(gone) and changed.replaced:
            total = total + math.log(len(weights) / len(kept))
        return total - math.log(len(weights))

    def _weight(self, node, element, place, changed=None):
        total = self._own(node, element, place)
        for child in node.children:
            further = [p for p in columns(child) if p.key not in element]
            for rest in self._elements(further):
                total = total + self._scale(further) * self._log_mean(child, {**element, **rest}, place, changed)
        return total

    def _own(self, node, element, place):
        key = (node.plate.name, str(element), str(place))
        if key not in self.known:
            model, guide = self.traces({n: place.get(n, 0) for n in self.counts})
            items = self.items[node]
            terms = (self._log_density(item, path, element, model, guide) for item, path in items)
            self.known[key] = sum(terms, torch.zeros(()))
        return self.known[key]

    def _log_density(self, item, path, element, model, guide):
        if isinstance(item, Latent):
            return self._term(model, item.name, path, element) - self._term(guide, item.name, path, element)
        if item.family != "normal":
            return self._mixture(model, item, path, element)
        return self._term(model, item.name, path, element)

    def _sites(self, trace, name, path, element):
        """The sites of this name at an element of the sequential plates."""
        for index in itertools.product(*(range(p.elements) for p in path[1:] if p.dim is None)):
            sequential = dict(zip([p for p in path[1:] if p.dim is None], index, strict=True))
            if all(element.get(p.key, i) == i for p, i in sequential.items()):
                yield trace.nodes[name + "".join(f"_{i}" for i in index)]

    def _term(self, trace, name, path, element, density=None):
        total = torch.zeros(())
        for site in self._sites(trace, name, path, element):
            log_prob = site["fn"].log_prob(site["value"]) if density is None else density(site)
            for plate in path[1:]:
                if plate.dim is not None and plate.key in element and log_prob.dim() >= -plate.dim:
                    log_prob = log_prob.narrow(plate.dim, element[plate.key], 1)
            scale = self._scale([p for p in path[1:] if p.key not in element])
            total = total + scale * log_prob.sum()
        return total

    def _mixture(self, trace, item, path, element):
        """The coin summed out, element by element."""

        def density(site):
            coin = trace.nodes["c" + site["name"]]
            logits, shift = coin["fn"].logits, 1.5 * coin["value"]
            terms = []
            for c in (0.0, 1.0):
                fn = dist.Normal(site["fn"].loc - shift + 1.5 * c, site["fn"].scale)
                terms.append(fn.log_prob(site["value"]) + dist.Bernoulli(logits=logits).log_prob(torch.tensor(c)))
            return torch.logaddexp(*torch.broadcast_tensors(*terms))

        return self._term(trace, item.name, path, element, density)


# Generation


@st.composite
def tree_programs(draw, guided=True, subsampled=False):
    """Up to three named plates and one unnamed, nested or side by side.

    With minibatches what is around them has one particle, and all sites are reparameterised: the control of a site that
    is not may then differ by what no latent reaches.
    """
    counts = iter(COUNTS[1:])
    families = ["normal"] if subsampled else ["normal", "normal", "detached", "coin"]
    names = itertools.count()

    def latent(prefix):
        return Latent(
            f"{prefix}{next(names)}",
            draw(st.sampled_from(families)),
            draw(st.booleans()),
            guided and draw(st.booleans()),
        )

    def seen():
        return Seen(
            f"x{next(names)}", draw(st.sampled_from(["normal", "normal", "mixture", "hidden"])), draw(st.booleans())
        )

    def plate(depth, vectorized):
        named = draw(st.sampled_from([True, True, True, False]))
        count = next(counts, None) if named else None
        sequential = not vectorized or draw(st.sampled_from([False, False, False, True]))
        inner = []
        if depth < 2:
            inner = [
                plate(depth + 1, not sequential)
                for _ in range(draw(st.sampled_from([0, 0, 1, 2 if depth == 0 else 1])))
            ]
        size = draw(st.sampled_from([1, 2, 3]))
        shown = draw(st.integers(1, size)) if subsampled and not sequential else None
        if count and any(p.shown and p.shown < p.size for plate in inner for p in (plate, *plate.below())):
            count = 1
        latents = [
            latent("z") for _ in range(draw(st.sampled_from([1, 1, 2])) if count else draw(st.sampled_from([0, 1])))
        ]
        return Plate(
            f"P{next(names)}",
            size,
            None if sequential else depth - 3,
            count,
            tuple(latents),
            tuple(seen() for _ in range(draw(st.sampled_from([0, 1] if latents or inner else [1])))),
            tuple(inner),
            shown,
        )

    plates = [plate(0, True) for _ in range(draw(st.sampled_from([1, 1, 2])))]
    root = Plate(
        "root",
        1,
        0,
        None,
        tuple(latent("g") for _ in range(draw(st.sampled_from([0, 1, 1])))),
        tuple(seen() for _ in range(draw(st.sampled_from([0, 1])))),
        tuple(plates),
    )
    return TreeProgram(root, seed=draw(st.integers(0, 2**16)))
