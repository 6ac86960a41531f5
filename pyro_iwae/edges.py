# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Where a density jumps, and whether that place moves with a parameter.

What StickTheLanding leaves out of log q's gradient, and DoublyReparameterized sends through z, has the mean that they
rely on only where no edge moves: for Uniform(0, a) all of the gradient sits at the edge, and log q does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions.transforms import LeakyReLUTransform, Permute
from torch import Tensor
from torch.distributions import AffineTransform, TransformedDistribution

from pyro_iwae.decisions import holds
from pyro_iwae.flows import flow_of, layers_of
from pyro_iwae.plates import Site

__all__ = ["require_fixed_edges"]


def require_fixed_edges(site: Site) -> None:
    """Raises where a site's density jumps, or its support ends, at a place that moves with parameters."""
    if any(edge.requires_grad for edge in _edges(site["fn"])):
        raise ValueError(
            f"expected a distribution whose support does not move with its parameters, and whose density does not jump "
            f"at a place that does, got {site['fn']} at guide site '{site['name']}': what StickTheLanding and "
            "DoublyReparameterized leave out of log q's gradient does not have the mean there that they rely on. "
            "Write gradient=Pathwise()"
        )


def _edges(fn: Any) -> list[Tensor]:
    """The places that are told: finite limits of the support, and kinks of transforms, pushed through what follows."""
    flow = flow_of(fn)
    if flow is None or type(flow).support is not TransformedDistribution.support:  # it says so itself
        return [edge for edge in _limits(fn) if math.isfinite(edge.detach().flatten()[0])]
    edges = list(_limits(flow.base_dist))
    for layer in layers_of(flow.transforms):
        edges = list(_pushed(edges, layer))
        if isinstance(layer, LeakyReLUTransform):
            edges.append(torch.zeros(()))
        if isinstance(getattr(layer, "T", None), LeakyReLUTransform):  # NeuralAutoregressive: inside a network
            edges.append(torch.zeros((), requires_grad=True))
    return [edge for edge in edges if holds(edge.isfinite().all())]


def _pushed(edges: list[Tensor], layer: Any) -> Iterator[Tensor]:
    """The edges after a transform; without a graph where no parameter moves them."""
    for edge in edges:
        if layer.domain.event_dim > 0:  # one number is no event; a layer that mixes numbers mixes their edges
            if holds(edge.isfinite().all()):
                yield edge if isinstance(layer, Permute) else torch.zeros((), requires_grad=True)
            continue
        image = layer(edge)
        if isinstance(layer, AffineTransform) and not _moves(edge) and not _moves(layer.loc) and not holds(edge.any()):
            yield image.detach()  # 0 stays where it is under every scale
            continue
        fixed = any(limit is not None and holds((image == limit).all()) for limit in _bounds(layer.codomain))
        yield image.detach() if fixed or not holds(image.isfinite().all()) else image


def _moves(place: Any) -> bool:
    return isinstance(place, Tensor) and place.requires_grad


def _limits(fn: Any) -> Iterator[Tensor]:
    """Where the support begins and ends, infinities included."""
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    try:
        lower, upper = _bounds(fn.support)
    except NotImplementedError:  # a distribution need not tell
        return
    for limit, end in ((lower, -math.inf), (upper, math.inf)):
        yield limit if isinstance(limit, Tensor) else torch.tensor(float(end if limit is None else limit))


def _bounds(constraint: Any) -> tuple[Any, Any]:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
