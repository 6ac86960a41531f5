# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Expectations by weighting, each element of the result by the weights of the element that it depends on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pyro_iwae.crossing import cross_elements, separating_rounds
from pyro_iwae.logweights import LogWeights
from pyro_iwae.plates import Layout, Site
from pyro_iwae.totals import Gather, LogMean

__all__ = ["WeightedMean"]

Function = Callable[[dict[str, Tensor]], Tensor]
Alignment = Callable[[Tensor], Tensor]  # (particles, *plates) to something that broadcasts with the result


class WeightedMean:
    """sum_k v_k fn(z_k) over K particles, which may pass by in chunks.

    Args:
        fn: takes values by site, ``(particles, *site shape)``, and returns ``(particles, *shape)``.

    Attributes:
        value: the mean over the particles so far, shape ``(*shape)``.
    """

    def __init__(self, fn: Function) -> None:
        self.fn = fn
        self.value = torch.zeros(())
        self._totals: LogMean | None = None
        self._align: Alignment | None = None

    def add(self, values: dict[str, Tensor], sites: Mapping[str, Site], weights: LogWeights, layout: Layout) -> None:
        """Takes in some of the particles, at first two at least, where there are more than one.

        Args:
            values: the particles' latents.
            sites: their sites.
            weights: their weights.
            layout: where the columns of the weights lie.
        """
        result = self.fn(values)
        if not isinstance(result, Tensor) or result.dim() == 0 or result.shape[0] != weights.num_particles:
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"expected fn to keep the particles in front, shape ({weights.num_particles}, ...), got {got}; reduce "
                "over trailing dimensions only, as in z['w'].mean(-1)"
            )
        if self._align is None:
            self._align = _alignment(self.fn, result, values, sites, weights, layout)
        before = self._totals
        self._totals = weights.totals() if before is None else before.merge(weights.totals())
        part = (self._align(self._totals.slope(weights.log_weights)) * result).sum(0)
        if before is not None:
            share = self._totals.slope(before.log_sum.unsqueeze(0))  # of all that came before
            part = part + (self._align(share) * self.value.unsqueeze(0)).squeeze(0)
        self.value = part

    def gathered(self, gather: Gather, count: int) -> Tensor:
        """The mean over K particles, of which each process has taken in a part."""
        if self._totals is None or self._align is None:
            raise ValueError("expected particles, got none")
        everyone = self._totals.gathered(gather, count)
        share = self._align(everyone.slope(self._totals.log_sum.unsqueeze(0)))
        return gather((share * self.value.unsqueeze(0)).squeeze(0)).sum(0)


def _alignment(
    fn: Function,
    result: Tensor,
    values: dict[str, Tensor],
    sites: Mapping[str, Site],
    weights: LogWeights,
    layout: Layout,
) -> Alignment:
    """Finds which dimensions of the result are the independent plates' by crossing particles, and seeing fn follow."""
    if weights.num_particles == 1:  # nothing to weigh
        return lambda columns: result.new_ones(())
    if not layout.plates:
        return lambda columns: columns.reshape(columns.shape[:1] + (1,) * (result.dim() - 1))
    possible = list(_possible(result, layout))
    worst = [0.0] * len(possible)
    for moved in separating_rounds(weights.num_particles, weights.log_weights.shape[1:]).to(result.device):
        crossed = {n: cross_elements(v, layout.align(moved, sites[n], v)) for n, v in values.items()}
        after = fn(crossed)
        distances = [_distance(after, cross_elements(result, a(moved))) for a in possible]
        worst = [max(pair) for pair in zip(worst, distances, strict=True)]
    if possible and min(worst) < 1e-4:  # rounding; in the right one there is hardly any
        return possible[worst.index(min(worst))]
    raise ValueError(
        f"expected fn to keep the elements of the independent plates {[p.name for p in layout.plates]} apart, got a "
        f"result of shape {tuple(result.shape)} that mixes them or drops their dimension; each element is weighed by "
        "itself. Average over draws instead: fn(posterior.sample(num_draws, ...)).mean(0)"
    )


def _distance(after: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value that the same entry has in any particle."""
    if after.shape != expected.shape:
        return math.inf
    after, expected = after * 1.0, expected * 1.0  # a truth value is a number here
    same = (after == expected) | (after.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0
    size = expected.abs().nan_to_num(nan=0.0, posinf=0.0).amax(0)
    apart = torch.where(same, 0.0, (after - expected).abs()).nan_to_num(nan=math.inf).amax(0)
    return float(torch.where(apart == 0.0, 0.0, apart / size).max())


def _possible(result: Tensor, layout: Layout) -> Iterator[Alignment]:
    """Ways to lay the columns along the result: an element of each sequential plate, a place for the other plates."""
    width = -min(layout.dims, default=0)
    for element in itertools.product(*(range(p.size) for p in layout.sequential)):
        for before in range(result.dim() - width):
            after = result.dim() - 1 - width - before

            def align(
                columns: Tensor, element: tuple[int, ...] = element, ends: tuple[int, int] = (before, after)
            ) -> Tensor:
                for index in element:
                    columns = columns[:, index]
                sizes = dict(zip(layout.dims, columns.shape[1:], strict=True))
                middle = [sizes.get(d, 1) for d in range(-width, 0)]
                return columns.reshape(columns.shape[:1] + (1,) * ends[0] + (*middle,) + (1,) * ends[1])

            try:
                torch.broadcast_shapes(
                    align(result.new_empty((1, *(p.size for p in layout.plates)))).shape, result.shape
                )
            except RuntimeError:
                continue
            yield align
