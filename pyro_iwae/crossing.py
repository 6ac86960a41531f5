# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Moving elements from particle to particle, and seeing which terms follow.

Give some elements of a plate the latents of another particle and run again: a site whose term changes at an element
that kept its own latents mixes the elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_iwae.plates import Site
from pyro_iwae.terms import Term

__all__ = ["close", "cross_elements", "enough_particles", "first_mixed", "other_values", "separating"]


def enough_particles(elements: int) -> int:
    """Particles that :func:`separating` needs to part any two of so many elements."""
    return 2 * max(1, math.ceil(math.log2(max(1, elements))))


def separating(shape: tuple[int, ...]) -> Tensor:
    """Which elements move in each particle: for any two there is a particle where the one moves and the other stays.

    Particle by particle, the bits of the elements' numbers, and the same bits turned over.
    """
    elements = math.prod(shape[1:])
    bits = enough_particles(elements) // 2
    numbers, particles = torch.arange(elements), torch.arange(shape[0]).unsqueeze(-1)
    moved = (numbers >> (particles // 2 % bits)) & 1 == particles % 2
    return moved.reshape(shape)


def cross_elements(value: Tensor, moved: Tensor, others: Tensor | None = None) -> Tensor:
    """Each particle's elements, or another's (the next one's) where they move."""
    return torch.where(moved.to(value.device), value.roll(-1, 0) if others is None else others, value)


def other_values(value: Tensor, site: Site) -> Tensor:
    """Values to move to: another particle's, or, of few possible ones, the next possible one, which always differs."""
    fn = site["fn"]
    if not getattr(fn, "has_enumerate_support", False) or fn.event_dim > 0:
        return value.roll(-1, 0)
    try:
        support = fn.enumerate_support(expand=False).flatten()
    except NotImplementedError:  # it differs from element to element, as a Binomial's of several total counts
        return value.roll(-1, 0)
    if support.numel() < 2:
        return value.roll(-1, 0)
    position = (value.unsqueeze(-1) == support).to(torch.uint8).argmax(-1)
    return support[(position + 1) % support.numel()].to(value)


def first_mixed(
    before: Mapping[tuple[str, str], Term], after: Mapping[tuple[str, str], Term], moved: Tensor
) -> str | None:
    """The first site whose term changed at an element whose own latents did not move."""
    for key in before.keys() | after.keys():
        if key not in before or key not in after:
            return key[1]  # the site itself came or went
    for key, term in before.items():
        a, b = torch.broadcast_tensors(term.value.detach(), after[key].value.detach())
        if term.element is not None:
            still = ~moved
            for index in term.element:
                still = still[:, index]
            still = still.to(a.device)
            a, b = a.expand(still.shape)[still], b.expand(still.shape)[still]
        if not close(a, b):
            return key[1]
    return None


def close(a: Tensor, b: Tensor, *, loose: bool = False, eps: float = 0.0) -> bool:
    """Equal to rounding; ``loose`` allows for sums taken in another order."""
    a, b = torch.broadcast_tensors(a.detach(), b.detach().to(a))
    finite = a.isfinite() & b.isfinite()
    if bool(((a != b) & ~finite & ~(a.isnan() & b.isnan())).any()):
        return False
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return True
    tolerance = max(eps, torch.finfo(a.dtype).eps) * (1e4 if loose else 2e2)
    return bool(((a - b).abs() <= tolerance * (1.0 + torch.maximum(a.abs(), b.abs()).max())).all())
