# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Which plates may be independent, which scale belongs to which plate, and where each plate's elements lie.

A plate is independent if it contains every latent and no site mixes its elements: then the weight factorises and each
element gets its own log-mean-exp. What a trace shows by itself is settled here; whether a site mixes elements takes
another run of the model and is settled in ``inspection.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_iwae.decisions import holds

__all__ = [
    "IndependentPlate",
    "Layout",
    "candidates",
    "label",
    "nesting",
    "own_scale",
    "plate_key",
    "plate_scale",
    "signature",
]

Site = Any  # Pyro types its messages one way and uses them another
Scale = float | Tensor
PARTICLES = "_importance_particles_"  # what the plates of particles are called


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace, observed ones included, minibatch indices not."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def latent_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites that are drawn, not observed."""
    return ((name, site) for name, site in sample_sites(trace) if not site["is_observed"])


def nesting(traces: Iterable[Trace]) -> int:
    """How many dimensions the vectorised plates of these traces take."""
    dims = [f.dim for t in traces for _, s in sample_sites(t) for f in s["cond_indep_stack"] if f.dim is not None]
    return -min(dims) if dims else 0


def plate_scale(frame: CondIndepStackFrame) -> float:
    """N / B of a plate that shows B of its N elements; 1 for a plate that shows all, or whose size is not given."""
    if frame.full_size is None or frame.size <= 0:
        return 1.0
    return float(frame.full_size) / float(frame.size)


def own_scale(site: Site) -> Scale:
    """The site's scale without its plates' part: 1 unless ``poutine.scale`` wraps the site."""
    scale = site["scale"] / math.prod(plate_scale(f) for f in site["cond_indep_stack"])
    if isinstance(scale, Tensor):
        return scale
    return 1.0 if math.isclose(scale, 1.0, rel_tol=1e-9) else scale


def same_scale(a: Scale, b: Scale) -> bool:
    """Whether two scales are one and the same number or tensor."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if a is b:
            return True
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and holds(torch.isclose(a, b.to(a), rtol=1e-6).all())
    return math.isclose(a, b, rel_tol=1e-9)


def frame_size(frame: CondIndepStackFrame, site: Site) -> int:
    """Elements that the plate shows; read off the site where the plate was made without a size."""
    if frame.size > 0 or frame.dim is None:
        return frame.size
    shape = site["fn"].batch_shape
    return shape[frame.dim] if len(shape) >= -frame.dim else 1


def is_subsampled(frame: CondIndepStackFrame) -> bool:
    """Whether the plate shows only some of its elements."""
    return not math.isclose(plate_scale(frame), 1.0)


@dataclass(frozen=True)
class IndependentPlate:
    """A plate whose elements each get their own log-mean-exp.

    ``dim`` is None for a sequential plate (``for i in pyro.plate(...)``), whose elements are told by their counter.
    A vectorised one is known by its dimension, size and scale, not by its name: latents in plate "za" and data in plate
    "xa" of the same dimension and size can belong together.
    """

    name: str
    dim: int | None
    size: int
    scale: float

    def frame_of(self, site: Site) -> CondIndepStackFrame | None:
        """The site's frame for this plate, or None where the site is outside."""
        for frame in site["cond_indep_stack"]:
            if self.dim is None and not frame.vectorized and frame.name == self.name:
                return frame
            alike = frame.vectorized and frame.dim == self.dim and frame_size(frame, site) == self.size
            if alike and math.isclose(plate_scale(frame), self.scale):
                return frame
        return None


