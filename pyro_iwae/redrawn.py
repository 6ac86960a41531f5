# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A guide that runs once, however many chunks are drawn from it: its distributions are kept, and drawn from again.

That is right where no distribution depends on what was drawn, which is to be seen when the guide runs with two
particles: none has their dimension before their plate puts it there. The parameters of the distributions are cut from
the network that made them, so that each chunk can be sent back by itself, and the network once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

from pyro_iwae.handlers import EnclosingPlates, Minibatch, particle_plates
from pyro_iwae.particles import Call, Run, unchanged_enumeration
from pyro_iwae.piecemeal import Piecemeal
from pyro_iwae.plates import Site

__all__ = ["Redrawn", "redrawn"]


@dataclass(frozen=True)
class Redrawn:
    """A guide's distributions.

    Attributes:
        sites: the messages of its latents, as the guide itself wrote them.
        params: its parameters' sites, by name.
        sources: what the distributions were made of, with the graph of the guide.
        leaves: the same numbers, cut from it, which the distributions hold in their place.
    """

    sites: tuple[Mapping[str, Any], ...]
    params: Mapping[str, Any]
    sources: tuple[Tensor, ...] = ()
    leaves: tuple[Tensor, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Draws from them; this is run in the guide's place."""
        for site in self.sites:
            fn = _Copies(cuts=False).of(site["fn"])  # what one run works out and keeps there has a graph of its own
            with _Within(site["cond_indep_stack"], site["scale"], site["mask"]):
                pyro.sample(site["name"], fn, infer=site["infer"].copy())

    def send_back(self, gradients: Piecemeal) -> None:
        """Sends what has come to the leaves back through the guide."""
        slopes = [gradients.take(leaf) for leaf in self.leaves]
        reached = [(source, slope) for source, slope in zip(self.sources, slopes, strict=True) if slope is not None]
        if reached:
            sources, coming = zip(*reached, strict=True)
            gradients.add(*sources, slopes=coming)

    def cut(self) -> Redrawn:
        """With leaves in the place of what the guide computed."""
        copies = _Copies()
        sites = tuple({**site, "fn": copies.of(site["fn"])} for site in self.sites)
        return replace(self, sites=sites, sources=tuple(copies.sources), leaves=tuple(copies.leaves))


def redrawn(call: Call, run: Run, minibatch: Minibatch) -> Redrawn | None:
    """Runs the guide once and keeps its distributions; None where it has to run for each chunk.

    Args:
        call: what to run.
        run: how particles are run.
        minibatch: settles the indices of the guide's subsampled plates.
    """
    if not run.vectorized or isinstance(poutine.unwrap(call.guide), GuideMessenger):
        return None
    small, watch = run.small(), _Watch({run.depth_of(i) for i in range(len(run.tree.nodes))})
    around = particle_plates(small.plates(2, guide=True), EnclosingPlates(call.enclosing))
    with unchanged_enumeration(), minibatch:
        trace: Trace = poutine.trace(around(watch(call.guide))).get_trace(*call.args, **call.kwargs)
    if watch.depends:
        return None
    return Redrawn(tuple(watch.sites), {n: trace.nodes[n] for n in trace.param_nodes})


class _Watch(Messenger):
    """Keeps the messages of a guide's latents before any handler outside of it has changed them."""

    def __init__(self, particle_dims: set[int]) -> None:
        super().__init__()
        self.particle_dims = particle_dims
        self.sites: list[Mapping[str, Any]] = []
        self.depends = False

    def _pyro_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):
            return
        fn: Any = msg["fn"]
        wrapped = [value for value in (msg["mask"], msg["scale"]) if isinstance(value, Tensor)]
        shapes = [getattr(fn, "batch_shape", ()), *(value.shape for value in wrapped)]
        follows = any(len(shape) >= -dim and shape[dim] > 1 for shape in shapes for dim in self.particle_dims)
        follows |= any(value.requires_grad for value in wrapped)  # made by the guide, and not cut
        plain = not (msg["is_observed"] or msg["done"] or msg["args"] or msg["kwargs"])
        if follows or not plain or not _Copies.can_copy(fn):
            self.depends = True
        kept = ("name", "fn", "infer", "cond_indep_stack", "scale", "mask")
        self.sites.append({key: msg[key].copy() if key == "infer" else msg[key] for key in kept})


class _Within(Messenger):
    """Puts a site back where it was, in the plates, scales and masks of the guide itself."""

    def __init__(self, frames: Sequence[CondIndepStackFrame], scale: Any, mask: Any) -> None:
        super().__init__()
        self.frames, self.scale, self.mask = tuple(frames), scale, mask

    def _process_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            msg["cond_indep_stack"] = self.frames
            msg["scale"], msg["mask"] = self.scale, self.mask


class _Unknown(Exception):
    """Something in a distribution that may hide what a guide has computed."""


@dataclass
class _Copies:
    """Copies distributions with leaves for tensors that have a graph; what occurs twice stays one."""

    cuts: bool = True
    sources: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    known: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # with the original, so that its id stays its own

    @classmethod
    def can_copy(cls, fn: Any) -> bool:
        """Whether all that the distribution holds is a number, a tensor, or made of these."""
        try:
            cls().of(fn)
        except _Unknown:
            return False
        return True

    def of(self, value: Any) -> Any:
        """A copy of anything that a distribution may hold.

        Raises:
            _Unknown: where it is something else.
        """
        if id(value) not in self.known:
            self.known[id(value)] = value, self._copied(value)
        return self.known[id(value)][1]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._leaf(value) if self.cuts and value.requires_grad else value
        if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.Size):
            return value
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self.of(v) for v in value)
        if isinstance(value, dict):
            return type(value)((k, self.of(v)) for k, v in value.items())
        # A flow has parameters and, if conditional, a network's output, which is hidden in a function.
        if isinstance(value, torch.nn.Module) or not isinstance(value, Distribution | Transform):
            raise _Unknown
        if isinstance(value, Delta):  # follows from something
            raise _Unknown
        copy = object.__new__(type(value))
        for name, held in vars(value).items():
            cached = isinstance(value, Transform) and name in ("_cached_x_y", "_inv")
            vars(copy)[name] = _EMPTY[name] if cached else self.of(held)
        return copy

    def _leaf(self, value: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_()
        self.sources.append(value)
        self.leaves.append(leaf)
        return leaf


_EMPTY: dict[str, Any] = {"_cached_x_y": (None, None), "_inv": None}
