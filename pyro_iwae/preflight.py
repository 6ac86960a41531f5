# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What will go wrong with a model and guide, by site name, before any training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_iwae.drawn import settable
from pyro_iwae.inspection import inspect
from pyro_iwae.options import require_callables
from pyro_iwae.particles import Call
from pyro_iwae.plates import Layout, Scale, Site, latent_sites, own_scale
from pyro_iwae.state import unchanged_state
from pyro_iwae.structure import Structure, StructureCache
from pyro_iwae.subsampling import subsampled_inside
from pyro_iwae.terms import is_zero, outer_scale
from pyro_iwae.threads import in_one_thread
from pyro_iwae.traces import Pair, run_pair
from pyro_iwae.tree import PlateParticles, Tree
from pyro_iwae.weighing import weigh_particles

__all__ = ["PlateReport", "Preflight", "SiteReport", "preflight"]

PARTICLES = 10  # the ELBO's default


@dataclass(frozen=True)
class SiteReport:
    """One sample site.

    Attributes:
        name: its name.
        where: "model", "guide" or "both".
        role: "latent", "observed", "deterministic" or "factor".
        plates: names of its plates, outermost first.
        reparameterized: whether the guide's sampler passes gradients; None where the guide does not draw it.
        enumerated: whether it asks for enumeration.
        auxiliary: whether it is the guide's own.
        scale: its ``poutine.scale``, without its plates'; a number, or the word "tensor".
    """

    name: str
    where: str
    role: str
    plates: tuple[str, ...]
    reparameterized: bool | None
    enumerated: bool
    auxiliary: bool
    scale: float | str

    def __str__(self) -> str:
        notes = [self.role, f"in {self.where}"]
        notes += [f"plates {', '.join(self.plates)}"] if self.plates else ["no plate"]
        if self.reparameterized is not None:
            notes.append("reparameterised" if self.reparameterized else "not reparameterised: score-function gradient")
        notes += ["enumerated"] * self.enumerated + ["auxiliary"] * self.auxiliary
        notes += [] if self.scale == 1.0 else [f"poutine.scale {self.scale}"]
        return f"{self.name}: " + "; ".join(notes)


@dataclass(frozen=True)
class PlateReport:
    """One plate.

    Attributes:
        name: its name.
        size: elements that it shows.
        full_size: elements that it stands for.
        independent: whether each element gets its own log-mean-exp.
        prevented_by: the site that keeps it from being independent, or None.
        own_particles: whether its latents can have particles of their own, by ``plate_particles``.
        advice: what to write instead, or an empty string.
    """

    name: str
    size: int
    full_size: int
    independent: bool
    prevented_by: str | None
    own_particles: bool
    advice: str

    def __str__(self) -> str:
        shown = f"{self.size}" if self.size == self.full_size else f"{self.size} of {self.full_size}"
        if self.independent:
            return f"plate {self.name} ({shown} elements): independent, one log-mean-exp for each element"
        verdict = f"not independent, because of site '{self.prevented_by}'. {self.advice}"
        return f"plate {self.name} ({shown} elements): {verdict}"


