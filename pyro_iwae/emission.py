# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How a draw from the resampled posterior enters the surrounding trace, and what reaches the run behind it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_iwae.drawn import DrawnDensity, Emitted
from pyro_iwae.handlers import ENCLOSING
from pyro_iwae.plates import Site, own_scale, sample_sites
from pyro_iwae.selection import Selection
from pyro_iwae.weighing import Particles

__all__ = ["Boundary", "Emission"]


class Boundary(Messenger):
    """Hides the inner run from the handlers outside; parameters and minibatch indices pass.

    What asks for the state around it (``poutine.get_mask``, as autoguides do) finds none: ``Predictive`` masks all that
    its guide does, and would have it leave out Jacobians, and so weigh wrongly.
    """

    def _process_message(self, msg: Site) -> None:
        if msg["type"] in (ENCLOSING, "inspect") or (msg["type"] == "sample" and not site_is_subsample(msg)):
            msg["stop"] = True


class Emission:
    """Puts a draw into the surrounding trace, each site in the plates that it came from."""

    def __init__(self, particles: Particles, selection: Selection, enclosing: Sequence[CondIndepStackFrame]) -> None:
        self.selection = selection
        self.layout = particles.layout
        self.weights = particles.weights
        self.particle_dims = {d for layout in particles.layouts for d in layout.particle_dims}
        self.outside = {f.dim for f in enclosing} | self.particle_dims
        self.model_trace = particles.pairs[0].model
        self.minibatch = particles.minibatch
        self.plate_objects: dict[str, Any] = {}
        self.used: set[str] = set()
        self.replaced = False  # whether a handler outside has set a value

    def values(self) -> dict[str, Tensor]:
        """Emits the latents; returns what the handlers outside (replay, condition) make of them."""
        emitted = {}
        for name, value in self.selection.values.items():
            site = self.selection.sites[name]
            prior: Site = self.model_trace.nodes.get(name, site)
            scale, mask = self._alike(own_scale(prior)), self._alike(prior["mask"])
            with ExitStack() as stack:  # its density is 0, but other ELBOs compare the scales and masks of both sides
                stack.enter_context(self._within(site["cond_indep_stack"]))
                if scale is not None:
                    stack.enter_context(poutine.scale(scale=scale))
                if mask is not None:
                    stack.enter_context(poutine.mask(mask=mask))
                fn = Emitted(value, event_dim=site["fn"].event_dim)
                emitted[name] = pyro.sample(name, fn)
            # By chance a handler may set the draw's own value, which is not the same: its companions are others.
            self.replaced |= not fn.taken or not _holds(emitted[name], value)
        return emitted

    def _alike(self, value: Any) -> Any:
        """A scale or mask of the inner run's site, unless it differs from particle to particle."""
        if not isinstance(value, Tensor):
            return value
        return None if any(value.dim() >= -d and value.shape[d] > 1 for d in self.particle_dims) else value

    def density(self, log_density: Tensor) -> None:
        """Emits log q~ as one factor for each element of the independent plates."""
        common = self.weights.scale / self.layout.scale  # a poutine.scale around model and guide alike
        name = "_importance_density_" + next(iter(self.selection.values), "")
        if name in self.model_trace.nodes:
            raise ValueError(f"expected a model without a site '{name}', which holds this guide's density; rename it")
        inside = (s for _, s in sample_sites(self.model_trace) if self.layout.element(s) is not None)
        template = next(itertools.chain(self.selection.sites.values(), inside), None)
        frames = [f for p in self.layout.plates if template and (f := p.frame_of(template))]
        dims = dict(zip(self.layout.dims, log_density.shape[len(self.layout.sequential) :], strict=True))
        batch = [dims.get(d, 1) for d in range(min(dims, default=0), 0)]
        for element in itertools.product(*(range(p.size) for p in self.layout.sequential)):
            with self._within(_at_element(frames, element)), poutine.scale(scale=common):
                suffix = "".join(f"_{i}" for i in element)
                self._factor(name + suffix, log_density[element].reshape(batch), element, batch)

    def _factor(self, name: str, log_density: Tensor, element: tuple[int, ...], batch: list[int]) -> None:
        pathwise, score = self.selection.pathwise, self.selection.score
        if pathwise is None or score is None:
            pyro.factor(name, log_density, has_rsample=True)
            return
        fn = DrawnDensity(log_density, pathwise[element].reshape(batch), score[element].reshape(batch))
        pyro.sample(name, fn, obs=fn.sample(), infer={"is_auxiliary": True})

    def plates(self) -> None:
        """Emits a zero inside each plate of the model that no draw lies in, so that its dimension shows."""
        for _, site in sample_sites(self.model_trace):
            for frame in site["cond_indep_stack"]:
                if frame.vectorized and frame.dim not in self.outside and frame.name not in self.used:
                    with self._within([frame]):
                        zero = self.weights.log_weights.new_zeros(())
                        pyro.factor(f"_importance_plate_{frame.name}", zero, has_rsample=True)

    @contextmanager
    def _within(self, frames: Sequence[CondIndepStackFrame]) -> Iterator[None]:
        with ExitStack() as stack:
            for frame in frames:
                if frame.vectorized and frame.dim in self.outside:
                    continue
                stack.enter_context(self._plate(frame))
            yield

    def _plate(self, frame: CondIndepStackFrame) -> Any:
        self.used.add(frame.name)
        if frame.name not in self.plate_objects:
            size = frame.full_size if frame.size > 0 else None
            indices = self.minibatch.indices.get(frame.name)
            self.plate_objects[frame.name] = pyro.plate(frame.name, size, subsample=indices, dim=frame.dim)
        plate = self.plate_objects[frame.name]
        if not frame.vectorized:
            plate._vectorized, plate.counter = False, frame.counter
        return plate


def _holds(emitted: Tensor, drawn: Tensor) -> bool:
    """Whether a value in the trace is the draw, as wide as its plates have made it."""
    sizes = zip(reversed(drawn.shape), reversed(emitted.shape), strict=False)
    fits = drawn.dim() <= emitted.dim() and all(n in (1, m) for n, m in sizes)
    return fits and bool((emitted == drawn).all())


def _at_element(frames: Sequence[CondIndepStackFrame], element: Sequence[int]) -> list[CondIndepStackFrame]:
    """The frames of the independent plates at one element of the sequential ones (which come first)."""
    moved = [f._replace(counter=i + 1) for f, i in zip(frames, element, strict=False)]
    return moved + list(frames[len(moved) :])
