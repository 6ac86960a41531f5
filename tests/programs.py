# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Random models and guides: a description that says by construction which plates are independent, and runs itself."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal


@dataclass(frozen=True)
class PlateSpec:
    """A plate; ``dim`` is None for a sequential one, ``shown`` is the size of a minibatch, if any."""

    name: str
    size: int
    dim: int | None
    shown: int | None = None

    @property
    def count(self):
        return self.shown or self.size


@dataclass(frozen=True)
class SiteSpec:
    """A site of the model: where it lies, what it depends on, how it is distributed.

    ``family``: normal, vector (two event entries), detached (a Gaussian without rsample), gamma, coin, coins (two that
    seldom fall on 1, in one event), levels (one of three), counts, onehot; observations may also be a factor, or
    mixture (a coin summed out by enumeration above a Gaussian).
    """

    name: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    family: str
    mask: str | None = None
    scale: float = 1.0

    @property
    def event(self):
        """Event entries."""
        return {"vector": 2, "coins": 2, "onehot": 3}.get(self.family)

    @property
    def event_dim(self):
        return 0 if self.event is None else 1

    def total(self, value):
        """One number for each place: what it contributes to a child's mean."""
        if self.family == "onehot":  # its sum is always 1
            return value[..., 1] - 0.5 * value[..., 2]
        return value.sum(-1) if self.event else value