@dataclass(frozen=True)
class Preflight:
    """The report: printable, and iterable over its sites.

    Attributes:
        sites: every sample site.
        plates: every plate.
        problems: what will raise, in the words of the error.
        warnings: what is legal and probably not meant.
    """

    sites: tuple[SiteReport, ...]
    plates: tuple[PlateReport, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing will raise."""
        return not self.problems

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)

    def __str__(self) -> str:
        lines = ["preflight: " + ("nothing will raise" if self.ok else "this will raise")]
        lines += [f"  will raise: {p}" for p in self.problems]
        lines += [f"  warning: {w}" for w in self.warnings]
        lines += [f"  {p}" for p in self.plates]
        lines += [f"  {s}" for s in self.sites]
        return "\n".join(lines)


@in_one_thread
def preflight(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Preflight:
    """Looks at a model and guide before training.

    Runs both a few times and puts back all that is random. The errors that it lists for more than one particle are
    those that :class:`ImportanceWeightedELBO` raises.

    Args:
        model: the model.
        guide: the guide.
        args: passed to both.
        kwargs: passed to both.

    Returns:
        The report.

    Raises:
        TypeError: where model or guide is not callable. Errors of theirs come through as they are.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 2):
        ...         pyro.sample("z", dist.Normal(mu, 1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 2):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> report = preflight(model, guide)
        >>> report.ok, report.plates[0].independent, report.plates[0].prevented_by
        (True, False, 'mu')
    """
    require_callables(model, guide)
    with poutine.block(), unchanged_state(model, guide):
        pair = run_pair(model, guide, args, kwargs, matched=False)
    call = Call(model, guide, args, kwargs)
    structure, problems, said = _weigh_once(call)
    layout = Layout() if structure is None else structure.layout(pair, 1)
    tree = None if structure is None else _grow_tree(call)
    return Preflight(
        sites=tuple(_sites(pair)),
        plates=tuple(_plates(pair, layout, structure, tree)),
        problems=tuple(problems),
        warnings=tuple(said + _scale_warnings(pair, layout)),
    )


def _weigh_once(call: Call) -> tuple[Structure | None, list[str], list[str]]:
    """The verdict, and what the ELBO would raise and warn of."""
    cache, problems = StructureCache(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with poutine.block(), unchanged_state(call.model, call.guide):
            try:
                weigh_particles(call, num_particles=PARTICLES, cache=cache, vectorize=None, max_plate_nesting=math.inf)
            except (ValueError, NotImplementedError) as error:
                problems.append(str(error))
    return cache.newest, problems, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def _grow_tree(call: Call) -> Structure:
    """The verdict where every plate that owns latents is to have particles of its own."""
    wanted = PlateParticles.of("auto", num_particles=PARTICLES)
    with warnings.catch_warnings(), poutine.block(), unchanged_state(call.model, call.guide):
        warnings.simplefilter("ignore")  # the first look has said it
        return inspect(call, vectorize=None, plate_particles=wanted)


def _sites(pair: Pair) -> Iterator[SiteReport]:
    found: dict[str, dict[str, Site]] = {}
    for role, name, site in pair.sites():
        found.setdefault(name, {})[role] = site
    for name, by_role in found.items():
        site = by_role.get("model") or by_role["guide"]
        drawn = by_role.get("guide")
        yield SiteReport(
            name=name,
            where="both" if len(by_role) == 2 else next(iter(by_role)),
            role=_role(site),
            plates=tuple(f.name for f in site["cond_indep_stack"]),
            reparameterized=None if drawn is None or drawn["is_observed"] else bool(drawn["fn"].has_rsample),
            enumerated=any(bool(s["infer"].get("enumerate")) for s in by_role.values()),
            auxiliary=bool(drawn is not None and drawn["infer"].get("is_auxiliary")),
            scale=_printable(own_scale(site)),
        )


def _role(site: Site) -> str:
    if site["infer"].get("_deterministic"):
        return "deterministic"
    if site_is_factor(site):
        return "factor"
    if not site["is_observed"]:
        return "latent"
    return "observed" if settable(site) else "deterministic"  # a Delta, as effect handlers leave it behind


def _printable(scale: Scale) -> float | str:
    if isinstance(scale, Tensor):
        return float(scale) if scale.dim() == 0 else "tensor"
    return scale


def _plates(pair: Pair, layout: Layout, structure: Structure | None, grown: Structure | None) -> Iterator[PlateReport]:
    seen: dict[str, CondIndepStackFrame] = {}
    for _, _, site in pair.sites():
        for frame in site["cond_indep_stack"]:
            seen.setdefault(frame.name, frame)
    mixed: Mapping[str, str] = {} if structure is None else structure.mixed
    tree = Tree() if grown is None else grown.run.tree
    suggestion = "" if grown is None else _suggestion(pair, tree, grown.layouts(pair, 1))
    joint: Mapping[str, str] = {} if grown is None else grown.joint
    for name, frame in seen.items():
        independent = any(_is_plate(p.name, p.dim, p.size, frame) for p in layout.plates)
        fault, advice = (None, "") if independent else _fault(pair, frame, mixed)
        own = any(node.plate == name for node in tree.nodes)
        if own:
            advice = (
                f"Give its latents particles of their own, for one weight each inside the whole: {suggestion}; or use "
                "more particles"
            )
        if name in joint:
            advice += f". With plate_particles, {joint[name]}"
        full_size = frame.size if frame.full_size is None else frame.full_size
        yield PlateReport(name, frame.size, full_size, independent, fault, own, advice)


def _suggestion(pair: Pair, tree: Tree, layouts: Sequence[Layout]) -> str:
    """Particles for every plate that can have its own; 1 for what is around a subsampled one."""
    ones = set[int]().union(*(around for _, _, around in subsampled_inside(pair, layouts, tree)))
    counts = {node.plate: 1 if i in ones else PARTICLES for i, node in enumerate(tree.nodes) if i}
    return ("num_particles=1, " if 0 in ones else "") + f"plate_particles={counts}"


def _is_plate(name: str, dim: int | None, size: int, frame: CondIndepStackFrame) -> bool:
    """Whether the frame is of this independent plate: by name if sequential, else by dimension and size."""
    return frame.name == name if dim is None else (frame.dim, frame.size) in ((dim, size), (dim, -1))


def _fault(pair: Pair, frame: CondIndepStackFrame, mixed: Mapping[str, str]) -> tuple[str | None, str]:
    """The site that keeps a plate from being independent, and what to write instead."""
    if frame.name in mixed:
        return mixed[frame.name], (
            "It mixes the plate's elements (a flip, a mean, BatchNorm, an in-place sum over them). The whole plate "
            "gets one weight, which is right but needs many more particles; keep the elements apart for one weight each"
        )
    for trace in (pair.model, pair.guide):  # a latent of the guide's own only counts if the model has none there
        for name, site in latent_sites(trace):
            if not any(_is_plate(f.name, f.dim, f.size, frame) for f in site["cond_indep_stack"]):
                advice = (
                    "That latent lies outside the plate, so that one weight serves all elements; use more particles"
                )
                if trace is pair.guide:
                    return name, advice + ", or a guide that factorises over the plate (AutoNormal)"
                return name, advice + ", or a model without that latent (a parameter in its place)"
    return None, "It could not be looked at, because of the error above"


def _scale_warnings(pair: Pair, layout: Layout) -> list[str]:
    """A scale on some of the weighed sites only tempers the weights."""
    if outer_scale(pair, layout) is not None:
        return []
    larger: dict[float | str, list[str]] = {}
    others: dict[float | str, list[str]] = {}
    for role, name, site in pair.sites():
        scale = _printable(own_scale(site))
        if scale == 1.0 or is_zero(site) or layout.element(site) is None:
            continue
        overshoots = site["is_observed"] and (isinstance(scale, str) or scale > 1.0)
        (larger if overshoots else others).setdefault(scale, []).append(f"{role} site '{name}'")
    return [
        f"poutine.scale of {scale} at {', '.join(sites)}, but not everywhere, acts inside the weights: the bound "
        "overshoots the evidence for more than one particle. For minibatches write "
        "pyro.plate(..., subsample_size=B), which stays outside"
        for scale, sites in larger.items()
    ] + [
        f"poutine.scale of {scale} at {', '.join(sites)}, but not everywhere, tempers the weights: they are no evidence"
        for scale, sites in others.items()
    ]
