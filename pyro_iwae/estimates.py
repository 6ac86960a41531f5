# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A figure for each independent element, from replicates, with its standard error and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_iwae.options import as_number
from pyro_iwae.totals import LogMean

__all__ = ["Estimate", "student_quantile"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure for each element.

    Attributes:
        value: shape ``(*elements)``.
        deviations: what each replicate moves it by, ``(replicates, *elements)``; 0 where an element has no such
            replicate. The squares sum to the variance of ``value``. Elements that share a replicate were drawn in one
            run, so that the error of a sum comes from the sums of these.
        count: replicates of each element, shape ``(*elements)``.
    """

    value: Tensor
    deviations: Tensor
    count: Tensor

    @classmethod
    def mean(cls, replicates: Tensor) -> Estimate:
        """The mean over replicates, ``(replicates, *elements)``; NaN where an element has no such replicate."""
        there = ~replicates.isnan()
        count = there.sum(0)
        # 0 - 0 where all replicates are -inf, which is then the mean, without an error
        total = torch.where(there, replicates, 0.0).sum(0)
        value = total / count
        apart = torch.where(there, replicates - value, 0.0).nan_to_num(nan=math.nan)
        apart = torch.where(value.isinf(), 0.0, apart)
        return cls(value, apart / (count * (count - 1.0)).sqrt(), count)

    @classmethod
    def log_mean(cls, replicates: Tensor) -> Estimate:
        """Logarithm of the mean of exp over replicates, by the jackknife over these: bias O(1 / (R K)^2).

        Args:
            replicates: log-mean-exps of K weights, ``(replicates, *elements)``; NaN where an element has no such
                replicate.
        """
        there = ~replicates.isnan()
        count = there.sum(0)
        filled = torch.where(there, replicates, -math.inf)
        totals = LogMean.of(filled)
        whole = totals.log_sum - count.log()
        without = totals.log_sum + totals.log_shares(filled)[1] - (count - 1.0).log()
        found = cls.leaving_out(whole, torch.where(there, without, math.nan))
        corrected = count * whole - (count - 1.0) * torch.where(there, without, 0.0).sum(0) / count
        return replace(found, value=torch.where(corrected.isfinite(), corrected, whole))

    @classmethod
    def leaving_out(cls, whole: Tensor, without: Tensor) -> Estimate:
        """A statistic of all replicates, with the error that the jackknife over these gives.

        Args:
            whole: the statistic, ``(*elements)``.
            without: what it is without each replicate, ``(replicates, *elements)``; NaN where there is no such one.
        """
        there = ~without.isnan()
        count = there.sum(0)
        mean = torch.where(there, without, 0.0).sum(0) / count
        apart = torch.where(there, without - mean, 0.0) * ((count - 1.0) / count).sqrt()
        # Where all is impossible, or all but one replicate, there is no telling.
        return cls(whole, torch.where(mean.isfinite() | ~there, apart, math.nan), count)

    @property
    def std_error(self) -> Tensor:
        """Shape ``(*elements)``; NaN where there is one replicate."""
        return torch.where(self.count > 1, self.deviations.square().sum(0).sqrt(), math.nan)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Student's t interval over replicates, lower and upper end."""
        width = self.width(level)
        return self.value - width, self.value + width

    def width(self, level: float = 0.95) -> Tensor:
        """Half the width of that interval."""
        if not 0.0 < as_number("level", level) < 1.0:
            raise ValueError(f"expected level between 0 and 1, as in 0.95, got {level}")
        quantiles = {int(n): student_quantile(0.5 + level / 2.0, int(n) - 1) for n in self.count.unique()}
        width = torch.zeros_like(self.value)
        for count, quantile in quantiles.items():
            width = torch.where(self.count == count, quantile * self.std_error, width)
        return width

    def summed(self) -> Estimate:
        """The sum over elements; its error goes by the sums of each replicate."""
        count = self.count.min() if self.count.numel() else self.count.new_zeros(())
        return Estimate(self.value.sum(), self.deviations.reshape(len(self.deviations), -1).sum(1), count)

    def text(self, width: int = 0) -> str:
        """A single number with its error, the number right-aligned; without one where it is infinite."""
        value = float(self.value)
        if math.isfinite(value):
            return f"{value:{width}.3f} ± {float(self.std_error):.3f}"
        return f"{value:{width}.3f}" if value == -math.inf else f"{'not defined':>{width}}"

    @staticmethod
    def added(parts: Sequence[Estimate]) -> Estimate:
        """The sum of independent figures, each a single number."""
        value = torch.stack([p.value for p in parts]).sum()
        return Estimate(value, torch.cat([p.deviations for p in parts]), torch.stack([p.count for p in parts]).amin())

    @staticmethod
    def joined(parts: Sequence[Estimate], dim: int) -> Estimate:
        """Figures of more elements, one part after the other."""
        longest = max(len(p.deviations) for p in parts)
        padded = [
            torch.cat([p.deviations, p.deviations.new_zeros(longest - len(p.deviations), *p.value.shape)])
            for p in parts
        ]
        return Estimate(
            torch.cat([p.value for p in parts], dim),
            torch.cat(padded, dim + 1),
            torch.cat([p.count for p in parts], dim),
        )


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, for a whole number of degrees of freedom; by bisection.

    Example::

        >>> round(student_quantile(0.975, 15), 4)
        2.1314
    """
    if freedom < 1:
        return math.nan
    if probability < 0.5:
        return -student_quantile(1.0 - probability, freedom)
    low, high = 0.0, math.pi / 2.0  # the angle atan(t / sqrt(n))
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_cdf(angle: float, freedom: int) -> float:
    """By its finite sums (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(1 + odd, 1 + odd + 2 * (freedom // 2), 2):
        total += term
        term *= cosine**2 * i / (i + 1.0)
    within = (angle + sine * total) * 2.0 / math.pi if odd else sine * total
    return 0.5 + within / 2.0