@dataclass(frozen=True, eq=False)
class Program:
    """Model and guide.

    ``joint`` latents are cut out of one auxiliary draw outside every plate; ``helped`` ones depend on an auxiliary
    draw of their own inside ``helper_plates``. ``renamed``: the guide has its own names for the plates. ``strided``:
    parameters and data are views with gaps.
    """

    plates: tuple[PlateSpec, ...]
    latents: tuple[SiteSpec, ...]
    observations: tuple[SiteSpec, ...]
    joint: frozenset = frozenset()
    helped: dict = field(default_factory=dict)  # latent -> plates of its helper
    renamed: bool = False
    scale: float = 1.0
    deterministic: bool = False
    strided: bool = False
    seed: int = 0
    tape: list = field(default_factory=list, compare=False, repr=False)  # what the guide drew, call by call

    # What is known by construction

    @property
    def plate(self):
        return {p.name: p for p in self.plates}

    @property
    def site(self):
        return {s.name: s for s in self.latents + self.observations}

    @property
    def independent(self):
        """Plates that contain every latent and that no site mixes."""
        inside = [set(s.plates) for s in self.latents]
        inside += [set(s.plates) for s in self.observations if s.family == "mixture"]
        inside += [set(plates) for plates in self.helped.values()]
        inside += [set()] if self.joint else []
        # What is masked altogether mixes nothing, but for what is summed out, which masks do not touch.
        seen = [s for s in self.observations if self.mask_of(s).any() or s.family == "mixture"]
        mixed = [set(self.site[n].plates) - set(s.plates) for s in seen for n in s.parents]
        shared = set.intersection(*inside) if inside else set.intersection(*[set(s.plates) for s in self.observations])
        return [p for p in self.plates if p.name in shared - set().union(*mixed)]

    @property
    def is_biased_for_particles(self):
        """Whether a subsampled plate's scale would sit inside the logarithm."""
        known = {p.name for p in self.independent}
        weighed = [s for s in self.latents + self.observations if known <= set(s.plates)]
        touched = set().union(*(s.plates for s in weighed)) - known
        latent = self.latents or [s for s in self.observations if s.family == "mixture"]
        return any(self.plate[name].shown for name in touched) and bool(latent)

    @property
    def depth(self):
        """Dimensions that plates take where sites are."""
        used = {n for s in self.latents + self.observations for n in s.plates}
        return -min((p.dim for p in self.plates if p.name in used and p.dim is not None), default=0)

    # Running

    def parameters(self):
        """Numbers by site; the same for every program of this seed."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.get_default_dtype())

        found = {}
        for spec in self.latents + self.observations:
            shape = [self.plate[n].size if n in spec.plates else 1 for n in self.plate]
            event = [spec.event] if spec.event else []
            found[spec.name] = pyro.param(f"p_{spec.name}", draw(*event))
            if spec in self.latents:
                found[f"q_{spec.name}"] = pyro.param(f"q_{spec.name}", draw(*shape, *event))
            found[f"x_{spec.name}"] = possible(spec.family, draw(*shape, *event))
        if self.strided:
            found = {name: torch.stack([value, -value], -1)[..., 0] for name, value in found.items()}
        found["q_joint"] = pyro.param("q_joint", draw(2, self.joint_size()))
        return found

    def joint_size(self):
        sizes = [self.numel(self.site[n]) for n in sorted(self.joint)]
        return max(sum(sizes), 1)

    def numel(self, spec):
        return int(torch.tensor([self.plate[n].count for n in spec.plates] + [1]).prod()) * (spec.event or 1)

    def model(self):
        numbers, plates, values = self.parameters(), self._plates(""), {}
        with poutine.scale(scale=self.scale):
            for spec in self.latents + self.observations:
                for element in self._places(spec, plates):
                    self._model_site(spec, element, numbers, plates, values)
            if self.deterministic and self.latents:
                pyro.deterministic("summary", sum(v.sum() for v in values[self.latents[0].name].values()))

    def guide(self):
        numbers, values, drawn = self.parameters(), {}, {}
        plates = self._plates("guide_" if self.renamed else "")
        with poutine.scale(scale=self.scale):
            if self.joint:
                loc, log_scale = numbers["q_joint"]
                fn = dist.Normal(loc, (0.3 * log_scale).exp()).to_event(1)
                drawn["joint"] = pyro.sample("joint", fn, infer={"is_auxiliary": True})
            start = {}
            for name in sorted(self.joint):
                start[name] = sum(self.numel(self.site[n]) for n in start)
            for spec in self.latents:
                if spec.name in self.joint:
                    self._joint_site(spec, start[spec.name], plates, values, drawn)
                    continue
                if spec.name in self.helped:
                    self._helper_site(self.helper(spec), plates, values, drawn)
                for element in self._places(spec, plates):
                    self._guide_site(spec, element, numbers, plates, values, drawn)
        self.tape.append((drawn, {name: p.indices for name, p in plates.items()}))

    def _plates(self, prefix):
        made = {}
        for p in self.plates:
            plate = pyro.plate(prefix + p.name, p.size, subsample_size=p.shown, dim=p.dim)
            made[p.name] = plate
        return made

    def _places(self, spec, plates):
        """Enters the site's plates; yields its element (position, index) in each sequential one."""
        ordered = [n for n in spec.plates if self.plate[n].dim is None]
        wide = [n for n in spec.plates if self.plate[n].dim is not None]

        def walk(names, element):
            if not names:
                with ExitStack() as stack:
                    for n in wide:
                        stack.enter_context(plates[n])
                    yield element
                return
            for position, index in enumerate(plates[names[0]]):
                yield from walk(names[1:], {**element, names[0]: (position, index)})

        yield from walk(ordered, {})

    def label(self, spec, element):
        return spec.name + "".join(f"_{position}" for position, _ in element.values())

    def _part(self, value, spec, element, plates):
        """What belongs to the site's place and minibatch, out of numbers for all elements of all plates."""
        event = spec.event_dim
        sequential, wide = [p for p in self.plates if p.dim is None], [p for p in self.plates if p.dim is not None]
        order = [self.plates.index(p) for p in sequential + sorted(wide, key=lambda p: p.dim)]
        value = value.permute([*order, *range(len(order), value.dim())])
        for p in sequential:
            value = value[int(element[p.name][1])] if p.name in spec.plates else value[0]
        shape = [1] * -min((p.dim for p in wide), default=0)
        for p, size in zip(sorted(wide, key=lambda p: p.dim), value.shape, strict=False):
            shape[p.dim] = size
        value = value.reshape([*shape, *value.shape[value.dim() - event :]])
        for p in wide:
            if p.shown and p.name in spec.plates:
                value = value.index_select(p.dim - event, plates[p.name].indices)
        while value.dim() > event and value.shape[0] == 1:
            value = value[0]
        return value

    def _mean(self, spec, element, numbers, values):
        """The site's parameter plus its parents, summed over plates that the site is not in."""
        mean = numbers[spec.name]
        for order, name in enumerate(spec.parents):
            parent = self.site[name]
            total = 0.0
            for key, value in values[name].items():
                if all(element[n][0] == position for n, position in key if n in element):
                    value = parent.total(value)
                    lost = [self.plate[n].dim for n in parent.plates if n not in spec.plates]
                    for dim in [d for d in lost if d is not None]:
                        value = value.sum(dim, keepdim=True)
                    total = total + value
            term = (0.5 + 0.2 * order) * total
            mean = mean + (term.unsqueeze(-1) if spec.event else term)
        return mean

    def _fn(self, family, mean, width=1.0):
        if family == "coin":
            return dist.Bernoulli(logits=mean)
        if family == "coins":
            return dist.Bernoulli(logits=0.5 * mean - 2.0).to_event(1)
        if family == "onehot":
            return dist.OneHotCategorical(logits=mean * torch.tensor([0.0, 1.0, -0.5]))  # a common shift would be none
        if family == "levels":
            return dist.Categorical(logits=torch.stack([0.0 * mean, mean, -0.5 * mean], -1))
        if family == "gamma":
            return dist.Gamma(0.5 + torch.nn.functional.softplus(mean), width)
        if family == "counts":
            return dist.Poisson(0.1 + torch.nn.functional.softplus(mean))
        if family == "vector":
            return dist.Normal(mean, width).to_event(1)
        return (NonreparameterizedNormal if family == "detached" else dist.Normal)(mean, width)

    def _handlers(self, spec):
        stack = ExitStack()
        if spec.scale != 1.0:
            stack.enter_context(poutine.scale(scale=spec.scale))
        if spec.mask is not None:
            stack.enter_context(poutine.mask(mask=self.mask_of(spec)))
        return stack

    def mask_of(self, spec):
        """All, none, or some: every other element of the vectorised plates."""
        if spec.mask != "some":
            return torch.tensor(spec.mask is None)
        wide = sorted((self.plate[n] for n in spec.plates if self.plate[n].dim is not None), key=lambda p: p.dim)
        mask = torch.tensor(True)
        for p in wide:
            flips = (torch.arange(p.count) % 2 == 0).reshape([-1] + [1] * (-p.dim - 1))
            mask = mask ^ flips
        return mask

    def _model_site(self, spec, element, numbers, plates, values):
        label, key = self.label(spec, element), self._key(element)
        mean = self._mean(spec, element, numbers, values)
        with self._handlers(spec):
            if spec in self.latents:
                values.setdefault(spec.name, {})[key] = pyro.sample(label, self._fn(spec.family, mean))
                return
            data = self._part(numbers[f"x_{spec.name}"], spec, element, plates)
            if spec.family == "factor":
                pyro.factor(label, -0.5 * (data - mean) ** 2)
                return
            if spec.family == "mixture":
                coin = dist.Bernoulli(logits=0.7 * mean)
                mean = mean + 1.5 * pyro.sample(f"{label}_coin", coin, infer={"enumerate": "parallel"})
            pyro.sample(label, self._fn(spec.family.replace("mixture", "normal"), mean), obs=data)

    def _guide_site(self, spec, element, numbers, plates, values, drawn):
        label, key = self.label(spec, element), self._key(element)
        mean = self._part(numbers[f"q_{spec.name}"], spec, element, plates)
        for name in spec.parents:
            if name in values and set(self.site[name].plates) <= set(spec.plates):
                parent = values[name][tuple((n, p) for n, p in key if n in self.site[name].plates)]
                parent = 0.3 * self.site[name].total(parent)
                mean = mean + (parent.unsqueeze(-1) if spec.event else parent)
        if spec.name in self.helped:
            helper = self.helper(spec)
            value = values[helper.name][tuple((n, p) for n, p in key if n in helper.plates)]
            mean = mean + (value.unsqueeze(-1) if spec.event else value)
        with self._handlers(spec):
            value = self._draw(label, self._fn(spec.family, mean, 0.8), drawn, {})
        values.setdefault(spec.name, {})[key] = value

    def helper(self, spec):
        return SiteSpec(f"helper_{spec.name}", self.helped[spec.name], (), "normal")

    def _helper_site(self, helper, plates, values, drawn):
        for element in self._places(helper, plates):
            fn = dist.Normal(torch.tensor(0.2), 0.7)
            value = self._draw(self.label(helper, element), fn, drawn, {"is_auxiliary": True})
            values.setdefault(helper.name, {})[self._key(element)] = value

    @staticmethod
    def _key(element):
        return tuple((n, position) for n, (position, _) in element.items())

    @staticmethod
    def _draw(label, fn, drawn, infer):
        drawn[label] = pyro.sample(label, fn, infer=infer)
        return drawn[label]

    def _joint_site(self, spec, start, plates, values, drawn):
        """Cuts the site's elements out of the joint draw."""
        flat = drawn["joint"][..., start : start + self.numel(spec)]
        ordered = [n for n in spec.plates if self.plate[n].dim is None]
        wide = sorted((self.plate[n] for n in spec.plates if self.plate[n].dim is not None), key=lambda p: p.dim)
        event = [spec.event] if spec.event else []
        shape = [1] * (-min([p.dim for p in wide], default=0))
        for p in wide:
            shape[p.dim] = p.count
        lead = flat.shape[:-1]
        lead = lead[: len(lead) - len(shape)] if len(lead) > len(shape) else lead[:0]
        parts = flat.reshape([*lead, *[self.plate[n].count for n in ordered], *shape, *event])
        for element in self._places(spec, plates):
            part = parts
            for position, _ in element.values():
                part = part.select(len(lead), position)
            fn = dist.Delta(part, event_dim=len(event))
            value = self._draw(self.label(spec, element), fn, drawn, {})
            values.setdefault(spec.name, {})[self._key(element)] = value


