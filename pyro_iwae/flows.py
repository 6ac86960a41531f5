# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The density of a guide site at its own draw, differentiable by the draw.

A flow remembers what it drew a value from, so that its density there needs no inverse. That density is a constant as
a function of the value, though: how it changes with z is what the inverse would tell. Where the inverse is fast it is
asked. Where it is slow or missing (autoregressive flows, planar ones) it is not needed as a whole either: at the draw
itself the value of the inverse is known, and its derivative is that of the flow, inverted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor

from pyro_iwae.densities import score_parts_of
from pyro_iwae.plates import Site

__all__ = ["density_at", "flow_of", "layers_of"]


def density_at(site: Site, leaf: Tensor) -> tuple[Any, bool]:
    """Pyro's ScoreParts of a guide site at a leaf that has the value of the site's own draw.

    Args:
        site: the site, with the very tensor that its distribution returned.
        leaf: what to be differentiable by.

    Returns:
        The parts, and whether a flow's inverse was slow or missing, so that its Jacobian was solved with: that takes
        one backward pass through the flow for each number in an event.
    """
    flow = flow_of(site["fn"])
    if flow is None or not any(hasattr(layer, "_cached_x_y") for layer in layers_of(flow.transforms)):
        return score_parts_of({**site, "value": leaf}), False  # nothing remembered, nothing lost
    noise = site["value"]
    for transform in reversed(flow.transforms):
        noise = transform.inv(noise)
    noise = noise.detach()
    solved, step = False, None
    if all(layer.domain.event_dim == 0 for layer in layers_of(flow.transforms)):
        step = _elementwise_step(flow, noise, leaf)
    else:
        step = _inverse_step(flow, leaf)
    if step is None:
        solved, step = True, _solved_step(flow, site, noise, leaf)
    return score_parts_of({**site, "value": _push(flow, noise + step)}), solved


def flow_of(fn: Any) -> TransformedDistribution | None:
    """The transformed distribution that a site draws from, behind what wraps it; None where it is none."""
    while not isinstance(fn, torch.distributions.TransformedDistribution):
        if not hasattr(fn, "base_dist"):
            return None
        fn = fn.base_dist
    return fn


def layers_of(transforms: Sequence[Any]) -> Iterator[Any]:
    """The single transforms, those inside a composition too."""
    for transform in transforms:
        if isinstance(transform, torch.distributions.ComposeTransform):
            yield from layers_of(transform.parts)
        else:
            yield transform


# What is added to the noise at the draw: T^-1(leaf) as a function of leaf and parameters, moved to 0 there. What the
# flow remembered is exact, where an inverse rounds, or is infinite (a squashing transform that is saturated).


def _elementwise_step(flow: TransformedDistribution, noise: Tensor, leaf: Tensor) -> Tensor:
    """(leaf - T(noise)) / T'(noise): its value is 0, its derivatives are those of the inverse."""
    with torch.enable_grad():
        start = noise.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_push(flow, start).sum(), start)
    return (leaf - _push(flow, noise)) / torch.where(slope == 0.0, torch.finfo(slope.dtype).tiny, slope)


def _inverse_step(flow: TransformedDistribution, leaf: Tensor) -> Tensor | None:
    """By the inverse itself; None where it is slow or missing."""
    if any(getattr(layer, "autoregressive", False) for layer in layers_of(flow.transforms)):
        return None
    noise = leaf
    try:
        for transform in reversed(flow.transforms):
            noise = transform.inv(noise)
    except (KeyError, NotImplementedError):
        return None
    return noise - noise.detach()


def _solved_step(flow: TransformedDistribution, site: Site, noise: Tensor, leaf: Tensor) -> Tensor:
    """J^-1 (leaf - T(noise)), with J the Jacobian of T at the noise."""
    if noise.shape != leaf.shape:
        raise NotImplementedError(
            f"expected a flow that keeps the shape of its noise at guide site '{site['name']}', got "
            f"{tuple(noise.shape)} to {tuple(leaf.shape)}; write gradient=Pathwise()"
        )
    events = len(flow.event_shape)
    gap = _rows(leaf - _push(flow, noise), events).unsqueeze(-1)
    return torch.linalg.solve(_jacobian(flow, noise, events), gap).squeeze(-1).reshape(noise.shape)


def _push(flow: TransformedDistribution, noise: Tensor) -> Tensor:
    for transform in flow.transforms:
        noise = transform(noise)
    return noise


def _rows(value: Tensor, events: int) -> Tensor:
    """Each event as one row."""
    return value.flatten(-events) if events else value.unsqueeze(-1)


def _jacobian(flow: TransformedDistribution, noise: Tensor, events: int) -> Tensor:
    """dT / de for each event, one backward pass for each of its numbers; detached."""
    with torch.enable_grad():
        noise = noise.clone().requires_grad_()
        image = _rows(_push(flow, noise), events)
        rows = [torch.autograd.grad(image[..., i].sum(), noise, retain_graph=True)[0] for i in range(image.shape[-1])]
    return torch.stack([_rows(r, events) for r in rows], -2)
