# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How good weights are: effective sample size, Pareto's khat, distinct draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_iwae.options import as_count, require_log_weights

__all__ = [
    "ess",
    "expected_distinct",
    "khat_needs",
    "khat_threshold",
    "pareto_khat",
    "psis",
    "tail_khat",
    "tail_length",
]

LEAST_TAIL = 5  # fewer weights say nothing of a tail
ALIKE = 1e-4  # nats; a tail whose weights differ by less has no shape, and is as light as can be


def ess(log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "*plates"]:
    """Effective sample size, (sum_k w_k)^2 / sum_k w_k^2: from 1, one particle carries all, to K, all are alike.

    It counts the particles that were drawn. Where the guide has missed a part of the posterior altogether it looks
    fine, until a particle happens to fall there.

    Args:
        log_weights: unnormalised, in nats, shape ``(particles, *plates)``.

    Returns:
        Shape ``(*plates)``; 0 where every particle is impossible, NaN where a log weight is NaN or +inf.

    Raises:
        TypeError: where these are no floating point numbers.
        ValueError: where there is no particle.

    Example::

        >>> ess(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(2.)
    """
    log_weights = require_log_weights(log_weights)
    relative, impossible = _relative(log_weights)
    found = relative.exp().sum(0) ** 2 / (2.0 * relative).exp().sum(0)
    return torch.where(impossible, 0.0, found)


def expected_distinct(log_weights: Float[Tensor, "particles *plates"], draws: int) -> Float[Tensor, "*plates"]:
    """How many different particles are to be expected among draws by weight, sum_k 1 - (1 - v_k)^draws.

    Args:
        log_weights: unnormalised, in nats, shape ``(particles, *plates)``.
        draws: how many independent draws from these particles.

    Returns:
        Shape ``(*plates)``; 0 where every particle is impossible, NaN where a log weight is NaN or +inf.

    Raises:
        TypeError: where these are no floating point numbers, or draws no whole number.
        ValueError: where there is no particle, or no draw.

    Example::

        >>> expected_distinct(torch.zeros(2), draws=2)
        tensor(1.5000)
    """
    log_weights, draws = require_log_weights(log_weights), as_count("draws", draws)
    relative, impossible = _relative(log_weights)
    weights = relative.exp()
    share = torch.where(impossible, 0.0, weights / weights.sum(0))
    return -torch.expm1(draws * torch.log1p(-share.clamp(max=1.0))).sum(0)


