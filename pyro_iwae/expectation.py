# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Expectations by weighting, each element of the result by the weights of the element that it depends on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_iwae.crossing import cross_elements, other_values, separating_rounds, subsets
from pyro_iwae.logweights import LogWeights
from pyro_iwae.plates import Layout, Site
from pyro_iwae.totals import Gather, LogMean

__all__ = ["WeightedMean"]

Function = Callable[[dict[str, Tensor]], Tensor]
Alignment = Callable[[Tensor], Tensor]  # (particles, *plates) to something that broadcasts with the result

SAME = 1e-4  # of a value: rounding; in the right way there is hardly any


@dataclass
class _Way:
    """One way to lay the columns of the weights along the result, and the mean that it gives."""

    align: Alignment
    value: Tensor
    error: float = 0.0  # the largest by which fn did not follow particles that were crossed in this way

    @property
    def fits(self) -> bool:
        return self.error < SAME


class WeightedMean:
    """sum_k v_k fn(z_k) over K particles, which may pass by in chunks.

    Args:
        fn: takes values by site, ``(particles, *site shape)``, and returns ``(particles, *shape)``.
    """

    def __init__(self, fn: Function) -> None:
        self.fn = fn
        self._totals: LogMean | None = None
        self._ways: list[_Way] = []

    @property
    def value(self) -> Tensor:
        """The mean over the particles so far, shape ``(*shape)``."""
        return self._agreed({i: way.value for i, way in enumerate(self._ways) if way.fits})

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
        before = self._totals
        if before is None:
            self._ways = [_Way(align, torch.zeros(())) for align in _possible(result, weights, layout)]
        if before is None or sum(way.fits for way in self._ways) > 1:  # what looked alike so far may not do so here
            _cross(self._ways, self.fn, result, values, sites, layout)
        if not any(way.fits for way in self._ways):
            raise _mixes(layout, result.shape)
        self._totals = weights.totals() if before is None else before.merge(weights.totals())
        slope = self._totals.slope(weights.log_weights)
        for way in (way for way in self._ways if way.fits):
            part = _times(way.align(slope), result).sum(0)
            if before is not None:
                share = self._totals.share(before).unsqueeze(0)  # of all that came before
                part = part + _times(way.align(share), way.value.unsqueeze(0)).squeeze(0)
            way.value = part

    def gathered(self, gather: Gather, count: int) -> Tensor:
        """The mean over K particles, of which each process has taken in a part."""
        if self._totals is None:
            raise ValueError("expected particles, got none")
        everyone = self._totals.gathered(gather, count)
        share = everyone.share(self._totals).unsqueeze(0)
        errors = gather(share.new_tensor([way.error for way in self._ways])).amax(0).tolist()
        for way, error in zip(self._ways, errors, strict=True):
            way.error = error  # what one process has seen not to fit does not
        means = {}
        for i, way in enumerate(self._ways):
            if way.fits:
                means[i] = gather(_times(way.align(share), way.value.unsqueeze(0)).squeeze(0)).sum(0)
        return self._agreed(means)

    def _agreed(self, means: Mapping[int, Tensor]) -> Tensor:
        """The mean, if all ways that fit give it."""
        if not means:
            raise ValueError(
                "expected fn to keep the elements of the independent plates apart, got one that mixes them on one "
                "process or another; write a function of each element alone"
            )
        best = means[min(means, key=lambda i: self._ways[i].error)]
        if any(_distance(mean.unsqueeze(0), best.unsqueeze(0)) > SAME for mean in means.values()):
            raise ValueError(
                "expected particles that show which dimensions of fn's result are the independent plates', got chunks "
                "in each of which fn gives one value; pass a larger chunk_size"
            )
        return best


def _times(weights: Tensor, values: Tensor) -> Tensor:
    """Their product; 0 where the weight is, whatever fn makes of a particle that is impossible."""
    return torch.where(weights == 0.0, 0.0, weights * values)


def _cross(
    ways: list[_Way],
    fn: Function,
    result: Tensor,
    values: dict[str, Tensor],
    sites: Mapping[str, Site],
    layout: Layout,
) -> None:
    """Sees which ways fn follows where particles are crossed: of the plates' elements, some are another's.

    Where several fit, each element is the next particle's in all particles at once, so that an entry of the result in
    which any two particles differ shows its element. The ways that are left give the same mean of these particles.
    """
    if not layout.plates or result.shape[0] == 1:
        return
    count, sizes = result.shape[0], [p.size for p in layout.plates]

    def look(rounds: Tensor, others: Mapping[str, Tensor], target: Tensor) -> None:
        for moved in rounds.to(result.device):
            crossed = {n: cross_elements(v, layout.align(moved, sites[n], v), others[n]) for n, v in values.items()}
            after = fn(crossed)
            for way in ways:
                expected = cross_elements(result, way.align(moved), target)
                way.error = max(way.error, _distance(after, expected))

    rolled = {n: v.roll(-1, 0) for n, v in values.items()}
    others = {n: other_values(v, sites[n]) for n, v in values.items()}
    for chosen in subsets(values, others, sites, math.prod(sizes)):
        same = all(torch.equal(chosen[n], rolled[n]) for n in values)
        look(separating_rounds(count, sizes), chosen, result.roll(-1, 0) if same else fn(chosen))
    if sum(way.fits for way in ways) > 1:
        look(separating_rounds(1, sizes).expand(-1, count, *sizes), rolled, result.roll(-1, 0))


def _mixes(layout: Layout, shape: torch.Size) -> ValueError:
    return ValueError(
        f"expected fn to keep the elements of the independent plates {[p.name for p in layout.plates]} apart, got a "
        f"result of shape {tuple(shape)} that mixes them or drops their dimension; each element is weighed by itself. "
        "Average over draws instead: fn(posterior.sample(num_draws, ...)).mean(0)"
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


def _possible(result: Tensor, weights: LogWeights, layout: Layout) -> Iterator[Alignment]:
    """Ways to lay the columns along the result: an element of each sequential plate, a place for the other plates."""
    if weights.num_particles == 1:  # nothing to weigh
        yield lambda columns: result.new_ones(())
        return
    if not layout.plates:
        yield lambda columns: columns.reshape(columns.shape[:1] + (1,) * (result.dim() - 1))
        return
    width = -min(layout.dims, default=0)
    for element in itertools.product(*(range(p.size) for p in layout.sequential)):
        for before in range(result.dim() - width if width else 1):
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
