# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A model run in blocks of particles without a graph, and its log densities put together as if it had run once.

What such a run leaves is a number for each particle at each site. What it needs on the way, a decoded image for each
particle, is there for one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_iwae.densities import log_prob_of
from pyro_iwae.plates import Site, latent_sites, sample_sites
from pyro_iwae.traces import lighten, run_given, stand_in

__all__ = ["model_in_blocks"]


def model_in_blocks(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    guide_trace: Trace,
    *,
    num_particles: int,
    block: int,
    plate: Callable[[int], Callable[..., Any]],
    dim: int,
    enumerate_from: int | None,
) -> Trace:
    """Runs a model at the latents of a guide's trace.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        guide_trace: a vectorised run of the guide.
        num_particles: K.
        block: at most so many particles at a time.
        plate: puts a program into a plate of so many particles.
        dim: the dimension of the particles.
        enumerate_from: the first free dimension for enumerated sites.
    """
    sites = dict(latent_sites(guide_trace))
    count = -(-num_particles // block)
    edges = [num_particles * i // count for i in range(count + 1)]
    traces = []
    for start, stop in pairwise(edges):
        values = {n: _rows(s, start, stop, dim, num_particles) for n, s in sites.items()}
        trace = run_given(plate(stop - start)(model), values, args, kwargs, enumerate_from)
        for _, site in sample_sites(trace):
            log_prob_of(site)
        lighten(trace)
        traces.append(trace)
    return _joined(traces, [b - a for a, b in pairwise(edges)], dim)


def _rows(site: Site, start: int, stop: int, dim: int, num_particles: int) -> Tensor:
    """A block's rows of a latent's value."""
    value, place = site["value"], dim - site["fn"].event_dim
    if value.dim() < -place or value.shape[place] != num_particles:
        return value  # the same for all particles
    return value.narrow(place, start, stop - start)


def _joined(traces: Sequence[Trace], sizes: Sequence[int], dim: int) -> Trace:
    """The first trace, with the rows of all."""
    first, total = traces[0], sum(sizes)

    def whole(parts: Sequence[Any]) -> Any:
        rows = all(
            isinstance(p, Tensor) and p.dim() >= -dim and p.shape[dim] == s for p, s in zip(parts, sizes, strict=True)
        )
        return torch.cat(list(parts), dim) if rows else parts[0]

    for name, node in sample_sites(first):
        try:
            same: list[Site] = [t.nodes[name] for t in traces]
        except KeyError:
            raise ValueError(f"expected the same sites in every run of the model, got '{name}' in some only") from None
        for key in ("unscaled_log_prob", "mask", "scale"):
            node[key] = whole([s[key] for s in same])
        frames = node["cond_indep_stack"]
        node["cond_indep_stack"] = tuple(f._replace(size=total) if f.dim == dim else f for f in frames)
        shape = list(node["fn"].batch_shape)
        if len(shape) >= -dim and shape[dim] == sizes[0]:
            shape[dim] = total
        node["fn"] = stand_in(shape, node["fn"].event_shape)
    return first