def _relative(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """To the largest, so that large log weights lose no digits; and where every particle is impossible, NaN there."""
    largest = log_weights.amax(0)
    return log_weights - largest, largest == -math.inf


def khat_threshold(count: int) -> float:
    """Below which khat can be relied on with so many weights, min(1 - 1 / log10 S, 0.7).

    See "Pareto Smoothed Importance Sampling" (Vehtari, Simpson, Gelman, Yao, Gabry 2024,
    https://arxiv.org/abs/1507.02646).

    Example::

        >>> khat_threshold(100), khat_threshold(100_000)
        (0.5, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(count), 0.7) if count > 1 else -math.inf


def khat_needs(khat: float) -> float:
    """How many weights an estimate with such a khat needs, 10^(1 / (1 - khat)); infinitely many from 1 on.

    Example::

        >>> khat_needs(0.5)
        100.0
    """
    if math.isnan(khat):
        return math.nan
    return 10.0 ** (1.0 / (1.0 - khat)) if khat < 0.99 else math.inf


def tail_length(count: int) -> int:
    """How many of so many weights are their tail: 3 sqrt S, and a fifth at most; rounded up.

    Example::

        >>> tail_length(100), tail_length(10_000)
        (20, 300)
    """
    return math.ceil(min(0.2 * count, 3.0 * math.sqrt(count)))


def pareto_khat(log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "*plates"]:
    """Shape of the generalised Pareto distribution that fits the largest weights: the heavier their tail, the larger.

    Compare it with :func:`khat_threshold`; from few particles (5 to 50) it says nothing. See "Pareto Smoothed
    Importance Sampling" (Vehtari, Simpson, Gelman, Yao, Gabry 2024, https://arxiv.org/abs/1507.02646).

    Args:
        log_weights: unnormalised, in nats, shape ``(particles, *plates)``.

    Returns:
        Shape ``(*plates)``: inf where the tail has fewer than 5 weights, -inf where all of it is alike, as at the
        exact posterior (where ArviZ says inf), NaN where a log weight is NaN or +inf.

    Raises:
        TypeError: where these are no floating point numbers.
        ValueError: where there is no particle.

    Example::

        >>> pareto_khat(torch.zeros(1000))
        tensor(-inf)
    """
    log_weights = require_log_weights(log_weights)
    count = log_weights.shape[0]
    largest = log_weights.detach().topk(min(tail_length(count) + 1, count), 0).values
    return tail_khat(largest, [tail_length(count)] * largest[0].numel())


def tail_khat(largest: Float[Tensor, "tail *plates"], lengths: Sequence[int]) -> Float[Tensor, "*plates"]:
    """khat from the largest weights alone.

    Args:
        largest: at least one more of the largest log weights than the tail has, in descending order.
        lengths: of each element's tail, elements in order; :func:`tail_length` of how many weights there are.

    Returns:
        As :func:`pareto_khat`.
    """
    columns = largest.detach().reshape(largest.shape[0], -1).double().cpu()
    found = [_fit(column, length).khat for column, length in zip(columns.unbind(1), lengths, strict=True)]
    return torch.tensor(found, dtype=torch.float64).to(largest).reshape(largest.shape[1:])


@dataclass(frozen=True)
class _Tail:
    """Weights above a cutoff, ascending, relative to the largest, and the distribution fitted to what they exceed."""

    above: Tensor
    cutoff: float
    khat: float
    sigma: float = math.nan

    def expected(self) -> Tensor:
        """Log quantiles of the fitted distribution at (i - 1/2) / M, no larger than the largest weight there was."""
        place = (torch.arange(len(self.above), dtype=torch.float64) + 0.5) / len(self.above)
        log_survival = torch.log1p(-place)
        excess = -log_survival if self.khat == 0.0 else torch.expm1(-self.khat * log_survival) / self.khat
        return (self.sigma * excess + self.cutoff).log().clamp(max=0.0)


def _fit(descending: Tensor, length: int) -> _Tail:
    if bool(descending.isnan().any()) or float(descending[0]) == math.inf:
        return _Tail(descending[:0], 0.0, math.nan)
    if length >= len(descending) or not bool(descending[0].isfinite()):  # too few; or none is possible
        return _Tail(descending[:0], 0.0, math.inf)
    relative = descending[: length + 1] - descending[0]
    if float(relative[-1]) > -ALIKE:
        return _Tail(relative[:0], 1.0, -math.inf)
    cutoff = max(float(relative[-1]), math.log(torch.finfo(torch.float64).tiny))
    above = relative[relative > cutoff].flip(0).exp()
    if len(above) < LEAST_TAIL:
        return _Tail(above, math.exp(cutoff), math.inf)
    khat, sigma = fit_generalized_pareto(above - math.exp(cutoff))
    return _Tail(above, math.exp(cutoff), khat, sigma)


def psis(
    log_weights: Float[Tensor, "particles *plates"],
) -> tuple[Float[Tensor, "particles *plates"], Float[Tensor, "*plates"]]:
    """Pareto smoothed weights: those of the tail replaced by what the fitted distribution expects of their order.

    Less noise than plain weights, for a little bias. See "Pareto Smoothed Importance Sampling" (Vehtari, Simpson,
    Gelman, Yao, Gabry 2024, https://arxiv.org/abs/1507.02646).

    Args:
        log_weights: unnormalised, in nats, shape ``(particles, *plates)``.

    Returns:
        Normalised log weights in the same shape, and khat, shape ``(*plates)``. Where the tail cannot be fitted, the
        weights are the plain ones.

    Raises:
        TypeError: where these are no floating point numbers.
        ValueError: where there is no particle.
    """
    log_weights = require_log_weights(log_weights)
    count = log_weights.shape[0]
    smoothed, khats = [], []
    for column in log_weights.detach().reshape(count, -1).double().cpu().unbind(1):
        ordered, order = column.sort(descending=True)
        tail, relative = _fit(ordered, tail_length(count)), column - ordered[0]
        if math.isfinite(tail.khat) and tail.sigma > 0.0:
            relative[order[: len(tail.above)]] = tail.expected().flip(0)
        smoothed.append(relative - relative.logsumexp(0))
        khats.append(tail.khat)
    weights, khat = torch.stack(smoothed, 1), torch.tensor(khats, dtype=torch.float64)
    return weights.to(log_weights).reshape(log_weights.shape), khat.to(log_weights).reshape(log_weights.shape[1:])