@dataclass(frozen=True)
class Layout:
    """Where the columns of the weights lie: sequential plates first, then vectorised ones from left to right."""

    plates: tuple[IndependentPlate, ...] = ()
    particle_dims: tuple[int, ...] = ()  # of a vectorised run; in a sequential one each trace is one particle
    holds: Callable[[Site], bool] = lambda site: True  # whose sites, where plates have particles of their own

    @property
    def sequential(self) -> tuple[IndependentPlate, ...]:
        return tuple(p for p in self.plates if p.dim is None)

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(p.dim for p in self.plates if p.dim is not None)

    @property
    def scale(self) -> float:
        return math.prod((p.scale for p in self.plates), start=1.0)

    def keeping(self, plates: Iterable[IndependentPlate]) -> Layout:
        """The same layout with only these of its plates."""
        chosen = set(plates)
        return replace(self, plates=tuple(p for p in self.plates if p in chosen))

    def keeping_keys(self, keys: Collection[int | str]) -> Layout:
        """The same layout with only the plates that these keys tell."""
        return replace(self, plates=tuple(p for p in self.plates if plate_key(p) in keys))

    def plates_of(self, site: Site) -> tuple[IndependentPlate, ...]:
        """The independent plates that contain the site."""
        return tuple(p for p in self.plates if p.frame_of(site) is not None)

    def element(self, site: Site) -> tuple[int, ...] | None:
        """The site's element in each sequential plate, or None where the site lies outside an independent plate."""
        frames = [p.frame_of(site) for p in self.plates]
        if any(f is None for f in frames):
            return None
        return tuple((f.counter - 1) % f.size for f in frames if f is not None and not f.vectorized)

    def outer_frames(self, site: Site) -> list[CondIndepStackFrame]:
        """The site's frames that are neither an independent plate's nor the particles'."""
        own = [p.frame_of(site) for p in self.plates]
        return [f for f in site["cond_indep_stack"] if f not in own and not self._is_particle_frame(f)]

    def _is_particle_frame(self, frame: CondIndepStackFrame) -> bool:
        return frame.vectorized and frame.dim in self.particle_dims

    def columns(self, value: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
        """Sums a site's values down to ``(particles, *dims)``; dims are those of the vectorised plates."""
        dims = self.dims if dims is None else dims
        kept = (*self.particle_dims, *dims)
        missing = -min(kept, default=0) - value.dim()
        if missing > 0:
            value = value.reshape((1,) * missing + value.shape)
        summed = [d for d in range(-value.dim(), 0) if d not in kept]
        if summed:
            value = value.sum(summed)
        return value if self.particle_dims else value.unsqueeze(0)

    def lay(self, columns: Tensor, site: Site, value: Tensor) -> Tensor:
        """Lays columns, ``(*particles, *plates)``, along a value of a site in a run of all particles."""
        first, event_dim = max(1, len(self.particle_dims)), site["fn"].event_dim
        for index in self._element_of(site):
            columns = columns.select(first, index)
        sizes = dict(zip((*self.particle_dims, *self.dims), columns.shape, strict=True))
        return columns.reshape([sizes.get(d, 1) for d in range(event_dim - value.dim(), 0)] + [1] * event_dim)

    def _element_of(self, site: Site) -> tuple[int, ...]:
        element = self.element(site)
        if element is None:
            raise ValueError(f"site '{site['name']}' lies outside the independent plates {self.plates}")
        return element

    def align(self, columns: Tensor, site: Site, value: Tensor) -> Tensor:
        """Shapes something per column, ``(n, *plates)``, to select within ``value``, ``(n, *site shape)``."""
        for index in self._element_of(site):
            columns = columns[:, index]
        event_dim = site["fn"].event_dim
        sizes = dict(zip(self.dims, columns.shape[1:], strict=True))
        batch = [sizes.get(d, 1) for d in range(1 + event_dim - value.dim(), 0)]
        return columns.reshape([columns.shape[0], *batch] + [1] * event_dim)


def plate_key(plate: IndependentPlate) -> int | str:
    """What tells a plate from call to call: the dimension of a vectorised one, the name of a sequential one."""
    return plate.name if plate.dim is None else plate.dim


def candidates(
    model_trace: Trace,
    guide_trace: Trace,
    particle_dims: tuple[int, ...] = (),
    holds: Callable[[Site], bool] = lambda site: True,
) -> Layout:
    """The plates that contain every latent of model and guide (every site at all, where there is no latent).

    Args:
        model_trace: a run of the model.
        guide_trace: the guide's.
        particle_dims: dimensions of particles in these runs.
        holds: whether a site counts.
    """
    traces = (model_trace, guide_trace)
    sites = [s for t in traces for _, s in latent_sites(t)] or [s for t in traces for _, s in sample_sites(t)]
    sites = [s for s in sites if holds(s) and not s["infer"].get("_deterministic")]
    if not sites:
        return Layout((), particle_dims)
    frames = [f for f in sites[0]["cond_indep_stack"] if f.dim is None or f.dim not in particle_dims]
    plates = [IndependentPlate(f.name, f.dim, frame_size(f, sites[0]), plate_scale(f)) for f in frames]
    shared = [p for p in plates if all(p.frame_of(s) is not None for s in sites)]
    shared.sort(key=lambda p: -math.inf if p.dim is None else p.dim)
    return Layout(tuple(shared), particle_dims)


def label(name: str, site: Site) -> str:
    """The name; in sequential plates without its numbers, which tell the element there, and with the plates' names."""
    looped = [f.name for f in site["cond_indep_stack"] if not f.vectorized]
    return re.sub(r"\d+", "#", name) + " in " + ", ".join(looped) if looped else name


def signature(model_trace: Trace, guide_trace: Trace, particle_dims: Collection[int] = ()) -> tuple[Any, ...]:
    """What must stay the same for a verdict on a model and guide to hold: sites, plates, which sizes agree."""
    sizes: dict[int | None, list[int]] = {}

    def frame_signature(frame: CondIndepStackFrame) -> tuple[Any, ...]:
        seen = sizes.setdefault(frame.dim, [])
        if frame.size not in seen:
            seen.append(frame.size)
        return frame.name, frame.dim, frame.counter, seen.index(frame.size), frame.size == 1, is_subsampled(frame)

    def frames_of(site: Site) -> tuple[Any, ...]:
        stack = site["cond_indep_stack"]
        return tuple(frame_signature(f) for f in stack if f.dim is None or f.dim not in particle_dims)

    return tuple(
        (label(name, site), site["is_observed"], site["infer"].get("enumerate"), frames_of(site))
        for trace in (model_trace, guide_trace)
        for name, site in sample_sites(trace)
    )