def possible(family, data):
    """Data that the family allows."""
    if family in ("coin", "coins"):
        return (data > 0.0).to(data)
    if family == "levels":
        return (data > 0.0).long() + (data > 1.0).long()
    if family == "gamma":
        return data.abs() + 0.1
    if family == "onehot":
        return torch.nn.functional.one_hot(data.argmax(-1), data.shape[-1]).to(data)
    return data.abs().round() if family == "counts" else data


# Random programs

NAMES = "abc"
LATENT = ("normal", "vector", "detached", "coin", "coins", "levels", "gamma", "counts", "onehot")
SEEN = (*LATENT[:2], *LATENT[3:], "factor", "mixture")


@st.composite
def programs(draw, *, matched=False, latent_families=LATENT, smallest=2):
    """A random program; ``matched`` ones have the same plates in model and guide, as Pyro wants them."""
    kinds = draw(st.lists(st.sampled_from(["wide", "wide", "sequential"]), max_size=3))
    dims = iter(draw(st.sampled_from([[-1, -2, -3], [-2, -1, -3], [-3, -1, -2], [-1, -3, -2]])))
    plates = []
    for name, kind in zip(NAMES, kinds, strict=False):
        size = draw(st.integers(smallest, 3))
        shown = 2 if size == 3 and draw(st.booleans()) else None
        plates.append(PlateSpec(name, size, next(dims) if kind == "wide" else None, shown))
    names = [p.name for p in plates]
    core = draw(st.lists(st.sampled_from(names), unique=True)) if names else []  # where most latents are

    def some_plates():
        chosen = set(core) | set(draw(st.lists(st.sampled_from(names), unique=True)) if names else [])
        if core and draw(st.integers(0, 4)) == 0:
            chosen -= {draw(st.sampled_from(core))}
        return tuple(n for n in names if n in chosen)

    def spec(name, parents, families, inner):
        return SiteSpec(
            name,
            some_plates(),
            tuple(parents),
            draw(st.sampled_from(families)),
            draw(st.sampled_from([None, None, "some", "none"])),
            draw(st.sampled_from([1.0, 1.0, 0.5])) if inner else 1.0,
        )

    def shown(spec):
        return frozenset(p.name for p in plates if p.shown and p.name in spec.plates)

    inner = draw(st.integers(0, 3)) == 0
    latents = []
    for i in range(draw(st.sampled_from([0, 1, 1, 2, 2, 3]))):
        new = spec(f"z{i}", [], latent_families, inner)
        fits = [p.name for p in latents if set(p.plates) <= set(new.plates)]
        parents = draw(st.lists(st.sampled_from(fits), unique=True)) if fits else []
        latents.append(replace(new, parents=tuple(parents)))
    observations = []
    for i in range(draw(st.integers(1, 3))):
        new = spec(f"x{i}", [], SEEN, inner)
        mixes = draw(st.integers(0, 4)) == 0
        fits = [p.name for p in latents if mixes or set(p.plates) <= set(new.plates)]
        parents = draw(st.lists(st.sampled_from(fits), unique=True)) if fits else []
        if new.family == "mixture":  # enumerated sites must have one scale, as for TraceEnum_ELBO
            scales = {(s.scale, shown(s)) for s in [*observations, new] if s.family == "mixture"}
            new = replace(new, family="mixture" if len(scales) == 1 else "normal")
        observations.append(replace(new, parents=tuple(parents)))
    joint, helped, renamed = frozenset(), {}, False
    style = draw(st.sampled_from(["plain", "plain", "joint", "helped", "renamed"]))
    if style == "joint":
        joint = frozenset(s.name for s in latents if s.family in ("normal", "vector") and draw(st.booleans()))
        latents = [replace(s, mask=None, scale=1.0) if s.name in joint else s for s in latents]
    if style == "helped" and latents:
        chosen = draw(st.sampled_from(latents))
        lost = draw(st.sampled_from(names)) if names and draw(st.booleans()) else None
        helped = {chosen.name: tuple(n for n in chosen.plates if n != lost)}
    if style == "renamed":
        renamed = not matched and all(p.dim is not None and not p.shown for p in plates)
    program = Program(
        plates=tuple(plates),
        latents=tuple(latents),
        observations=tuple(observations),
        joint=joint,
        helped=helped,
        renamed=renamed,
        scale=draw(st.sampled_from([1.0, 1.0, 1.0, 0.25])),
        deterministic=draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    return program
