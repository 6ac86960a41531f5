# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Moving elements from particle to particle, and seeing which densities follow.

Give some elements of a plate the latents of another particle and run again: a site whose log density changes at an
element that kept its own latents mixes the elements. Particles themselves are elements too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import constraints

from pyro_iwae.densities import log_prob_of
from pyro_iwae.plates import Layout, Site
from pyro_iwae.traces import Pair

__all__ = [
    "close",
    "cross_elements",
    "enough_particles",
    "first_mixed",
    "other_values",
    "roughly_close",
    "separating_rounds",
    "site_values",
    "subsets",
]

SUBSETS = 8  # each leaves the parity of two coins as it is with probability 1/2 in each particle that is moved


def separating_rounds(num_particles: int, sizes: Sequence[int]) -> Tensor:
    """Which elements move in each particle, ``(rounds, particles, *sizes)``, in as many rounds as it takes.

    For any two elements there is a particle where the one moves and the other stays: particle by particle, the bits
    of the elements' numbers, and the same bits turned over.
    """
    elements = math.prod(sizes)
    bits = enough_particles(elements) // 2
    rounds = -(-2 * bits // num_particles)
    numbers, particles = torch.arange(elements), torch.arange(rounds * num_particles).unsqueeze(-1)
    moved = (numbers >> (particles // 2 % bits)) & 1 == particles % 2
    return moved.reshape(rounds, num_particles, *sizes)


def enough_particles(elements: int) -> int:
    """Particles that it takes to part any two of so many elements in one round."""
    return 2 * max(1, math.ceil(math.log2(max(1, elements))))


def cross_elements(value: Tensor, moved: Tensor, others: Tensor | None = None) -> Tensor:
    """Each particle's elements, or another's (the next one's) where they move."""
    return torch.where(moved.to(value.device), value.roll(-1, 0) if others is None else others, value)


def other_values(value: Tensor, site: Site) -> Tensor:
    """Values to move to: another particle's, or, where values are whole numbers, the next one, which always differs."""
    rolled, support = value.roll(-1, 0), _discrete_support(site)
    if support is None:
        return rolled
    if support.event_dim > 0:  # one-hot, or counts that have a given sum: the next place
        turned = value.roll(1, -1)
        return torch.where((turned != value).any(-1, keepdim=True), turned, rolled)
    fn = site["fn"]
    gap = max(0, len(fn.batch_shape) + fn.event_dim - value.dim())  # in a vectorised run, after the particles'
    wide = value.reshape(value.shape[:1] + (1,) * gap + value.shape[1:])
    least = torch.as_tensor(getattr(support, "lower_bound", 0)).to(wide)
    try:
        moved = torch.where(support.check(wide + 1), wide + 1, least)
    except RuntimeError:  # the bounds lie along particles of an inner plate
        return rolled
    return moved.reshape(value.shape) if moved.shape == wide.shape else rolled


def _discrete_support(site: Site) -> Any:
    """The constraint on each entry of a site whose values are whole numbers; None for any other site."""
    try:
        support: Any = site["fn"].support
        discrete = support.is_discrete
    except NotImplementedError:  # the distribution does not say
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support if discrete else None


def subsets(
    values: Mapping[str, Tensor], others: Mapping[str, Tensor], latents: Mapping[str, Site], elements: int
) -> Iterator[dict[str, Tensor]]:
    """What elements are moved to, time after time: all entries; then, of whole numbers, some at random.

    Two coins that are both turned have the same sum and the same parity, so that a site which follows those would stay
    as it is. With ``SUBSETS`` random subsets in each particle that is all but impossible.

    Args:
        values: the particles' latents, ``(particles, *site shape)``.
        others: what they are moved to.
        latents: their sites.
        elements: of how many the particle is made, each moved as a whole.
    """
    yield dict(others)
    entries = {}  # each of which can move alone
    for name in others:
        support = _discrete_support(latents[name])
        if support is not None:
            shape = values[name].shape
            entries[name] = shape[: len(shape) - support.event_dim] + (1,) * support.event_dim
    if sum(math.prod(shape[1:]) for shape in entries.values()) <= elements:
        return  # one entry in each
    generator = torch.Generator().manual_seed(0)  # of its own: model and guide see the random numbers that they would
    for _ in range(SUBSETS):
        turned = {n: torch.rand(shape, generator=generator, device="cpu") < 0.5 for n, shape in entries.items()}
        yield {**others, **{n: torch.where(t.to(values[n].device), others[n], values[n]) for n, t in turned.items()}}


def site_values(pairs: Sequence[Pair], particle_dim: int | None) -> dict[tuple[str, str], Tensor]:
    """The log density at each site, element by element, ``(particles or 1, *enumerated dims, *batch)``.

    Sums would hide a small change behind the rounding of a large total.
    """

    def seen(site: Site) -> Tensor:
        mask = None if site["infer"].get("_enumerate_dim") is not None else site["mask"]
        return scale_and_mask(log_prob_of(site).detach(), site["scale"], mask)

    tables = [{(role, name): seen(site) for role, name, site in pair.sites()} for pair in pairs]
    found = {}
    for key in tables[0]:
        values = [t[key] for t in tables if key in t]
        if particle_dim is not None:
            (value,) = values
            found[key] = _widened(value, -particle_dim, at=0).movedim(particle_dim, 0)
        elif len(values) == len(tables):
            found[key] = torch.stack(torch.broadcast_tensors(*values))
    return found


def first_mixed(
    before: Mapping[tuple[str, str], Tensor],
    after: Mapping[tuple[str, str], Tensor],
    sites: Mapping[tuple[str, str], Site],
    moved: Tensor,
    layout: Layout,
) -> tuple[str, str] | None:
    """(role, name) of the first site that changed at an element whose own latents did not move.

    Args:
        before: from :func:`site_values`.
        after: the same after elements have moved.
        sites: the sites.
        moved: which elements have, ``(particles, *plates)``.
        layout: where the elements lie.
    """
    for key in before.keys() | after.keys():
        if key not in before or key not in after:
            return key  # the site itself came or went
    width = -min(layout.dims, default=0)
    for key, value in before.items():
        a, b = _widened(value, 1 + width), _widened(after[key], 1 + width)
        element = layout.element(sites[key])
        if element is not None:
            still = ~moved.to(a.device)
            for index in element:
                still = still[:, index]
            elements = dict(zip(layout.dims, still.shape[1:], strict=True))
            batch = [elements.get(d, 1) for d in range(-width, 0)]
            still = still.reshape([still.shape[0]] + [1] * (max(a.dim(), b.dim()) - 1 - width) + batch)
            a, b, still = torch.broadcast_tensors(_widened(a, still.dim()), _widened(b, still.dim()), still)
            a, b = a[still], b[still]
        if not close(a, b):
            return key
    return None


def close(a: Tensor, b: Tensor) -> bool:
    """Whether runs with the same shapes gave the same: each value to rounding."""
    return _within(a, b, 2e2, torch.maximum)


def roughly_close(a: Tensor, b: Tensor, eps: float = 0.0) -> bool:
    """Whether runs with other shapes gave the same, where other kernels round in another way.

    Args:
        a: values, the particles in front.
        b: likewise.
        eps: the coarsest precision on the way to them.
    """
    rank = max(a.dim(), b.dim())
    return _within(_widened(a, rank), _widened(b, rank), 1e4, lambda x, y: torch.maximum(x, y).max(), eps)


def _within(a: Tensor, b: Tensor, factor: float, size: Callable[[Tensor, Tensor], Tensor], eps: float = 0.0) -> bool:
    a, b = torch.broadcast_tensors(a, b.to(a))
    finite = a.isfinite() & b.isfinite()
    if bool(((a != b) & ~finite & ~(a.isnan() & b.isnan())).any()):
        return False
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return True
    tolerance = factor * max(eps, torch.finfo(a.dtype).eps) * (1.0 + size(a.abs(), b.abs()))
    return bool(((a - b).abs() <= tolerance).all())


def _widened(value: Tensor, rank: int, at: int = 1) -> Tensor:
    """With dimensions of size 1 put in, after the particles' or in front, to have so many in all."""
    return value.reshape(value.shape[:at] + (1,) * max(0, rank - value.dim()) + value.shape[at:])
